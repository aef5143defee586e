"""The eigenvalues of a Kronecker pair under the tracking rotation: both sides, a whole batch of matrices, one launch.

From the gradient's sums of squares in the current bases come, for each matrix: whether it is usable, its warm averaging weight,
the new diagonals of `T_C` and `T_K` divided by their geometric means, the scale, and all coefficients of the kernels after.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from spectral_ops.kernels import tiles
from spectral_ops.kernels.config import Config
from spectral_ops.kernels.launch import launch

TILE = Config(512, 0, 8, 1)
AT_ONCE = tl.constexpr(8)  # parts that are loaded together: one after the other, each would wait for the memory


@triton.jit
def _averaged(parts, count, d, diag, n, share, damping, beta, ok, BLOCK: tl.constexpr):
    """Write the new diagonal before its division; its mean logarithm and its maximum. Where not `ok` it is the old one."""
    logs, largest = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        o = start + tl.arange(0, BLOCK)
        inside = o < n
        w = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, count, AT_ONCE):
            part = first + tl.arange(0, AT_ONCE)
            rows = tl.load(parts + part[:, None] * n + o[None, :], mask=(part < count)[:, None] & inside[None, :], other=0.0)
            w += tl.sum(rows, 0)  # [AT_ONCE, BLOCK] to [BLOCK]
        old = tl.load(d + o, mask=inside, other=1.0)
        new = tl.where(ok, old + beta * (share * w + damping - old), old)
        logs += tl.where(inside, tl.log(new), 0.0)
        largest = tl.where(inside, tl.maximum(largest, new), largest)
        tl.store(diag + o, new, mask=inside)
    return tl.sum(logs) / n, tl.max(largest)


@triton.jit
def _divided(diag, d, weight, n, shrink, coefficient, floor, BLOCK: tl.constexpr):
    """Divide the new diagonal and write the eigenvalues, but first the weights that the other side takes from the old ones."""
    for start in range(0, n, BLOCK):
        o = start + tl.arange(0, BLOCK)
        inside = o < n
        tl.store(weight + o, coefficient / tl.load(d + o, mask=inside, other=1.0), mask=inside)
        new = tl.load(diag + o, mask=inside, other=1.0) * shrink
        tl.store(diag + o, new, mask=inside)
        tl.store(d + o, tl.maximum(new, floor), mask=inside)


@triton.jit(do_not_specialize=["row_parts", "col_parts", "parts", "batch"])
def _average(
    rows, cols, squares, row_parts, col_parts, parts, d_c, d_k, scale, updates, seed,
    diag_c, diag_k, weight_c, weight_k, keep, floor, usable, finite, seeds,
    beta_min, damping, relative_floor, negligible, stream_step, stream_side, n, m, batch, BLOCK: tl.constexpr,
):  # fmt: skip
    matrix = tl.program_id(0).to(tl.int64)
    d_c += matrix * n
    d_k += matrix * m
    diag_c += matrix * n
    diag_k += matrix * m
    square = tiles.total(squares + matrix * parts, parts, BLOCK)
    is_finite = tl.abs(square) < float("inf")  # false for NaN
    ok = is_finite & (square / n / m > negligible)
    count = tl.load(updates + matrix) + ok.to(tl.float32)
    alpha = tl.where(ok & (count <= 1), square / n / m, tl.load(scale + matrix))
    beta = tl.maximum(1.0 / (count + 1.0), beta_min)
    damp_c = damping * tiles.mean_reciprocal(d_k, m, BLOCK) / alpha
    damp_k = damping * tiles.mean_reciprocal(d_c, n, BLOCK) / alpha
    share_c, share_k = 1.0 / (alpha * m), 1.0 / (alpha * n)
    log_c, max_c = _averaged(rows + matrix * row_parts * n, row_parts, d_c, diag_c, n, share_c, damp_c, beta, ok, BLOCK)
    log_k, max_k = _averaged(cols + matrix * col_parts * m, col_parts, d_k, diag_k, m, share_k, damp_k, beta, ok, BLOCK)
    tl.debug_barrier()  # what was written above is read below, perhaps by other threads
    shrink_c, shrink_k = tl.where(ok, tl.exp(-log_c), 1.0), tl.where(ok, tl.exp(-log_k), 1.0)
    floor_c = tl.where(ok, relative_floor * max_c * shrink_c, 0.0)
    floor_k = tl.where(ok, relative_floor * max_k * shrink_k, 0.0)
    _divided(diag_c, d_c, weight_k + matrix * n, n, shrink_c, beta * shrink_k * share_k, floor_c, BLOCK)
    _divided(diag_k, d_k, weight_c + matrix * m, m, shrink_k, beta * shrink_c * share_c, floor_k, BLOCK)
    tl.store(keep + 2 * matrix, (1.0 - beta) * shrink_c)
    tl.store(keep + 2 * matrix + 1, (1.0 - beta) * shrink_k)
    tl.store(floor + 2 * matrix, floor_c)
    tl.store(floor + 2 * matrix + 1, floor_k)
    tl.store(scale + matrix, tl.where(ok, alpha * tl.exp(0.5 * (log_c + log_k)), alpha))
    tl.store(updates + matrix, count)
    tl.store(usable + matrix, ok)
    tl.store(finite + matrix, is_finite)
    if seed is not None:
        first = tl.load(seed + matrix) + count.to(tl.int64) * stream_step
        tl.store(seeds + matrix, first)
        tl.store(seeds + batch + matrix, first + stream_side)


class Averaged(NamedTuple):
    diag_c: Tensor  # (b, n), the new diagonal of T, with product 1
    diag_k: Tensor  # (b, m)
    weight_c: Tensor  # (b, m), what the left Gram matrix multiplies the gradient's columns by
    weight_k: Tensor  # (b, n), what the right one multiplies its rows by
    keep: Tensor  # (b, 2), what the old residuals are multiplied by
    floor: Tensor  # (b, 2), the least eigenvalue
    usable: Tensor  # (b,) bool: a finite gradient that is not negligible
    finite: Tensor  # (b,) bool
    seeds: Tensor | None  # (2, b) int64, of this update's rounding


def average(
    moments: tuple[Tensor, Tensor, Tensor], d_c: Tensor, d_k: Tensor, scale: Tensor, updates: Tensor,
    seed: Tensor | None, *, beta: float, damping: float, relative_floor: float, negligible: float, streams: tuple[int, int],
) -> Averaged:  # fmt: skip
    """Advance `d_c` `(b, n)`, `d_k` `(b, m)`, `scale` and `updates` `(b,)`, all float32, in place.

    `moments` are what `rotate` gives beside the gradient; `beta` is the least share of the new curvature; gradients whose mean
    square is at most `negligible` change nothing.
    """
    rows, cols, squares = moments
    (batch, n), m = d_c.shape, d_k.shape[-1]

    def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=d_c.device)

    result = Averaged(
        numbers(batch, n), numbers(batch, m), numbers(batch, m), numbers(batch, n), numbers(batch, 2), numbers(batch, 2),
        numbers(batch, dtype=torch.bool), numbers(batch, dtype=torch.bool),
        None if seed is None else numbers(2, batch, dtype=torch.int64),
    )  # fmt: skip
    launch(
        _average, batch, TILE, rows=rows, cols=cols, squares=squares,
        row_parts=rows.shape[1], col_parts=cols.shape[1], parts=squares.shape[1],
        d_c=d_c, d_k=d_k, scale=scale, updates=updates, seed=seed, **result._asdict(),
        beta_min=beta, damping=damping, relative_floor=relative_floor, negligible=negligible,
        stream_step=streams[0], stream_side=streams[1], n=n, m=m, batch=batch, BLOCK=TILE.block,
    )  # fmt: skip
    return result
