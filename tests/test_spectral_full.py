"""SpectralFull: the paper's boxes and the tracking rotation as plain float64 loops, its diagonal forms against torch's own
optimizers, and what one matrix over several parameters must survive. One for each parameter goes through test_contract.py."""

import copy
import io
import itertools
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from spectral_ops.optim import SpectralFull

SHAPES = (3, 2), (4,), (1, 2)  # 12 elements


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def parameters(shapes: tuple[tuple[int, ...], ...] = SHAPES, dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    return [nn.Parameter(draw(*shape).to(dtype)) for shape in shapes]


def vector(tensors: list[Any]) -> Tensor:
    return torch.cat([x.detach().flatten() for x in tensors])


def sizes(params: list[nn.Parameter]) -> list[int]:
    return [p.numel() for p in params]


def gradients(n: int, steps: int) -> Callable[[Tensor, int], Tensor]:
    """A gradient that changes with the weights and, as a mini-batch's does, with the step; directions differ in scale."""
    target, noise, mix = draw(n), draw(steps, n), draw(n, n) * 3.0 ** -torch.arange(n)
    return lambda w, t: mix @ (torch.tanh(w - target) + 0.5 * noise[t])


def train(optimizer: SpectralFull, params: list[nn.Parameter], gradient: Callable[[Tensor, int], Tensor], steps: int) -> Tensor:
    for t in range(steps):
        g = gradient(vector(params), t)
        for p, part in zip(params, g.split(sizes(params)), strict=True):
            p.grad = part.reshape(p.shape).to(p.dtype)
        optimizer.step()
    return vector(params)


def assert_same_way(got: Tensor, want: Tensor, start: Tensor, bound: float = 1e-11) -> None:
    assert (want - start).norm() > 0.01 * start.norm()  # it did move
    assert (got - want).abs().max() <= bound * want.abs().max().clamp(min=1)


# --- The boxes, transcribed -------------------------------------------------------------------------------------------


def paper(w: Tensor, gradient: Any, steps: int, lr: float, beta2: float, p: float, gamma: float, exact: bool, damping: float):
    """Lin et al., 2025, the top box of Fig. 1 (exact) and the right one of Fig. 5, with loops where the paper has indices."""
    n = len(w)
    d, b, eye = torch.ones(n).double(), torch.eye(n).double(), torch.eye(n).double()
    for t in range(steps):
        g = gradient(w, t)
        curvature = b.T @ torch.outer(g, g) @ b
        u = torch.zeros(n, n).double()
        for i, j in itertools.product(range(n), range(n)):
            if i > j and abs(d[i] - d[j]) > 1e-6 * max(d[i], d[j]):
                u[i, j] = -curvature[i, j] / (d[i] - d[j])
        x = beta2 / 2 * (u - u.T)
        if exact:
            d = d * torch.exp(beta2 / d * (-gamma * d + curvature.diagonal()))
        else:
            d = (1 - gamma * beta2) * d + beta2 * (curvature.diagonal() + damping)
        b = b @ (eye + x) @ torch.linalg.inv(eye - x)
        w = w - lr * b @ torch.diag(d ** (-1 / p)) @ b.T @ g
    return w


@pytest.mark.parametrize("root", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("gamma", [0, 1])
@pytest.mark.parametrize("exact", [True, False])
def test_riemannian_is_the_papers_box(root, gamma, exact):
    """Over three parameters, which are one vector: a single one of all elements goes the same way, bit for bit."""
    params, steps, lr, beta2, damping = parameters(), 40, 0.02, 0.02, 0.0 if exact else 0.03
    gradient, start = gradients(12, steps), vector(params)
    options = {
        "lr": lr, "betas": (0, 1 - beta2), "eps": 0.0, "rotation": "riemannian", "update_scale": None, "root": root,
        "gamma": gamma, "exact": exact, "damping": damping,
    }  # fmt: skip
    whole = [nn.Parameter(start.clone())]
    got = train(SpectralFull(params, **options), params, gradient, steps)
    want = paper(start, gradient, steps, lr, 1 - (1 - beta2), root, gamma, exact, damping)
    assert_same_way(got, want, start, 1e-9)  # a gap between eigenvalues amplifies rounding by its inverse
    assert torch.equal(train(SpectralFull(whole, **options), whole, gradient, steps), got)


def test_the_truncated_cayley_map_is_close_to_the_exact_one():
    ends = []
    for order in (None, 8):
        torch.manual_seed(0)
        params = parameters()
        gradient = gradients(12, 30)
        options = {"rotation": "riemannian", "betas": (0, 0.99), "update_scale": None, "lr": 0.02, "cayley_order": order}
        optimizer = SpectralFull(params, **options)
        start = vector(params)
        ends.append(train(optimizer, params, gradient, 30))
    assert 0 < (ends[0] - ends[1]).norm() < 0.1 * (ends[0] - start).norm()


def tracking(w: Tensor, gradient: Any, steps: int, lr: float, mu: float, decay: float, p: float, gamma: float, eps: float):
    """The average in a basis that turns towards its eigenvectors by bounded steps, and normalised updates."""
    n = len(w)
    b, eye, momentum, s = torch.eye(n).double(), torch.eye(n).double(), torch.zeros(n).double(), None
    for t in range(steps):
        g = gradient(w, t)
        s = (g**2).mean() * eye if s is None else s  # of here on in the basis
        share = 1 - decay if gamma == 0 else (1 - decay) / (1 - decay ** (t + 2))
        s = (1 - gamma * share) * s + share * torch.outer(b.T @ g, b.T @ g)
        d, x = s.diagonal(), torch.zeros(n, n).double()
        for i, j in itertools.product(range(n), range(n)):
            if i > j:
                gap = d[i] - d[j]
                x[i, j] = -0.5 * s[i, j] * gap / (gap**2 + 0.1**2 * (d[i] + d[j]) ** 2)
        x = x - x.T
        norm = torch.linalg.matrix_norm(x @ x).div(math.sqrt(2)).sqrt()
        size = min(1.0, 0.48 / norm)
        x, norm = size * x, size * norm
        turn = eye + 2 * x + 2 * x @ x + (1 + norm**2 / 4) * x @ x @ x - 0.5 * (b.T @ b - eye)
        b, s = b @ turn, turn.T @ s @ turn
        d = s.diagonal().clamp(min=1e-6 * s.diagonal().max())
        s = s - s.diagonal().diag() + d.diag()
        momentum = mu * momentum + (1 - mu) * g
        step = b @ torch.diag(1 / (d ** (1 / p) + eps)) @ b.T @ (mu * momentum + (1 - mu) * g)
        w = w - lr * 0.2 * step / ((step**2).mean().sqrt() + 1e-8)
    return w


@pytest.mark.parametrize("gamma", [0, 1])
@pytest.mark.parametrize("root", [1.0, 2.0])
def test_tracking_is_the_average_with_a_basis_that_follows(gamma, root):
    params, steps, mu, decay = parameters(), 25, 0.9, 0.9
    gradient, start = gradients(12, steps), vector(params)
    optimizer = SpectralFull(params, lr=0.1, betas=(mu, decay), root=root, gamma=gamma)
    got = train(optimizer, params, gradient, steps)
    want = tracking(start, gradient, steps, 0.1, mu, 1 - (1 - decay), root, gamma, 1e-8)
    assert_same_way(got, want, start, 1e-9)


def test_without_a_residual_less_is_known():
    def error(carry: bool) -> float:
        torch.manual_seed(0)
        params, mix = [nn.Parameter(torch.zeros(12).double())], draw(12, 12)
        optimizer = SpectralFull(params, lr=0.0, betas=(0.9, 0.98), carry_residual=carry)
        noise, average = draw(200, 12), torch.zeros(12, 12).double()
        for t in range(200):
            params[0].grad = mix @ noise[t]
            optimizer.step()
            average = average + 0.98 ** (200 - t) * torch.outer(params[0].grad, params[0].grad)
        state = optimizer.state[params[0]]
        t = state["eigenvalues"].diag() + (state["residual"] if carry else 0)
        s = state["basis"] @ t @ state["basis"].T
        average = average * (s.trace() / average.trace())
        return ((s - average).norm() / average.norm()).item()

    assert error(True) < 0.02 < error(False)


# --- Diagonal forms ---------------------------------------------------------------------------------------------------

DIAGONAL = {"diagonal": True, "update_scale": None, "nesterov": False}
PAIRS = {
    "Adam": (torch.optim.Adam, {"betas": (0.8, 0.95), "eps": 1e-4}, {"betas": (0.8, 0.95), "eps": 1e-4}),
    "AdamW": (torch.optim.AdamW, {"weight_decay": 0.1}, {"betas": (0.9, 0.999), "weight_decay": 0.1}),
    "Adam, maximize": (torch.optim.Adam, {"maximize": True}, {"betas": (0.9, 0.999), "maximize": True}),
    "RMSprop": (torch.optim.RMSprop, {"alpha": 0.9}, {"betas": (0, 0.9), "bias_correction": False}),
    "Adagrad": (torch.optim.Adagrad, {}, {"betas": (0, 0), "gamma": 0, "eps": 1e-10}),
    "Adagrad, started": (
        torch.optim.Adagrad,
        {"initial_accumulator_value": 0.3},
        {"betas": (0, 0), "gamma": 0, "eps": 1e-10, "initial_accumulator_value": 0.3},
    ),
}


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("pair", PAIRS)
def test_the_diagonal_is_torchs_own(pair, joint):
    other, theirs, ours = PAIRS[pair]
    params = parameters()
    twins = copy.deepcopy(params)
    gradient, start = gradients(12, 30), vector(params)
    got = train(SpectralFull(params, lr=0.05, joint=joint, **(DIAGONAL | ours)), params, gradient, 30)
    want = train(other(twins, lr=0.05, **theirs), twins, gradient, 30)
    assert_same_way(got, want, start, 1e-13)


@pytest.mark.parametrize("root", [1.0, 4.0])
@pytest.mark.parametrize("gamma", [0, 1])
@pytest.mark.parametrize("exact", [True, False])
def test_other_diagonals(root, gamma, exact):
    """Sec. 3.2: the 1-root variants of RMSprop and AdaGrad, the fractional method; and the map that is not truncated."""
    params, beta2, lr = parameters(), 0.1, 0.02
    gradient, w = gradients(12, 30), vector(params)
    options = {"betas": (0, 1 - beta2), "eps": 0.0, "rotation": "riemannian", "initial_accumulator_value": 0.5}
    got = train(SpectralFull(params, lr=lr, root=root, gamma=gamma, exact=exact, **(DIAGONAL | options)), params, gradient, 30)
    start, d = w, torch.full((12,), 0.5).double()
    for t in range(30):
        g = gradient(w, t)
        d = d * torch.exp(beta2 * (g**2 / d - gamma)) if exact else (1 - beta2 * gamma) * d + beta2 * g**2
        w = w - lr * g / d ** (1 / root)
    assert_same_way(got, w, start)


# --- Invariances ------------------------------------------------------------------------------------------------------


def test_the_order_of_elements_does_not_matter():
    order = torch.randperm(12)
    back, first = order.argsort(), [nn.Parameter(draw(12))]
    second, gradient = [nn.Parameter(first[0].detach()[order])], gradients(12, 30)
    got = train(SpectralFull(first), first, gradient, 30)
    want = train(SpectralFull(second), second, lambda w, t: gradient(w[back], t)[order], 30)
    torch.testing.assert_close(got[order], want, rtol=1e-9, atol=1e-9)


def test_the_scale_of_the_loss_does_not_matter():
    """In any unit, with the default scale of the updates and start of the average."""
    ends = []
    for scale in (1.0, 2.0**20):
        torch.manual_seed(0)
        params = parameters()
        gradient = gradients(12, 30)
        ends.append(train(SpectralFull(params, eps=0.0), params, lambda w, t: scale * gradient(w, t), 30))  # noqa: B023
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-9)


# --- One matrix over several parameters -------------------------------------------------------------------------------


def model_of(dtype: torch.dtype = torch.float32) -> nn.Module:
    model = nn.Module()
    for i, p in enumerate(parameters(dtype=dtype)):
        model.register_parameter(f"p{i}", p)
    return model


def give(model: nn.Module, t: int, without: tuple[str, ...] = ()) -> None:
    for i, (name, p) in enumerate(model.named_parameters()):
        noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * t + i))
        p.grad = None if name in without else (noise + 0.1 * p.detach().float()).to(p.dtype)


