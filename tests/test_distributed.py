"""Parameters over many ranks: 20 steps equal those of one process, for every layout; errors come on every rank.

Ranks are forked processes of gloo on the CPU. The one process that they are compared with is the test's own.
Checkpoints are in test_distributed_checkpoint.py.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from spectral_ops.bench.optimizers import OPTIMIZERS
from spectral_ops.optim import SINGD, IFShampoo, KrADagradStar, SpectralFull, SpectralKron
from tests.ranks import (
    LAYOUTS,
    Case,
    Change,
    Layout,
    Model,
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
    "IFShampoo": Case(IFShampoo, {"weight_decay": 0.1}),
    "KrADagradStar": Case(KrADagradStar, {"weight_decay": 0.1}),
}
KINDS = {
    "SpectralKron interval": Case(SpectralKron, {"update_interval": 3}, steps=35),
    "SpectralKron unscaled": Case(SpectralKron, {"update_scale": None, "maximize": True}),
    "SpectralKron graft": Case(SpectralKron, {"update_scale": "graft", "carry_residual": False}),
    "SpectralKron riemannian": Case(SpectralKron, {"rotation": "riemannian", "betas": (0.9, 0.95), "cayley_order": 4}),
    "IFShampoo coupled": Case(IFShampoo, {"weight_decay": 0.1, "decoupled_weight_decay": False, "maximize": True}),
    "IFShampoo paper": Case(IFShampoo, {"weight_decay": 0.1, "update_scale": None}),
    "IFShampoo per axis": Case(IFShampoo, {"per_axis": True}),
    "IFShampoo batch": Case(IFShampoo, {"batch_size": lambda: 4, "lr": torch.tensor(0.02)}),
    "KrADagradStar interval": Case(
        KrADagradStar, {"weight_decay": 0.1, "decoupled_weight_decay": False, "update_interval": 3}, steps=35
    ),
    "SpectralKron, a tensor as lr": Case(SpectralKron, {"weight_decay": 0.1, "lr": torch.tensor(0.02)}),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def alone(case: Case, change: Change = lambda t, name, g: g, **model: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters and state of one process."""
    one = Model(**model)
    optimizer = case.build(one)
    train(one, optimizer, range(case.steps), change=change)
    return parameters(one), states(optimizer)


