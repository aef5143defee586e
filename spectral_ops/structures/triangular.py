"""Triangular matrices."""

from dataclasses import dataclass

from torch import Tensor

from spectral_ops.gram import gram
from spectral_ops.structures.base import Structure, check_size


@dataclass(frozen=True)
class Triangular(Structure):
    """`n (n + 1) / 2` numbers; computed with as a dense temporary, since costs are of that order anyway.

    Numbers stand as in LAPACK's rectangular full packed format, of `Aᵀ` if `upper`: with `p = ⌈n/2⌉`, the first `p` columns of
    a lower triangle, and in the corner above them, which they leave free, the transposed triangle of the others. So packing
    is a few copies of whole rectangles, without a table of indices, which would be four times the matrix.

    Args:
        n: rows and columns.
        upper: upper triangular, else lower.
    """

    n: int
    upper: bool

    def __post_init__(self) -> None:
        check_size(self.n, "n", "Triangular")

    @property
    def size(self) -> int:
        return self.n * (self.n + 1) // 2

    @property
    def name(self) -> str:
        return "triu" if self.upper else "tril"

    def dense(self, a: Tensor) -> Tensor:
        lower = self._unpack(a)
        return lower.mT.contiguous() if self.upper else lower

    def project(self, x: Tensor) -> Tensor:
        return self._extract(gram(x))

    def apply(self, a: Tensor, x: Tensor, transpose: bool = False) -> Tensor:
        lower = self._unpack(a)
        return (lower.mT if self.upper != transpose else lower) @ x

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = self._unpack(a), self._unpack(b)
        return self._pack(b @ a if self.upper else a @ b)

    def gram(self, a: Tensor) -> Tensor:
        lower = self._unpack(a)
        return self._extract(gram(lower if self.upper else lower.mT))

    def diagonals(self, a: Tensor) -> tuple[Tensor, ...]:
        _, p, extra = self._rectangle()
        a = a.unsqueeze(-2)
        top, corner = a[..., extra * p :: p + 1], a[..., 1 - extra :: p + 1]
        return top[..., :p], corner[..., : self.n - p]

    def _rectangle(self) -> tuple[int, int, int]:
        """Its rows and columns, and how many rows the first columns are moved down: 1 for an even `n`."""
        p, extra = (self.n + 1) // 2, 1 - self.n % 2
        return self.n + extra, p, extra

    def _unpack(self, a: Tensor) -> Tensor:
        """The lower triangle, `(..., n, n)`."""
        rows, p, extra = self._rectangle()
        r = a.unflatten(-1, (rows, p))
        lower = a.new_zeros(*a.shape[:-1], self.n, self.n)
        lower[..., :p] = r[..., extra:, :].tril()
        lower[..., p:, p:] = r[..., : self.n - p, 1 - extra :].triu().mT
        return lower

    def _pack(self, m: Tensor) -> Tensor:
        """The lower triangle of `m`, whatever stands above it."""
        rows, p, extra = self._rectangle()
        r = m.new_zeros(*m.shape[:-2], rows, p)
        r[..., extra:, :] = m[..., :p].tril()
        r[..., : self.n - p, 1 - extra :] += m[..., p:, p:].mT.triu()
        return r.flatten(-2)

    def _extract(self, s: Tensor) -> Tensor:
        """`Π̂(s)`: off-diagonal entries stand for two."""
        a = self._pack(s).mul_(2)
        for view in self.diagonals(a):
            view.mul_(0.5)
        return a
