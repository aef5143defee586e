"""The report: ratios by hand, what the guard refuses, what is marked, and that the repository's own texts are true."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spectral_ops.bench import costs, output, report
from spectral_ops.bench.cases import CASES
from spectral_ops.bench.guard import MARK

PNG = b"\x89PNG"
README = f"# Title\n\nbefore\n\n{report.BEGIN}\nold\n{report.END}\n\nafter\n"
SOURCE = {"hardware": "a machine", "threads": "1", "torch": "2.13.0", "triton": "3.7.1", "date": "2026-11-21"}

Row = dict[str, Any]


def provenance(**changes: str) -> Row:
    return SOURCE | {"code": output.code()} | changes | {"command": "make bench"}


def step(optimizer: str, ms: float, *, ours: bool = False, setting: str = "text", gate: str = "passed", **changes: Any) -> Row:
    row = {
        "setting": setting, "optimizer": optimizer, "package": "spectral_ops" if ours else "elsewhere 1.0",
        "p20_ms": 0.9 * ms, "p50_ms": ms, "p80_ms": 1.1 * ms, "rounds": 20, "model_ms": 30, "state_bytes": 1200,
        "parameters": 100, "width": 96, "layers": 3, "gate": gate if ours else "",
    }  # fmt: skip
    return row | provenance() | changes


def kernel(provider: str, us: float, *, n: int = 64, gate: str = "passed", **changes: Any) -> Row:
    row = {
        "op": "gram", "provider": provider, "model": "ViT-B", "n": n, "m": 32, "batch": 2, "operands": "fp32",
        "p20_us": us, "p50_us": us, "p80_us": us, "tflops": 0.1, "gb_per_s": 5, "roof": 0.5, "roof_tflops": 0.2,
        "roof_gb_per_s": 10, "graph": False, "gate": gate if provider == "ours" else "",
    }  # fmt: skip
    return row | provenance() | changes


def run(method: str, *points: tuple[int, float, float], seed: int = 1, source: Row | None = None) -> list[Row]:
    source = provenance() if source is None else source
    return [{"method": method, "seed": seed, "step": s, "loss": loss, "seconds": t} | source for s, loss, t in points]


STEPS = [step("SpectralKron", 10, ours=True), step("SOAP", 40), step("Muon", 5), step("AdamW", 2)]


class Checkout:
    """A folder with a README and results, and the command run on it."""

    def __init__(self, root: Path):
        self.root, self.results = root, root / "bench" / "results"
        (root / "README.md").write_text(README)
        self.results.mkdir(parents=True)

    def add(self, name: str, rows: list[Row]) -> None:
        output.write_csv(self.results / f"{name}.csv", list(rows[0]), [list(row.values()) for row in rows])

    def run(self, *arguments: str) -> None:
        report.main(["--results", str(self.results), *arguments])

    @property
    def readme(self) -> str:
        return (self.root / "README.md").read_text()

    @property
    def text(self) -> str:
        return (self.root / "bench" / "RESULTS.md").read_text()

    def row(self, start: str, section: str = "") -> list[str]:
        """Cells of the table's row in RESULTS.md whose first cell starts so."""
        lines = self.text[self.text.index(section) :].splitlines()
        line = next(line for line in lines if line.startswith(f"| {start}"))
        return [cell.strip() for cell in line.strip("|").split(" | ")]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkout:
    """Figures are not drawn, but for the test of them, and only one operation is counted for the model."""
    monkeypatch.setattr("spectral_ops.bench.plots.write", lambda *_: ())
    monkeypatch.setattr("spectral_ops.bench.sections.CASES", {"gram": CASES["gram"]})
    return Checkout(tmp_path)


# --- Ratios -------------------------------------------------------------------------------------------------------------


