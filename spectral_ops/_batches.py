"""Kernels take one batch dimension: leading dimensions are joined, or one is made."""

import torch
from torch import Tensor


def matrices(x: Tensor) -> Tensor:
    """`(…, n, m)` as `(b, n, m)`, of any strides."""
    return x.unsqueeze(0) if x.ndim == 2 else x.flatten(0, -3)


def vectors(x: Tensor) -> Tensor:
    """`(…, n)` as `(b, n)`, contiguous."""
    return (x.unsqueeze(0) if x.ndim == 1 else x.flatten(0, -2)).contiguous()


def numbers(x: Tensor, batch: torch.Size) -> Tensor:
    """A number, or one for each matrix, as `(b,)`, contiguous."""
    return x.expand(batch).reshape(-1).contiguous()
