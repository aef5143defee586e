"""What a user of torch.optim expects of SpectralKron: shapes, routing, options, state, no host synchronisation."""

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import spectral_ops as ops
from spectral_ops.cayley import LIMITS
from spectral_ops.kernels.launch import recording
from spectral_ops.optim import SpectralKron, param_groups

SHAPE_CLASSES = ((6, 9), (9, 6), (4, 4))


def parameters(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def run(optimizer: torch.optim.Optimizer, steps: int, start: int = 0) -> None:
    """Steps on gradients that depend on the step and on each parameter's value and place."""
    for t in range(start, start + steps):
        for group in optimizer.param_groups:
            for i, p in enumerate(group["params"]):
                generator = torch.Generator().manual_seed(1000 * t + i)
                p.grad = (torch.randn(p.shape, generator=generator) + 0.1 * p.detach().float()).to(p.dtype)
        optimizer.step()


def copies(params: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone()) for p in params]


# --- it optimizes -----------------------------------------------------------------------------------------------------

OPTIONS = (
    {},
    {"carry_residual": False},
    {"update_interval": 3},
    {"cayley_order": 2},
    {"cayley_order": 4, "rotation_limit": 0.5},
    {"cayley_order": 8},
    {"root": 4.0},
    {"damping": 1e-3},
    {"nesterov": False},
    {"update_scale": "clip", "betas": (0.9, 0.95)},
    {"update_scale": "graft"},
    {"update_scale": None, "betas": (0.9, 0.95)},
    {"max_preconditioner_dim": 9},
    {"max_preconditioner_dim": 1},
    {"preconditioner_dtype": torch.bfloat16},
    {"rotation": "riemannian", "betas": (0.9, 0.95), "cayley_order": 8},
    {"rotation": "riemannian", "betas": (0.9, 0.95), "exact": True},
    {"rotation": "riemannian", "betas": (0.9, 0.95), "preconditioner_dtype": torch.bfloat16, "cayley_order": 2},
)


@pytest.mark.filterwarnings("ignore:SpectralKron got a matrix")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_fits_an_ill_conditioned_regression(options):
    scales = torch.logspace(0, 1.5, 12)
    x = torch.randn(256, 12) * scales
    truth = torch.randn(8, 12) / scales
    model = nn.Linear(12, 8)
    optimizer = SpectralKron(param_groups(model, lr=0.05), **options)
    losses = []
    for t in range(200):
        batch = x[torch.randint(256, (32,), generator=torch.Generator().manual_seed(t))]
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 - t / 200)
        optimizer.zero_grad()
        loss = (model(batch) - batch @ truth.T).square().mean()
        # The exact map takes the exponential of the curvature, so it wants gradients of order 1.
        (0.001 * loss if options.get("exact") else loss).backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.02 * losses[0]


# --- shapes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [(), (3,), (1,), (1, 1), (1, 5), (5, 1), (3, 4), (8, 3, 3, 3), (4, 2, 3, 3, 3), (5, 6, 7), (2, 3, 4, 5), (0, 4), (3, 0)],
    ids=str,
)
@pytest.mark.parametrize("rotation", ["tracking", "riemannian"])
def test_every_shape_steps(shape, rotation):
    (p,) = parameters(shape)
    before = p.detach().clone()
    run(SpectralKron([p], lr=0.1, rotation=rotation), 3)
    assert p.isfinite().all()
    assert p.numel() == 0 or not torch.equal(p, before)


def same_trajectory(groups_a: list[dict], groups_b: list[dict], view_b, **options) -> None:
    """Both parametrisations of one weight end at the same place; `view_b` maps the second's parameters to the first's."""
    a, b = SpectralKron(groups_a, lr=0.05, **options), SpectralKron(groups_b, lr=0.05, **options)
    for t in range(5):
        for i, p in enumerate(a.param_groups[0]["params"]):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * t + i))
        view_b([p.grad for p in a.param_groups[0]["params"]], b.param_groups[0]["params"])
        a.step()
        b.step()


def test_conv_weights_are_matrices_of_out_by_in_times_kernel():
    (conv,) = parameters((6, 3, 2, 2))
    flat = nn.Parameter(conv.detach().reshape(6, 12).clone())

    def grads(source, target):
        target[0].grad = source[0].reshape(6, 12)

    same_trajectory([{"params": [conv]}], [{"params": [flat]}], grads)
    torch.testing.assert_close(conv.detach().reshape(6, 12), flat.detach())


