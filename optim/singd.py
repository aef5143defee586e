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
from spectral_ops.workspace import Workspace, serves

LARGEST = 1e15  # of a curvature: squares of larger ones overflow
# Of β₁ m, in the spectral norm: from 2 on `I − β₁ m` makes a factor larger where the curvature says smaller, and it explodes.
# Not 1: a factor that becomes singular remains so.
LIMIT = 1.5


workspace = Workspace()


class SINGD(LayerOptimizer):
    r"""Structured inverse-free natural gradient descent: curvature per layer, learned and applied by matrix products alone.

    For a layer with inputs `a` and output gradients `g`, KFAC's factors are `U = mean a aᵀ` and `G = sum g gᵀ`, times the terms
    that the loss is a mean over. With `S⁻¹ = (C Cᵀ) ⊗ (K Kᵀ)`, `H_K = KᵀUK`, `H_C = CᵀGC`, all from the old factors:

        m_K ← α₁ m_K + 1/(2 d_o) Π̂(Tr(H_C) H_K + λ Tr(CᵀC) KᵀK − d_o I),   K ← K (I − β₁ m_K)
        m_C ← α₁ m_C + 1/(2 d_i) Π̂(Tr(H_K) H_C + λ Tr(KᵀK) CᵀC − d_i I),   C ← C (I − β₁ m_C)
        m ← α₂ m + C Cᵀ Ĝ K Kᵀ + γ θ,   θ ← θ − lr · m                       Ĝ: gradient of weight and bias, joined

    `Π̂` projects on a structure that is closed under products, in which factors and momenta are stored without their zeros and
    multiplied (`spectral_ops.structures`). `kfac_like=True` is IKFAC: traces over dimensions are 1, and `α₁ = 0`. With
    `update_interval=1` every step is that of the package `singd` under other names: `T` is `update_interval`, `lr_cov`
    `preconditioner_lr`, `alpha1` `riemannian_momentum`, `normalize_lr_cov` `normalize_preconditioner_lr`.

    `update_scale="rms"` is what trains best: the gradient is averaged before it is preconditioned, and

        M ← α₂ M + (1 − α₂) Ĝ,   N = α₂ M + (1 − α₂) Ĝ (Nesterov)
        θ ← (1 − lr · γ) θ − lr · scaled(C Cᵀ N K Kᵀ)

    Linear, Conv1d, Conv2d and Conv3d layers are preconditioned, each with its bias; everything else takes AdamW with `adamw_lr`
    in the same optimizer: embeddings, norms, weights that are tied to an embedding, and what is not called as a module
    (`nn.MultiheadAttention`). `print(optimizer.routing)` shows which is which. Layers of one shape are computed as one batch.

    Hooks see what passes the layers in the forward and backward passes before a step, where gradients are recorded: several
    passes (U is their mean, G counts the terms of all, so that micro-batches with a loss divided by their number equal one
    batch), activation checkpointing, autocast, layers that are called several times. Copies and pickles of the model do not
    feed the optimizer. Models in DistributedDataParallel average curvature over ranks, as they do gradients. Layers that
    torch.compile has compiled are not seen.

    Args:
        model: whose layers are watched.
        params: parameters, named parameters or groups, all of `model`; None: all that require a gradient. A list, and a group
            that names no `algorithm`, is split in two: what layers have, and the rest, with `adamw_lr`.
        lr: learning rate (`β₂`), a float or a tensor of one element. With `update_scale="rms"` it means what AdamW's does.
        momentum: `α₂`.
        preconditioner_lr: `β₁`, a number, or a function without arguments that is called in every step. A step on a factor is
            shortened where `‖β₁ m‖` could be over 1.5: from 2 on the factor would grow where it must shrink.
        riemannian_momentum: `α₁`.
        damping: `λ`.
        weight_decay: `γ`.
        update_interval: every layer updates its factors once in so many steps, in each step another share of the layers, so
            that all steps cost the same; in the first ten steps all do. (`singd`: all layers in steps 0, T, 2T.)
        loss_average: what the loss is a mean over: "batch", "batch+sequence" (all positions), or None for a sum.
        structures: of `K` and of `C`: "dense", "diagonal", "blockdiagonal{k}", "tril", "triu", "rank{k}tril", "rank{k}triu",
            each also with "_bottomright", "hierarchical{k1}_{k2}", "triltoeplitz" or "triutoeplitz".
        kfac_approx: "expand": every position is a row of its own; "reduce": inputs are averaged and gradients summed over
            the positions of a sample first.
        kfac_like: IKFAC.
        normalize_preconditioner_lr: `β₁ / max(1, max |m|)` in place of `β₁`, and the new part of `m` times `1 − α₁`.
        adamw_lr: learning rate of AdamW, for parameters that are split off.
        update_scale: "rms": every update has root mean square 0.2 before `lr`; "clip": at most 1; None: the paper's box.
        decoupled_weight_decay: True: `γ θ` is added to the update, as in AdamW. False: to what the momentum sums. None:
            False with `update_scale=None`, else True.
        max_preconditioner_dim: larger sides have diagonal factors.
        preconditioner_dtype: of factors and their momenta, one or a pair for `K` and `C`; None: the parameter's (float32 for
            float16). bfloat16 factors are rounded stochastically.
        grad_scaler: the torch.amp.GradScaler, where gradients are unscaled before its `step`, as for clipping. Without it the
            scale is known from `GradScaler.step`.
        adamw_betas: of AdamW inside.
        adamw_eps: of AdamW inside.
        seed: of the stochastic rounding.
        maximize: ascend.
        capturable: the step may be captured in a CUDA graph together with the backward pass, once one was made without.
        unknown: options of other optimizers, as long as they are false.

    A layer whose gradient has a NaN or an infinity, or whose square overflows, is left untouched with its state;
    `skipped_steps()` counts that. Where its curvature is not finite, was not seen, or is over 1e15, and where its gradient is
    zero, its factors stay as they are.

    Raises:
        ValueError, TypeError: options out of range, in a sentence that names them; a model in `nn.DataParallel`.
        RuntimeError: gradients that were unscaled without `grad_scaler`; sparse gradients.

    Lin et al., 2024, "Structured Inverse-Free Natural Gradient Descent: Memory-Efficient & Numerically-Stable KFAC", Fig. 3 and
    4; Eschenhagen et al., 2023, for `kfac_approx`.
    """

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
        if (isinstance(k, Dense) and isinstance(c, Dense | Diagonal)) or (isinstance(c, Dense) and isinstance(k, Diagonal)):
            # As `apply_root` has it: factors for bases, eigenvalues of one; of a diagonal factor, the inverses of its squares.
            alpha = torch.ones_like(s["updates"])
            (b_c, d_c), (b_k, d_k) = _eigen(c, f_c, alpha.dtype), _eigen(k, f_k, alpha.dtype)
            return ops.apply_root(x, b_c, d_c, b_k, d_k, alpha, 1.0, return_squares=True)
        x = raised(x)
        spare = workspace.tensors(1, tuple(x.shape), x.dtype)[0] if serves(x) else None
        for side, factor in ((c, f_c), (k, f_k)):
            factor, x = matched(raised(factor), x)
            if isinstance(side, Diagonal):
                x = x.mul_(column(factor.square())).mT
            else:
                y = side.outer(factor, x, spare)
                spare, x = x if spare is not None else None, y.mT
        return x, x.new_empty(0) if group["update_scale"] is None else frobenius(x).square().unsqueeze(-1)


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


