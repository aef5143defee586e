"""SINGD, and INGD and IKFAC as settings of it: natural gradients by Kronecker factors that need no inverse, with structure.

Lin et al., 2024, "Structured Inverse-Free Natural Gradient Descent: Memory-Efficient & Numerically-Stable KFAC", Fig. 3 and 4.
`S⁻¹ = (C Cᵀ) ⊗ (K Kᵀ)`; `K` is the side of a layer's inputs, `C` that of its outputs. In the box of SINGD (Fig. 4, right)
`Tr(H_C)` stands where `Tr(H_K)` is meant in the line of `m_C`, and `m_C` where `m_K` is in the line of `K`.
"""

from typing import Any

import torch
from torch import Tensor, nn

import spectral_ops as ops
from spectral_ops.optim import _options as check
from spectral_ops.optim._engine import Batch
from spectral_ops.optim._factors import seeds, store
from spectral_ops.optim._layerwise import SIDES, LayerOptimizer
from spectral_ops.optim._pieces import Group
from spectral_ops.reference import column, frobenius, keep, matched, raised
from spectral_ops.structures import Dense, Diagonal, Structure, Symmetric

LARGEST = 1e15  # of a curvature: squares of larger ones overflow
# Of β₁ m, in the spectral norm: from 2 on `I − β₁ m` makes a factor larger where the curvature says smaller, and it explodes.
# Not 1: a factor that becomes singular remains so.
LIMIT = 1.5


class SINGD(LayerOptimizer):
    def __init__(
        self,
        model: nn.Module,
        params: Any = None,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        preconditioner_lr: Any = 1e-2,
        riemannian_momentum: float = 0.5,
        damping: float = 1e-3,
        weight_decay: float = 0.0,
        update_interval: int = 10,
        loss_average: str | None = "batch",
        structures: tuple[str, str] = ("dense", "dense"),
        kfac_approx: str = "expand",
        kfac_like: bool = False,
        normalize_preconditioner_lr: bool = False,
        *,
        adamw_lr: float | Tensor = 1e-3,
        update_scale: str | None = None,
        decoupled_weight_decay: bool | None = None,
        max_preconditioner_dim: int = 8192,
        preconditioner_dtype: Any = None,
        grad_scaler: Any = None,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        seed: int = 0,
        maximize: bool = False,
        capturable: bool = False,
        **unknown: Any,
    ):
        super().__init__(model, params, adamw_lr, grad_scaler, locals())

    def check_options(self, group: Group) -> None:
        super().check_options(group)
        check.decay(group, "riemannian_momentum")
        if not callable(group["preconditioner_lr"]):
            check.number(group, "preconditioner_lr", positive=True)
        for name in ("kfac_like", "normalize_preconditioner_lr"):
            check.choice(group, name, (True, False))

    def layout(self, group: Group) -> tuple[Any, ...]:
        return (*super().layout(group), _decay(group) != 0)

    def init_side(self, group: Group, side: Structure, name: str, **kind: Any) -> dict[str, Tensor]:
        state = {f"factor_{name}": side.identity(**kind)}
        if _decay(group):
            state[f"momentum_{name}"] = torch.zeros_like(state[f"factor_{name}"])
        return state

    def curvature(self, side: Structure, factor: Tensor, plain: Tensor) -> Tensor:
        assert isinstance(side, Symmetric)  # of others it is never summed so
        return raised(side.congruence(factor, plain.to(factor.dtype)))

    def learn(self, group: Group, s: dict[str, Tensor], sides: list[Structure], h: list[Tensor], usable: Tensor) -> None:
        """m_K ← α₁ m_K + 1/(2 d_o) Π̂(Tr(H_C) H_K + λ Tr(CᵀC) KᵀK − d_o I),   K ← K (I − β₁ m_K);   and the mirror image"""
        decay, normalize = _decay(group), group["normalize_preconditioner_lr"]
        gain = (1 - decay) / 2 if normalize else 0.5
        factors = [s[f"factor_{name}"] for name in SIDES]
        grams = [raised(side.gram(factor)) for side, factor in zip(sides, factors, strict=True)]
        momenta, norms = [], []
        for i, (side, name) in enumerate(zip(sides, SIDES, strict=True)):
            share = damping = torch.full_like(usable, gain, dtype=h[i].dtype)
            if not group["kfac_like"]:
                other = sides[1 - i]
                share, damping = (gain * other.trace(x[1 - i]) / other.n for x in (h, grams))
            m = column(share) * h[i] + column(group["damping"] * damping) * grams[i]
            side.add_identity(m, -gain)
            if decay:
                m += decay * raised(s[f"momentum_{name}"])
            momenta.append(m)
            norms.append(side.norm(m))
            usable = usable & (norms[i] < LARGEST)
        for i, (side, name, m) in enumerate(zip(sides, SIDES, momenta, strict=True)):
            mean = side.trace(m) / side.n
            bound = mean.abs() + (norms[i].square() - side.n * mean.square()).clamp(min=0).sqrt()  # of the spectral norm
            step = torch.full_like(bound, group["preconditioner_lr"])
            if normalize:
                step = step / m.abs().amax(-1).clamp(min=1)
            step = step / (step * bound / LIMIT).clamp(min=1)
            if decay:
                keep(usable, s[f"momentum_{name}"], m)
            _turn(side, factors[i], m, norms[i], step, usable, seeds(s, i))

    def precondition(self, group: Group, batch: Batch, x: Tensor) -> tuple[Tensor, Tensor]:
        """`C Cᵀ x K Kᵀ`"""
        s, (k, c) = batch.state, self._sides(group, batch.dims)
        f_k, f_c = s["factor_k"], s["factor_c"]
        if all(isinstance(side, Dense | Diagonal) for side in (k, c)):
            # As `apply_root` has it: factors for bases, eigenvalues of one; of a diagonal factor, the inverses of its squares.
            alpha = torch.ones_like(s["updates"])
            (b_c, d_c), (b_k, d_k) = _eigen(c, f_c, alpha.dtype), _eigen(k, f_k, alpha.dtype)
            return ops.apply_root(x, b_c, d_c, b_k, d_k, alpha, 1.0, return_squares=True)
        u = _squared(k, f_k, _squared(c, f_c, raised(x)).mT).mT
        return u, frobenius(u).square().unsqueeze(-1)


