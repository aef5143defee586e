"""Fig. 3, left, of Lin et al., 2025: minimise over SPD matrices by Riemannian gradient descent, whose curvature is not SPD.

Metric nearness, `1/(2N) Σ ‖S Q x_i − x_i‖²`, of which every iteration sees some `x_i`, and log-det, `Tr(S Q) − log det S`:
both have their minimum at `S = Q⁻¹`. Every method is run at each rate of one grid, and takes the one that needs the fewest
iterations.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from spectral_ops import SpectralFactor
from spectral_ops.bench.findings import Claim, Point, compared, median
from spectral_ops.bench.matching import normal

# The paper gives the size. Q has log-spaced eigenvalues and random eigenvectors; descent starts from the identity.
SIZE, CONDITION = 60, 10.0
SAMPLES, BATCH = 1000, 100
RATES = tuple(10 ** (-3 + i / 6) for i in range(18))
TARGET, MOST = 1e-8, 2000  # of `ℓ(S) − ℓ(Q⁻¹)`; iterations
DIVERGED = 1e6  # times that at the start
OURS, RETRACTION = "spectral", "retraction"


# --- Problems -----------------------------------------------------------------------------------------------------------


class Problem(ABC):
    def __init__(self, seed: int, size: int):
        basis = torch.linalg.qr(normal(seed + 1, size, size, stream=20)[seed]).Q
        eigenvalues = torch.logspace(0, math.log10(CONDITION), size, dtype=torch.float64)
        self.q, self.inverse = (basis * eigenvalues) @ basis.T, (basis / eigenvalues) @ basis.T
        self.seed = seed

    @abstractmethod
    def loss(self, s: Tensor) -> float: ...

    @abstractmethod
    def gradient(self, s: Tensor, step: int) -> Tensor:
        """Symmetric."""

    def gap(self, s: Tensor) -> float:
        return self.loss(s) - self.loss(self.inverse)


class LogDet(Problem):
    def loss(self, s: Tensor) -> float:
        return float((s * self.q).sum() - torch.linalg.slogdet(s).logabsdet)

    def gap(self, s: Tensor) -> float:
        """`Σ λ − 1 − log λ` over the eigenvalues `λ` of `S Q`, so that nothing cancels but in each term."""
        if not s.isfinite().all():
            return math.inf
        c = torch.linalg.cholesky(self.q)
        eigenvalues = torch.linalg.eigvalsh(c.T @ s @ c)
        return float((eigenvalues - 1 - eigenvalues.log()).sum())

    def gradient(self, s: Tensor, step: int) -> Tensor:
        return self.q - torch.linalg.inv(s)


class MetricNearness(Problem):
    def __init__(self, seed: int, size: int):
        super().__init__(seed, size)
        self.x = normal(seed + 1, SAMPLES, size, stream=21)[seed]
        self.root = torch.linalg.cholesky(self.x.T @ self.x / SAMPLES).T

    def loss(self, s: Tensor) -> float:
        """With `L Lᵀ = 1/N Σ x xᵀ` it is `½ ‖Lᵀ (Q S − I)‖²`."""
        return float(0.5 * (self.root @ (self.q @ s) - self.root).square().sum())

    def gradient(self, s: Tensor, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(MOST * self.seed + step)
        x = self.x[torch.randint(len(self.x), (BATCH,), generator=generator)]
        y = x @ self.q
        return symmetric(y.T @ (y @ s - x) / len(x))


PROBLEMS: dict[str, type[Problem]] = {"metric nearness": MetricNearness, "log-det": LogDet}


def symmetric(x: Tensor) -> Tensor:
    return 0.5 * (x + x.mT)


# --- Methods ------------------------------------------------------------------------------------------------------------


class Method(Protocol):
    def step(self, e: Tensor, rate: float) -> None:
        """Descend along the gradient `e` of the loss with respect to `S`."""

    def matrix(self) -> Tensor: ...


class Retraction:
    """Of `S`, with Manopt's second-order retraction: `S ← S + η + ½ η S⁻¹ η`, `η = −2 rate S E S`."""

    def __init__(self, size: int):
        self.s = torch.eye(size, dtype=torch.float64)

    def step(self, e: Tensor, rate: float) -> None:
        eta = -2 * rate * self.s @ e @ self.s
        self.s = symmetric(self.s + eta + 0.5 * eta @ torch.linalg.solve(self.s, eta))

    def matrix(self) -> Tensor:
        return self.s