def sharded(
    layout: Layout, case: Case, change: Change = lambda t, name, g: g, more: dict[str, Any] | None = None, **model: Any
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The same, on a rank."""
    place = layout.placer()
    mine = Model(place, **model)
    optimizer = case.build(mine, **layout.options, **(more or {}))
    train(mine, optimizer, range(case.steps), place, change)
    return mine, optimizer


# --- Equal to one process ---------------------------------------------------------------------------------------------


def equals_one_process(layout: Layout, case: Case, want: dict[str, Tensor], want_state: dict[str, Tensor]) -> None:
    model, optimizer = sharded(layout, case)
    assert_close(parameters(model), want)
    assert_close(states(optimizer), want_state)
    local = {name: p.to_local() if isinstance(p, DTensor) else p for name, p in model.named_parameters()}
    replicas = [i for i, kind in enumerate(layout.placements) if kind == Replicate()]
    if not layout.placements or len(replicas) == len(layout.placements):
        assert_same_on_every_rank({name: x.detach() for name, x in local.items()})


@every_case
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_steps_equal_those_of_one_process(layout, case):
    spawn(layout.world, equals_one_process, layout, case, *alone(case))


@pytest.mark.parametrize(
    ("layout", "kind"),
    [*(("FSDP over 4", kind) for kind in KINDS), *(("plain over 4", kind) for kind in KINDS if "interval" in kind)],
)
def test_every_option_works_over_ranks(layout, kind):
    spawn(4, equals_one_process, LAYOUTS[layout], KINDS[kind], *alone(KINDS[kind]))


def every_optimizer_equals_one_process(want: dict[str, dict[str, Tensor]]) -> None:
    layout = LAYOUTS["FSDP over 2"]
    for name, expected in want.items():
        model, _ = sharded(layout, Case(OPTIMIZERS[name], steps=5))
        assert_close(parameters(model), expected, 2e-2 if "bf16" in name else 1e-6)


def test_every_optimizer_works_over_ranks():
    """But for those with hooks."""
    with_hooks = "INGD bf16", "IKFAC", "KFAC"
    want = {name: alone(Case(build, steps=5))[0] for name, build in OPTIMIZERS.items() if name not in with_hooks}
    spawn(2, every_optimizer_equals_one_process, want)


def rounds_as_one_process(layout: Layout, case: Case, want: dict[str, Tensor], want_state: dict[str, Tensor]) -> None:
    model, optimizer = sharded(layout, case, dtype=torch.bfloat16)
    assert_same_bits(states(optimizer), want_state)
    assert_close(parameters(model), want, 1e-2)


@pytest.mark.parametrize(
    ("layout", "kind"),
    [("FSDP over 4", SpectralKron), ("FSDP over 4", IFShampoo), ("HSDP 2 x 2", SpectralKron), ("plain over 4", SpectralKron)],
)
def test_stochastic_rounding_does_not_depend_on_the_owner(layout, kind):
    """bfloat16 parameters and factors: the state to the bit. Parameters not: their updates travel in bfloat16."""
    case = Case(kind, {"preconditioner_dtype": torch.bfloat16, "weight_decay": 0.1})
    spawn(4, rounds_as_one_process, LAYOUTS[layout], case, *alone(case, dtype=torch.bfloat16))


# --- Modules ----------------------------------------------------------------------------------------------------------

STEPS = 20
KRON = {"lr": 0.02, "weight_decay": 0.1}


def network(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(1)
    layers = nn.Linear(9, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 4, bias=False)
    return nn.Sequential(*layers).to(dtype)


def data(t: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(t)
    return torch.randn(16, 9, generator=generator).to(dtype), torch.randn(16, 4, generator=generator).to(dtype)


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, dtype: torch.dtype, shard: int = 0, shards: int = 1) -> None:
    """On one of so many equal parts of each batch."""
    for t in range(STEPS):
        x, y = (z.chunk(shards)[shard] for z in data(t, dtype))
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()


def fitted_alone(kind: Any, dtype: torch.dtype, parts: int = 1) -> dict[str, Tensor]:
    """In one process; with gradients of so many parts of the batch, added in a row as ranks add theirs."""
    model = network(dtype)
    optimizer = kind(model.parameters(), **KRON)
    for t in range(STEPS):
        optimizer.zero_grad()
        for x, y in zip(*(z.chunk(parts) for z in data(t, dtype)), strict=True):
            (model(x) - y).square().mean().backward()
        for p in model.parameters():
            p.grad /= parts
        optimizer.step()
    return parameters(model)


def fully_sharded(shape: tuple[int, ...], kind: Any, dtype: torch.dtype, want: dict[str, Tensor], tolerance: float) -> None:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "shards")[-len(shape) :])
    model = network(dtype)
    for layer in model:
        if any(True for _ in layer.parameters()):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = kind(model.parameters(), **KRON)
    fit(model, optimizer, dtype, dist.get_rank(), dist.get_world_size())
    assert_close(parameters(model), want, tolerance)


@pytest.mark.parametrize("kind", [SpectralKron, IFShampoo, KrADagradStar])
@pytest.mark.parametrize("shape", [(2,), (4,), (2, 2)], ids=str)
def test_fully_shard_equals_one_process(shape, kind):
    """Every rank with its part of the batch; one process with all of it."""
    spawn(math.prod(shape), fully_sharded, shape, kind, torch.float64, fitted_alone(kind, torch.float64), 1e-9)


@pytest.mark.parametrize("kind", [SpectralKron, IFShampoo, KrADagradStar])
@pytest.mark.parametrize("shape", [(2,), (4,)], ids=str)
def test_fully_shard_is_as_accurate_in_float32_as_one_process(shape, kind):
    """Gradients depend on parameters here, and 20 steps make much of a rounding: one process in float32 has a distance to
    one in float64, and ranks have at most three times as much."""
    exact, one = fitted_alone(kind, torch.float64), fitted_alone(kind, torch.float32)
    error = max(float((one[name] - x).norm() / x.norm()) for name, x in exact.items())
    want = {name: x.float() for name, x in exact.items()}
    spawn(math.prod(shape), fully_sharded, shape, kind, torch.float32, want, 3 * error)


def replicated(kind: Any, dtype: torch.dtype, shared: bool, split: bool, want: dict[str, Tensor], tolerance: float) -> None:
    world = dist.get_world_size()
    model = DistributedDataParallel(network(dtype))
    mesh = {"mesh": init_device_mesh("cpu", (world,))} if shared else {}
    optimizer = kind(model.parameters(), **KRON, **mesh)
    fit(model, optimizer, dtype, *((dist.get_rank(), world) if split else ()))
    got = parameters(model.module)
    assert_same_on_every_rank(got)
    assert_close(got, want, tolerance)


@pytest.mark.parametrize("kind", [SpectralKron, IFShampoo, KrADagradStar])
@pytest.mark.parametrize("split", [False, True], ids=["same batches", "own batches"])
def test_replicas_equal_one_process_bit_for_bit(kind, split):
    want = fitted_alone(kind, torch.float32, parts=2 if split else 1)
    spawn(2, replicated, kind, torch.float32, False, split, want, 0.0)


@pytest.mark.parametrize("kind", [SpectralKron, IFShampoo, KrADagradStar])
@pytest.mark.parametrize("world", [2, 4])
def test_replicas_that_share_the_work_are_equal(kind, world):
    """Bit for bit to each other, and to one process."""
    spawn(world, replicated, kind, torch.float64, True, True, fitted_alone(kind, torch.float64), 1e-9)


def tensor_parallel(fsdp: bool, want: dict[str, Tensor]) -> None:
    """Two layers by columns and rows; with FSDP, their parameters lie on another mesh than those of the others."""
    names = ("data", "tensor") if fsdp else ("tensor",)
    mesh = init_device_mesh("cpu", (2,) * len(names), mesh_dim_names=names)
    model = network(torch.float64)
    parallelize_module(model[3], mesh["tensor"], ColwiseParallel(output_layouts=Replicate()))
    parallelize_module(model[5], mesh["tensor"], RowwiseParallel(input_layouts=Replicate()))
    if fsdp:
        fully_shard(model, mesh=mesh["data"])
    optimizer = SpectralKron(model.parameters(), **KRON)
    fit(model, optimizer, torch.float64, *((mesh["data"].get_local_rank(), 2) if fsdp else ()))
    assert_close(parameters(model), want, 1e-9)


@pytest.mark.parametrize("fsdp", [False, True], ids=["alone", "with FSDP"])
def test_tensor_parallel_equals_one_process(fsdp):
    spawn(4 if fsdp else 2, tensor_parallel, fsdp, fitted_alone(SpectralKron, torch.float64))


# --- Gradients that are not finite, or are not there ------------------------------------------------------------------

POISONED = "few", "experts", "fused", "conv", "vector", "table", "alike_1"


def poisoned(t: int, name: str, g: Tensor) -> Tensor:
    """One element of the last row, which one rank has, in two steps."""
    if name in POISONED and t in (3, 5):
        g.view(-1)[-1] = math.nan if t == 3 else math.inf
    return g


def skips_as_one_process(layout: Layout, case: Case, want: dict[str, Tensor], want_state: dict[str, Tensor]) -> None:
    place = layout.placer()
    model = Model(place)
    optimizer = case.build(model, **layout.options)
    train(model, optimizer, range(3), place, poisoned)
    before, states_before = parameters(model), states(optimizer)
    train(model, optimizer, range(3, 4), place, poisoned)
    after, states_after = parameters(model), states(optimizer)
    numbers = {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    for name, p in model.named_parameters():
        state = [key for key in states_after if key.startswith(f"{numbers[id(p)]}.") and "skipped" not in key]
        same = [torch.equal(states_after[key], states_before[key]) for key in state if "seed" not in key]
        if name in POISONED:
            assert torch.equal(after[name], before[name]) and all(same), name
        else:
            assert not torch.equal(after[name], before[name]) and not all(same), name
    train(model, optimizer, range(4, case.steps), place, poisoned)
    assert int(optimizer.skipped_steps()) == 2 * len(POISONED)
    assert_close(parameters(model), want)
    assert_close(states(optimizer), want_state)


@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        *(("FSDP over 4", kind) for kind in CASES),
        *((layout, "SpectralKron") for layout in ("HSDP 2 x 2", "FSDP x TP 2 x 2", "plain over 4")),
    ],
)
def test_a_gradient_that_is_not_finite_leaves_all_of_its_parameter(layout, kind):
    case = Case(CASES[kind].kind, CASES[kind].options, steps=8)
    spawn(4, skips_as_one_process, LAYOUTS[layout], case, *alone(case, poisoned))


LATE = "few", "vector", "experts"


def without(t: int, name: str, g: Tensor) -> Tensor | None:
    """Some have none on any rank, each from or until another step."""
    absent = {"few": t < 2, "table": t % 3 == 1, "experts": t in (4, 5), "alike_1": t > 5, "scalar": True, "odd": True}
    return None if absent.get(name) else g


@every_case
@pytest.mark.parametrize("layout", ["FSDP over 4", "plain over 4"])
def test_parameters_without_a_gradient_are_left(layout, case):
    case = Case(case.kind, case.options | {"update_interval": 2}, steps=16)

    def check(want: dict[str, Tensor]) -> None:
        model, _ = sharded(LAYOUTS[layout], case, without)
        assert_close(parameters(model), want)
        start = parameters(Model())
        assert all(torch.equal(parameters(model)[name], start[name]) for name in ("scalar", "odd"))

    spawn(4, check, alone(case, without)[0])


@every_case
def test_a_rank_without_a_gradient_counts_as_zeros(case):
    """Ranks of FSDP over 4 by rows; rank 2 has none, of a matrix, of experts, of an elementwise parameter."""
    names, layout = ("odd", "experts", "alike_0", "fused", "table"), LAYOUTS["FSDP over 4"]
    case = Case(case.kind, case.options, steps=8)

    def missing(t: int, name: str) -> bool:
        return name in names and t % 2 == 0

    def zeroed(t: int, name: str, g: Tensor) -> Tensor:
        if missing(t, name):
            chunks = list(g.chunk(4))
            if len(chunks) > 2:
                chunks[2].zero_()
        return g

    def none_on_one(t: int, name: str, g: Tensor) -> Tensor | None:
        return None if missing(t, name) and dist.get_rank() == 2 else g

    def check(want: dict[str, Tensor]) -> None:
        model, _ = sharded(layout, case, none_on_one)
        assert_close(parameters(model), want)

    spawn(4, check, alone(case, zeroed)[0])


def freeze(model: nn.Module, frozen: bool) -> None:
    for name, p in model.named_parameters():
        if name in LATE:
            p.requires_grad_(not frozen)


@every_case
@pytest.mark.parametrize("layout", ["FSDP over 4", "plain over 4"])
def test_frozen_parameters_may_thaw(layout, case):
    def run(layout: Layout | None) -> dict[str, Tensor]:
        place = layout.placer() if layout else torch.clone
        model = Model(place)
        freeze(model, True)
        optimizer = case.build(model, **(layout.options if layout else {}))
        train(model, optimizer, range(4), place)
        freeze(model, False)
        train(model, optimizer, range(4, 8), place)
        return parameters(model)

    want = run(None)
    spawn(4, lambda: assert_close(run(LAYOUTS[layout]), want))


# --- Errors -----------------------------------------------------------------------------------------------------------


def changed_on_rank_1(params: list[Tensor], kind: str) -> list[Tensor]:
    if dist.get_rank() == 1:
        if kind == "shape":
            params[0] = nn.Parameter(torch.randn(4, 6))
        if kind == "number":
            params.pop()
        if kind == "frozen":
            params[0].requires_grad_(False)
    return params


@pytest.mark.parametrize("kind", ["shape", "number", "frozen"])
@pytest.mark.parametrize("placed", [False, True], ids=["plain", "sharded"])
def test_ranks_that_differ_are_an_error_on_each(kind, placed):
    def check() -> None:
        mesh = init_device_mesh("cpu", (2,))
        params: list[Tensor] = [nn.Parameter(torch.ones(n, 6)) for n in (3, 5, 8)]
        params = changed_on_rank_1(params, kind)
        if placed:  # which sends nothing
            place = Layout((2,), (Shard(0),)).placer()
            params = [nn.Parameter(place(p.detach()), requires_grad=p.requires_grad) for p in params]
        optimizer = SpectralKron(params, **({} if placed else {"mesh": mesh}))
        for p in params:
            p.grad = torch.ones_like(p) if p.requires_grad else None
        with pytest.raises(ValueError, match="rank"):
            optimizer.step()

    spawn(2, check)


def test_a_mesh_without_this_rank_is_an_error():
    def check() -> None:
        mesh = DeviceMesh("cpu", [0, 1])
        inside = dist.get_rank() < 2
        local = torch.ones(2 if inside else 0, 6)
        p = nn.Parameter(DTensor.from_local(local, mesh, [Shard(0)], shape=torch.Size((4, 6)), stride=(6, 1)))
        if inside:
            optimizer = SpectralKron([p])
            p.grad = torch.ones_like(p)
            optimizer.step()
            assert whole(p.detach()).max() < 1
        else:
            with pytest.raises(ValueError, match="mesh"):
                p.grad = torch.ones_like(p)
                SpectralKron([p]).step()

    spawn(4, check)


def test_a_mesh_that_is_none_is_an_error():
    with pytest.raises(TypeError, match="mesh"):
        SpectralKron([nn.Parameter(torch.ones(2, 3))], mesh=4)


def test_optimizers_that_need_whole_parameters_refuse_others():
    def check() -> None:
        place = LAYOUTS["FSDP over 2"].placer()
        model = nn.Linear(4, 6, bias=False)
        model.weight = nn.Parameter(place(model.weight.detach()))
        builders: list[tuple[str, Callable[[], Any]]] = [
            ("SINGD", lambda: SINGD(model)),
            ("SpectralFull", lambda: SpectralFull([model.weight], joint=True)),
        ]
        for name, build in builders:
            with pytest.raises((TypeError, ValueError), match=rf"{name}.*DTensor"):
                optimizer = build()
                model.weight.grad = torch.ones_like(model.weight)
                optimizer.step()

    spawn(2, check)


@pytest.mark.parametrize("algorithm", ["matrix", "adamw"])
def test_a_gradient_laid_out_otherwise_is_right_or_refused(algorithm):
    """Autograd lays them out as the parameter; by hand there may be another."""

    def check() -> None:
        mesh = init_device_mesh("cpu", (2,))
        value, g = torch.ones(4, 6), torch.randn(4, 6)
        plain = nn.Parameter(value.clone())
        plain.grad = g.clone()
        p = nn.Parameter(distribute_tensor(value, mesh, [Shard(0)]))
        p.grad = distribute_tensor(g, mesh, [Replicate()], src_data_rank=None)
        try:
            for q in (plain, p):
                SpectralKron([{"params": [q], "algorithm": algorithm}], lr=0.1).step()
        except (TypeError, ValueError, RuntimeError) as error:
            assert "placement" in str(error)
        else:
            assert_close({"p": whole(p.detach())}, {"p": plain.detach()})

    spawn(2, check)


# --- What is sent -----------------------------------------------------------------------------------------------------


class Counted:
    """In place of `all_to_all_single`: how many bytes leave this rank, and in how many calls."""

    def __init__(self) -> None:
        self.send, self.bytes, self.calls = dist.all_to_all_single, 0, 0

    def __call__(self, output: Tensor, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = self.send(output, input, *args, **kwargs)
        names = "output_split_sizes", "input_split_sizes", "group"
        given = dict(zip(names, args, strict=False)) | kwargs
        group = given.get("group")
        rank, world = dist.get_rank(group), dist.get_world_size(group)
        splits = given.get("input_split_sizes") or [len(input) // world] * world
        self.bytes += (sum(splits) - splits[rank]) * input[:1].numel() * input.element_size()
        self.calls += 1
        return result


def total(number: int) -> int:
    x = torch.tensor(number)
    dist.all_reduce(x)
    return int(x)


EVEN = [(8, 4), (4, 6), (12, 5), (4, 6), (16, 3)]
ELEMENTS = sum(n * m for n, m in EVEN)


def bytes_of_a_step(layout: Layout, patch: pytest.MonkeyPatch, dtype: torch.dtype, options: dict[str, Any], calls: int) -> int:
    counted, place = Counted(), layout.placer()
    patch.setattr(dist, "all_to_all_single", counted)
    params = [nn.Parameter(place(torch.randn(shape).to(dtype))) for shape in EVEN]
    bias = nn.Parameter(place(torch.randn(8).to(dtype)))  # which AdamW updates where it is
    optimizer = SpectralKron([*params, bias], **layout.options, **options)
    sent = []
    for _ in range(3):
        counted.bytes = counted.calls = 0
        for p in (*params, bias):
            p.grad = place(torch.randn(p.shape).to(dtype))
        optimizer.step()
        assert counted.calls <= calls
        sent.append(total(counted.bytes))
    assert sent[0] == sent[1] == sent[2]
    return sent[0]


@pytest.mark.parametrize(
    ("dtype", "transport"), [(torch.float32, None), (torch.float32, torch.bfloat16), (torch.float64, None)], ids=str
)
@pytest.mark.parametrize(
    ("layout", "shards", "replicas"), [("FSDP over 4", 4, 1), ("HSDP 2 x 2", 2, 2), ("plain over 4", 1, 4)]
)
def test_bytes_are_those_of_the_formula(layout, shards, replicas, dtype, transport, monkeypatch):
    """In one exchange each way."""
    size = (transport or dtype).itemsize
    gradients, updates = ELEMENTS * size * (shards - 1) / shards, ELEMENTS * size * (shards * replicas - 1) / shards
    options = {"transport_dtype": transport}

    def check() -> None:
        assert bytes_of_a_step(LAYOUTS[layout], monkeypatch, dtype, options, 2) == gradients + updates

    spawn(4, check)


def rounds_what_it_sends(layout: Layout, case: Case, want: dict[str, Tensor], exact: set[str]) -> None:
    model, _ = sharded(layout, case, more={"transport_dtype": torch.bfloat16})
    got = parameters(model)
    for name, x in got.items():
        difference = float((x - want[name]).norm() / want[name].norm())
        assert difference < (1e-6 if name in exact else 1e-2), f"{name}: {difference:.3e}"
        assert name in exact or difference > 1e-6, f"{name}: {difference:.3e}"


@every_case
@pytest.mark.parametrize("layout", ["FSDP over 4", "plain over 4"])
def test_bfloat16_on_the_way_rounds_gradients_and_updates(layout, case):
    """What is updated where it is, is not rounded."""
    case = Case(case.kind, case.options | {"lr": 2e-3}, steps=5)
    spawn(4, rounds_what_it_sends, LAYOUTS[layout], case, alone(case)[0], {"vector", "scalar", "table"})
