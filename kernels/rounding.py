"""Unbiased rounding to bfloat16, one program a tile: the bits of an element depend on its row, column and seed only."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from spectral_ops.kernels import tiles
from spectral_ops.kernels.config import Config
from spectral_ops.kernels.launch import cdiv, launch

ROWS, ELEMENTS = 16, 4096  # of a tile; a matrix of fewer rows gets wider tiles
ELEMENTWISE = Config(ELEMENTS, 0, 4, 1)


@triton.jit
def _stochastic_round(x, seed, out, n, m, BI: tl.constexpr, BJ: tl.constexpr):
    down, across = tl.cdiv(n, BI), tl.cdiv(m, BJ)
    matrix, t = (tl.program_id(0) // (down * across)).to(tl.int64), tl.program_id(0) % (down * across)
    i, j = t // across, t % across
    tile = tiles.load_tile(x + matrix * n * m, i, j, n, m, BI, BJ)
    bits = tiles.random_bits(tl.load(seed + matrix), i, j, BI, BJ)
    tiles.store_tile(out + matrix * n * m, tiles.to_bfloat16(tile, bits), i, j, n, m, BI, BJ)


def stochastic_round(x: Tensor, seed: Tensor) -> Tensor:
    """`x` is `(b, n, m)`, float32 and contiguous, `seed` `(b,)`, int64."""
    batch, n, m = x.shape
    out = torch.empty((batch, n, m), dtype=torch.bfloat16, device=x.device)
    rows = min(ROWS, triton.next_power_of_2(max(n, 1)))
    columns = ELEMENTS // rows
    launch(
        _stochastic_round, batch * cdiv(n, rows) * cdiv(m, columns), ELEMENTWISE,
        x=x, seed=seed, out=out, n=n, m=m, BI=rows, BJ=columns,
    )  # fmt: skip
    return out
