"""The counts of work: against launches as they are recorded, and the two savings that the fusion is for."""

import pytest
import torch
from torch import Tensor

from spectral_ops.bench import costs
from spectral_ops.bench.cases import CASES, OPERANDS, Work
from spectral_ops.kernels.launch import Launch, cdiv, recording

BF16 = OPERANDS["bf16"]


def launched_flops(item: Launch) -> int:
    """Of all programs of a launch: tiles of the result times the inner size, rounded up to pieces of `k`."""
    a, tile = item.arguments, item.config
    inner = {"gram": "k", "gram_skew": "k", "rotate": "k", "factor": "n"}.get(item.name)
    if inner is not None:
        loops = item.programs * cdiv(a[inner], tile.k)
    elif "PRECISION" in a:
        batch = item.programs / (a["count0"] + a["count1"])
        sides = (a["m"], a["n"]) if item.name == "track" else (a["n"], a["m"])
        loops = batch * sum(a[f"count{side}"] * cdiv(size, tile.k) for side, size in enumerate(sides))
        if item.name == "map":  # `BᵀB`, and powers of the generator
            loops *= a["CORRECT"] + {3: 1, 4: 2}.get(a["ORDER"], 0)
    else:
        loops = 0
    return int(loops * 2 * tile.block**2 * tile.k)


def launched_bytes(item: Launch) -> int:
    """Each tensor of a launch once."""
    tensors = {id(x): x for x in item.arguments.values() if isinstance(x, Tensor)}
    return sum(x.numel() * x.element_size() for x in tensors.values())


@pytest.mark.parametrize("n, m, batch", [(512, 256, 3), (1000, 500, 2), (64, 320, 1)])
@pytest.mark.parametrize("name", CASES)
def test_the_formula_agrees_with_the_launches(name, n, m, batch):
    case = CASES[name]
    kind = OPERANDS[case.operands[0]]
    with recording(run=False, assume=(9, 0)) as launches:
        case.run(case.arguments(n, m, batch, kind, "meta"))
    work = case.work(n, m, batch, kind)
    flops, tile = sum(map(launched_flops, launches)), max(item.config.block for item in launches)
    padding = (cdiv(n, tile) * tile / n * cdiv(m, tile) * tile / m) ** 1.5
    assert work.flops <= flops <= work.flops * padding * (1 + 1e-9)
    if name in ("parameter_update", "diagonal_step"):
        return  # they take addresses
    in_place = name in ("average", "kron_track", "momentum")  # what is read and written counts twice in the formula
    assert sum(map(launched_bytes, launches)) == pytest.approx(work.bytes, rel=0.26 if in_place else 0.02)


@pytest.mark.parametrize("n", costs.SIZES)
@pytest.mark.parametrize("name", ["gram_skew", "gram_track", "gram_track_both"])
def test_the_u_build_moves_less_than_half(name, n):
    work, eager = CASES[name].work(n, n, 4, BF16), costs.eager_work(CASES[name], n, n, 4, BF16)
    assert work.bytes <= 0.4 * eager.bytes
    assert work.flops <= 0.63 * eager.flops


@pytest.mark.parametrize("n", costs.SIZES)
def test_the_cayley_chain_computes_little_more_than_half(n):
    """Four of eight products, and the diagonal tiles' other halves."""
    case = CASES["cayley_update"]
    assert costs.eager_work(case, n, n, 1, BF16).flops == 8 * 2 * n**3
    assert case.work(n, n, 1, BF16).flops <= 0.6 * 8 * 2 * n**3


def test_eager_traffic_counts_what_is_read_and_written():
    x = torch.empty(8, 6, device="meta")
    with costs.Traffic() as traffic:
        y = x.T  # a view
        z = y + 1
        z.mul_(2)
        z @ x
        x[:1].expand(8, 6) + x
    words = 2 * 48 + 2 * 48 + (48 + 48 + 36) + (6 + 48 + 48)
    assert traffic.bytes == 4 * words


def test_the_floor_is_the_larger_of_two():
    assert costs.floor(Work(790e12, 4.3e12), "bf16") == pytest.approx(1)
    assert costs.floor(Work(790e12, 8.6e12), "bf16") == pytest.approx(2)
    assert costs.floor(Work(790e12, 0), "fp32") == pytest.approx(790 / 67)


def test_costs_prints_a_row_for_each_operation(capsys, monkeypatch):
    monkeypatch.setattr(costs, "SIZES", (64,))
    costs.main([])
    text = capsys.readouterr().out
    assert all(f"\n{name} " in text for name in CASES)
    assert "measured" in text.lower()
