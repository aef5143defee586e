"""Elementwise optimizers, in place: all tensors, of any sizes, in two launches. The first finds whose gradients are finite.

A table on the device has a column for each tensor: addresses, size, weight decay, and its first program in either launch.
"""

import struct
from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from spectral_ops.kernels import tiles
from spectral_ops.kernels.config import Config
from spectral_ops.kernels.launch import cdiv, launch
from spectral_ops.kernels.update import TYPES, at, learning_rate, table

ELEMENTWISE = Config(1024, 0, 4, 1)
CHUNK = 8 * ELEMENTWISE.block  # elements that a program steps through
CHECKED = 16 * CHUNK  # and that one checks, more, since every program of a tensor adds up all its checks
ROWS = 10  # of the table
P, G, M, S, STEP, SKIPPED, SIZE, DECAY, FIRST, FIRST_CHECK = (tl.constexpr(row) for row in range(ROWS))


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
    PARAM: tl.constexpr, FIRST_MOMENT: tl.constexpr, SECOND_MOMENT: tl.constexpr, ADAMW: tl.constexpr, COUPLED: tl.constexpr,
    MAXIMIZE: tl.constexpr,
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
        average = beta1 * average + grad / (second + eps)
        change = average + weight_decay * old
        average = change if COUPLED else average
        new = old - rate * change
    tl.store(p, tiles.rounded(new, PARAM, None), mask=inside)
    tl.store(m, tiles.rounded(average, FIRST_MOMENT, None), mask=inside)
    tl.store(s, tiles.rounded(second, SECOND_MOMENT, None), mask=inside)


