"""Two structures on the diagonal and a dense rectangle between them: rank-k and hierarchical matrices."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from spectral_ops.structures.base import Structure


@dataclass(frozen=True)
class BlockTriangular(Structure):
    """`[[A, B], [0, D]]` if `upper`, else `[[A, 0], [B, D]]`: the numbers of `A` in `first`, of `B` row by row, of `D` in
    `second`, `first.size + first.n · second.n + second.size` of them.

    With a dense `A` (`k × k`) and a diagonal `D` this is a rank-k triangular matrix: `A Aᵀ` or its inverse is a diagonal one
    plus one of rank k. Hierarchical: upper, with `D = [[diagonal, 0], [·, dense]]`.

    Args:
        first: structure of `A`.
        second: structure of `D`.
        upper: as above.
        name: what `structure` takes, if it has a name there; of no matter for equality.
    """

    first: Structure
    second: Structure
    upper: bool
    name: str = field(default="blocktriangular", compare=False)
    n: int = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "n", self.first.n + self.second.n)

    @property
    def size(self) -> int:
        return self.first.size + self.first.n * self.second.n + self.second.size

    def dense(self, a: Tensor) -> Tensor:
        a, b, d = self._parts(a)
        k = self.first.n
        result = a.new_zeros(*a.shape[:-1], self.n, self.n)
        result[..., :k, :k] = self.first.dense(a)
        (result[..., :k, k:] if self.upper else result[..., k:, :k]).copy_(b)
        result[..., k:, k:] = self.second.dense(d)
        return result

    def project(self, x: Tensor) -> Tensor:
        x1, x2 = self._rows(x)
        b = x1 @ x2.mT if self.upper else x2 @ x1.mT
        return self._join(self.first.project(x1), b.mul_(2), self.second.project(x2))

    def apply(self, a: Tensor, x: Tensor, transpose: bool = False) -> Tensor:
        a, b, d = self._parts(a)
        x1, x2 = self._rows(x)
        y1, y2 = self.first.apply(a, x1, transpose), self.second.apply(d, x2, transpose)
        if self.upper != transpose:
            y1 += (b.mT if transpose else b) @ x2
        else:
            y2 += (b.mT if transpose else b) @ x1
        return torch.cat((y1, y2), -2)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        (a1, b1, d1), (a2, b2, d2) = self._parts(a), self._parts(b)
        if self.upper:
            between = self.first.apply(a1, b2) + self.second.apply(d2, b1.mT, transpose=True).mT
        else:
            between = self.second.apply(d1, b2) + self.first.apply(a2, b1.mT, transpose=True).mT
        return self._join(self.first.product(a1, a2), between, self.second.product(d1, d2))

    def gram(self, a: Tensor) -> Tensor:
        a, b, d = self._parts(a)
        first, second = self.first.gram(a), self.second.gram(d)
        if self.upper:
            between = self.first.apply(a, b, transpose=True)
            second += self.second.project(b.mT)
        else:
            between = self.second.apply(d, b, transpose=True)
            first += self.first.project(b.mT)
        return self._join(first, between.mul_(2), second)

    def diagonals(self, a: Tensor) -> tuple[Tensor, ...]:
        a, _, d = self._parts(a)
        return *self.first.diagonals(a), *self.second.diagonals(d)

    def _parts(self, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        p, q = self.first.n, self.second.n
        a, b, d = a.split([self.first.size, p * q, self.second.size], -1)
        return a, b.unflatten(-1, (p, q) if self.upper else (q, p)), d

    def _rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[..., : self.first.n, :], x[..., self.first.n :, :]

    @staticmethod
    def _join(a: Tensor, b: Tensor, d: Tensor) -> Tensor:
        return torch.cat((a, b.flatten(-2), d), -1)
