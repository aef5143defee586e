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
from spectral_ops.optim._factors import (
    balance,
    mean_square_entries,
    multiplied,
    product_of_others,
    rest,
    seeds,
    store,
    unfolded,
)
from spectral_ops.optim._kronecker import KroneckerOptimizer, axes, multiply, shaped
from spectral_ops.optim._pieces import Group
from spectral_ops.reference import column, frobenius, keep, raised

PAPER_STEP, STEP = 0.01, 0.95
LARGEST = 1e15  # of a curvature and of factors: squares of larger ones overflow in the norm of a momentum


class IFShampoo(KroneckerOptimizer):
    r"""Inverse-free and root-free Shampoo: its curvature is learned, and applied, by products of matrices alone.

    For a weight `p × d` with gradient `G` of a loss that is a mean over `b`, with `S⁻¹ = (C Cᵀ) ⊗ (K Kᵀ)`:

        m_C ← α₂ m_C + (1 − α₂)/(2d) (b CᵀG KKᵀ GᵀC + λ Tr(KᵀK) CᵀC − γ d I),   C ← C (I − β₂ m_C / max(1, ‖m_C‖_F))
        and the mirror image for K, both from the old factors

    With `update_scale=None` the rest is the paper's, and every step that of the package `sirfshampoo`:

        m ← α₁ m + C Cᵀ G K Kᵀ + κ θ,   θ ← θ − lr · m

    Otherwise the factors start at the scale of the first gradient, and the gradient is averaged before it is preconditioned:

        M ← α₁ M + (1 − α₁) G,   N = α₁ M + (1 − α₁) G (Nesterov)
        θ ← (1 − lr · κ) θ − lr · scaled(C Cᵀ N K Kᵀ)

    Parameters of fewer than two dimensions, groups with `algorithm="adamw"` and, where the groups carry `param_names`,
    embeddings and heads by their names, take AdamW in the same optimizer. `param_groups(model, lr)` splits a model.
    Convolutions are matrices `(out, in·kh·kw)`; other leading dimensions are a batch of matrices (experts). All parameters
    of one shape in a group are computed as one batch. A step does not synchronise with the host.

    Args:
        params: parameters, named parameters, or groups. A group may also set `algorithm` ("matrix", "adamw" or None: by its
            parameters' names), `conv` (True for Conv1d weights), `split_sizes` and `num_heads` (how a fused weight is cut).
        lr: learning rate, a float or a tensor of one element. With `update_scale="rms"` it means what AdamW's does.
        momentum: `α₁`.
        preconditioner_lr: `β₂`, in (0, 1). None: 0.01 with `update_scale=None`, the paper's, else 0.95.
        riemannian_momentum: `α₂`.
        damping: `λ`, in units of squared gradients; of the first gradient's mean square, unless `update_scale` is None.
        weight_decay: `κ`.
        batch_size: `b`, a number, a tensor of one element, or a function without arguments that returns either and is called in
            every step. It is not part of a checkpoint then.
        update_interval: every matrix updates its factors once in so many steps, in each step another share of the matrices, so
            that all steps cost the same; in the first ten steps all do.
        gamma: `γ`: 1 for a moving average, 0 for a sum.
        update_scale: "rms": every update has root mean square 0.2 before `lr`; "clip": at most 1; None: the paper's box.
        decoupled_weight_decay: True: `κ θ` is added to the update, as in AdamW. False: to what the momentum averages. None:
            False with `update_scale=None`, else True.
        per_axis: a factor for each axis of a parameter (Ohlson et al., 2013) in place of a matrix's two; axes of length 1 have
            none. Together with `algorithm="matrix"` parameters of fewer than two dimensions have one too.
        max_preconditioner_dim: larger sides keep a diagonal factor.
        preconditioner_dtype: of factors and their momenta; None: the parameter's (float32 for float16). bfloat16 factors are
            rounded stochastically.
        adamw_betas: of AdamW inside.
        adamw_eps: of AdamW inside.
        seed: of the stochastic rounding.
        maximize: ascend.
        capturable: the step may be captured in a CUDA graph, once one was made without. It needs `update_interval=1`; a tensor
            `lr` must be on the device.
        unknown: `mesh`, a DeviceMesh of ranks that share the work on parameters which each of them has, as under
            DistributedDataParallel (for DTensors it is their own; all its ranks must call `step` and `state_dict` together);
            `transport_dtype`, torch.bfloat16 or torch.float32, in which gradients and updates travel (None: the
            parameter's); options of other optimizers, as long as they are false.

    A parameter whose gradient has a NaN or an infinity, or whose square overflows, is left untouched with its state;
    `skipped_steps()` counts that. Unlike in the paper's box, a gradient of zeros, or with a root mean square under 1e-15,
    leaves the factors as they are, and so does one whose curvature is over 1e15.

    Raises:
        ValueError, TypeError: options out of range, empty or complex parameters, in a sentence that names them.
        RuntimeError: sparse gradients.

    Lin et al., 2024, "Can We Remove the Square-Root in Adaptive Gradient Methods? A Second-Order Perspective", Fig. 5, Fig. 7.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 4e-2,
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
        s, factors = batch.state, axes(batch, "factor")
        step = group["preconditioner_lr"] or (PAPER_STEP if group["update_scale"] is None else STEP)
        decay, gamma = group["riemannian_momentum"], group["gamma"]
        x = multiplied(shaped(batch, batch.grad), factors, transpose=True)
        traces = [mean_square_entries(k) for k in factors]
        sizes = torch.stack([weight * frobenius(unfolded(x, 0)).square(), *traces])
        usable = usable & (sizes.amax(0) < LARGEST)
        for axis, (k, m) in enumerate(zip(factors, axes(batch, "momentum"), strict=True)):
            share = weight / rest(batch.dims, axis)
            damping = group["damping"] * product_of_others(traces, axis)
            update = _diagonal_update if k.ndim == 2 else ops.inverse_free_update
            update(
                k, m, unfolded(x, axis), share, damping, usable,
                step=step, decay=decay, gain=(1 - decay) / 2, gamma=gamma, seed=seeds(s, axis),
            )  # fmt: skip
        balance(factors, [trace.sqrt() for trace in traces], usable)

    def precondition(self, group: Group, batch: Batch, x: Tensor) -> tuple[Tensor, Tensor]:
        """`C Cᵀ x K Kᵀ`"""
        factors, alpha = axes(batch, "factor"), batch.state["scale"]
        if len(factors) == 2:
            # As `apply_root` has it: factors for bases, eigenvalues of one; of a diagonal factor, the inverses of its squares.
            (b_c, d_c), (b_k, d_k) = (_eigen(k, alpha.dtype) for k in factors)
            return ops.apply_root(x, b_c, d_c, b_k, d_k, alpha, 1.0, return_squares=True)
        return multiply(batch, "factor", multiplied(shaped(batch, x), factors, transpose=True).reshape(x.shape), -1.0)


def _eigen(k: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
    if k.ndim == 2:
        return None, raised(k).to(dtype) ** -2
    return k, torch.ones(k.shape[:2], dtype=dtype, device=k.device)


def _diagonal_update(
    k: Tensor, m: Tensor, x: Tensor, share: Tensor, damping: Tensor, usable: Tensor,
    *, step: float, decay: float, gain: float, gamma: float, seed: Tensor | None,
) -> None:  # fmt: skip
    """What `inverse_free_update` does, to the diagonal of a factor."""
    w = column(share) * x.square().sum(-1) + column(damping) * raised(k).square()
    keep(usable, m, decay * raised(m) + gain * (w - gamma))
    bounded = step / torch.linalg.vector_norm(raised(m), dim=-1).clamp(min=1)
    store(usable, k, raised(k) * (1 - column(bounded) * raised(m)), seed)
