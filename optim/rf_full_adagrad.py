"""RF-AdaGrad with a full matrix, and the form of it that needs no inverse.

Lin et al., 2024, "Can We Remove the Square-Root in Adaptive Gradient Methods? A Second-Order Perspective", (17), (18), (25).
(24) to (26) print γ with the wrong sign: for γ = 1 that inverse goes to zero, whatever the gradients. (27) has it right.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from spectral_ops.optim import _options as check
from spectral_ops.optim import rf_shampoo
from spectral_ops.optim._engine import Batch
from spectral_ops.optim._factors import store
from spectral_ops.optim._kronecker import KroneckerOptimizer, axes, multiply
from spectral_ops.optim._pieces import Group, Piece, whole
from spectral_ops.reference import column, raised

LARGEST = 1e15  # of the inverse, where γ = 1: it grows wherever no gradient points


class RFFullAdaGrad(KroneckerOptimizer):
    r"""AdaGrad with a full matrix for each parameter and without the square root: for small problems.

    For the gradient `g` of a parameter of `n` elements, `H = b g gᵀ`, it keeps the `n × n` matrix `S⁻¹` (`inverse_free=True`),

        S⁻¹ ← (1 + β₂ γ) S⁻¹ − β₂ S⁻¹HS⁻¹ + β₂²/2 (S⁻¹HS⁻¹HS⁻¹ − 2γ S⁻¹HS⁻¹ + γ² S⁻¹)

    which is positive definite by construction (Claim 3) and a product of a matrix with a vector; or, with `inverse_free=False`,
    `S ← (1 − β₂ γ) S + β₂ (H + λ I)` and its inverse. The first shrinks `S⁻¹` only for `β₂ b gᵀS⁻¹g < 2`, so its `β₂` is
    limited to `1 / (b gᵀS⁻¹g)`. (25) prints `γ` with the other sign, and the inverse of an average would vanish.

    `update_scale=None` is the paper's box, `m ← α₁ m + S⁻¹ g + κ θ`, `θ ← θ − lr · m`; otherwise scale, momentum and decay
    are those of `IFShampoo`. All parameters are taken, whatever their dimensions, but for groups with `algorithm="adamw"`.

    Args:
        params: parameters, named parameters, or groups, as of `IFShampoo`.
        lr: learning rate, a float or a tensor of one element. With `update_scale="rms"` it means what AdamW's does.
        momentum: `α₁`.
        preconditioner_lr: `β₂`, in (0, 1). None: 0.01 with `update_scale=None`, else 0.3.
        damping: `λ`, only with `inverse_free=False`.
        weight_decay: `κ`.
        batch_size: `b`, as of `IFShampoo`.
        update_interval: as of `IFShampoo`.
        inverse_free: keep `S⁻¹` alone.
        gamma: `γ`: 0 for a sum, AdaGrad; 1 for a moving average.
        update_scale: "rms": every update has root mean square 0.2 before `lr`; "clip": at most 1; None: the paper's box.
        decoupled_weight_decay: as of `IFShampoo`.
        max_preconditioner_dim: parameters of more elements keep a diagonal.
        preconditioner_dtype: as of `IFShampoo`.
        adamw_betas: of AdamW inside.
        adamw_eps: of AdamW inside.
        seed: of the stochastic rounding.
        maximize: ascend.
        capturable: the step may be captured in a CUDA graph, as of `IFShampoo`.
        unknown: `mesh` and `transport_dtype`, as of `IFShampoo`; options of other optimizers, as long as they are false.

    Raises:
        ValueError, TypeError, RuntimeError: as `IFShampoo`.

    Lin et al., 2024, "Can We Remove the Square-Root in Adaptive Gradient Methods? A Second-Order Perspective",
    (17), (18), (25).
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1.5e-2,
        momentum: float = 0.9,
        preconditioner_lr: float | None = None,
        damping: float = 0.0,
        weight_decay: float = 0.0,
        batch_size: Any = 1,
        update_interval: int = 1,
        *,
        inverse_free: bool = True,
        gamma: float = 0.0,
        update_scale: str | None = "rms",
        decoupled_weight_decay: bool | None = None,
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
        check.choice(group, "inverse_free", (True, False))
        check.step(group, "preconditioner_lr")
        if group["inverse_free"] and group["damping"]:
            raise ValueError(f"`damping` needs `inverse_free=False`: (18) has a curvature of rank one, got {group['damping']}")

    def layout(self, group: Group) -> tuple[Any, ...]:
        return (*super().layout(group), group["inverse_free"])

    def cut(self, p: Tensor, group: Group, index: int = 0) -> Iterator[Piece]:
        yield whole(p, index, (p.numel(),))

    def _is_matrix(self, group: Group, i: int) -> bool:
        return group["algorithm"] != "adamw"

    def init_axis(self, group: Group, start: Tensor) -> dict[str, Tensor]:
        if group["inverse_free"]:  # bfloat16 would not leave it positive definite
            return {"inverse": raised(start)}
        return {"factor": start, "inverse": start}

    def learn(self, group: Group, batch: Batch, usable: Tensor, weight: Tensor) -> None:
        """S⁻¹ ← (1 + β₂ γ) S⁻¹ − β₂ S⁻¹HS⁻¹ + β₂²/2 (S⁻¹HS⁻¹HS⁻¹ − 2γ S⁻¹HS⁻¹ + γ² S⁻¹),   H = b g gᵀ"""
        if not group["inverse_free"]:
            rf_shampoo.learn(group, batch, usable, weight)
            return
        (inverse,), g, beta = axes(batch, "inverse"), batch.grad.squeeze(-1), rf_shampoo.step(group)
        s = raised(inverse).to(g.dtype)
        diagonal = s if s.ndim == 2 else s.diagonal(dim1=-2, dim2=-1)
        y = s * g if s.ndim == 2 else (s @ g.unsqueeze(-1)).squeeze(-1)
        power, outer = column(beta * weight) * y * g, y * y
        if s.ndim == 3:
            power, outer = power.sum(-1, keepdim=True), y.unsqueeze(-1) * y.unsqueeze(-2)
        step = beta / power.clamp(min=1)  # a longer one would make the inverse larger the larger the gradient is
        gamma = step * group["gamma"] * (diagonal.amax(-1, keepdim=True) < LARGEST)
        keep, gain = 1 + gamma + gamma.square() / 2, step * column(weight) * (power.clamp(max=1) / 2 - 1 - gamma)
        if s.ndim == 3:
            keep, gain = keep.unsqueeze(-1), gain.unsqueeze(-1)
        new = keep * s + gain * outer
        store(usable & new.isfinite().flatten(1).all(1), inverse, new)

    def precondition(self, group: Group, batch: Batch, x: Tensor) -> tuple[Tensor, Tensor]:
        """`S⁻¹ x`"""
        return multiply(batch, "inverse", x, -1.0)
