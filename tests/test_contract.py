"""What every optimizer of the package survives: design/contract.md, "State and checkpoints" and "Stepping", line by line.

Each test goes through `bench.optimizers.OPTIMIZERS`, which holds every optimizer class (the last test sees to that). Elsewhere:
    faults of gradients, options, parameters, checkpoints           test_faults.py
    10,000 steps with bf16 factors                                  test_soak.py, `make soak`
    the cost of a step is even                                      test_schedule.py
    bytes of state per parameter                                    test_readme.py
    torch's own inputs for tests of optimizers                      test_torch_inputs.py
    a captured CUDA graph replays bit for bit                       `make gpu`
"""

import copy
import io
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from spectral_ops import optim
from spectral_ops.bench.optimizers import OPTIMIZERS

every_optimizer = pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS)
DTYPES = (torch.float32, torch.bfloat16)
SHAPES = (), (1,), (5,), (1, 1), (1, 6), (6, 1), (8, 3, 2, 2), (4, 2, 3, 2, 2), (5, 6, 7), (2, 2, 3, 4), (0, 4), (3, 0), (0,)


class Model(nn.Module):
    """Matrices of one shape, another, a stack of experts, a fused weight, and what takes AdamW."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        shapes = {"first": (6, 9), "second": (6, 9), "wide": (4, 20), "experts": (3, 4, 5), "bias": (4,), "temperature": ()}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape).to(dtype)))


def give_gradients(model: nn.Module, t: int, without: tuple[str, ...] = ()) -> None:
    """Gradients that depend on the step, the place and the value of each parameter."""
    for i, (name, p) in enumerate(model.named_parameters()):
        noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(1000 * t + i))
        p.grad = None if name in without else (noise + 0.1 * p.detach().float()).to(p.dtype)


def train(model: nn.Module, optimizer: Optimizer, steps: range, without: tuple[str, ...] = ()) -> None:
    for t in steps:
        give_gradients(model, t, without)
        optimizer.step()


def everything(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Parameters and state by name."""
    named = dict(model.named_parameters())
    found = {name: p.detach() for name, p in named.items()}
    for name, p in named.items():
        found |= {f"{name}.{key}": value for key, value in optimizer.state.get(p, {}).items()}
    return found


def snapshot(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in everything(model, optimizer).items()}


def assert_same_bits(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, x in want.items():
        assert got[name].dtype == x.dtype and got[name].shape == x.shape, name
        assert torch.equal(got[name], x), name


# --- State and checkpoints --------------------------------------------------------------------------------------------


def through_file(state: Any, **options: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True, **options)


def by_state_dict(convert: Callable[[Any], Any]) -> Callable[..., tuple[nn.Module, Optimizer]]:
    def resume(model, optimizer, build, tmp_path):
        other = copy.deepcopy(model)
        second = build(other.parameters(), lr=0.05)
        second.load_state_dict(state_dict=convert(optimizer.state_dict()))  # by keyword, as DCP does
        return other, second

    return resume


def by_dcp(**options: bool) -> Callable[..., tuple[nn.Module, Optimizer]]:
    """Distributed checkpointing: it makes the state of a new optimizer by a step, to have where to load to. A parameter that
    never had a gradient is not in the checkpoint, and keeps that state."""

    def resume(model, optimizer, build, tmp_path):
        chosen = StateDictOptions(**options)
        saved = {"optimizer": get_optimizer_state_dict(model, optimizer, options=chosen)}
        dcp.save(saved, checkpoint_id=tmp_path, no_dist=True)
        other = copy.deepcopy(model)
        second = build(other.parameters(), lr=0.05)
        loaded = {"optimizer": get_optimizer_state_dict(other, second, options=chosen)}
        planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
        dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True, planner=planner)
        set_optimizer_state_dict(other, second, loaded["optimizer"], options=chosen)
        return other, second

    return resume


