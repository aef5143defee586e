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
from spectral_ops.optim._engine import WARM_STEPS
from tests.ranks import (
    EVERY,
    LAYOUTS,
    ONE,
    SOME,
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
    "SpectralKron interval": Case(SpectralKron, {"update_interval": 3}),
    "SpectralKron unscaled": Case(SpectralKron, {"update_scale": None, "maximize": True}),
    "SpectralKron graft": Case(SpectralKron, {"update_scale": "graft", "carry_residual": False}),
    "SpectralKron riemannian": Case(SpectralKron, {"rotation": "riemannian", "betas": (0.9, 0.95), "cayley_order": 4}),
    "IFShampoo coupled": Case(IFShampoo, {"weight_decay": 0.1, "decoupled_weight_decay": False, "maximize": True}),
    "IFShampoo paper": Case(IFShampoo, {"weight_decay": 0.1, "update_scale": None}),
    "IFShampoo per axis": Case(IFShampoo, {"per_axis": True}),
    "IFShampoo batch": Case(IFShampoo, {"batch_size": lambda: 4, "lr": torch.tensor(0.02)}),
    "KrADagradStar interval": Case(KrADagradStar, {"weight_decay": 0.1, "decoupled_weight_decay": False, "update_interval": 3}),
    "SpectralKron, a tensor as lr": Case(SpectralKron, {"weight_decay": 0.1, "lr": torch.tensor(0.02)}),
}
over_4_ranks = pytest.mark.parametrize(
    ("layout", "cases"),
    [("FSDP over 4", CASES), ("plain over 4", {"SpectralKron": CASES["SpectralKron"]})],
    ids=["FSDP", "plain"],
)


def same(t: int, name: str, g: Tensor) -> Tensor:
    return g