def test_conv1d_by_option_and_channels_last_strides():
    (conv,) = parameters((6, 4, 3))
    flat = nn.Parameter(conv.detach().reshape(6, 12).clone())

    def grads(source, target):
        target[0].grad = source[0].reshape(6, 12)

    same_trajectory([{"params": [conv], "conv": True}], [{"params": [flat]}], grads)
    torch.testing.assert_close(conv.detach().reshape(6, 12), flat.detach())

    p = nn.Parameter(torch.randn(6, 4, 3, 3).to(memory_format=torch.channels_last))
    q = nn.Parameter(p.detach().contiguous())
    same_trajectory([{"params": [p]}], [{"params": [q]}], lambda s, t: setattr(t[0], "grad", s[0].contiguous()))
    torch.testing.assert_close(p.detach(), q.detach())


def test_experts_are_a_batch_of_matrices():
    (experts,) = parameters((3, 5, 4))
    single = [nn.Parameter(x.clone()) for x in experts.detach()]

    def grads(source, target):
        for p, g in zip(target, source[0], strict=True):
            p.grad = g.clone()

    same_trajectory([{"params": [experts]}], [{"params": single}], grads)
    torch.testing.assert_close(experts.detach(), torch.stack([p.detach() for p in single]))


@pytest.mark.parametrize(
    "group,cuts",
    [
        ({"split_sizes": [4, 4, 4]}, [4, 4, 4]),
        ({"split_sizes": [6, 3, 3]}, [6, 3, 3]),
        ({"num_heads": 4}, [3, 3, 3, 3]),
        ({"split_sizes": [6, 6], "num_heads": 2}, [3, 3, 3, 3]),
        ({"split_sizes": [8, 2, 2], "num_heads": [4, 1, 1]}, [2, 2, 2, 2, 2, 2]),
    ],
    ids=str,
)
def test_fused_weights_are_preconditioned_part_by_part(group, cuts):
    (fused,) = parameters((12, 5))
    parts = [nn.Parameter(x.clone()) for x in fused.detach().split(cuts)]

    def grads(source, target):
        for p, g in zip(target, source[0].split(cuts), strict=True):
            p.grad = g.clone()

    same_trajectory([{"params": [fused], **group}], [{"params": parts}], grads)
    torch.testing.assert_close(fused.detach(), torch.cat([p.detach() for p in parts]))


def test_the_result_does_not_depend_on_how_parameters_are_batched():
    together = parameters(*SHAPE_CLASSES * 2)
    alone = copies(together)
    run(SpectralKron(together, lr=0.05), 6)
    for i, p in enumerate(alone):
        optimizer = SpectralKron([p], lr=0.05)
        for t in range(6):
            generator = torch.Generator().manual_seed(1000 * t + i)
            p.grad = torch.randn(p.shape, generator=generator) + 0.1 * p.detach()
            optimizer.step()
        torch.testing.assert_close(p, together[i], rtol=1e-4, atol=1e-5)