@triton.jit
def _bounds(table, count, first: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Of this program: its tensor, its number among the tensor's programs, its first element, how many it has."""
    index = _owner(table + first * count, count, BLOCK)
    t = tl.program_id(0) - tl.load(table + first * count + index)
    start = t * CHUNK
    return index, t, start, tl.minimum(tl.load(table + SIZE * count + index) - start, CHUNK).to(tl.int32)


@triton.jit(do_not_specialize=["count"])
def _diagonal_squares(
    table, count, squares, before,
    GRAD: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of squares of the gradients. The counters of steps are copied: the next launch reads and advances them."""
    index, t, start, left = _bounds(table, count, FIRST_CHECK, CHUNK, BLOCK)
    g = at(table + G * count + index, start, GRAD, ALIGNED)
    acc = tl.zeros((BLOCK,), tl.float32)
    for i in range(0, left, BLOCK):
        o = i + tl.arange(0, BLOCK)
        x = tl.load(g + o, mask=o < left, other=0.0).to(tl.float32)
        acc += x * x
    tl.store(squares + tl.program_id(0), tl.sum(acc))
    if t == 0:
        tl.store(before + index, tl.load(tl.load(table + STEP * count + index).to(tl.pointer_type(tl.float32))))


@triton.jit(do_not_specialize=["count"])
def _diagonal(
    table, count, squares, before, lr, beta1, rest1, rest2, keep, gain, eps,
    PARAM: tl.constexpr, GRAD: tl.constexpr, FIRST_MOMENT: tl.constexpr, SECOND_MOMENT: tl.constexpr, ALIGNED: tl.constexpr,
    LOAD_LR: tl.constexpr, ADAMW: tl.constexpr, COUPLED: tl.constexpr, MAXIMIZE: tl.constexpr, CHECKED: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index, t, start, left = _bounds(table, count, FIRST, CHUNK, BLOCK)
    parts = tl.cdiv(tl.load(table + SIZE * count + index), CHECKED)
    square = tiles.total(squares + tl.load(table + FIRST_CHECK * count + index), parts, BLOCK)
    finite = square < float("inf")  # false for NaN
    rate = tl.load(lr).to(tl.float32) if LOAD_LR else lr
    moves = finite & ((square > 0) | (rate != 0))  # a step that moves nothing is none
    step = tl.load(before + index) + 1
    if t == 0:
        if moves:
            tl.store(tl.load(table + STEP * count + index).to(tl.pointer_type(tl.float32)), step)
        if not finite:
            skipped = tl.load(table + SKIPPED * count + index).to(tl.pointer_type(tl.int64))
            tl.store(skipped, tl.load(skipped) + 1)
    if moves:
        p = at(table + P * count + index, start, PARAM, ALIGNED)
        g = at(table + G * count + index, start, GRAD, ALIGNED)
        m = at(table + M * count + index, start, FIRST_MOMENT, ALIGNED)
        s = at(table + S * count + index, start, SECOND_MOMENT, ALIGNED)
        weight_decay = tl.load(table + DECAY * count + index).to(tl.int32).to(tl.float32, bitcast=True)
        size, root = rate, 1.0
        if ADAMW:
            size = rate / _less_than_one(rest1, step.to(tl.int32))
            root = tl.sqrt(_less_than_one(rest2, step.to(tl.int32)))
        for i in range(0, left, BLOCK):
            o = i + tl.arange(0, BLOCK)
            inside = o < left
            if i + BLOCK <= left:  # masks of a size that is not known to the compiler would forbid vector stores
                _step(
                    p + o, g + o, m + o, s + o, None, rate, size, root, beta1, rest1, keep, gain, eps, weight_decay,
                    PARAM, FIRST_MOMENT, SECOND_MOMENT, ADAMW, COUPLED, MAXIMIZE,
                )  # fmt: skip
            else:
                _step(
                    p + o, g + o, m + o, s + o, inside, rate, size, root, beta1, rest1, keep, gain, eps, weight_decay,
                    PARAM, FIRST_MOMENT, SECOND_MOMENT, ADAMW, COUPLED, MAXIMIZE,
                )  # fmt: skip


def diagonal_step(
    params: Sequence[Tensor], grads: Sequence[Tensor], momenta: Sequence[Tensor], seconds: Sequence[Tensor],
    steps: Sequence[Tensor], skipped: Sequence[Tensor], lr: Tensor, weight_decay: Sequence[float],
    beta1: float, beta2: float, gamma: float, eps: float, batch_size: float, rule: str, maximize: bool,
) -> None:  # fmt: skip
    """Tensors of one dtype in each of the first four lists, all contiguous; the four of a parameter have its shape. `steps` are
    float32 and `skipped` int64, of one element, as `lr` is."""
    device, adamw = params[0].device, rule == "adamw"
    rate = learning_rate(lr, device)
    key = tuple(
        (*(x.data_ptr() for x in tensors), tensors[0].numel(), struct.unpack("<i", struct.pack("<f", decay))[0])
        for *tensors, decay in zip(params, grads, momenta, seconds, steps, skipped, weight_decay, strict=True)
    )
    ends, checks = (list(accumulate((max(1, cdiv(row[6], size)) for row in key), initial=0)) for size in (CHUNK, CHECKED))
    columns = table(key, lambda: [x for row in zip(*key, strict=True) for x in row] + ends[:-1] + checks[:-1], device)
    squares = torch.empty(checks[-1], dtype=torch.float32, device=device)
    shared = {
        "table": columns, "count": len(params), "squares": squares, "before": torch.empty_like(squares[: len(params)]),
        "GRAD": TYPES[grads[0].dtype], "ALIGNED": all(x % 16 == 0 for row in key for x in row[:4]), "BLOCK": ELEMENTWISE.block,
    }  # fmt: skip
    launch(_diagonal_squares, checks[-1], ELEMENTWISE, **shared, CHUNK=CHECKED)
    launch(
        _diagonal, ends[-1], ELEMENTWISE, **shared, lr=rate, beta1=beta1, rest1=1 - beta1, rest2=1 - beta2,
        keep=beta2 if adamw else 1 - (1 - beta2) * gamma, gain=(1 - beta2) * (1.0 if adamw else batch_size), eps=eps,
        PARAM=TYPES[params[0].dtype], FIRST_MOMENT=TYPES[momenta[0].dtype], SECOND_MOMENT=TYPES[seconds[0].dtype],
        LOAD_LR=isinstance(rate, Tensor), ADAMW=adamw, COUPLED=rule == "rf", MAXIMIZE=maximize, CHECKED=CHECKED, CHUNK=CHUNK,
    )  # fmt: skip