def run(layout: Layout, case: Case, change: Change = same, **model: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model after the steps of a case, and its optimizer."""
    place = layout.placer()
    mine = Model(place, **model)
    optimizer = case.build(mine, **layout.options)
    train(mine, optimizer, range(case.steps), place, change)
    return mine, optimizer


def ends(layout: Layout, cases: dict[str, Case], change: Change = same, **model: Any) -> dict[str, Tensor]:
    """Parameters after the steps of each case: several in the same processes, as these take longest to start."""
    of = {kind: parameters(run(layout, case, change, **model)[0]) for kind, case in cases.items()}
    return {f"{kind}: {name}": x for kind, named in of.items() for name, x in named.items()}


def with_options(cases: dict[str, Case], steps: int, **options: Any) -> dict[str, Case]:
    return {kind: Case(case.kind, case.options | options, steps) for kind, case in cases.items()}


# --- Equal to one process ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_steps_equal_those_of_one_process(layout):
    case = CASES["SpectralKron"]
    want = parameters(run(ONE, case, names=EVERY)[0])

    def check() -> None:
        model, _ = run(layout, case, names=EVERY)
        assert_close(parameters(model), want)
        if all(kind == Replicate() for kind in layout.placements):
            local = {name: p.to_local() if isinstance(p, DTensor) else p for name, p in model.named_parameters()}
            assert_same_on_every_rank({name: x.detach() for name, x in local.items()})

    spawn(layout.world, check)


@pytest.mark.parametrize(
    ("layout", "names"),
    [("FSDP over 2", EVERY), ("FSDP over 4", EVERY), ("HSDP 2 x 2", SOME)],
    ids=["FSDP over 2", "FSDP over 4", "HSDP"],
)
def test_steps_of_the_other_optimizers_do_too(layout, names):
    cases = {kind: CASES[kind] for kind in ("IFShampoo", "KrADagradStar")}
    want = ends(ONE, cases, names=names)
    spawn(LAYOUTS[layout].world, lambda: assert_close(ends(LAYOUTS[layout], cases, names=names), want))


@pytest.mark.parametrize(
    ("layout", "kinds", "steps"),
    [
        ("FSDP over 4", [kind for kind in KINDS if "interval" not in kind], 8),
        ("FSDP over 4", ["SpectralKron interval", "KrADagradStar interval"], WARM_STEPS + 6),
        ("plain over 4", ["SpectralKron interval"], WARM_STEPS + 6),
    ],
    ids=["FSDP", "FSDP, interval", "plain, interval"],
)
def test_every_option_works_over_ranks(layout, kinds, steps):
    cases = with_options({kind: KINDS[kind] for kind in kinds}, steps)
    want = ends(ONE, cases)
    spawn(4, lambda: assert_close(ends(LAYOUTS[layout], cases), want))


def test_every_optimizer_works_over_ranks():
    """But for those with hooks."""
    with_hooks = "INGD bf16", "IKFAC", "KFAC"
    cases = {name: Case(build, steps=5) for name, build in OPTIMIZERS.items() if name not in with_hooks}
    want = {name: ends(ONE, {name: case}) for name, case in cases.items()}

    def check() -> None:
        for name, case in cases.items():
            assert_close(ends(LAYOUTS["FSDP over 2"], {name: case}), want[name], 2e-2 if "bf16" in name else 1e-6)

    spawn(2, check)


@pytest.mark.parametrize(
    ("layout", "kinds"),
    [("FSDP over 4", [SpectralKron, IFShampoo]), ("HSDP 2 x 2", [SpectralKron]), ("plain over 4", [SpectralKron])],
    ids=["FSDP", "HSDP", "plain"],
)
def test_stochastic_rounding_does_not_depend_on_the_owner(layout, kinds):
    """bfloat16 parameters and factors: the state to the bit. Parameters not: their updates travel in bfloat16."""
    cases = [Case(kind, {"preconditioner_dtype": torch.bfloat16, "weight_decay": 0.1}, steps=8) for kind in kinds]
    want = [(parameters(model), states(optimizer)) for model, optimizer in (run(ONE, c, dtype=torch.bfloat16) for c in cases)]

    def check() -> None:
        for case, (parameters_of_one, states_of_one) in zip(cases, want, strict=True):
            model, optimizer = run(LAYOUTS[layout], case, dtype=torch.bfloat16)
            assert_same_bits(states(optimizer), states_of_one)
            assert_close(parameters(model), parameters_of_one, 1e-2)

    spawn(4, check)


# --- Modules ----------------------------------------------------------------------------------------------------------

STEPS = 20
OF_EACH = SpectralKron, IFShampoo, KrADagradStar
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


def fully_sharded(shape: tuple[int, ...], dtype: torch.dtype, want: dict[Any, tuple[dict[str, Tensor], float]]) -> None:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "shards")[-len(shape) :])
    for kind, (expected, tolerance) in want.items():
        model = network(dtype)
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = kind(model.parameters(), **KRON)
        fit(model, optimizer, dtype, dist.get_rank(), dist.get_world_size())
        assert_close(parameters(model), expected, tolerance)


@pytest.mark.parametrize(
    ("shape", "kinds"), [((2,), OF_EACH), ((4,), OF_EACH), ((2, 2), [SpectralKron])], ids=["FSDP over 2", "FSDP over 4", "HSDP"]
)
def test_fully_shard_equals_one_process(shape, kinds):
    """Every rank with its part of the batch; one process with all of it."""
    want = {kind: (fitted_alone(kind, torch.float64), 1e-9) for kind in kinds}
    spawn(math.prod(shape), fully_sharded, shape, torch.float64, want)


def test_fully_shard_is_as_accurate_in_float32_as_one_process():
    """Gradients depend on parameters here, and 20 steps make much of a rounding: one process in float32 has a distance to
    one in float64, and ranks have at most three times as much."""
    want = {}
    for kind in OF_EACH:
        exact, one = fitted_alone(kind, torch.float64), fitted_alone(kind, torch.float32)
        error = max(float((one[name] - x).norm() / x.norm()) for name, x in exact.items())
        want[kind] = {name: x.float() for name, x in exact.items()}, 3 * error
    spawn(2, fully_sharded, (2,), torch.float32, want)


def replicated(dtype: torch.dtype, shared: bool, split: bool, want: dict[Any, dict[str, Tensor]], tolerance: float) -> None:
    world = dist.get_world_size()
    mesh = {"mesh": init_device_mesh("cpu", (world,))} if shared else {}
    for kind, expected in want.items():
        model = DistributedDataParallel(network(dtype))
        optimizer = kind(model.parameters(), **KRON, **mesh)
        fit(model, optimizer, dtype, *((dist.get_rank(), world) if split else ()))
        got = parameters(model.module)
        assert_same_on_every_rank(got)
        assert_close(got, expected, tolerance)


@pytest.mark.parametrize("split", [False, True], ids=["same batches", "own batches"])
def test_replicas_equal_one_process_bit_for_bit(split):
    want = {kind: fitted_alone(kind, torch.float32, parts=2 if split else 1) for kind in OF_EACH}
    spawn(2, replicated, torch.float32, False, split, want, 0.0)


@pytest.mark.parametrize("world", [2, 4])
def test_replicas_that_share_the_work_are_equal(world):
    """Bit for bit to each other, and to one process."""
    want = {kind: fitted_alone(kind, torch.float64) for kind in OF_EACH}
    spawn(world, replicated, torch.float64, True, True, want, 1e-9)


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

POISONED = "few", "experts", "fused", "table"


def poisoned(t: int, name: str, g: Tensor) -> Tensor:
    """One element of the last row, which one rank has, in two steps."""
    if name in POISONED and t in (3, 5):
        g.view(-1)[-1] = math.nan if t == 3 else math.inf
    return g


def skips_as_one_process(layout: Layout, case: Case, want: dict[str, Tensor]) -> None:
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


@pytest.mark.parametrize(
    ("layout", "kinds"),
    [("FSDP over 4", CASES), *((layout, ["SpectralKron"]) for layout in ("HSDP 2 x 2", "FSDP x TP 2 x 2", "plain over 4"))],
    ids=["FSDP", "HSDP", "FSDP x TP", "plain"],
)
def test_a_gradient_that_is_not_finite_leaves_all_of_its_parameter(layout, kinds):
    cases = with_options({kind: CASES[kind] for kind in kinds}, steps=8)
    want = {kind: parameters(run(ONE, case, poisoned)[0]) for kind, case in cases.items()}

    def check() -> None:
        for kind, case in cases.items():
            skips_as_one_process(LAYOUTS[layout], case, want[kind])

    spawn(4, check)


def without(t: int, name: str, g: Tensor) -> Tensor | None:
    """Some have none on any rank, each from or until another step."""
    absent = {"few": t < 2, "table": t % 3 == 1, "experts": t in (4, 5), "fused": t > 5, "scalar": True, "odd": True}
    return None if absent.get(name) else g


@over_4_ranks
def test_parameters_without_a_gradient_are_left(layout, cases):
    cases, names = with_options(cases, steps=WARM_STEPS + 4, update_interval=2), (*SOME, "scalar")
    want, start = ends(ONE, cases, without, names=names), parameters(Model(names=names))

    def check() -> None:
        got = ends(LAYOUTS[layout], cases, without, names=names)
        assert_close(got, want)
        assert all(torch.equal(got[f"{kind}: {name}"], start[name]) for kind in cases for name in ("scalar", "odd"))

    spawn(4, check)


def test_a_rank_without_a_gradient_counts_as_zeros():
    """Ranks of FSDP over 4 by rows; rank 2 has none, of a matrix, of experts, of an elementwise parameter."""
    names, cases = ("odd", "experts", "fused", "table"), with_options(CASES, steps=6)

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

    want = ends(ONE, cases, zeroed)
    spawn(4, lambda: assert_close(ends(LAYOUTS["FSDP over 4"], cases, none_on_one), want))


LATE = "few", "vector", "experts"


def freeze(model: nn.Module, frozen: bool) -> None:
    for name, p in model.named_parameters():
        if name in LATE:
            p.requires_grad_(not frozen)


@over_4_ranks
def test_frozen_parameters_may_thaw(layout, cases):
    def thawed(layout: Layout, case: Case) -> dict[str, Tensor]:
        place = layout.placer()
        model = Model(place)
        freeze(model, True)
        optimizer = case.build(model, **layout.options)
        train(model, optimizer, range(4), place)
        freeze(model, False)
        train(model, optimizer, range(4, 8), place)
        return parameters(model)

    want = {kind: thawed(ONE, case) for kind, case in cases.items()}

    def check() -> None:
        for kind, case in cases.items():
            assert_close(thawed(LAYOUTS[layout], case), want[kind])

    spawn(4, check)


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
    ("layout", "shards", "replicas"), [("FSDP over 4", 4, 1), ("HSDP 2 x 2", 2, 2), ("plain over 4", 1, 4)]
)
def test_bytes_are_those_of_the_formula(layout, shards, replicas, monkeypatch):
    """In one exchange each way."""
    elements = ELEMENTS * (shards - 1) / shards + ELEMENTS * (shards * replicas - 1) / shards  # of gradients, of updates

    def check() -> None:
        for dtype, transport in (torch.float32, None), (torch.float32, torch.bfloat16), (torch.float64, None):
            sent = bytes_of_a_step(LAYOUTS[layout], monkeypatch, dtype, {"transport_dtype": transport}, 2)
            assert sent == elements * (transport or dtype).itemsize

    spawn(4, check)


@over_4_ranks
def test_bfloat16_on_the_way_rounds_gradients_and_updates(layout, cases):
    """What is updated where it is, is not rounded."""
    cases = with_options(cases, steps=5, lr=2e-3)
    want = ends(ONE, cases)

    def check() -> None:
        for name, x in ends(LAYOUTS[layout], with_options(cases, steps=5, transport_dtype=torch.bfloat16)).items():
            difference = float((x - want[name]).norm() / want[name].norm())
            exact = name.endswith(("vector", "table"))
            assert difference < (1e-6 if exact else 1e-2), f"{name}: {difference:.3e}"
            assert exact or difference > 1e-6, f"{name}: {difference:.3e}"

    spawn(4, check)
