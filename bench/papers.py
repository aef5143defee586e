"""Reproduce the experiments of the spectral paper: Fig. 2, 3, 7, 8, 9 and 10 of Lin et al., 2025.

python -m spectral_ops.bench papers
python -m spectral_ops.bench papers --figures 3,9 --seeds 5
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from spectral_ops.bench import cayley_maps, evolution, matching, output, plots, spd_problems
from spectral_ops.bench.findings import Claim, Point, medians, thinned
from spectral_ops.bench.training import configure

SEEDS = 3
CURVE = 16  # points of a curve in the CSV
FLAGSHIP = ("ackley", "rosenbrock", "griewank")  # of Fig. 9 what Fig. 3 shows
INVISIBLE, START = 1e-12, 1e-6  # on a logarithmic axis: a distance to itself, but for rounding; all start at the same matrix
MARKS = (0.125, 0.5, 1.0)  # parts of a curve at which the table gives its value

# Each experiment, and the figures that show it.
EXPERIMENTS: dict[str, tuple[tuple[str, ...], Callable[[int], Iterator[Point]]]] = {
    "full-matrix matching": (("2", "7"), matching.full_matching),
    "Kronecker matching, unstructured truth": (("2", "8"), lambda seeds: matching.pair_matching(seeds, matching.TRUTHS[0])),
    "Kronecker matching, Kronecker truth": (("8",), lambda seeds: matching.pair_matching(seeds, matching.TRUTHS[1])),
    "SPD problems": (("3",), spd_problems.spd_problems),
    "evolution": (("3", "9"), evolution.evolution),
    "Cayley maps": (("10",), cayley_maps.cayley_maps),
}
FIGURES = sorted({figure for figures, _ in EXPERIMENTS.values() for figure in figures}, key=int)
CLAIMS: dict[str, Callable[[list[Point]], Iterator[Claim]]] = {
    "7": matching.full_claims,
    "8": matching.pair_claims,
    "3": spd_problems.claims,
    "9": evolution.claims,
    "10": cayley_maps.claims,
}


def run(figures: Iterable[str], seeds: int) -> list[Point]:
    """The points of every experiment that one of the figures shows."""
    wanted = set(figures)
    points: list[Point] = []
    for name, (shown, experiment) in EXPERIMENTS.items():
        if wanted & set(shown):
            start = time.perf_counter()
            points += experiment(seeds)
            print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    return points


def check(points: list[Point]) -> list[Claim]:
    by_figure = {figure: [p for p in points if p.figure == figure] for figure in CLAIMS}
    return [claim for figure, claims in CLAIMS.items() if by_figure[figure] for claim in claims(by_figure[figure])]


# --- Curves -------------------------------------------------------------------------------------------------------------


def curves(points: Iterable[Point]) -> dict[tuple[str, str, str, str], list[Point]]:
    """By figure, experiment, metric and method, ordered by `x`."""
    found: dict[tuple[str, str, str, str], list[Point]] = {}
    for p in points:
        found.setdefault(p.curve, []).append(p)
    return {name: sorted(curve, key=lambda p: p.x) for name, curve in found.items()}


def is_number(curve: list[Point]) -> bool:
    """Whether it is one number of each seed, and no curve."""
    return len({p.seed for p in curve}) == len(curve)


def rows(points: list[Point]) -> list[Point]:
    """What the CSV holds: the medians of the curves over the seeds, thinned, and each seed's own numbers."""
    found: list[Point] = []
    for curve in curves(points).values():
        found += curve if is_number(curve) else thinned(list(medians(curve)), CURVE)
    return found


def summary(points: list[Point]) -> str:
    """Medians over the seeds: of numbers, and of curves where a part of their steps is done."""
    lines = [["figure", "experiment", "metric", "method", *(f"at {mark:.1%}" for mark in MARKS)]]
    for (figure, experiment, metric, method), curve in curves(points).items():
        if is_number(curve):
            cells = ["", "", f"{statistics.median(p.value for p in curve):.4g}"]
        else:
            middle = list(medians(curve))
            cells = [f"{_at(middle, mark):.4g}" for mark in MARKS]
        lines.append([figure, experiment, metric, method, *cells])
    return output.table(lines)