def test_sides_over_the_limit_are_diagonal():
    (p,) = parameters((6, 20))
    optimizer = SpectralKron([p], lr=0.1, max_preconditioner_dim=10)
    with pytest.warns(UserWarning, match=r"matrix of 6 x 20: the side over max_preconditioner_dim=10"):
        run(optimizer, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it warns once
        run(optimizer, 2, start=1)
    state = optimizer.state[p]
    assert state["basis_left"].shape == (6, 6) and "basis_right" not in state and state["eigenvalues_right"].shape == (20,)
    assert state["eigenvalues_right"].std() > 0


# --- updates ----------------------------------------------------------------------------------------------------------


def test_update_scales():
    def step(update_scale):
        torch.manual_seed(3)
        p = nn.Parameter(torch.zeros(6, 9))
        optimizer = SpectralKron([p], lr=1.0, update_scale=update_scale)
        deltas = []
        for _ in range(4):
            p.grad, before = 3 * torch.randn(6, 9), p.detach().clone()
            optimizer.step()
            deltas.append((p.detach() - before).square().mean().sqrt().item())
        return deltas

    assert all(math.isclose(x, 0.2, rel_tol=1e-5) for x in step("rms"))
    plain, clipped = step(None), step("clip")
    assert all(math.isclose(c, min(1.0, x), rel_tol=1e-5) for c, x in zip(clipped, plain, strict=True))

    torch.manual_seed(3)
    m = v = torch.zeros(6, 9)
    for t, got in enumerate(step("graft"), 1):
        if t == 1:
            torch.manual_seed(3)
        g = 3 * torch.randn(6, 9)
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        adam = m / (1 - 0.9**t) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
        assert math.isclose(got, adam.square().mean().sqrt().item(), rel_tol=1e-4)


def test_weight_decay_is_decoupled_and_survives_bfloat16():
    (p,) = parameters((6, 9))
    q, r = copies([p, p])
    run(SpectralKron([p], lr=0.1, weight_decay=0.0), 1)
    optimizer = SpectralKron([q], lr=0.1, weight_decay=0.5)
    run(optimizer, 1)
    torch.testing.assert_close(q.detach(), p.detach() - 0.1 * 0.5 * r.detach())

    b = nn.Parameter(torch.ones(16, 16, dtype=torch.bfloat16))
    optimizer = SpectralKron([b], lr=1e-2, weight_decay=0.1)
    b.grad = torch.zeros_like(b)
    optimizer.step()
    assert (b == 1).all()  # 1e-3 of decay is under half of bfloat16's step, and alone it is rounded away
    run(optimizer, 1, start=1)
    assert not (b == 1).all()


def test_maximize_is_the_negative_gradient():
    (p,) = parameters((6, 9))
    (q,) = copies([p])
    a, b = SpectralKron([p], lr=0.1), SpectralKron([q], lr=0.1, maximize=True)
    for _ in range(3):
        p.grad = torch.randn(6, 9)
        q.grad = -p.grad
        a.step()
        b.step()
    assert torch.equal(p, q)


def test_update_interval_freezes_the_factors_between():
    (p,) = parameters((6, 9))
    optimizer = SpectralKron([p], lr=0.1, update_interval=4)
    changed = []
    for t in range(24):
        before = {k: v.clone() for k, v in optimizer.state[p].items()}
        run(optimizer, 1, start=t)
        if t:
            changed.append(not torch.equal(before["basis_left"], optimizer.state[p]["basis_left"]))
    assert changed[:9] == [True] * 9  # every one of the first ten steps
    assert changed[9:] == [t % 4 == 2 for t in range(11, 25)]  # the middle of its only matrix lies in the third quarter


def test_adamw_inside_is_torchs_adamw():
    mine = parameters((7,), (4, 3), ())
    theirs = copies(mine)
    run(SpectralKron([{"params": mine, "algorithm": "adamw"}], lr=0.01, weight_decay=0.1), 5)
    run(torch.optim.AdamW(theirs, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1, fused=True), 5)
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_lr_may_be_a_tensor_and_schedulers_work():
    (p,) = parameters((6, 9))
    q, bias = copies([p])[0], nn.Parameter(torch.ones(3))
    lr = torch.tensor(0.1)
    a, b = SpectralKron([p, bias], lr=lr), SpectralKron([q], lr=0.1)
    run(a, 3)
    run(b, 3)
    torch.testing.assert_close(p, q)
    lr.fill_(0.0)
    before = p.detach().clone()
    run(a, 1)
    assert torch.equal(p, before)
    scheduler = torch.optim.lr_scheduler.LambdaLR(b, lambda t: 0.5**t)
    run(b, 1)
    scheduler.step()
    assert b.param_groups[0]["lr"] == 0.05


def test_closure_is_called_with_gradients_enabled():
    (p,) = parameters((4, 3))
    optimizer = SpectralKron([p], lr=0.1)

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        first, second = optimizer.step(closure), optimizer.step(closure)
    assert second < first


# --- gradients that are missing or bad --------------------------------------------------------------------------------


def test_missing_gradients_change_nothing_else():
    params = parameters((6, 9), (6, 9), (4, 4))
    only = copies(params)
    optimizer = SpectralKron(params, lr=0.05)
    reference = SpectralKron([only[0], only[2]], lr=0.05)
    for t in range(6):
        for p, q in zip(params, only, strict=True):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(t))
            q.grad = p.grad.clone()
        if t % 2:
            params[1].grad = None
        optimizer.step()
        reference.step()
    torch.testing.assert_close(params[0], only[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(params[2], only[2], rtol=1e-4, atol=1e-5)
    assert optimizer.state[params[1]]["step"] == 3


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("rotation", ["tracking", "riemannian"])
def test_a_gradient_that_is_not_finite_touches_nothing(bad, rotation):
    params = parameters((6, 9), (6, 9))
    optimizer = SpectralKron(params, lr=0.05, weight_decay=0.1, rotation=rotation)
    run(optimizer, 3)
    before = [p.detach().clone() for p in params]
    state = {k: v.clone() for k, v in optimizer.state[params[0]].items()}
    for p in params:
        p.grad = torch.randn(p.shape)
    params[0].grad[2, 3] = bad
    optimizer.step()
    assert torch.equal(params[0], before[0]) and not torch.equal(params[1], before[1])
    for name, value in state.items():
        assert torch.equal(optimizer.state[params[0]][name], value) != (name == "skipped"), name
    assert optimizer.skipped_steps() == 1
    run(optimizer, 3)
    assert all(p.isfinite().all() for p in params)


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e15])
def test_extreme_gradients_keep_the_state_finite(scale):
    params = parameters((6, 9))
    optimizer = SpectralKron(params, lr=0.05)
    for t in range(30):
        params[0].grad = torch.randn(6, 9, generator=torch.Generator().manual_seed(t)) * (scale if t % 7 == 3 else 1)
        optimizer.step()
    assert params[0].isfinite().all() and params[0].abs().max() < 10
    assert all(v.isfinite().all() for v in optimizer.state[params[0]].values())


