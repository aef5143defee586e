"""Inverse-free update of a square factor."""

import torch
from torch import Tensor

from spectral_ops import _checks as check
from spectral_ops import reference
from spectral_ops._batches import matrices, numbers
from spectral_ops._library import define
from spectral_ops.cayley import ROUNDINGS


def _fake(k: Tensor, *_: object) -> Tensor:
    return k.new_empty(k.shape)


def _kernel(k: Tensor, m: Tensor, step: Tensor, seed: Tensor | None = None) -> Tensor:
    from spectral_ops.kernels import factor, launch

    batch, dtypes = k.shape[:-2], {k.dtype, m.dtype}
    split = len(dtypes) > 1
    if split and dtypes != {torch.float32, torch.bfloat16}:
        return NotImplemented
    k3, m3, n = matrices(k), matrices(m), k.shape[-1]
    config = launch.pick("factor", n, n, len(k3), m3 if k.dtype == torch.bfloat16 else k3, split=split)
    if config is None:
        return NotImplemented
    seeds = None if seed is None or k.dtype != torch.bfloat16 else numbers(seed, batch)
    return factor.factor_update(k3, m3, numbers(step, batch), config, seeds).view(k.shape)


_factor_update = define(
    "factor_update(Tensor k, Tensor m, Tensor step, Tensor? seed=None) -> Tensor", reference.factor_update, _fake, _kernel
)


def factor_update(k: Tensor, m: Tensor, step: float | Tensor, *, rounding: str = "nearest", seed: int | Tensor = 0) -> Tensor:
    """`k (I − step · m / max(1, ‖m‖_F))`: the first-order exponential map of IF-Shampoo and SINGD.

    Lin et al., 2024, "Can We Remove the Square-Root in Adaptive Gradient Methods?", Fig. 5 (right).

    Args:
        k: `(..., n, n)`, a factor of the inverse: `S⁻¹ = k kᵀ`.
        m: `(..., n, n)`, its (Riemannian) momentum.
        step: a number or one for each matrix.
        rounding: `"nearest"`, or `"stochastic"` where `k` is bfloat16 (elsewhere it rounds to nearest).
        seed: of the stochastic rounding, see `stochastic_round`.

    Returns:
        `(..., n, n)` in the dtype of `k`, computed in float32 (float64 for float64) and rounded once.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape, device or option, in a sentence that names the argument.
    """
    op = "factor_update"
    k = check.square(k, "k", op)
    check.shaped(m, "m", op, k.shape, k)
    check.choice(rounding, "rounding", op, ROUNDINGS)
    step = check.scalars(step, "step", op, k, k.shape[:-2])
    seeds = check.seeds(seed, op, k, k.shape[:-2]) if rounding == "stochastic" else None
    result: Tensor = _factor_update(k, m, step, seeds)
    return result
