"""`K − s / max(1, ‖M‖_F) · K M`: the step of an inverse-free factor, whose norm limit never leaves the device."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from spectral_ops.kernels import tiles
from spectral_ops.kernels.config import Config
from spectral_ops.kernels.launch import cdiv, launch, precision

ELEMENTWISE = Config(64, 0, 4, 1)
PARTS = 1024  # read at once when they are added up


@triton.jit
def _load(p, row, col, i, j, n, BLOCK: tl.constexpr):
    """Tile `(i, j)` of an `n × n` matrix of any strides, in float32; zeros outside."""
    o = tl.arange(0, BLOCK)
    inside = (o < n - i * BLOCK)[:, None] & (o < n - j * BLOCK)[None, :]
    start = p + (i * BLOCK).to(tl.int64) * row + (j * BLOCK).to(tl.int64) * col
    return tl.load(start + (o[:, None] * row + o[None, :] * col), mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _factor_squares(m, m_batch, m_row, m_col, squares, n, BLOCK: tl.constexpr):
    size = tl.cdiv(n, BLOCK)
    matrix, t = (tl.program_id(0) // (size * size)).to(tl.int64), tl.program_id(0) % (size * size)
    tile = _load(m + matrix * m_batch, m_row, m_col, t // size, t % size, n, BLOCK)
    tl.store(squares + tl.program_id(0), tl.sum(tile * tile))


@triton.jit(do_not_specialize=["parts"])
def _factor(
    k, k_batch, k_row, k_col, m, m_batch, m_row, m_col, squares, parts, step, seed, out, n,
    BLOCK: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    size = tl.cdiv(n, BLOCK)
    matrix, t = (tl.program_id(0) // (size * size)).to(tl.int64), tl.program_id(0) % (size * size)
    i, j = t // size, t % size
    k += matrix * k_batch
    w = tiles.product(
        k, k_row, k_col, m + matrix * m_batch, m_row, m_col, i, j, n, n, n, BLOCK, BLOCK, BK, PRECISION
    )  # [BLOCK, BLOCK]
    norm = tl.sqrt(tiles.total(squares + matrix * parts, parts, PARTS))
    bounded = tl.load(step + matrix) / tl.where(norm <= 1, 1.0, norm)  # so that a NaN stays one
    w = _load(k, k_row, k_col, i, j, n, BLOCK) - (bounded * w + 0.0)  # + 0: a product of −0 would change a −0 of `k`
    bits = None if seed is None else tiles.random_bits(tl.load(seed + matrix), i, j, BLOCK, BLOCK)
    tiles.store_tile(out + matrix * n * n, tiles.rounded(w, out.dtype.element_ty, bits), i, j, n, n, BLOCK, BLOCK)


def factor_update(k: Tensor, m: Tensor, step: Tensor, config: Config, seed: Tensor | None = None) -> Tensor:
    """`k` and `m` are `(b, n, n)` of any strides, `step` `(b,)`, float32, `seed` `(b,)`, int64."""
    batch, n, _ = k.shape
    parts = cdiv(n, ELEMENTWISE.block) ** 2
    squares = torch.empty((batch, parts), dtype=torch.float32, device=k.device)
    out = torch.empty((batch, n, n), dtype=k.dtype, device=k.device)
    momentum = {"m": m, "m_batch": m.stride(0), "m_row": m.stride(1), "m_col": m.stride(2)}
    launch(_factor_squares, batch * parts, ELEMENTWISE, **momentum, squares=squares, n=n, BLOCK=ELEMENTWISE.block)
    launch(
        _factor, batch * cdiv(n, config.block) ** 2, config,
        k=k, k_batch=k.stride(0), k_row=k.stride(1), k_col=k.stride(2), **momentum,
        squares=squares, parts=parts, step=step, seed=seed, out=out, n=n,
        BLOCK=config.block, BK=config.k, PARTS=PARTS, PRECISION=precision(k.dtype),
    )  # fmt: skip
    return out
