"""The U build: curvature divided by eigenvalue gaps and skew-symmetrised, in the epilogue of its Gram matrix or alone.

`W` never reaches memory. It is divided before it is ever rounded.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from spectral_ops.kernels import tiles
from spectral_ops.kernels.config import Config
from spectral_ops.kernels.launch import launch, lower_tiles, precision

ELEMENTWISE = Config(64, 0, 4, 1)


@triton.jit
def _divided(w, d, i, j, n, tol, BLOCK: tl.constexpr):
    """Tile `(i, j)` of `Skew(Tril(U))`, `U = −w / (d_i − d_j)`."""
    di, dj = tiles.load_vector(d, i, n, BLOCK, 1.0)[:, None], tiles.load_vector(d, j, n, BLOCK, 1.0)[None, :]
    gap = di - dj
    near = tl.abs(gap) <= tol * tl.maximum(di, dj)
    u = tl.where(near, 0.0, -w / tl.where(near, 1.0, gap))
    if i == j:
        o = tl.arange(0, BLOCK)
        u = tl.where(o[:, None] > o[None, :], u, 0.0)
        u = u - tl.trans(u)
    return u


@triton.jit
def _skew_generator(w, w_batch, w_row, w_col, d, out, tol, n, BLOCK: tl.constexpr):
    count = tl.cdiv(n, BLOCK) * (tl.cdiv(n, BLOCK) + 1) // 2
    matrix, t = (tl.program_id(0) // count).to(tl.int64), tl.program_id(0) % count
    i, j = tiles.triangle(t)
    oi, oj = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    inside = (oi < n)[:, None] & (oj < n)[None, :]
    at = w + matrix * w_batch + oi.to(tl.int64)[:, None] * w_row + oj.to(tl.int64)[None, :] * w_col
    tile = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    u = _divided(tile, d + matrix * n, i, j, n, tol, BLOCK)
    tiles.store_both(out + matrix * n * n, u, -u, i, j, n, BLOCK)


@triton.jit
def _gram_skew(
    x, x_batch, x_row, x_col, scale, d, out, diag_w, squares, tol, n, k,
    BLOCK: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    count = tl.cdiv(n, BLOCK) * (tl.cdiv(n, BLOCK) + 1) // 2
    matrix, t = (tl.program_id(0) // count).to(tl.int64), tl.program_id(0) % count
    i, j = tiles.triangle(t)
    if scale is not None:
        scale += matrix * k
    w = tiles.weighted_gram(x + matrix * x_batch, x_row, x_col, scale, i, j, n, k, BLOCK, BK, PRECISION)  # [BLOCK, BLOCK]
    u = _divided(w, d + matrix * n, i, j, n, tol, BLOCK)
    tiles.store_both(out + matrix * n * n, u, -u, i, j, n, BLOCK)
    tl.store(squares + tl.program_id(0), tl.where(i == j, 1.0, 2.0) * tl.sum(u * u))
    if i == j:
        o = tl.arange(0, BLOCK)
        diagonal = tl.sum(tl.where(o[:, None] == o[None, :], w, 0.0), 1)
        tl.store(diag_w + matrix * n + i * BLOCK + o, diagonal, mask=o < n - i * BLOCK)


def skew_generator(w: Tensor, d: Tensor, tol: float) -> Tensor:
    """`w` is `(b, n, n)` of any strides, `d` `(b, n)`."""
    batch, n, _ = w.shape
    out = torch.empty((batch, n, n), dtype=w.dtype, device=w.device)
    launch(
        _skew_generator, batch * lower_tiles(n, ELEMENTWISE.block), ELEMENTWISE,
        w=w, w_batch=w.stride(0), w_row=w.stride(1), w_col=w.stride(2), d=d.contiguous(), out=out, tol=tol, n=n,
        BLOCK=ELEMENTWISE.block,
    )  # fmt: skip
    return out


def gram_skew(x: Tensor, d: Tensor, scale: Tensor | None, tol: float, config: Config) -> tuple[Tensor, Tensor, Tensor]:
    """`x` is `(b, n, k)` of any strides, `d` `(b, n)`, `scale` `(b, k)`; the skew matrix, `diag W` and `‖skew‖_F²`."""
    batch, n, k = x.shape
    count = lower_tiles(n, config.block)
    out = torch.empty((batch, n, n), dtype=x.dtype, device=x.device)
    diag_w = torch.empty((batch, n), dtype=torch.float32, device=x.device)
    squares = torch.empty((batch, count), dtype=torch.float32, device=x.device)
    launch(
        _gram_skew, batch * count, config,
        x=x, x_batch=x.stride(0), x_row=x.stride(1), x_col=x.stride(2),
        scale=None if scale is None else scale.contiguous(), d=d.contiguous(), out=out, diag_w=diag_w, squares=squares,
        tol=tol, n=n, k=k, BLOCK=config.block, BK=config.k, PRECISION=precision(x.dtype),
    )  # fmt: skip
    return out, diag_w, squares.sum(-1)

