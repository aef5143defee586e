"""Checkpoints of parameters over many ranks: a run that stops, and goes on with other ranks, equals one that did not.

`torch.distributed.checkpoint` (DCP) writes and reads them.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from spectral_ops.optim import IFShampoo, KrADagradStar, SpectralKron
from tests.ranks import (
    EVERY,
    LAYOUTS,
    ONE,
    SOME,
    Case,
    Layout,
    Model,
    Place,
    assert_close,
    assert_same_bits,
    assert_same_on_every_rank,
    parameters,
    spawn,
    states,
    train,
    whole,
)

CASES = {
    "SpectralKron": Case(SpectralKron, {"weight_decay": 0.1}),
    "SpectralKron bf16": Case(SpectralKron, {"preconditioner_dtype": torch.bfloat16, "update_interval": 3}),
    "IFShampoo": Case(IFShampoo, {"weight_decay": 0.1}),
    "IFShampoo per axis": Case(IFShampoo, {"per_axis": True}),
    "KrADagradStar": Case(KrADagradStar, {"weight_decay": 0.1}),
}
Run = tuple[Model, Optimizer, Place]
Want = tuple[dict[str, Tensor], dict[str, Tensor]]


def begin(layout: Layout, case: Case, **named: Any) -> Run:
    place = layout.placer()
    model = Model(place, **named)
    return model, case.build(model, **layout.options), place


def save(model: nn.Module, optimizer: Optimizer, folder: Path, **options: bool) -> None:
    chosen = StateDictOptions(**options)
    saved = {
        "model": get_model_state_dict(model, options=chosen),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=chosen),
    }
    dcp.save(saved, checkpoint_id=folder, no_dist=not dist.is_initialized())


def load(model: nn.Module, optimizer: Optimizer, folder: Path, **options: bool) -> None:
    chosen = StateDictOptions(**options)
    held = {
        "model": get_model_state_dict(model, options=chosen),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=chosen),
    }
    dcp.load(held, checkpoint_id=folder, no_dist=not dist.is_initialized())
    set_model_state_dict(model, held["model"], options=chosen)
    set_optimizer_state_dict(model, optimizer, held["optimizer"], options=chosen)


def uninterrupted(case: Case, steps: int) -> Want:
    model, optimizer, place = begin(ONE, case)
    train(model, optimizer, range(steps), place)
    return parameters(model), states(optimizer)


def leg(layout: Layout, cases: dict[str, Case], number: int, folder: Path, want: dict[str, Want]) -> None:
    """A part of a run of each case: from one checkpoint, or the start, to another."""
    for kind, case in cases.items():
        model, optimizer, place = begin(layout, case, seed=number)
        if number:
            load(model, optimizer, folder / f"{kind} {number}")
        train(model, optimizer, range(4 * number, 4 * (number + 1)), place)
        save(model, optimizer, folder / f"{kind} {number + 1}")
        assert_close(parameters(model), want[kind][0])
        if number == 2:  # the last one
            assert_close(states(optimizer), want[kind][1])


ROUTES = {
    "4, 2, 4 ranks": ["FSDP over 4", "FSDP over 2", "FSDP over 4"],
    "1, 2, 1": [None, "FSDP over 2", None],
    "2 x 2, 4, 1": ["HSDP 2 x 2", "FSDP over 4", None],
    "plain over 4, 1, 2 x 2": ["plain over 4", None, "HSDP 2 x 2"],
    "by columns, both, plain over 4": ["columns over 2", "FSDP x TP 2 x 2", "plain over 4"],
}


@pytest.mark.parametrize("route", ROUTES)
def test_a_run_goes_on_with_other_ranks(route, tmp_path):
    """Four steps in each layout, every one in new processes; other optimizers on the first route."""
    first = route == "4, 2, 4 ranks"
    cases = {kind: case for kind, case in CASES.items() if (kind != "SpectralKron") == first}
    for number, name in enumerate(ROUTES[route]):
        want = {kind: uninterrupted(case, 4 * (number + 1)) for kind, case in cases.items()}
        if name is None:
            leg(ONE, cases, number, tmp_path, want)
        else:
            spawn(LAYOUTS[name].world, leg, LAYOUTS[name], cases, number, tmp_path, want)


@pytest.mark.parametrize(
    ("layout", "case", "flat"),
    [
        ("FSDP over 4", "SpectralKron bf16", False),
        ("FSDP over 4", "IFShampoo", True),
        ("HSDP 2 x 2", "SpectralKron bf16", False),
        ("plain over 4", "SpectralKron bf16", True),
        ("plain over 4", "IFShampoo", False),
    ],
)
def test_a_run_goes_on_with_the_same_ranks_bit_for_bit(layout, case, flat, tmp_path):
    """Against the run of as many ranks that was not stopped; also with the state flattened."""
    case = CASES[case]

    def check() -> None:
        model, optimizer, place = begin(LAYOUTS[layout], case)
        train(model, optimizer, range(5), place)
        save(model, optimizer, tmp_path, flatten_optimizer_state_dict=flat)
        other, second, _ = begin(LAYOUTS[layout], case, seed=1)
        load(other, second, tmp_path, flatten_optimizer_state_dict=flat)
        for each, its in (model, optimizer), (other, second):
            train(each, its, range(5, 10), place)
        assert_same_bits(parameters(other), parameters(model))
        assert_same_bits(states(second), states(optimizer))

    spawn(4, check)


@pytest.mark.parametrize(
    ("layout", "case", "names"),
    [("FSDP over 4", "SpectralKron bf16", EVERY), ("HSDP 2 x 2", "SpectralKron", SOME), ("plain over 4", "IFShampoo", SOME)],
    ids=["FSDP", "HSDP", "plain"],
)
def test_the_full_state_is_that_of_one_process(layout, case, names):
    """On the first rank every name, shape and number; which, sent to all ranks, restores them."""
    case = CASES[case]
    one, alone, _ = begin(ONE, case, names=names)
    train(one, alone, range(5))
    want = get_optimizer_state_dict(one, alone, options=StateDictOptions(full_state_dict=True))

    def run() -> None:
        model, optimizer, place = begin(LAYOUTS[layout], case, names=names)
        train(model, optimizer, range(5), place)
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        full = get_optimizer_state_dict(model, optimizer, options=options)
        if dist.get_rank() == 0:
            assert full["state"].keys() == want["state"].keys()
            for name, state in want["state"].items():
                assert all(type(x) is Tensor for x in full["state"][name].values())
                assert_close(full["state"][name], state)
            for mine, group in zip(full["param_groups"], want["param_groups"], strict=True):
                assert {key: mine[key] for key in group} == group
        else:
            assert not full
        other, second, _ = begin(LAYOUTS[layout], case, names=names, seed=1)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_optimizer_state_dict(other, second, full, options=options)
        assert_same_bits(states(second), states(optimizer))
        with torch.no_grad():
            for p, q in zip(other.parameters(), model.parameters(), strict=True):
                p.copy_(q)
        train(model, optimizer, range(5, 7), place)
        train(other, second, range(5, 7), place)
        assert_same_bits(parameters(other), parameters(model))

    spawn(4, run)


@pytest.mark.parametrize("layout", ["FSDP over 4", "plain over 4"])
def test_load_state_dict_takes_what_state_dict_gives_and_that_of_one_process(layout):
    case = CASES["SpectralKron"]
    one, alone, _ = begin(ONE, case)
    train(one, alone, range(4))
    whole_state, want = alone.state_dict(), uninterrupted(case, 8)

    def check() -> None:
        for sharded in True, False:
            model, optimizer, place = begin(LAYOUTS[layout], case)
            train(model, optimizer, range(4), place)
            second = case.build(model, **LAYOUTS[layout].options)
            second.load_state_dict(optimizer.state_dict() if sharded else whole_state)
            train(model, second, range(4, 8), place)
            assert_close(parameters(model), want[0])
            assert_close(states(second), want[1])

    spawn(4, check)


@pytest.mark.parametrize(
    ("layout", "case"),
    [("FSDP over 4", "SpectralKron bf16"), ("HSDP 2 x 2", "SpectralKron"), ("plain over 4", "IFShampoo")],
)
def test_a_state_dict_is_of_dtensors_or_equal_on_every_rank(layout, case):
    """And it is split: a rank holds its share of it, and no more than a row of each tensor beside."""
    case = CASES[case]

    def run() -> None:
        model, optimizer, place = begin(LAYOUTS[layout], case)
        train(model, optimizer, range(3), place)
        state = optimizer.state_dict()["state"]
        named = {f"{i}.{name}": x for i, values in state.items() for name, x in values.items()}
        assert_same_on_every_rank({name: x for name, x in named.items() if not isinstance(x, DTensor)})
        numbers = [x for x in named.values() if not isinstance(x, DTensor)]
        assert max((x.numel() for x in numbers), default=0) <= 30  # the moments of what takes AdamW, under plain parameters
        held = sum(x.to_local().numel() for x in named.values() if isinstance(x, DTensor))
        everything = sum(x.numel() for x in named.values() if isinstance(x, DTensor))
        row = sum(math.prod(x.shape[1:]) for x in named.values() if isinstance(x, DTensor))
        ways = 2 if LAYOUTS[layout].placements[1:] else 4
        assert held <= everything / ways + row

    spawn(4, run)


@pytest.mark.parametrize(("layout", "case"), [("FSDP over 4", "SpectralKron bf16"), ("plain over 4", "IFShampoo")])
def test_a_step_of_zeros_with_no_learning_rate_changes_nothing(layout, case):
    """By which DCP makes the state that it loads to."""
    case = CASES[case]
    want, _ = uninterrupted(case, 5)

    def run() -> None:
        model, optimizer, place = begin(LAYOUTS[layout], case)
        start = parameters(model)
        get_optimizer_state_dict(model, optimizer)
        assert_same_bits(parameters(model), start)
        assert all(not x.any() for name, x in states(optimizer).items() if name.endswith(("step", "skipped")))
        train(model, optimizer, range(5), place)
        assert_close(parameters(model), want)

    spawn(4, run)


def test_resume_where_a_parameter_had_no_gradient(tmp_path):
    case = CASES["SpectralKron"]

    def without(t: int, name: str, g: Tensor) -> Tensor | None:
        return None if name in ("few", "experts", "table") and t < 6 else g

    def first() -> None:
        model, optimizer, place = begin(LAYOUTS["FSDP over 4"], case)
        train(model, optimizer, range(4), place, without)
        save(model, optimizer, tmp_path)

    def second(want: dict[str, Tensor]) -> None:
        model, optimizer, place = begin(LAYOUTS["FSDP over 2"], case, seed=1)
        held = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.load(held, checkpoint_id=tmp_path, planner=dcp.DefaultLoadPlanner(allow_partial_load=True))
        set_model_state_dict(model, held["model"])
        set_optimizer_state_dict(model, optimizer, held["optimizer"])
        train(model, optimizer, range(4, 9), place, without)
        assert_close(parameters(model), want)

    model, optimizer, place = begin(ONE, case)
    train(model, optimizer, range(9), place, without)
    spawn(4, first)
    spawn(2, second, parameters(model))


# --- Modules ----------------------------------------------------------------------------------------------------------


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(9, 6), nn.LayerNorm(6), nn.Linear(6, 3)).double()


def fit(model: nn.Module, optimizer: Optimizer, steps: range, shard: int = 0, shards: int = 1) -> None:
    for t in steps:
        x = torch.randn(16, 9, generator=torch.Generator().manual_seed(t)).double().chunk(shards)[shard]
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def wrapped(kind: str) -> tuple[nn.Module, Optimizer]:
    model: nn.Module = network()
    world, options = dist.get_world_size(), {}
    if kind == "FSDP":
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    elif kind == "HSDP":
        fully_shard(model, mesh=init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicas", "shards")))
    else:
        model = DistributedDataParallel(model)
        options = {"mesh": init_device_mesh("cpu", (world,))} if kind == "DDP with a mesh" else {}
    return model, SpectralKron(model.parameters(), lr=0.02, weight_decay=0.1, **options)


def module_leg(kind: str, steps: range, source: Path | None, target: Path, want: dict[str, Tensor]) -> None:
    model, optimizer = wrapped(kind)
    if source is not None:
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        load(model, optimizer, source)
    fit(model, optimizer, steps, dist.get_rank(), dist.get_world_size())
    save(model, optimizer, target)
    got = {name.removeprefix("module."): whole(p.detach()) for name, p in model.named_parameters()}
    assert_close(got, want, 1e-9)


@pytest.mark.parametrize(
    "route",
    [[("FSDP", 4), ("FSDP", 2), ("HSDP", 4)], [("DDP", 2), ("DDP with a mesh", 4), ("FSDP", 2)]],
    ids=lambda route: ", ".join(f"{kind} {world}" for kind, world in route),
)
def test_modules_go_on_in_other_wrappers(route: list[tuple[str, int]], tmp_path: Path) -> None:
    model = network()
    optimizer = SpectralKron(model.parameters(), lr=0.02, weight_decay=0.1)
    for i, (kind, world) in enumerate(route):
        steps = range(4 * i, 4 * (i + 1))
        fit(model, optimizer, steps)
        args: tuple[Any, ...] = kind, steps, tmp_path / str(i) if i else None, tmp_path / str(i + 1), parameters(model)
        spawn(world, module_leg, *args)
