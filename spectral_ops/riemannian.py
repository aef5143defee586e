"""The paper's own update: Riemannian gradient descent in local coordinates of the spectral factorization.

Lin et al., 2025, "Spectral-factorized Positive-definite Curvature Learning for NN Training": Fig. 1 (`exact`), Fig. 5, Fig. 6.
`S = B Diag(d) Bᵀ`, or `S = α S_C ⊗ S_K` with two such sides. The curvature enters in a factor's own basis, `W = Bᵀ H B`.

    U_ij = −W_ij / (d_i − d_j)                              0 where two eigenvalues are (nearly) equal
    d ← d ⊙ exp(β₂ (diag(W)/d − γ))                         exact map, any symmetric H
    d ← (1 − γβ₂) d + β₂ (diag(W) + λ)                      truncated map, H ⪰ 0
    B ← B · Cayley(β₂/2 · Skew(Tril(U)))                    in a pair β₂ / (2 α k), k_C = m, k_K = n
    d_C, d_K, α                                             see `spectral_ops.spectrum_update`
"""

from typing import NamedTuple

import torch
from torch import Tensor

from spectral_ops.cayley import cayley, cayley_update
from spectral_ops.reference import add_diagonal, block, column, frobenius, matched, raised, rounded
from spectral_ops.skew import gram_skew, skew_generator
from spectral_ops.spectrum import spectrum_update

Pair = tuple[Tensor, Tensor]
Bases = tuple[Tensor | None, Tensor | None]  # None: that side stays diagonal


class Curvature(NamedTuple):
    """`W` as the update needs it: `Skew(Tril(U))`, `U_ij = −W_ij / (d_i − d_j)`, its norm, and the diagonal of `W`."""

    skew: Tensor | None
    diagonal: Tensor
    norm: Tensor | None


def of_matrix(w: Tensor, d: Tensor) -> Curvature:
    """`w` `(..., n, n)`, symmetric."""
    skew = skew_generator(w, d)
    return Curvature(skew, w.diagonal(dim1=-2, dim2=-1), frobenius(raised(skew)))


def of_factor(x: Tensor, d: Tensor, scale: Tensor | None = None, diagonal: bool = False) -> Curvature:
    """`W = x Diag(scale) xᵀ`, for `x` `(..., n, k)`; of a side that stays diagonal only that is computed."""
    if diagonal:
        square = x.square() if scale is None else x.square() * scale.unsqueeze(-2)
        return Curvature(None, square.sum(-1), None)
    skew, diag_w, sq_norm = gram_skew(x, d, scale)
    return Curvature(skew, diag_w, sq_norm.sqrt())


def full_update(
    b: Tensor | None, d: Tensor, w: Curvature, beta2: Tensor, gamma: float, damping: float, exact: bool, turn: "Turn"
) -> tuple[Tensor | None, Tensor]:
    """The top box of Fig. 1, or the right one of Fig. 5: new `B` and `d`."""
    rate = column(beta2)
    new = d * torch.exp(rate * (w.diagonal / d - gamma)) if exact else (1 - gamma * rate) * d + rate * (w.diagonal + damping)
    return turn(b, w, beta2 / 2), new


def kron_curvature(x: Tensor, bases: Bases, d: Pair) -> tuple[Curvature, Curvature]:
    """`W_C = x Diag(1/d_K) xᵀ` and `W_K = xᵀ Diag(1/d_C) x`, for a gradient `(..., n, m)` in the bases."""
    d_c, d_k = d
    w_c = of_factor(x, d_c, d_k.reciprocal(), diagonal=bases[0] is None)
    return w_c, of_factor(x.mT, d_k, d_c.reciprocal(), diagonal=bases[1] is None)


def kron_update(
    bases: Bases, d: Pair, alpha: Tensor, w: tuple[Curvature, Curvature], beta2: Tensor, gamma: float, damping: float,
    exact: bool, turns: tuple["Turn", "Turn"],
) -> tuple[Bases, Pair, Tensor]:  # fmt: skip
    """The bottom box of Fig. 1, or the right one of Fig. 6: new bases, eigenvalues and scale."""
    k_c, k_k = d[1].shape[-1], d[0].shape[-1]
    b_c, b_k = (turn(b, side, beta2 / (2 * alpha * k)) for turn, b, side, k in zip(turns, bases, w, (k_c, k_k), strict=True))
    d_c, d_k, alpha = spectrum_update(
        *d, alpha, w[0].diagonal, w[1].diagonal, beta2, gamma=gamma, damping=damping, exact=exact
    )  # fmt: skip
    return (b_c, b_k), (d_c, d_k), alpha


class Turn(NamedTuple):
    """`B ← B · Cayley(step · Skew(Tril(U)))`, less half the orthogonality defect of `B`.

    `order` None: the exact map, a linear solve; else the truncated one. `limit`: the step is at most
    `limit / ‖Skew(Tril(U))‖_F` (Sec. 3.4), which truncated maps need; None: it is as it is. bfloat16 bases are rounded
    stochastically with a seed, else to nearest.
    """

    order: int | None
    limit: float | None
    seed: Tensor | None = None

    def __call__(self, b: Tensor | None, w: Curvature, step: Tensor) -> Tensor | None:
        if b is None or w.skew is None or w.norm is None:
            return None
        if self.limit is not None:
            step = torch.minimum(step, self.limit / w.norm.clamp(min=torch.finfo(w.norm.dtype).tiny))
        if self.order is None:
            wide, x = matched(raised(b), block(step) * w.skew)
            # Corrected first, then turned: this map turns by more than 60°, and in one product that would feed the defect. What
            # a solve with a huge `X` has left of a rotation may be a large one, which is corrected by steps.
            defect = add_diagonal(wide.mT @ wide, -1)
            part = 0.5 / frobenius(defect).clamp(min=1)
            return rounded((wide - block(part) * (wide @ defect)) @ cayley(x), b.dtype, self.seed)
        if self.seed is None:
            return cayley_update(b, w.skew, step, order=self.order, correct=True)
        return cayley_update(b, w.skew, step, order=self.order, correct=True, rounding="stochastic", seed=self.seed)
