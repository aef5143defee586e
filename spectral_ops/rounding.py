"""Unbiased rounding to bfloat16."""

import torch
from torch import Tensor

from spectral_ops import _checks as check
from spectral_ops import reference
from spectral_ops._batches import matrices, numbers
from spectral_ops._library import define


def _impl(x: Tensor, seed: Tensor) -> Tensor:
    return reference.stochastic_round(x, seed)


def _fake(x: Tensor, seed: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.bfloat16)


def _kernel(x: Tensor, seed: Tensor) -> Tensor:
    from spectral_ops.kernels import rounding

    return rounding.stochastic_round(matrices(x).contiguous(), numbers(seed, x.shape[:-2])).view(x.shape)


_stochastic_round = define("stochastic_round(Tensor x, Tensor seed) -> Tensor", _impl, _fake, _kernel)


def stochastic_round(x: Tensor, seed: int | Tensor) -> Tensor:
    """Round float32 to bfloat16, up or down with the probability that makes the mean right.

    Sixteen random bits are added below the bfloat16 mantissa and the rest is cut off, so a number that bfloat16 holds
    stays as it is, and infinities and NaNs do too. The bits are a pure function of the seed and of the element's
    row and column (Philox4x32-10): no global generator, the same bits on every device.

    Args:
        x: `(...)` float32; the last two dimensions are a matrix, those before them a batch. Fewer than two count as a row.
        seed: an int, where matrix `i` of the batch (in row-major order) uses `seed + i`; or int64 `(...)`, a seed for each
            matrix, so that the result does not depend on how matrices are batched.

    Returns:
        bfloat16, of the shape of `x`.

    Raises:
        TypeError, ValueError: `x` is not float32, or `seed` is neither an int nor int64 of the batch's shape.
    """
    check.tensor(x, "x", "stochastic_round")
    if x.dtype != torch.float32:
        raise TypeError(f"stochastic_round: `x` must be float32, got {x.dtype}")
    rows = x if x.ndim >= 2 else x.reshape(1, -1)
    result: Tensor = _stochastic_round(rows, check.seeds(seed, "stochastic_round", rows, rows.shape[:-2]))
    return result.view(x.shape)
