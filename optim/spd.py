"""Minimisation over symmetric positive definite matrices, without decompositions.

Lin et al., 2025, "Spectral-factorized Positive-definite Curvature Learning for NN Training", Sec. 4.2 and App. L.
"""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from spectral_ops.cayley import cayley
from spectral_ops.factors import SpectralFactor
from spectral_ops.optim import _options as check
from spectral_ops.reference import skew_from_lower

Loss = Callable[[Tensor], Tensor]
Gradient = Callable[[Tensor], Tensor]

DECREASE = 1e-4  # of the one to first order: Armijo's constant


@dataclass(frozen=True)
class SPDResult:
    """Where `minimize_spd` ended.

    Attributes:
        matrix: `S`, `(n, n)`.
        factor: `S = B Diag(d) Bᵀ`, with its roots and its log-determinant.
        loss: `ℓ(S)`; None without `loss`.
        iterations: how many updates there were.
        converged: the norm of the Riemannian gradient is at most `tolerance`.
        history: `ℓ` before the first update and after each; empty without `loss`.
    """

    matrix: Tensor
    factor: SpectralFactor
    loss: float | None
    iterations: int
    converged: bool
    history: tuple[float, ...]


class _Point(NamedTuple):
    """`S` with `ℓ(S)`, the curvature `W = −2 D (Bᵀ E B) D`, and `‖D^(1/2) Bᵀ E B D^(1/2)‖_F`."""

    factor: SpectralFactor
    loss: float | None
    curvature: Tensor
    norm: float


def minimize_spd(
    start: int | SpectralFactor,
    loss: Loss | None = None,
    *,
    gradient: Gradient | None = None,
    lr: float | None = None,
    max_iterations: int = 1000,
    tolerance: float = 1e-8,
) -> SPDResult:
    r"""Minimise `ℓ(S)` over SPD matrices by Riemannian gradient descent in local coordinates of `S = B Diag(d) Bᵀ`.

    For `E = ∂ℓ/∂S`, symmetrised, one iteration is the exact map of `SpectralFactor.update` with `γ = 0`:

        W = −2 D (Bᵀ E B) D
        d ← d ⊙ exp(β₂ diag(W)/d)
        B ← B · Cayley(β₂/2 · Skew(Tril(U))),   U_ij = −W_ij / (d_i − d_j)

    which is `S ← S − 2β₂ S E S` up to first order, positive definite for any `E`, and has no eigendecomposition.

        minimize_spd(60, lambda s: (s * q).sum() - torch.linalg.slogdet(s)[1]).matrix        # q⁻¹

    Args:
        start: a factor with rotation="riemannian", which is not modified, or a size `n`: the identity in float64, in a basis
            without special directions, since coordinates of equal eigenvalues are not turned into one another (App. E).
        loss: takes `S` `(n, n)` to a number, by operations that autograd knows if there is no `gradient`.
        gradient: takes `S` to `∂ℓ/∂S` `(n, n)`, symmetric or not. None: by autograd. With a fixed `lr` it is called once for
            each iterate, and may be of a batch of the data.
        lr: `β₂`. None: a line search, which needs `loss`: twice the last step, halved until the loss falls.
        max_iterations: updates at most.
        tolerance: of the norm of the Riemannian gradient, `‖D^(1/2) Bᵀ E B D^(1/2)‖_F`, in units of the loss.

    Returns:
        the last iterate, see `SPDResult`. With the line search also where no step lowers the loss any more.

    Raises:
        ValueError, TypeError: an argument of a wrong type or value, neither `loss` nor `gradient`, `lr=None` without `loss`, a
            gradient of a wrong shape, a loss or gradient that is not finite, at the start or with too large an `lr` later.

    Lin et al., 2025, "Spectral-factorized Positive-definite Curvature Learning for NN Training", Sec. 4.2, Fig. 1.
    """
    if loss is None and (gradient is None or lr is None):
        why = "is needed by the line search of lr=None" if gradient else "or `gradient` is needed"
        raise ValueError(f"minimize_spd: `loss` {why}, got None")
    options = {"lr": lr, "max_iterations": max_iterations, "tolerance": tolerance}
    if lr is not None:
        check.number(options, "lr", positive=True)
    check.number(options, "tolerance")
    check.whole(options, "max_iterations")
    point = _evaluate(_start(start), loss, gradient)
    for name, value in (("loss", point.loss), ("gradient", point.norm)):
        if value is not None and not math.isfinite(value):
            raise ValueError(f"minimize_spd: `{name}` must be finite at the start, got {value}")
    history, iterations, step = [point.loss], 0, math.inf
    while point.norm > tolerance and iterations < max_iterations:
        if lr is None:
            found = _search(point, step, loss, gradient)
            if found is None:
                break
            point, step = found
        else:
            new = _step(point, lr, loss, gradient)
            if new is None:
                raise ValueError(f"minimize_spd: `lr` must be smaller, got {lr}: iteration {iterations} left the range")
            point = new
        history.append(point.loss)
        iterations += 1
    losses = tuple(x for x in history if x is not None)
    return SPDResult(point.factor.matrix(), point.factor, point.loss, iterations, point.norm <= tolerance, losses)


