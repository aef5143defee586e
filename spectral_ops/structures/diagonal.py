"""Diagonal matrices."""

from dataclasses import dataclass

import torch
from torch import Tensor

from spectral_ops.reference import accumulation_dtype, raised
from spectral_ops.structures.base import Symmetric, check_size
from spectral_ops.workspace import Workspace, serves

SMALL = 2**14
workspace = Workspace()


def squares(x: Tensor) -> Tensor:
    """Sum of the squares of each row, in float32 (float64)."""
    if x.is_cpu:  # `vector_norm` adds one number after the other there: ten times the time where `x` is transposed
        x = raised(x)
        if not serves(x, SMALL):
            return x.square().sum(-1)
        along = -2 if x.mT.is_contiguous() else -1
        x = x.mT if along == -2 else x
        (out,) = workspace.tensors(1, tuple(x.shape), x.dtype)
        return torch.square(x, out=out).sum(along)
    return torch.linalg.vector_norm(x, dim=-1, dtype=accumulation_dtype(x.dtype)).square()  # no temporary of x's size


@dataclass(frozen=True)
class Diagonal(Symmetric):
    """`n` numbers.

    Args:
        n: rows and columns.
    """

    n: int

    def __post_init__(self) -> None:
        check_size(self.n, "n", "Diagonal")

    @property
    def size(self) -> int:
        return self.n

    @property
    def name(self) -> str:
        return "diagonal"

    def dense(self, a: Tensor) -> Tensor:
        return torch.diag_embed(a)

    def project(self, x: Tensor) -> Tensor:
        return squares(x).to(x.dtype)

    def apply(self, a: Tensor, x: Tensor, transpose: bool = False) -> Tensor:
        return a.unsqueeze(-1) * x

    def outer(self, a: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
        return a.square().unsqueeze(-1) * x

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return a * b

    def gram(self, a: Tensor) -> Tensor:
        return a.square()

    def congruence(self, a: Tensor, h: Tensor) -> Tensor:
        return a * (h * a)

    def inverse(self, a: Tensor) -> Tensor:
        return torch.where((a > 0) & a.isfinite(), raised(a).reciprocal(), torch.nan).to(a.dtype)

    def diagonals(self, a: Tensor) -> tuple[Tensor, ...]:
        return (a.unsqueeze(-2),)
