"""The inverse root of a Kronecker factor pair, applied to a matrix."""

from typing import Any

import torch
from torch import Tensor

from spectral_ops import _checks as check
from spectral_ops import reference
from spectral_ops._batches import matrices, numbers, vectors
from spectral_ops._library import HAS_TRITON, define


def _fake(
    g: Tensor, b_c: Tensor | None, d_c: Tensor, b_k: Tensor | None, d_k: Tensor, alpha: Tensor, root: float
) -> tuple[Tensor, Tensor]:
    parts = 1
    if g.is_cuda and HAS_TRITON and _served(g, b_c, b_k):
        from spectral_ops.kernels import rotate

        parts = rotate.root_parts(g, b_c, b_k)
    return g.new_empty(g.shape), g.new_empty((*g.shape[:-2], parts), dtype=reference.accumulation_dtype(g.dtype))


def _kernel(
    g: Tensor, b_c: Tensor | None, d_c: Tensor, b_k: Tensor | None, d_k: Tensor, alpha: Tensor, root: float
) -> tuple[Tensor, Tensor]:
    from spectral_ops.kernels import rotate

    if not _served(g, b_c, b_k):
        return NotImplemented
    u, squares = rotate.apply_root(
        matrices(g),
        None if b_c is None else matrices(b_c),
        vectors(d_c),
        None if b_k is None else matrices(b_k),
        vectors(d_k),
        numbers(alpha, g.shape[:-2]),
        root,
    )
    return u.view(g.shape), squares.view(*g.shape[:-2], -1)


def _served(g: Tensor, b_c: Tensor | None, b_k: Tensor | None) -> bool:
    """Whether the kernel takes it: a basis at least, one dtype for both, no float16 beside another dtype (its range)."""
    from spectral_ops.kernels import launch

    bases = [b for b in (b_c, b_k) if b is not None]
    dtypes = {b.dtype for b in bases}
    both = dtypes | {g.dtype}
    if len(dtypes) != 1 or torch.float64 in both or (torch.float16 in both and len(both) > 1) or g.numel() == 0:
        return False
    n, m = g.shape[-2:]
    return launch.pick("root", min(n, m), max(n, m), g.shape[:-2].numel(), bases[0]) is not None


_apply_root = define(
    "apply_root(Tensor g, Tensor? b_c, Tensor d_c, Tensor? b_k, Tensor d_k, Tensor alpha, float root) -> (Tensor, Tensor)",
    reference.apply_root,
    _fake,
    _kernel,
)


def apply_root(
    g: Tensor,
    b_c: Tensor | None,
    d_c: Tensor,
    b_k: Tensor | None,
    d_k: Tensor,
    alpha: float | Tensor,
    root: float,
    *,
    return_squares: bool = False,
) -> Any:
    """`alpha^(−1/root) S_C^(−1/root) g S_K^(−1/root)`, `S = b Diag(d) bᵀ` (Lin et al., 2025, Fig. 1, line 2).

    Args:
        g: `(..., n, m)`.
        b_c: `(..., n, n)`, orthogonal; None: the identity on that side.
        d_c: `(..., n)`, positive.
        b_k: `(..., m, m)`, orthogonal; None: the identity on that side.
        d_k: `(..., m)`, positive.
        alpha: a positive number, or one for each matrix.
        root: 1 is Newton-like, 2 Adam-like, 4 Shampoo's outer root; any positive number.
        return_squares: also return sums of squares of the result, so that its norm costs no further pass.

    Returns:
        `(..., n, m)` in the dtype of `g`, computed in float32 (float64 for float64); between products with 16-bit bases a
        kernel rounds to 16 bits where that does not mix directions of different curvature. With `return_squares`, also
        `(..., parts)` float32 (float64): the sum over the parts is the squared Frobenius norm.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape, device or value, in a sentence that names the argument.
    """
    op = "apply_root"
    g = check.matrix(g, "g", op)
    batch, (n, m) = g.shape[:-2], g.shape[-2:]
    check.shaped(d_c, "d_c", op, (*batch, n), g)
    check.shaped(d_k, "d_k", op, (*batch, m), g)
    if b_c is not None:
        check.shaped(b_c, "b_c", op, (*batch, n, n), g)
    if b_k is not None:
        check.shaped(b_k, "b_k", op, (*batch, m, m), g)
    if not root > 0:
        raise ValueError(f"{op}: `root` must be positive, got {root}")
    alpha = check.scalars(alpha, "alpha", op, g, batch)
    u, squares = _apply_root(g, b_c, d_c, b_k, d_k, alpha, float(root))
    return (u, squares) if return_squares else u
