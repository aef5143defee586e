"""`reference.tracked` for large matrices on a CPU: the same sums and products, of the symmetric and skew ones only half.

Results that are symmetric or skew are computed in blocks on and below the diagonal and mirrored, additions ride on products,
and results go to a few buffers: memory that is new costs a tenth of the product that fills it.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from spectral_ops import reference

SMALLEST = 256  # smaller matrices are faster as a batch of whole products
BLOCK = 192  # products of less are slower by more than what they save
TILE = 256  # of a transposed copy, so that it stays in the cache
ORDERS = (2, 3)


def serves(b: Tensor, order: int) -> bool:
    return b.device.type == "cpu" and b.shape[-1] >= SMALLEST and order in ORDERS


def tracked(
    x: Tensor, d: Tensor, b: Tensor | None, r: Tensor | None, weight: Tensor, share: Tensor, damping: Tensor, usable: Tensor,
    seeds: Tensor | None, epsilon: float, limit: float, order: int,
) -> Tensor:  # fmt: skip
    """As `reference.tracked`, which it leaves small matrices to."""
    if b is None or not serves(b, order):
        return reference.tracked(x, d, b, r, weight, share, damping, usable, seeds, epsilon, limit, order)
    n = b.shape[-1]
    dtype = torch.promote_types(x.dtype, reference.accumulation_dtype(b.dtype))
    space = [torch.empty(n, n, dtype=dtype) for _ in range(3)]
    new, shrink, log_mean = reference.tracked_diagonal(x, d, weight, share, damping)
    floor = reference.RELATIVE_FLOOR * new.amax(-1, keepdim=True)
    weight = weight * (share * shrink).unsqueeze(-1)
    for i in usable.nonzero().flatten().tolist():
        wide_b = b[i].to(dtype)
        t = torch.zeros(n, n, dtype=dtype) if r is None else r[i].to(dtype)
        keep = ((1 - share) * shrink)[i].item()
        _average(t, x[i].to(dtype), weight[i].to(dtype), keep, new[i].to(dtype), epsilon, space[0])
        turned = _turn(wide_b, t, new[i], limit, order, r is not None, *space)
        _store(b[i], wide_b, None if seeds is None else seeds[i])
        if r is not None:
            if r.dtype == torch.bfloat16:
                turned = torch.where(turned > reference.LOST * new[i], turned, new[i].to(turned.dtype))
            _store(r[i], t, None if seeds is None else ~seeds[i], symmetric=True)
        d[i] = turned.clamp(min=floor[i])
    return log_mean


def _average(t: Tensor, x: Tensor, weight: Tensor, keep: float, new: Tensor, epsilon: float, generator: Tensor) -> None:
    """`T ← keep · T + x Diag(weight) xᵀ` in its lower blocks, which is all that is read until it is turned, and the generator;
    formulas as in `reference.gram_track`."""
    weighted, quarter, width = x * weight, 0.25 * new, epsilon * new
    for rows, columns in lower_blocks(len(x)):
        part = t[rows, columns].addmm_(weighted[rows], x[columns].mT, beta=keep)
        gap = quarter[columns] - quarter[rows, None]
        scale = (width[columns] + width[rows, None]).square_().addcmul_(gap, gap, value=16)
        half = gap.mul_(part).div_(scale)
        if rows == columns:
            generator[rows, columns] = half.tril_(-1).sub_(half.mT.clone()).mul_(2)
        else:
            generator[rows, columns] = half.mul_(2)
            mirror(generator, rows, columns, skew=True)
            mirror(t, rows, columns)


def _turn(
    b: Tensor, t: Tensor, diagonal: Tensor, limit: float, order: int, carry: bool, x: Tensor, square: Tensor, f: Tensor
) -> Tensor:
    """`b ← b P` and `T ← Pᵀ T P` in place, and the diagonal of `T`, as in `reference.cayley_track`. `x` is the generator; it,
    `square` and `f` are left with whatever."""
    blocks = list(lower_blocks(len(b)))
    for rows, columns in blocks:
        torch.mm(x[rows], x[:, columns], out=square[rows, columns])
        mirror(square, rows, columns)
    step, norm = (value.item() for value in reference.limited_step(square, limit))
    fit = norm**2
    even = 2 if order == 3 else 4 / (1 + math.sqrt(1 - 4 * fit))
    for rows, columns in blocks:
        part = torch.addmm(square[rows, columns], b.mT[rows], b[:, columns], beta=even * step**2, alpha=-0.5)
        odd = 2 * step * x[rows, columns]
        if order == 3:
            odd.addmm_(x[rows], square[:, columns], alpha=(1 + fit / 4) * step**3)
        if rows == columns:
            part.diagonal().add_(0.5)
        torch.add(part, odd, out=f[rows, columns])
        if rows != columns:
            copy_transposed(f[columns, rows], part.sub_(odd))
    torch.mm(b, f, out=x)
    b.add_(x)
    if not carry:
        return diagonal
    t.diagonal().copy_(diagonal)
    torch.mm(t, f, out=square).add_(t)
    for rows, columns in blocks:
        torch.addmm(square[rows, columns], f[:, rows].mT, square[:, columns], out=t[rows, columns])
        mirror(t, rows, columns)
    turned = t.diagonal().clone()
    t.diagonal().zero_()
    return turned


def _store(old: Tensor, new: Tensor, seed: Tensor | None, symmetric: bool = False) -> None:
    """Nothing, where `new` is the tensor itself."""
    if old.dtype == new.dtype:
        old.copy_(new)
    else:
        old.copy_(reference.rounded_symmetric(new, old.dtype, seed) if symmetric else reference.rounded(new, old.dtype, seed))


# --- Blocks -----------------------------------------------------------------------------------------------------------


def lower_blocks(n: int, start: int = 0) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of blocks that cover the lower triangle: halves of halves, so that most of it is in large products."""
    if n - start <= BLOCK:
        yield slice(start, n), slice(start, n)
        return
    middle = start + (n - start + 1) // 2
    yield from lower_blocks(middle, start)
    yield from lower_blocks(n, middle)
    yield slice(middle, n), slice(start, middle)


def mirror(x: Tensor, rows: slice, columns: slice, skew: bool = False) -> None:
    """Make `x` symmetric or skew, given this block of its lower half; blocks on the diagonal, which hold both halves, become
    symmetric in every bit."""
    if rows == columns:
        lower = x[rows, columns].tril(-1)
        x[rows, columns].triu_().tril_().add_(lower).add_(lower.mT)
    else:
        copy_transposed(x[columns, rows], x[rows, columns], -1 if skew else 1)


def copy_transposed(out: Tensor, x: Tensor, sign: int = 1) -> None:
    for i in range(0, x.shape[0], TILE):
        for j in range(0, x.shape[1], TILE):
            target, source = out[j : j + TILE, i : i + TILE], x[i : i + TILE, j : j + TILE].mT
            target.copy_(source) if sign > 0 else torch.neg(source, out=target)
