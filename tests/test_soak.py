"""The soak at its smallest size: what it writes, what it measures, and that each of its limits can be broken."""

import csv
import math
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spectral_ops import reference
from spectral_ops.bench import output, soak
from spectral_ops.bench.soak import Record, Trial, Variant, broken

GOOD = [
    Record(step, name, shape, 0.004, 0.05, 0.2, True, 1000, 100, 1e8)
    for step in range(10, 210, 10)
    for name in soak.VARIANTS
    for shape in ("48x32", "33x64")
]


@pytest.fixture(autouse=True)
def _denormals() -> Iterator[None]:
    yield
    torch.set_flush_denormal(False)  # the program sets it for its process, which here is everyone's


@pytest.fixture
def run_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Path]:
    """Settings under which every limit holds."""
    options = soak.LONG
    bf16 = Variant("fp32", options=options | soak.BF16)
    monkeypatch.setattr(soak, "VARIANTS", {"fp32": Variant("fp32", options=options, judged=False), "bf16": bf16})
    monkeypatch.setattr(soak, "SHAPES", ((24, 33), (2, 32, 24)))

    def run(steps: int) -> Path:
        soak.main(["--steps", str(steps), "--out", str(tmp_path)])
        return tmp_path

    return run


def random_state(n: int, m: int) -> dict[str, Tensor]:
    """Of two matrices; the basis need not be orthogonal for what is measured."""
    state: dict[str, Tensor] = {"scale": torch.rand(2)}
    for side, k in (("left", n), ("right", m)):
        r = torch.randn(2, k, k)
        state[f"basis_{side}"] = torch.randn(2, k, k).bfloat16()
        state[f"residual_{side}"] = (r + r.mT) * (1 - torch.eye(k))
        state[f"eigenvalues_{side}"] = torch.rand(2, k)
    return state


def test_soak_writes_what_it_measured(run_small: Callable[[int], Path], capsys: pytest.CaptureFixture[str]) -> None:
    out = run_small(100)
    printed = capsys.readouterr().out
    assert "Every limit holds." in printed and f"PyTorch {torch.__version__}" in printed
    with (out / "soak.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["step"], r["variant"], r["shape"]) for r in rows] == [
        (str(step), name, shape) for step in range(10, 110, 10) for name in ("fp32", "bf16") for shape in ("24x33", "2x32x24")
    ]
    assert list(rows[0]) == [*(f.name for f in fields(Record)), *output.PROVENANCE, "seed"]
    assert all(r["hardware"] and r["torch"] and r["date"] and r["finite"] == "True" for r in rows)
    assert all((float(r["error"]) > 0.001) == (r["variant"] == "bf16") for r in rows)
    assert int(rows[0]["state_bytes"]) > 4 * (2 * 24**2 + 2 * 33**2 + 4 * 32**2 + 4 * 24**2)
    if "no PNG" not in printed:
        assert (out / "soak.png").read_bytes().startswith(b"\x89PNG")


def test_the_default_options_stay_within_the_limits(tmp_path: Path) -> None:
    soak.main(["--steps", "100", "--out", str(tmp_path)])


def test_maps_of_order_2_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They shorten slow planes, in float32 too."""
    variants = {"fp32": Variant("fp32", judged=False), "order 2": Variant("fp32", options={"cayley_order": 2})}
    monkeypatch.setattr(soak, "VARIANTS", variants)
    with pytest.raises(SystemExit, match=r"The orthogonality defect reached 0.0[23]"):
        soak.main(["--steps", "40", "--out", str(tmp_path)])


def test_a_twin_goes_on_from_the_same_state_in_float32() -> None:
    trial = Trial(Variant("", torch.bfloat16))
    gradients = [torch.randn(shape) for shape in soak.SHAPES]
    trial.step(gradients)
    trial.part()
    assert trial.twin
    for p, q in zip(trial.parameters, trial.twin.parameters, strict=True):
        mine, its = trial.optimizer.state[p], trial.twin.optimizer.state[q]
        assert mine["basis_left"].dtype == torch.bfloat16 and its["basis_left"].dtype == torch.float32
        assert soak.estimate_error(mine, its) == 0
    for _ in range(5):
        trial.step(gradients)
    errors = [
        soak.estimate_error(trial.optimizer.state[p], trial.twin.optimizer.state[q])
        for p, q in zip(trial.parameters, trial.twin.parameters, strict=True)
    ]
    assert all(0 < error < 0.05 for error in errors)


def without_correction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "correct", lambda p, b: p)


def with_truncation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding with the right spacing and a bias: towards zero."""
    monkeypatch.setattr(reference, "random_bits", lambda shape, seed: torch.zeros((), dtype=torch.int64))


