"""Momentum, and the step of all parameters of one shape: elementwise, in place, one launch each.

Parameters lie wherever they are: the kernel finds each matrix through a table of pointers on the device.
"""

from collections.abc import Callable, Hashable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from spectral_ops.kernels import tiles
from spectral_ops.kernels.config import Config
from spectral_ops.kernels.launch import cdiv, launch

ELEMENTWISE = Config(1024, 0, 4, 1)
CHUNK = 8 * ELEMENTWISE.block  # elements that a program steps through
EPSILON = tl.constexpr(1e-8)  # as in `reference.RMS_EPSILON`
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
TABLES = 256  # tables that are remembered

Table = tuple[Tensor, Tensor]  # on the host and on the device
_tables: dict[Hashable, Table] = {}
_captured: list[Table] = []


def table(key: Hashable, values: Callable[[], list[int]], device: torch.device) -> Tensor:
    """`values()` as int64 on the device, remembered by `key`, which tells them. Nothing waits for the copy.

    A CUDA graph that is being captured cannot make a table: not every PyTorch has pinned memory then.
    """
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    entry = _tables.get((key, device))
    if entry is None:
        if capturing:
            raise RuntimeError("a CUDA graph captures tensors that were not seen before: do the same once before capturing")
        host = torch.tensor(values(), dtype=torch.int64, pin_memory=device.type == "cuda")
        entry = host, host.to(device, non_blocking=True)
        if len(_tables) == TABLES:
            _tables.pop(next(iter(_tables)))
        _tables[key, device] = entry
    if capturing:
        _captured.append(entry)  # the graph reads it for as long as it lives
    return entry[1]


def learning_rate(lr: Tensor, device: torch.device) -> Tensor | float:
    """As a kernel takes it: a tensor on its device is read there, another goes by its value."""
    return lr if lr.device == device else lr.item()


@triton.jit
def at(entry, start, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Element `start` of what the address in a table's entry points to."""
    p = tl.load(entry).to(tl.pointer_type(TYPE)) + start
    return tl.multiple_of(p, 16) if ALIGNED else p


@triton.jit
def _momentum(
    buffer, g, finite, direction, decay, share, size,
    NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    count = tl.cdiv(size, BLOCK)
    matrix, t = (tl.program_id(0) // count).to(tl.int64), tl.program_id(0) % count
    start, o = t.to(tl.int64) * BLOCK, tl.arange(0, BLOCK)
    inside = o < size - start
    start += matrix * size
    if tl.load(finite + matrix):
        old = tl.load(buffer + start + o, mask=inside, other=0.0).to(tl.float32)
        new = tl.load(g + start + o, mask=inside, other=0.0).to(tl.float32)
        new = -new if MAXIMIZE else new
        stored = tiles.rounded(old + share * (new - old), buffer.dtype.element_ty, None)
        tl.store(buffer + start + o, stored, mask=inside)
        average = stored.to(tl.float32)
        tl.store(direction + start + o, new + decay * (average - new) if NESTEROV else average, mask=inside)
    else:
        tl.store(direction + start + o, tl.zeros((BLOCK,), tl.float32), mask=inside)


def momentum(buffer: Tensor, g: Tensor, finite: Tensor, decay: float, nesterov: bool, maximize: bool) -> Tensor:
    """Average `g` into `buffer`, both `(b, n, m)` and contiguous, where `finite` `(b,)`; the direction, float32."""
    batch, n, m = buffer.shape
    direction = torch.empty((batch, n, m), dtype=torch.float32, device=buffer.device)
    launch(
        _momentum, batch * cdiv(n * m, ELEMENTWISE.block), ELEMENTWISE,
        buffer=buffer, g=g, finite=finite, direction=direction, decay=decay, share=1 - decay, size=n * m,
        NESTEROV=nesterov, MAXIMIZE=maximize, BLOCK=ELEMENTWISE.block,
    )  # fmt: skip
    return direction


@triton.jit(do_not_specialize=["parts"])
def _parameter_update(
    pointers, u, squares, parts, finite, step, skipped, lr, weight_decay, target, size,
    TYPE: tl.constexpr, ALIGNED: tl.constexpr, LOAD_LR: tl.constexpr, NORMALIZE: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    count = tl.cdiv(size, CHUNK)
    matrix, t = (tl.program_id(0) // count).to(tl.int64), tl.program_id(0) % count
    if not tl.load(finite + matrix):
        if t == 0:
            tl.store(skipped + matrix, tl.load(skipped + matrix) + 1)
    else:
        rate = tl.load(lr).to(tl.float32) if LOAD_LR else lr
        square = tiles.total(squares + matrix * parts, parts, BLOCK)
        if t == 0:  # a step that moves nothing is none
            tl.store(step + matrix, tl.load(step + matrix) + ((square > 0) | (rate != 0)).to(tl.float32))
        factor = 1.0
        if NORMALIZE != "none":
            rms = tl.sqrt(square / size) + EPSILON
            factor = target / rms if NORMALIZE == "rms" else 1.0 / tl.maximum(rms, 1.0)
        start = t.to(tl.int64) * CHUNK
        p = at(pointers + matrix, start, TYPE, ALIGNED)
        u += matrix * size + start
        left = tl.minimum(size - start, CHUNK).to(tl.int32)
        for first in range(0, left, BLOCK):
            o = first + tl.arange(0, BLOCK)
            inside = o < left
            old = tl.load(p + o, mask=inside, other=0.0).to(tl.float32)
            new = old - rate * (factor * tl.load(u + o, mask=inside, other=0.0).to(tl.float32) + weight_decay * old)
            tl.store(p + o, tiles.rounded(new, TYPE, None), mask=inside)


def parameter_update(
    params: Sequence[Tensor], u: Tensor, squares: Tensor, finite: Tensor, step: Tensor, skipped: Tensor, lr: Tensor,
    weight_decay: float, normalize: str, target: float,
) -> None:  # fmt: skip
    """`params` are contiguous, `(count, n, m)` or `(n, m)`, of one dtype; together as many matrices as `u` `(b, n, m)`.
    `squares` is `(b, parts)`, float32, `finite` `(b,)`, `step` float32 and `skipped` int64 `(b,)`; `lr` has one element."""
    batch, n, m = u.shape
    rate = learning_rate(lr, u.device)
    blocks = tuple((p.data_ptr(), p.numel() // (n * m)) for p in params)
    stride = n * m * params[0].element_size()
    launch(
        _parameter_update, batch * cdiv(n * m, CHUNK), ELEMENTWISE,
        pointers=table((blocks, stride), lambda: [p + i * stride for p, count in blocks for i in range(count)], u.device),
        u=u, squares=squares, parts=squares.shape[1], finite=finite, step=step, skipped=skipped, lr=rate,
        weight_decay=weight_decay, target=target,
        size=n * m, TYPE=TYPES[params[0].dtype], ALIGNED=all(p % 16 == 0 for p, _ in blocks) and stride % 16 == 0,
        LOAD_LR=isinstance(rate, Tensor), NORMALIZE=normalize, CHUNK=CHUNK, BLOCK=ELEMENTWISE.block,
    )  # fmt: skip
