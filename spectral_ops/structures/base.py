"""What a structure is: a set of matrices closed under sums, products and inverses, and its projection `Π̂`.

Lin et al., 2024, "Structured Inverse-Free Natural Gradient Descent" (SINGD), Section 3.2 and Table 1.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from spectral_ops.reference import accumulation_dtype, block, raised


def check_size(value: object, name: str, owner: str, least: int = 0) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{owner}: `{name}` must be an integer of at least {least}, got {value!r}")


class Structure(ABC):
    """Square matrices of one pattern, each a vector of the numbers that the pattern leaves free, without the zeros.

    It holds no tensor, is hashable, and equal to another of the same pattern. In what follows a matrix `a` is `(..., size)`
    with any batch dimensions, and `x` is `(..., n, c)` with the same and any strides. Operands have one dtype, which the
    result gets; sums are accumulated in float32 (float64). Arguments are not checked: this is the inside of an optimizer.

    `Π̂` maps a symmetric matrix onto the pattern: it extracts, and doubles what stands for two entries of it, so that a
    natural-gradient step in the logarithm of a factor needs no inverse (SINGD, Section 3.2).

    Attributes:
        n: rows and columns.
    """

    n: int
    symmetric: ClassVar[bool] = False
    """Closed under transposition, so that it has `congruence`: `isinstance(structure, Symmetric)`."""

    @property
    @abstractmethod
    def size(self) -> int:
        """How many numbers a matrix is stored in."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What `structure` takes."""

    @abstractmethod
    def dense(self, a: Tensor) -> Tensor:
        """`(..., n, n)`, with the zeros."""

    @abstractmethod
    def project(self, x: Tensor) -> Tensor:
        """`Π̂(x xᵀ)`."""

    @abstractmethod
    def apply(self, a: Tensor, x: Tensor, transpose: bool = False) -> Tensor:
        """`A x`, or `Aᵀ x`: a new tensor."""

    def outer(self, a: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
        """`A Aᵀ x`; `out` is memory of the size of `x` that may be used for it."""
        return self.apply(a, self.apply(a, x, transpose=True))

    @abstractmethod
    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """`A B`."""

    @abstractmethod
    def gram(self, a: Tensor) -> Tensor:
        """`Π̂(Aᵀ A)`."""

    @abstractmethod
    def diagonals(self, a: Tensor) -> tuple[Tensor, ...]:
        """Views of `a`, `(..., p, q)`, that make up the diagonal from the top."""

    def identity(self, *, dtype: torch.dtype, device: Any = None) -> Tensor:
        """`I`, `(size,)`."""
        return self.add_identity(torch.zeros(self.size, dtype=dtype, device=device), 1.0)

    def add_identity(self, a: Tensor, value: float | Tensor) -> Tensor:
        """`A + value · I` in place; `value` a number or one for each matrix. Returns `a`."""
        for view in self.diagonals(a):
            view.add_(block(value) if isinstance(value, Tensor) else value)
        return a

    def trace(self, a: Tensor) -> Tensor:
        """`Tr(A)`, `(...)`."""
        sums = [view.sum((-2, -1), dtype=accumulation_dtype(a.dtype)) for view in self.diagonals(a)]
        return sum(sums[1:], sums[0]).to(a.dtype)

    def inner(self, a: Tensor, b: Tensor) -> Tensor:
        """`Tr(Aᵀ B)`, `(...)`."""
        return self._inner(a, b).to(a.dtype)

    def norm(self, a: Tensor) -> Tensor:
        """Frobenius, `(...)`."""
        return self._inner(a, a).sqrt().to(a.dtype)

    def _inner(self, a: Tensor, b: Tensor) -> Tensor:
        """In the accumulation dtype."""
        return (raised(a) * raised(b)).sum(-1)


class Symmetric(Structure):
    """A structure closed under transposition."""

    symmetric: ClassVar[bool] = True

    @abstractmethod
    def congruence(self, a: Tensor, h: Tensor) -> Tensor:
        """`Aᵀ H A`, for a symmetric `h` symmetric up to rounding."""

    @abstractmethod
    def inverse(self, a: Tensor) -> Tensor:
        """Of a positive definite `a`, computed in float32 (float64); NaN where rounding has made it indefinite."""


def cholesky_inverse(a: Tensor) -> Tensor:
    """Of matrices `(..., k, k)`."""
    factor, info = torch.linalg.cholesky_ex(raised(a))  # which does not wait for `info`, as `cholesky` does
    diagonal = factor.diagonal(dim1=-2, dim2=-1)
    definite = block((info == 0) & ((diagonal > 0) & diagonal.isfinite()).all(-1))
    one = torch.eye(a.shape[-1], dtype=factor.dtype, device=a.device)
    return torch.where(definite, torch.cholesky_inverse(torch.where(definite, factor, one)), torch.nan).to(a.dtype)