class Cholesky:
    """Of a factor, `S = C Cᵀ`: `C ← C (I + M + ½ M²)`, `M = −rate Cᵀ E C` (Lin et al., 2023)."""

    def __init__(self, size: int):
        self.c = torch.eye(size, dtype=torch.float64)

    def step(self, e: Tensor, rate: float) -> None:
        m = -rate * self.c.T @ e @ self.c
        self.c = self.c + self.c @ (m + 0.5 * m @ m)

    def matrix(self) -> Tensor:
        return self.c @ self.c.T


class Spectral:
    """`SpectralFactor` with the exponential map and the curvature `−2 S E S`, in its own basis `−2 D (Bᵀ E B) D`."""

    def __init__(self, size: int):
        self.factor = SpectralFactor(size, dtype=torch.float64, validate=False)  # a rate that is too large shows in the loss

    def step(self, e: Tensor, rate: float) -> None:
        b, d = self.factor.basis, self.factor.eigenvalues
        w = -2 * d.unsqueeze(-1) * (b.T @ e @ b) * d
        self.factor.update(symmetric(w), rotated=True, beta2=rate, gamma=0, exact=True)

    def matrix(self) -> Tensor:
        return self.factor.matrix()


METHODS: dict[str, Callable[[int], Method]] = {OURS: Spectral, RETRACTION: Retraction, "Cholesky": Cholesky}


# --- Experiment ---------------------------------------------------------------------------------------------------------


@dataclass
class Descent:
    """The gap before every iteration and at the end; `iterations` is infinite if it did not come under the target."""

    rate: float
    gaps: list[float] = field(default_factory=list)
    iterations: float = math.inf


def descend(problem: Problem, method: Method, rate: float, most: int) -> Descent:
    run = Descent(rate)
    for step in range(most + 1):
        s = method.matrix()
        gap = problem.gap(s)
        run.gaps.append(gap)
        if gap <= TARGET:
            run.iterations = step
        if run.iterations <= step or not gap <= DIVERGED * run.gaps[0]:
            break
        method.step(problem.gradient(s, step), rate)
    return run


def best(problem: Problem, name: str, rates: tuple[float, ...] = RATES, most: int = MOST) -> Descent:
    """The run of the fewest iterations. Small rates come last: they get no more iterations than the best so far needed."""
    found: Descent | None = None
    for rate in sorted(rates, reverse=True):
        allowed = most if found is None or math.isinf(found.iterations) else int(found.iterations)
        run = descend(problem, METHODS[name](len(problem.q)), rate, allowed)
        if found is None or (run.iterations, run.gaps[-1]) < (found.iterations, found.gaps[-1]):
            found = run
    assert found is not None
    return found


def spd_problems(seeds: int, *, size: int = SIZE, rates: tuple[float, ...] = RATES, most: int = MOST) -> Iterator[Point]:
    for name, problem in PROBLEMS.items():
        for seed in range(seeds):
            for method in METHODS:
                run = best(problem(seed, size), method, rates, most)
                where = ("3", name, method, str(seed), "iteration")
                for step, gap in enumerate(run.gaps):
                    yield Point(*where, step, GAP, gap)
                yield Point(*where, len(run.gaps) - 1, ITERATIONS, run.iterations)
                yield Point(*where, len(run.gaps) - 1, RATE, run.rate)


GAP, ITERATIONS, RATE = "ℓ(S) − ℓ(Q⁻¹)", f"iterations to {TARGET:g}", "best rate"


def claims(points: list[Point]) -> Iterator[Claim]:
    """Medians over the seeds."""
    for name in PROBLEMS:
        ours, theirs = (median(points, name, method, ITERATIONS) for method in (OURS, RETRACTION))
        yield compared(f"Fig. 3, {name}, {ITERATIONS}, {OURS} / {RETRACTION}", ours, theirs, 1.1)
