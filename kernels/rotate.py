"""Into the bases and back: products whose epilogues weigh with eigenvalues and add up squares.

Between the two products of `B_Cᵀ G B_K` nothing is rounded to 16 bits: strong directions would leak into weak ones.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from spectral_ops.kernels import tiles
from spectral_ops.kernels.config import Config
from spectral_ops.kernels.launch import cdiv, launch, pick, precision


@triton.jit
def _rotate(
    a, a_batch, a_row, a_col, b, b_batch, b_row, b_col, out, d_row, d_col, alpha, power, rows, cols, squares, n, m, k,
    BI: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`A B`, times `(alpha d_row d_colᵀ)^power` if `alpha` is given; the sums of squares of each tile, and of its rows and
    columns weighted by the reciprocal of the other side's eigenvalues, where there is room for them."""
    down, across = tl.cdiv(n, BI), tl.cdiv(m, BI)
    matrix, t = (tl.program_id(0) // (down * across)).to(tl.int64), tl.program_id(0) % (down * across)
    i, j = t // across, t % across
    w = tiles.product(
        a + matrix * a_batch, a_row, a_col, b + matrix * b_batch, b_row, b_col, i, j, n, m, k, BI, BI, BK, PRECISION
    )  # [BI, BI]
    if d_row is not None:
        di, dj = tiles.load_vector(d_row + matrix * n, i, n, BI, 1.0), tiles.load_vector(d_col + matrix * m, j, m, BI, 1.0)
    if alpha is not None:
        left = tl.exp2(power * (tl.log2(di) + tl.log2(tl.load(alpha + matrix))))
        w = w * left[:, None] * tl.exp2(power * tl.log2(dj))[None, :]
    if rows is not None:
        o, square = tl.arange(0, BI), w * w
        tl.store(rows + (matrix * across + j) * n + i * BI + o, tl.sum(square / dj[None, :], 1), mask=o < n - i * BI)
        tl.store(cols + (matrix * down + i) * m + j * BI + o, tl.sum(square / di[:, None], 0), mask=o < m - j * BI)
    if squares is not None:
        tl.store(squares + tl.program_id(0), tl.sum(w * w))
    tiles.store_tile(out + matrix * n * m, tiles.rounded(w, out.dtype.element_ty, None), i, j, n, m, BI, BI)


def rotate(
    g: Tensor, b_c: Tensor | None, d_c: Tensor, b_k: Tensor | None, d_k: Tensor, *, config: Config | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`G̃ = B_Cᵀ G B_K` with what the eigenvalues need of it: `Σ_j G̃_ij² / d_K,j` `(b, parts, n)`, `Σ_i G̃_ij² / d_C,i`
    `(b, parts, m)` and `‖G̃‖_F²` `(b, parts)`, each to be added up over its parts. At least one basis is given."""
    dtype = next(b for b in (b_c, b_k) if b is not None).dtype
    batch, n, m = g.shape
    if b_c is not None and b_k is not None:
        g = _product(b_c.mT, g, torch.float32, config)
        a, b = g, b_k
    else:
        a, b = (b_c.mT, g) if b_c is not None else (g, b_k)  # type: ignore[assignment]
    tile = config or _pick(a, b)
    down, across = cdiv(n, tile.block), cdiv(m, tile.block)
    rows, cols, squares = (
        torch.empty(shape, dtype=torch.float32, device=g.device)
        for shape in ((batch, across, n), (batch, down, m), (batch, down * across))
    )
    x = _product(a, b, dtype, tile, d_row=d_c, d_col=d_k, rows=rows, cols=cols, squares=squares)
    return x, rows, cols, squares


def apply_root(
    g: Tensor, b_c: Tensor | None, d_c: Tensor, b_k: Tensor | None, d_k: Tensor, alpha: Tensor, root: float,
    *, config: Config | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`alpha^(−1/root) S_C^(−1/root) G S_K^(−1/root)` in the dtype of `g`, and its sums of squares `(b, parts)`. At least one
    basis is given."""
    dtype = next(b for b in (b_c, b_k) if b is not None).dtype
    weight: dict[str, Any] = {"d_row": d_c, "d_col": d_k, "alpha": alpha, "power": -1.0 / root}
    if b_c is not None and b_k is not None:
        x = _product(_product(b_c.mT, g, torch.float32, config), b_k, dtype, config, **weight)
        a, b = _product(b_c, x, dtype, config), b_k.mT
    elif b_c is not None:
        a, b = b_c, _product(b_c.mT, g, dtype, config, **weight)
    else:
        assert b_k is not None
        a, b = _product(g, b_k, dtype, config, **weight), b_k.mT
    tile = config or _pick(a, b)
    batch, n, m = g.shape
    parts = cdiv(n, tile.block) * cdiv(m, tile.block)
    squares = torch.empty((batch, parts), dtype=torch.float32, device=g.device)
    return _product(a, b, g.dtype, tile, squares=squares), squares


def root_parts(g: Tensor, b_c: Tensor | None, b_k: Tensor | None) -> int:
    """How many sums of squares `apply_root` makes of a matrix: one for each tile of its last product."""
    n, m = g.shape[-2:]
    b = b_k if b_k is not None else b_c
    assert b is not None
    tile = pick("rotate", min(n, m), b.shape[-1], g.shape[:-2].numel(), b, other=max(n, m))
    assert tile is not None, "the table has no tile for rotate"
    return cdiv(n, tile.block) * cdiv(m, tile.block)


def _product(
    a: Tensor, b: Tensor, dtype: torch.dtype, config: Config | None,
    *, d_row: Tensor | None = None, d_col: Tensor | None = None, alpha: Tensor | None = None, power: float = 0.0,
    rows: Tensor | None = None, cols: Tensor | None = None, squares: Tensor | None = None,
) -> Tensor:  # fmt: skip
    (batch, n, k), m = a.shape, b.shape[-1]
    out = torch.empty((batch, n, m), dtype=dtype, device=a.device)
    tile = config or _pick(a, b)
    launch(
        _rotate, batch * cdiv(n, tile.block) * cdiv(m, tile.block), tile,
        a=a, a_batch=a.stride(0), a_row=a.stride(1), a_col=a.stride(2),
        b=b, b_batch=b.stride(0), b_row=b.stride(1), b_col=b.stride(2),
        out=out, d_row=d_row, d_col=d_col, alpha=alpha, power=power, rows=rows, cols=cols, squares=squares, n=n, m=m, k=k,
        BI=tile.block, BK=tile.k, PRECISION=precision(a.dtype),
    )  # fmt: skip
    return out


def _pick(a: Tensor, b: Tensor) -> Config:
    mixed = torch.float32 in (a.dtype, b.dtype) and a.dtype != b.dtype
    wide = a if a.dtype == torch.float32 else b
    (batch, n, k), m = a.shape, b.shape[-1]
    config = pick("rotate", min(n, m), k, batch, wide if mixed else a, split=mixed, other=max(n, m))
    assert config is not None, "the table has no tile for rotate"
    return config
