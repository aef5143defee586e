"""Elementwise optimizers, in place: all tensors, of any sizes, in one launch.

A table on the device has a row of addresses for each tensor, its size, and the number of its first program.
"""

from collections.abc import Sequence
from itertools import accumulate

import triton
import triton.language as tl
from torch import Tensor

from spectral_ops.kernels import tiles
from spectral_ops.kernels.config import Config
from spectral_ops.kernels.launch import cdiv, launch
from spectral_ops.kernels.update import TYPES, at, learning_rate, table

ELEMENTWISE = Config(1024, 0, 4, 1)
CHUNK = 8 * ELEMENTWISE.block  # elements that a program steps through


@triton.jit
def _owner(first, count, BLOCK: tl.constexpr):
    """The tensor of this program: the last of those that begin at it or before."""
    begun = 0
    for start in range(0, count, BLOCK):
        o = start + tl.arange(0, BLOCK)
        begun += tl.sum((tl.load(first + o, mask=o < count, other=1 << 62) <= tl.program_id(0)).to(tl.int32))
    return begun - 1


@triton.jit
def _less_than_one(rest, t):
    """`1 − (1 − rest)^t` without cancellation, by repeated squaring."""
    result = 0.0 * rest
    while t > 0:
        result = tl.where(t % 2 == 1, result + rest * (1.0 - result), result)
        rest = rest * (2.0 - rest)
        t = t // 2
    return result


@triton.jit
def _step(
    p, g, m, s, inside, rate, size, root, beta1, rest1, keep, gain, eps, weight_decay,
    P: tl.constexpr, M: tl.constexpr, S: tl.constexpr, ADAMW: tl.constexpr, MAXIMIZE: tl.constexpr,
):  # fmt: skip
    """The elements at these addresses, where `inside`; None: at all."""
    grad = tl.load(g, mask=inside).to(tl.float32)
    grad = -grad if MAXIMIZE else grad
    old, average = tl.load(p, mask=inside).to(tl.float32), tl.load(m, mask=inside).to(tl.float32)
    second = keep * tl.load(s, mask=inside).to(tl.float32) + gain * grad * grad
    if ADAMW:
        average += rest1 * (grad - average)
        new = old - rate * weight_decay * old - size * average / (tl.sqrt(second) / root + eps)
    else:
        average = beta1 * average + grad / (second + eps) + weight_decay * old
        new = old - rate * average
    tl.store(p, tiles.rounded(new, P, None), mask=inside)
    tl.store(m, tiles.rounded(average, M, None), mask=inside)
    tl.store(s, tiles.rounded(second, S, None), mask=inside)


@triton.jit(do_not_specialize=["count"])
def _diagonal(
    rows, count, lr, step, beta1, rest1, rest2, keep, gain, eps, weight_decay,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, S: tl.constexpr, ALIGNED: tl.constexpr, LOAD_LR: tl.constexpr,
    ADAMW: tl.constexpr, MAXIMIZE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first = rows + 5 * count
    index = _owner(first, count, BLOCK)
    start = (tl.program_id(0) - tl.load(first + index)) * CHUNK
    left = tl.minimum(tl.load(rows + 4 * count + index) - start, CHUNK).to(tl.int32)
    p = at(rows + index, start, P, ALIGNED)
    g = at(rows + count + index, start, G, ALIGNED)
    m = at(rows + 2 * count + index, start, M, ALIGNED)
    s = at(rows + 3 * count + index, start, S, ALIGNED)
    rate = tl.load(lr).to(tl.float32) if LOAD_LR else lr
    size, root = rate, 1.0
    if ADAMW:
        steps = tl.load(step).to(tl.int32)
        size, root = rate / _less_than_one(rest1, steps), tl.sqrt(_less_than_one(rest2, steps))
    for i in range(0, left, BLOCK):
        o = i + tl.arange(0, BLOCK)
        inside = o < left
        if i + BLOCK <= left:  # masks of a size that is not known to the compiler would forbid vector stores
            _step(
                p + o, g + o, m + o, s + o, None, rate, size, root, beta1, rest1, keep, gain, eps, weight_decay,
                P, M, S, ADAMW, MAXIMIZE,
            )  # fmt: skip
        else:
            _step(
                p + o, g + o, m + o, s + o, inside, rate, size, root, beta1, rest1, keep, gain, eps, weight_decay,
                P, M, S, ADAMW, MAXIMIZE,
            )  # fmt: skip


def diagonal_step(
    params: Sequence[Tensor], grads: Sequence[Tensor], momenta: Sequence[Tensor], seconds: Sequence[Tensor],
    lr: Tensor, step: Tensor, beta1: float, beta2: float, gamma: float, eps: float, weight_decay: float,
    batch_size: float, rule: str, maximize: bool,
) -> None:  # fmt: skip
    """Tensors of one dtype in each list, all contiguous; the four of a parameter have its shape. `lr` and `step` have
    one element, and `step` is float32."""
    lists = params, grads, momenta, seconds
    rate = learning_rate(lr, params[0].device)
    key = tuple((*(x.data_ptr() for x in four), four[0].numel()) for four in zip(*lists, strict=True))
    ends = list(accumulate((cdiv(row[4], CHUNK) for row in key), initial=0))
    adamw = rule == "adamw"
    launch(
        _diagonal, ends[-1], ELEMENTWISE,
        rows=table(key, lambda: [x for row in zip(*key, strict=True) for x in row] + ends[:-1], params[0].device),
        count=len(params), lr=rate, step=step, beta1=beta1, rest1=1 - beta1, rest2=1 - beta2,
        keep=beta2 if adamw else 1 - (1 - beta2) * gamma, gain=(1 - beta2) * (1.0 if adamw else batch_size),
        eps=eps, weight_decay=weight_decay,
        **{name: TYPES[x[0].dtype] for name, x in zip("PGMS", lists, strict=True)},
        ALIGNED=all(x % 16 == 0 for row in key for x in row[:4]), LOAD_LR=isinstance(rate, Tensor),
        ADAMW=adamw, MAXIMIZE=maximize, CHUNK=CHUNK, BLOCK=ELEMENTWISE.block,
    )  # fmt: skip