def test_step_ratios_shares_and_bytes_by_hand(checkout: Checkout) -> None:
    checkout.add("steps-cpu", STEPS)
    checkout.run()
    assert checkout.row("SpectralKron") == [
        "SpectralKron", "spectral_ops", "10 (9 – 11)", "0.25", "2", "5", "12.0", "25.0%"
    ]  # fmt: skip
    assert checkout.row("SOAP")[3:6] == ["1", "8", "20"]
    assert "| SpectralKron | 0.25, 2, 5 |" in checkout.readme
    assert MARK not in checkout.readme


def test_of_several_implementations_of_a_peer_the_fastest_counts(checkout: Checkout) -> None:
    rows = [step("SOAP", 20, package="another 2.0"), step("Muon, compiled", 4), step("SOAP (another)", 25)]
    checkout.add("steps-cpu", [*STEPS, *rows, step("SOAP, interval 10", 1)])
    checkout.run()
    assert checkout.row("SpectralKron")[3:6] == ["0.5", "2.5", "5"]


def test_settings_are_not_mixed_and_sweeps_are_apart(checkout: Checkout) -> None:
    rows = [step("SpectralKron", 6, ours=True, setting="ViT-B block", model_ms=""), step("SOAP", 3, setting="ViT-B block")]
    rows = STEPS + rows
    rows += [step("SpectralKron", ms, ours=True, setting="width", width=w) for w, ms in ((128, 7), (64, 4))]
    checkout.add("steps-cpu", rows)
    checkout.run()
    assert checkout.row("SpectralKron", "#### ViT-B block")[3:] == ["2", "–", "–", "12.0", "–"]
    assert "| SpectralKron | 0.25, 2, 5 | 2, –, – |" in checkout.readme
    assert "#### width" not in checkout.text
    assert checkout.row("SpectralKron", "## Scaling") == ["SpectralKron", "spectral_ops", "4", "7"]


def test_kernel_ratios_are_geometric_means_over_shapes(checkout: Checkout) -> None:
    rows = [kernel("ours", 10), kernel("eager", 20), kernel("compiled", 15), kernel("cublas", 5)]
    rows += [kernel("ours", 10, n=128), kernel("eager", 80, n=128), kernel("compiled", 15, n=128), kernel("cublas", 5, n=128)]
    checkout.add("kernels-cpu", rows)
    checkout.run()
    assert checkout.row("gram") == ["gram", "fp32", "4 / 1.5 / 0.5", "0.50 – 0.50"]
    assert checkout.row("fp32", "measured roof") == ["fp32", "0.2", "10"]


def test_training_shares_by_hand(checkout: Checkout) -> None:
    rows = run("spectral_kron", (10, 4.0, 5.0), (20, 2.0, 10.0)) + run("muon", (10, 4.0, 2.0), (20, 3.0, 4.0))
    rows += run("adamw", (20, 1.0, 1.0))
    checkout.add("train-text-tiny", rows)
    checkout.run()
    # Ours has Muon's loss after 15 of 20 steps, in 7.5 of 4 seconds, and never AdamW's.
    assert checkout.row("spectral_kron") == ["spectral_kron", "1", "2.000", "10.0", "0.750", "-", "1.875", "-"]


# --- The guard ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs", "why"),
    [
        ({"gate": "failed: basis off"}, {}, "gate failed: basis off"),
        ({"gate": "not run"}, {}, "gate not run"),
        ({"gate": ""}, {}, "gate missing"),
        ({}, {"hardware": "another machine"}, "other hardware"),
        ({}, {"date": "2026-11-22"}, "other date"),
        ({}, {"code": "000000000000"}, "other code"),
        ({"hardware": ""}, {"hardware": ""}, "unknown hardware"),
    ],
)
def test_a_ratio_is_refused(checkout: Checkout, ours: Row, theirs: Row, why: str) -> None:
    checkout.add("steps-cpu", [step("SpectralKron", 10, ours=True, **ours), step("SOAP", 40, **theirs)])
    checkout.add("kernels-cpu", [kernel("ours", 10, **ours), kernel("eager", 20, **theirs)])
    checkout.run()
    assert checkout.row("SpectralKron", "#### text")[3] == f"refused: {why}"
    assert checkout.row("gram")[2] == f"refused: {why}"
    assert f"| refused: {why} |" in checkout.readme
    assert "0.25" not in checkout.readme


