"""Ops on a CPU: what `host` computes without masks is what `reference` means, and a flawed gradient finds the masks."""

import math

import pytest
import torch
from torch import Tensor

import spectral_ops as ops
from spectral_ops import blocked, host, reference
from spectral_ops.kernels.launch import recording

DTYPES = [torch.float64, torch.float32]


def tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [x for item in value for x in tensors(item)] if isinstance(value, list | tuple) else []


def copied(value: object) -> object:
    if isinstance(value, Tensor):
        return value.clone()
    return [copied(x) for x in value] if isinstance(value, list | tuple) else value


def agree(name: str, args: list, monkeypatch: pytest.MonkeyPatch, plain: bool = True) -> list[Tensor]:
    """Both on copies. `plain`: that `host` does it itself, else that it asks `reference`."""
    mine, theirs = copied(args), copied(args)
    want = getattr(reference, name)(*theirs)
    calls = []
    original = getattr(reference, name)
    with monkeypatch.context() as patch:
        patch.setattr(reference, name, lambda *a: calls.append(a) or original(*a))
        got = getattr(host, name)(*mine)
    assert bool(calls) is not plain
    found, expected = tensors([got, mine]), tensors([want, theirs])
    for x, y in zip(found, expected, strict=True):
        tolerance = 1e-13 if x.dtype == torch.float64 else 2e-6
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance, equal_nan=True)
    return found


