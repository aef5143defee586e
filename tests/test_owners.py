"""Who owns which matrix, and which part of a tensor each rank has, without processes."""

from types import SimpleNamespace

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from spectral_ops.optim._owners import assign, cost
from spectral_ops.optim._pieces import pieces
from spectral_ops.optim._shards import Ranks, lengths, overlap, size
from spectral_ops.optim._sharing import matrix_box


def ranks(*shape: int) -> Ranks:
    return Ranks(SimpleNamespace(mesh=torch.arange(torch.Size(shape).numel()).view(shape), ndim=len(shape)))  # type: ignore[arg-type]


def test_the_largest_come_first_and_go_where_least_is_to_do() -> None:
    assert assign([1, 5, 3, 3, 4], 2) == [1, 0, 1, 0, 1]
    assert assign([2, 2, 2], 3) == [0, 1, 2]
    assert assign([1, 1], 2, loads=[5, 3]) == [1, 1]
    assert assign([], 4) == []


def test_cost_counts_products_with_dense_factors_only() -> None:
    assert cost((4, 3), None) == 16 * (3 + 4) + 9 * (4 + 3)
    assert cost((4, 3), 3) == 9 * (4 + 3) + 12
    assert cost((7,), None) == 49 * 8
    assert cost((2, 3, 4), 8) == 4 * (12 + 2) + 9 * (8 + 3) + 16 * (6 + 4)


@pytest.mark.parametrize("rows", [0, 1, 3, 4, 9, 16])
@pytest.mark.parametrize("count", [1, 2, 4, 5])
def test_boxes_are_what_chunk_cuts(rows: int, count: int) -> None:
    shards = ranks(count).shards((rows, 2), (Shard(0),))
    chunks = [len(x) for x in torch.arange(rows).chunk(count)] if rows else []
    assert [lengths(box)[0] for box in shards.boxes] == chunks + [0] * (count - len(chunks))
    assert shards.replicas == ((),) * count


def test_every_replica_has_each_element_once() -> None:
    shape = (7, 5)
    for placements in ((Replicate(), Shard(0)), (Shard(1), Replicate()), (Shard(0), Shard(0)), (Shard(0), Shard(1)), ()):
        shards = ranks(2, 3).shards(shape, placements)
        for replica in set(shards.replicas):
            seen = torch.zeros(shape)
            for box, mine in zip(shards.boxes, shards.replicas, strict=True):
                if mine == replica:
                    seen[tuple(slice(*each) for each in box)] += 1
            assert seen.eq(1).all()


def test_a_strided_shard_is_of_what_the_later_dimensions_leave() -> None:
    """FSDP over tensor parallelism: the mesh's second dimension cuts first."""
    shards = ranks(2, 2).shards((8, 3), (_StridedShard(0, split_factor=2), Shard(0)))
    assert [box[0] for box in shards.boxes] == [(0, 2), (4, 6), (2, 4), (6, 8)]


@pytest.mark.parametrize(
    ("shape", "group"),
    [
        ((3, 6), {}),
        ((3, 4, 5), {}),
        ((2, 3, 4, 5), {"conv": False}),
        ((4, 3, 3, 3), {}),
        ((12, 5), {"split_sizes": [6, 2, 4], "num_heads": [2, 1, 1]}),
        ((12, 5), {"num_heads": 3}),
        ((7,), {"per_axis": True}),
        ((), {"per_axis": True}),
    ],
)
def test_matrices_cover_their_parameter(shape: tuple[int, ...], group: dict[str, object]) -> None:
    """And a matrix's box holds its numbers in their order."""
    p = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(shape)
    options = {"conv": None, "split_sizes": None, "num_heads": None} | group
    seen = torch.zeros(shape)
    for piece in pieces(p, options):
        for number, matrix in enumerate(piece.matrices(p)):
            box = matrix_box(piece, number)
            at = tuple(slice(*each) for each in box)
            assert torch.equal(p[at].reshape(piece.n, piece.m), matrix)
            seen[at] += 1
    assert seen.eq(1).all()


def test_overlaps_of_boxes_that_do_not_meet_are_empty() -> None:
    assert size(overlap(((0, 2), (0, 3)), ((2, 4), (0, 3)))) == 0
    assert overlap(((0, 3), (1, 3)), ((2, 4), (0, 2))) == ((2, 3), (1, 2))
