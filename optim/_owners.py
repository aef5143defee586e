"""Which rank computes which matrix."""

import heapq
import math
from collections.abc import Sequence


def cost(dims: tuple[int, ...], limit: int | None) -> int:
    """Of updating and applying the factors of a tensor of `dims`, but for a constant: a product of every factor with the
    tensor, and one with another of its size. Sides over `limit` keep a diagonal."""
    size = math.prod(dims)
    dense = [d for d in dims if limit is None or d <= limit]
    return sum(d * d * (size // d + d) for d in dense) + (len(dims) - len(dense)) * size


def assign(costs: Sequence[int], ranks: int, loads: Sequence[int] = ()) -> list[int]:
    """The owner of each: the largest come first, each to the rank that has least to do, `loads` included."""
    heap = list(zip(loads or [0] * ranks, range(ranks), strict=True))
    heapq.heapify(heap)
    owners = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        load, owner = heap[0]
        owners[i] = owner
        heapq.heapreplace(heap, (load + costs[i], owner))
    return owners
