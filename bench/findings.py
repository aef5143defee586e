"""What experiments return: points of curves, and claims that were checked."""

import math
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby


@dataclass(frozen=True)
class Point:
    """One measured number. `x` counts steps, evaluations or whatever `x_name` says."""

    figure: str
    experiment: str
    method: str
    seed: str
    x_name: str
    x: int
    metric: str
    value: float

    @property
    def curve(self) -> tuple[str, str, str, str]:
        return self.figure, self.experiment, self.metric, self.method


@dataclass(frozen=True)
class Claim:
    """That a value is at most a bound."""

    text: str
    value: float
    most: float

    @property
    def holds(self) -> bool:
        return self.value <= self.most

    def __str__(self) -> str:
        return f"{'holds' if self.holds else 'DOES NOT HOLD'}: {self.text}: {self.value:.4g}, at most {self.most:g}"


def compared(text: str, ours: float, baseline: float, most: float) -> Claim:
    """That ours is at most so many times a baseline's. Where neither got there they are not comparable, and nothing holds."""
    return Claim(f"{text}: {ours:.4g} against {baseline:.4g}", ours / baseline if math.isfinite(ours) else math.inf, most)


def medians(points: Iterable[Point]) -> Iterator[Point]:
    """Over the seeds, at every `x` of every curve that all seeds reached."""

    def key(p: Point) -> tuple[tuple[str, str, str, str], int]:
        return p.curve, p.x

    points = list(points)
    seeds = {c: len({p.seed for p in points if p.curve == c}) for c in {p.curve for p in points}}
    for (curve, _), found in groupby(sorted(points, key=key), key):
        group = list(found)
        if len(group) == seeds[curve]:
            yield replace(group[0], seed="median", value=statistics.median(p.value for p in group))


def thinned(curve: list[Point], most: int) -> list[Point]:
    """At most so many points of a curve, evenly, with its first and its last."""
    count = min(most, len(curve))
    return [curve[i * (len(curve) - 1) // max(count - 1, 1)] for i in range(count)]


def ending(points: Iterable[Point], share: float = 0.25) -> float:
    """The median over the seeds of what is the mean over the last share of each seed's curve: of one curve's points."""
    by_seed: dict[str, list[Point]] = {}
    for p in points:
        by_seed.setdefault(p.seed, []).append(p)
    ends = []
    for curve in by_seed.values():
        last = max(p.x for p in curve)
        ends.append(statistics.mean(p.value for p in curve if p.x >= (1 - share) * last))
    return statistics.median(ends)


def median(points: Iterable[Point], experiment: str, method: str, metric: str) -> float:
    """Over the seeds, of a number that each has."""
    wanted = experiment, method, metric
    return statistics.median(p.value for p in points if (p.experiment, p.method, p.metric) == wanted)