def test_rank_one_and_dead_directions():
    (p,) = parameters((8, 8))
    optimizer = SpectralKron([p], lr=0.05)
    for t in range(300):
        p.grad = torch.outer(torch.ones(8), torch.randn(8, generator=torch.Generator().manual_seed(t)))
        p.grad[:, 5:] = 0
        optimizer.step()
    assert p.isfinite().all() and p.abs().max() < 10
    assert all(v.isfinite().all() for v in optimizer.state[p].values())


def test_a_step_with_zero_gradients_leaves_a_fresh_state():
    """What distributed checkpointing does to make an optimizer's state."""
    params = parameters((6, 9), (4,))
    before = [p.detach().clone() for p in params]
    optimizer = SpectralKron(params, lr=0.0, weight_decay=0.1)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    state = optimizer.state[params[0]]
    assert torch.equal(state["basis_left"], torch.eye(6)) and (state["eigenvalues_right"] == 1).all()
    assert state["scale"] == 1 and state["updates"] == 0 and (state["momentum_buffer"] == 0).all()


# --- state ------------------------------------------------------------------------------------------------------------

STATES = (
    ({}, torch.float32),
    ({}, torch.bfloat16),
    ({"preconditioner_dtype": torch.bfloat16}, torch.float32),
    ({"preconditioner_dtype": torch.float32}, torch.bfloat16),
    ({"update_scale": "graft", "carry_residual": False}, torch.float32),
    ({"rotation": "riemannian", "cayley_order": 4}, torch.bfloat16),
    ({"rotation": "riemannian"}, torch.bfloat16),
    ({}, torch.float16),
    ({}, torch.float64),
)


def through_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("options,dtype", STATES, ids=str)
@pytest.mark.parametrize("way", ["state_dict", "file", "deepcopy", "pickle"])
def test_resume_is_bit_exact(options, dtype, way):
    shapes = ((6, 9), (6, 9), (4,), (3, 4, 5))
    params = parameters(*shapes, dtype=dtype)
    optimizer = SpectralKron(params, lr=0.05, update_interval=2, **options)
    run(optimizer, 12)
    dtypes = [{k: v.dtype for k, v in optimizer.state[p].items()} for p in params]
    if way in ("state_dict", "file"):
        others = copies(params)
        second = SpectralKron(others, lr=0.05, update_interval=2, **options)
        state = optimizer.state_dict()
        second.load_state_dict(through_file(state) if way == "file" else copy.deepcopy(state))
    else:
        second = copy.deepcopy(optimizer) if way == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
        others = second.param_groups[0]["params"]
    assert [{k: v.dtype for k, v in second.state[p].items()} for p in others] == dtypes
    run(optimizer, 5, start=12)
    run(second, 5, start=12)
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
        for name, value in optimizer.state[p].items():
            assert torch.equal(value, second.state[q][name]), name