WAYS = {
    "copied": by_state_dict(copy.deepcopy),
    "file": by_state_dict(through_file),
    "file, mapped": by_state_dict(lambda state: through_file(state, map_location=torch.device("cpu"))),
    "deepcopy": lambda model, optimizer, build, tmp_path: copy.deepcopy((model, optimizer)),
    "pickle": lambda model, optimizer, build, tmp_path: pickle.loads(pickle.dumps((model, optimizer))),
    "DCP": by_dcp(),
    "DCP, full": by_dcp(full_state_dict=True, cpu_offload=True),
    "DCP, flattened": by_dcp(flatten_optimizer_state_dict=True),
}


@every_optimizer
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.float64])
@pytest.mark.parametrize("way", WAYS)
def test_resume_is_bit_exact(build, dtype, way, tmp_path):
    """In every dtype and with stochastic rounding; dtypes of the state stay, which torch would cast to the parameter's."""
    model = Model(dtype)
    optimizer = build(model.parameters(), lr=0.05)
    train(model, optimizer, range(12))
    other, second = WAYS[way](model, optimizer, build, tmp_path)
    assert_same_bits(everything(other, second), everything(model, optimizer))
    pairs = zip(everything(other, second).values(), everything(model, optimizer).values(), strict=True)
    assert all(x.data_ptr() != y.data_ptr() for x, y in pairs)
    train(model, optimizer, range(12, 17))
    train(other, second, range(12, 17))
    assert_same_bits(everything(other, second), everything(model, optimizer))


@every_optimizer
@pytest.mark.parametrize("way", WAYS)
def test_resume_is_bit_exact_where_a_parameter_had_no_gradient(build, way, tmp_path):
    without = ("second", "bias")
    model = Model()
    optimizer = build(model.parameters(), lr=0.05)
    train(model, optimizer, range(3), without)
    other, second = WAYS[way](model, optimizer, build, tmp_path)
    train(model, optimizer, range(3, 6), without)
    train(other, second, range(3, 6), without)
    train(model, optimizer, range(6, 8))
    train(other, second, range(6, 8))
    assert_same_bits(everything(other, second), everything(model, optimizer))


@every_optimizer
def test_resume_is_bit_exact_after_add_param_group(build):
    model, late = Model(), Model()
    optimizer = build(model.parameters(), lr=0.05)
    train(model, optimizer, range(3))
    algorithm = optimizer.param_groups[0]["algorithm"]
    optimizer.add_param_group({"params": list(late.parameters()), "lr": 0.02, "algorithm": algorithm})
    both = nn.ModuleList([model, late])
    train(both, optimizer, range(3, 6))
    other = copy.deepcopy(both)
    groups = [{"params": list(m.parameters())} for m in other]
    second = build(groups, lr=0.05)
    second.load_state_dict(through_file(optimizer.state_dict()))
    train(both, optimizer, range(6, 9))
    train(other, second, range(6, 9))
    assert_same_bits(everything(other, second), everything(both, optimizer))


@every_optimizer
@pytest.mark.parametrize("dtype", DTYPES)
def test_state_holds_only_what_any_checkpoint_can(build, dtype):
    model = Model(dtype)
    optimizer = build(model.parameters(), lr=0.05)
    train(model, optimizer, range(2))
    state = optimizer.state_dict()["state"]
    assert len(state) == len(list(model.parameters()))
    assert all(type(x) is Tensor for values in state.values() for x in values.values())
    assert all(isinstance(name, str) for values in state.values() for name in values)


@every_optimizer
def test_older_checkpoints_are_filled_up(build):
    """What an earlier version did not have: an option in the groups, the count of skipped steps."""
    model = Model()
    optimizer = build(model.parameters(), lr=0.05)
    train(model, optimizer, range(3))
    old = copy.deepcopy(optimizer.state_dict())
    for name in ("capturable", "adamw_eps", "update_scale", "step", "update_interval"):
        old["param_groups"][0].pop(name, None)
    for values in old["state"].values():
        values.pop("skipped")
        values["step"] = values["step"].tolist() if values["step"].ndim == 0 else values["step"]
    other = copy.deepcopy(model)
    second = build(other.parameters(), lr=0.05)
    second.load_state_dict(old)
    assert optimizer.param_groups[0].keys() <= second.param_groups[0].keys()
    train(model, optimizer, range(3, 6))
    train(other, second, range(3, 6))
    assert_same_bits(everything(other, second), everything(model, optimizer))


