"""IF-Shampoo against its authors' package, in bfloat16, and what a user expects of it and the other root-free optimizers."""

import copy
import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from spectral_ops.optim import IFShampoo, RFAdaGrad, RFFullAdaGrad, RFRMSprop, RFShampoo, if_shampoo

KRONECKER = (IFShampoo, RFShampoo, RFFullAdaGrad)
BOX = {"update_scale": None}


def parameters(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape, dtype=torch.float64).to(dtype)) for shape in shapes]


def copies(params: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone()) for p in params]


def gradients(params: list[nn.Parameter], t: int) -> None:
    """They depend on the step, the parameter's place and its value."""
    for i, p in enumerate(params):
        noise = torch.randn(p.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1000 * t + i + 1))
        p.grad = (noise + 0.1 * p.detach().double()).to(p.dtype)


def run(optimizer: Optimizer, steps: int, start: int = 0) -> None:
    for t in range(start, start + steps):
        gradients([p for group in optimizer.param_groups for p in group["params"]], t)
        optimizer.step()


def error(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


# --- The authors' package ---------------------------------------------------------------------------------------------

SHAPES = ((), (1,), (5,), (4, 6), (6, 4), (1, 5), (3, 4, 5), (2, 1, 3), (3, 2, 4, 5), (1, 1))


def pair(shapes, T=1, **options):
    """`sirfshampoo` and ours, on copies of the same parameters; options by the package's names."""
    package = pytest.importorskip("sirfshampoo", reason="it is of the extra `bench`, which `make setup` installs")
    model = nn.Module()
    for i, p in enumerate(parameters(*shapes)):
        model.register_parameter(f"p{i}", p)
    theirs, mine = list(model.parameters()), copies(list(model.parameters()))
    names = {"beta2": "preconditioner_lr", "alpha1": "momentum", "alpha2": "riemannian_momentum"}
    names |= {"lam": "damping", "kappa": "weight_decay"}
    options = {"lr": 0.01, "batch_size": 1} | options
    ours = {names.get(name, name): value for name, value in options.items()}
    group = {"params": mine, "algorithm": "matrix", "per_axis": True}
    return theirs, mine, package.SIRFShampoo(model, T=T, **options), IFShampoo([group], **BOX, **ours)


def assert_same_way(theirs, mine, package, ours) -> None:
    before = copies(theirs)
    for t in range(40):
        gradients(theirs, t)
        gradients(mine, t)
        package.step()
        ours.step()
    for p, q, old in zip(theirs, mine, before, strict=True):
        assert error(p, old) > 1e-3  # it did move
        assert error(q, p) < 1e-10


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"alpha1": 0.0, "alpha2": 0.0, "lam": 0.0},
        {"alpha1": 0.5, "alpha2": 0.9, "lam": 0.1, "kappa": 0.05, "beta2": 0.3},
        {"batch_size": 7, "beta2": 0.1, "lr": 0.02},
    ],
    ids=str,
)
def test_it_is_the_authors_package(options):
    """One factor for each axis that is longer than 1; also of scalars and vectors."""
    assert_same_way(*pair(SHAPES, **options))


@pytest.mark.parametrize("interval", [2, 3, 5])
def test_an_interval_is_the_packages_but_for_whose_turn_it_is(interval):
    """The package's T = k updates all factors in steps 0, k, 2k, …. Ours does in each of the first ten, and then spreads those
    of all matrices over the interval, so that no step costs more than another: of one matrix, in its middle. That is on
    purpose. The package takes a function for T too, and with our turns it goes the same way."""
    turns = lambda t: t < 10 or (t + 1) % interval == interval // 2  # noqa: E731  it counts from 0
    theirs, mine, package, ours = pair([(4, 6)], turns, beta2=0.1)
    ours.param_groups[0]["update_interval"] = interval
    assert_same_way(theirs, mine, package, ours)
    updates = 10 + sum(map(turns, range(10, 40)))
    assert ours.state[mine[0]]["updates"] == updates and abs(updates - 10 - 30 / interval) <= 1


