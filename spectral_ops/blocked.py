"""`reference.tracked` for large matrices on a CPU: the same sums and products, of the symmetric and skew ones only half.

Results that are symmetric or skew are computed in blocks on and below the diagonal and mirrored, additions ride on products,
and results go to buffers that stay: the page faults of new ones cost a tenth of a step.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from spectral_ops import reference
from spectral_ops.workspace import Workspace

SMALLEST = 256  # smaller matrices are faster as a batch of whole products
BLOCK = 192  # smaller products are slower by more than what they save; elementwise, four of these fit a cache
ORDERS = (2, 3)


def serves(b: Tensor, order: int) -> bool:
    return b.device.type == "cpu" and b.shape[-1] >= SMALLEST and order in ORDERS


workspace = Workspace()


def tracked(
    x: Tensor, d: Tensor, b: Tensor | None, r: Tensor | None, weight: Tensor, share: Tensor, damping: Tensor, usable: Tensor,
    seeds: Tensor | None, epsilon: float, limit: float, order: int,
) -> Tensor:  # fmt: skip
    """As `reference.tracked`, which it leaves small matrices to."""
    if b is None or not serves(b, order):
        return reference.tracked(x, d, b, r, weight, share, damping, usable, seeds, epsilon, limit, order)
    n = b.shape[-1]
    dtype = torch.promote_types(x.dtype, reference.accumulation_dtype(b.dtype))
    space = workspace.tensors(3, (n, n), dtype)
    new, shrink, log_mean = reference.tracked_diagonal(x, d, weight, share, damping)
    floor = reference.RELATIVE_FLOOR * new.amax(-1, keepdim=True)
    weight = weight * (share * shrink).unsqueeze(-1)
    for i in usable.nonzero().flatten().tolist():
        wide_b = b[i].to(dtype)
        t = torch.zeros(n, n, dtype=dtype, device="cpu") if r is None else r[i].to(dtype)
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
    """`T ← keep · T + x Diag(weight) xᵀ` but for its diagonal, and the generator; formulas as in `reference.gram_track`."""
    weighted, half, width = x * weight, 0.5 * new, epsilon * new
    for block in lower_blocks(len(x)):
        rows, columns = block
        t[block].addmm_(weighted[rows], x[columns].mT, beta=keep)
        for i, j in tiles(block):
            gap = half[j] - half[i, None]
            scale = (width[j] + width[i, None]).square_().addcmul_(gap, gap, value=4)
            torch.div(gap.mul_(t[i, j]), scale, out=generator[i, j])
            mirror(generator, i, j, skew=True)
            mirror(t, i, j)


def _turn(
    b: Tensor, t: Tensor, diagonal: Tensor, limit: float, order: int, carry: bool, x: Tensor, square: Tensor, p: Tensor
) -> Tensor:
    """`b ← b P` and `T ← Pᵀ T P` in place, and the diagonal of `T`, as in `reference.cayley_track`. `x` is the generator; it,
    `square` and `p` are left with whatever."""
    blocks = list(lower_blocks(len(b)))
    for block in blocks:
        rows, columns = block
        torch.mm(x[rows], x[:, columns], out=square[block])
        for i, j in tiles(block):
            mirror(square, i, j)
    step, norm = (value.item() for value in reference.limited_step(square, limit))
    fit = norm**2
    double = 2 if order == 3 else 4 / (1 + math.sqrt(1 - 4 * fit))
    for block in blocks:  # of P, the symmetric part below and the skew part above the diagonal, then both in both
        rows, columns = block
        torch.addmm(square[block], b.mT[rows], b[:, columns], beta=double * step**2, alpha=-0.5, out=p[block])
        odd = torch.empty_like(p[block]) if rows == columns else p[columns, rows]
        torch.mul(x[columns, rows], 2 * step, out=odd)
        if order == 3:
            odd.addmm_(square[columns], x[:, rows], alpha=(1 + fit / 4) * step**3)
        if rows == columns:
            p[block].add_(odd).diagonal().add_(1.5)
            continue
        for i, j in tiles(block):
            even, odd = p[i, j], p[j, i]
            both = odd + even.mT
            even.sub_(odd.mT)
            odd.copy_(both)
    b.copy_(torch.mm(b, p, out=x))
    if not carry:
        return diagonal
    t.diagonal().copy_(diagonal)
    torch.mm(p.mT, t, out=square)
    for block in blocks:
        rows, columns = block
        torch.mm(square[rows], p[:, columns], out=t[block])
        for i, j in tiles(block):
            mirror(t, i, j)
    turned = t.diagonal().clone()
    t.diagonal().zero_()
    return turned


def _store(old: Tensor, new: Tensor, seed: Tensor | None, symmetric: bool = False) -> None:
    if old.dtype != new.dtype:  # else it is the same tensor
        old.copy_(reference.rounded_symmetric(new, old.dtype, seed) if symmetric else reference.rounded(new, old.dtype, seed))


# --- Blocks -----------------------------------------------------------------------------------------------------------

Block = tuple[slice, slice]


def lower_blocks(n: int, start: int = 0) -> Iterator[Block]:
    """Rows and columns of blocks that cover the lower triangle: halves of halves, so that most of it is in large products."""
    if n - start <= BLOCK:
        yield slice(start, n), slice(start, n)
        return
    middle = start + (n - start + 1) // 2
    yield from lower_blocks(middle, start)
    yield from lower_blocks(n, middle)
    yield slice(middle, n), slice(start, middle)


def tiles(block: Block) -> Iterator[Block]:
    """Parts of a block that stay in the cache between one elementwise operation and the next."""
    rows, columns = block
    for i in range(rows.start, rows.stop, BLOCK):
        for j in range(columns.start, columns.stop, BLOCK):
            yield slice(i, min(i + BLOCK, rows.stop)), slice(j, min(j + BLOCK, columns.stop))


def mirror(x: Tensor, rows: slice, columns: slice, skew: bool = False) -> None:
    """Make `x` symmetric or skew in every bit, given this tile of its lower half or on its diagonal."""
    tile = x[rows, columns]
    if rows != columns:
        x[columns, rows] = -tile.mT if skew else tile.mT
    else:
        tile.copy_(tile.tril(-1) - tile.tril(-1).mT if skew else tile.tril() + tile.tril(-1).mT)