@every_optimizer
def test_older_optimizers_are_filled_up(build):
    """One that was pickled before skipped steps were counted; and one whose options were changed is an error."""
    model = Model()
    optimizer = build(model.parameters(), lr=0.05)
    train(model, optimizer, range(3))
    other, second = copy.deepcopy((model, optimizer))
    for state in second.state.values():
        for name in [name for name in state if name.startswith("skipped")]:
            del state[name]
    train(model, optimizer, range(3, 5))
    train(other, second, range(3, 5))
    assert second.skipped_steps() == 0
    want = everything(model, optimizer)
    assert_same_bits({name: everything(other, second)[name] for name in want}, want)
    del second.state[other.first]["step"]
    with pytest.raises(RuntimeError, match=r"the state of a parameter of shape \(6, 9\) lacks \['step'\]"):
        train(other, second, range(5, 6))


@every_optimizer
def test_hooks_on_loading_see_and_change_the_checkpoint(build):
    model = Model()
    optimizer = build(model.parameters(), lr=0.05)
    train(model, optimizer, range(2))
    wrapped = {"inside": optimizer.state_dict(), "state": {}, "param_groups": []}
    second, seen = build(copy.deepcopy(model).parameters(), lr=0.05), []
    second.register_load_state_dict_pre_hook(lambda _, state: state["inside"])
    second.register_load_state_dict_post_hook(lambda o: seen.append([x.dtype for s in o.state.values() for x in s.values()]))
    second.load_state_dict(wrapped)
    assert seen == [[x.dtype for s in optimizer.state.values() for x in s.values()]]
    assert len(second._optimizer_load_state_dict_pre_hooks) == len(second._optimizer_load_state_dict_post_hooks) == 1


@every_optimizer
def test_a_checkpoint_does_not_depend_on_how_parameters_were_batched(build):
    """Two of one shape, computed together, go on alone: their state is their own."""
    model = Model()
    optimizer = build(model.parameters(), lr=0.05)
    train(model, optimizer, range(3))
    together, alone = copy.deepcopy((model, optimizer)), (model, optimizer)
    train(*together, range(3, 5))
    for t in range(3, 5):
        groups = [[name for name, _ in model.named_parameters()][i::2] for i in range(2)]
        steps = [copy.deepcopy(group["step"]) for group in optimizer.param_groups]
        for names in groups:  # in two calls, each with half of the parameters
            give_gradients(model, t, tuple({n for n, _ in model.named_parameters()} - set(names)))
            for group, step in zip(optimizer.param_groups, steps, strict=True):
                group["step"] = step
            optimizer.step()
    for (name, got), want in zip(everything(*alone).items(), everything(*together).values(), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-2 if got.dtype == torch.bfloat16 else 1e-5, atol=1e-2, msg=name)


@every_optimizer
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_step_of_zeros_with_no_learning_rate_changes_nothing(build, dtype, weight_decay):
    """What distributed checkpointing makes a state with: what follows is as if it had not been."""
    model = Model(dtype)
    other = copy.deepcopy(model)
    optimizer = build(model.parameters(), lr=0.05, weight_decay=weight_decay)
    second = build(other.parameters(), lr=0.05, weight_decay=weight_decay)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert_same_bits(dict(model.named_parameters()), dict(other.named_parameters()))
    for p in model.parameters():
        assert optimizer.state[p]["step"].sum() == 0 and optimizer.state[p]["skipped"].sum() == 0
    for group in optimizer.param_groups:
        group["lr"] = 0.05
    train(model, optimizer, range(14))
    train(other, second, range(14))
    assert_same_bits(everything(model, optimizer), everything(other, second))


@every_optimizer
def test_parameters_may_be_replaced_after_construction(build):
    """Which accelerate does."""
    model, other = Model(), Model()
    optimizer = build(model.parameters(), lr=0.05)
    reference = build(copy.deepcopy(other).parameters(), lr=0.05)
    optimizer.param_groups[0]["params"] = list(other.parameters())
    twin = nn.Module()
    for (name, _), p in zip(other.named_parameters(), reference.param_groups[0]["params"], strict=True):
        twin.register_parameter(name, p)
    train(other, optimizer, range(3))
    train(twin, reference, range(3))
    assert_same_bits(everything(other, optimizer), everything(twin, reference))


