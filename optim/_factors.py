"""What Kronecker factors have in common: their dtype, the seeds of their rounding, products along an axis of a tensor.

A factor of an axis of size `d` is `(b, d, d)`, or `(b, d)` where it is diagonal.
"""

import hashlib
import math

import torch
from torch import Tensor

from spectral_ops.optim._pieces import Group, Piece
from spectral_ops.reference import STREAM_SIDE, STREAM_STEP, frobenius, keep, matched, raised, rounded

FACTOR_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


def factor_dtype(group: Group, p: Tensor) -> torch.dtype:
    """The parameter's own dtype by default, except that a factor in float16 would not be rounded without bias."""
    chosen = group["preconditioner_dtype"]
    if chosen is None:
        return torch.float32 if p.dtype == torch.float16 else p.dtype
    return FACTOR_DTYPES[str(chosen).removeprefix("torch.")]  # a group that was changed may hold the dtype itself


# --- Rounding ---------------------------------------------------------------------------------------------------------


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _stream(seed: int, index: int, start: int) -> int:
    """The first seed of a piece's random bits: the same in every process, whatever else is in the batch."""
    name = f"{seed}/{index}/{start}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little", signed=True)


def first_seeds(group: Group, piece: Piece) -> Tensor:
    """Of the matrices of a piece, as their state holds it."""
    first = _stream(group["seed"], piece.index, piece.start)
    return piece.numbers.view(piece.lead) + first


def seeds(state: dict[str, Tensor], axis: int) -> Tensor | None:
    """Seeds of this update's rounding; None where factors are not bfloat16."""
    if "seed" not in state:
        return None
    side = (axis * STREAM_SIDE + 2**63) % 2**64 - 2**63  # as int64 wraps, which takes no number beyond its range
    return state["seed"] + state["updates"].long() * STREAM_STEP + side


# --- Products ---------------------------------------------------------------------------------------------------------


def unfolded(x: Tensor, axis: int) -> Tensor:
    """`(b, *dims)` as matrices `(b, dims[axis], the rest)`: views, if there are at most two axes."""
    x = x.movedim(axis + 1, 1)
    return x if x.ndim == 3 else x.reshape(len(x), x.shape[1], -1)


def multiplied(x: Tensor, factors: list[Tensor], but: int | None = None, transpose: bool = False) -> Tensor:
    """Tensors `(b, *dims)` times a factor along each axis `but` one, in float32 (float64)."""
    x = raised(x)
    for axis, factor in enumerate(factors):
        if axis == but:
            continue
        f, x = matched(raised(factor), x)
        if f.ndim == 2:
            x = x * f.view(len(f), *[-1 if i == axis else 1 for i in range(x.ndim - 1)])
        elif axis == x.ndim - 2:
            x = (x.reshape(len(x), -1, x.shape[-1]) @ (f if transpose else f.mT)).view(x.shape)
        else:
            moved = x.movedim(axis + 1, 1)
            x = ((f.mT if transpose else f) @ moved.flatten(2)).view(moved.shape).movedim(1, axis + 1)
    return x


def mean_square_entries(factor: Tensor) -> Tensor:
    """`Tr(KᵀK) / d`, `(b,)`."""
    norm = frobenius(raised(factor)) if factor.ndim == 3 else torch.linalg.vector_norm(raised(factor), dim=-1)
    return norm.square() / factor.shape[-1]


def product_of_others(numbers: list[Tensor], axis: int) -> Tensor:
    """Of all but one axis, `(b,)`."""
    result = torch.ones_like(numbers[axis])
    for i, x in enumerate(numbers):
        if i != axis:
            result = result * x
    return result


OCTAVES = 8


def balance(factors: list[Tensor], sizes: list[Tensor], usable: Tensor, power: int = 1) -> None:
    """Multiply the factors, in place, by powers of two whose product is 1, so that `sizes`, which grow with them, stay near
    each other. How a Kronecker product is shared between its factors makes no difference but for where numbers end: it drifts,
    and in some thousand updates one factor would overflow. `power`: -1 for factors whose inverses have these sizes."""
    logs = torch.stack(sizes).log2()
    turns = ((logs.mean(0) - logs) / OCTAVES).round() * (OCTAVES * power)
    turns[0] -= turns.sum(0)
    for factor, turn in zip(factors, torch.where(usable, turns.exp2(), 1), strict=True):
        factor.mul_(turn.view(-1, *[1] * (factor.ndim - 1)).to(factor.dtype))


def rest(dims: tuple[int, ...], axis: int) -> int:
    """How many columns the unfolding along an axis has."""
    return math.prod(dims) // dims[axis]


# --- Storing ----------------------------------------------------------------------------------------------------------


def ridged(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """A symmetric factor whose eigenvalues are above what rounding to `dtype` may have made of them: below, even their sign is
    lost."""
    diagonal = factor if factor.ndim == 2 else factor.diagonal(dim1=-2, dim2=-1)
    ridge = 8 * torch.finfo(dtype).eps * diagonal.amax(-1, keepdim=True)
    return factor + (ridge if factor.ndim == 2 else torch.diag_embed(ridge.expand(diagonal.shape)))


def adopt(usable: Tensor, state: dict[str, Tensor], new: dict[str, Tensor | None]) -> None:
    """Write what is new over the state, for the usable matrices of which all of it is finite: the squares of a gradient may be
    in range, and what is made of them not."""
    made = {name: value for name, value in new.items() if value is not None}
    for value in made.values():
        usable = usable & value.isfinite().view(len(usable), -1).all(1)
    for name, value in made.items():
        keep(usable, state[name], value)


def store(mask: Tensor, old: Tensor, new: Tensor, seed: Tensor | None = None) -> None:
    """Write a symmetric or diagonal factor over `old`, for the matrices in the mask."""
    if old.ndim == 2:
        new = rounded(new.unsqueeze(-2), old.dtype, seed).squeeze(-2)
    elif seed is not None:  # random bits would round the two halves apart: the lower one counts
        lower = rounded(new, old.dtype, seed).tril()
        new = lower + lower.tril(-1).mT
    keep(mask, old, new)