def flags(*values: bool) -> Tensor:
    return torch.tensor(values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_momentum(dtype, nesterov, maximize, monkeypatch):
    buffer, g = torch.randn(2, 3, 4, dtype=dtype), torch.randn(2, 3, 4, dtype=dtype)
    agree("momentum_update", [buffer, g, flags(True, True), 0.9, nesterov, maximize], monkeypatch)
    g[1, 0, 0] = math.nan
    found = agree("momentum_update", [buffer, g, flags(True, False), 0.9, nesterov, maximize], monkeypatch, plain=False)
    assert all(x.isfinite().all() for x in (found[0], found[1]))
    agree("momentum_sum", [buffer, g, flags(True, False), 0.9, maximize], monkeypatch, plain=False)
    agree("momentum_sum", [buffer, g.nan_to_num(), flags(True, True), 0.9, maximize], monkeypatch)
    agree("momentum_update", [buffer.bfloat16(), g.nan_to_num(), flags(True, True), 0.9, True, False], monkeypatch, plain=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", ["rms", "clip", "none"])
@pytest.mark.parametrize("decay,lr", [(0.0, 0.1), (0.3, 0.1), (0.3, 0.0)])
def test_parameters(dtype, normalize, decay, lr, monkeypatch):
    params, u = [torch.randn(2, 3, 4, dtype=dtype), torch.randn(1, 3, 4, dtype=dtype)], torch.randn(3, 3, 4, dtype=dtype)
    u[1] = 0
    squares, counts = u.square().sum((1, 2))[:, None], (torch.zeros(3), torch.zeros(3).long())
    rest = [*counts, torch.tensor(lr, dtype=torch.float64), decay, normalize, 0.2]
    agree("parameter_update", [params, u, squares, flags(True, True, True), *rest], monkeypatch)
    agree("parameter_update", [params, u, squares, flags(True, False, True), *rest], monkeypatch, plain=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", ["adamw", "rf", "rfw"])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("decays", [[0.0] * 3, [0.1, 0.0, 0.1]])
def test_diagonal(dtype, rule, maximize, decays, monkeypatch):
    shapes = (3, 4), (5,), ()
    params, grads, momenta = ([torch.randn(s, dtype=dtype) for s in shapes] for _ in range(3))
    seconds = [torch.rand(s, dtype=dtype) + 0.5 for s in shapes]
    counts = [[torch.tensor(float(t)) for t in (0, 3, 7)], [torch.tensor(0) for _ in shapes]]
    scale = (1.0, 1e-8, 1.0) if rule == "adamw" else (0.5, 1e-3, 30.0)
    rest = [torch.tensor(0.1, dtype=torch.float64), decays, 0.9, 0.95, *scale, rule, maximize]
    agree("diagonal_update", [params, grads, momenta, seconds, *counts, *rest], monkeypatch)
    strided = [[x.mT.contiguous().mT if x.ndim == 2 else x for x in xs] for xs in (params, grads, momenta, seconds)]
    for x, y in zip(
        agree("diagonal_update", [*strided, *counts, *rest], monkeypatch),
        agree("diagonal_update", [params, grads, momenta, seconds, *counts, *rest], monkeypatch),
        strict=True,
    ):
        assert torch.equal(x, y)
    rest[0] = torch.zeros((), dtype=torch.float64)
    agree("diagonal_update", [params, grads, momenta, seconds, *counts, *rest], monkeypatch)  # counts, though nothing moves
    grads[1] = torch.zeros(5, dtype=dtype)  # without a learning rate that is no step
    agree("diagonal_update", [params, grads, momenta, seconds, *counts, *rest], monkeypatch, plain=False)
    rest[0] += 0.1
    for flaw in (math.nan, math.inf):
        grads[0][0, 0] = flaw
        agree("diagonal_update", [params, grads, momenta, seconds, *counts, *rest], monkeypatch, plain=False)
    assert host.diagonal_update([], [], [], [], [], [], rest[0], [], *rest[2:]) is None


# --- inverse_free_update ----------------------------------------------------------------------------------------------


def factors(n: int, columns: int, dtype: torch.dtype, batch: int = 3) -> list:
    k, m = torch.randn(batch, n, n) + 2 * torch.eye(n), torch.randn(batch, n, n)
    number = torch.float64 if dtype == torch.float64 else torch.float32
    share, damping = torch.rand(batch, dtype=number), torch.rand(batch, dtype=number)
    x = torch.randn(batch, n, columns)
    return [k.to(dtype), (m + m.mT).to(dtype), x.to(dtype), share, damping, torch.ones(batch, dtype=torch.bool)]


OPTIONS = {"step": 0.6, "decay": 0.7, "gain": 0.15}
REST = [None, 0.6, 0.7, 0.15, 1.0]  # seed, step, decay, gain, gamma


@pytest.mark.parametrize("n,columns", [(1, 1), (1, 5), (4, 1), (5, 7), (13, 4)])
@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_inverse_free_update_formula(n, columns, gamma):
    k, m, x, share, damping, usable = factors(n, columns, torch.float64)
    got = [k.clone(), m.clone()]
    ops.inverse_free_update(*got, x, share, damping, usable, **OPTIONS, gamma=gamma)
    for i in range(3):
        eye = torch.eye(n, dtype=torch.float64)
        new = 0.7 * m[i] + 0.15 * (share[i] * x[i] @ x[i].mT + damping[i] * k[i].mT @ k[i] - gamma * eye)
        torch.testing.assert_close(got[1][i], new, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(got[0][i], k[i] @ (eye - 0.6 * new / max(1, new.norm())), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n,columns", [(1, 3), (6, 4), (23, 30)])
@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("damped", [False, True])
def test_inverse_free_update_whole_and_in_blocks(dtype, n, columns, blocks, damped, monkeypatch):
    if blocks:
        monkeypatch.setattr(host, "SMALLEST", 2)
        monkeypatch.setattr(blocked, "BLOCK", 5)
    args = factors(n, columns, dtype)
    args[4] *= damped
    _, m, *_ = agree("inverse_free_update", [*args, *REST], monkeypatch)
    torch.testing.assert_close(m, m.mT, rtol=1e-5, atol=1e-5)
    args[5] = flags(True, False, True)
    k, m, *_ = agree("inverse_free_update", [*args, *REST], monkeypatch)
    assert torch.equal(k[1], args[0][1]) and torch.equal(m[1], args[1][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n,columns", [(1, 3), (7, 4), (33, 50)])
def test_inverse_free_update_by_kernels(dtype, n, columns, request):
    args = factors(n, columns, dtype)
    args[5] = flags(True, False, True)
    mine, theirs, exact = copied(args), copied(args), [x.double() if x.is_floating_point() else x for x in args]
    seed = torch.arange(3) + 5
    ops.inverse_free_update(*theirs, **OPTIONS, seed=seed)
    ops.inverse_free_update(*exact, **OPTIONS)
    request.getfixturevalue("kernels_on_cpu")
    with recording() as launches:
        ops.inverse_free_update(*mine, **OPTIONS, seed=seed)
    assert [item.name for item in launches] == ["gram", "factor_squares", "factor"]
    for x, y, z, old in zip(mine[:2], theirs[:2], exact[:2], args[:2], strict=True):
        assert x.dtype == dtype and torch.equal(x[1], old[1])
        rounding = 2 * torch.finfo(dtype).eps * z.norm()  # of the momentum, and once more of the factor
        assert (x.double() - z).norm() <= 2 * (y.double() - z).norm() + rounding


def test_inverse_free_update_as_a_torch_op():
    args = factors(5, 7, torch.float32)
    torch.library.opcheck(torch.ops.spectral_ops.inverse_free_update.default, (*args, *REST))
    mine, theirs = copied(args), copied(args)
    ops.inverse_free_update(*theirs, **OPTIONS)
    torch.compile(lambda *a: ops.inverse_free_update(*a, **OPTIONS), fullgraph=True, backend="aot_eager")(*mine)
    assert torch.equal(mine[0], theirs[0]) and torch.equal(mine[1], theirs[1])


@pytest.mark.parametrize(
    "place,value,message",
    [
        (0, torch.ones(2, 3, 4), r"`k` must have shape \(..., n, n\), got \(2, 3, 4\)"),
        (0, torch.ones(3, 3), r"`k` must have shape \(b, n, m\), got \(3, 3\)"),
        (1, torch.ones(3, 4, 4), r"`m` must have shape \(3, 5, 5\), got \(3, 4, 4\)"),
        (2, torch.ones(3, 4, 7), r"`x` must have shape \(3, 5, 7\), got \(3, 4, 7\)"),
        (3, torch.ones(2), r"`share` must have shape \(3,\), got \(2,\)"),
        (5, torch.ones(3), "`usable` must be bool"),
    ],
)
def test_inverse_free_update_names_what_is_wrong(place, value, message):
    args = factors(5, 7, torch.float32)
    args[place] = value
    with pytest.raises(ValueError, match=f"inverse_free_update: {message}"):
        ops.inverse_free_update(*args, **OPTIONS)
