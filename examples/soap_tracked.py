"""SOAP (Vyas et al., 2024, "SOAP: Improving and Stabilizing Shampoo using Adam") whose eigenbases are tracked by rotations, in
place of power iteration and QR.

python examples/soap_tracked.py                  # trains it and the SOAP of pytorch_optimizer, then times a step of each
python examples/soap_tracked.py --task digits    # options of the program train
"""

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from spectral_ops import cayley_track, gram_track

TURNS = 2  # of each basis in a step; with one, elementwise second moments fall behind
FLOOR = 1e-6  # of the largest eigenvalue: smaller ones are rounding error


class TrackedSOAP(Optimizer):
    r"""Adam in the eigenbases of `L`, an average of `G Gᵀ`, and `R`, of `Gᵀ G`, for matrices.

        T_L ← β₂ T_L + (1 − β₂) X Xᵀ,   X = B_Lᵀ G B_R,   and so T_R from Xᵀ
        B_L ← B_L P_L,   T_L ← P_Lᵀ T_L P_L,   V ← (P_L ∘ P_L)ᵀ V (P_R ∘ P_R)
        M ← β₁ M + (1 − β₁) G,   V ← β₂ V + (1 − β₂) (B_Lᵀ G B_R)²
        W ← (1 − lr · weight_decay) W − lr · B_L (B_Lᵀ M B_R / (√V + eps)) B_Rᵀ

    `L = B_L T_L B_Lᵀ`, and `P_L` are truncated Cayley maps that turn `B_L` towards the eigenbasis of `L`: by a bounded angle,
    so that second moments can be carried along. Matrices of one shape are computed as one batch.

    Args:
        params: matrices, or groups of them.
        lr, betas, eps, weight_decay: as of AdamW; `betas[1]` is also the decay of `L` and `R`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    shapes[p.shape].append(p)
            for members in shapes.values():
                states = [self.state[p] or start(p) for p in members]
                s = {name: torch.stack([state[name] for state in states]) for name in states[0]}
                u = advance(s, torch.stack([p.grad for p in members]), *group["betas"], group["eps"])
                for i, p in enumerate(members):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(u[i], alpha=-group["lr"])
                    self.state[p] = {name: x[i] for name, x in s.items()}
        return loss


def start(p: Tensor) -> dict[str, Tensor]:
    state = {"step": p.new_zeros(()), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    for side, n in zip(("left", "right"), p.shape, strict=True):
        state[f"basis_{side}"] = torch.eye(n, dtype=p.dtype, device=p.device)
        state[f"residual_{side}"] = p.new_zeros(n, n)
        state[f"eigenvalues_{side}"] = p.new_ones(n)
        state[f"scale_{side}"] = p.grad.square().mean()  # of T, whose diagonal is kept at a geometric mean of 1
    return state


def advance(s: dict[str, Tensor], g: Tensor, beta1: float, beta2: float, eps: float) -> Tensor:
    """Advance the state of a batch of matrices, and return its update, to be multiplied by `−lr`."""
    s["step"] += 1
    left, right = s["basis_left"], s["basis_right"]
    x = left.mT @ g @ right
    share = (1 / (s["step"] + 1)).clamp(min=1 - beta2)  # so that the start, an identity, does not linger
    turn(s, "left", x, share)
    turn(s, "right", x.mT, share)
    turned_left, turned_right = left.mT @ s["basis_left"], right.mT @ s["basis_right"]
    left, right = s["basis_left"], s["basis_right"]
    carried = turned_left.square().mT @ s["exp_avg_sq"] @ turned_right.square()
    s["exp_avg_sq"] = carried.lerp_((left.mT @ g @ right).square_(), 1 - beta2)
    s["exp_avg"].lerp_(g, 1 - beta1)
    first, second = ((1 - beta ** s["step"])[:, None, None] for beta in (beta1, beta2))
    adam = (left.mT @ s["exp_avg"] @ right / first) / ((s["exp_avg_sq"] / second).sqrt_() + eps)
    return left @ adam @ right.mT


# --8<-- [start:turn]
def turn(s: dict[str, Tensor], side: str, x: Tensor, share: Tensor) -> None:
    """Average new curvature into `T`, and turn the basis towards the eigenbasis."""
    basis, d, residual, scale = (s[f"{name}_{side}"] for name in ("basis", "eigenvalues", "residual", "scale"))
    for _ in range(TURNS):
        weight = (1 / (scale * x.shape[-1]))[:, None].expand(-1, x.shape[-1])
        generator, d, residual, log_mean = gram_track(x, d, weight, share, residual=residual)
        basis, d, residual = cayley_track(basis, generator, d, residual=residual)
        d, scale = d.clamp(min=FLOOR * d.amax(-1, keepdim=True)), scale * log_mean.exp()
        x, share = x[..., :0], torch.zeros_like(share)  # the next turn has nothing new
    s |= {f"basis_{side}": basis, f"eigenvalues_{side}": d, f"residual_{side}": residual, f"scale_{side}": scale}

# --8<-- [end:turn]


if __name__ == "__main__":
    from spectral_ops.bench import steps, train

    train.main(["--methods", "soap_tracked,soap", *sys.argv[1:]])
    steps.main(["--setting", "reuse"])
