"""Gram matrix → bounded generator: new curvature is averaged into `T`, whose skew generator turns the basis.

`T ← keep · (Diag(d) + R) + X Diag(weight) Xᵀ` with a new diagonal that is known beforehand (a row reduction), so only its part
off the diagonal is computed here. Both sides of a Kronecker pair go in one launch: the left one takes the gradient's rows,
the right one its columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from spectral_ops.kernels import tiles
from spectral_ops.kernels.config import Config
from spectral_ops.kernels.launch import Sides, launch, lower_tiles, precision, sides


@triton.jit(do_not_specialize=["count0", "count1"])
def _track(
    x, x_batch, x_row, x_col, weight0, weight1, diag0, diag1, keep, usable, old0, old1, new0, new1, out0, out1,
    epsilon, n, m, count0, count1, BLOCK: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    matrix = (tl.program_id(0) // (count0 + count1)).to(tl.int64)
    t = tl.program_id(0) % (count0 + count1)
    right = t >= count0
    i, j = tiles.triangle(tl.where(right, t - count0, t))
    x += matrix * x_batch
    if right:
        w = tiles.weighted_gram(x, x_col, x_row, weight1 + matrix * n, i, j, m, n, BLOCK, BK, PRECISION)  # [BLOCK, BLOCK]
    else:
        w = tiles.weighted_gram(x, x_row, x_col, weight0 + matrix * m, i, j, n, m, BLOCK, BK, PRECISION)  # [BLOCK, BLOCK]
    size = tl.where(right, m, n)
    diag = tl.where(right, diag1 + matrix * m, diag0 + matrix * n)
    out = tl.where(right, out1, out0) + matrix * size * size
    ok = True if usable is None else tl.load(usable + matrix) != 0

    di = tiles.load_vector(diag, i, size, BLOCK, 1.0)[:, None]
    dj = tiles.load_vector(diag, j, size, BLOCK, 1.0)[None, :]
    if old0 is not None:
        old = tiles.load_tile(tl.where(right, old1, old0) + matrix * size * size, i, j, size, size, BLOCK, BLOCK)
        w = tl.where(ok, w + tl.load(keep + 2 * matrix + right.to(tl.int32)) * old, old)
    gap, width = di - dj, epsilon * (di + dj)
    generator = tl.where(ok, -0.5 * w * gap / (gap * gap + width * width), 0.0)
    if i == j:
        o = tl.arange(0, BLOCK)
        below = o[:, None] > o[None, :]
        generator = tl.where(below, generator, 0.0)
        generator = generator - tl.trans(generator)
        w = tl.where(below, w, 0.0)
        w = w + tl.trans(w)
    tiles.store_both(out, generator, -generator, i, j, size, BLOCK)
    if old0 is not None:
        # In place where old is new: this program alone reads and writes the tile and its mirror image.
        tiles.store_both(tl.where(right, new1, new0) + matrix * size * size, w, w, i, j, size, BLOCK)


def track(
    x: Tensor,
    weight: Sides,
    diag: Sides,
    old: Sides,
    new: Sides,
    keep: Tensor,
    usable: Tensor | None,
    epsilon: float,
    dtype: torch.dtype,
    config: Config,
) -> Sides:
    """The generators of both sides; `new` residuals are written, in place if they are the `old` ones.

    `x` is `(b, n, m)` of any strides; for each side `weight` are the coefficients of the gradient's columns (rows), float32
    with all factors folded in, `diag` the new diagonals, `keep` `(b, 2)` the factors of the old residuals. A side whose
    `diag` is None is left out. `usable` `(b,)`: elsewhere the residual stays and the generator is 0.
    """
    batch, n, m = x.shape
    sizes = n, m
    left, right = (
        None if d is None else torch.empty((batch, size, size), dtype=dtype, device=x.device)
        for d, size in zip(diag, sizes, strict=True)
    )
    count0, count1 = (0 if d is None else lower_tiles(size, config.block) for d, size in zip(diag, sizes, strict=True))
    launch(
        _track, batch * (count0 + count1), config,
        x=x, x_batch=x.stride(0), x_row=x.stride(1), x_col=x.stride(2),
        **sides("weight", weight), **sides("diag", diag), keep=keep, usable=usable,
        **sides("old", old), **sides("new", new), **sides("out", (left, right)),
        epsilon=epsilon, n=n, m=m, count0=count0, count1=count1,
        BLOCK=config.block, BK=config.k, PRECISION=precision(x.dtype),
    )  # fmt: skip
    return left, right