def test_a_file_without_a_gate_gives_no_ratio(checkout: Checkout) -> None:
    checkout.add("steps-cpu", [{name: x for name, x in row.items() if name != "gate"} for row in STEPS])
    checkout.run()
    assert checkout.row("SpectralKron")[3:6] == ["refused: gate missing"] * 3


def test_one_shape_that_failed_refuses_the_mean(checkout: Checkout) -> None:
    rows = [kernel("ours", 10), kernel("eager", 20), kernel("ours", 10, n=128, gate="not run"), kernel("eager", 20, n=128)]
    checkout.add("kernels-cpu", rows)
    checkout.run()
    assert checkout.row("gram")[2] == "refused: gate not run"


def test_a_peer_of_the_same_run_goes_before_a_faster_one(checkout: Checkout) -> None:
    checkout.add("steps-cpu", [*STEPS, step("SOAP", 20, date="2026-11-20")])
    checkout.run()
    assert checkout.row("SpectralKron")[3] == "0.25"


def test_training_on_other_hardware_is_not_compared(checkout: Checkout) -> None:
    ours, theirs = run("spectral_kron", (10, 2.0, 5.0)), run("muon", (10, 3.0, 2.0), source=provenance(hardware="another"))
    checkout.add("train-text-tiny", ours + theirs)
    checkout.run()
    assert checkout.row("spectral_kron")[4:] == ["refused: other hardware"] * 2


def test_the_readme_shows_the_two_tasks(checkout: Checkout) -> None:
    curves = run("spectral_kron", (10, 3.0, 5.0), (20, 2.0, 10.0)) + run("muon", (10, 4.0, 2.0), (20, 3.0, 4.0))
    checkout.add("train-text-default", curves)
    checkout.add("train-digits-default", [row | {"command": ""} for row in curves])
    checkout.add("train-text-tiny", curves)
    checkout.run()
    source = "a machine, 1 thread(s), PyTorch 2.13.0, 2026-11-21; `make bench`"
    assert f"Text, 250 steps, validation loss ({source}):" in checkout.readme
    assert "fixed noise (unknown run):" in checkout.readme
    assert checkout.readme.count("| spectral_kron | 1 | 2.000 | 10.0 | 0.500 | 1.250 |") == 2


# --- Age, and what was not measured -------------------------------------------------------------------------------------


def test_older_code_is_marked(checkout: Checkout) -> None:
    checkout.add("steps-cpu", [row | {"code": "000000000000"} for row in STEPS])
    checkout.add("kernels-cpu", [kernel("ours", 10), kernel("eager", 20)])
    checkout.run()
    assert checkout.row("SpectralKron", "#### text")[:4] == [f"SpectralKron {MARK}", "spectral_ops", "10 (9 – 11)", "0.25"]
    assert checkout.row("gram")[0] == "gram"
    assert f"| SpectralKron {MARK} | 0.25, 2, 5 |" in checkout.readme
    assert f"\n{MARK} measured with older code.\n" in checkout.readme


def test_files_without_provenance_are_read_and_marked(checkout: Checkout) -> None:
    rows = run("spectral_kron", (10, 2.0, 5.0), source={}) + run("soap", (20, 2.0, 20.0), source={})
    checkout.add("train-text-tiny", rows)
    checkout.run()
    assert checkout.row("spectral_kron") == [f"spectral_kron {MARK}", "1", "2.000", "5.0", "0.500", "0.250"]
    assert checkout.row("`train-text-tiny.csv`") == [f"`train-text-tiny.csv` {MARK}", *["unknown"] * 7]


