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
            raise TypeError(f"{type(self).__name__} takes `batch_size` as a number or a function of such, got a tensor")

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
    r"""RMSprop without the square root; all parameters in two launches.

        s ← (1 − β₂) s + β₂ b g²,   s starts at 1
        m ← α₁ m + g / (s + λ) + κ θ,   θ ← θ − lr · m

    All parameters are taken, whatever their dimensions, but for groups with `algorithm="adamw"`. The update is not scaled:
    `lr` is that of a second-order method, and `b` decides how soon `s` forgets that it started at 1.

    Args:
        params: parameters, named parameters, or groups.
        lr: learning rate, a float or a tensor of one element.
        alpha: `1 − β₂`, as in `torch.optim.RMSprop`.
        eps: `λ`.
        weight_decay: `κ`.
        momentum: `α₁`.
        batch_size: `b`, over which the loss is a mean: a number, or a function without arguments that returns one and is
            called in every step. It is not part of a checkpoint then.
        decoupled_weight_decay: `θ ← θ − lr (m + κ θ)`, and no `κ θ` in `m`.
        adamw_betas: of AdamW inside.
        adamw_eps: of AdamW inside.
        maximize: ascend.
        capturable: the step may be captured in a CUDA graph, once one was made without. A tensor `lr` must be on the device.
        unknown: options of other optimizers, as long as they are false.

    A parameter whose gradient has a NaN or an infinity, or whose square overflows, is left untouched with its state;
    `skipped_steps()` counts that.

    Raises:
        ValueError, TypeError: options out of range, empty or complex parameters, in a sentence that names them.
        RuntimeError: sparse gradients.

    Lin et al., 2024, "Can We Remove the Square-Root in Adaptive Gradient Methods? A Second-Order Perspective", Fig. 4, Fig. 6.
    """

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
    r"""Diagonal AdaGrad without the square root: `RFRMSprop` with a sum, `s ← s + β₂ b g²`, in place of an average.

    Args:
        params: parameters, named parameters, or groups.
        lr: learning rate, a float or a tensor of one element.
        weight_decay: `κ`.
        eps: `λ`.
        momentum: `α₁`.
        preconditioner_lr: `β₂`, in (0, 1).
        batch_size: `b`, as of `RFRMSprop`.
        decoupled_weight_decay: `θ ← θ − lr (m + κ θ)`, and no `κ θ` in `m`.
        adamw_betas: of AdamW inside.
        adamw_eps: of AdamW inside.
        maximize: ascend.
        capturable: as of `RFRMSprop`.
        unknown: options of other optimizers, as long as they are false.

    Raises:
        ValueError, TypeError, RuntimeError: as `RFRMSprop`.

    Lin et al., 2024, "Can We Remove the Square-Root in Adaptive Gradient Methods? A Second-Order Perspective",
    Sec. 4.1, Fig. 6.
    """

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
