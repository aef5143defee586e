"""What is written about training runs: the table that compares them, the curves as CSV and PNG."""

import math
import statistics
from pathlib import Path

from spectral_ops.bench import output
from spectral_ops.bench.training import Curve

BASELINES = ("adamw", "muon", "soap")
LEGEND = """loss: on the evaluation set, at the end; vs X: steps to X's final loss, in X's own steps; optimizer: its share of a
step's time and its milliseconds; bytes/param: optimizer state by parameter of the model; ± standard deviation over seeds"""
# One colour for a method whatever else is drawn; from a palette that colour-blind readers can tell apart.
COLOURS = {
    "spectral_kron": "#d55e00",
    "spectral_kron_bf16": "#e69f00",
    "spectral_kron_interval_2": "#cc79a7",
    "soap": "#0072b2",
    "muon": "#009e73",
    "adamw": "#555555",
}


def training_table(finished: list[Curve], unfinished: Curve | None = None) -> str:
    """One row for each method, means over its seeds; a target is the final loss of the baseline with the same seed."""
    by_method: dict[str, list[Curve]] = {}
    for curve in finished:
        by_method.setdefault(curve.method, []).append(curve)
    if unfinished is not None and unfinished.steps:
        by_method[f"{unfinished.method}, to step {unfinished.steps[-1]}"] = [unfinished]
    targets = {name: {c.seed: c for c in by_method[name]} for name in BASELINES if name in by_method}
    rows = [["method", "loss"]]
    for name in targets:
        rows[0] += ["steps to adamw", "seconds", "vs adamw"] if name == "adamw" else [f"vs {name}"]
    rows[0] += ["optimizer", "ms/step", "bytes/param"]
    rows += [_training_row(label, curves, targets) for label, curves in by_method.items()]
    return f"{output.table(rows)}\n{LEGEND}"


def _training_row(label: str, curves: list[Curve], targets: dict[str, dict[int, Curve]]) -> list[str]:
    row = [label, mean([c.loss[-1] for c in curves], ".4f")]
    for name, by_seed in targets.items():
        reached = [_reached(c, by_seed.get(c.seed)) for c in curves]
        if name == "adamw":
            row += [mean([r and r[0] for r in reached], ".0f"), mean([r and r[1] for r in reached], ".1f")]
        row.append(mean([r and r[2] for r in reached], ".3f"))
    share = sum(c.optimizer_seconds for c in curves) / sum(c.seconds[-1] for c in curves)
    ms = mean([1e3 * c.optimizer_seconds / c.steps[-1] for c in curves], ".2f")
    return [*row, f"{share:.0%}", ms, f"{curves[0].state_bytes_per_parameter:.1f}"]


def _reached(curve: Curve, target: Curve | None) -> tuple[float, float, float] | None:
    """Steps and seconds to the target's final loss, and these steps as a ratio of the target's own."""
    reached = None if target is None else curve.reach(target.loss[-1])
    if target is None or reached is None:
        return None
    return *reached, reached[0] / target.steps[-1]


def mean(values: list[float | None], form: str) -> str:
    """Mean and, of several, the standard deviation; how many count where some runs never reached the target."""
    known = [v for v in values if v is not None]
    if not known:
        return "-"
    text = f"{statistics.fmean(known):{form}}"
    if len(known) > 1:
        # A run that diverged has the loss nan, which statistics.stdev refuses.
        text += f" ± {statistics.stdev(known) if all(map(math.isfinite, known)) else math.nan:{form}}"
    return text if len(known) == len(values) else f"{text} ({len(known)} of {len(values)})"


def runs(rows: list[dict[str, str]]) -> list[list[dict[str, str]]]:
    """The rows of a file, those of each run together."""
    found: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in rows:
        found.setdefault((row["method"], row["seed"]), []).append(row)
    return list(found.values())


def curve(rows: list[dict[str, str]]) -> Curve:
    """A run from its rows in a file."""
    steps, loss, seconds = ([float(row[name]) for row in rows] for name in ("step", "loss", "seconds"))
    return Curve(rows[0]["method"], int(rows[0]["seed"]), [int(step) for step in steps], loss, seconds)


def write_curves(path: Path, curves: list[Curve], source: dict[str, str]) -> None:
    rows = (
        [c.method, c.seed, step, f"{loss:.6f}", f"{seconds:.4f}", *source.values()]
        for c in curves
        for step, loss, seconds in zip(c.steps, c.loss, c.seconds, strict=True)
    )
    output.write_csv(path, ["method", "seed", "step", "loss", "seconds", *source], rows)


def plot_curves(path: Path, curves: list[Curve], title: str) -> None:
    """Evaluation loss against steps and against seconds, a line for each run and a colour for each method."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, label in zip(panels, ("steps", "seconds of training"), strict=True):
        labelled: set[str] = set()
        for c in curves:
            x = c.steps if label == "steps" else c.seconds
            name = None if c.method in labelled else c.method
            panel.plot(x, c.loss, color=COLOURS.get(c.method), linewidth=1.6, alpha=0.8, label=name)
            labelled.add(c.method)
        panel.set_xlabel(label)
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter(ScalarFormatter())
        panel.yaxis.set_minor_formatter(ScalarFormatter())
        panel.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("evaluation loss (nats)")
    panels[0].legend(frameon=False)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(path)
