"""Fig. 3, right, and Fig. 9 of Lin et al., 2025: minimise five functions by natural evolution strategies, from values alone.

All methods learn a Gaussian with the same utilities, mirrored samples, populations and learning rates; what differs is how its
covariance moves. Seeds change the samples and, a little, the start.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from spectral_ops.bench.findings import Claim, Point, compared, median
from spectral_ops.bench.functions import FUNCTIONS
from spectral_ops.bench.matching import normal

SIZE = 10
TARGET = 1e-8
RECORDS = 60
SEARCHES = 3  # for each seed of the command: they are short, and differ more than matrices do
LOWEST = 1e-24  # standard deviation of ours, in initial ones: near its cusp Schaffer's function is 1e-8 at 1e-18
JITTER = 0.1  # of the start, in initial standard deviations


@dataclass(frozen=True)
class Setting:
    """The same for all methods. Where there are many local minima it takes a wide start and a larger population."""

    start: float  # every coordinate of the first mean
    deviation: float
    population: int
    most: int  # evaluations


SETTINGS = {
    "ackley": Setting(10.0, 10.0, 20, 100_000),
    "rosenbrock": Setting(0.0, 0.5, 10, 60_000),
    "bohachevsky": Setting(4.0, 2.0, 20, 60_000),
    "schaffer": Setting(4.0, 4.0, 50, 200_000),
    "griewank": Setting(20.0, 20.0, 100, 200_000),
}


# --- Baselines ----------------------------------------------------------------------------------------------------------


def utilities(count: int) -> Tensor:
    """Of the samples, the best first (Wierstra et al., 2008): `max(0, log(λ/2 + 1) − log k)`, normalised, less `1/λ`."""
    k = torch.arange(1, count + 1, dtype=torch.float64)
    u = (math.log(count / 2 + 1) - k.log()).clamp(min=0)
    return u / u.sum() - 1 / count


def scale_rate(n: int) -> float:
    """Glasmachers et al., 2010, Table 1, of the covariance's factor."""
    return (9 + 3 * math.log(n)) / (5 * n * math.sqrt(n))


class Strategy(Protocol):
    mean: Tensor

    def ask(self) -> Tensor: ...

    def tell(self, solutions: Tensor, values: Tensor) -> None: ...


class Factored(ABC):
    """Samples `μ + A z`, and the natural gradients `Σ u z` of the mean and `G = Σ u (z zᵀ − I)` of `A Aᵀ`, in coordinates of
    `A`."""

    def __init__(self, mean: Tensor, deviation: float, population: int, rate: float, seed: int):
        self.mean, self.rate = mean.clone(), rate
        self.a = deviation * torch.eye(len(mean), dtype=mean.dtype)
        self.utilities = utilities(population)
        self.generator = torch.Generator().manual_seed(seed)
        self.z = torch.empty(0)

    def ask(self) -> Tensor:
        half = torch.randn(len(self.utilities) // 2, len(self.mean), dtype=self.mean.dtype, generator=self.generator)
        self.z = torch.cat([half, -half])
        return self.mean + self.z @ self.a.T

    def tell(self, solutions: Tensor, values: Tensor) -> None:
        z, u = self.z[values.argsort()], self.utilities
        g = (z.T * u) @ z - u.sum() * torch.eye(len(self.mean), dtype=z.dtype)
        self.mean = self.mean + self.a @ (u @ z)
        self.a = self.a @ self.turn(g)

    @abstractmethod
    def turn(self, g: Tensor) -> Tensor:
        """What `A` is multiplied by."""


class ExponentialNES(Factored):
    """Glasmachers et al., 2010: `A ← A exp(η/2 G)`."""

    def turn(self, g: Tensor) -> Tensor:
        d, v = torch.linalg.eigh(g)
        return (v * (self.rate / 2 * d).exp()) @ v.T


class PlainNES(Factored):
    """Wierstra et al., 2008, the natural gradient step of the covariance itself: `Σ ← Σ + η A G Aᵀ = A (I + η G) Aᵀ`. It leaves
    the SPD matrices where `I + η G` has a negative eigenvalue: those are raised to `FLOOR`."""

    FLOOR = 0.1

    def turn(self, g: Tensor) -> Tensor:
        d, v = torch.linalg.eigh(g)
        return (v * (1 + self.rate * d).clamp(min=self.FLOOR).sqrt()) @ v.T


# --- Methods ------------------------------------------------------------------------------------------------------------

Make = Callable[[Tensor, float, int, float, int], Strategy]
OURS, EXPONENTIAL, PLAIN = "SpectralNES", "exponential NES", "NES"


def _spectral(mean: Tensor, deviation: float, population: int, rate: float, seed: int) -> Strategy:
    from spectral_ops.optim import SpectralNES

    limits = LOWEST * deviation, deviation / LOWEST
    return SpectralNES(
        mean, deviation, population_size=population, mean_lr=1.0, scale_lr=rate, mirrored=True, scale_limits=limits, seed=seed
    )


METHODS: dict[str, Make] = {OURS: _spectral, EXPONENTIAL: ExponentialNES, PLAIN: PlainNES}


# --- Experiment ---------------------------------------------------------------------------------------------------------


@dataclass
class Search:
    """`ℓ(μ)` after so many evaluations; `needed` is infinite if it did not come under the target."""

    evaluations: list[int]
    values: list[float]
    needed: float = math.inf


def minimise(name: str, make: Make, setting: Setting, seed: int, size: int = SIZE) -> Search:
    function = FUNCTIONS[name]
    jitter = setting.deviation * JITTER * normal(seed + 1, size, stream=30)[seed]
    strategy = make(setting.start + jitter, setting.deviation, setting.population, scale_rate(size), seed)
    run = Search([0], [float(function(strategy.mean))])
    while run.evaluations[-1] < setting.most:
        solutions = strategy.ask()
        strategy.tell(solutions, function(solutions))
        run.evaluations.append(run.evaluations[-1] + len(solutions))
        run.values.append(float(function(strategy.mean)))
        if run.values[-1] <= TARGET:
            run.needed = run.evaluations[-1]
            break
    return run


VALUE, EVALUATIONS = "ℓ(μ)", f"evaluations to {TARGET:g}"


def evolution(seeds: int, settings: dict[str, Setting] = SETTINGS, size: int = SIZE) -> Iterator[Point]:
    """`ℓ(μ)` at the same numbers of evaluations for all methods and seeds; a run that is over stays where it ended."""
    seeds *= SEARCHES
    for name, setting in settings.items():
        runs = {(m, seed): minimise(name, METHODS[m], setting, seed, size) for m in METHODS for seed in range(seeds)}
        longest = max(run.evaluations[-1] for run in runs.values()) // setting.population
        marks = sorted({round(longest * i / RECORDS) for i in range(RECORDS + 1)})
        for (method, seed), run in runs.items():
            where = ("9", name, method, str(seed), "evaluation")
            for i in marks:
                yield Point(*where, i * setting.population, VALUE, run.values[min(i, len(run.values) - 1)])
            yield Point(*where, run.evaluations[-1], EVALUATIONS, run.needed)


def claims(points: list[Point]) -> Iterator[Claim]:
    for name in dict.fromkeys(p.experiment for p in points):
        ours, theirs = (median(points, name, method, EVALUATIONS) for method in (OURS, EXPONENTIAL))
        yield compared(f"Fig. 9, {name}, {EVALUATIONS}, {OURS} / {EXPONENTIAL}", ours, theirs, 1.2)