@every_optimizer
def test_keys_of_other_optimizers_are_accepted_where_they_say_no(build):
    model = Model()
    optimizer = build(model.named_parameters(), lr=0.05, fused=False, foreach=None)
    assert len(optimizer.param_groups[0]["param_names"]) == len(list(model.parameters()))
    optimizer.param_groups[0]["foreach"] = False
    train(model, optimizer, range(2))
    with pytest.raises(TypeError, match="has no option `fused`, got True"):
        build(model.parameters(), lr=0.05, fused=True)


# --- Stepping ---------------------------------------------------------------------------------------------------------


@every_optimizer
def test_the_closure_runs_with_gradients_and_its_value_returns(build):
    model = Model()
    optimizer, losses = build(model.parameters(), lr=0.05), []

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in model.parameters())
        loss.backward()
        return loss

    with torch.no_grad():
        losses = [optimizer.step(closure=closure) for _ in range(5)]
    assert losses[-1] < losses[0] and optimizer.step() is None


@every_optimizer
def test_maximize_is_the_negative_gradient(build):
    model = Model()
    other = copy.deepcopy(model)
    down, up = build(model.parameters(), lr=0.05), build(other.parameters(), lr=0.05, maximize=True)
    for t in range(3):
        give_gradients(model, t)
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            q.grad = -p.grad
        down.step()
        up.step()
    assert_same_bits(dict(model.named_parameters()), dict(other.named_parameters()))


@every_optimizer
def test_the_learning_rate_may_be_a_tensor_that_schedulers_fill(build):
    model = Model()
    other = copy.deepcopy(model)
    lr = torch.tensor(0.04)
    by_tensor, by_number = build(model.parameters(), lr=lr), build(other.parameters(), lr=0.04)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(o, lambda t: 0.5**t) for o in (by_tensor, by_number)]
    for t in range(3):
        train(model, by_tensor, range(t, t + 1))
        train(other, by_number, range(t, t + 1))
        for scheduler in schedulers:
            scheduler.step()
    assert by_tensor.param_groups[0]["lr"] is lr and lr == 0.005
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@every_optimizer
@pytest.mark.parametrize("overflows", [False, True])
def test_gradient_scaling(build, overflows):
    model = Model()
    other = copy.deepcopy(model)
    optimizer, plain = build(model.parameters(), lr=0.05), build(other.parameters(), lr=0.05)
    train(model, optimizer, range(2))
    train(other, plain, range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = snapshot(model, optimizer)
    scaler.scale(sum(p.square().sum() for p in model.parameters()))  # which makes its scale
    give_gradients(model, 2)
    for p in model.parameters():
        p.grad *= math.inf if overflows else 1024.0
    scaler.step(optimizer)
    scaler.update()
    if overflows:
        assert_same_bits(snapshot(model, optimizer), before)
        assert scaler.get_scale() == 512
    else:
        train(other, plain, range(2, 3))
        assert_same_bits(everything(model, optimizer), everything(other, plain))


@every_optimizer
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "maximize": True}, {"lr": "tensor"}], ids=str)
def test_a_step_reads_no_value_of_a_tensor(build, options):
    """No synchronisation with the host: tensors here have no values, and whatever asks for one, or for a shape that depends on
    one, fails."""
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lr = torch.tensor(0.1) if "lr" in options else 0.1
        model = Model()
        optimizer = build(model.parameters(), **(options | {"lr": lr}))
        for _ in range(3 if optimizer.param_groups[0]["update_interval"] == 1 else 14):  # also where not all factors are due
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step()
        count = optimizer.skipped_steps()
        with pytest.raises(DataDependentOutputException):
            count.item()


@every_optimizer
def test_capturable_steps_are_the_same(build):
    model = Model()
    other = copy.deepcopy(model)
    optimizer = build(model.parameters(), lr=torch.tensor(0.05), capturable=True, update_interval=1)
    plain = build(other.parameters(), lr=torch.tensor(0.05), update_interval=1)
    addresses = []
    for t in range(4):
        train(model, optimizer, range(t, t + 1))
        train(other, plain, range(t, t + 1))
        addresses.append([x.data_ptr() for x in everything(model, optimizer).values()])
        addresses[-1] += [x.data_ptr() for x in optimizer._buffers.values()]
    assert_same_bits(everything(model, optimizer), everything(other, plain))
    assert addresses[1] == addresses[2] == addresses[3]  # a graph reads and writes where it did when it was captured


