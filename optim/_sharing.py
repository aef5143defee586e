"""The work of the ranks of a mesh on parameters that they have together.

A parameter is a DTensor of the mesh, or one that every rank has. Each of its matrices has an owner. In a step

    1. gradients go to the owners, and all ranks learn which are missing, or not finite, on any;
    2. meanwhile what is no matrix is updated where it is;
    3. owners advance the state of their matrices, and make updates, in batches of equal shapes;
    4. updates go to those who hold the parameter.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from spectral_ops.optim import _owners
from spectral_ops.optim._lane import Lane, Unit, Work
from spectral_ops.optim._pieces import Owned, Piece, is_sharded, local, name_of, owned
from spectral_ops.optim._shards import Box, Ranks, Shards, lengths

if TYPE_CHECKING:
    from spectral_ops.optim._engine import MatrixOptimizer


@dataclass(frozen=True)
class Member:
    """A parameter, its place among the groups, and which part of it each rank has."""

    p: Tensor
    number: int  # of its group
    i: int
    is_matrix: bool
    shards: Shards


class Sharing:
    """What the ranks of a mesh share. They make it at the same time."""

    def __init__(
        self, optimizer: "MatrixOptimizer", mesh: DeviceMesh, places: Sequence[tuple[int, int]], before: "Sharing | None"
    ):
        """`places` are the parameters': group and place in it. Matrices that were shared `before` keep their owners."""
        self.optimizer, self.mesh, self.ranks = optimizer, mesh, Ranks(mesh)
        self.group = _process_group(mesh)
        self.rank = dist.get_rank(self.group)
        self.members = [self._member(number, i) for number, i in places]
        self.device = local(self.members[0].p).device
        self._agree()
        self.numbers = {id(m.p): j for j, m in enumerate(self.members)}
        self.pieces: dict[int, list[tuple[Piece, Owned]]] = {}  # by the number of their member
        known = before.owners if before else {}
        # By parameter, start of the piece, number in it.
        self.owners: dict[tuple[int, int, int], int] = {key: owner for key, owner in known.items() if key[0] in self.numbers}
        self.loads = [0] * len(self.ranks.globals)
        self.units: list[Unit] = [unit for number in sorted({m.number for m in self.members}) for unit in self._assign(number)]
        self.lanes = [Lane(self, dtype) for dtype in dict.fromkeys(map(self.transport, self.units))]
        self.skipped = torch.zeros(len(self.members), dtype=torch.int64, device=self.device)
        for j, m in enumerate(self.members):
            if before and id(m.p) in before.numbers:
                self.skipped[j] = before.skipped[before.numbers[id(m.p)]]
        self._indices: dict[tuple[int, ...], Tensor] = {}
        # Of replicas one counts; but all tell where a gradient is not finite.
        counts = [float(not any(m.shards.replicas[self.rank])) for m in self.members]
        wide = any(m.p.dtype == torch.float64 for m in self.members)
        self._counts = torch.tensor(counts, dtype=torch.float64 if wide else torch.float32, device=self.device)

    # Who has what -----------------------------------------------------------------------------------------------------

    def _member(self, number: int, i: int) -> Member:
        group = self.optimizer.param_groups[number]
        p = group["params"][i]
        placements = p.placements if is_sharded(p) else ()
        return Member(p, number, i, self.optimizer._is_matrix(group, i), self.ranks.shards(p.shape, placements))

    def _agree(self) -> None:
        """Raise, on every rank, where one has something else than the others."""
        mine = [self._described(m) for m in self.members]
        everyones: list[Any] = [None] * len(self.ranks.globals)
        dist.all_gather_object(everyones, mine, group=self.group)
        title, first = type(self.optimizer).__name__, self.ranks.globals[0]
        for rank, theirs in zip(self.ranks.globals, everyones, strict=True):
            for _, _, error in theirs:
                if error:
                    raise ValueError(f"{title}, rank {rank}: {error}")
            for (name, what, _), (_, expected, _) in zip(theirs, everyones[0], strict=False):
                if what != expected:
                    raise ValueError(f"{title}: {name} is {what} on rank {rank}, and on rank {first} {expected}")
            if len(theirs) != len(everyones[0]):
                raise ValueError(
                    f"{title}: ranks of a mesh must train the same parameters; rank {rank} trains {len(theirs)}, "
                    f"rank {first} {len(everyones[0])}"
                )

    def _described(self, m: Member) -> tuple[str, str, str]:
        """A parameter's name, what must be equal on all ranks, and what is wrong."""
        group = self.optimizer.param_groups[m.number]
        name, p, expected = name_of(group, m.i), local(m.p), lengths(m.shards.boxes[self.rank])
        placements = getattr(m.p, "placements", "on every rank")
        kind = "a matrix" if m.is_matrix else "elementwise"
        what = f"{tuple(m.p.shape)}, {m.p.dtype}, {placements}, {kind}, in group {m.number}"
        error = ""
        if p.shape != expected or any(x.is_partial() for x in getattr(m.p, "placements", ())):
            error = f"{name} has placements {placements}, which are not supported: a part is {tuple(p.shape)}, not {expected}"
        elif p.device != self.device:
            error = f"{name} is on {p.device}, and other parameters of the mesh are on {self.device}"
        elif group["capturable"]:
            error = f"{name} is shared by ranks, and `capturable=True` is for what one rank has"
        return name, what, error

    def _assign(self, number: int) -> list[Unit]:
        """The matrices of a group. Group after group, so that a later one moves nothing of an earlier."""
        group = self.optimizer.param_groups[number]
        limit = group.get("max_preconditioner_dim")
        cut = [
            (j, piece)
            for j, m in enumerate(self.members)
            if m.number == number and m.is_matrix
            for piece in self.optimizer._pieces(number, group, m.i)
        ]
        costs = {
            (id(self.members[j].p), piece.start, k): _owners.cost(piece.dims, limit)
            for j, piece in cut
            for k in range(piece.count)
        }
        for key in costs.keys() & self.owners.keys():
            self.loads[self.owners[key]] += costs[key]
        new = [key for key in costs if key not in self.owners]
        self.owners |= zip(new, _owners.assign([costs[key] for key in new], len(self.loads), self.loads), strict=True)
        for key in new:
            self.loads[self.owners[key]] += costs[key]
        units = []
        for j, piece in cut:
            owners = [self.owners[id(self.members[j].p), piece.start, k] for k in range(piece.count)]
            units += [Unit(j, number, piece, k, owner, matrix_box(piece, k)) for k, owner in enumerate(owners)]
            mine = tuple(k for k, owner in enumerate(owners) if owner == self.rank)
            self.pieces.setdefault(j, []).append((piece, owned(piece, mine)))
        return units

    def transport(self, unit: Unit) -> torch.dtype:
        """In which dtype a matrix's gradient and update travel."""
        chosen = self.optimizer.param_groups[unit.group]["transport_dtype"]
        return getattr(torch, chosen) if chosen else self.members[unit.member].p.dtype

    # A step -----------------------------------------------------------------------------------------------------------

    def send(self) -> None:
        """Send gradients to the owners, and tell what is missing or not finite."""
        self.grads = [self._gradient(m) for m in self.members]
        for lane in self.lanes:
            lane.send()
        held = [(j, g) for j, g in enumerate(self.grads) if g is not None]
        some = tuple(j for j, _ in held)
        self._report = self._counts.new_zeros(2, len(self.members))  # how many have a gradient, and the sum of its squares
        if some:
            norms = torch._foreach_norm([g for _, g in held], 2, self._counts.dtype)
            self._report[0, self.index(some)] = 1
            self._report[1, self.index(some)] = torch.stack(norms).square() * self._counts[self.index(some)]
        self._reporting = dist.all_reduce(self._report, group=self.group, async_op=True)

    def _gradient(self, m: Member) -> Tensor | None:
        g = m.p.grad
        if g is None or not is_sharded(m.p):
            return g
        if not is_sharded(g):
            raise TypeError(f"{name_of(self.optimizer.param_groups[m.number], m.i)} is a DTensor, and its gradient is not")
        return local(g.redistribute(m.p.device_mesh, m.p.placements))  # type: ignore[attr-defined]

    def listen(self) -> None:
        """Wait for what the others told."""
        self._reporting.wait()
        self.present, self.squares = self._report[0] > 0, self._report[1]
        self.finite = self.present & (self.squares < math.inf)
        self.flags = torch.where(self.finite, 0.0, math.nan)  # to add to gradients
        self.skipped += self.present & ~self.finite

    def skipped_matrices(self) -> Tensor:
        """How often matrices of members skipped a step, which every rank counts."""
        return self.skipped[self.index(tuple(j for j, m in enumerate(self.members) if m.is_matrix))].sum()

    def index(self, members: tuple[int, ...]) -> Tensor:
        """As a tensor, made once: making it waits for a GPU."""
        if members not in self._indices:
            self._indices[members] = torch.tensor(members, dtype=torch.int64, device=self.device)
        return self._indices[members]

    def flagged(self, params: Sequence[Tensor]) -> list[Tensor]:
        """This rank's parts of elementwise parameters' gradients; NaN where nobody has one, or one is not finite anywhere."""
        members = tuple(self.numbers[id(p)] for p in params)
        flags = self.flags[self.index(members)].unbind()
        grads = [self.grads[j] for j in members]
        return [
            (torch.zeros_like(local(p)) if g is None else g) + flag.to(p.dtype)
            for p, g, flag in zip(params, grads, flags, strict=True)
        ]

    def count(self, params: Sequence[Tensor], steps: list[Tensor], skipped: list[Tensor], moves: Tensor | bool) -> None:
        """Advance the counters of elementwise parameters, of which one rank's part may have seen less than all together."""
        at = self.index(tuple(self.numbers[id(p)] for p in params))
        moved = self.finite[at] & ((self.squares[at] > 0) | moves)
        torch._foreach_add_(steps, list(moved.to(steps[0].dtype).unbind()))
        torch._foreach_add_(skipped, list((self.present[at] & ~self.finite[at]).to(skipped[0].dtype).unbind()))

    def compute(self, work: Work) -> None:
        """Update the matrices that this rank owns."""
        for j, pieces in self.pieces.items():
            m = self.members[j]
            for _, own in pieces:  # all ranks have state of the same names, also who owns nothing
                if not own.own and "step" + own.suffix not in (held := self.optimizer.state[m.p]):
                    fresh = self.optimizer._fresh(self.optimizer.param_groups[m.number], own)
                    held.update({name + own.suffix: x for name, x in fresh.items()})
        for lane in self.lanes:
            lane.compute(work)

    def apply(self, work: Work) -> None:
        """Change the parameters by their owners' updates."""
        for lane in self.lanes:
            lane.apply(work)
        self.grads = []  # or they would live on after `zero_grad`


def matrix_box(piece: Piece, number: int) -> Box:
    """Which part of its parameter a matrix is."""
    shape = tuple(piece.parameter.shape)
    if not shape:
        return ()
    if piece.count <= piece.length:
        rows = piece.length // piece.count
        return ((piece.start + number * rows, piece.start + (number + 1) * rows), *((0, size) for size in shape[1:]))
    at = [int(x) for x in torch.unravel_index(torch.tensor(number), shape[:-2])]
    return (*((x, x + 1) for x in at), *((0, size) for size in shape[-2:]))


def _process_group(mesh: DeviceMesh) -> Any:
    """Of all ranks of a mesh."""
    if mesh.get_coordinate() is None:
        raise ValueError(f"rank {dist.get_rank()} has parameters of a mesh of ranks {mesh.mesh.tolist()}, and is not in it")
    if mesh.ndim == 1:
        return mesh.get_group()
    ranks = sorted(mesh.mesh.flatten().tolist())
    if len(ranks) == dist.get_world_size():
        return dist.group.WORLD
    return dist.new_group(ranks, use_local_synchronization=True)
