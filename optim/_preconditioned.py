"""What the methods share that average `S⁻¹ G`, or precondition the average of `G`: order of the two, scaling, weight decay."""

import torch
from torch import Tensor

import spectral_ops as ops
from spectral_ops.optim import _options as check
from spectral_ops.optim._engine import Batch, MatrixOptimizer, moves
from spectral_ops.optim._pieces import Group
from spectral_ops.reference import NEGLIGIBLE, raised

UPDATE_SCALES = ("rms", "clip", None)


class PreconditionedOptimizer(MatrixOptimizer):
    """A subclass learns from a batch, and preconditions."""

    def check_options(self, group: Group) -> None:
        check.decay(group, "momentum")
        check.number(group, "damping")
        check.whole(group, "max_preconditioner_dim")
        check.choice(group, "update_scale", UPDATE_SCALES)
        check.choice(group, "decoupled_weight_decay", (None, True, False))

    # What a method provides -------------------------------------------------------------------------------------------

    def advance(self, group: Group, batch: Batch, usable: Tensor) -> None:
        """Advance the factors of the `usable` matrices, `(b,)`, that are due."""
        raise NotImplementedError

    def precondition(self, group: Group, batch: Batch, x: Tensor) -> tuple[Tensor, Tensor]:
        """`S⁻¹ x`, or what the method has for it, for `x` `(b, n, m)`, and its sums of squares `(b, parts)`."""
        raise NotImplementedError

    # What they share --------------------------------------------------------------------------------------------------

    def update(self, group: Group, batch: Batch) -> tuple[Tensor, Tensor, str]:
        s, scaled = batch.state, group["update_scale"] is not None
        usable = batch.check(NEGLIGIBLE)
        self.advance(group, batch, usable)
        x, maximize = batch.grad, group["maximize"]
        moved = batch.finite
        if not scaled:  # the paper's order: first the preconditioner, then the momentum
            x, _ = self.precondition(group, batch, raised(batch.grad))
        if group["weight_decay"] and not self._decoupled(group):
            x, maximize = _decayed(-x if maximize else x, batch.parameters, group["weight_decay"]), False
            moved = moved & (usable | moves(group))  # a step of nothing is none
        if not scaled:
            ops.momentum_sum(s["momentum_buffer"], x, moved, group["momentum"], maximize=maximize)
            return raised(s["momentum_buffer"]), batch.mean_square.unsqueeze(-1), "none"
        average = ops.momentum_update(
            s["momentum_buffer"], x, moved, group["momentum"], nesterov=True, maximize=maximize
        )  # fmt: skip
        return *self.precondition(group, batch, average), group["update_scale"]

    def decoupled_decay(self, group: Group) -> float:
        return group["weight_decay"] if self._decoupled(group) else 0.0

    def reads_parameters(self, group: Group) -> bool:
        return bool(group["weight_decay"]) and not self._decoupled(group)

    def _decoupled(self, group: Group) -> bool:
        chosen = group["decoupled_weight_decay"]
        return group["update_scale"] is not None if chosen is None else chosen


def _decayed(x: Tensor, parameters: list[list[Tensor]], weight_decay: float) -> Tensor:
    columns = [torch.cat(part).to(x.dtype) for part in parameters]
    return x.add(columns[0] if len(columns) == 1 else torch.cat(columns, -1), alpha=weight_decay)