def test_state_holds_views_of_the_batch():
    params = parameters((6, 9), (6, 9))
    optimizer = SpectralKron(params, lr=0.05)
    run(optimizer, 2)
    views = [optimizer.state[p]["basis_left"] for p in params]
    assert views[0].untyped_storage().data_ptr() == views[1].untyped_storage().data_ptr()
    run(optimizer, 2)
    assert optimizer.state[params[0]]["basis_left"] is views[0]


def test_loading_a_state_of_other_options_is_a_clear_error():
    params = parameters((6, 9))
    optimizer = SpectralKron(params, lr=0.05, carry_residual=False)
    run(optimizer, 1)
    optimizer.param_groups[0]["carry_residual"] = True
    with pytest.raises(RuntimeError, match=r"shape \(6, 9\) lacks \['residual_left', 'residual_right'\]"):
        run(optimizer, 1)


def test_bfloat16_factors_follow_float32_factors():
    """Stochastic rounding and self-correction: the basis stays orthogonal, the training ends in the same place."""

    def curvature(dtype: torch.dtype) -> tuple[float, Tensor]:
        torch.manual_seed(0)
        p = nn.Parameter(torch.zeros(24, 16))
        optimizer = SpectralKron([p], lr=0.0, betas=(0.9, 0.9), preconditioner_dtype=dtype)
        basis, scales = torch.linalg.qr(torch.randn(24, 24))[0], torch.logspace(0, 1.5, 24)
        for _ in range(400):
            p.grad = basis @ (scales[:, None] * torch.randn(24, 16))
            optimizer.step()
        s = optimizer.state[p]
        b = s["basis_left"].float()
        defect = ((b.T @ b - torch.eye(24)).norm() / math.sqrt(24)).item()
        t = torch.diag(s["eigenvalues_left"]) + s["residual_left"].float()
        return defect, b @ t @ b.T

    (defect32, want), (defect16, got) = curvature(torch.float32), curvature(torch.bfloat16)
    assert defect32 < 1e-3 and defect16 < 0.005
    assert (got / got.trace() - want / want.trace()).norm() < 0.05 * (want / want.trace()).norm()


@pytest.mark.parametrize("order,limit", LIMITS.items())
@pytest.mark.parametrize("fixed_plane", [True, False])
def test_the_basis_stays_near_orthogonal_at_the_largest_rotations(order, limit, fixed_plane):
    """Every step at the limit, with the worst rounding: the correction outweighs what the map adds."""
    n = 8
    b = torch.eye(n).to(torch.bfloat16)
    d, plane = torch.ones(n), torch.zeros(n, n)
    plane[1, 0], plane[0, 1] = 9.0, -9.0
    for t in range(500):
        x = plane if fixed_plane else 9 * torch.randn(n, n, generator=torch.Generator().manual_seed(t)).tril(-1)
        b = ops.cayley_track(b, (x - x.mT).to(b.dtype), d, limit=limit, order=order, seed=t)[0]
    assert torch.linalg.matrix_norm(b.float().mT @ b.float() - torch.eye(n), 2) < 0.4


# --- cost -------------------------------------------------------------------------------------------------------------


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def calls_of_a_step(shapes: list[tuple[int, ...]], **options) -> list[str]:
    params = parameters(*shapes)
    optimizer = SpectralKron(params, lr=0.05, **options)
    run(optimizer, 2)
    for p in params:
        p.grad = torch.randn(p.shape)
    with Calls() as calls:
        optimizer.step()
    return calls.names


@pytest.mark.filterwarnings("ignore:SpectralKron got a matrix")
@pytest.mark.parametrize("options", [*OPTIONS[:13], {"weight_decay": 0.1, "maximize": True}], ids=str)
def test_a_step_does_not_synchronise_with_the_host(options):
    names = calls_of_a_step([(6, 9), (6, 9), (4, 4), (7,)], **options)
    assert names
    forbidden = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "_to_cpu", "unique", "equal.default")
    assert not [n for n in names if any(f in n for f in forbidden)]


def test_launches_grow_with_shape_classes_not_with_parameters():
    views = ("view", "split", "select", "alias", "detach", "reshape", "unsqueeze", "as_strided", "slice", "transpose", "expand")

    def launches(shapes):
        return len([n for n in calls_of_a_step(shapes) if not any(v in n for v in views)])

    one, many = launches([(6, 9)]), launches([(6, 9)] * 20)
    two = launches([(6, 9), (9, 6)] * 10)
    assert many == one
    assert two <= 2 * one


