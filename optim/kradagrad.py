"""KrADagrad and KrADagrad*: a matrix that approximates the inverse of the empirical Fisher directly, without an inversion.

Mei, Moreno, Walters, 2023, "KrADagrad: Kronecker Approximation-Domination Gradient Preconditioned Stochastic Optimization",
Algorithm 1, (9) to (13) and Sec. 3.3. `L` is the left (row) side, `R` the right one. Algorithm 1 prints the pair swapped where
it updates them.
"""

from typing import Any

import torch
from torch import Tensor

import spectral_ops as ops
from spectral_ops.optim import _options as check
from spectral_ops.optim._engine import Batch
from spectral_ops.optim._factors import multiplied, rest, seeds, store, unfolded
from spectral_ops.optim._kronecker import KroneckerOptimizer, multiply, shaped
from spectral_ops.optim._pieces import Group
from spectral_ops.reference import add_diagonal, block, column, frobenius, keep, matched, raised, rounded, rounded_symmetric

ROOTS = ("tracking", "eigh")
EPSILON = 0.1  # relative eigenvalue gap under which rotations are damped


class KrADagradStar(KroneckerOptimizer):
    r"""KrADagrad*: Shampoo's regret from factors that need no inverse, only positive roots.

    For a weight `n × m` with gradient `G`, `L` and `R` start at the identity, and

        L ← L − L H L / t,   H = b G Gᵀ + λ m I,   t = 1 + ‖H L‖_F,   and the mirror image for R
        θ ← θ − lr · L^(1/4) G R^(1/4)

    so that `0 ≺ L_k ⪯ L_{k−1}` (Cor. 3.3). Tensors with `N` axes have a factor for each and the root `1/(2N)`.
    `update_scale=None, momentum=0` is Algorithm 1; otherwise scale, momentum and decay are those of `IFShampoo`, and gradients
    count in units of the first one's root mean square.

    Roots need no decomposition: a factor is kept as `B T Bᵀ`, a bounded Cayley step turns `B` towards its eigenbasis in every
    update, and the root is that of the diagonal of `T` and, to first order, of the rest. A float32 factor as one matrix would
    lose eigenvalues under the rounding error of the largest, even their sign, and diverge.

    Args:
        params: parameters, named parameters, or groups, as of `IFShampoo`.
        lr: learning rate, a float or a tensor of one element. With `update_scale="rms"` it means what AdamW's does.
        momentum: decay of the average of gradients; 0 in the paper.
        damping: `λ`, in units of squared gradients.
        weight_decay: as of `IFShampoo`.
        batch_size: `b`, as of `IFShampoo`.
        update_interval: as of `IFShampoo`.
        roots: "tracking", or "eigh": exact, by an eigendecomposition in every update.
        update_scale: "rms": every update has root mean square 0.2 before `lr`; "clip": at most 1; None: as it is.
        decoupled_weight_decay: as of `IFShampoo`.
        per_axis: a factor for each axis of a parameter, as of `IFShampoo`.
        max_preconditioner_dim: larger sides keep a diagonal factor.
        preconditioner_dtype: of bases and what is off the diagonal of `T`; roots are float32 at least.
        adamw_betas: of AdamW inside.
        adamw_eps: of AdamW inside.
        seed: of the stochastic rounding.
        maximize: ascend.
        capturable: the step may be captured in a CUDA graph, as of `IFShampoo`.
        unknown: `mesh` and `transport_dtype`, as of `IFShampoo`; options of other optimizers, as long as they are false.

    Raises:
        ValueError, TypeError, RuntimeError: as `IFShampoo`.

    Mei, Moreno, Walters, 2023, "KrADagrad: Kronecker Approximation-Domination Gradient Preconditioned Stochastic Optimization",
    Algorithm 1, Sec. 3.3.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1.5e-2,
        momentum: float = 0.9,
        damping: float = 0.0,
        weight_decay: float = 0.0,
        batch_size: Any = 1,
        update_interval: int = 1,
        *,
        roots: str = "tracking",
        update_scale: str | None = "rms",
        decoupled_weight_decay: bool | None = None,
        per_axis: bool = False,
        max_preconditioner_dim: int = 8192,
        preconditioner_dtype: torch.dtype | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        seed: int = 0,
        maximize: bool = False,
        capturable: bool = False,
        **unknown: Any,
    ):
        super().__init__(params, locals())

    def check_options(self, group: Group) -> None:
        super().check_options(group)
        check.choice(group, "roots", ROOTS)

    def layout(self, group: Group) -> tuple[Any, ...]:
        return (*super().layout(group), group["roots"])

    def init_axis(self, group: Group, start: Tensor) -> dict[str, Tensor]:
        if group["roots"] == "eigh" or start.ndim == 1:
            return {"factor": start, "root": raised(start)}
        # The factor is `B (Diag(d) + residual) Bᵀ`: in a basis where it is nearly diagonal, its eigenvalues keep their relative
        # precision, where a rounded factor loses those under its largest one's rounding error, even their sign, and diverges.
        d = raised(start.diagonal(dim1=-2, dim2=-1))
        return {"basis": start, "eigenvalues": d, "residual": torch.zeros_like(start), "root": raised(start)}

    def root(self, batch: Batch) -> int:
        """Which root of its factors the update is multiplied by: of half the power, as AdaGrad has it, and of a geometric mean
        of as many estimates as there are factors."""
        return 2 * len(batch.dims)

    def outer(self, batch: Batch, g: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        """Two tensors, whose unfoldings along the axis have the product `G Gᵀ`, or what stands in its place."""
        return g, g

    def turn(self, batch: Batch, axis: int) -> Tensor | bool:
        """Whether it is this axis' turn."""
        return True

    def learn(self, group: Group, batch: Batch, usable: Tensor, weight: Tensor) -> None:
        """L ← L − L H L / t,   t = 1 + ‖H L‖_F,   H = b G Gᵀ + λ n I: as `L⁻¹ ← L⁻¹ + H / t`, to first order and from below."""
        g = shaped(batch, batch.grad)
        new = [self._shrunk(group, batch, axis, g, weight) for axis in range(len(batch.dims))]
        for axis, (t, basis) in enumerate(new):
            mine = usable & self.turn(batch, axis) & t.isfinite().flatten(1).all(1)
            self._keep(batch, axis, mine, t, basis)

    def precondition(self, group: Group, batch: Batch, x: Tensor) -> tuple[Tensor, Tensor]:
        """`L^(1/4) x R^(1/4)`"""
        return multiply(batch, "root", x, -0.5)

    def _shrunk(self, group: Group, batch: Batch, axis: int, g: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """The factor of an axis after this gradient, in a basis, and that."""
        t, basis = _factor(batch.state, axis)
        left, right = (unfolded(x, axis) for x in self.outer(batch, g, axis))
        # In units of the sizes of L and of H, whose squares may be too small or too large as numbers
        unit = _largest(t if t.ndim == 2 else t.diagonal(dim1=-2, dim2=-1))
        t = t / unit.view(-1, *[1] * (t.ndim - 1))
        norms = [frobenius(x).clamp(min=torch.finfo(x.dtype).tiny) for x in (left, right)]
        size = norms[0] * norms[1] * weight
        shrink, size = size.clamp(min=1).reciprocal(), size.clamp(max=1)
        damp = group["damping"] * rest(batch.dims, axis) * shrink
        left, right, one = left / block(norms[0]), right / block(norms[1]), shrink / unit
        smallest = torch.finfo(t.dtype).eps  # of what remains: `1 − x` may be 0, which it is not
        if t.ndim == 2:
            h = (left * right).sum(-1).clamp(min=0) * column(size) + column(damp)
            x = h * t / column(one + torch.linalg.vector_norm(h * t, dim=-1))
            return column(unit) * t * (1 - x).clamp(min=smallest), None
        t, left = matched(t, left)
        right = right.to(t.dtype)
        if basis is not None:
            basis = basis.to(t.dtype)
            left, right = basis.mT @ left, basis.mT @ right
        h = (left @ right.mT) * block(size).to(t.dtype)
        h = add_diagonal(_plausible(h, h.diagonal(dim1=-2, dim2=-1).clamp(min=0)), column(damp))
        ht = h @ t
        change = t @ ht
        new = t - (change + change.mT) / block(2 * (one + frobenius(ht))).to(t.dtype)
        d, old = new.diagonal(dim1=-2, dim2=-1), t.diagonal(dim1=-2, dim2=-1)
        return block(unit).to(t.dtype) * _plausible(new, d.clamp(min=smallest * old, max=old)), basis

    def _keep(self, batch: Batch, axis: int, mine: Tensor, t: Tensor, basis: Tensor | None) -> None:
        """Store a factor and its root."""
        s, root, seed = batch.state, self.root(batch), seeds(batch.state, axis)
        if basis is not None:
            turned, d, residual, value = tracked_root(t, basis, root)
            old = {name: s[f"{name}_{axis}"] for name in ("basis", "eigenvalues", "residual")}
            keep(mine, old["basis"], rounded(turned, old["basis"].dtype, seed))
            keep(mine, old["eigenvalues"], d)
            keep(mine, old["residual"], rounded_symmetric(residual, old["residual"].dtype, None if seed is None else ~seed))
        elif t.ndim == 2:
            store(mine, s[f"factor_{axis}"], t, seed)
            value = t.pow(1 / root)
        else:
            factor = s[f"factor_{axis}"]
            d, v = torch.linalg.eigh(torch.where(block(mine), t, factor.to(t.dtype)))
            d = d.clamp(min=8 * torch.finfo(factor.dtype).eps * d[..., -1:])  # of less, not even the sign is known
            store(mine, factor, (v * d.unsqueeze(-2)) @ v.mT, seed)
            value = (v * d.pow(1 / root).unsqueeze(-2)) @ v.mT
        store(mine, s[f"root_{axis}"], value)


class KrADagrad(KrADagradStar):
    r"""KrADagrad: the two sides take turns, each seen through the other: `L ← L − L H L / t` with `H = b G R Gᵀ + λ m I`, the
    left one first, and `θ ← θ − lr · L^(1/2) G R^(1/2)`, whatever the number of axes. Its regret is not optimal. Options are
    those of `KrADagradStar`.

    Args:
        params: as of `KrADagradStar`.
        lr: as of `KrADagradStar`.
        momentum: as of `KrADagradStar`.
        damping: as of `KrADagradStar`.
        weight_decay: as of `KrADagradStar`.
        batch_size: as of `KrADagradStar`.
        update_interval: as of `KrADagradStar`.
        roots: as of `KrADagradStar`.
        update_scale: as of `KrADagradStar`.
        decoupled_weight_decay: as of `KrADagradStar`.
        per_axis: as of `KrADagradStar`.
        max_preconditioner_dim: as of `KrADagradStar`.
        preconditioner_dtype: as of `KrADagradStar`.
        adamw_betas: as of `KrADagradStar`.
        adamw_eps: as of `KrADagradStar`.
        seed: as of `KrADagradStar`.
        maximize: as of `KrADagradStar`.
        capturable: as of `KrADagradStar`.
        unknown: as of `KrADagradStar`.

    Raises:
        ValueError, TypeError, RuntimeError: as `IFShampoo`.

    Mei, Moreno, Walters, 2023, "KrADagrad: Kronecker Approximation-Domination Gradient Preconditioned Stochastic Optimization",
    (9) to (13), Sec. 3.2.
    """

    def root(self, batch: Batch) -> int:
        return 2

    def outer(self, batch: Batch, g: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        kept = [_factor(batch.state, i) for i in range(len(batch.dims))]
        bases = [torch.ones(t.shape[:2], dtype=t.dtype, device=t.device) if b is None else b for t, b in kept]
        x = multiplied(g, bases, but=axis, transpose=True)  # in bases, so that small eigenvalues are not lost in a product
        return x, multiplied(x, [t for t, _ in kept], but=axis)

    def turn(self, batch: Batch, axis: int) -> Tensor | bool:
        return (batch.state["updates"] - 1) % len(batch.dims) == axis


def whole(state: dict[str, Tensor], axis: int) -> Tensor:
    """The factor of an axis, a matrix, or its diagonal where it has no more."""
    t, basis = _factor(state, axis)
    return t if basis is None else basis @ (t @ basis.mT)


def _factor(state: dict[str, Tensor], axis: int) -> tuple[Tensor, Tensor | None]:
    """The factor of an axis in a basis, and that; None: the axes are its basis."""
    if f"factor_{axis}" in state:
        return raised(state[f"factor_{axis}"]), None
    basis, d, residual = (raised(state[f"{name}_{axis}"]) for name in ("basis", "eigenvalues", "residual"))
    if state[f"basis_{axis}"].dtype == torch.bfloat16:  # its lengths are off, and would multiply the eigenvalues in every turn
        basis = basis @ add_diagonal(-0.5 * (basis.mT @ basis), 1.5)
    return residual + torch.diag_embed(d), basis


def _largest(d: Tensor) -> Tensor:
    """Of a diagonal; no zero, since something is to be divided by it."""
    return d.amax(-1).clamp(min=torch.finfo(d.dtype).tiny)


def _plausible(t: Tensor, d: Tensor) -> Tensor:
    """`t` with the diagonal `d`, and `|t_ij| ≤ √(d_i d_j)`, as in any positive semi-definite matrix: what rounding makes of a
    large gradient would grow without bounds."""
    bound = d.sqrt()
    bound = bound.unsqueeze(-1) * bound.unsqueeze(-2)
    t = t.clamp(-bound, bound)
    t.diagonal(dim1=-2, dim2=-1).copy_(d)
    return t


def tracked_root(t: Tensor, basis: Tensor, root: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The basis `B` of `B T Bᵀ` turned towards its eigenbasis, the diagonal of `T` and the rest of it there, and the root of
    `B T Bᵀ`: by products of matrices alone.

    The root of `Diag(d) + R` is that of `Diag(d)` and, to first order, `R` times the divided differences of the root (Daleckii
    and Krein, 1965). If `T` is positive semi-definite, so is this, and at least `1 − 1 / root` of the root `p` of `d`: the
    differences, times what makes `Diag(d)` the identity and over `√(p_i p_j)`, are `sinh(x/2) / sinh(root x/2)` of
    `x = log(p_i / p_j)`, a positive definite function that is `1 / root` at 0.
    """
    unit, info = block(_largest(t.diagonal(dim1=-2, dim2=-1))), torch.finfo(t.dtype)
    t = t / unit
    d = t.diagonal(dim1=-2, dim2=-1).clone()
    gap, width = d.unsqueeze(-1) - d.unsqueeze(-2), EPSILON * (d.unsqueeze(-1) + d.unsqueeze(-2))
    x = (-0.5 * t * gap / (gap.square() + width.square()).clamp(min=info.tiny)).tril(-1)
    turned, d, off = ops.cayley_track(basis, x - x.mT, d, residual=t - torch.diag_embed(d), order=4)
    assert off is not None
    d = d.clamp(min=info.eps**2)  # of a basis that is orthogonal to eps
    off, p = _plausible(off, d) - torch.diag_embed(d), d.pow(1 / root)
    # (p_i − p_j)/(d_i − d_j), without a division by a gap
    powers = sum(p.unsqueeze(-1) ** k * p.unsqueeze(-2) ** (root - 1 - k) for k in range(root))
    f = off / powers + torch.diag_embed(p)
    return turned, unit.squeeze(-1) * d, unit * off, unit.pow(1 / root) * (turned @ f @ turned.mT)
