"""Muon (Jordan et al., 2024) whose Newton–Schulz iteration has its symmetric products by `spectral_ops.gram`.

python examples/muon_gram.py                  # trains it and torch.optim.Muon, then times a step of each
python examples/muon_gram.py --task digits    # options of the program train
"""

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from spectral_ops import gram

A, B, C = 3.4445, -4.7750, 2.0315  # steepest at zero of all quintics that keep singular values near 1
STEPS = 5
TARGET_RMS = 0.2  # of an update before the learning rate: AdamW's


# --8<-- [start:orthogonalized]
def orthogonalized(g: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """`U Vᵀ` of `g = U Σ Vᵀ`, about: singular values between 0.7 and 1.2. `g` is `(b, n, m)`."""
    x = (g.mT if g.shape[-2] > g.shape[-1] else g).to(dtype)
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)
    for _ in range(STEPS):
        y = gram(x)
        z = gram(y, alpha=C, beta=B, c=y)  # B y + C y², since y is symmetric
        x = torch.baddbmm(x, z, x, beta=A)  # rounded once: the two terms nearly cancel
    return x.mT if g.shape[-2] > g.shape[-1] else x

# --8<-- [end:orthogonalized]


class MuonGram(Optimizer):
    r"""The steps of `torch.optim.Muon(adjust_lr_fn="match_rms_adamw")`, with matrices of one shape as one batch.

        M ← μ M + (1 − μ) G
        W ← (1 − lr · weight_decay) W − lr · 0.2 √max(n, m) · orthogonalized(μ M + (1 − μ) G)

    Args:
        params: matrices, or groups of them.
        lr: learning rate, in kind AdamW's.
        momentum: `μ`.
        weight_decay: decoupled.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, momentum: float = 0.95, weight_decay: float = 0.1):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    shapes[p.shape].append(p)
            for shape, members in shapes.items():
                grads = [p.grad for p in members]
                for p in members:
                    if not self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                buffers = [self.state[p]["momentum_buffer"] for p in members]
                torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
                ahead = torch._foreach_lerp(grads, buffers, group["momentum"])
                u = orthogonalized(torch.stack(ahead)).to(members[0].dtype)
                torch._foreach_mul_(members, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(members, u.unbind(), alpha=-group["lr"] * TARGET_RMS * max(shape) ** 0.5)
        return loss


if __name__ == "__main__":
    from spectral_ops.bench import steps, train

    train.main(["--methods", "muon_gram,muon", *sys.argv[1:]])
    steps.main(["--setting", "reuse"])
