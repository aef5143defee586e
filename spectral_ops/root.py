"""The inverse root of a Kronecker factor pair, applied to a matrix."""

from torch import Tensor

from spectral_ops import _checks as check
from spectral_ops import reference
from spectral_ops._library import define


def _fake(g: Tensor, *_: object) -> Tensor:
    return g.new_empty(g.shape)


_apply_root = define(
    "apply_root(Tensor g, Tensor? b_c, Tensor d_c, Tensor? b_k, Tensor d_k, Tensor alpha, float root) -> Tensor",
    reference.apply_root,
    _fake,
)


def apply_root(
    g: Tensor,
    b_c: Tensor | None,
    d_c: Tensor,
    b_k: Tensor | None,
    d_k: Tensor,
    alpha: float | Tensor,
    root: float,
) -> Tensor:
    """`alpha^(−1/root) S_C^(−1/root) g S_K^(−1/root)`, `S = b Diag(d) bᵀ` (Lin et al., 2025, Fig. 1, line 2).

    Args:
        g: `(..., n, m)`.
        b_c, b_k: `(..., n, n)` and `(..., m, m)`, orthogonal; None: the identity on that side.
        d_c, d_k: `(..., n)` and `(..., m)`, positive.
        alpha: a positive number, or one for each matrix.
        root: 1 is Newton-like, 2 Adam-like, 4 Shampoo's outer root; any positive number.

    Returns:
        `(..., n, m)` in the dtype of `g`, computed in float32 (float64 for float64) and rounded once.

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
    result: Tensor = _apply_root(g, b_c, d_c, b_k, d_k, alpha, float(root))
    return result