# --- routing ----------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.pos_embed = nn.Parameter(torch.randn(1, 5, 8))
        self.conv, self.conv1d = nn.Conv2d(3, 8, 2), nn.Conv1d(8, 8, 3)
        self.qkv = nn.Linear(8, 24)
        self.norm = nn.LayerNorm(8)
        self.experts = nn.Parameter(torch.randn(4, 8, 6))
        self.lm_head = nn.Linear(8, 10, bias=False)
        self.lm_head.weight = self.embed.weight  # tied
        self.frozen = nn.Parameter(torch.randn(8, 8), requires_grad=False)


def test_param_groups_routes_and_prints_itself(capsys):
    model = Model()
    groups = param_groups(model, lr=0.01, adamw_lr=0.003, weight_decay=0.1)
    routes = {name: g["algorithm"] for g in groups for name in g["param_names"]}
    assert routes == {
        "embed.weight": "adamw",
        "pos_embed": "adamw",
        "conv.weight": "matrix",
        "conv.bias": "adamw",
        "conv1d.weight": "matrix",
        "conv1d.bias": "adamw",
        "qkv.weight": "matrix",
        "qkv.bias": "adamw",
        "norm.weight": "adamw",
        "norm.bias": "adamw",
        "experts": "matrix",
    }
    assert all(g["lr"] == (0.01 if g["algorithm"] == "matrix" else 0.003) for g in groups)
    decayed = {name for g in groups if g["weight_decay"] for name in g["param_names"]}
    assert decayed == {"embed.weight", "pos_embed", "conv.weight", "conv1d.weight", "qkv.weight", "experts"}
    print(groups)
    table = capsys.readouterr().out
    assert "matrix" in table and "8 x 3 x 2 x 2" in table and "embed.weight" in table and "4 x 8 x 6" in table
    optimizer = SpectralKron(groups)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert optimizer.state[model.conv1d.weight]["basis_right"].shape == (24, 24)
    assert "exp_avg" in optimizer.state[model.embed.weight]


def test_names_route_without_param_groups():
    model = Model()
    optimizer = SpectralKron(model.named_parameters(), lr=0.01)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert "exp_avg" in optimizer.state[model.embed.weight] and "exp_avg" in optimizer.state[model.pos_embed]
    assert "basis_left" in optimizer.state[model.qkv.weight]


def test_add_param_group():
    first, second = parameters((6, 9), (4, 4))
    optimizer = SpectralKron([first], lr=0.05)
    run(optimizer, 2)
    optimizer.add_param_group({"params": [second], "lr": 0.1, "root": 4.0})
    before = second.detach().clone()
    run(optimizer, 2, start=2)
    assert not torch.equal(second, before)
    with pytest.raises(ValueError, match="`root` must be positive, got -1"):
        optimizer.add_param_group({"params": parameters((3, 3)), "root": -1})
    with pytest.raises(ValueError, match="parameter group 2 is empty"):
        optimizer.add_param_group({"params": []})
    assert len(optimizer.param_groups) == 2


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options,message",
    [
        ({"lr": -1.0}, "`lr` must be at least 0, got -1.0"),
        ({"lr": torch.ones(2)}, "`lr` as a tensor must have one element"),
        ({"lr": math.nan}, "`lr` must be at least 0, got nan"),
        ({"betas": (0.9, 1.0)}, r"`betas` must be two numbers in \[0, 1\), got \(0.9, 1.0\)"),
        ({"betas": 0.9}, "`betas` must be two numbers"),
        ({"root": 0.0}, "`root` must be positive, got 0.0"),
        ({"rotation": "givens"}, "`rotation` must be one of tracking, riemannian, got 'givens'"),
        ({"update_scale": "norm"}, "`update_scale` must be one of rms, clip, graft, None, got 'norm'"),
        ({"update_interval": 0}, "`update_interval` must be an integer of at least 1, got 0"),
        ({"cayley_order": 5}, "`cayley_order` must be one of None, 2, 3, 4, 8, got 5"),
        ({"rotation_limit": 0.6}, r"`rotation_limit` must be in \(0, 0.48\] at this Cayley order, got 0.6"),
        ({"weight_decay": -0.1}, "`weight_decay` must be at least 0, got -0.1"),
        ({"preconditioner_dtype": torch.int8}, "`preconditioner_dtype` must be one of None, bfloat16, .*, got 'int8'"),
        ({"gamma": 0}, '`gamma=0` and `exact=True` are of rotation="riemannian"'),
        ({"rotation": "riemannian", "exact": True, "damping": 0.1}, "`damping` belongs to the truncated map"),
    ],
    ids=str,
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SpectralKron(parameters((3, 3)), **options)


