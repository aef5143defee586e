"""What a call costs on the host, where there is next to no arithmetic: dispatch, routing, state, launch preparation.

python -m pytest bench --benchmark-only
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn

from spectral_ops.bench.cases import CASES, OPERANDS, fresh
from spectral_ops.bench.model import LanguageModel
from spectral_ops.kernels.config import choose_config
from spectral_ops.kernels.launch import recording
from spectral_ops.optim import SpectralKron, param_groups

SIZE = 8
TENSORS = 200


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def model() -> nn.Module:
    return LanguageModel(width=16, layers=4, heads=2, context=16)


def stepped(build: Callable[[Any], torch.optim.Optimizer], parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """An optimizer after its first step, with gradients that stay."""
    for p in parameters:
        p.grad = torch.randn_like(p)
    optimizer = build(parameters)
    optimizer.step()
    return optimizer


# --- Ops ----------------------------------------------------------------------------------------------------------------


def test_plain_product(benchmark: BenchmarkFixture) -> None:
    """What PyTorch's own dispatch costs, to compare the ops with."""
    x = torch.randn(1, SIZE, SIZE)
    benchmark(torch.matmul, x, x.mT)


@pytest.mark.parametrize("op", ["gram", "momentum", "kron_track"])
def test_op(benchmark: BenchmarkFixture, op: str) -> None:
    case = CASES[op]
    benchmark(torch.no_grad()(case.op), case.arguments(SIZE, SIZE, 1, OPERANDS["fp32"], "cpu"))


# --- Optimizers ---------------------------------------------------------------------------------------------------------


def test_param_groups(benchmark: BenchmarkFixture, model: nn.Module) -> None:
    benchmark(param_groups, model, lr=1e-3)


@pytest.mark.parametrize(
    "build",
    [lambda params: SpectralKron(params, lr=1e-3), lambda params: torch.optim.AdamW(params, lr=1e-3, foreach=True)],
    ids=["spectral_kron", "adamw"],
)
def test_step_of_many_tensors(benchmark: BenchmarkFixture, build: Callable[[Any], torch.optim.Optimizer]) -> None:
    benchmark(stepped(build, [nn.Parameter(torch.randn(SIZE, SIZE)) for _ in range(TENSORS)]).step)


def test_state_dict(benchmark: BenchmarkFixture, model: nn.Module) -> None:
    benchmark(stepped(SpectralKron, list(model.parameters())).state_dict)


def test_load_state_dict(benchmark: BenchmarkFixture, model: nn.Module) -> None:
    optimizer = stepped(SpectralKron, list(model.parameters()))
    benchmark(optimizer.load_state_dict, optimizer.state_dict())


# --- Launches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "uncached"])
def test_choose_config(benchmark: BenchmarkFixture, cached: bool) -> None:
    choose = choose_config if cached else choose_config.__wrapped__
    assert benchmark(choose, "track", 1024, 1024, 12, torch.bfloat16, (9, 0))


def test_launch_preparation(benchmark: BenchmarkFixture) -> None:
    """Everything that a tracking update does on the host for its eight launches, but for Triton's own part."""
    case = CASES["kron_track"]
    arguments = fresh(case.arguments(SIZE, SIZE, 1, OPERANDS["bf16"], "meta"))
    with recording(run=False, assume=(9, 0)) as launches:
        benchmark(case.run, arguments)
    assert launches
