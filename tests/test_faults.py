"""The fault table: every optimizer through every fault, and that the table notices an optimizer that is broken."""

import csv
import inspect
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from spectral_ops import optim
from spectral_ops.bench import faults, train
from spectral_ops.bench.faults import FAULTS, Fault
from spectral_ops.bench.optimizers import OPTIMIZERS
from spectral_ops.bench.regression import Regression
from spectral_ops.optim import SpectralKron, _engine


def name_of(fault: Fault) -> str:
    return f"{fault.group}: {fault.name}"


@pytest.mark.parametrize("fault", FAULTS, ids=name_of)
def test_every_optimizer_survives(fault: Fault) -> None:
    cases = [faults.run(name, build, fault) for name, build in OPTIMIZERS.items()]
    assert not [f"{case.optimizer}: {case.verdict}" for case in cases if case.verdict]


def test_the_table_is_complete() -> None:
    assert len(FAULTS) * len(OPTIMIZERS) >= 100
    assert len(set(map(name_of, FAULTS))) == len(FAULTS)
    assert {optimizer for fault in FAULTS for optimizer in fault.unlike} <= set(OPTIMIZERS)
    public = {getattr(optim, name) for name in optim.__all__}
    classes = {x for x in public if inspect.isclass(x) and issubclass(x, Optimizer)}
    assert classes and classes <= {c for build in OPTIMIZERS.values() for c in type(Regression(build).optimizer).__mro__}
    assert not Regression(SpectralKron, "transposed").parameters["odd"].is_contiguous()


# --- broken optimizers ------------------------------------------------------------------------------------------------


def spoiled(optimizer: Optimizer) -> list[Tensor]:
    """Parameters whose gradient is not finite."""
    params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return [p for p in params if not p.grad.is_sparse and not p.grad.isfinite().all()]


class Plain(torch.optim.AdamW):
    """PyTorch's own: takes whatever comes, and counts nothing."""

    def skipped_steps(self) -> Tensor:
        return torch.zeros((), dtype=torch.int64)


class Uncounted(SpectralKron):
    def skipped_steps(self) -> Tensor:
        return torch.zeros((), dtype=torch.int64)


class CountedTwice(SpectralKron):
    def skipped_steps(self) -> Tensor:
        return 2 * super().skipped_steps()


class Cleaned(SpectralKron):
    """Trains on what is left of a gradient."""

    def step(self, closure: Any = None) -> Any:
        for p in spoiled(self):
            p.grad.nan_to_num_(0, 0, 0)
        return super().step(closure)


class Touched(SpectralKron):
    """A skipped step leaves a trace in the state."""

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        for p in spoiled(self):
            next(x for name, x in self.state[p].items() if not name.startswith("skipped")).add_(1)


class AllSkip(SpectralKron):
    """One bad gradient costs all parameters the step."""

    def step(self, closure: Any = None) -> Any:
        if spoiled(self):
            for group in self.param_groups:
                for p in group["params"]:
                    p.grad.fill_(torch.nan)
        return super().step(closure)


class Apart(SpectralKron):
    """Experts and parts skip on their own, while `shares` is away."""


class Poisoned(SpectralKron):
    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        for p, state in self.state.items():
            if p.grad.square().sum() == 0:
                next(iter(state.values())).fill_(torch.nan)


class Still(SpectralKron):
    def step(self, closure: Any = None) -> Any:
        pass


class Ascending(SpectralKron):
    def __init__(self, params: Any, **options: Any):
        super().__init__(params, **options, maximize=True)


class LateToRefuse(SpectralKron):
    """Changes something before it finds that a gradient is sparse."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                p.data.mul_(0.99)
        return super().step(closure)


class GroupStays(SpectralKron):
    """A parameter group that was refused is kept."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        Optimizer.add_param_group(self, dict(param_group))
        self._check_group(self.param_groups[-1])
        self._check_parameters(self.param_groups[-1])


class LoadsFirst(SpectralKron):
    def load_state_dict(self, state_dict: Any) -> None:
        self.state.clear()
        super().load_state_dict(state_dict)


class LoadsUnchecked(SpectralKron):
    """PyTorch's own loading, which also casts to the parameter's dtype."""

    def load_state_dict(self, state_dict: Any) -> None:
        Optimizer.load_state_dict(self, state_dict)


class Vague(SpectralKron):
    def load_state_dict(self, state_dict: Any) -> None:
        raise ValueError("this state does not fit")


class Forgetful(SpectralKron):
    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        for state in self.state.values():
            next(iter(state.values())).zero_()


UNTOUCHED = "in the faulty step, {} differs in .*"