class INGD(SINGD):
    """SINGD with dense factors, whose arguments it takes: Lin et al., 2023, "Simplifying Momentum-based Positive-definite
    Submanifold Optimization with Applications to Deep Learning"; Fig. 4, left, of the paper of SINGD.

    Args:
        model: whose layers are watched.
        params: as of `SINGD`; None: all that require a gradient.
        lr: learning rate, a float or a tensor of one element.
        options: the others of `SINGD`, but for `structures`.

    Raises:
        ValueError, TypeError, RuntimeError: as `SINGD`.
    """

    def __init__(self, model: nn.Module, params: Any = None, lr: float | Tensor = 1e-3, **options: Any):
        super().__init__(model, params, lr, structures=("dense", "dense"), **options)


class IKFAC(SINGD):
    """Inverse-free KFAC, `K ← K (I − β₁/2 (KᵀUK + λ KᵀK − I))`, which follows KFAC up to first order in `β₁` (Theorem 1): SINGD
    with `kfac_like=True`, whose arguments it takes. Fig. 3, right, of Lin et al., 2024.

    Args:
        model: whose layers are watched.
        params: as of `SINGD`; None: all that require a gradient.
        lr: learning rate, a float or a tensor of one element.
        options: the others of `SINGD`, but for `kfac_like` and `riemannian_momentum`.

    Raises:
        ValueError, TypeError, RuntimeError: as `SINGD`.
    """

    def __init__(self, model: nn.Module, params: Any = None, lr: float | Tensor = 1e-3, **options: Any):
        super().__init__(model, params, lr, kfac_like=True, riemannian_momentum=0.0, **options)
