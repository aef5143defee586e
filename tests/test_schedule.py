"""Whose turn it is to update its factors: everybody's once in an interval, at an even cost."""

import itertools

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from spectral_ops.optim import SpectralKron
from spectral_ops.optim._pieces import Piece
from spectral_ops.optim._schedule import Schedule


def piece(n: int, m: int, count: int, index: int, start: int = 0) -> Piece:
    return Piece(torch.empty(count * n, m, device="meta"), start, n, (count,), n, m, "", index, (n, m))


SHAPES = (4, 4, 7), (8, 4, 1), (4, 4, 2), (4, 16, 3), (8, 4, 5), (1, 1, 1)
MIXED = [piece(n, m, count, i) for i, (n, m, count) in enumerate(SHAPES)]


def turns(pieces: list[Piece], members: list[Piece], interval: int) -> list[slice]:
    """Of a batch of `members`, the rows of each step."""
    schedule = Schedule(pieces, interval)
    return [schedule.rows(members, step) for step in range(interval)]


@pytest.mark.parametrize("interval", [2, 3, 5, 40])
@pytest.mark.parametrize("shape", [(4, 4), (8, 4), (4, 16), (1, 1)])
def test_every_matrix_has_one_turn_in_an_interval(interval, shape):
    members = [p for p in MIXED if (p.n, p.m) == shape]
    rows = [range(*s.indices(100)) for s in turns(MIXED, members, interval)]
    assert list(itertools.chain(*rows)) == list(range(sum(p.count for p in members)))


@pytest.mark.parametrize("interval", [2, 3, 5])
def test_a_missing_gradient_shifts_nobody_elses_turn(interval):
    members = [p for p in MIXED if (p.n, p.m) == (4, 4)]
    for both, one in zip(turns(MIXED, members, interval), turns(MIXED, members[1:], interval), strict=True):
        whole = set(range(*both.indices(100)))
        assert {i + members[0].count for i in range(*one.indices(100))} == whole - set(range(members[0].count))


def test_the_turn_is_that_of_the_middle_in_the_row():
    for interval in (2, 3, 7):
        place, by_shape = 0, {}
        for p in MIXED:
            by_shape.setdefault((p.n, p.m), []).append(p)
        length = sum(p.count * p.n * p.m * (p.n + p.m) for p in MIXED)
        for members in by_shape.values():
            got = turns(MIXED, members, interval)
            for i in range(sum(p.count for p in members)):
                cost = members[0].n * members[0].m * (members[0].n + members[0].m)
                turn = (2 * place + cost) * interval // (2 * length)
                assert got[turn].start <= i < got[turn].stop
                place += cost


class Work(TorchDispatchMode):
    """Counts the multiplications of `B_Cᵀ G B_K` in updates of factors; their other products are in proportion."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().startswith("spectral_ops::kron_track"):
            b, n, m = args[0].shape
            self.total += b * n * m * (n + m)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("interval", [2, 3, 6])
def test_all_steps_cost_the_same(interval):
    """A transformer of twelve layers with a fused weight."""
    params = [nn.Parameter(torch.randn(s)) for _ in range(12) for s in ((24, 8), (8, 8), (32, 8), (8, 32))]
    groups = [{"params": params[::4], "split_sizes": [8, 8, 8]}, {"params": [p for i, p in enumerate(params) if i % 4]}]
    optimizer = SpectralKron(groups, update_interval=interval)

    def products() -> int:
        for p in params:
            p.grad = torch.randn_like(p)
        with Work() as work:
            optimizer.step()
        return work.total

    first = [products() for _ in range(10)]
    later = [products() for _ in range(2 * interval)]
    assert len(set(first)) == 1 and later[:interval] == later[interval:] and sum(later) == 2 * first[0]
    largest = [max(p.numel() // 3 * 16 for p in groups[0]["params"]), 32 * 8 * 40]
    assert max(later) - min(later) <= 2 * sum(largest)  # within a matrix of each group above and below