@every_optimizer
def test_capturable_is_refused_where_a_graph_would_go_wrong(build, monkeypatch):
    model = Model()
    with pytest.raises(ValueError, match=r"`capturable=True` needs `update_interval=1`.*got 2"):
        build(model.parameters(), lr=0.05, capturable=True, update_interval=2)
    with pytest.raises(ValueError, match=r"a tensor `lr` must be on cpu as parameter 0 of shape \(6, 9\) is, got meta"):
        build(model.parameters(), lr=torch.empty((), device="meta"), capturable=True, update_interval=1)
    plain = build(model.parameters(), lr=0.05, update_interval=1)
    captured = build(Model().parameters(), lr=0.05, capturable=True, update_interval=1)
    for name in ("is_initialized", "is_current_stream_capturing"):
        monkeypatch.setattr(torch.cuda, name, lambda: True)
    captured.step()
    before = snapshot(model, plain)
    give_gradients(model, 0)
    with pytest.raises(RuntimeError, match=r"a CUDA graph captures a step of .*needs capturable=True"):
        plain.step()
    assert_same_bits(snapshot(model, plain), before)


# Compiling takes long: both kinds of learning rate for the first optimizer, one or the other for each of the rest.
@pytest.mark.parametrize(
    ("build", "tensor_lr"),
    [
        pytest.param(build, tensor_lr, id=f"{name}-{tensor_lr}")
        for i, (name, build) in enumerate(OPTIMIZERS.items())
        for tensor_lr in (False, True)
        if i == 0 or tensor_lr == bool(i % 2)
    ],
)
def test_a_compiled_step_is_not_compiled_again(build, tensor_lr):
    """From the second step on, while learning rate, gradients and counters change; the result is that of the eager step."""
    torch._dynamo.reset()
    model = Model()
    other = copy.deepcopy(model)
    lrs = [torch.tensor(0.05) if tensor_lr else 0.05 for _ in range(2)]
    optimizer, eager = build(model.parameters(), lr=lrs[0]), build(other.parameters(), lr=lrs[1])
    interval = optimizer.param_groups[0]["update_interval"]
    counter = CompileCounterWithBackend("eager")
    compiled, counts = torch.compile(optimizer.step, backend=counter), []
    for t in range(13 + 2 * interval):
        for o in (optimizer, eager):
            if tensor_lr:
                o.param_groups[0]["lr"].fill_(0.05 / (t + 1))
            else:
                o.param_groups[0]["lr"] = 0.05 / (t + 1)
        give_gradients(model, t)
        compiled()
        train(other, eager, range(t, t + 1))
        counts.append(counter.frame_count)
    first = counts[1]  # the first step makes the state
    assert counts[1:9] == [first] * 8
    assert counts[-1] == (first if interval == 1 else counts[-1 - interval]) <= first + interval
    assert_same_bits(everything(model, optimizer), everything(other, eager))


@every_optimizer
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_inputs_give_the_same_bits(build, dtype):
    def run() -> dict[str, Tensor]:
        torch.manual_seed(5)
        model = Model(dtype)
        optimizer = build(model.parameters(), lr=0.05)
        train(model, optimizer, range(13))
        return everything(model, optimizer)

    assert_same_bits(run(), run())


@every_optimizer
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_trains(build, shape):
    p = nn.Parameter(torch.ones(shape))
    optimizer = build([p], lr=0.01)
    for t in range(13):
        p.grad = (p.detach() + 0.01 * torch.randn(shape, generator=torch.Generator().manual_seed(t))).reshape(shape)
        optimizer.step()
    assert p.isfinite().all() and (p.numel() == 0 or p.abs().mean() < 1)
    assert all(x.isfinite().all() for x in optimizer.state[p].values()) and (p.numel() > 0 or not optimizer.state[p])


