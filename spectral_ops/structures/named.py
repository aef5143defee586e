"""Structures by name."""

import re

from spectral_ops.structures.base import Structure, check_size
from spectral_ops.structures.block_diagonal import BlockDiagonal
from spectral_ops.structures.block_triangular import BlockTriangular
from spectral_ops.structures.dense import Dense
from spectral_ops.structures.diagonal import Diagonal
from spectral_ops.structures.toeplitz import Toeplitz
from spectral_ops.structures.triangular import Triangular

NUMBER = "([1-9][0-9]*)"


def structure(name: str, n: int) -> Structure:
    """The structure of `n × n` matrices that `name` says; `k`, `k1` and `k2` are numbers, cut to what `n` has room for.

    Args:
        name: one of
            `dense`, `diagonal`,
            `blockdiagonal{k}`: blocks of `k × k`,
            `tril`, `triu`: triangular,
            `rank{k}tril`, `rank{k}triu`: `[[A, 0], [B, D]]` and `[[A, B], [0, D]]`, `A` dense `k × k`, `D` diagonal,
            `rank{k}tril_bottomright`, `rank{k}triu_bottomright`: `[[D, 0], [B, A]]` and `[[D, B], [0, A]]`,
            `hierarchical{k1}_{k2}`: `[[A₁, ·, ·], [0, D, 0], [0, ·, A₃]]`, `A₁` dense `k1 × k1`, `A₃` dense `k2 × k2`,
            `triltoeplitz`, `triutoeplitz`.
        n: rows and columns, at least 0.

    Returns:
        an object without tensors, equal to any other of the same structure.

    Raises:
        ValueError: another name or size.
    """
    check_size(n, "n", "structure")
    if name in ("dense", "diagonal"):
        return Dense(n) if name == "dense" else Diagonal(n)
    if name in ("tril", "triu"):
        return Triangular(n, name == "triu")
    if name in ("triltoeplitz", "triutoeplitz"):
        return Toeplitz(n, name == "triutoeplitz")
    if match := re.fullmatch(f"blockdiagonal{NUMBER}", str(name)):
        return BlockDiagonal(n, int(match[1]))
    if match := re.fullmatch(f"rank{NUMBER}tri([lu])(_bottomright)?", str(name)):
        k, upper = min(int(match[1]), n), match[2] == "u"
        if match[3]:
            return BlockTriangular(Diagonal(n - k), Dense(k), upper, name)
        return BlockTriangular(Dense(k), Diagonal(n - k), upper, name)
    if match := re.fullmatch(f"hierarchical{NUMBER}_{NUMBER}", str(name)):
        k1 = min(int(match[1]), n)
        k2 = min(int(match[2]), n - k1)
        rest = BlockTriangular(Diagonal(n - k1 - k2), Dense(k2), upper=False)
        return BlockTriangular(Dense(k1), rest, True, name)
    raise ValueError(
        "structure: `name` must be dense, diagonal, blockdiagonal{k}, tril, triu, rank{k}tril, rank{k}triu, "
        "rank{k}tril_bottomright, rank{k}triu_bottomright, hierarchical{k1}_{k2}, triltoeplitz or triutoeplitz, "
        f"with numbers of at least 1 for k, k1 and k2, got {name!r}"
    )
