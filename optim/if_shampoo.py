"""IF-Shampoo: inverse-free and root-free Shampoo, by products of matrices alone.

Lin et al., 2024, "Can We Remove the Square-Root in Adaptive Gradient Methods? A Second-Order Perspective", Fig. 5 and 7.
`S⁻¹ = (C Cᵀ) ⊗ (K Kᵀ)`; `C` is the left (row) side, `K` the right one. (35) and (36) in its App. G swap `G` and `Gᵀ`.
"""

from typing import Any

import torch
from torch import Tensor

import spectral_ops as ops
from spectral_ops.optim import _options as check
from spectral_ops.optim._engine import Batch
from spectral_ops.optim._factors import mean_square_entries, multiplied, product_of_others, rest, seeds, store, unfolded
from spectral_ops.optim._kronecker import KroneckerOptimizer, axes, multiply, shaped
from spectral_ops.optim._pieces import Group
from spectral_ops.reference import add_diagonal, column, keep, raised

PAPER_STEP, STEP = 0.01, 0.95
LARGEST = 1e15  # of a momentum's entries: squares of larger ones overflow


class IFShampoo(KroneckerOptimizer):
    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1.5e-2,
        momentum: float = 0.9,
        preconditioner_lr: float | None = None,
        riemannian_momentum: float = 0.5,
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
        check.decay(group, "riemannian_momentum")
        check.choice(group, "gamma", (0, 1))
        check.step(group, "preconditioner_lr")

    def init_axis(self, group: Group, start: Tensor) -> dict[str, Tensor]:
        return {"factor": start, "momentum": torch.zeros_like(start)}

    def learn(self, group: Group, batch: Batch, usable: Tensor, weight: Tensor) -> None:
        """m_C ← α₂ m_C + (1 − α₂)/(2d) (b CᵀG KKᵀ GᵀC + λ Tr(KᵀK) CᵀC − γ d I),   C ← C (I − β₂ m_C / max(1, ‖m_C‖_F))"""
        s, dims = batch.state, batch.dims
        factors, momenta = axes(batch, "factor"), axes(batch, "momentum")
        decay, damping, gamma = group["riemannian_momentum"], group["damping"], group["gamma"]
        half = (1 - decay) / 2
        step = group["preconditioner_lr"] or (PAPER_STEP if group["update_scale"] is None else STEP)
        x = multiplied(shaped(batch, batch.grad), factors, transpose=True)
        traces = [mean_square_entries(k) for k in factors]
        for axis, (k, m) in enumerate(zip(factors, momenta, strict=True)):
            wide = unfolded(x, axis).to(k.dtype)
            share = weight / rest(dims, axis)
            damp = damping * product_of_others(traces, axis)
            if k.ndim == 2:
                w = (wide.square().sum(-1) * column(share) + raised(k).square() * column(damp) - gamma) * half
                new = decay * raised(m) + w
            else:
                base = m
                beta = decay
                if damping:
                    base = ops.gram(k.mT, damp.to(k.dtype).unsqueeze(-1).expand(k.shape[:2]), alpha=half, beta=decay, c=m)
                    beta = 1.0
                new = ops.gram(wide, share.to(k.dtype).unsqueeze(-1).expand(len(k), wide.shape[-1]), alpha=half, beta=beta, c=base)
                add_diagonal(new, -half * gamma)
            diagonal = new if k.ndim == 2 else new.diagonal(dim1=-2, dim2=-1)
            fits = usable & (diagonal.abs().amax(-1) < LARGEST)
            keep(fits, m, new)
            seed = seeds(s, axis)
            size = step * fits.to(weight.dtype)
            if k.ndim == 2:
                bounded = size / torch.linalg.vector_norm(raised(m), dim=-1).clamp(min=1)
                store(fits, k, raised(k) * (1 - column(bounded) * raised(m)), seed)
            else:
                rounding = {} if seed is None else {"rounding": "stochastic", "seed": seed}
                k.copy_(ops.factor_update(k, m, size, **rounding))

    def precondition(self, batch: Batch, x: Tensor) -> tuple[Tensor, Tensor]:
        """`C Cᵀ x K Kᵀ`"""
        factors, alpha = axes(batch, "factor"), batch.state["scale"]
        if len(factors) == 2:
            # What `apply_root` does with bases and eigenvalues, here with factors and ones; a diagonal factor is an eigenvalue.
            bases = [k if k.ndim == 3 else None for k in factors]
            ones = [torch.ones(k.shape[:2], dtype=alpha.dtype, device=k.device) if k.ndim == 3 else raised(k) ** -2 for k in factors]
            return ops.apply_root(x, bases[0], ones[0], bases[1], ones[1], alpha, 1.0, return_squares=True)
        return multiply(batch, "factor", multiplied(shaped(batch, x), factors, transpose=True).reshape(x.shape), -1.0)