def test_bad_parameters_and_gradients_are_named():
    with pytest.raises(ValueError, match="empty parameter list"):
        SpectralKron([], lr=0.1)
    with pytest.raises(ValueError, match="parameter group 1 is empty"):
        SpectralKron([{"params": parameters((3, 3))}, {"params": []}], lr=0.1)
    with pytest.raises(TypeError, match=r"iterable of Tensors|an iterable"):
        SpectralKron(torch.ones(3, 3), lr=0.1)
    with pytest.raises(TypeError, match=r"parameter 0 of shape \(3, 3\) is torch.complex64"):
        SpectralKron([nn.Parameter(torch.ones(3, 3, dtype=torch.complex64))], lr=0.1)
    with pytest.raises(ValueError, match=r"split_sizes=\[2, 2\] .* do not divide the 3 rows of a parameter of shape \(3, 3\)"):
        SpectralKron([{"params": parameters((3, 3)), "split_sizes": [2, 2]}], lr=0.1)
    with pytest.raises(ValueError, match=r"`algorithm` must be one of .*got 'sgd'"):
        SpectralKron([{"params": parameters((3, 3)), "algorithm": "sgd"}], lr=0.1)
    with pytest.raises(TypeError, match=r"takes an nn.Module as `model`, got list"):
        param_groups([], lr=0.1)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        param_groups(nn.ReLU(), lr=0.1)

    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = SpectralKron(embedding.named_parameters(), lr=0.1)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="does not take sparse gradients; parameter 'weight' has one"):
        optimizer.step()

    dense, sparse = nn.Linear(3, 3), nn.Embedding(5, 3, sparse=True)
    optimizer = SpectralKron([{"params": dense.parameters()}, {"params": sparse.parameters()}], lr=0.1)
    before = dense.weight.detach().clone()
    (dense(sparse(torch.tensor([1])))).sum().backward()
    with pytest.raises(RuntimeError, match=r"parameter 0 of shape \(5, 3\) has one"):
        optimizer.step()
    assert torch.equal(dense.weight, before)  # nothing changed before the error


@pytest.mark.parametrize(
    "dtype,factors",
    [(torch.float32, torch.float64), (torch.float64, torch.float32), (torch.float64, torch.bfloat16)],
)
@pytest.mark.parametrize("options", [{}, {"rotation": "riemannian", "betas": (0.9, 0.95), "cayley_order": 2}])
def test_factors_may_be_wider_or_narrower_than_float64_and_float32_parameters(dtype, factors, options):
    p, q = (nn.Parameter(torch.linspace(-1, 1, 30).sin().view(6, 5).to(dtype)) for _ in range(2))
    mixed, plain = SpectralKron([p], preconditioner_dtype=factors, **options), SpectralKron([q], **options)
    for _ in range(4):
        p.grad = torch.randn(6, 5).to(dtype)
        q.grad = p.grad.clone()
        mixed.step(), plain.step()
    assert mixed.state[p]["basis_left"].dtype == factors and p.dtype == dtype
    torch.testing.assert_close(p, q, rtol=0, atol=0.02 if factors == torch.bfloat16 else 1e-4)


# --- kernels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"carry_residual": False, "update_scale": "clip"},
        {"rotation": "riemannian", "cayley_order": 8, "betas": (0.9, 0.95)},
    ],
)
def test_kernels_train_as_the_reference_does(dtype, options, request):
    """Five steps on matrices of two shapes, one a stack of experts, with the kernels in the interpreter."""

    def train() -> list[Tensor]:
        torch.manual_seed(1)
        shapes = (20, 12), (20, 12), (3, 9, 18), (12,)
        params = [nn.Parameter(torch.randn(*s).to(dtype)) for s in shapes]
        optimizer = SpectralKron(params, lr=0.02, weight_decay=0.1, **options)
        for _ in range(5):
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()
        return [p.detach().float() for p in params]

    want = train()
    request.getfixturevalue("kernels_on_cpu")
    with recording() as launches:
        got = train()
    assert {"momentum", "rotate", "turn"} <= {item.name for item in launches}
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-4 if dtype == torch.float32 else 0.05)
