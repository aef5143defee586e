"""Timings of optimizer steps: every candidate steps, wrong ones are found, and what is written."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import spectral_ops as ops
from spectral_ops.bench import output, steps
from spectral_ops.bench.steps import CANDIDATES, Candidate, Setting
from spectral_ops.bench.tasks import Text
from spectral_ops.bench.training import state_bytes
from spectral_ops.optim import SpectralKron

TEXT = Setting("text", ("SpectralKron", "SOAP", "Muon", "AdamW"), rounds=2, width=32, layers=1, preset="tiny")
WIDTH = Setting("width", ("SpectralKron", "Muon"), rounds=2, width=8, layers=2, shapes=steps.block(8))


@pytest.fixture(autouse=True)
def _denormals() -> Iterator[None]:
    yield
    torch.set_flush_denormal(False)  # the program sets it for its process, which here is everyone's


@pytest.fixture
def run_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, str]]]:
    def run(*arguments: str) -> list[dict[str, str]]:
        steps.main([*arguments, "--out", str(tmp_path)])
        return output.read_csv(tmp_path / "steps-cpu.csv")

    monkeypatch.setitem(steps.SETTINGS, "cpu", [TEXT, WIDTH])
    return run


def test_what_is_written(run_steps: Callable[..., list[dict[str, str]]], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pytorch_optimizer")
    rows = run_steps("--rounds", "3")
    assert [(r["setting"], r["optimizer"]) for r in rows] == [(s.name, name) for s in (TEXT, WIDTH) for name in s.candidates]
    assert all(r["code"] == output.code() and r["hardware"] and r["torch"] and r["date"] and r["rounds"] == "3" for r in rows)
    assert {r["command"] for r in rows} == {"python -m spectral_ops.bench steps --rounds 3"}
    assert [r["package"].split()[0] for r in rows[:4]] == ["spectral_ops", "pytorch_optimizer", "torch", "torch"]
    assert [r["gate"] for r in rows] == ["passed", "", "", "", "passed", ""]
    assert all(float(r["p20_ms"]) <= float(r["p50_ms"]) <= float(r["p80_ms"]) for r in rows)
    assert all((r["model_ms"] != "") == (r["setting"] == "text") for r in rows)
    assert {r["parameters"] for r in rows[4:]} == {str(2 * 12 * 64)}
    printed = capsys.readouterr().out
    assert "vs SOAP" in printed and "of a training step" in printed and f"PyTorch {torch.__version__}" in printed


def test_settings_are_chosen_by_name(
    run_steps: Callable[..., list[dict[str, str]]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert {r["setting"] for r in run_steps("--setting", "width")} == {"width"}
    with pytest.raises(SystemExit):
        run_steps("--setting", "depth")
    assert "no setting is called 'depth'; there are text, width" in capsys.readouterr().err


def test_a_peer_that_is_not_installed_is_said_in_one_line(
    run_steps: Callable[..., list[dict[str, str]]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    assert "SOAP" not in {r["optimizer"] for r in run_steps("--setting", "text", "--rounds", "2")}
    lines = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert lines == ["SOAP is left out: pytorch_optimizer is not installed (pip install 'spectral-ops[bench]')"]


@pytest.mark.parametrize("name", CANDIDATES)
def test_every_candidate_steps_the_hidden_matrices_and_the_rest(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function: function)
    task = Text("tiny")
    model, gradients = steps.problem(TEXT, task, "cpu")
    try:
        stepping = steps.Stepping(CANDIDATES[name], model, gradients, task)
    except ModuleNotFoundError as error:
        pytest.skip(f"{error.name} is not installed")
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(3):
        assert stepping.step() > 0
    moved = [not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
    assert all(moved), [n for (n, _), m in zip(model.named_parameters(), moved, strict=True) if not m]
    assert all(p.isfinite().all() for p in model.parameters())
    # Momentum at least. SINGD, SIRFShampoo and PSGD-Kron keep more than that outside of `optimizer.state`.
    total = sum(p.numel() for p in model.parameters())
    assert sum(map(state_bytes, stepping.optimizers)) >= (12 if "SINGD" in name or "SIRF" in name else 4) * total


def test_intervals_are_timed_over_a_period() -> None:
    for candidate in CANDIDATES.values():
        names = ("update_interval", "precondition_frequency", "preconditioning_compute_steps", "T")
        intervals = [candidate.options[name] for name in names if name in candidate.options]
        assert intervals in ([], [candidate.period])
    model, gradients = steps.problem(WIDTH, None, "cpu")
    stepping = steps.Stepping(CANDIDATES["SpectralKron, interval 10"], model, gradients, None)
    stepping.time()
    assert stepping.steps == 10 and len(stepping.seconds) == 1


def test_gradients_are_real_and_differ() -> None:
    model, gradients = steps.problem(TEXT, Text("tiny"), "cpu")
    assert len(gradients) == steps.GRADIENTS
    assert [g.shape for g in gradients[0]] == [p.shape for p in model.parameters()]
    assert all(not torch.equal(a, b) for a, b in zip(gradients[0], gradients[1], strict=True))


@pytest.mark.parametrize("name", [name for name, c in CANDIDATES.items() if c.method == "spectral_kron"])
def test_the_gate_lets_our_steps_pass(name: str) -> None:
    assert steps.gate(CANDIDATES[name], (20, 12), "cpu") == "passed"


@pytest.mark.parametrize("options", [{}, steps.BF16])
@pytest.mark.parametrize("factor", [0.5, float("nan")])
def test_the_gate_finds_wrong_steps(options: dict[str, object], factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    root = ops.apply_root

    def wrong(g: torch.Tensor, *rest: object, **named: object) -> object:
        u, squares = root(g, *rest, **named)
        u[..., 0, :] *= factor if g.dtype == torch.float32 else 1
        return u, squares

    monkeypatch.setattr(ops, "apply_root", wrong)
    assert steps.gate(Candidate("spectral_kron", dict(options)), (20, 12), "cpu").startswith("failed: error ")


def test_a_failed_gate_is_refused_in_the_table() -> None:
    row = steps.Timing("text", "SpectralKron", "spectral_ops", 1, 2, 3, 5, 8, 40, 10, 96, 3, "passed")
    peer = replace(row, optimizer="SOAP", package="x 1", p50_ms=4.0, gate="")
    assert "0.50" in steps.table([row, peer]) and "20.0%" in steps.table([row, peer])
    text = steps.table([replace(row, gate="failed: error"), peer])
    assert "refused" in text and "0.50" not in text


def test_the_state_counts_what_shares_memory_once() -> None:
    p = nn.Parameter(torch.randn(6, 4))
    optimizer = SpectralKron([p])
    p.grad = torch.randn(6, 4)
    assert state_bytes(optimizer) == 0
    optimizer.step()
    expected = sum(x.numel() * x.element_size() for x in optimizer.state[p].values())
    optimizer.twice = list(optimizer.state[p].values())  # type: ignore[attr-defined]
    assert expected <= state_bytes(optimizer) <= expected + 64  # what the engine keeps beside it


def test_time_is_measured_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the step is: gradients are copied before the clock starts."""
    seen = []
    monkeypatch.setattr(steps, "clock", lambda device: seen.append(1) or float(len(seen)))
    model, gradients = steps.problem(WIDTH, None, "cpu")
    assert steps.Stepping(CANDIDATES["AdamW"], model, gradients, None).step() == 1.0


