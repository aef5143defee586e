"""`alpha · X Diag(scale) Xᵀ + beta · C`: the lower tiles are computed and mirrored, each element has one writer."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from spectral_ops.kernels import tiles
from spectral_ops.kernels.config import Config
from spectral_ops.kernels.launch import launch, lower_tiles, precision


@triton.jit
def _gram(
    x, x_batch, x_row, x_col, scale, c, out, alpha, beta, n, k,
    BLOCK: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    count = tl.cdiv(n, BLOCK) * (tl.cdiv(n, BLOCK) + 1) // 2
    matrix, t = (tl.program_id(0) // count).to(tl.int64), tl.program_id(0) % count
    i, j = tiles.triangle(t)
    x += matrix * x_batch
    out += matrix * n * n
    if scale is not None:
        scale += matrix * k
    w = alpha * tiles.weighted_gram(x, x_row, x_col, scale, i, j, n, k, BLOCK, BK, PRECISION)  # [BLOCK, BLOCK]
    if c is not None:
        w += beta * tiles.load_tile(c + matrix * n * n, i, j, n, n, BLOCK, BLOCK)
    if i == j:
        w = 0.5 * (w + tl.trans(w))
    tiles.store_both(out, w, w, i, j, n, BLOCK)


def gram(x: Tensor, scale: Tensor | None, alpha: float, beta: float, c: Tensor | None, config: Config) -> Tensor:
    """`x` is `(b, n, k)` of any strides, `scale` `(b, k)`, `c` `(b, n, n)`."""
    batch, n, k = x.shape
    out = torch.empty((batch, n, n), dtype=x.dtype, device=x.device)
    launch(
        _gram, batch * lower_tiles(n, config.block), config,
        x=x, x_batch=x.stride(0), x_row=x.stride(1), x_col=x.stride(2),
        scale=None if scale is None else scale.contiguous(), c=None if c is None else c.contiguous(), out=out,
        alpha=alpha, beta=beta, n=n, k=k, BLOCK=config.block, BK=config.k, PRECISION=precision(x.dtype),
    )  # fmt: skip
    return out
