"""The quadratic at a tiny size: the problem, Shampoo and grafting by hand, dtypes, that the table says what the runs did."""

import csv
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from spectral_ops.bench import output, quadratic
from spectral_ops.bench.__main__ import COMMANDS
from spectral_ops.bench.quadratic import Candidate, Grafted, Run, Shampoo, descend, problem

SIZE = 8
CANDIDATES = list(quadratic.candidates())


@pytest.fixture(autouse=True)
def _denormals() -> Iterator[None]:
    yield
    torch.set_flush_denormal(False)  # the program sets it for its process, which here is everyone's


def named(name: str, dtype: str, update: str) -> Candidate:
    return next(c for c in CANDIDATES if (c.name, c.dtype_name, c.update) == (name, dtype, update))


@pytest.mark.parametrize("spectrum", quadratic.SPECTRA)
def test_both_matrices_are_dense_and_badly_conditioned(spectrum: str) -> None:
    task = problem(spectrum, 0)
    for x in (task.a, task.b):
        e = torch.linalg.eigvalsh(x)
        assert x.dtype == torch.float64 and torch.equal(x, x.T)
        assert e[-1] / e[0] == pytest.approx(1e10, rel=1e-3) and e[-1] == pytest.approx(10)
        assert (x - x.diag().diag()).norm() > 0.1 * x.norm()
        assert (e[64] > 1) == (spectrum == "steep")
    assert not torch.allclose(task.a, task.b)
    assert torch.equal(task.start, problem(spectrum, 0).start) and not torch.equal(task.start, problem(spectrum, 1).start)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_is_that_of_the_loss_in_float64(dtype: torch.dtype) -> None:
    task = problem("steep", 0, SIZE)
    x = task.start.to(dtype)
    y = x.double().requires_grad_()
    loss = torch.trace(y.T @ task.a @ y @ task.b)
    loss.backward()
    assert task.loss(x) == pytest.approx(loss.item(), rel=1e-14)
    assert y.grad is not None and task.gradient(x).dtype == dtype
    torch.testing.assert_close(task.gradient(x), y.grad.to(dtype), rtol=1e-6 if dtype == torch.float32 else 1e-12, atol=1e-12)


def inverse_root(x: Tensor) -> Tensor:
    d, v = torch.linalg.eigh(x)
    return v @ torch.diag(d**-0.25) @ v.T


def test_shampoo_is_that_of_gupta_et_al() -> None:
    task, eps, lr = problem("even", 0, SIZE), 1e-2, 1.0
    w = task.start.clone()
    left, right = eps * torch.eye(SIZE).double(), eps * torch.eye(SIZE).double()
    for _ in range(10):
        g = task.gradient(w)
        left, right = left + g @ g.T, right + g.T @ g
        w = w - lr * inverse_root(left) @ g @ inverse_root(right)
    x = Parameter(task.start.clone())
    optimizer = Shampoo([x], lr, eps)
    for _ in range(10):
        x.grad = task.gradient(x)
        optimizer.step()
    assert (w - task.start).norm() > 0.1 * task.start.norm()
    torch.testing.assert_close(x.detach(), w, rtol=1e-10, atol=1e-10)


def test_grafted_updates_are_as_long_as_the_gradient() -> None:
    """With Nesterov momentum as in the program of the paper: applied to the buffer itself."""
    task, lr = problem("even", 0, SIZE), 1e-3
    x, shadow = Parameter(task.start.clone()), Parameter(task.start.clone())
    optimizer = Grafted([x], lr, lambda params, rate: Shampoo(params, rate, 1e-2))
    inner = Shampoo([shadow], 1.0, 1e-2)
    momentum = torch.zeros_like(task.start)
    for _ in range(4):
        before = x.detach().clone()
        x.grad = task.gradient(x)
        shadow.grad = x.grad.clone()
        was = shadow.detach().clone()
        inner.step()
        update = (was - shadow.detach()) * (x.grad.norm() / (was - shadow.detach()).norm())
        momentum = 0.81 * momentum + 1.9 * update
        optimizer.step()
        torch.testing.assert_close(before - x.detach(), lr * momentum, rtol=1e-9, atol=1e-12)


def test_every_optimizer_gets_as_many_learning_rates() -> None:
    names = [(c.name, c.dtype_name, c.update) for c in CANDIDATES]
    assert len(set(names)) == len(names)
    for candidate in CANDIDATES:
        rates = candidate.rates()
        assert len(rates) == quadratic.RATES and rates == sorted(rates)
        assert rates[1] / rates[0] == pytest.approx(10**0.5)