def test_what_was_not_measured_is_said_and_modelled(checkout: Checkout) -> None:
    checkout.run()
    assert checkout.text.count("### CPU: not measured") == 3
    assert checkout.text.count("### GPU: not measured. Model of operations and bytes") == 2
    floor = 1e3 * costs.step_floor("Muon bf16", "GPT-2 medium")
    assert checkout.row("Muon bf16")[2] == f"{floor:.2f}"
    readme = " ".join(checkout.readme.split())
    assert "CPU: not measured." in readme
    assert "GPU: not measured. Model of operations and bytes: floors" in readme
    assert f"Muon: {floor:.0f};" in readme


def test_a_measured_gpu_is_not_modelled(checkout: Checkout) -> None:
    checkout.add("steps-cuda", STEPS)
    checkout.add("kernels-cuda", [kernel("ours", 10), kernel("eager", 20)])
    checkout.run()
    assert "Model" not in checkout.text + checkout.readme
    assert "GPU, a machine" in checkout.readme


def test_other_files_are_ignored(checkout: Checkout) -> None:
    checkout.add("steps-default-cpu", [{"candidate": "soap", "median_ms": 1}])
    checkout.run()
    assert "steps-default" not in checkout.text


# --- The texts and figures ----------------------------------------------------------------------------------------------


def test_only_the_section_of_the_readme_changes(checkout: Checkout) -> None:
    checkout.run()
    before, _, rest = checkout.readme.partition(report.BEGIN)
    assert before == README.partition(report.BEGIN)[0]
    assert rest.partition(report.END)[2] == README.partition(report.END)[2]
    assert "\nold\n" not in rest


def test_a_readme_without_markers_is_refused(checkout: Checkout) -> None:
    (checkout.root / "README.md").write_text("# Title\n")
    with pytest.raises(SystemExit, match=r"README\.md has no section between"):
        checkout.run()


def edit_readme(checkout: Checkout) -> None:
    (checkout.root / "README.md").write_text(checkout.readme.replace("0.25", "0.20"))


def edit_results(checkout: Checkout) -> None:
    (checkout.results.parent / "RESULTS.md").write_text(checkout.text.replace("0.25", "0.20"))


def measure_anew(checkout: Checkout) -> None:
    checkout.add("steps-cpu", [step("SpectralKron", 11, ours=True), *STEPS[1:]])


@pytest.mark.parametrize(
    ("change", "named"),
    [(edit_readme, "README.md: not"), (edit_results, "RESULTS.md: not"), (measure_anew, "RESULTS.md and README.md: not")],
)
def test_check_notices_changes_and_writes_nothing(checkout: Checkout, change: Callable[[Checkout], None], named: str) -> None:
    checkout.add("steps-cpu", STEPS)
    checkout.run()
    checkout.run("--check")
    change(checkout)
    texts = checkout.readme, checkout.text
    with pytest.raises(SystemExit, match=named) as stop:
        checkout.run("--check")
    assert isinstance(stop.value.code, str)  # which Python prints, and exits with 1
    assert (checkout.readme, checkout.text) == texts


def test_every_figure_that_is_shown_is_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    checkout = Checkout(tmp_path)
    sweep = [step("SpectralKron", ms, ours=True, setting="depth", layers=layers) for layers, ms in ((1, 2), (4, 9))]
    checkout.add("steps-cpu", [*STEPS, *sweep])
    checkout.add("kernels-cpu", [kernel("ours", 10), kernel("eager", 20)])
    checkout.add("kernels-cuda", [kernel("ours", 10, gate="not run")])
    checkout.add("train-text-tiny", run("muon", (10, 4.0, 2.0), (20, 3.0, 4.0)))
    checkout.run()
    shown = [line.partition("](")[2].rstrip(")") for line in checkout.text.splitlines() if line.startswith("![")]
    assert len(shown) == 5
    assert all((checkout.results.parent / path).read_bytes().startswith(PNG) for path in shown)


def test_the_repository_says_what_its_results_say() -> None:
    """Else: python -m spectral_ops.bench report"""
    report.main(["--check"])