def _start(start: int | SpectralFactor) -> SpectralFactor:
    if isinstance(start, SpectralFactor):
        if start.rotation != "riemannian" or start.batch:
            raise ValueError(f"minimize_spd: `start` must be one matrix with rotation='riemannian', got {start}")
        factor = deepcopy(start)
        factor.validate = True
        return factor
    if isinstance(start, bool) or not isinstance(start, int) or start < 1:
        raise ValueError(f"minimize_spd: `start` must be a SpectralFactor or a size of at least 1, got {start!r}")
    # Where all eigenvalues are equal only diag(W) acts. In the basis I it is 0 for a gradient without diagonal, which would end
    # there, at no minimum.
    x = torch.randn(start, start, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return SpectralFactor(start, basis=cayley(skew_from_lower(x)), dtype=torch.float64)


def _evaluate(factor: SpectralFactor, loss: Loss | None, gradient: Gradient | None) -> _Point:
    s, value = factor.matrix(), None
    if loss is not None:
        with torch.set_grad_enabled(gradient is None):
            value = loss(s.requires_grad_(gradient is None))
    s = s.detach() if gradient else s
    if gradient is not None:
        e = gradient(s)
    elif isinstance(value, Tensor) and value.requires_grad:
        (e,) = torch.autograd.grad(value, s)
    else:
        raise ValueError(f"minimize_spd: `loss` must depend on `S` by autograd, or `gradient` be given, got {value!r}")
    if not isinstance(e, Tensor) or e.shape != s.shape:
        got = f"shape {tuple(e.shape)}" if isinstance(e, Tensor) else type(e).__name__
        raise ValueError(f"minimize_spd: `gradient` must return a tensor of shape {tuple(s.shape)}, got {got}")
    d, b, e = factor.eigenvalues, factor.basis.to(s.dtype), e.detach().to(s)
    root = d.sqrt()
    x = root.unsqueeze(-1) * (b.mT @ (0.5 * (e + e.mT)) @ b) * root
    x = 0.5 * (x + x.mT)
    curvature = -2 * root.unsqueeze(-1) * x * root
    return _Point(factor, None if value is None else float(torch.as_tensor(value).detach()), curvature, x.norm().item())


def _step(point: _Point, lr: float, loss: Loss | None, gradient: Gradient | None) -> _Point | None:
    """The next point, or None where it would leave the range of the numbers."""
    factor = deepcopy(point.factor)
    try:
        factor.update(point.curvature, rotated=True, beta2=lr, gamma=0, exact=True)
    except ValueError:
        return None
    new = _evaluate(factor, loss, gradient)
    return new if math.isfinite(new.norm) and (new.loss is None or math.isfinite(new.loss)) else None


def _search(point: _Point, step: float, loss: Loss | None, gradient: Gradient | None) -> tuple[_Point, float] | None:
    """The next point and the step to it, or None where no step lowers the loss."""
    assert point.loss is not None
    step = min(2 * step, 1 / point.norm)  # an eigenvalue changes by a factor of e² at most
    eps = torch.finfo(point.curvature.dtype).eps
    noise = len(point.curvature) * eps * abs(point.loss)
    while step * point.norm > eps:
        trial, expected = _step(point, step, loss, gradient), 2 * step * point.norm**2
        if trial is not None and trial.loss is not None:
            if expected > noise:
                better = trial.loss <= point.loss - DECREASE * expected
            else:  # near the minimum, where the loss is rounding and the gradient tells
                better = trial.loss <= point.loss + noise and trial.norm < point.norm
            if better:
                return trial, step
        step /= 2
    return None