@every_optimizer
def test_layouts_do_not_matter(build):
    matrix, conv = torch.randn(6, 9), torch.randn(6, 4, 3, 3)
    plain = [nn.Parameter(matrix), nn.Parameter(conv)]
    strided = [nn.Parameter(matrix.T.contiguous().T), nn.Parameter(conv.clone().to(memory_format=torch.channels_last))]
    first, second = build(plain, lr=0.05), build(strided, lr=0.05)
    for _ in range(3):
        for p, q in zip(plain, strided, strict=True):
            p.grad = torch.randn(p.shape)
            q.grad = torch.empty_like(q, memory_format=torch.preserve_format).copy_(p.grad)
        first.step()
        second.step()
    for p, q in zip(plain, strided, strict=True):
        assert not q.is_contiguous()
        torch.testing.assert_close(p, q)


@every_optimizer
def test_tied_weights_step_once(build):
    p = nn.Parameter(torch.randn(4, 5))
    q = nn.Parameter(p.detach().clone())
    with pytest.warns(UserWarning, match="duplicate parameters"):
        tied = build([p, p], lr=0.05)
    once = build([q], lr=0.05)
    for _ in range(3):
        p.grad = torch.randn(4, 5)
        q.grad = p.grad.clone()
        tied.step()
        once.step()
    assert torch.equal(p, q) and len(tied.state_dict()["state"]) == 1
    with pytest.raises(ValueError, match="more than one parameter group"):
        build([{"params": [p]}, {"params": [p]}], lr=0.05)


@every_optimizer
@pytest.mark.parametrize("spread", ["equal", "nearly equal", "12 decades"])
def test_eigenvalues_of_any_kind(build, spread):
    """All equal, as they are at the start; near each other; over 12 decades."""
    nearly = 1 + 1e-6 * torch.arange(8.0)
    size = {"equal": torch.ones(8), "nearly equal": nearly, "12 decades": torch.logspace(-6, 6, 8)}[spread]
    p = nn.Parameter(torch.zeros(8, 8))
    optimizer = build([p], lr=0.01)
    for t in range(60):
        q = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(t)))[0]
        p.grad = size.sqrt()[:, None] * q
        optimizer.step()
    assert optimizer.skipped_steps() == 0 and p.isfinite().all()
    if optimizer.param_groups[0].get("update_scale"):  # else it takes the step that the curvature of one gradient asks for
        assert p.abs().max() < 10
    assert all(x.isfinite().all() for x in optimizer.state[p].values())


@every_optimizer
def test_a_parameter_is_skipped_as_a_whole_and_counted(build):
    """One NaN in one expert: all experts stay, the others train on as if nothing had happened."""
    model = Model()
    other = copy.deepcopy(model)
    optimizer, clean = build(model.parameters(), lr=0.05), build(other.parameters(), lr=0.05)
    for t in range(14):
        give_gradients(model, t)
        give_gradients(other, t)
        if t in (2, 12):
            model.experts.grad[1, 2, 3] = math.nan
            model.bias.grad[0] = math.inf
            other.experts.grad = other.bias.grad = None
        before = snapshot(model, optimizer)
        optimizer.step()
        clean.step()
        if t in (2, 12):
            after = everything(model, optimizer)
            kept = [name for name in before if name.startswith(("experts", "bias")) and not name.endswith("skipped")]
            assert len(kept) > 5
            assert_same_bits({name: after[name] for name in kept}, {name: before[name] for name in kept})
    assert optimizer.skipped_steps() == 4 and clean.skipped_steps() == 0
    assert optimizer.state[model.bias]["skipped"] == 2
    got, want = everything(model, optimizer), everything(other, clean)
    for name in [name for name in want if name.endswith("skipped")]:
        del got[name], want[name]
    assert_same_bits(got, want)


def test_every_optimizer_is_listed():
    public = [getattr(optim, name) for name in optim.__all__]
    classes = {value for value in public if isinstance(value, type) and issubclass(value, Optimizer)}
    built = [type(build(Model().parameters(), lr=0.05)) for build in OPTIMIZERS.values()]  # which may be special cases
    assert classes and {c for kind in built for c in kind.__mro__ if c in classes} == classes
