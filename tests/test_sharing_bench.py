"""The paper model of sharing: against sums by hand, the formulas of the documentation and the state of a real optimizer."""

import inspect
import re

import pytest
import torch
from torch import nn

from spectral_ops.bench import sharing
from spectral_ops.bench.__main__ import main
from spectral_ops.bench.costs import spectral_kron
from spectral_ops.bench.sharing import NETWORKS, Network, plan, state_bytes, traffic
from spectral_ops.optim import SpectralKron


@pytest.mark.parametrize("name", ["GPT-2 small", "MoE 12 x 16"])
def test_eight_ranks_have_the_same_to_do(name):
    assert 1 <= plan(NETWORKS[name], 8, 1).balance <= 1.15


def test_balance_by_hand():
    """Costs of 4 n³ for a square: 256, 32 and 32, so that the second rank has both small ones."""
    shared = plan(Network(((4, 4, 1), (2, 2, 2)), 0), 2, 1)
    assert shared.balance == pytest.approx(256 / 160)
    assert shared.state == [state_bytes(4, 4), 2 * state_bytes(2, 2)]


def test_parameters_are_as_many_as_they_should_be():
    """GPT-2 124M; Llama-3 8.03B and 70.6B; without norms and biases."""
    whole = {name: network.elements + network.elementwise for name, network in NETWORKS.items()}
    assert whole["GPT-2 small"] == 12 * 12 * 768**2 + 51281 * 768
    assert whole["Llama-3-8B"] == 8_029_995_008
    assert whole["Llama-3-70B"] == 70_552_387_584
    moe = NETWORKS["MoE 12 x 16"]
    assert moe.elements == 12 * (4 * 1024**2 + 16 * 1024 + 16 * 3 * 1024 * 2048)
    assert len(moe.each) == 12 * (4 + 1 + 48)
    assert moe.elements - moe.idle == 12 * (4 * 1024**2 + 16 * 1024 + 2 * 3 * 1024 * 2048)


# --- Bytes --------------------------------------------------------------------------------------------------------------


def test_bytes_by_hand():
    """The first of two ranks owns 12 numbers, the second 4, each of 2 bytes; both hold half of everything."""
    first, second = traffic([12, 4], shards=2)
    assert (first.gradients, first.updates) == ((4, 12), (12, 4))
    assert (second.gradients, second.updates) == ((12, 4), (4, 12))
    assert (first.sent, first.received) == (16, 16)


def test_bytes_of_replicas_by_hand():
    """Two replicas of two shards; only rank 2, in the second replica, owns something: 8 numbers, so shards of 4."""
    idle, other, owner, beside = traffic([0, 0, 8, 0], shards=2)
    assert idle.gradients == other.gradients == (0, 0)  # its own replica's gradients are enough
    assert owner.gradients == (0, 8) and beside.gradients == (8, 0)
    assert owner.updates == (24, 0) and idle.updates == other.updates == beside.updates == (0, 8)


@pytest.mark.parametrize("shards, replicas", [(8, 1), (1, 4), (4, 3)])
def test_bytes_of_all_ranks_are_the_formula(shards, replicas):
    owned = [7 * i**2 % 31 for i in range(shards * replicas)]
    loads = traffic(owned, shards)
    size = 2 * sum(owned)
    for side in range(2):
        assert sum(x.gradients[side] for x in loads) == pytest.approx(size * (1 - 1 / shards))
        assert sum(x.updates[side] for x in loads) == pytest.approx(size * (replicas - 1 / shards))


def test_the_exchange_waits_for_the_busiest_rank():
    loads = traffic([10**9, 0], shards=2)  # half of it is sent each way
    assert sharing.exchange_seconds(loads) == pytest.approx(2 * 1e9 / 450e9)
    loads = traffic([10**9] + 15 * [0], shards=16)
    assert sharing.exchange_seconds(loads) == pytest.approx(2 * 2e9 * 15 / 16 / 50e9)


# --- State and time -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*max_preconditioner_dim")
@pytest.mark.parametrize("n, m", [(24, 40), (1, 9), (64, 65), (70, 66)])
def test_state_is_the_optimizers(n, m, monkeypatch):
    monkeypatch.setattr(sharing, "LIMIT", 64)
    p = nn.Parameter(torch.randn(n, m, dtype=torch.bfloat16))
    optimizer = SpectralKron([p], max_preconditioner_dim=64)
    p.grad = torch.randn_like(p)
    optimizer.step()
    assert state_bytes(n, m) == sum(x.numel() * x.element_size() for x in optimizer.state[p].values())


def test_embeddings_are_adamws_and_evenly_sharded():
    without, embedded = (plan(Network(((8, 8, 2),), size), 2, 2) for size in (0, 1000))
    assert [b - a for a, b in zip(without.state, embedded.state, strict=True)] == [4 * 1000 / 2] * 4


def test_the_limit_is_the_optimizers():
    assert inspect.signature(SpectralKron).parameters["max_preconditioner_dim"].default == sharing.LIMIT


@pytest.mark.parametrize("interval", sharing.INTERVALS)
@pytest.mark.parametrize("n, m", [(768, 768), (3072, 768), (4096, 8192)])
def test_two_sides_take_what_the_matrix_takes(n, m, interval):
    both = sharing.one_side(n, m, interval) + sharing.one_side(m, n, interval)
    assert both == pytest.approx(spectral_kron(n, m, "bf16", interval), rel=0.05)
    assert sharing.seconds(n, m, interval) == spectral_kron(n, m, "bf16", interval)


def test_a_diagonal_side_takes_nothing():
    wide = sharing.seconds(4096, 14336, 1)
    assert wide == sharing.seconds(14336, 4096, 1) == sharing.one_side(4096, 14336, 1)
    assert wide < spectral_kron(4096, 14336, "bf16", 1) / 4
    assert sharing.seconds(10_000, 10_000, 1) == 0


def test_the_longest_rank_counts():
    shared = plan(Network(((768, 768, 3),), 0), 2, 1)
    assert shared.step == [pytest.approx(2 * spectral_kron(768, 768, "bf16", k)) for k in sharing.INTERVALS]


# --- The table ----------------------------------------------------------------------------------------------------------


def test_the_table(capsys):
    main(["sharing"])
    text = capsys.readouterr().out
    for name in NETWORKS:
        for layout in (r"8 +1 +8", r"1024 +1 +1,024", r"64 +16 +1,024"):
            assert re.search(rf"^{name} +{layout} +[1-9]", text, re.M), (name, layout)
    assert "Nothing here is measured" in text
