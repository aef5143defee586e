"""RF-RMSProp and RF-AdaGrad: diagonal methods without the square root.

Lin et al., 2024, "Can We Remove the Square-Root in Adaptive Gradient Methods? A Second-Order Perspective", Fig. 4 and 6.
"""

from typing import Any

from torch import Tensor

from spectral_ops.optim import _options as check
from spectral_ops.optim._engine import MatrixOptimizer, Rule
from spectral_ops.optim._pieces import Group


class RootFree(MatrixOptimizer):
    """`s ← (1 − β₂ γ) s + β₂ b g²`, `m ← α₁ m + g / (s + λ) + κ μ`, `μ ← μ − β₁ m`: all in `spectral_ops.diagonal_update`."""

    def check_options(self, group: Group) -> None:
        check.decay(group, "momentum")
        check.number(group, "eps")
        check.choice(group, "decoupled_weight_decay", (True, False))
        check.batch_size(group)
        if isinstance(group["batch_size"], Tensor):
            raise TypeError(f"{type(self).__name__} takes `batch_size` as a number or a function that returns one, got a tensor")

    def _is_matrix(self, group: Group, i: int) -> bool:
        return False

    def curvature(self, group: Group) -> tuple[float, float]:
        """`1 − β₂` and `γ`."""
        raise NotImplementedError

    def elementwise(self, group: Group) -> Rule:
        decay, gamma = self.curvature(group)
        options = {
            "rule": "rfw" if group["decoupled_weight_decay"] else "rf",
            "betas": (group["momentum"], decay),
            "gamma": gamma,
            "eps": group["eps"],
            "batch_size": group["batch_size"],
        }
        return Rule(tuple(options.items()), ("momentum_buffer", "square_avg"), 1.0)


class RFRMSprop(RootFree):
    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.9,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        *,
        batch_size: Any = 1,
        decoupled_weight_decay: bool = False,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        maximize: bool = False,
        capturable: bool = False,
        **unknown: Any,
    ):
        super().__init__(params, locals())

    def check_options(self, group: Group) -> None:
        super().check_options(group)
        check.decay(group, "alpha")

    def curvature(self, group: Group) -> tuple[float, float]:
        return group["alpha"], 1.0


class RFAdaGrad(RootFree):
    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        weight_decay: float = 0.0,
        eps: float = 1e-3,
        *,
        momentum: float = 0.9,
        preconditioner_lr: float = 0.1,
        batch_size: Any = 1,
        decoupled_weight_decay: bool = False,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        maximize: bool = False,
        capturable: bool = False,
        **unknown: Any,
    ):
        super().__init__(params, locals())

    def check_options(self, group: Group) -> None:
        super().check_options(group)
        check.step(group, "preconditioner_lr")

    def curvature(self, group: Group) -> tuple[float, float]:
        return 1 - group["preconditioner_lr"], 0.0