def run(model: nn.Module, optimizer: SpectralFull, steps: range, without: tuple[str, ...] = ()) -> None:
    for t in steps:
        give(model, t, without)
        optimizer.step()


def everything(model: nn.Module, optimizer: SpectralFull) -> dict[str, Tensor]:
    found = {name: p.detach() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        found |= {f"{name}.{key}": value for key, value in optimizer.state.get(p, {}).items()}
    return found


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, x in want.items():
        assert got[name].dtype == x.dtype and torch.equal(got[name], x), name


def through_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def by_dcp(model, optimizer, folder):
    options = StateDictOptions()
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer, options=options)}, checkpoint_id=folder, no_dist=True)
    other = copy.deepcopy(model)
    second = SpectralFull(other.parameters(), lr=0.05)
    loaded = {"optimizer": get_optimizer_state_dict(other, second, options=options)}
    dcp.load(loaded, checkpoint_id=folder, no_dist=True)
    set_optimizer_state_dict(other, second, loaded["optimizer"], options=options)
    return other, second


def by_file(model, optimizer, folder):
    other = copy.deepcopy(model)
    second = SpectralFull(other.parameters(), lr=0.05)
    second.load_state_dict(through_file(optimizer.state_dict()))
    return other, second


WAYS = {
    "file": by_file,
    "deepcopy": lambda model, optimizer, _: copy.deepcopy((model, optimizer)),
    "pickle": lambda model, optimizer, _: pickle.loads(pickle.dumps((model, optimizer))),
    "DCP": by_dcp,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("without", [(), ("p1",), ("p0",)], ids=str)
def test_resume_is_bit_exact(dtype, way, without, tmp_path):
    model = model_of(dtype)
    optimizer = SpectralFull(model.parameters(), lr=0.05)
    run(model, optimizer, range(6), without)
    other, second = WAYS[way](model, optimizer, tmp_path)
    assert_same(everything(other, second), everything(model, optimizer))
    run(model, optimizer, range(6, 9))
    run(other, second, range(6, 9))
    assert_same(everything(other, second), everything(model, optimizer))


def test_the_state_is_the_first_ones():
    model = model_of()
    optimizer = SpectralFull(model.parameters())
    run(model, optimizer, range(3), without=("p0",))
    state = optimizer.state[model.p0]
    assert [dict(optimizer.state[p]) for p in (model.p1, model.p2)] == [{"step": state["step"]}] * 2
    assert state["basis"].shape == (12, 12) and state["step"] == 3 and state["momentum_buffer"].shape == (12, 1)
    assert all(type(x) is Tensor for x in state.values())


@pytest.mark.parametrize("way", ["no gradient", "frozen"])
def test_a_parameter_without_a_gradient_stays_and_counts_as_zero(way):
    model, other = model_of(), model_of()
    other.load_state_dict(model.state_dict())
    optimizer, zeros = SpectralFull(model.parameters(), lr=0.05), SpectralFull(other.parameters(), lr=0.05)
    if way == "frozen":
        model.p1.requires_grad_(False)
    before = model.p1.detach().clone()
    for t in range(5):
        give(model, t, ("p1",))
        give(other, t)
        if t:  # what it did before is in the momentum and in the curvature
            other.p1.grad.zero_()
        elif way == "no gradient":
            model.p1.grad = other.p1.grad.clone()
        else:
            other.p1.grad.zero_()
        optimizer.step()
        zeros.step()
        if t == 0:
            before = model.p1.detach().clone()
    assert torch.equal(model.p1, before) and torch.equal(other.p1, before) == (way == "frozen")
    assert torch.equal(model.p0, other.p0) and torch.equal(model.p2, other.p2)
    run(model, optimizer, range(5, 7), without=("p0", "p1", "p2"))  # nothing at all
    assert torch.equal(model.p0, other.p0) and optimizer.state[model.p0]["step"] == 5


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_one_flawed_gradient_stops_the_group_and_counts_once(value):
    first, second = model_of(), model_of()
    groups = [{"params": list(m.parameters())} for m in (first, second)]
    optimizer = SpectralFull(groups, lr=0.05)
    for t in range(4):
        give(first, t)
        give(second, t)
        if t == 2:
            first.p2.grad[0, 1] = value
            before = {name: x.clone() for name, x in everything(first, optimizer).items()}
            moving = second.p0.detach().clone()
        optimizer.step()
        if t == 2:
            after = everything(first, optimizer)
            assert after.pop("p0.skipped") == 1 and before.pop("p0.skipped") == 0
            assert_same(after, before)
            assert not torch.equal(second.p0, moving)
    assert optimizer.skipped_steps() == 1 and optimizer.state[first.p0]["step"] == 3
    assert all(x.isfinite().all() for x in everything(first, optimizer).values())


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_step_of_zeros_with_no_learning_rate_changes_nothing(weight_decay):
    model = model_of()
    other = copy.deepcopy(model)
    options = {"lr": 0.05, "weight_decay": weight_decay}
    optimizer, second = SpectralFull(model.parameters(), **options), SpectralFull(other.parameters(), **options)
    optimizer.param_groups[0]["lr"] = 0.0
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    optimizer.param_groups[0]["lr"] = 0.05
    run(model, optimizer, range(5))
    run(other, second, range(5))
    assert_same(everything(model, optimizer), everything(other, second))


def test_parameters_may_be_replaced_after_construction():
    model, other = model_of(), model_of()
    optimizer, reference = SpectralFull(model.parameters(), lr=0.05), SpectralFull(other.parameters(), lr=0.05)
    twin = copy.deepcopy(other)
    optimizer.param_groups[0]["params"] = list(twin.parameters())
    run(other, reference, range(3))
    run(twin, optimizer, range(3))
    assert_same(everything(twin, optimizer), everything(other, reference))


def test_groups_dtypes_and_adamw_stand_beside_each_other():
    one, two, half, plain = (nn.Parameter(torch.randn(4, 3)) for _ in range(4))
    half.data = half.data.bfloat16()
    empty = nn.Parameter(torch.ones(0, 3))
    groups = [{"params": [empty, one, half]}, {"params": [two]}, {"params": [plain], "algorithm": "adamw"}]
    optimizer = SpectralFull(groups, lr=0.05, weight_decay=0.01)
    starts = [p.detach().clone() for p in (one, two, half, plain)]
    for _ in range(3):
        for p in (one, two, half, plain, empty):
            p.grad = torch.randn_like(p)
        optimizer.step()
    assert not any(torch.equal(p, start) for p, start in zip((one, two, half, plain), starts, strict=True))
    assert [optimizer.state[p]["basis"].dtype for p in (one, two, half)] == [torch.float32, torch.float32, torch.bfloat16]
    assert "exp_avg" in optimizer.state[plain] and not optimizer.state[empty]


def test_a_vector_over_the_limit_keeps_a_diagonal_and_warns():
    model = model_of()
    optimizer = SpectralFull(model.parameters(), max_preconditioner_dim=11)
    with pytest.warns(UserWarning, match="max_preconditioner_dim=11"):
        run(model, optimizer, range(2))
    assert "basis" not in optimizer.state[model.p0]


def test_layouts_do_not_matter():
    params = [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(2, 3, 4, 4))]
    strided = [nn.Parameter(params[0].detach().T.contiguous().T), nn.Parameter(params[1].detach().clone())]
    strided[1].data = strided[1].data.to(memory_format=torch.channels_last)
    first, second = SpectralFull(params, lr=0.05), SpectralFull(strided, lr=0.05)
    for _ in range(3):
        for p, q in zip(params, strided, strict=True):
            p.grad = torch.randn(p.shape)
            q.grad = torch.empty_like(q, memory_format=torch.preserve_format).copy_(p.grad)
        first.step()
        second.step()
    assert not strided[0].is_contiguous()
    assert all(torch.equal(p, q) for p, q in zip(params, strided, strict=True))


