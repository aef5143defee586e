"""KFAC: natural gradients by Kronecker factors that are averaged, and inverted. What SINGD and IKFAC do without.

Martens & Grosse, 2015, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature"; Eschenhagen et al., 2023; as
in Fig. 3, left, of Lin et al., 2024, "Structured Inverse-Free Natural Gradient Descent".
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from spectral_ops.optim import _options as check
from spectral_ops.optim._engine import Batch
from spectral_ops.optim._factors import adopt
from spectral_ops.optim._layerwise import SIDES, LayerOptimizer
from spectral_ops.optim._pieces import Group
from spectral_ops.reference import frobenius, matched, raised
from spectral_ops.structures import Structure, Symmetric, structure


class KFAC(LayerOptimizer):
    """KFAC with averaged factors: what IKFAC and SINGD approximate without an inverse.

        S_K ← (1 − β₁) S_K + β₁ U,   S_C ← (1 − β₁) S_C + β₁ G,   both from I
        m ← α₂ m + (S_C + λ I)⁻¹ Ĝ (S_K + λ I)⁻¹ + γ θ,   θ ← θ − lr · m

    Inverses are made by Cholesky decomposition in float32 (float64), each time the factors change, and are kept. Where one does
    not exist, since rounding has made a factor indefinite, that layer keeps its old factors.

    Args:
        model: whose layers are watched.
        params: as of `SINGD`; None: all that require a gradient.
        lr: learning rate, a float or a tensor of one element. With `update_scale="rms"` it means what AdamW's does.
        momentum: `α₂`.
        preconditioner_lr: `β₁`, in (0, 1).
        damping: `λ`.
        weight_decay: `γ`.
        update_interval: as of `SINGD`.
        loss_average: as of `SINGD`.
        structures: of `S_K` and `S_C`: "dense", "diagonal" or "blockdiagonal{k}".
        kfac_approx: as of `SINGD`.
        adamw_lr: learning rate of AdamW, for parameters that are split off.
        update_scale: as of `SINGD`.
        decoupled_weight_decay: as of `SINGD`.
        max_preconditioner_dim: larger sides have diagonal factors.
        preconditioner_dtype: of factors and inverses. bfloat16 is rounded to nearest.
        grad_scaler: as of `SINGD`.
        adamw_betas: of AdamW inside.
        adamw_eps: of AdamW inside.
        seed: as of `SINGD`.
        maximize: ascend.
        capturable: as of `SINGD`.
        unknown: options of other optimizers, as long as they are false.

    Raises:
        ValueError, TypeError, RuntimeError: as `SINGD`.

    Martens & Grosse, 2015; Fig. 3, left, of Lin et al., 2024, "Structured Inverse-Free Natural Gradient Descent".
    """

    keeps_plain: ClassVar[bool | None] = True

    def __init__(
        self,
        model: nn.Module,
        params: Any = None,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        preconditioner_lr: Any = 1e-2,
        damping: float = 1e-3,
        weight_decay: float = 0.0,
        update_interval: int = 10,
        loss_average: str | None = "batch",
        structures: tuple[str, str] = ("dense", "dense"),
        kfac_approx: str = "expand",
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
        if not callable(group["preconditioner_lr"]):
            check.step(group, "preconditioner_lr")
        for name in group["structures"]:
            if not isinstance(structure(name, 1), Symmetric):
                raise ValueError(f"KFAC keeps symmetric factors: dense, diagonal or blockdiagonal{{k}}, got {name!r}")

    def init_side(self, group: Group, side: Structure, name: str, **kind: Any) -> dict[str, Tensor]:
        one = side.identity(**kind)
        return {f"factor_{name}": one, f"inverse_{name}": one / (1 + group["damping"])}

    def curvature(self, side: Structure, factor: Tensor, plain: Tensor) -> Tensor:
        return plain

    def learn(self, group: Group, s: dict[str, Tensor], sides: list[Structure], h: list[Tensor], usable: Tensor) -> None:
        """S_K ← (1 − β₁) S_K + β₁ U,   S_K⁻¹ ← (S_K + λ I)⁻¹;   and the mirror image"""
        new: dict[str, Tensor | None] = {}
        for i, (side, name) in enumerate(zip(sides, SIDES, strict=True)):
            assert isinstance(side, Symmetric)
            factor = torch.lerp(raised(s[f"factor_{name}"]), h[i], group["preconditioner_lr"])
            new[f"factor_{name}"] = factor = factor.to(s[f"factor_{name}"].dtype)
            new[f"inverse_{name}"] = side.inverse(side.add_identity(factor.clone(), group["damping"]))
        adopt(usable, s, new)

    def precondition(self, group: Group, batch: Batch, x: Tensor) -> tuple[Tensor, Tensor]:
        """`(S_C + λ I)⁻¹ x (S_K + λ I)⁻¹`"""
        k, c = self._sides(group, batch.dims)
        inverse_k, inverse_c = (raised(batch.state[f"inverse_{name}"]) for name in SIDES)
        inverse_c, x = matched(inverse_c, raised(x))
        inverse_k, x = matched(inverse_k, c.apply(inverse_c, x))
        u = k.apply(inverse_k, x.mT).mT
        return u, frobenius(u).square().unsqueeze(-1)
