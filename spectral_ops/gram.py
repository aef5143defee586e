"""Weighted Gram matrix."""

from torch import Tensor

from spectral_ops import _checks as check
from spectral_ops import reference
from spectral_ops._batches import matrices, vectors
from spectral_ops._library import define


def _fake(x: Tensor, scale: Tensor | None, alpha: float, beta: float, c: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-2]))


def _kernel(x: Tensor, scale: Tensor | None, alpha: float, beta: float, c: Tensor | None) -> Tensor:
    from spectral_ops.kernels import gram, launch

    x3 = matrices(x)
    config = launch.pick("gram", x.shape[-2], x.shape[-1], len(x3), x)
    if config is None:
        return NotImplemented
    s, c3 = None if scale is None else vectors(scale), None if c is None else matrices(c)
    return gram.gram(x3, s, alpha, beta, c3, config).view(*x.shape[:-1], x.shape[-2])


_gram = define("gram(Tensor x, Tensor? scale, float alpha, float beta, Tensor? c) -> Tensor", reference.gram, _fake, _kernel)


def gram(x: Tensor, scale: Tensor | None = None, *, alpha: float = 1.0, beta: float = 0.0, c: Tensor | None = None) -> Tensor:
    """`alpha · x Diag(scale) xᵀ + beta · c`, bitwise symmetric.

    This is the curvature of one side of a Kronecker factor in its own basis: `W_C = G̃ Diag(1/d_K) G̃ᵀ`
    (Lin et al., 2025, "Spectral-factorized Positive-definite Curvature Learning", Fig. 1 and Fig. 6).

    Args:
        x: `(..., n, k)`, float64, float32, bfloat16 or float16; any strides, any size from 0 up.
        scale: `(..., k)`, the weight of each column of `x`; default: ones.
        alpha: a Python number. A factor that changes from step to step belongs into `scale`.
        beta: a Python number, likewise.
        c: `(..., n, n)`, symmetric; needed if `beta` is not 0.

    Returns:
        `(..., n, n)` in the dtype of `x`, accumulated in float32 (float64 for float64) and rounded once.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape or device, in a sentence that names the argument.
    """
    x = check.matrix(x, "x", "gram")
    if scale is not None:
        check.shaped(scale, "scale", "gram", (*x.shape[:-2], x.shape[-1]), x)
    if c is not None:
        check.shaped(c, "c", "gram", (*x.shape[:-1], x.shape[-2]), x)
    elif beta:
        raise ValueError(f"gram: `beta` is {beta} but there is no `c` to multiply")
    result: Tensor = _gram(x, scale, float(alpha), float(beta), c if beta else None)
    return result
