"""SpectralKron with its default method alone, in PyTorch's own operations: to read, and to copy.

Names, state and results are those of `spectral_ops.optim.SpectralKron`. `python -m spectral_ops.bench single-file` puts what it
needs of `spectral_ops.reference` before it, which makes examples/spectral_kron.py.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from spectral_ops.reference import (
    RMS_EPSILON,
    accumulation_dtype,
    apply_root,
    block,
    kron_track,
    momentum_update,
    raised,
)

TARGET_RMS = 0.2  # of an update before the learning rate: about AdamW's own, so that its learning rates carry over
ROOT = 1.7
EPSILON = 0.1  # relative eigenvalue gap under which rotations are damped
ORDER, LIMIT = 3, 0.48  # of the truncated Cayley map, and the largest generator with which it corrects itself


class SpectralKron(Optimizer):
    r"""Kronecker-factored curvature in spectral form, learned without any decomposition (Lin et al., 2025).

    For a weight `n × m` with gradient `G` it keeps `S = α S_C ⊗ S_K`, `S_l = B_l T_l B_lᵀ`, an average of gradient outer
    products, turns the bases `B_l` towards the eigenbases by a bounded step in every update, and steps along an inverse root:

        M ← μ M + (1 − μ) G,   N = μ M + (1 − μ) G
        θ ← (1 − lr · weight_decay) θ − lr · scaled(α^(−1/root) S_C^(−1/root) N S_K^(−1/root))

    Every update has root mean square 0.2 before `lr`. A parameter of three dimensions is a batch of matrices (experts), one of
    more a convolution `(out, in·kh·kw)`; one of fewer than two, and groups with `algorithm="adamw"`, take AdamW: give it
    embeddings, heads and weights of Conv1d. Matrices of one shape in a group are computed as one batch. No step waits for the
    device. A parameter whose gradient is not finite, or overflows when squared, is left untouched with its state, and
    `self.state[p]["skipped"]` counts that.

    Args:
        lr: learning rate, a float or a tensor of one element; it means what AdamW's does.
        betas: decay of the momentum `μ`, decay of the curvature average.
        root: 2 is Adam-like, 1 Newton-like. None: 1.7, which trained better than 2 on two small tasks.
        weight_decay: decoupled, multiplied by `lr`.
        max_preconditioner_dim: larger sides keep a diagonal factor.
        preconditioner_dtype: of `B_l` and of `T_l` off its diagonal; None: the parameter's (float32 for float16). bfloat16 is
            rounded stochastically. Eigenvalues and scales are float32 (float64 for float64 parameters) always.
        adamw_betas, adamw_eps: of AdamW inside.
        seed: of the stochastic rounding.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 2e-2,
        betas: tuple[float, float] = (0.9, 0.5),
        *,
        root: float | None = None,
        weight_decay: float = 0.0,
        max_preconditioner_dim: int = 8192,
        preconditioner_dtype: torch.dtype | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        seed: int = 0,
    ):
        options = {name: value for name, value in locals().items() if name not in ("self", "params", "__class__")}
        super().__init__(params, options | {"algorithm": None})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group["algorithm"] not in (None, "matrix", "adamw"):
            raise ValueError(f'`algorithm` must be None, "matrix" or "adamw", got {group["algorithm"]!r}')
        if group["preconditioner_dtype"] is not None:  # by its name, which any checkpoint can hold
            group["preconditioner_dtype"] = str(group["preconditioner_dtype"]).removeprefix("torch.")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; `closure` re-evaluates the model and returns the loss."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        first = 0
        for group in self.param_groups:
            classes: dict[Any, list[Tensor]] = {}
            for index, p in enumerate(group["params"], first):
                if p.grad is None or p.numel() == 0:
                    continue
                is_matrix = p.ndim >= 2 and group["algorithm"] != "adamw"
                if not self.state[p]:
                    self.state[p] = _state(group, p, index, is_matrix)
                shape = _matrices(p).shape[1:] if is_matrix else None
                classes.setdefault((shape, p.dtype, p.device), []).append(p)
            for (shape, *_), members in classes.items():
                (self._adamw if shape is None else self._precondition)(group, members)
            first += len(group["params"])
        return loss

    def _precondition(self, group: dict[str, Any], members: list[Tensor]) -> None:
        """Step matrices of one shape, as one batch."""
        views = [{k: x if p.ndim == 3 else x.unsqueeze(0) for k, x in self.state[p].items()} for p in members]
        s = {name: torch.cat([view[name] for view in views]) for name in views[0]}
        g = torch.cat([_joint(_matrices(p.grad)) for p in members if p.grad is not None])
        bases, residuals = ((s.get(f"{name}_left"), s.get(f"{name}_right")) for name in ("basis", "residual"))
        d = s["eigenvalues_left"], s["eigenvalues_right"]
        finite = kron_track(
            g, *bases, *residuals, *d, s["scale"], s["updates"], s.get("seed"),
            beta=1 - group["betas"][1], damping=0.0, epsilon=EPSILON, limit=LIMIT, order=ORDER,
        )  # fmt: skip
        direction = momentum_update(s["momentum_buffer"], g, finite, group["betas"][0], nesterov=True, maximize=False)
        u, squares = apply_root(direction, bases[0], d[0], bases[1], d[1], s["scale"], group["root"] or ROOT)
        square, sizes = squares.sum(-1), [len(_matrices(p)) for p in members]
        lr = torch.as_tensor(group["lr"], dtype=torch.float64).reshape(())  # on the host it is copied nowhere, which would wait
        s["step"] += finite & ((square > 0) | (lr != 0))  # a step that moves nothing is none
        s["skipped"] += ~finite
        lr, factor = lr.to(u.dtype), TARGET_RMS / ((square / u[0].numel()).sqrt() + RMS_EPSILON)
        old = raised(torch.cat([_matrices(p) for p in members]))
        decayed = old - lr * group["weight_decay"] * old if group["weight_decay"] else old
        new = torch.where(block(finite), torch.addcmul(decayed, u, block(factor * -lr)), old)
        torch._foreach_copy_(members, [x.view(p.shape) for p, x in zip(members, new.split(sizes), strict=True)])
        for name, stack in s.items():
            torch._foreach_copy_([view[name] for view in views], stack.split(sizes))

    def _adamw(self, group: dict[str, Any], members: list[Tensor]) -> None:
        states, (beta1, beta2) = [self.state[p] for p in members], group["adamw_betas"]
        squares = torch.stack([torch.linalg.vector_norm(p.grad, dtype=accumulation_dtype(p.dtype)) for p in members]).square()
        finite = squares.isfinite()
        moves = finite & ((squares > 0) | (group["lr"] != 0))  # a step that moves nothing is none
        torch._foreach_add_([s["step"] for s in states], moves.float().unbind())
        torch._foreach_add_([s["skipped"] for s in states], (~finite).long().unbind())
        for p, s, rests in zip(members, states, (~moves).float().unbind(), strict=True):
            tensors = [p, p.grad, s["exp_avg"], s["exp_avg_sq"]]
            dense = [x.contiguous() for x in tensors]
            torch._fused_adamw_(
                *([x] for x in dense), [], [s["step"]], lr=group["lr"], beta1=beta1, beta2=beta2, eps=group["adamw_eps"],
                weight_decay=group["weight_decay"], amsgrad=False, maximize=False, found_inf=rests,
            )  # type: ignore[call-overload]  # fmt: skip
            for x, y in zip(tensors, dense, strict=True):
                if x is not y:
                    x.copy_(y)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's own, which casts to the parameter's dtype; here float32 eigenvalues stay so under bfloat16 parameters."""
        super().load_state_dict(state_dict)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for p, number in zip(group["params"], saved["params"], strict=True):
                for name, value in state_dict["state"].get(number, {}).items():
                    self.state[p][name] = value.to(p.device, copy=True)


def _matrices(x: Tensor) -> Tensor:
    """A parameter, or a gradient, as `(count, n, m)`."""
    return x if x.ndim == 3 else x.reshape(1, len(x), -1)


def _joint(g: Tensor) -> Tensor:
    """Not finite in all matrices if in one, so that those of one parameter skip a step together."""
    return g if len(g) == 1 else g + 0 * torch.linalg.vector_norm(g, dtype=accumulation_dtype(g.dtype)).square()


def _state(group: dict[str, Any], p: Tensor, index: int, is_matrix: bool) -> dict[str, Tensor]:
    """Of a parameter that has none; `index` is its place in the optimizer."""
    lead = p.shape[:1] if is_matrix and p.ndim == 3 else torch.Size()
    state = {
        "step": torch.zeros(lead, dtype=torch.float32, device=p.device),
        "skipped": torch.zeros(lead, dtype=torch.int64, device=p.device),
    }
    if not is_matrix:
        return state | {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    count, n, m = _matrices(p).shape
    default = torch.float32 if p.dtype == torch.float16 else p.dtype
    dtype = getattr(torch, group["preconditioner_dtype"]) if group["preconditioner_dtype"] else default
    wide: dict[str, Any] = {"dtype": accumulation_dtype(p.dtype), "device": p.device}
    state["momentum_buffer"] = torch.zeros(*lead, n, m, dtype=p.dtype, device=p.device)
    state |= {"updates": torch.zeros(lead, **wide), "scale": torch.ones(lead, **wide)}
    for side, size in (("left", n), ("right", m)):
        state[f"eigenvalues_{side}"] = torch.ones(*lead, size, **wide)
        if 1 < size <= group["max_preconditioner_dim"]:
            state[f"basis_{side}"] = torch.eye(size, dtype=dtype, device=p.device).repeat(*lead, 1, 1)
            state[f"residual_{side}"] = torch.zeros_like(state[f"basis_{side}"])
    if dtype == torch.bfloat16:  # streams of random bits that do not depend on what else is in a batch
        name = hashlib.blake2b(f"{group['seed']}/{index}/0".encode(), digest_size=8).digest()
        state["seed"] = torch.arange(count, device=p.device).view(lead) + int.from_bytes(name, "little", signed=True)
    return state
