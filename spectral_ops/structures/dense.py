"""All matrices: with this structure SINGD is INGD."""

from dataclasses import dataclass

from torch import Tensor

from spectral_ops.gram import gram
from spectral_ops.structures.base import Symmetric, check_size, cholesky_inverse


@dataclass(frozen=True)
class Dense(Symmetric):
    """`n²` numbers, row by row.

    Args:
        n: rows and columns.
    """

    n: int

    def __post_init__(self) -> None:
        check_size(self.n, "n", "Dense")

    @property
    def size(self) -> int:
        return self.n * self.n

    @property
    def name(self) -> str:
        return "dense"

    def dense(self, a: Tensor) -> Tensor:
        return self._matrix(a).clone()

    def project(self, x: Tensor) -> Tensor:
        return gram(x).flatten(-2)

    def apply(self, a: Tensor, x: Tensor, transpose: bool = False) -> Tensor:
        matrix = self._matrix(a)
        return (matrix.mT if transpose else matrix) @ x

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return (self._matrix(a) @ self._matrix(b)).flatten(-2)

    def gram(self, a: Tensor) -> Tensor:
        return gram(self._matrix(a).mT).flatten(-2)

    def congruence(self, a: Tensor, h: Tensor) -> Tensor:
        matrix = self._matrix(a)
        return (matrix.mT @ (self._matrix(h) @ matrix)).flatten(-2)

    def inverse(self, a: Tensor) -> Tensor:
        return cholesky_inverse(self._matrix(a)).flatten(-2)

    def diagonals(self, a: Tensor) -> tuple[Tensor, ...]:
        return (a[..., None, :: self.n + 1],)

    def _matrix(self, a: Tensor) -> Tensor:
        return a.unflatten(-1, (self.n, self.n))
