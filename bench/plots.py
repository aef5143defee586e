"""The report's figures: rooflines, step times against peers, scaling, training curves."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from spectral_ops.bench import curves
from spectral_ops.bench.guard import Row, is_ours, older, passed
from spectral_ops.bench.sections import SWEEPS, distinct, matching, number, settings_of

OUR_COLOUR, PEER_COLOUR = curves.COLOURS["spectral_kron"], "#7f8c99"
MARKERS = "osD^v<>pP*hX"
COLUMNS = 2  # panels in a row


def write(folder: Path, results: dict[str, list[Row]]) -> Iterator[Path]:
    """All figures of the results, by the names under which the report shows them."""
    for name, rows in results.items():
        kind, _, rest = name.partition("-")
        title = f"{rows[0].get('hardware') or 'unknown hardware'}, {rows[0].get('date') or 'unknown date'}"
        title += ", older code" if any(map(older, rows)) else ""
        if kind == "train":
            curves.plot_curves(folder / f"{name}.png", [curves.curve(run) for run in curves.runs(rows)], f"{rest}: {title}")
            yield folder / f"{name}.png"
        elif kind == "kernels":
            yield save(roofline(rows), folder / f"{name}.png", title)
        else:
            yield save(bars(rows), folder / f"{name}.png", f"one optimizer step, {title}")
            if any(row["setting"] in SWEEPS for row in rows):
                yield save(scaling(rows), folder / f"scaling-{rest}.png", f"one optimizer step, {title}")


def save(figure: Any, path: Path, title: str) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(path)
    return path


def panels(count: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """A figure with so many panels, each of this size in inches."""
    from matplotlib.figure import Figure

    columns = max(1, min(count, COLUMNS))
    lines = max(1, -(-count // columns))
    figure = Figure(figsize=(width * columns, height * lines + 0.4), layout="constrained")
    found = list(figure.subplots(lines, columns, squeeze=False).flat)
    for panel in found[count:]:
        panel.remove()
    return figure, found[:count]


def roofline(rows: list[Row]) -> Any:
    """Our operations, where they were correct, in a panel for each kind of operands, under what the machine reached."""
    rows = [row for row in rows if is_ours(row) and passed(row) and float(row["tflops"]) > 0]
    kinds, ops = distinct(rows, "operands"), distinct(rows, "op")
    figure, found = panels(len(kinds), 5.6, 4.2)
    for panel, (operands,) in zip(found, kinds, strict=True):
        group = matching(rows, operands=operands)
        for i, (op,) in enumerate(ops):
            mine = matching(group, op=op)
            if mine:
                panel.plot(*zip(*map(_intensity, mine), strict=True), **_style(i), linestyle="", label=op)
        x, _ = (np.array(values) for values in zip(*map(_intensity, group), strict=True))
        for top, bandwidth in distinct(group, "roof_tflops", "roof_gb_per_s"):
            if top and bandwidth:
                ridge = 1e3 * float(top) / float(bandwidth)
                line = np.geomspace(min(x.min(), ridge) / 2, max(x.max(), ridge) * 2, 200)
                panel.plot(line, float(top) * np.minimum(1, line / ridge), color="black", linewidth=1)
        panel.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="TFLOP/s", title=operands)
        panel.grid(alpha=0.3)
    _legend(figure, found)
    return figure


def _intensity(row: Row) -> tuple[float, float]:
    """Operations per byte, and TFLOP/s."""
    return 1e3 * float(row["tflops"]) / float(row["gb_per_s"]), float(row["tflops"])


def _style(i: int) -> dict[str, Any]:
    return {"color": f"C{i % 10}", "marker": MARKERS[i % len(MARKERS)], "markersize": 4.5}


def _legend(figure: Any, found: list[Any]) -> None:
    """One for all panels, at the right."""
    handles = {label: handle for panel in found for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside right center", frameon=False, fontsize=8)


def bars(rows: list[Row]) -> Any:
    """Median time of each optimizer in each setting, fastest first, with the 20th and 80th percentile."""
    settings = settings_of(rows)
    most = max((len(matching(rows, setting=setting)) for setting in settings), default=0)
    figure, found = panels(len(settings), 5.4, 0.6 + 0.24 * most)
    for panel, setting in zip(found, settings, strict=True):
        group = sorted(matching(rows, setting=setting), key=lambda row: -float(row["p50_ms"]))
        low, middle, high = (np.array([float(row[name]) for row in group]) for name in ("p20_ms", "p50_ms", "p80_ms"))
        places = range(len(group))
        colours = [OUR_COLOUR if is_ours(row) else PEER_COLOUR for row in group]
        panel.barh(places, middle, color=colours, xerr=(middle - low, high - middle), error_kw={"linewidth": 1})
        for place, time in zip(places, middle, strict=True):
            panel.annotate(f" {number(time)}", (high[place], place), va="center", fontsize=8)
        panel.set_yticks(places, [_label(row) for row in group], fontsize=8)
        left, right = middle.min() / 2, high.max()
        panel.set(xscale="log", xlabel="ms", title=setting, xlim=(left, right * (right / left) ** 0.2))  # room for the numbers
        panel.grid(alpha=0.3, axis="x")
    return figure


def _label(row: Row) -> str:
    """With the package where the name does not tell it."""
    name, package = row["optimizer"], row["package"]
    return name if is_ours(row) or package.split()[0] in name else f"{name} ({package})"


def scaling(rows: list[Row]) -> Any:
    """Median time of each optimizer against width and against depth."""
    sweeps = [sweep for sweep in SWEEPS if matching(rows, setting=sweep)]
    figure, found = panels(len(sweeps), 5.0, 4.4)
    names = distinct(filter(lambda row: row["setting"] in SWEEPS, rows), "optimizer", "package")
    for panel, sweep in zip(found, sweeps, strict=True):
        for i, (optimizer, package) in enumerate(names):
            mine = matching(rows, setting=sweep, optimizer=optimizer, package=package)
            points = sorted((float(row[SWEEPS[sweep]]), float(row["p50_ms"])) for row in mine)
            if points:
                thick = 2.2 if is_ours(mine[0]) else 1.2
                panel.plot(*zip(*points, strict=True), **_style(i), linewidth=thick, label=_label(mine[0]))
        sizes = sorted(distinct(matching(rows, setting=sweep), SWEEPS[sweep], "parameters"), key=lambda size: float(size[0]))
        panel.set(xscale="log", yscale="log", xlabel=f"{SWEEPS[sweep]} (parameters)", ylabel="ms")
        panel.set_xticks([float(x) for x, _ in sizes], [f"{x}\n({float(count) / 1e6:.2g} M)" for x, count in sizes], fontsize=8)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    _legend(figure, found)
    return figure
