"""What the methods with a factor for each axis share: options, momentum, scaling, weight decay. Each method's own file has what
it does with its factors."""

from typing import Any

import torch
from torch import Tensor

from spectral_ops.optim import _options as check
from spectral_ops.optim._engine import Batch
from spectral_ops.optim._factors import FACTOR_DTYPES, factor_dtype, first_seeds, multiplied
from spectral_ops.optim._pieces import Group, Piece
from spectral_ops.optim._preconditioned import PreconditionedOptimizer
from spectral_ops.reference import accumulation_dtype, block, frobenius, raised

LAYOUT_OPTIONS = ("update_scale", "max_preconditioner_dim", "preconditioner_dtype")


class KroneckerOptimizer(PreconditionedOptimizer):
    """A subclass says what it keeps for an axis, learns from a gradient, and preconditions."""

    def check_options(self, group: Group) -> None:
        super().check_options(group)
        check.choice(group, "preconditioner_dtype", (None, *FACTOR_DTYPES))
        check.batch_size(group)
        if "per_axis" in group:
            check.per_axis(group)

    def layout(self, group: Group) -> tuple[Any, ...]:
        return tuple(group[name] for name in LAYOUT_OPTIONS)

    # What a method provides -------------------------------------------------------------------------------------------

    def init_axis(self, group: Group, start: Tensor) -> dict[str, Tensor]:
        """State of an axis, by name; `start` is the identity, as a vector where the axis is diagonal."""
        raise NotImplementedError

    def learn(self, group: Group, batch: Batch, usable: Tensor, weight: Tensor) -> None:
        """Advance the factors of the `usable` matrices, `(b,)`, by their gradients, whose products count `weight` times."""
        raise NotImplementedError

    # What they share --------------------------------------------------------------------------------------------------

    def init_state(self, group: Group, piece: Piece) -> dict[str, Tensor]:
        p, lead = piece.parameter, piece.lead
        number: dict[str, Any] = {"dtype": accumulation_dtype(p.dtype), "device": p.device}
        state = {
            "momentum_buffer": torch.zeros(*lead, piece.n, piece.m, dtype=p.dtype, device=p.device),
            "updates": torch.zeros(lead, **number),
            "scale": torch.ones(lead, **number),
        }
        dtype = factor_dtype(group, p)
        for axis, size in enumerate(piece.dims):
            start = torch.ones(size, dtype=dtype, device=p.device)
            if size <= group["max_preconditioner_dim"]:
                start = start.diag()
            for name, x in self.init_axis(group, start.expand(*lead, *start.shape)).items():
                state[f"{name}_{axis}"] = x.clone(memory_format=torch.contiguous_format)
        if dtype == torch.bfloat16:
            state["seed"] = first_seeds(group, piece)
        return state

    def advance(self, group: Group, batch: Batch, usable: Tensor) -> None:
        due, rows = batch.part(), batch.due or slice(None)
        usable, s, size = usable[rows], due.state, group["batch_size"]
        if not len(due.grad):
            return
        if isinstance(size, Tensor):
            size = size.to(s["scale"].dtype).reshape(())
        if group["update_scale"] is not None:  # in units of the first gradient's, so that the identity is no strange start
            first = usable & (s["updates"] == 0)
            s["scale"].copy_(torch.where(first, batch.mean_square[rows] * size, s["scale"]))
        s["updates"] += usable
        due.grad = torch.where(block(usable), raised(due.grad), 0)
        self.learn(group, due, usable, size / s["scale"])


def axes(batch: Batch, name: str) -> list[Tensor]:
    """The state of that name of each axis."""
    return [batch.state[f"{name}_{axis}"] for axis in range(len(batch.dims))]


def shaped(batch: Batch, x: Tensor) -> Tensor:
    """`(b, n, m)` as `(b, *dims)`."""
    return x.view(len(x), *batch.dims)


def multiply(batch: Batch, name: str, x: Tensor, power: float) -> tuple[Tensor, Tensor]:
    """`x` times the state of that name along each axis and a power of the scale, and its sums of squares."""
    u = multiplied(shaped(batch, x), axes(batch, name)).reshape(x.shape) * block(batch.state["scale"].pow(power))
    return u, frobenius(u).square().unsqueeze(-1)
