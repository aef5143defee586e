"""Inverse-free update of a square factor."""

import torch
from torch import Tensor

from spectral_ops import _checks as check
from spectral_ops import reference
from spectral_ops._batches import matrices, numbers
from spectral_ops._library import define


def _fake(k: Tensor, *_: object) -> Tensor:
    return k.new_empty(k.shape)


def _kernel(k: Tensor, m: Tensor, step: Tensor) -> Tensor:
    from spectral_ops.kernels import factor, launch

    dtypes = {k.dtype, m.dtype}
    split = len(dtypes) > 1
    if split and dtypes != {torch.float32, torch.bfloat16}:
        return NotImplemented
    k3, m3, n = matrices(k), matrices(m), k.shape[-1]
    config = launch.pick("factor", n, n, len(k3), m3 if k.dtype == torch.bfloat16 else k3, split=split)
    if config is None:
        return NotImplemented
    return factor.factor_update(k3, m3, numbers(step, k.shape[:-2]), config).view(k.shape)


_factor_update = define("factor_update(Tensor k, Tensor m, Tensor step) -> Tensor", reference.factor_update, _fake, _kernel)


def factor_update(k: Tensor, m: Tensor, step: float | Tensor) -> Tensor:
    """`k (I − step · m / max(1, ‖m‖_F))`: the first-order exponential map of IF-Shampoo and SINGD.

    Lin et al., 2024, "Can We Remove the Square-Root in Adaptive Gradient Methods?", Fig. 5 (right).

    Args:
        k: `(..., n, n)`, a factor of the inverse: `S⁻¹ = k kᵀ`.
        m: `(..., n, n)`, its (Riemannian) momentum.
        step: a number or one for each matrix.

    Returns:
        `(..., n, n)` in the dtype of `k`, computed in float32 (float64 for float64) and rounded once.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape or device, in a sentence that names the argument.
    """
    k = check.square(k, "k", "factor_update")
    check.shaped(m, "m", "factor_update", k.shape, k)
    step = check.scalars(step, "step", "factor_update", k, k.shape[:-2])
    result: Tensor = _factor_update(k, m, step)
    return result