@pytest.mark.parametrize(
    "optimizer,group,fault,verdict",
    [
        (Plain, "gradients", "NaN in a matrix", UNTOUCHED.format("query")),
        (Plain, "gradients", "1e30 in one expert", UNTOUCHED.format("experts")),
        (Plain, "gradients", "NaN in the first step", UNTOUCHED.format("query")),
        (Plain, "gradients", "all NaN, 20 steps", UNTOUCHED.format("query")),
        (Plain, "gradients", "sparse", "RuntimeError does not name 'query'.*"),
        (Plain, "parameters", "complex", "expected error: TypeError, got trains"),
        (Plain, "options", "lr=-1", "ValueError does not name `lr`.*"),
        (Plain, "checkpoints", "of SGD", "KeyError.*"),
        (Uncounted, "gradients", "-Inf in a bias", "expected skipped 1, got trains"),
        (Uncounted, "gradients", "all NaN, 20 steps", "expected skipped 80, got trains"),
        (CountedTwice, "gradients", "NaN in bfloat16", "expected skipped 1, got skipped 2"),
        (CountedTwice, "gradients", "Inf in one part", "expected skipped 1, got skipped 2"),
        (Cleaned, "gradients", "Inf in a matrix", UNTOUCHED.format("query")),
        (Cleaned, "gradients", "NaN in a bias", UNTOUCHED.format("bias")),
        (Touched, "gradients", "NaN in a matrix", UNTOUCHED.format("query")),
        (Touched, "gradients", "NaN in the first step", "compared to training without that gradient, query differs in .*"),
        (AllSkip, "gradients", "NaN in a matrix", "compared to training without that gradient, experts differs in .*"),
        (Apart, "gradients", "NaN in one expert", UNTOUCHED.format("experts")),
        (Apart, "gradients", "Inf in one part", UNTOUCHED.format("fused")),
        (Poisoned, "gradients", "1e-30", "query: step not finite"),
        (Poisoned, "gradients", "zero", "query: step not finite"),
        (Poisoned, "gradients", "zero at lr=0", "query: step not finite"),
        (Ascending, "gradients", "rank 1", "the loss rose.*"),
        (Ascending, "parameters", "scalar", "the loss rose.*"),
        (LateToRefuse, "gradients", "sparse", "after the error, query differs in value"),
        (LateToRefuse, "gradients", "None now and then", UNTOUCHED.format("query")),
        (GroupStays, "parameters", "complex", "after the error, group 2 differs in .*"),
        (GroupStays, "options", "lr='fast'", "after the error, group 2 differs in .*"),
        (LoadsFirst, "checkpoints", "of AdamW", "after the error, query differs in .*"),
        (LoadsFirst, "checkpoints", "wrong shape", "after the error, query differs in .*"),
        (LoadsFirst, "checkpoints", "of a model", "after the error, query differs in .*"),
        (LoadsUnchecked, "checkpoints", "saved and loaded", "after loading, query differs in skipped"),
        (LoadsUnchecked, "checkpoints", "missing entry", "RuntimeError: .*"),
        (Vague, "checkpoints", "of SGD", "ValueError does not name 'query': this state does not fit"),
        (Vague, "checkpoints", "as float64", "ValueError: this state does not fit"),
        (Forgetful, "checkpoints", "saved and loaded", "after loading, query differs in .*"),
        (Forgetful, "checkpoints", "kill before rename", "after resuming, parameter 0 differs in .*"),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_a_broken_optimizer_fails(
    optimizer: type[Optimizer], group: str, fault: str, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if optimizer is Apart:
        monkeypatch.setattr(_engine, "shares", lambda classes: {})
    (chosen,) = (each for each in FAULTS if (each.group, each.name) == (group, fault))
    case = faults.run("broken", optimizer, chosen)
    assert re.fullmatch(verdict, case.verdict.splitlines()[0] if case.verdict else ""), case.verdict


def test_an_optimizer_that_stands_still_fails_everywhere() -> None:
    """So every fault ends in training. What is killed need not have moved."""
    passed = [fault.name for fault in FAULTS if not faults.run("still", Still, fault).verdict]
    assert passed == ["kill while writing", "kill before rename"]


def in_place(state: Any, path: Path) -> None:
    torch.save(state, path)


def remove_first(state: Any, path: Path) -> None:
    path.unlink(missing_ok=True)
    torch.save(state, path.with_name("partial"))
    os.replace(path.with_name("partial"), path)


@pytest.mark.parametrize(
    "save,during,verdict",
    [
        (in_place, "before rename", "it saves without os.replace"),
        (in_place, "while writing", "RuntimeError"),
        (remove_first, "before rename", "FileNotFoundError"),
    ],
)
def test_a_save_that_can_lose_the_checkpoint_fails(
    save: Callable[[Any, Path], None], during: str, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(experiment: train.Experiment, path: Path) -> None:
        run = experiment.run and experiment.run.state_dict()
        save({"options": experiment.options, "finished": [], "run": run}, path)

    monkeypatch.setattr(train.Experiment, "save", broken)
    (fault,) = (each for each in FAULTS if each.name == f"kill {during}")
    assert faults.run("SpectralKron", SpectralKron, fault).verdict.startswith(verdict)


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_prints_and_writes_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = [fault for fault in FAULTS if fault.name in ("NaN in a matrix", "scalar", "lr=-1")]
    monkeypatch.setattr(faults, "FAULTS", chosen)
    monkeypatch.setattr(faults, "OPTIMIZERS", {"SpectralKron": SpectralKron})
    faults.main(["--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert [line.split()[-1] for line in printed.splitlines() if line.startswith(tuple(f.name for f in chosen))] == [
        "1", "trains", "ValueError"
    ]  # fmt: skip
    assert "3 cases, 0 failed" in printed and f"PyTorch {torch.__version__}" in printed

    monkeypatch.setattr(faults, "OPTIMIZERS", {"SpectralKron": SpectralKron, "uncounted": Uncounted})
    with pytest.raises(SystemExit) as stop:
        faults.main(["--out", str(tmp_path)])
    assert stop.value.code == 1
    printed = capsys.readouterr().out
    assert "6 cases, 1 failed\nuncounted, NaN in a matrix (in one element, once): expected skipped 1, got trains" in printed
    with (tmp_path / "faults.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [bool(row["verdict"]) for row in rows] == [False, True, False, False, False, False]
    assert all(row["description"] and row["hardware"] and row["torch"] and row["date"] for row in rows)
