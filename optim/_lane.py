"""Matrices whose gradients and updates travel in one dtype: to their owners, through the optimizer, and back."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import spectral_ops as ops
from spectral_ops.optim._engine import Batch, moves
from spectral_ops.optim._exchange import Exchange, Item
from spectral_ops.optim._pieces import Group, Piece, local
from spectral_ops.optim._schedule import Schedule
from spectral_ops.optim._shards import Box, lengths
from spectral_ops.reference import block, raised

if TYPE_CHECKING:
    from spectral_ops.optim._sharing import Sharing

Work = Sequence[tuple[Group, Schedule | None]]  # of each group: its options in this step, and whose turn it is


@dataclass(frozen=True)
class Unit:
    """A matrix: the `number`-th of a piece of a member of what is shared."""

    member: int
    group: int
    piece: Piece
    number: int
    owner: int
    box: Box  # in its parameter


@dataclass(frozen=True)
class Owns:
    """Matrices of one shape of a group that this rank owns, row by row, and which units of the lane they are."""

    group: int
    pieces: list[Piece]
    units: list[int]


class Lane:
    def __init__(self, sharing: "Sharing", dtype: torch.dtype):
        self.sharing, self.dtype = sharing, dtype
        self.units = [unit for unit in sharing.units if sharing.transport(unit) == dtype]
        items = [Item(unit.owner, unit.box, sharing.members[unit.member].shards) for unit in self.units]
        self.exchange = Exchange(items, sharing.rank, sharing.group)
        self.batches = list(self._batches().values())

    def _batches(self) -> dict[Any, Owns]:
        batches: dict[Any, Owns] = {}
        numbers = {(id(unit.piece), unit.number): k for k, unit in enumerate(self.units)}
        for j, pieces in self.sharing.pieces.items():
            group = self.sharing.members[j].number
            for piece, own in pieces:
                mine = [numbers[id(piece), number] for number in own.own if (id(piece), number) in numbers]
                if mine:
                    key = group, own.dims, own.m, own.parameter.dtype
                    batch = batches.setdefault(key, Owns(group, [], []))
                    batch.pieces.append(own)
                    batch.units.extend(mine)
        return batches

    def send(self) -> None:
        """Send gradients to the owners, and the parameters where a method wants them."""
        shared, optimizer = self.sharing, self.sharing.optimizer
        shards = {k: shared.grads[unit.member] for k, unit in enumerate(self.units)}
        self.message = self.exchange.to_owners(shards, self.dtype, shared.device)
        self.parameters = None
        if any(optimizer.reads_parameters(optimizer.param_groups[group]) for group in {unit.group for unit in self.units}):
            held = {k: local(shared.members[unit.member].p) for k, unit in enumerate(self.units)}
            self.parameters = self.exchange.to_owners(held, self.dtype, shared.device)

    def compute(self, work: Work) -> None:
        """Advance the state of what this rank owns, and send its updates."""
        grads = [self._stack(batch, batch.pieces[0].parameter.dtype) for batch in self.batches]
        self.message.unpack(self._matrices(grads))
        thetas: list[Tensor] = []
        if self.parameters is not None:
            thetas = [torch.empty_like(g) for g in grads]
            self.parameters.unpack(self._matrices(thetas))
            self.parameters = None
        updates = [self._step(batch, grads[k], thetas[k : k + 1], *work[batch.group]) for k, batch in enumerate(self.batches)]
        self.message = self.exchange.to_holders(self._matrices(updates), self.dtype, self.sharing.device)

    def _stack(self, batch: Owns, dtype: torch.dtype) -> Tensor:
        piece = batch.pieces[0]
        return torch.empty(len(batch.units), piece.n, piece.m, dtype=dtype, device=self.sharing.device)

    def _matrices(self, stacks: list[Tensor]) -> dict[int, Tensor]:
        """Each unit's, with the dimensions that it has in its parameter."""
        return {
            k: x.view(lengths(self.units[k].box))
            for batch, stack in zip(self.batches, stacks, strict=True)
            for k, x in zip(batch.units, stack, strict=True)
        }

    def _step(self, batch: Owns, g: Tensor, theta: list[Tensor], group: Group, schedule: Schedule | None) -> Tensor:
        """The update of a batch, before the learning rate; NaN for matrices that stay as they are."""
        shared, optimizer = self.sharing, self.sharing.optimizer
        at = shared.index(tuple(self.units[k].member for k in batch.units))
        g += block(shared.flags[at]).to(g.dtype)
        key = (shared.mesh, batch.group, optimizer.layout(group), batch.pieces[0].dims, g.dtype, self.dtype)
        state = optimizer._stack(group, key, batch.pieces)
        due = schedule.rows(batch.pieces, group["step"]) if schedule else None
        whole = Batch(g, state, due, batch.pieces[0].dims, [theta], batch.pieces)
        u, squares, normalize = optimizer.update(group, whole)
        update = self._stack(batch, self.dtype).zero_()
        # With a rate of -1 and nothing to add it to, but where the true one is 0 and a step of nothing does not count.
        ops.parameter_update(
            [update], u, squares, whole.finite, state["step"], state["skipped"], -1.0 * moves(group), normalize=normalize
        )
        state["skipped"] -= (~shared.present[at]).long()  # a gradient that nobody has is not one that is not finite
        return update.masked_fill_(block(~whole.finite), math.nan)

    def apply(self, work: Work) -> None:
        """p ← p − lr · (u + weight_decay · p)"""
        shared = self.sharing
        parts = [(self.units[part.item], part.indices, x) for part, x in self.message.wait()]
        params = [local(shared.members[unit.member].p)[indices] for unit, indices, _ in parts]
        change = raised(self.message.buffer)
        changes = [x.view(p.shape) for x, p in zip(change.split([p.numel() for p in params]), params, strict=True)]
        for number, (group, _) in enumerate(work):
            mine = [i for i, (unit, _, _) in enumerate(parts) if unit.group == number]
            if not mine:
                continue
            if decay := shared.optimizer.decoupled_decay(group):
                torch._foreach_add_([changes[i] for i in mine], [params[i] for i in mine], alpha=decay)
            lr = group["lr"]
            rate = -lr.to(change.device, change.dtype).reshape(()) if isinstance(lr, Tensor) else -lr
            torch._foreach_mul_([changes[i] for i in mine], rate)
        torch.nan_to_num_(change, nan=0.0, posinf=math.inf, neginf=-math.inf)
        if params:
            torch._foreach_add_(params, changes)
        del self.message  # its memory is wanted elsewhere until the next step
