"""Eigenvalues and scale of a Kronecker factor pair."""

import torch
from torch import Tensor

from spectral_ops import _checks as check
from spectral_ops import reference
from spectral_ops._batches import numbers, vectors
from spectral_ops._library import define


def _fake(d_c: Tensor, d_k: Tensor, alpha: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return d_c.new_empty(d_c.shape), d_k.new_empty(d_k.shape), alpha.new_empty(alpha.shape)


def _kernel(
    d_c: Tensor,
    d_k: Tensor,
    alpha: Tensor,
    w_c: Tensor,
    w_k: Tensor,
    beta2: Tensor,
    gamma: float,
    damping: float,
    exact: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from spectral_ops.kernels import spectrum

    batch = d_c.shape[:-1]
    if 0 in (d_c.shape[-1], d_k.shape[-1]) or any(x.dtype == torch.float64 for x in (d_c, d_k, alpha, w_c, w_k, beta2)):
        return NotImplemented
    scale, beta2 = numbers(alpha, batch), numbers(beta2, batch)
    c, k, scale = spectrum.spectrum_update(
        vectors(d_c), vectors(d_k), scale, vectors(w_c), vectors(w_k), beta2, gamma, damping, exact
    )
    return c.view(d_c.shape), k.view(d_k.shape), scale.view(alpha.shape)


_spectrum_update = define(
    "spectrum_update(Tensor d_c, Tensor d_k, Tensor alpha, Tensor diag_w_c, Tensor diag_w_k, Tensor beta2,"
    " float gamma, float damping, bool exact) -> (Tensor, Tensor, Tensor)",
    reference.spectrum_update,
    _fake,
    _kernel,
)


def spectrum_update(
    d_c: Tensor,
    d_k: Tensor,
    alpha: Tensor,
    diag_w_c: Tensor,
    diag_w_k: Tensor,
    beta2: float | Tensor,
    *,
    gamma: float = 1.0,
    damping: float = 0.0,
    exact: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """New eigenvalues and scale of `S = α S_C ⊗ S_K` with `det Diag(d_C) = det Diag(d_K) = 1`.

    Exact exponential map (Lin et al., 2025, Fig. 1): `m_l = d_l⁻¹ ⊙ (−γ d_l + diag(W_l)/(α k_l))`,
    `d_l ← d_l ⊙ exp(β₂ (m_l − mean m_l))`, `α ← α exp(β₂/2 · (mean m_C + mean m_K))`; takes any symmetric curvature.

    Truncated map (Fig. 6): `n_l = (1 − γβ₂) d_l + β₂/(α k_l) · (diag W_l + Λ_l)`, `Λ_C = λ k_C mean(1/d_K)` and its mirror
    image, `d_l ← exp(log n_l − mean log n_l)`, `α ← α exp((mean log n_C + mean log n_K)/2)`; needs curvature ⪰ 0.

    `k_C` is the size of `d_k` and `k_K` that of `d_c`. Both sides use the old `d` and `alpha`.

    Args:
        d_c: `(..., n)`, positive.
        d_k: `(..., m)`, positive.
        alpha: `(...)`, positive.
        diag_w_c: `(..., n)`, the diagonal of the left side's curvature.
        diag_w_k: `(..., m)`, that of the right side's.
        beta2: share of the new curvature, a number or one for each matrix.
        gamma: 1 for a moving average, 0 for a sum.
        damping: `λ`, only of the truncated map.
        exact: the exact map.

    Returns:
        `(d_c, d_k, alpha)`, each in its own dtype, computed in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape, device or value, in a sentence that names the argument.
    """
    op = "spectrum_update"
    d_c = check.tensor(d_c, "d_c", op)
    d_k = check.tensor(d_k, "d_k", op)
    for d, name in ((d_c, "d_c"), (d_k, "d_k")):
        if d.ndim < 1:
            raise ValueError(f"{op}: `{name}` must have shape (..., size), got a scalar")
    batch = d_c.shape[:-1]
    check.shaped(d_k, "d_k", op, (*batch, d_k.shape[-1]), d_c)
    check.shaped(alpha, "alpha", op, batch, d_c)
    check.shaped(diag_w_c, "diag_w_c", op, d_c.shape, d_c)
    check.shaped(diag_w_k, "diag_w_k", op, d_k.shape, d_c)
    check.not_negative(damping, "damping", op)
    if exact and damping:
        raise ValueError(f"{op}: `damping` belongs to the truncated map, got {damping} with exact=True")
    beta2 = check.scalars(beta2, "beta2", op, d_c, batch)
    d_c, d_k, alpha = _spectrum_update(d_c, d_k, alpha, diag_w_c, diag_w_k, beta2, float(gamma), float(damping), bool(exact))
    return d_c, d_k, alpha