def test_it_stops_at_the_deadline() -> None:
    timings = steps.measure(replace(WIDTH, rounds=50), "cpu", deadline=0.0)
    assert {t.rounds for t in timings} == {2}


@pytest.mark.parametrize(("seconds", "steps_made"), [(0.1, steps.WARMUP), (3.0, 2), (100.0, 2)])
def test_a_slow_warm_up_is_short(seconds: float, steps_made: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, gradients = steps.problem(WIDTH, None, "cpu")
    stepping = steps.Stepping(CANDIDATES["AdamW"], model, gradients, None)
    made: list[float] = []
    monkeypatch.setattr(stepping, "step", lambda: made.append(seconds) or seconds)
    stepping.warm_up()
    assert len(made) == steps_made


@pytest.mark.parametrize(
    ("name", "seconds", "count"), [("AdamW", 0.004, 13), ("AdamW", 1.0, 1), ("SOAP, interval 10", 0.004, 20)]
)
def test_a_timing_takes_long_enough(name: str, seconds: float, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In whole periods."""
    model, gradients = steps.problem(WIDTH, None, "cpu")
    stepping = steps.Stepping(replace(CANDIDATES["AdamW"], period=CANDIDATES[name].period), model, gradients, None)
    monkeypatch.setattr(stepping, "step", lambda: seconds)
    stepping.warm_up()
    stepping.time()
    assert stepping.count == count and stepping.seconds == [pytest.approx(seconds)]


def test_what_computes_in_the_backward_pass_is_timed_without_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Text("tiny")
    model, gradients = steps.problem(TEXT, task, "cpu")
    stepping = steps.Stepping(Candidate("adamw", period=2, hooks=True), model, gradients, task)
    monkeypatch.setattr(stepping, "step", lambda: 5.0)
    monkeypatch.setattr(stepping.passing, "passes", lambda count: 3.0 * count)
    stepping.time()
    assert stepping.seconds == [2.0]
