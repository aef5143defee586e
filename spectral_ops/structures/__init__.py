"""Structured matrices for Kronecker factors: stored without their zeros, closed under products.

Lin et al., 2024, "Structured Inverse-Free Natural Gradient Descent: Memory-Efficient & Numerically-Stable KFAC", Table 1.
"""

from spectral_ops.structures.base import Structure, Symmetric
from spectral_ops.structures.block_diagonal import BlockDiagonal
from spectral_ops.structures.block_triangular import BlockTriangular
from spectral_ops.structures.dense import Dense
from spectral_ops.structures.diagonal import Diagonal
from spectral_ops.structures.named import structure
from spectral_ops.structures.toeplitz import Toeplitz
from spectral_ops.structures.triangular import Triangular

__all__ = [
    "BlockDiagonal",
    "BlockTriangular",
    "Dense",
    "Diagonal",
    "Structure",
    "Symmetric",
    "Toeplitz",
    "Triangular",
    "structure",
]
