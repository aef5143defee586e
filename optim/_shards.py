"""Which part of a tensor each rank has, by the placements of a DTensor."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

Box = tuple[tuple[int, int], ...]  # first and last + 1 of each dimension


@dataclass(frozen=True)
class Shards:
    """The box that each rank of a group has. Ranks of equal `replicas` have all of the tensor together, each element once."""

    boxes: tuple[Box, ...]
    replicas: tuple[tuple[int, ...], ...]


class Ranks:
    """The ranks of a mesh, in the order of its process group, and their coordinates."""

    def __init__(self, mesh: DeviceMesh):
        places = {int(mesh.mesh[at]): at for at in _coordinates(tuple(mesh.mesh.shape))}
        self.mesh, self.globals = mesh, sorted(places)
        self.coordinates = [places[number] for number in self.globals]
        self.known: dict[Any, Shards] = {}

    @cached_property
    def even(self) -> list[Any]:
        """Placements that leave each rank as much as another."""
        return [Shard(0)] * self.mesh.ndim

    def shards(self, shape: Sequence[int], placements: Sequence[Any]) -> Shards:
        """Of a tensor of `shape`; without placements every rank has all of it."""
        key = tuple(shape), tuple(placements)
        if key not in self.known:
            whole = [i for i in range(self.mesh.ndim) if i >= len(placements) or placements[i].is_replicate()]
            self.known[key] = Shards(
                tuple(_box(*key, self.mesh.mesh.shape, at) for at in self.coordinates),
                tuple(tuple(at[i] for i in whole) for at in self.coordinates),
            )
        return self.known[key]


def _coordinates(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [tuple(at) for at in torch.cartesian_prod(*map(torch.arange, shape)).view(-1, len(shape)).tolist()]


def _box(shape: tuple[int, ...], placements: tuple[Any, ...], mesh: Sequence[int], at: tuple[int, ...]) -> Box:
    box = [(0, size) for size in shape]
    # A strided shard is one of what the mesh's later dimensions have left: of FSDP, over tensor parallelism.
    order = sorted(range(len(placements)), key=lambda i: hasattr(placements[i], "split_factor"))
    for i in order:
        placement = placements[i]
        if hasattr(placement, "dim"):
            first, last = box[placement.dim]
            chunk = -(-(last - first) // mesh[i])  # as torch.chunk cuts
            start = min(first + at[i] * chunk, last)
            box[placement.dim] = (start, min(start + chunk, last))
    return tuple(box)


def overlap(a: Box, b: Box) -> Box:
    return tuple((max(start, first), min(stop, last)) for (start, stop), (first, last) in zip(a, b, strict=True))


def lengths(box: Box) -> tuple[int, ...]:
    return tuple(max(stop - start, 0) for start, stop in box)


def within(part: Box, box: Box) -> tuple[slice, ...]:
    """A part of a box, as indices of a tensor that has the box."""
    return tuple(slice(start - first, stop - first) for (start, stop), (first, _) in zip(part, box, strict=True))


def size(box: Box) -> int:
    return math.prod(lengths(box))