# --- bfloat16 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("riemannian_momentum,bound", [(0.5, 0.07), (0.9, 0.05)])
def test_bfloat16_factors_follow_those_of_float32(riemannian_momentum, bound, monkeypatch):
    """Gradients whose covariance is `A ⊗ B`, both of condition 1000; 2,000 updates of the paper's length. Most are less than
    half of bfloat16's step: rounded to nearest they are lost, and rounded stochastically they are not, on average. What remains
    is noise, less of it the smoother the updates are. In units of the preconditioned gradient: 0.05, 0.04 with the longer
    momentum, and 0.99 for rounding to nearest."""
    n, m = 32, 24
    rows, columns = (torch.linalg.qr(torch.randn(size, size))[0] * torch.logspace(0, -1.5, size) for size in (n, m))
    steps = [rows @ torch.randn(n, m) @ columns.T for _ in range(2000)]
    probes = torch.stack([rows @ torch.randn(n, m) @ columns.T for _ in range(20)])

    def preconditioned(dtype: torch.dtype) -> Tensor:
        w = nn.Parameter(torch.zeros(n, m))
        options = {"preconditioner_lr": 0.01, "riemannian_momentum": riemannian_momentum} | BOX
        optimizer = IFShampoo([w], lr=0.0, preconditioner_dtype=dtype, **options)
        for g in steps:
            w.grad = g
            optimizer.step()
        c, k = (optimizer.state[w][f"factor_{i}"] for i in (0, 1))
        assert c.dtype == k.dtype == dtype
        c, k = c.float(), k.float()
        return c @ c.T @ probes @ k @ k.T

    want, got = preconditioned(torch.float32), preconditioned(torch.bfloat16)
    monkeypatch.setattr(if_shampoo, "seeds", lambda *_: None)
    nearest = preconditioned(torch.bfloat16)
    assert error(got, want) < bound and abs((got * want).sum() / want.square().sum() - 1) < 0.03
    assert error(nearest, want) > 0.8


# --- Batch size -------------------------------------------------------------------------------------------------------


def forms(size: float):
    return {
        "function": lambda: size,
        "function of a tensor": lambda: torch.tensor(float(size)),
        "tensor": torch.tensor(size),
        "float64": torch.tensor([size], dtype=torch.float64),
        "1 x 1": torch.tensor([[float(size)]]),
    }


