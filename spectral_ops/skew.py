"""The generator of the rotation: curvature divided by eigenvalue gaps, skew-symmetrised."""

import torch
from torch import Tensor

from spectral_ops import _checks as check
from spectral_ops import reference
from spectral_ops._batches import matrices, vectors
from spectral_ops._library import define


def _skew_generator_impl(w: Tensor, d: Tensor, tol: float) -> Tensor:
    return reference.skew_generator(w, d, tol).to(w.dtype)


def _skew_generator_fake(w: Tensor, d: Tensor, tol: float) -> Tensor:
    return torch.empty_like(w, memory_format=torch.contiguous_format)


def _gram_skew_fake(x: Tensor, d: Tensor, scale: Tensor | None, tol: float) -> tuple[Tensor, Tensor, Tensor]:
    dtype = reference.accumulation_dtype(x.dtype)
    return (
        x.new_empty((*x.shape[:-1], x.shape[-2])),
        x.new_empty(x.shape[:-1], dtype=dtype),
        x.new_empty(x.shape[:-2], dtype=dtype),
    )


def _skew_generator_kernel(w: Tensor, d: Tensor, tol: float) -> Tensor:
    from spectral_ops.kernels import skew

    return skew.skew_generator(matrices(w), vectors(d), tol).view(w.shape)


def _gram_skew_kernel(x: Tensor, d: Tensor, scale: Tensor | None, tol: float) -> tuple[Tensor, Tensor, Tensor]:
    from spectral_ops.kernels import launch, skew

    x3 = matrices(x)
    config = launch.pick("gram_skew", x.shape[-2], x.shape[-1], len(x3), x)
    if config is None:
        return NotImplemented
    out, diag_w, sq_norm = skew.gram_skew(x3, vectors(d), None if scale is None else vectors(scale), tol, config)
    return out.view(*x.shape[:-1], x.shape[-2]), diag_w.view(x.shape[:-1]), sq_norm.view(x.shape[:-2])


_skew_generator = define(
    "skew_generator(Tensor w, Tensor d, float tol) -> Tensor",
    _skew_generator_impl,
    _skew_generator_fake,
    _skew_generator_kernel,
)
_gram_skew = define(
    "gram_skew(Tensor x, Tensor d, Tensor? scale, float tol) -> (Tensor, Tensor, Tensor)",
    reference.gram_skew,
    _gram_skew_fake,
    _gram_skew_kernel,
)


def skew_generator(w: Tensor, d: Tensor, *, tol: float = 1e-6) -> Tensor:
    """`Skew(Tril(U))` with `U_ij = −w_ij / (d_i − d_j)`, and 0 where `|d_i − d_j| ≤ tol · max(d_i, d_j)`.

    Times `β₂/2` it is the argument of the Cayley map (Lin et al., 2025, Fig. 1). `Skew(M) = M − Mᵀ`; `Tril` keeps
    the strictly lower triangle, so the upper triangle of `w` is not read.

    Args:
        w: `(..., n, n)`, symmetric.
        d: `(..., n)`, positive eigenvalues.
        tol: relative gap under which two eigenvalues count as equal.

    Returns:
        `(..., n, n)` in the dtype of `w`, bitwise skew-symmetric.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape, device, or a negative `tol`.
    """
    w = check.square(w, "w", "skew_generator")
    check.shaped(d, "d", "skew_generator", w.shape[:-1], w)
    check.not_negative(tol, "tol", "skew_generator")
    result: Tensor = _skew_generator(w, d, tol)
    return result


def gram_skew(x: Tensor, d: Tensor, scale: Tensor | None = None, *, tol: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    """`skew_generator(w, d)`, `diag(w)` and a squared norm, of `w = x Diag(scale) xᵀ`, which is never stored.

    `w` is divided by the eigenvalue gaps before it is rounded (Lin et al., 2025, Fig. 1 and Fig. 6).

    Args:
        x: `(..., n, k)`.
        d: `(..., n)`, positive eigenvalues.
        scale: `(..., k)`, the weight of each column of `x`; default: ones.
        tol: relative gap under which two eigenvalues count as equal.

    Returns:
        `(skew, diag_w, sq_norm)`. `skew` is `(..., n, n)` in the dtype of `x`, bitwise skew-symmetric; `diag_w` `(..., n)`,
        float32 (float64 for float64); `sq_norm` `(...)`, `‖skew‖_F²` before rounding, float32 (float64 for float64).

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape, device, or a negative `tol`.
    """
    x = check.matrix(x, "x", "gram_skew")
    check.shaped(d, "d", "gram_skew", x.shape[:-1], x)
    if scale is not None:
        check.shaped(scale, "scale", "gram_skew", (*x.shape[:-2], x.shape[-1]), x)
    check.not_negative(tol, "tol", "gram_skew")
    skew, diag_w, sq_norm = _gram_skew(x, d, scale, tol)
    return skew, diag_w, sq_norm
