"""The benchmark programs at their smallest size: what they write, and that a run which stops continues exactly."""

import csv
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from spectral_ops.bench import __main__ as program
from spectral_ops.bench import curves, output, tasks, train, training
from spectral_ops.bench.methods import method
from spectral_ops.bench.training import Curve, Run

PNG = b"\x89PNG"
METHODS = ["spectral_kron", "muon", "soap", "adamw"]
BY_LAYER = ["singd_dense", "singd_hierarchical", "singd_diagonal", "ikfac", "kfac"]


@pytest.fixture(autouse=True)
def _denormals() -> Iterator[None]:
    yield
    torch.set_flush_denormal(False)  # the programs set it for their process, which here is everyone's


@pytest.fixture
def run_train(tmp_path: Path) -> Callable[..., Path]:
    def run(*arguments: str, out: str = "out") -> Path:
        train.main(["--preset", "tiny", "--steps", "12", "--out", str(tmp_path / out), *arguments])
        return tmp_path / out

    return run


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Call `action` in the middle of the given training step of the given method, once."""

    def arrange(name: str, step: int, action: Callable[[], Any]) -> None:
        original = Run._clock
        pending = [action]

        def clock(run: Run) -> float:
            if pending and (run.curve.method, run.step, run.steps > 2) == (name, step, True):
                pending.pop()()
            return original(run)

        monkeypatch.setattr(Run, "_clock", clock)

    return arrange


def press_ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


def read_curves(out: Path, task: str = "text") -> list[dict[str, str]]:
    with (out / f"train-{task}-tiny.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def comparable(state: Any) -> Any:
    """Without times, and without the flag that torch.optim adds to a loaded optimizer's groups."""
    if isinstance(state, dict):
        return {k: comparable(v) for k, v in state.items() if k not in ("seconds", "optimizer_seconds", "differentiable")}
    return [comparable(v) for v in state] if isinstance(state, list | tuple) else state