@pytest.mark.parametrize("candidate", CANDIDATES, ids=lambda c: f"{c.name}, {c.dtype_name}, {c.update}")
def test_each_optimizer_works_in_its_dtype(candidate: Candidate) -> None:
    """The parameter and all matrices of the state; counters and scales are single numbers."""
    task = problem("even", 0, SIZE)
    x = Parameter(task.start.to(candidate.dtype, copy=True))
    optimizer = candidate.build([x], 1e-3)
    for _ in range(2):
        x.grad = task.gradient(x)
        optimizer.step()
    assert x.dtype == candidate.dtype and not torch.equal(x.detach(), task.start.to(candidate.dtype))
    states = [*optimizer.state.values(), *(optimizer.inner.state.values() if isinstance(optimizer, Grafted) else ())]
    assert states or candidate.name == "SGD"
    for state in states:
        for name, value in state.items():
            assert value.ndim == 0 or value.dtype == candidate.dtype, name


def test_what_diverges_ends_there() -> None:
    sgd = named("SGD", "fp32", "own")
    task = problem("even", 0, SIZE)
    loss = descend(task, sgd, 0.03, 50)
    assert loss[-1] == math.inf and 3 < len(loss) < 20 and all(map(math.isfinite, loss[:-1]))
    assert len(descend(task, sgd, 1e-3, 5)) == 6


def test_the_table_has_the_losses_in_float64(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quadratic, "SIZE", SIZE)
    monkeypatch.setattr(quadratic, "RATES", 2)
    monkeypatch.setattr(quadratic, "RECORD", 2)
    steps = 3
    quadratic.main(["--steps", str(steps), "--seed", "1", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    with (tmp_path / "quadratic.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert set(output.PROVENANCE) | {"seed", "command"} < set(rows[0])
    assert rows[0]["command"] == f"python -m spectral_ops.bench quadratic --steps {steps} --seed 1" and rows[0]["code"]
    for spectrum in quadratic.SPECTRA:
        task = problem(spectrum, 1, SIZE)
        for candidate in CANDIDATES:
            key = (spectrum, candidate.name, candidate.dtype_name, candidate.update)
            mine = [r for r in rows if (r["spectrum"], r["optimizer"], r["dtype"], r["update"]) == key]
            best = [r for r in mine if r["best"] == "True"]
            assert [r["step"] for r in best] == ["0", "2", "3"] and len(mine) == 4
            assert float(best[-1]["loss"]) <= float(mine[-1]["loss"])
            assert float(best[0]["loss"]) == pytest.approx(task.loss(task.start), rel=1e-3)
    # one of them by hand
    task = problem("even", 1, SIZE)
    ends = []
    for lr in named("SGD", "fp32", "own").rates()[:2]:
        x = task.start.float()
        for _ in range(steps):
            x = x - lr * (2 * task.a @ x.double() @ task.b).float()
        ends.append(float(torch.einsum("ij,ik,kl,jl->", x.double(), task.a, x.double(), task.b)))
    (row,) = (r for r in rows if (r["spectrum"], r["optimizer"], r["best"], r["step"]) == ("even", "SGD", "True", str(steps)))
    assert float(row["loss"]) == pytest.approx(min(ends), rel=1e-3)
    (line,) = (line for line in printed.splitlines() if line.startswith("SGD"))
    assert line.split()[-2] == f"{min(ends):.3g}"
    if "no PNG" not in printed:
        assert (tmp_path / "quadratic.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("single,word", [(2.0, "below"), (0.5, "NOT below")])
def test_the_claim_is_told_as_it_came_out(single: float, word: str) -> None:
    best = [
        Run(spectrum, c, 0.1, [9.0, 1.0 if c.name == quadratic.KRADAGRAD else single if c.dtype_name == "fp32" else 0.25])
        for spectrum in quadratic.SPECTRA
        for c in CANDIDATES
    ]
    sentences = list(quadratic.claims(best))
    assert len(sentences) == 2 * 2 * len(quadratic.EPSILONS)
    assert sentences[0] == (
        f"steep, plain: KrADagrad* fp32 ends at 1, {word} Shampoo fp32 of eps 1e-08 at {single:g} (fp64: 0.25)"
    )


def test_the_command_is_listed_and_checks_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert "quadratic" in COMMANDS
    with pytest.raises(SystemExit):
        quadratic.main(["--steps", "0"])
    assert "--steps must be at least 1, got 0" in capsys.readouterr().err
