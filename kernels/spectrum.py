"""The paper's update of eigenvalues and scale: both sides, a whole batch of matrices, one program a matrix, one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from spectral_ops.kernels import tiles
from spectral_ops.kernels.config import Config
from spectral_ops.kernels.launch import launch

TILE = Config(1024, 0, 4, 1)


@triton.jit
def _exponent(d, w, i, n, share, beta2, gamma, damping, EXACT: tl.constexpr, BLOCK: tl.constexpr):
    """What the mean is taken of: the exact map's `m`, the truncated map's `log n`; for block `i`."""
    old, new = tiles.load_vector(d, i, n, BLOCK, 1.0), tiles.load_vector(w, i, n, BLOCK, 1.0)
    if EXACT:
        return share * new / old - gamma
    else:
        return tl.log((1.0 - gamma * beta2) * old + beta2 * share * (new + damping))


@triton.jit
def _mean(d, w, n, share, beta2, gamma, damping, EXACT: tl.constexpr, BLOCK: tl.constexpr):
    acc = tl.zeros((BLOCK,), tl.float32)
    for i in range(tl.cdiv(n, BLOCK)):
        x = _exponent(d, w, i, n, share, beta2, gamma, damping, EXACT, BLOCK)
        acc += tl.where(i * BLOCK + tl.arange(0, BLOCK) < n, x, 0.0)
    return tl.sum(acc) / n


@triton.jit
def _write(out, d, w, n, mean, share, beta2, gamma, damping, EXACT: tl.constexpr, BLOCK: tl.constexpr):
    for i in range(tl.cdiv(n, BLOCK)):
        x = _exponent(d, w, i, n, share, beta2, gamma, damping, EXACT, BLOCK) - mean
        x = tiles.load_vector(d, i, n, BLOCK) * tl.exp(beta2 * x) if EXACT else tl.exp(x)
        o = i * BLOCK + tl.arange(0, BLOCK)
        tl.store(out + o, tiles.rounded(x, out.dtype.element_ty, None), mask=o < n)


@triton.jit
def _spectrum(
    d_c, d_k, alpha, w_c, w_k, beta2, new_c, new_k, new_alpha, gamma, damping, n, m,
    EXACT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    matrix = tl.program_id(0).to(tl.int64)
    d_c += matrix * n
    w_c += matrix * n
    d_k += matrix * m
    w_k += matrix * m
    scale, beta = tl.load(alpha + matrix).to(tl.float32), tl.load(beta2 + matrix).to(tl.float32)
    share_c, share_k = 1.0 / (scale * m), 1.0 / (scale * n)
    damp_c, damp_k = 0.0, 0.0
    if not EXACT:
        damp_c, damp_k = damping * m * tiles.mean_reciprocal(d_k, m, BLOCK), damping * n * tiles.mean_reciprocal(d_c, n, BLOCK)
    mean_c = _mean(d_c, w_c, n, share_c, beta, gamma, damp_c, EXACT, BLOCK)
    mean_k = _mean(d_k, w_k, m, share_k, beta, gamma, damp_k, EXACT, BLOCK)
    _write(new_c + matrix * n, d_c, w_c, n, mean_c, share_c, beta, gamma, damp_c, EXACT, BLOCK)
    _write(new_k + matrix * m, d_k, w_k, m, mean_k, share_k, beta, gamma, damp_k, EXACT, BLOCK)
    scale *= tl.exp((beta if EXACT else 1.0) * 0.5 * (mean_c + mean_k))
    tl.store(new_alpha + matrix, tiles.rounded(scale, new_alpha.dtype.element_ty, None))


def spectrum_update(
    d_c: Tensor, d_k: Tensor, alpha: Tensor, w_c: Tensor, w_k: Tensor, beta2: Tensor, gamma: float, damping: float, exact: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`d_c` and `w_c` are `(b, n)`, `d_k` and `w_k` `(b, m)`, `alpha` and `beta2` `(b,)`, all contiguous; `n` and `m` not 0."""
    (batch, n), m = d_c.shape, d_k.shape[-1]
    new_c, new_k, new_alpha = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (d_c, d_k, alpha))
    launch(
        _spectrum, batch, TILE, d_c=d_c, d_k=d_k, alpha=alpha, w_c=w_c, w_k=w_k, beta2=beta2,
        new_c=new_c, new_k=new_k, new_alpha=new_alpha, gamma=gamma, damping=damping, n=n, m=m, EXACT=exact, BLOCK=TILE.block,
    )  # fmt: skip
    return new_c, new_k, new_alpha