def same(a: Any, b: Any) -> bool:
    """Bitwise equality of nested states."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, torch.Tensor) else a == b


def test_train_writes_table_csv_and_png(run_train: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pytorch_optimizer")
    out = run_train("--seed", "0,1", "--steps", "4")
    printed = capsys.readouterr().out
    assert all(f"vs {name}" in printed for name in ("adamw", "muon", "soap"))
    assert all(f"\n{name} " in printed for name in METHODS)
    rows = read_curves(out)
    assert list(rows[0]) == ["method", "seed", "step", "loss", "seconds", *output.PROVENANCE, "command"]
    assert {r["command"] for r in rows} == {"python -m spectral_ops.bench train --preset tiny --steps 4 --seed 0,1"}
    assert [(r["method"], r["seed"], r["step"]) for r in rows] == [
        (name, seed, str(step)) for seed in "01" for name in METHODS for step in (1, 2, 3, 4)
    ]
    assert (out / "train-text-tiny.png").read_bytes().startswith(PNG)


def test_curves_are_written_after_every_run(
    run_train: Callable[..., Path], interrupt: Callable[..., None], tmp_path: Path
) -> None:
    seen: list[set[str]] = []
    interrupt("adamw", 0, lambda: seen.append({row["method"] for row in read_curves(tmp_path / "out")}))
    assert {row["method"] for row in read_curves(run_train("--methods", "muon,adamw", "--steps", "4"))} == {"muon", "adamw"}
    assert seen == [{"muon"}]


def test_train_digits_without_tqdm(run_train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert read_curves(run_train("--task", "digits", "--methods", "adamw"), "digits")[-1]["step"] == "12"


def test_train_digits_by_a_conv_net(run_train: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    names = ["singd_dense", *(f"{name}_bf16" for name in BY_LAYER)]
    rows = read_curves(run_train("--task", "digits-conv", "--methods", ",".join([*names, "adamw"])), "digits-conv")
    losses = {row["method"]: float(row["loss"]) for row in rows if row["step"] == "12"}
    assert list(losses) == [*names, "adamw"] and max(losses.values()) < 3


def test_layers_take_their_options_and_the_rest_adamw() -> None:
    pytest.importorskip("sklearn")
    options = {"lr": 0.03, "rest_lr": 0.002, "preconditioner_lr": 0.4}
    model = tasks.Digits("tiny").model()
    (optimizer,) = method("singd_hierarchical_bf16", **options).build(model)
    matrix, rest = optimizer.param_groups
    assert (matrix["lr"], matrix["preconditioner_lr"], rest["lr"]) == (0.03, 0.4, 0.002)
    assert (matrix["preconditioner_dtype"], matrix["update_scale"]) == ("bfloat16", "rms")
    weights = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear)}
    assert weights <= {id(p) for p in matrix["params"]} and not weights & {id(p) for p in rest["params"]}


@pytest.mark.parametrize("name", METHODS)
def test_resume_is_bit_exact(name: str, run_train: Callable[..., Path], interrupt: Callable[..., None], tmp_path: Path) -> None:
    if name == "soap":
        pytest.importorskip("pytorch_optimizer")
    whole, parts = tmp_path / "whole.pt", tmp_path / "parts.pt"
    run_train("--methods", name, "--checkpoint", str(whole))
    interrupt(name, 5, press_ctrl_c)
    with pytest.raises(SystemExit) as stop:
        run_train("--methods", name, "--checkpoint", str(parts))
    assert stop.value.code == 130
    assert torch.load(parts, weights_only=True)["run"]["step"] == 6  # the step that was interrupted is completed
    run_train("--resume", str(parts))
    a, b = (comparable(torch.load(path, weights_only=True)) for path in (whole, parts))
    assert a["run"]["step"] == 12
    assert same(a, b)
    assert not list(tmp_path.glob("*.partial"))


def test_ctrl_c_leaves_results_and_resume_repeats_nothing(
    run_train: Callable[..., Path],
    interrupt: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint = str(tmp_path / "run.pt")
    interrupt("muon", 5, press_ctrl_c)
    with pytest.raises(SystemExit) as stop:
        run_train("--methods", "adamw,muon", "--checkpoint", checkpoint)
    assert stop.value.code == 130
    assert "\nmuon, to step 6 " in capsys.readouterr().out
    before = read_curves(tmp_path / "out")
    assert [r["step"] for r in before if r["method"] == "muon"] == list("123456")
    assert (tmp_path / "out" / "train-text-tiny.png").read_bytes().startswith(PNG)
    after = read_curves(run_train("--resume", checkpoint))
    assert after[: len(before)] == before
    assert len(after) == 24


def test_a_second_ctrl_c_stops_at_once(run_train: Callable[..., Path], interrupt: Callable[..., None], tmp_path: Path) -> None:
    def press_twice() -> None:
        press_ctrl_c()
        press_ctrl_c()

    checkpoint = tmp_path / "run.pt"
    interrupt("adamw", 3, press_twice)
    with pytest.raises(SystemExit) as stop:
        run_train("--methods", "adamw", "--checkpoint", str(checkpoint), "--checkpoint-every", "2")
    assert stop.value.code == 130
    assert torch.load(checkpoint, weights_only=True)["run"]["step"] == 2
    assert len(read_curves(tmp_path / "out")) == 3


def test_ctrl_c_before_the_first_evaluation(
    run_train: Callable[..., Path], interrupt: Callable[..., None], tmp_path: Path
) -> None:
    interrupt("adamw", 0, press_ctrl_c)
    with pytest.raises(SystemExit):
        run_train("--methods", "adamw", "--steps", "200")
    assert read_curves(tmp_path / "out") == []


def test_missing_soap_is_said_in_one_line(
    run_train: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    out = run_train("--methods", "soap,adamw", "--steps", "2")
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if "pytorch_optimizer" in line]
    assert lines == ["soap is left out: pytorch_optimizer is not installed (pip install 'spectral-ops[bench]')"]
    assert {r["method"] for r in read_curves(out)} == {"adamw"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere.txt"], "--data nowhere.txt: no such file or folder"),
        (["--task", "digits", "--preset", "gpu"], "--preset gpu: the digits task has tiny, default"),
        (["--methods", "sgd"], "no method is called 'sgd'"),
        (["--steps", "0"], "a positive integer is needed, got '0'"),
        (["--resume", "nowhere.pt"], "nowhere.pt"),
    ],
)
def test_wrong_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        train.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 cut off"])
def test_a_damaged_checkpoint_is_named(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.pt"
    path.write_bytes(content)
    with pytest.raises(SystemExit):
        train.main(["--resume", str(path)])
    assert "run.pt is no checkpoint, or a damaged one" in capsys.readouterr().err
    torch.save({"model": {}}, path)
    with pytest.raises(SystemExit):
        train.main(["--resume", str(path)])
    assert "run.pt is no checkpoint of this command" in capsys.readouterr().err


def test_options_cannot_change_on_resuming(
    run_train: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = str(tmp_path / "run.pt")
    run_train("--methods", "adamw", "--checkpoint", checkpoint)
    with pytest.raises(SystemExit):
        run_train("--resume", checkpoint, "--steps", "20")
    assert "--steps cannot change on resuming: the checkpoint was made with 12, got 20" in capsys.readouterr().err


def test_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["nonsense"]):
        with pytest.raises(SystemExit) as stop:
            program.main(argv)
        assert stop.value.code == 2
        assert "usage: python -m spectral_ops.bench" in capsys.readouterr().err
    for command in program.COMMANDS:
        with pytest.raises(SystemExit) as stop:
            program.main([command, "--help"])
        assert stop.value.code == 0


def test_read_text(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "b.txt").write_bytes(b"second")
    (tmp_path / "a.md").write_bytes(b"first ")
    (tmp_path / "below" / "c.py").write_bytes(b" third")
    (tmp_path / "image.png").write_bytes(PNG)
    assert tasks.read_text(str(tmp_path / "b.txt")) == b"second"
    assert tasks.read_text(str(tmp_path)) == b"first second third"
    assert len(tasks.read_text(None)) > 100_000
    with pytest.raises(FileNotFoundError, match=r"--data nowhere: no such file or folder"):
        tasks.read_text("nowhere")
    with pytest.raises(ValueError, match="18 bytes of text are too few"):
        tasks.Text("tiny", str(tmp_path))


def test_training_table() -> None:
    def curve(name: str, seed: int, losses: list[float]) -> Curve:
        n = len(losses)
        seconds = [2.0 * (i + 1) for i in range(n)]
        return Curve(name, seed, [10 * (i + 1) for i in range(n)], losses, seconds, seconds[-1] / 4, 8.0)

    finished = [
        curve("spectral_kron", 0, [3.0, 1.0, 0.5, 0.4]),
        curve("adamw", 0, [4.0, 3.0, 2.0, 1.0]),
        curve("muon", 0, [4.0, 2.0, 1.0, 0.1]),
        curve("spectral_kron", 1, [3.0, 2.0, 1.0, 0.5]),
        curve("adamw", 1, [4.0, 3.0, 2.0, 1.0]),
        curve("muon", 1, [4.0, 2.0, 1.0, 0.5]),
    ]
    lines = curves.training_table(finished, curve("soap", 0, [2.0, 1.0])).splitlines()
    header = ["method", "loss", "steps to adamw", "seconds", "vs adamw", "vs muon", "optimizer", "ms/step", "bytes/param"]
    assert [cell.strip() for cell in lines[0].split("  ") if cell.strip()] == header
    cells = {line.split("  ")[0]: [c.strip() for c in line.split("  ") if c.strip()][1:] for line in lines[2:]}
    # Muon's loss is reached from one of the two seeds only.
    assert cells["spectral_kron"][1:5] == ["25 ± 7", "5.0 ± 1.4", "0.625 ± 0.177", "1.000 (1 of 2)"]
    assert cells["spectral_kron"][5:] == ["25%", "50.00 ± 0.00", "8.0"]
    assert cells["soap, to step 20"][1:5] == ["20", "4.0", "0.500", "-"]


def test_a_target_between_two_evaluations_is_reached_between_them() -> None:
    curve = Curve("adamw", 0, [10, 20, 30], [3.0, 1.0, 2.0], [1.0, 2.0, 3.0])
    assert curve.reach(2.0) == (15.0, 1.5)
    assert curve.reach(1.0) == (20.0, 2.0)
    assert curve.reach(5.0) == (10, 1.0)
    assert curve.reach(0.5) is None


def test_state_bytes_count_lists_of_tensors() -> None:
    pytest.importorskip("pytorch_optimizer")
    run = Run(tasks.Text("tiny"), method("soap", lr=1e-2, rest_lr=1e-2), steps=2, evaluations=1)
    list(run)
    expected = sum(4 * (2 * p.numel() + 2 * p.shape[0] ** 2 + 2 * p.shape[1] ** 2) for p in run.optimizers[0].state)
    assert training.state_bytes(run.optimizers[0]) == expected


def test_search_tries_each_method_equally_often_and_remembers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from spectral_ops.bench import search
    from spectral_ops.bench.methods import SPACE, TUNED, space

    counts = {name: sum(map(len, space.values())) - len(space) + 1 for name, space in SPACE.items()}
    assert len(set(counts.values())) == 1
    assert space("digits-conv", "adamw")["lr"] == [4 * lr for lr in space("digits", "adamw")["lr"]]
    for (task_name, name), chosen in TUNED.items():  # what was chosen was among what was tried
        if name in SPACE:
            tried = space(task_name, name)
            assert all(value in tried[key] for key, value in chosen.items()), (task_name, name)

    task, out = tasks.Text("tiny"), tmp_path / "search.csv"
    monkeypatch.setitem(SPACE, "adamw", {"lr": [1e-3, 2e-3], "rest_lr": [1e-3], "refine": [1.0, 2.0]})
    best = search.search(task, "adamw", out)
    rows = list(csv.DictReader(out.open()))
    assert len(rows) == 3 and min(rows, key=lambda row: float(row["loss"]))["method"] == "adamw"
    monkeypatch.setattr(search, "Run", None)  # a second search runs nothing
    assert search.search(task, "adamw", out) == best