def _at(curve: list[Point], mark: float) -> float:
    end = max(p.x for p in curve)
    return min(curve, key=lambda p: abs(p.x - mark * end)).value


# --- Plots --------------------------------------------------------------------------------------------------------------


def panels(figure: str, points: list[Point]) -> dict[str, list[list[Point]]]:
    """The median curves of each panel of a figure, by the panel's title."""
    found: dict[str, list[list[Point]]] = {}
    for name, curve in curves(points).items():
        if not is_number(curve) and shown(figure, *name[:3]):
            found.setdefault(f"{name[1]}\n{name[2]}", []).append(list(medians(curve)))
    return found


def shown(figure: str, source: str, experiment: str, metric: str) -> bool:
    """Fig. 2 shows parts of Fig. 7 and 8, and Fig. 3 of Fig. 9."""
    if figure == "2":
        return metric.endswith(matching.FROBENIUS) and (source == "7" or experiment.startswith(matching.TRUTHS[0]))
    if figure == "3" and source == "9":
        return experiment in FLAGSHIP
    return figure == source


def plot(path: Path, figure: str, points: list[Point], title: str) -> None:
    from matplotlib import colormaps

    found = panels(figure, points)
    drawing, axes = plots.panels(len(found), 5.6, 3.8)
    methods = list(dict.fromkeys(line[0].method for lines in found.values() for line in lines))
    for axis, (name, lines) in zip(axes, found.items(), strict=True):
        for line in lines:
            style: dict[str, Any] = {"color": colormaps["tab10"](methods.index(line[0].method) % 10), "label": line[0].method}
            values = [p.value if p.value > (INVISIBLE if p.x else START) else math.nan for p in line]
            axis.plot([p.x for p in line], values, linewidth=1.4, **style)
        axis.set(title=name, xlabel=lines[0][0].x_name, yscale="log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, frameon=False)
    plots.save(drawing, path, title)


# --- Command ------------------------------------------------------------------------------------------------------------


def write(folder: Path, figures: list[str], points: list[Point], source: dict[str, str]) -> Iterator[Path]:
    output.write_rows(folder / "papers.csv", rows(points), source)
    yield folder / "papers.csv"
    for figure in figures:
        path = folder / f"papers-fig{figure}.png"
        plot(path, figure, points, f"Fig. {figure} of Lin et al., 2025; {output.describe(source)}")
        yield path


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m spectral_ops.bench papers", description=__doc__.splitlines()[0])
    parser.add_argument("--figures", default=",".join(FIGURES), metavar="N,…", help=f"default: {','.join(FIGURES)}")
    parser.add_argument("--seeds", type=int, default=SEEDS, metavar="N", help=f"how many; default: {SEEDS}")
    parser.add_argument("--threads", type=int, metavar="N", help="default: 1")
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="for the CSV and PNGs; default: out")
    options = parser.parse_args(argv)
    figures = options.figures.split(",")
    if unknown := [figure for figure in figures if figure not in FIGURES]:
        parser.error(f"--figures: there is no figure {unknown[0]!r}, only {', '.join(FIGURES)}")
    if options.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {options.seeds}")
    configure("cpu", options.threads)
    points = run(figures, options.seeds)
    claims = check(points)
    source = output.provenance("cpu") | {"command": output.command("papers", argv)}
    print(f"\n{summary(points)}\n", *claims, *cayley_maps.remarks(points), "", output.describe(source), sep="\n")
    try:
        for path in write(options.out, figures, points, source):
            print(path)
    except ModuleNotFoundError as error:
        print(f"no PNG: {error.name} is not installed (pip install 'spectral-ops[bench]')")