def with_a_basis_that_turns_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    turn = reference.cayley_track

    def half(b: Tensor, x: Tensor, d: Tensor, residual: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        turned = turn(b, x, d, residual, *options)
        return (turned[0], d.clone(), residual) if b.dtype == torch.bfloat16 else turned

    monkeypatch.setattr(reference, "cayley_track", half)


def with_a_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[Tensor] = []
    step = Trial.step

    def leaky(trial: Trial, gradients: list[Tensor]) -> None:
        held.append(torch.zeros(()))
        step(trial, gradients)

    monkeypatch.setattr(Trial, "step", leaky)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (without_correction, r"^The orthogonality defect reached 0\.\d+ \(bf16, .*, step \d+\): over 0.005 in"),
        (with_truncation, r"^The orthogonality defect reached 0\.\d+ \(bf16, .*, step \d+\): over 0.005 in"),
        (with_a_basis_that_turns_alone, r"^The error of the estimate reached \d+\.\d+ \(bf16, .*, step \d+\): over 0.1 in"),
        (with_a_leak, r"^Memory grows: [\d,]+ tensors in step 10, [\d,]+ tensors in step 40\."),
    ],
)
def test_damage_shows(
    damage: Callable[[pytest.MonkeyPatch], None],
    sentence: str,
    run_small: Callable[[int], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    damage(monkeypatch)
    monkeypatch.setattr(soak, "plot", lambda *_: None)
    with pytest.raises(SystemExit, match=sentence):
        run_small(40)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"defect": 0.0051}, "The orthogonality defect reached 0.0051 (bf16 factors, 33x64, step 150): over 0.005 in 1 of 20"),
        ({"defect": math.nan}, "The orthogonality defect reached nan"),
        ({"finite": False}, "Not finite: a parameter or its state (bf16 factors, 33x64, step 150)."),
        ({"tensors": 101}, "Memory grows: 100 tensors in step 20, 101 tensors in step 150."),
        ({"state_bytes": 1001}, "Memory grows: 1,000 bytes of state in step 20, 1,001 bytes of state in step 150."),
        ({"resident": 1.2e8}, "Memory grows: 100,000,000 bytes in step 20, 120,000,000 bytes in step 150."),
    ],
)
def test_each_limit_alone_is_broken(change: dict[str, Any], sentence: str) -> None:
    spot = GOOD.index(next(r for r in GOOD if (r.step, r.variant, r.shape) == (150, "bf16 factors", "33x64")))
    found = broken([*GOOD[:spot], replace(GOOD[spot], **change), *GOOD[spot + 1 :]])
    assert len(found) == 1 and found[0].startswith(sentence)


@pytest.mark.parametrize("error", [0.11, math.nan])
def test_an_error_now_and_then_is_not_over_the_limit(error: float) -> None:
    """One of twenty records may be, two may not."""
    spots = [i for i, r in enumerate(GOOD) if (r.variant, r.shape) == ("bf16 factors", "33x64")][-2:]
    once = [replace(r, error=error) if i == spots[0] else r for i, r in enumerate(GOOD)]
    twice = [replace(r, error=error) if i in spots else r for i, r in enumerate(GOOD)]
    assert broken(once) == []
    (sentence,) = broken(twice)
    assert sentence.startswith(f"The error of the estimate reached {error:.4f} (bf16 factors, 33x64, step 1")
    assert sentence.endswith("over 0.1 in 2 of 20 records.")


def test_what_breaks_no_limit() -> None:
    assert broken(GOOD) == []
    assert broken([replace(r, resident=5e7, tensors=50) if r.step < 20 else r for r in GOOD]) == []  # before it is warm
    assert broken([r if soak.VARIANTS[r.variant].judged else replace(r, defect=1.0, error=1.0) for r in GOOD]) == []


def test_error_of_the_estimate_is_that_of_the_kronecker_products() -> None:
    a, b = random_state(5, 3), random_state(5, 3)

    def dense(state: dict[str, Tensor], i: int) -> Tensor:
        factors = []
        for side in ("left", "right"):
            basis, t = state[f"basis_{side}"][i].double(), state[f"residual_{side}"][i] + state[f"eigenvalues_{side}"][i].diag()
            factors.append(basis @ t.double() @ basis.mT)
        return state["scale"][i].double() * torch.kron(*factors)

    expected = max(float((dense(a, i) - dense(b, i)).norm() / dense(b, i).norm()) for i in range(2))
    assert soak.estimate_error(a, b) == pytest.approx(expected, rel=1e-9)
    assert soak.estimate_error(a, a) == 0


def test_orthogonality_defect_is_the_largest_of_all_bases() -> None:
    state = {"basis_left": torch.eye(5).repeat(2, 1, 1), "basis_right": torch.eye(3).repeat(2, 1, 1)}
    assert soak.orthogonality_defect(state) == 0
    state["basis_right"][1] *= 1.5
    assert soak.orthogonality_defect(state) == pytest.approx(1.25)


def test_curvature_drifts_and_jumps(monkeypatch: pytest.MonkeyPatch) -> None:
    source = soak.Curvature((2, 40, 24))

    def turn() -> float:
        """Root mean square over the columns of the angle by which the left basis turned in the last step."""
        before = source.bases[0]
        assert source.gradient().shape == (2, 40, 24)
        return float((source.bases[0] - before).square().sum(-2).mean().sqrt())

    monkeypatch.setattr(soak, "JUMP", 0.0)
    assert all(0.5 * soak.DRIFT < turn() < 2 * soak.DRIFT for _ in range(50))
    assert torch.allclose(source.bases[0].mT @ source.bases[0], torch.eye(40), atol=1e-5)
    monkeypatch.setattr(soak, "JUMP", 1.0)
    assert turn() > 1