@pytest.mark.parametrize("method", KRONECKER)
@pytest.mark.parametrize("form", forms(1))
@pytest.mark.parametrize("update_scale", ["rms", None])
def test_a_batch_size_is_a_number_a_tensor_or_a_function(method, form, update_scale):
    first = parameters((3, 4), (3, 4), dtype=torch.float32)
    second, start = copies(first), copies(first)
    options = {"lr": 0.05, "update_scale": update_scale}
    run(method(first, batch_size=8, **options), 5)
    run(method(second, batch_size=forms(8)[form], **options), 5)
    for p, q, old in zip(first, second, start, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
        assert not torch.equal(p, old)


@pytest.mark.parametrize("method", [RFRMSprop, RFAdaGrad])
def test_a_batch_size_of_the_diagonal_methods_is_a_number_or_a_function(method):
    (p,) = parameters((3, 4))
    (q,) = copies([p])
    run(method([p], batch_size=8), 5)
    run(method([q], batch_size=lambda: 8), 5)
    assert torch.equal(p, q)
    with pytest.raises(TypeError, match="`batch_size`"):
        method([p], batch_size=torch.tensor(8))


@pytest.mark.parametrize("method", [*KRONECKER, RFRMSprop, RFAdaGrad])
def test_a_function_is_called_once_a_step_and_group_and_is_not_saved(method):
    calls: list[str] = []
    size = lambda name: lambda: calls.append(name) or 4  # noqa: E731
    params = parameters((3, 4), (3,), (2, 5))
    groups = [{"params": params[:2]}, {"params": params[2:], "batch_size": size("second")}]
    optimizer = method(groups, batch_size=size("first"))
    run(optimizer, 3)
    assert sorted(calls) == ["first"] * 3 + ["second"] * 3
    state = copy.deepcopy(optimizer.state_dict())
    assert not any("batch_size" in group for group in state["param_groups"])
    other = method([{"params": group["params"]} for group in groups], batch_size=2)
    for group, name in zip(other.param_groups, ("third", "fourth"), strict=True):
        group["batch_size"] = size(name)
    other.load_state_dict(state)
    calls.clear()
    run(other, 1)
    assert sorted(calls) == ["fourth", "third"]


# --- Shapes -----------------------------------------------------------------------------------------------------------


def parts_equal(method: type, whole: nn.Parameter, parts: list[nn.Parameter], cut, group: dict, **options) -> None:
    """The same steps, whether a parameter is whole or in parts."""
    first, second = method([{"params": [whole], **group}], lr=0.05, **options), method(parts, lr=0.05, **options)
    for t in range(5):
        gradients([whole], t)
        for p, g in zip(parts, cut(whole.grad), strict=True):
            p.grad = g.clone()
        first.step()
        second.step()
    for p, x in zip(parts, cut(whole.detach()), strict=True):
        torch.testing.assert_close(p.detach(), x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", [IFShampoo, RFShampoo])
@pytest.mark.parametrize("update_scale", ["rms", None])
def test_experts_are_matrices_and_so_are_convolutions(method, update_scale):
    (experts, conv, conv1d) = parameters((3, 5, 4), (6, 3, 2, 2), (6, 3, 2))
    options = {"update_scale": update_scale}
    parts_equal(method, experts, copies(list(experts.detach())), list, {}, **options)
    parts_equal(method, conv, copies([conv.detach().flatten(1)]), lambda x: [x.flatten(1)], {}, **options)
    parts_equal(method, conv1d, copies([conv1d.detach().flatten(1)]), lambda x: [x.flatten(1)], {"conv": True}, **options)
    fused = parameters((6, 4))[0]
    halves = lambda x: list(x.split(3))  # noqa: E731
    parts_equal(method, fused, copies(halves(fused.detach())), halves, {"split_sizes": [3, 3]}, **options)


@pytest.mark.parametrize("method", [IFShampoo, RFShampoo])
def test_a_factor_for_each_axis(method):
    tensor, squeezed, vector = parameters((2, 3, 4), (2, 1, 3), (5,))
    optimizer = method([tensor, squeezed, vector], per_axis=True)
    run(optimizer, 2)
    factors = [[s[f"factor_{i}"].shape[-1] for i in range(4) if f"factor_{i}" in s] for s in optimizer.state.values()]
    assert factors == [[2, 3, 4], [2, 3], []]  # axes of length 1 have none; a vector takes AdamW unless it is asked for
    for name, value in {"split_sizes": [1, 1], "num_heads": 2, "conv": True}.items():
        with pytest.raises(ValueError, match=f"`per_axis=True` .* does not cut it: got {{'{name}'"):
            method([{"params": parameters((2, 3)), "per_axis": True, name: value}])


def sparse(*shape: int, t: int) -> Tensor:
    """At most one number in each row and column, so that products over one axis are diagonal."""
    g = torch.zeros(shape, dtype=torch.float64)
    if len(shape) == 1:
        g[t % len(g)] = torch.randn(())
        return g
    rows, columns = (torch.randperm(size)[: min(shape)] for size in shape)
    g[rows, columns] = torch.randn(min(shape), dtype=torch.float64)
    return g


@pytest.mark.filterwarnings("ignore:.* got a (matrix|tensor)")
@pytest.mark.parametrize(
    "method,options,shape",
    [
        *((method, {}, (4, 6)) for method in (IFShampoo, RFShampoo)),
        *((method, {"per_axis": True}, (6,)) for method in (IFShampoo, RFShampoo)),
        (RFFullAdaGrad, {}, (6,)),
        (RFFullAdaGrad, {"inverse_free": False}, (6,)),
    ],
)
@pytest.mark.parametrize("limit", [4, 1])
@pytest.mark.parametrize("update_scale", ["rms", None])
def test_sides_over_the_limit_are_diagonal(method, options, shape, limit, update_scale):
    """As the whole factor is on gradients that leave it so."""
    dense, diagonal = parameters(shape, shape)
    diagonal.data.copy_(dense)
    first, second = (
        method(
            [{"params": [p], "algorithm": "matrix"}], lr=0.05, preconditioner_lr=0.05, max_preconditioner_dim=size,
            update_scale=update_scale, **options,
        )
        for p, size in ((dense, 8192), (diagonal, limit))
    )  # fmt: skip
    before = dense.detach().clone()
    for t in range(20):
        dense.grad = sparse(*shape, t=t)
        diagonal.grad = dense.grad.clone()
        first.step()
        second.step()
    for i, size in enumerate(shape):
        name = f"inverse_{i}" if method is RFFullAdaGrad else f"factor_{i}"
        assert second.state[diagonal][name].shape == ((size,) if size > limit else (size, size))
    assert error(dense, before) > 1e-3 and error(diagonal, dense) < 1e-10


def test_it_warns_of_an_axis_over_the_limit_and_of_nothing_else(recwarn):
    run(IFShampoo(parameters((2, 30, 30)), per_axis=True, max_preconditioner_dim=100), 1)
    assert not recwarn
    with pytest.warns(UserWarning, match="max_preconditioner_dim=20"):
        run(IFShampoo(parameters((2, 30, 30)), per_axis=True, max_preconditioner_dim=20), 1)


# --- Updates ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", KRONECKER)
@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("update_scale", ["rms", "clip"])
def test_scaled_updates_are_invariant_to_the_scale_of_the_loss(method, scale, update_scale):
    """As in Claims 6 and 8, the batch size is that of a mean; the factors start at the scale of the first gradient."""
    (p,) = parameters((3, 4))
    (q,) = copies([p])
    before = p.detach().clone()
    first, second = (method([x], lr=0.05, update_scale=update_scale, batch_size=b) for x, b in ((p, 4), (q, 4 / scale)))
    for t in range(20):
        gradients([p], t)
        q.grad = scale * p.grad
        first.step()
        second.step()
    assert error(p, before) > 0.01 and error(q, p) < 1e-10


@pytest.mark.parametrize("method", KRONECKER)
def test_updates_of_one_size_do_not_know_the_batch_size(method):
    (p,) = parameters((3, 4))
    (q,) = copies([p])
    run(method([p], lr=0.05), 20)
    run(method([q], lr=0.05, batch_size=64), 20)
    assert error(q, p) < 1e-5  # what guards the division by the update's norm


@pytest.mark.parametrize("method", KRONECKER)
def test_updates_have_the_root_mean_square_that_was_asked_for(method):
    for update_scale, allowed in (("rms", 0.2), ("clip", 1.0)):
        (p,) = parameters((6, 9))
        optimizer = method([p], lr=1.0, update_scale=update_scale)
        for t in range(4):
            before = p.detach().clone()
            run(optimizer, 1, start=t)
            rms = (p.detach() - before).square().mean().sqrt().item()
            assert math.isclose(rms, allowed, rel_tol=1e-6) if update_scale == "rms" else rms <= allowed * (1 + 1e-6)


@pytest.mark.parametrize("method", KRONECKER)
@pytest.mark.parametrize("update_scale,decoupled", [("rms", None), ("rms", True), (None, True)])
def test_decoupled_weight_decay_leaves_the_momentum(method, update_scale, decoupled):
    (p,) = parameters((3, 4))
    (q,) = copies([p])
    options = {"lr": 0.1, "update_scale": update_scale, "decoupled_weight_decay": decoupled}
    first, second = method([p], **options), method([q], weight_decay=0.5, **options)
    for t in range(5):
        gradients([p], t)
        q.grad, change, before = p.grad.clone(), p.detach().clone(), q.detach().clone()
        first.step()
        second.step()
        torch.testing.assert_close(q.detach() - before, p.detach() - change - 0.1 * 0.5 * before, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", [IFShampoo, RFShampoo])
def test_coupled_weight_decay_is_preconditioned_where_the_momentum_is(method):
    """With `update_scale=None` it is the box's, see test_root_free.py."""
    (p,) = parameters((3, 4))
    (q,) = copies([p])
    before = p.detach().clone()
    options = {"lr": 0.1, "momentum": 0.0, "decoupled_weight_decay": False}
    first, second = method([p], **options), method([q], weight_decay=0.5, **options)
    gradients([p, q], 0)
    q.grad = p.grad.clone()
    first.step()
    second.step()
    state = second.state[q]
    a, b = (state[f"factor_{i}"] @ state[f"factor_{i}"].T if method is IFShampoo else state[f"inverse_{i}"] for i in (0, 1))
    u = a @ (p.grad + 0.5 * before) @ b
    torch.testing.assert_close(q.detach(), before - 0.1 * 0.2 * u / u.square().mean().sqrt(), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(p, q)


@pytest.mark.parametrize("method", KRONECKER)
@pytest.mark.parametrize("options", [{}, BOX, {"weight_decay": 0.1, **BOX}], ids=str)
def test_maximize_is_the_negative_gradient(method, options):
    (p,) = parameters((3, 4))
    (q,) = copies([p])
    first, second = method([p], **options), method([q], maximize=True, **options)
    for t in range(4):
        gradients([p], t)
        q.grad = -p.grad
        first.step()
        second.step()
    assert torch.equal(p, q)


@pytest.mark.parametrize("method", KRONECKER)
@pytest.mark.parametrize("options", [{}, BOX], ids=str)
@pytest.mark.parametrize("size", [0.0, 1e-16, float("nan"), float("inf")])
def test_gradients_that_say_nothing_leave_the_factors(method, options, size):
    """Zero is on purpose unlike the box, in which a factor forgets by γ also where no gradient came."""
    (p,) = parameters((3, 4))
    optimizer = method([p], weight_decay=0.1, **options)
    run(optimizer, 3)
    before = copy.deepcopy(optimizer.state[p])
    p.grad = torch.full_like(p, size)
    optimizer.step()
    names = [name for name in before if name.startswith(("factor", "inverse", "momentum_0", "momentum_1", "scale", "updates"))]
    assert len(names) >= 3 and all(torch.equal(optimizer.state[p][name], before[name]) for name in names)
    assert p.isfinite().all() and optimizer.skipped_steps() == (not math.isfinite(size))


@pytest.mark.parametrize("method", KRONECKER)
def test_factors_update_in_turns(method):
    """All in the first ten steps, then each of three matrices in a step of its own."""
    params = parameters((3, 4), (3, 4), (3, 4))
    optimizer = method(params, update_interval=3)
    run(optimizer, 10)
    counts = [[optimizer.state[p]["updates"].item() for p in params]]
    assert counts == [[10, 10, 10]]
    for t in range(6):
        run(optimizer, 1, start=10 + t)
        counts.append([optimizer.state[p]["updates"].item() for p in params])
    turns = [[b - a for a, b in zip(*two, strict=True)] for two in itertools.pairwise(counts)]
    assert all(sum(turn) == 1 for turn in turns) and counts[-1] == [12, 12, 12] and turns[:3] == turns[3:]


# --- Options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method,name,value",
    [
        *((method, *bad) for method in KRONECKER for bad in (
            ("momentum", 1.0), ("preconditioner_lr", 1.0), ("preconditioner_lr", 0.0), ("damping", -1.0), ("gamma", 0.5),
            ("batch_size", 0), ("batch_size", "8"), ("batch_size", torch.ones(2)), ("max_preconditioner_dim", 0),
            ("update_interval", 0), ("update_scale", "adam"), ("preconditioner_dtype", torch.float16),
            ("decoupled_weight_decay", 2), ("weight_decay", -0.1), ("lr", -1.0),
        )),
        (IFShampoo, "riemannian_momentum", 1.0),
        (IFShampoo, "per_axis", "yes"),
        (RFShampoo, "per_axis", "yes"),
        (RFFullAdaGrad, "damping", 0.1),
        (RFFullAdaGrad, "inverse_free", "no"),
        *((method, *bad) for method in (RFRMSprop, RFAdaGrad) for bad in (
            ("momentum", -0.1), ("eps", -1.0), ("decoupled_weight_decay", None), ("batch_size", -1),
        )),
        (RFRMSprop, "alpha", 1.0),
        (RFAdaGrad, "preconditioner_lr", 1.5),
    ],
)  # fmt: skip
def test_errors_name_the_option(method, name, value):
    with pytest.raises((TypeError, ValueError), match=f"`{name}`"):
        method(parameters((3, 4)), **{name: value})
    with pytest.raises((TypeError, ValueError), match=f"`{name}`"):
        method([{"params": parameters((3, 4)), name: value}])


@pytest.mark.parametrize("method", [*KRONECKER, RFRMSprop, RFAdaGrad])
def test_unknown_options_are_refused(method):
    with pytest.raises(TypeError, match="no option `betas`"):
        method(parameters((3, 4)), betas=(0.9, 0.99))
