"""RF-Shampoo: Shampoo without the square root, which inverts its factors.

Lin et al., 2024, "Can We Remove the Square-Root in Adaptive Gradient Methods? A Second-Order Perspective", Fig. 5 and 7.
`S = S_C ⊗ S_K`; `C` is the left (row) side, `K` the right one.
"""

from typing import Any

import torch
from torch import Tensor

from spectral_ops.optim import _options as check
from spectral_ops.optim._engine import Batch
from spectral_ops.optim._factors import balance, multiplied, product_of_others, rest, ridged, seeds, store, unfolded
from spectral_ops.optim._kronecker import KroneckerOptimizer, axes, multiply, shaped
from spectral_ops.optim._pieces import Group
from spectral_ops.reference import add_diagonal, block, column, raised

PAPER_STEP, STEP = 0.01, 0.3
LARGEST = 1e30  # of a factor's entries: larger ones may overflow


class RFShampoo(KroneckerOptimizer):
    r"""Shampoo without the square root.

    For a weight `p × d` with gradient `G` of a loss that is a mean over `b`, with `S = S_C ⊗ S_K`:

        S_C ← (1 − β₂ γ) S_C + β₂/d (b G S_K⁻¹ Gᵀ + λ Tr(S_K⁻¹) I), and the mirror image for S_K, both from the old inverses

    `update_scale=None` is the paper's box, `m ← α₁ m + S_C⁻¹ G S_K⁻¹ + κ θ`, `θ ← θ − lr · m`; otherwise scale, momentum and
    decay are those of `IFShampoo`, which does the same to first order without an inverse (Claim 10). Factors are inverted by
    Cholesky decompositions, with 8 machine epsilons of their largest diagonal element added.

    Args:
        params: parameters, named parameters, or groups, as of `IFShampoo`.
        lr: learning rate, a float or a tensor of one element. With `update_scale="rms"` it means what AdamW's does.
        momentum: `α₁`.
        preconditioner_lr: `β₂`, in (0, 1). None: 0.01 with `update_scale=None`, else 0.3.
        damping: `λ`.
        weight_decay: `κ`.
        batch_size: `b`, as of `IFShampoo`.
        update_interval: as of `IFShampoo`.
        gamma: `γ`: 1 for a moving average, 0 for a sum.
        update_scale: "rms": every update has root mean square 0.2 before `lr`; "clip": at most 1; None: the paper's box.
        decoupled_weight_decay: as of `IFShampoo`.
        per_axis: a factor for each axis of a parameter, as of `IFShampoo`.
        max_preconditioner_dim: larger sides keep a diagonal factor.
        preconditioner_dtype: of factors and inverses; bfloat16 resolves eigenvalues down to a sixteenth of the largest only.
        adamw_betas: of AdamW inside.
        adamw_eps: of AdamW inside.
        seed: of the stochastic rounding.
        maximize: ascend.
        capturable: the step may be captured in a CUDA graph, as of `IFShampoo`.
        unknown: `mesh` and `transport_dtype`, as of `IFShampoo`; options of other optimizers, as long as they are false.

    Raises:
        ValueError, TypeError, RuntimeError: as `IFShampoo`.

    Lin et al., 2024, "Can We Remove the Square-Root in Adaptive Gradient Methods? A Second-Order Perspective", Fig. 5, Fig. 7.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1.5e-2,
        momentum: float = 0.9,
        preconditioner_lr: float | None = None,
        damping: float = 1e-3,
        weight_decay: float = 0.0,
        batch_size: Any = 1,
        update_interval: int = 1,
        *,
        gamma: float = 1.0,
        update_scale: str | None = "rms",
        decoupled_weight_decay: bool | None = None,
        per_axis: bool = False,
        max_preconditioner_dim: int = 8192,
        preconditioner_dtype: torch.dtype | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        seed: int = 0,
        maximize: bool = False,
        capturable: bool = False,
        **unknown: Any,
    ):
        super().__init__(params, locals())

    def check_options(self, group: Group) -> None:
        super().check_options(group)
        check.choice(group, "gamma", (0, 1))
        check.step(group, "preconditioner_lr")

    def init_axis(self, group: Group, start: Tensor) -> dict[str, Tensor]:
        return {"factor": start, "inverse": start}

    def learn(self, group: Group, batch: Batch, usable: Tensor, weight: Tensor) -> None:
        learn(group, batch, usable, weight)

    def precondition(self, group: Group, batch: Batch, x: Tensor) -> tuple[Tensor, Tensor]:
        """`S_C⁻¹ x S_K⁻¹`"""
        return multiply(batch, "inverse", x, -1.0)


def learn(group: Group, batch: Batch, usable: Tensor, weight: Tensor) -> None:
    """S_C ← (1 − β₂ γ) S_C + β₂/d (b G S_K⁻¹ Gᵀ + λ Tr(S_K⁻¹) I), and its mirror image."""
    beta, s, factors, inverses = step(group), batch.state, axes(batch, "factor"), axes(batch, "inverse")
    g = shaped(batch, batch.grad)
    sizes = [_diagonal(x).mean(-1) for x in inverses]
    balance(inverses, sizes, usable)
    balance(factors, sizes, usable, power=-1)
    traces = [_diagonal(x).mean(-1) for x in inverses]
    new = []
    for axis, factor in enumerate(factors):
        share = beta * weight / rest(batch.dims, axis)
        damp = beta * group["damping"] * product_of_others(traces, axis)
        left, right = unfolded(multiplied(g, inverses, but=axis), axis), unfolded(g, axis)
        kept = (1 - beta * group["gamma"]) * raised(factor)
        if factor.ndim == 2:
            new.append(kept + column(share) * (left * right).sum(-1) + column(damp))
        else:
            w = left @ right.mT
            new.append(add_diagonal(torch.addcmul(kept, block(share / 2), w + w.mT), column(damp)))
    for axis, (factor, inverse, value) in enumerate(zip(factors, inverses, new, strict=True)):
        fits = usable & (_diagonal(value).amax(-1) < LARGEST)
        store(fits, factor, value, seeds(s, axis))
        inverted, valid = _inverse(raised(factor), factor.dtype)
        store(fits & valid, inverse, inverted)


def step(group: Group) -> float:
    """`β₂`"""
    return float(group["preconditioner_lr"] or (PAPER_STEP if group["update_scale"] is None else STEP))


def _diagonal(x: Tensor) -> Tensor:
    return raised(x if x.ndim == 2 else x.diagonal(dim1=-2, dim2=-1))


def _inverse(factor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of what was stored in `dtype`, and where it is one."""
    factor = ridged(factor, dtype)
    inverse = factor.reciprocal() if factor.ndim == 2 else torch.cholesky_inverse(torch.linalg.cholesky_ex(factor).L)
    return inverse, inverse.isfinite().flatten(1).all(1)