def _decay(group: Group) -> float:
    decay: float = group["riemannian_momentum"]
    return 0.0 if group["kfac_like"] else decay


def _turn(side: Structure, factor: Tensor, m: Tensor, norm: Tensor, step: Tensor, usable: Tensor, seed: Tensor | None) -> None:
    """`K ← K (I − step · m)`, in place."""
    if isinstance(side, Dense):  # the op divides by a larger norm than 1, so it gets one of 1
        square, unit = (side.n, side.n), norm.clamp(min=torch.finfo(norm.dtype).tiny)
        k, m = factor.unflatten(-1, square), (m / column(unit)).unflatten(-1, square)
        rounding = "nearest" if seed is None else "stochastic"
        keep(
            usable,
            factor,
            ops.factor_update(k, m, step * unit, rounding=rounding, seed=0 if seed is None else seed).flatten(-2),
        )
    else:
        k = raised(factor)
        assert seed is None or isinstance(seed, Tensor)
        store(usable, factor, k - side.product(k, column(step) * m), seed)


def _eigen(side: Structure, factor: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
    if isinstance(side, Diagonal):
        return None, raised(factor).to(dtype) ** -2
    return factor.unflatten(-1, (side.n, side.n)), torch.ones(len(factor), side.n, dtype=dtype, device=factor.device)


def _squared(side: Structure, factor: Tensor, x: Tensor) -> Tensor:
    """`K Kᵀ x`"""
    factor, x = matched(raised(factor), x)
    return side.apply(factor, side.apply(factor, x, transpose=True))


class INGD(SINGD):
    def __init__(self, model: nn.Module, params: Any = None, lr: float | Tensor = 1e-3, **options: Any):
        super().__init__(model, params, lr, structures=("dense", "dense"), **options)


class IKFAC(SINGD):
    def __init__(self, model: nn.Module, params: Any = None, lr: float | Tensor = 1e-3, **options: Any):
        super().__init__(model, params, lr, kfac_like=True, riemannian_momentum=0.0, **options)