def test_a_step_reads_no_value_of_a_tensor():
    with FakeTensorMode():
        model = model_of()
        optimizer = SpectralFull(model.parameters(), lr=torch.tensor(0.1))
        for t in range(3):
            for i, p in enumerate(model.parameters()):
                p.grad = None if i == t else torch.randn_like(p)
            optimizer.step()
        assert optimizer.state[model.p0]["step"].shape == ()


def test_a_compiled_step_is_not_compiled_again():
    torch._dynamo.reset()
    model = model_of()
    other = copy.deepcopy(model)
    optimizer, eager = SpectralFull(model.parameters(), lr=0.05), SpectralFull(other.parameters(), lr=0.05)
    counter, counts = CompileCounterWithBackend("eager"), []
    compiled = torch.compile(optimizer.step, backend=counter)
    for t in range(6):
        for o in (optimizer, eager):
            o.param_groups[0]["lr"] = 0.05 / (t + 1)
        give(model, t)
        compiled()
        run(other, eager, range(t, t + 1))
        counts.append(counter.frame_count)
    assert counts[1:] == [counts[1]] * 5
    assert_same(everything(model, optimizer), everything(other, eager))


def test_options_out_of_range():
    for options, words in (
        ({"root": 0.0}, "`root` must be positive"),
        ({"exact": True}, "`exact=True` is of rotation"),
        ({"exact": True, "rotation": "riemannian", "damping": 0.1}, "`damping` belongs to the truncated map"),
        ({"initial_accumulator_value": 0.0}, "`initial_accumulator_value` must be positive, got 0"),
        ({"rotation": "eigh"}, "`rotation` must be one of tracking, riemannian"),
        ({"joint": "all"}, "`joint` must be one of"),
        ({"eps": -1.0}, "`eps` must be at least 0"),
    ):
        with pytest.raises(ValueError, match=words):
            SpectralFull(parameters(), **options)


def test_a_checkpoint_of_another_group_does_not_fit():
    model = model_of()
    optimizer = SpectralFull(model.parameters())
    run(model, optimizer, range(2))
    other = parameters(((3, 2), (4,), (1, 3)), torch.float32)
    second = SpectralFull(other)
    with pytest.raises(ValueError, match=r"'momentum_buffer' of parameter 0 .* must have shape \(13, 1\), got \(12, 1\)"):
        second.load_state_dict(optimizer.state_dict())
    assert not second.state
