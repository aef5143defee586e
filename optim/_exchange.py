"""Tensors between their owners and those who hold parts of them: one all-to-all each way."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from spectral_ops.optim._shards import Box, Shards, lengths, overlap, size, within


@dataclass(frozen=True)
class Item:
    """A tensor that one rank has whole, as a box of a larger one whose shards ranks hold."""

    owner: int
    box: Box
    shards: Shards


@dataclass(frozen=True)
class Part:
    """Of an item: indices of the tensor that this rank has, and the shape they give."""

    item: int
    indices: tuple[slice, ...]
    shape: tuple[int, ...]
    numel: int


class Exchange:
    """Where the parts of items go. All ranks have the same items in the same order, so all know what a message holds."""

    def __init__(self, items: Sequence[Item], rank: int, group: Any):
        self.group, ranks = group, dist.get_world_size(group)
        # Of each rank: the parts that this one holds for it as their owner, and owns of what it holds.
        self.held: list[list[Part]] = [[] for _ in range(ranks)]
        self.owned: list[list[Part]] = [[] for _ in range(ranks)]
        # The same without replicas: gradients are equal on all of them, and the owner's own is the nearest.
        self.near_held: list[list[Part]] = [[] for _ in range(ranks)]
        self.near_owned: list[list[Part]] = [[] for _ in range(ranks)]
        for number, item in enumerate(items):
            boxes, replicas = item.shards.boxes, item.shards.replicas
            for owner, holder in _pairs(item.owner, rank, ranks):
                part = overlap(item.box, boxes[holder])
                if not size(part):
                    continue
                if holder == rank:
                    mine = Part(number, within(part, boxes[rank]), lengths(part), size(part))
                    self.held[owner].append(mine)
                    if replicas[owner] == replicas[holder]:
                        self.near_held[owner].append(mine)
                if owner == rank:
                    mine = Part(number, within(part, item.box), lengths(part), size(part))
                    self.owned[holder].append(mine)
                    if replicas[owner] == replicas[holder]:
                        self.near_owned[holder].append(mine)

    def to_owners(self, shards: Mapping[int, Tensor | None], dtype: torch.dtype, device: torch.device) -> "Message":
        """Send the shards that this rank holds, of each item; None is zeros."""
        return Message(self.near_held, self.near_owned, shards, dtype, device, self.group)

    def to_holders(self, whole: Mapping[int, Tensor], dtype: torch.dtype, device: torch.device) -> "Message":
        """Send the items that this rank owns."""
        return Message(self.owned, self.held, whole, dtype, device, self.group)


class Message:
    """One all-to-all under way."""

    def __init__(
        self, sent: list[list[Part]], received: list[list[Part]], tensors: Mapping[int, Tensor | None],
        dtype: torch.dtype, device: torch.device, group: Any,
    ):  # fmt: skip
        counts, coming = ([sum(part.numel for part in parts) for parts in each] for each in (sent, received))
        self.parts = [part for parts in received for part in parts]
        self.buffer = torch.empty(sum(coming), dtype=dtype, device=device)
        self.sent = torch.empty(sum(counts), dtype=dtype, device=device)
        going = [part for parts in sent for part in parts]
        targets, sources = [], []
        for part, target in zip(going, self.sent.split([part.numel for part in going]), strict=True):
            if (tensor := tensors[part.item]) is None:
                target.zero_()
            else:
                targets.append(target.view(part.shape))
                sources.append(tensor[part.indices])
        if targets:
            torch._foreach_copy_(targets, sources)
        # As bytes, since not every backend sends every dtype.
        width = self.buffer.element_size()
        self.work = dist.all_to_all_single(
            self.buffer.view(torch.uint8), self.sent.view(torch.uint8), [width * count for count in coming],
            [width * count for count in counts], group=group, async_op=True,
        )  # fmt: skip

    def wait(self) -> Iterator[tuple[Part, Tensor]]:
        """What has come: views of `buffer`."""
        self.work.wait()
        for part, x in zip(self.parts, self.buffer.split([part.numel for part in self.parts]), strict=True):
            yield part, x.view(part.shape)

    def unpack(self, tensors: Mapping[int, Tensor]) -> None:
        """Write what has come to each item's tensor."""
        targets, sources = [], []
        for part, x in self.wait():
            targets.append(tensors[part.item][part.indices])
            sources.append(x)
        if targets:
            torch._foreach_copy_(targets, sources)


def _pairs(owner: int, rank: int, ranks: int) -> Iterator[tuple[int, int]]:
    """Owner and holder, of what concerns this rank."""
    if owner == rank:
        yield from ((owner, holder) for holder in range(ranks))
    else:
        yield owner, rank
