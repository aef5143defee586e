"""Dense blocks along the diagonal."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from spectral_ops.structures.base import Symmetric, check_size, cholesky_inverse


@dataclass(frozen=True)
class BlockDiagonal(Symmetric):
    """`n // k` blocks of `k × k` and a last one of `n mod k`: `⌊n/k⌋ k² + (n mod k)²` numbers, block by block, row by row.

    Args:
        n: rows and columns.
        k: rows and columns of a block.
    """

    n: int
    k: int

    def __post_init__(self) -> None:
        check_size(self.n, "n", "BlockDiagonal")
        check_size(self.k, "k", "BlockDiagonal", 1)

    @property
    def size(self) -> int:
        return self.n // self.k * self.k**2 + (self.n % self.k) ** 2

    @property
    def name(self) -> str:
        return f"blockdiagonal{self.k}"

    def dense(self, a: Tensor) -> Tensor:
        result = a.new_zeros(*a.shape[:-1], self.n, self.n)
        start = 0
        for blocks in self._blocks(a):
            count, k = blocks.shape[-3:-1]
            stop = start + count * k
            square = result[..., start:stop, start:stop].unflatten(-1, (count, k)).unflatten(-3, (count, k))
            square.diagonal(dim1=-4, dim2=-2).copy_(blocks.movedim(-3, -1))
            start = stop
        return result

    def project(self, x: Tensor) -> Tensor:
        return self._map(lambda rows: rows @ rows.mT, self._rows(x))

    def apply(self, a: Tensor, x: Tensor, transpose: bool = False) -> Tensor:
        pairs = zip(self._blocks(a), self._rows(x), strict=True)
        parts = [((blocks.mT if transpose else blocks) @ rows).flatten(-3, -2) for blocks, rows in pairs]
        return torch.cat(parts, -2) if len(parts) > 1 else parts[0]

    def outer(self, a: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
        square = self._map(lambda blocks: blocks @ blocks.mT, self._blocks(a))
        if out is None or x.shape[:-2].numel() != 1:
            return self.apply(square, x)
        out = out.as_strided(x.shape, x.stride())  # so that nothing is copied or put together
        operands = self._blocks(square.view(-1)), self._rows(x.view(x.shape[-2:])), self._rows(out.view(x.shape[-2:]))
        for blocks, rows, target in zip(*operands, strict=True):
            torch.bmm(blocks, rows, out=target)
        return out

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return self._map(torch.matmul, self._blocks(a), self._blocks(b))

    def gram(self, a: Tensor) -> Tensor:
        return self._map(lambda blocks: blocks.mT @ blocks, self._blocks(a))

    def congruence(self, a: Tensor, h: Tensor) -> Tensor:
        return self._map(lambda blocks, middle: blocks.mT @ (middle @ blocks), self._blocks(a), self._blocks(h))

    def inverse(self, a: Tensor) -> Tensor:
        return self._map(cholesky_inverse, self._blocks(a))

    def diagonals(self, a: Tensor) -> tuple[Tensor, ...]:
        return tuple(blocks.diagonal(dim1=-2, dim2=-1) for blocks in self._blocks(a))

    def _groups(self) -> list[tuple[int, int]]:
        """Blocks of one size, how many of which: two products do for all."""
        groups = [(self.n // self.k, self.k), (1, self.n % self.k)]
        return [(count, k) for count, k in groups if count * k] or [(1, 0)]

    def _blocks(self, a: Tensor) -> list[Tensor]:
        """`(..., count, k, k)` of each group."""
        groups = self._groups()
        parts = a.split([count * k * k for count, k in groups], -1)
        return [part.unflatten(-1, (count, k, k)) for part, (count, k) in zip(parts, groups, strict=True)]

    def _rows(self, x: Tensor) -> list[Tensor]:
        """`(..., count, k, c)` of each group."""
        groups = self._groups()
        parts = x.split([count * k for count, k in groups], -2)
        return [part.unflatten(-2, (count, k)) for part, (count, k) in zip(parts, groups, strict=True)]

    @staticmethod
    def _map(function: Callable[..., Tensor], *operands: list[Tensor]) -> Tensor:
        parts = [function(*group).flatten(-3) for group in zip(*operands, strict=True)]
        return torch.cat(parts, -1) if len(parts) > 1 else parts[0]
