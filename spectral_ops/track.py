"""The rotation that tracks: bounded generators, a limit on the spectral norm, a carried off-diagonal residual.

Not in the paper: its own rotation falls behind its curvature. The factor is kept as `S = B T Bᵀ`, `T = Diag(d) + R` with a
residual `R` of zero diagonal, so that `S` is the exact moving average of the curvature while `B` need only be near its
eigenbasis. Without a residual `T` is cut to its diagonal after every update.
"""

import torch
from torch import Tensor

from spectral_ops import _checks as check
from spectral_ops import reference
from spectral_ops._batches import matrices, numbers, vectors
from spectral_ops._library import define
from spectral_ops.cayley import ORDERS
from spectral_ops.reference import column


def _absent(like: Tensor) -> Tensor:
    """Stands for "no residual" in an op's results: a schema has no optional result."""
    return like.new_empty(0)


def _gram_track_impl(
    x: Tensor, d: Tensor, residual: Tensor | None, scale: Tensor, beta: Tensor, damping: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator, d, new, log_mean = reference.gram_track(x, d, residual, scale, beta, damping, epsilon)
    return generator, d, _absent(x) if new is None else new, log_mean


def _gram_track_kernel(
    x: Tensor, d: Tensor, residual: Tensor | None, scale: Tensor, beta: Tensor, damping: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from spectral_ops.kernels import launch, track

    batch, (n, k), x3 = x.shape[:-2], x.shape[-2:], matrices(x)
    config = launch.pick("track", n, k, len(x3), x)
    if config is None:
        return NotImplemented
    new, shrink, log_mean = reference.tracked_diagonal(reference.raised(x), d, scale, beta, damping)
    weight = (reference.column(beta * shrink) * scale).float()
    keep = numbers((1 - beta) * shrink, batch).unsqueeze(-1).repeat(1, 2)
    old = None if residual is None else matrices(residual).contiguous()
    written = None if old is None else torch.empty(old.shape, dtype=old.dtype, device=old.device)
    generator, _ = track.track(
        x3, (vectors(weight), None), (vectors(new), None), (old, None), (written, None), keep, None, epsilon, x.dtype, config
    )
    assert generator is not None
    residual = _absent(x) if written is None else written.view(*x.shape[:-1], n)
    return generator.view(*x.shape[:-1], n), new, residual, log_mean


def _gram_track_fake(
    x: Tensor, d: Tensor, residual: Tensor | None, scale: Tensor, beta: Tensor, damping: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = reference.accumulation_dtype(x.dtype)
    square = x.new_empty((*x.shape[:-1], x.shape[-2]))
    new = _absent(x) if residual is None else residual.new_empty(residual.shape)
    return square, d.new_empty(d.shape, dtype=dtype), new, d.new_empty(d.shape[:-1], dtype=dtype)


def _cayley_track_impl(
    b: Tensor, x: Tensor, d: Tensor, residual: Tensor | None, limit: float, order: int, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    b, d, new = reference.cayley_track(b, x, d, residual, limit, order, seed)
    return b, d, _absent(b) if new is None else new


def _cayley_track_kernel(
    b: Tensor, x: Tensor, d: Tensor, residual: Tensor | None, limit: float, order: int, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    from spectral_ops.kernels import cayley, launch

    if b.dtype == torch.float16:  # powers of an unlimited generator may leave its range
        r = None if residual is None else residual.float()
        new_b, new_d, new_r = _cayley_track_kernel(b.float(), x.float(), d, r, limit, order, None)
        return new_b.to(b.dtype), new_d, new_r.to(b.dtype if residual is None else residual.dtype)
    shape, n = b.shape, b.shape[-1]
    if launch.pick("cayley", n, n, shape[:-2].numel(), b) is None or (residual is not None and residual.dtype != b.dtype):
        return NotImplemented
    b3, x3, d2 = matrices(b).contiguous(), matrices(x).to(b.dtype).contiguous(), vectors(d).float()
    none: launch.Sides = (None, None)
    seeds = none if seed is None or b.dtype != torch.bfloat16 else (numbers(seed, shape[:-2]), None)
    f = cayley.generator_map((b3, None), (x3, None), order, limit=limit)
    if residual is None:
        (turned, _), _ = cayley.turn((b3, None), f, seed=seeds)
        assert turned is not None
        return turned.view(shape), d.clone(), _absent(b)
    r3 = matrices(residual).contiguous()
    (turned, _), v = cayley.turn((b3, None), f, residual=(r3, None), diag=(d2, None), seed=seeds)
    assert turned is not None
    new_d, new_r = torch.empty_like(d2), torch.empty(r3.shape, dtype=r3.dtype, device=r3.device)
    cayley.conjugate(f, v, (d2, None), (new_d, None), (new_r, None), seed=seeds)
    return turned.view(shape), new_d.view(d.shape).to(d.dtype), new_r.view(shape)


def _cayley_track_fake(
    b: Tensor, x: Tensor, d: Tensor, residual: Tensor | None, limit: float, order: int, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return b.new_empty(b.shape), d.new_empty(d.shape), _absent(b) if residual is None else residual.new_empty(b.shape)


_gram_track = define(
    "gram_track(Tensor x, Tensor d, Tensor? residual, Tensor scale, Tensor beta, Tensor damping, float epsilon)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _gram_track_impl,
    _gram_track_fake,
    _gram_track_kernel,
)
_cayley_track = define(
    "cayley_track(Tensor b, Tensor x, Tensor d, Tensor? residual, float limit, int order, Tensor? seed)"
    " -> (Tensor, Tensor, Tensor)",
    _cayley_track_impl,
    _cayley_track_fake,
    _cayley_track_kernel,
)


def gram_track(
    x: Tensor,
    d: Tensor,
    scale: Tensor,
    beta: float | Tensor,
    *,
    residual: Tensor | None = None,
    damping: float | Tensor = 0.0,
    epsilon: float = 0.1,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Average new curvature into `T`, and the bounded generator that rotates the basis towards the eigenbasis.

    `T ← (1 − beta) (Diag(d) + residual) + beta (x Diag(scale) xᵀ + damping · I)`, then divided by the geometric mean of its
    diagonal, so that `n = diag(T)` has product 1. With `Δ = n_i − n_j`:

        X_ij = −½ T_ij Δ / (Δ² + epsilon² (n_i + n_j)²)   for i > j,   X_ji = −X_ij

    For separated eigenvalues `X` is to first order the paper's `−½ W_ij/(d_i − d_j)`, and it stays bounded where two
    eigenvalues meet.

    Args:
        x: `(..., n, k)`, the gradient in the current bases, one row for each eigenvector of this side.
        d: `(..., n)`, the diagonal of `T`, float32 (float64 for float64).
        scale: `(..., k)`, positive weights of the columns of `x`.
        beta: share of the new curvature, a number or one for each matrix.
        residual: `(..., n, n)`, symmetric with zero diagonal; None: `T` starts diagonal.
        damping: added to the new curvature's diagonal, a number or one for each matrix.
        epsilon: relative gap under which rotations are damped.

    Returns:
        `(generator, d, residual, log_mean)`. `generator` is `(..., n, n)` in the dtype of `x`, bitwise skew-symmetric; `d`
        `(..., n)`, the new diagonal of `T`, float32 (float64 for float64); `residual` the new off-diagonal part, symmetric, in
        the old one's dtype (None if none was given); `log_mean` `(...)`, the logarithm of what `T` was divided by, for the
        scale `α`.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape or device, in a sentence that names the argument.
    """
    op = "gram_track"
    x = check.matrix(x, "x", op)
    batch = x.shape[:-2]
    check.shaped(d, "d", op, x.shape[:-1], x)
    check.shaped(scale, "scale", op, (*batch, x.shape[-1]), x)
    if residual is not None:
        check.shaped(residual, "residual", op, (*x.shape[:-1], x.shape[-2]), x)
    beta = check.scalars(beta, "beta", op, x, batch)
    damping = check.scalars(damping, "damping", op, x, batch)
    generator, d, new, log_mean = _gram_track(x, d, residual, scale, beta, damping, float(epsilon))
    return generator, d, None if residual is None else new, log_mean


def cayley_track(
    b: Tensor,
    x: Tensor,
    d: Tensor,
    *,
    residual: Tensor | None = None,
    limit: float = 0.48,
    order: int = 3,
    seed: int | Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rotate a basis, and what is carried in it, by a limited and self-corrected truncated Cayley map.

        s = min(1, limit / σ),  σ² = ‖x²‖_F / √2 ≥ ‖x‖₂²,  P = cayley_truncated(s · x)
        b ← b (P − ½ (bᵀb − I)),   T ← Pᵀ T P   (with the same correction in P),   T = Diag(d) + residual

    Orders 2 and 3 are fitted to `τ = s²σ²`. Order 3 is `P = I + 2X + 2X² + (1 + τ/4) X³`, whose `P Pᵀ` departs from `I` by at
    most `0.15 τ³`. Order 2 is `P = I + 2X + cX²` with `c = 4 / (1 + √(1 − 4τ))`, which is 2 for small turns and keeps the
    length of the fastest plane; slower ones lose up to `1.7 τ²`. Repeated at its limit the map is stable while every plane
    turns by less than 60°: there the correction multiplies a plane's anisotropic defect by `2 sin(θ/2) < 1`. That is a limit of
    0.43, 0.49, 0.51 and 0.57 for order 2, 3, 4 and 8.

    Args:
        b: `(..., n, n)`, orthogonal up to rounding.
        x: `(..., n, n)`, skew-symmetric.
        d: `(..., n)`, the diagonal of `T`.
        residual: the off-diagonal part of `T`; None: only `b` is rotated and `d` returned as it came. If it is bfloat16, an
            entry of `d` of which less than a thousandth would remain, which is under its rounding error, is kept.
        limit: bound on the spectral norm of the generator, at most 0.5 for order 2 and 1 for the others.
        order: 2, 3, 4 or 8, see `cayley_truncated`.
        seed: round bfloat16 results stochastically, see `stochastic_round`; None: to nearest.

    Returns:
        `(b, d, residual)`, each in its own dtype.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape, device or value, in a sentence that names the argument.
    """
    op = "cayley_track"
    b = check.square(b, "b", op)
    check.shaped(x, "x", op, b.shape, b)
    check.shaped(d, "d", op, b.shape[:-1], b)
    if residual is not None:
        check.shaped(residual, "residual", op, b.shape, b)
    check.choice(order, "order", op, ORDERS)
    largest = 0.5 if order == 2 else 1
    if not 0 < limit <= largest:
        raise ValueError(f"{op}: `limit` must be in (0, {largest}] for order {order}, got {limit}")
    seeds = None if seed is None else check.seeds(seed, op, b, b.shape[:-2])
    b, d, new = _cayley_track(b, x, d, residual, float(limit), order, seeds)
    return b, d, None if residual is None else new


def full_track(
    b: Tensor,
    d: Tensor,
    residual: Tensor | None,
    w: Tensor,
    beta: Tensor,
    *,
    gamma: float = 1.0,
    damping: float = 0.0,
    epsilon: float = 0.1,
    limit: float = 0.48,
    order: int = 3,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Average curvature into one matrix `S = B T Bᵀ`, `T = Diag(d) + R`, and turn its basis after it.

        T ← (1 − γ beta) T + beta (W + λ I)
        B ← B P,   T ← Pᵀ T P        by the bounded generator of `gram_track` and the map of `cayley_track`

    `w` `(..., n, n)` is `Bᵀ H B`, `H ⪰ 0`; `beta` is one number for each matrix. Returns new `b`, `d` and residual; None: it is
    dropped. Eigenvalues are never under 1e-6 of the largest, where `d` and `w` are not.
    """
    share, keep = column(beta), column(1 - gamma * beta)
    n = keep * d + share * (w.diagonal(dim1=-2, dim2=-1) + damping)
    t = share.unsqueeze(-1) * w
    if residual is not None:
        t = t + keep.unsqueeze(-1) * reference.raised(residual)
    generator = reference.bounded_generator(t, n, epsilon)
    if residual is not None:
        residual = t.to(residual.dtype)
        residual.diagonal(dim1=-2, dim2=-1).zero_()
    b, n, residual = cayley_track(b, generator, n, residual=residual, limit=limit, order=order, seed=seed)
    if n.shape[-1]:
        n = n.clamp(min=reference.RELATIVE_FLOOR * n.amax(-1, keepdim=True))
    return b, n, residual
