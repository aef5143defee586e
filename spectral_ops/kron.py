"""Both sides of a Kronecker factor pair in one call: what an optimizer does to its curvature with a new gradient."""

from functools import partial

import torch
from torch import Tensor

from spectral_ops import _checks as check
from spectral_ops import blocked, reference
from spectral_ops._library import define


def _fake(g: Tensor, *_: object) -> Tensor:
    return g.new_empty(g.shape[:1], dtype=torch.bool)


def _kernel(
    g: Tensor,
    basis_c: Tensor | None,
    basis_k: Tensor | None,
    residual_c: Tensor | None,
    residual_k: Tensor | None,
    d_c: Tensor,
    d_k: Tensor,
    scale: Tensor,
    updates: Tensor,
    seed: Tensor | None,
    beta: float,
    damping: float,
    epsilon: float,
    limit: float,
    order: int,
) -> Tensor:
    from spectral_ops.kernels import average, cayley, launch, rotate, track

    state = [x for x in (basis_c, basis_k, residual_c, residual_k, d_c, d_k, scale, updates) if x is not None]
    dtypes = {b.dtype for b in (basis_c, basis_k, residual_c, residual_k) if b is not None}
    served = len(dtypes) == 1 and dtypes <= {torch.float32, torch.bfloat16} and torch.float64 not in (g.dtype, d_c.dtype)
    if not served or g.numel() == 0 or not all(x.is_contiguous() for x in state):
        return NotImplemented
    (batch, n, m), dtype = g.shape, dtypes.pop()
    like = next(b for b in (basis_c, basis_k) if b is not None)
    config = launch.pick("track", max(n, m), min(n, m), batch, like)
    if config is None or launch.pick("cayley", max(n, m), max(n, m), batch, like) is None:
        return NotImplemented
    g = g.float() if g.dtype == torch.float16 else g  # its range is not that of the bases
    x, rows, cols, squares = rotate.rotate(g, basis_c, d_c, basis_k, d_k)
    new = average.average(
        (rows, cols, squares), d_c, d_k, scale, updates, seed,
        beta=beta, damping=damping, relative_floor=reference.RELATIVE_FLOOR, negligible=reference.NEGLIGIBLE,
        streams=(reference.STREAM_STEP, reference.STREAM_SIDE),
    )  # fmt: skip
    bases, residuals = (basis_c, basis_k), (residual_c, residual_k)
    diag = None if basis_c is None else new.diag_c, None if basis_k is None else new.diag_k
    seeds = (None, None) if new.seeds is None else (new.seeds[0], new.seeds[1])
    generators = track.track(
        x, (new.weight_c, new.weight_k), diag, residuals, residuals, new.keep, new.usable, epsilon, dtype, config
    )
    f = cayley.generator_map(bases, generators, order, limit=limit, usable=new.usable)
    turned, v = cayley.turn(bases, f, residual=residuals, diag=diag, seed=seeds)
    if residual_c is not None or residual_k is not None:
        cayley.conjugate(f, v, diag, (d_c, d_k), residuals, floor=new.floor, b=bases, turned=turned, seed=seeds)
    else:
        for b, t in zip(bases, turned, strict=True):
            if b is not None and t is not None:
                b.copy_(t)
    return new.finite


_kron_track = define(
    "kron_track(Tensor g, Tensor(a!)? basis_c, Tensor(b!)? basis_k, Tensor(c!)? residual_c, Tensor(d!)? residual_k,"
    " Tensor(e!) d_c, Tensor(f!) d_k, Tensor(g!) scale, Tensor(h!) updates, Tensor? seed,"
    " float beta, float damping, float epsilon, float limit, int order) -> Tensor",
    partial(reference.kron_track, track=blocked.tracked),
    _fake,
    _kernel,
)


def kron_track(
    g: Tensor,
    bases: tuple[Tensor | None, Tensor | None],
    residuals: tuple[Tensor | None, Tensor | None],
    eigenvalues: tuple[Tensor, Tensor],
    scale: Tensor,
    updates: Tensor,
    *,
    seed: Tensor | None = None,
    beta: float,
    damping: float = 0.0,
    epsilon: float = 0.1,
    limit: float = 0.48,
    order: int = 3,
) -> Tensor:
    """Average a gradient's curvature into `S = α S_C ⊗ S_K`, `S_l = B_l T_l B_lᵀ`, and turn the bases after it; in place.

    With `x = B_Cᵀ g B_K`, and for each side `l` the other side's eigenvalues `d`, `k_C = m`, `k_K = n`:

        T_C ← (1 − β) T_C + β (x Diag(1/d_K) xᵀ + λ mean(1/d_K) I) / (α k_C)    and its mirror image for K, see `gram_track`
        B_l ← B_l P_l,  T_l ← P_lᵀ T_l P_l                                      see `cayley_track`
        α ← α √(g_C g_K), the geometric means by which the diagonals of T_C and T_K were divided

    The average is warm, `β = max(beta, 1 / (updates + 1))`, and the scale starts at the first gradient's mean square.
    A matrix whose gradient is zero, or has a root mean square under 1e-15, is left as it is, and one whose gradient, or its
    square, is not finite too.

    Args:
        g: `(b, n, m)`, gradients.
        bases: `B_C` `(b, n, n)` and `B_K` `(b, m, m)`, orthogonal; None: the side stays diagonal. Changed.
        residuals: `T_l` off its diagonal, symmetric, in the bases' dtype; (None, None): it is dropped after every update.
            Changed.
        eigenvalues: the diagonals of `T_C` `(b, n)` and `T_K` `(b, m)`, float32 (float64). Changed; never under 1e-6 of the
            largest.
        scale: `α`, `(b,)`. Changed.
        updates: `(b,)`, counter of usable gradients: finite and not negligible. Changed.
        seed: `(b,)` int64; bfloat16 bases and residuals are rounded stochastically by it and `updates`.
        beta: least share of the new curvature.
        damping: `λ`, in units of squared gradients.
        epsilon: relative eigenvalue gap under which rotations are damped.
        limit: of the truncated Cayley map, see `cayley_track`.
        order: of that map.

    Returns:
        Which gradients are finite, `(b,)` bool.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape or device, in a sentence that names the argument.
    """
    op = "kron_track"
    g = check.stack(g, "g", op)
    batch, sizes = g.shape[:1], g.shape[1:]
    for name, pair in (("bases", bases), ("residuals", residuals)):
        for i, (x, size) in enumerate(zip(pair, sizes, strict=True)):
            if x is not None:
                check.shaped(x, f"{name}[{i}]", op, (*batch, size, size), g)
    if any(r is not None for r in residuals):
        for i, (b, r) in enumerate(zip(bases, residuals, strict=True)):
            if (b is None) != (r is None):
                raise ValueError(f"{op}: a side has both a basis and a residual or neither, but not side {i}")
    for i, (d, size) in enumerate(zip(eigenvalues, sizes, strict=True)):
        check.shaped(d, f"eigenvalues[{i}]", op, (*batch, size), g)
    for name, x in (("scale", scale), ("updates", updates)):
        check.shaped(x, name, op, tuple(batch), g)
    finite: Tensor = _kron_track(
        g, *bases, *residuals, *eigenvalues, scale, updates, seed, float(beta), float(damping), float(epsilon),
        float(limit), order,
    )  # fmt: skip
    return finite
