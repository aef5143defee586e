"""SpectralNES: the paper's update in loops, what must not change it, xNES as a yardstick, its limits; the test functions."""

import io
import itertools
import math
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from spectral_ops.bench.functions import FUNCTIONS
from spectral_ops.optim import SpectralNES
from spectral_ops.optim.spectral_nes import utilities

Function = Callable[[Tensor], Tensor]
F64 = torch.float64


def bowl(w: Tensor) -> Tensor:
    """Convex, with every coordinate of another curvature, and not separable."""
    n = w.shape[-1]
    return (torch.arange(1, n + 1, dtype=F64) * (w - 0.3).square()).sum(-1) + 0.5 * (w - 0.3).sum(-1).square()


def sphere(w: Tensor) -> Tensor:
    return w.square().sum(-1)


def run(nes: SpectralNES, f: Function, generations: int) -> SpectralNES:
    for _ in range(generations):
        w = nes.ask()
        nes.tell(w, f(w))
    return nes


def covariance(nes: SpectralNES) -> Tensor:
    return torch.diag(1 / nes.factor.eigenvalues.view(-1)) if nes.diagonal else nes.factor.inverse()


# --- the paper --------------------------------------------------------------------------------------------------------


def plain_utilities(size: int) -> list[float]:
    raw = [max(0.0, math.log(size / 2 + 1) - math.log(k)) for k in range(1, size + 1)]
    return [x / sum(raw) - 1 / size for x in raw]


def plain_generation(
    mu: Tensor, b: Tensor, d: Tensor, solutions: Tensor, values: Tensor, lr: float, scale_lr: float, diagonal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Fig. 1, top box, with γ = 0, p = 1 and the curvature of Sec. 4.3, entry by entry."""
    n, u = len(mu), plain_utilities(len(values))
    g, step = torch.zeros(n, n, dtype=F64), torch.zeros(n, dtype=F64)
    for k, index in enumerate(values.argsort().tolist()):
        z = torch.zeros(n, dtype=F64)
        for i in range(n):
            z[i] = d[i].sqrt() * sum(b[j, i] * (solutions[index, j] - mu[j]) for j in range(n))
        step += u[k] * z
        for i in range(n):
            for j in range(n):
                g[i, j] += u[k] * (z[i] * z[j] - float(i == j))
    mu_new = mu.clone()
    for i in range(n):
        mu_new[i] += lr * sum(b[i, j] * step[j] / d[j].sqrt() for j in range(n))
    x = torch.zeros(n, n, dtype=F64)
    for i in range(n):
        for j in range(i):
            if abs(d[i] - d[j]) > 1e-6 * max(d[i], d[j]) and not diagonal:
                x[i, j] = scale_lr / 2 * (d[i] * d[j]).sqrt() * g[i, j] / (d[i] - d[j])
                x[j, i] = -x[i, j]
    eye = torch.eye(n, dtype=F64)
    return mu_new, b @ (eye + x) @ torch.linalg.inv(eye - x), d * torch.exp(-scale_lr * g.diagonal())


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("diagonal", [False, True])
def test_generations_are_the_papers(diagonal: bool, asked: bool) -> None:
    n = 5
    mu = torch.linspace(-1, 1, n, dtype=F64)
    nes = SpectralNES(mu, 0.7, mean_lr=0.8, scale_lr=0.3, max_preconditioner_dim=n - 1 if diagonal else n)
    b, d = torch.eye(n, dtype=F64), torch.full((n,), 0.7**-2, dtype=F64)
    for _ in range(6):
        w = nes.ask() if asked else nes.ask() + 0.2 * torch.randn(nes.population_size, n, dtype=F64)
        values = bowl(w)
        mu, b, d = plain_generation(mu, b, d, w, values, 0.8, 0.3, diagonal)
        nes.tell(w, values)
        torch.testing.assert_close(nes.mean, mu, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(nes.factor.eigenvalues.view(-1), d, rtol=1e-12, atol=0)
        if not diagonal:
            torch.testing.assert_close(nes.factor.basis, b, rtol=0, atol=1e-12)
    off = covariance(nes) - torch.diag(covariance(nes).diagonal())
    assert (off.abs().max() > 1e-2) != diagonal  # it did turn


def test_samples_have_the_mean_and_the_covariance() -> None:
    nes = run(SpectralNES([1.0, -2.0, 3.0], [0.5, 1.0, 2.0], population_size=20_000), bowl, 3)
    w = nes.ask()
    assert (nes.factor.basis - torch.eye(3, dtype=F64)).abs().max() > 0.05
    torch.testing.assert_close(w.mean(0), nes.mean, rtol=0, atol=1e-12)  # mirrored
    torch.testing.assert_close(torch.cov(w.T), covariance(nes), rtol=0.05, atol=0.05 * covariance(nes).amax().item())
    start = SpectralNES([1.0, -2.0, 3.0], [0.5, 1.0, 2.0], population_size=20_000, mirrored=False).ask()
    torch.testing.assert_close(start.std(0), torch.tensor([0.5, 1.0, 2.0], dtype=F64), rtol=0.03, atol=0)
    assert not torch.equal(start[:10_000] - nes.mean, nes.mean - start[10_000:])


@pytest.mark.parametrize("size", [4, 7, 10, 51])
def test_utilities(size: int) -> None:
    order = torch.randperm(size)
    u = utilities(torch.arange(size, dtype=F64)[order])
    torch.testing.assert_close(u, torch.tensor(plain_utilities(size), dtype=F64)[order], rtol=1e-12, atol=1e-15)
    assert abs(u.sum()) < 1e-14


def test_equal_values_share_their_utility() -> None:
    values = torch.tensor([3.0, 1.0, 3.0, math.inf, 1.0, 0.0, 3.0, math.inf], dtype=F64)
    u, plain = utilities(values), torch.tensor(plain_utilities(8), dtype=F64)
    for value, ranks in ((0.0, [0]), (1.0, [1, 2]), (3.0, [3, 4, 5]), (math.inf, [6, 7])):
        shared = u[values == value]
        assert len(shared) == len(ranks) and (shared == shared[0]).all()
        torch.testing.assert_close(shared[0], plain[ranks].mean(), rtol=1e-12, atol=1e-15)
    assert (utilities(torch.full((9,), 2.0, dtype=F64)) == 0).all()


# --- invariance -------------------------------------------------------------------------------------------------------


def test_only_ranks_count() -> None:
    """Strictly increasing transformations give the same bits."""
    first = run(SpectralNES(torch.zeros(4), 1.0), bowl, 60)
    for transform in (lambda x: x**3, lambda x: 5 * x - 7, lambda x: x.log1p(), lambda x: (x / 100).exp()):

        def f(w: Tensor, transform: Function = transform) -> Tensor:
            assert torch.equal(bowl(w).argsort(), transform(bowl(w)).argsort()) and len(bowl(w).unique()) == len(w)
            return transform(bowl(w))

        other = run(SpectralNES(torch.zeros(4), 1.0), f, 60)
        assert torch.equal(first.mean, other.mean) and torch.equal(first.factor.basis, other.factor.basis)
        assert torch.equal(first.factor.eigenvalues, other.factor.eigenvalues)
    assert bowl(first.mean) < 0.1 * bowl(torch.zeros(4, dtype=F64))


def test_order_of_the_solutions_does_not_count() -> None:
    """Not even among equal values."""
    nes, ties = [SpectralNES(torch.zeros(4), 1.0) for _ in range(2)], 0
    for t in range(20):
        w = nes[0].ask()
        values = (bowl(w) / 5).round()
        ties += len(values) - len(values.unique())
        order = torch.randperm(len(w), generator=torch.Generator().manual_seed(t))
        nes[0].tell(w, values)
        nes[1].tell(w[order], values[order])
        torch.testing.assert_close(nes[0].mean, nes[1].mean, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(covariance(nes[0]), covariance(nes[1]), rtol=1e-10, atol=1e-11)
    assert ties > 20


def test_shift_and_rotation_of_the_space() -> None:
    n, scales = 6, 2.0 ** -torch.arange(6, dtype=F64)  # distinct eigenvalues
    r = torch.linalg.qr(torch.randn(n, n, dtype=F64)).Q
    mean, shift = torch.linspace(0, 1, n, dtype=F64), torch.linspace(3, -2, n, dtype=F64)
    plain, shifted, turned = (SpectralNES(m, scales) for m in (mean, mean + shift, r @ mean))
    turned.factor.basis.copy_(r)
    for _ in range(8):
        run(plain, bowl, 1)
        run(shifted, lambda w: bowl(w - shift), 1)
        run(turned, lambda w: bowl(w @ r), 1)
        torch.testing.assert_close(shifted.mean - shift, plain.mean, rtol=0, atol=1e-8)
        torch.testing.assert_close(turned.mean @ r, plain.mean, rtol=0, atol=1e-8)
        torch.testing.assert_close(covariance(shifted), covariance(plain), rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(r.T @ covariance(turned) @ r, covariance(plain), rtol=1e-8, atol=1e-8)
    assert (plain.mean - mean).abs().max() > 0.1 and (plain.factor.basis - torch.eye(n)).abs().max() > 0.01


# --- how well it minimises --------------------------------------------------------------------------------------------


def xnes(f: Function, mean: Tensor, scale: float, population: int, seed: int, limit: int) -> float:
    """Exponential NES, `A ← A exp(η/2 G)`, with the same utilities, mirrored samples and learning rates: evaluations until
    `f(μ) ≤ 1e-8`."""
    n = len(mean)
    lr = (9 + 3 * math.log(n)) / (5 * n * math.sqrt(n))
    u = torch.tensor(plain_utilities(population), dtype=F64)
    a, generator = scale * torch.eye(n, dtype=F64), torch.Generator().manual_seed(seed)
    for generation in range(1, limit // population + 1):
        z = torch.randn(population // 2, n, dtype=F64, generator=generator)
        z = torch.cat([z, -z])
        z = z[f(mean + z @ a.T).argsort()]
        mean, a = mean + a @ (u @ z), a @ torch.linalg.matrix_exp(lr / 2 * (z.T @ (u[:, None] * z)))
        if f(mean) <= 1e-8:
            return generation * population
    return math.inf


def spectral(f: Function, mean: Tensor, scale: float, population: int, seed: int, limit: int) -> float:
    nes = SpectralNES(mean, scale, population_size=population, seed=seed)
    while nes.evaluations + population <= limit:
        run(nes, f, 1)
        if f(nes.mean) <= 1e-8:
            return nes.evaluations
    return math.inf


@pytest.mark.parametrize(("name", "start", "scale"), [("rosenbrock", 0.0, 0.5), ("ackley", 10.0, 10.0)])
def test_reaches_the_minimum_in_the_evaluations_of_xnes(name: str, start: float, scale: float) -> None:
    """d = 10, medians of 5 seeds."""
    mean = torch.full((10,), start, dtype=F64)
    ours, theirs = (
        statistics.median(method(FUNCTIONS[name], mean, scale, 10, seed, 25_000) for seed in range(5))
        for method in (spectral, xnes)
    )
    assert theirs < math.inf  # the yardstick works
    assert ours <= 1.2 * theirs, f"{ours} evaluations, xNES {theirs}"


@pytest.mark.parametrize("mirrored", [True, False])
@pytest.mark.parametrize("n", [1, 2, 20])
def test_sphere(n: int, mirrored: bool) -> None:
    """With 20 coordinates, equal on the sphere, the basis turns by more than 60° in almost every generation."""
    nes = SpectralNES(torch.ones(n), 0.5, target=1e-10, mirrored=mirrored, max_evaluations=50_000)
    best = nes.minimize(sphere)
    assert nes.stop() == "target" and nes.best_value <= 1e-10 and sphere(best) == nes.best_value
    assert nes.evaluations == nes.generation * nes.population_size and torch.equal(best, nes.best)
    b = nes.factor.basis
    torch.testing.assert_close(b.T @ b, torch.eye(n, dtype=F64), rtol=0, atol=1e-12)


def test_default_population_and_learning_rates() -> None:
    for n, odd in ((1, 4), (2, 6), (10, 10), (20, 12), (100, 17)):
        nes = SpectralNES(torch.zeros(n), 1.0, mirrored=False)
        assert nes.population_size == odd and SpectralNES(torch.zeros(n), 1.0).population_size == odd + odd % 2
        assert nes.ask().shape == (odd, n) and nes.mean_lr == 1.0
        assert nes.scale_lr == pytest.approx((9 + 3 * math.log(n)) / (5 * n**1.5))
    assert SpectralNES(torch.zeros(2000), 1.0).scale_lr == pytest.approx((3 + math.log(2000)) / (5 * 2000**0.5))


def test_many_coordinates_keep_a_diagonal() -> None:
    n = 3000
    weights = torch.logspace(0, 2, n, dtype=F64)
    nes = SpectralNES(torch.ones(n), 0.5, population_size=40)
    run(nes, lambda w: (weights * w.square()).sum(-1), 300)
    size = sum(x.numel() for x in (nes.mean, nes.best, *nes.factor.state_dict().values()))
    assert nes.diagonal and size <= 6 * n
    assert (weights * nes.mean.square()).sum() < 0.7 * weights.sum()
    half = nes.factor.eigenvalues.view(-1).log()
    assert half[n // 2 :].mean() > half[: n // 2].mean() + 0.1  # narrow where the function is steep
    assert (nes.factor.basis == 1).all()


# --- state ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1024, 3])
def test_resumes_bit_for_bit(limit: int) -> None:
    def new(seed: int) -> SpectralNES:
        return SpectralNES(torch.zeros(6), 1.0, seed=seed, max_preconditioner_dim=limit)

    nes = run(new(3), bowl, 12)
    file = io.BytesIO()
    torch.save(nes.state_dict(), file)
    file.seek(0)
    state = nes.state_dict()
    run(nes, bowl, 12)
    for saved in (state, torch.load(file, weights_only=True)):  # a copy: what came later is not in it
        other = new(0)
        other.load_state_dict(saved)
        assert other.generation == 12 and not torch.equal(other.mean, nes.mean)
        run(other, bowl, 12)
        assert torch.equal(other.mean, nes.mean) and torch.equal(other.best, nes.best) and other.best_value == nes.best_value
        assert torch.equal(other.factor.basis, nes.factor.basis)
        assert torch.equal(other.factor.eigenvalues, nes.factor.eigenvalues)
        assert (other.evaluations, other.generation) == (nes.evaluations, nes.generation)
        assert torch.equal(other.ask(), nes.ask())


def test_samples_are_a_function_of_seed_and_generation() -> None:
    nes = SpectralNES(torch.zeros(5), 1.0)
    state = torch.get_rng_state()
    w = nes.ask()
    torch.randn(7)
    assert torch.equal(w, nes.ask())
    nes.tell(w, bowl(w))
    assert not torch.equal((w - w.mean(0)) / w.std(0), (nes.ask() - nes.ask().mean(0)) / nes.ask().std(0))
    torch.set_rng_state(state)
    expected = torch.randn(7)
    torch.set_rng_state(state)
    nes.ask()
    assert torch.equal(torch.randn(7), expected)  # the global generator is left alone
    starts = [SpectralNES(torch.zeros(5), 1.0, seed=seed).ask() for seed in (0, 1, -1, 2**40, 2**63)]
    assert not torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])
    with pytest.raises(ValueError, match="the state of SpectralNES is"):
        nes.load_state_dict({"mean": nes.mean})
    before = nes.state_dict()
    for other in (SpectralNES(torch.zeros(4), 1.0), SpectralNES(torch.zeros(5), 1.0, max_preconditioner_dim=2)):
        with pytest.raises(ValueError, match=r"must (be a tensor of|have) shape"):
            nes.load_state_dict(other.state_dict())
    assert torch.equal(before["mean"], nes.mean) and nes.generation == 1


def test_what_it_is_given_stays_and_lists_will_do() -> None:
    mean = torch.zeros(3, dtype=F64)
    nes = SpectralNES(mean, [1.0, 2.0, 3.0], max_evaluations=60)
    nes.minimize(lambda w: bowl(w).tolist())
    other = SpectralNES(np.zeros(3), torch.tensor([1.0, 2.0, 3.0]), max_evaluations=60)
    other.minimize(lambda w: bowl(w).numpy())
    assert (mean == 0).all() and torch.equal(nes.mean, other.mean) and nes.evaluations == 56 and (nes.mean != 0).all()
    assert nes.stop() == "max_evaluations"


# --- stopping, limits, odd values -------------------------------------------------------------------------------------


def test_stops() -> None:
    nes = SpectralNES(torch.ones(3), 1.0, max_evaluations=100)  # population 8
    assert nes.stop() is None
    nes.minimize(sphere)
    assert nes.stop() == "max_evaluations" and nes.evaluations == 96

    nes = SpectralNES(torch.ones(3), 1.0, scale_limits=(1e-3, 10.0))
    nes.minimize(sphere)
    assert nes.stop() == "scale" and (nes.factor.eigenvalues >= 1e6 * (1 - 1e-12)).all() and 0 < nes.best_value < 1e-4

    nes = SpectralNES(torch.ones(3), 1.0)
    nes.minimize(lambda w: torch.zeros(len(w)))
    assert nes.stop() == "flat" and nes.generation == 20 and nes.best_value == 0
    assert torch.equal(nes.mean, torch.ones(3, dtype=F64)) and (nes.factor.eigenvalues == 1).all()

    nes = SpectralNES(torch.ones(3), 1.0, target=0.5)
    run(nes, lambda w: torch.zeros(len(w)), 19)
    run(nes, lambda w: 1 + sphere(w), 1)
    run(nes, lambda w: torch.ones(len(w)), 19)
    assert nes.stop() == "target" and nes.flat == 19  # counted anew


def test_deviations_stay_within_their_limits() -> None:
    """On a slope nothing holds the samples back."""
    nes = SpectralNES(torch.zeros(3), 1.0, scale_limits=(0.01, 50.0), population_size=40, scale_lr=0.5)
    seen: list[tuple[float, float]] = []
    for _ in range(200):
        run(nes, lambda w: w[:, 0], 1)
        deviations = nes.factor.eigenvalues.rsqrt()
        seen.append((deviations.amin().item(), deviations.amax().item()))
    assert min(low for low, _ in seen) >= 0.01 * (1 - 1e-12) and max(high for _, high in seen) <= 50 * (1 + 1e-12)
    assert max(high for _, high in seen) > 49.9 or min(low for low, _ in seen) < 0.0101
    assert nes.mean.isfinite().all() and nes.mean[0] < -10


@pytest.mark.parametrize("far", [1e3, 1e60])
def test_solutions_far_away_leave_it_usable(far: float) -> None:
    nes = SpectralNES(torch.zeros(4), 1.0)
    w = nes.ask()
    w[0] = far
    nes.tell(w, -w.sum(-1))
    assert nes.mean.isfinite().all() and nes.factor.basis.isfinite().all()
    assert (nes.factor.eigenvalues >= 1e-24 * (1 - 1e-12)).all() and (nes.factor.eigenvalues <= 1e24 * (1 + 1e-12)).all()
    assert nes.ask().isfinite().all()
    before = nes.state_dict()
    w = torch.full((nes.population_size, 4), 1e300, dtype=F64)
    with pytest.raises(ValueError, match="`solutions` are too far from the mean"):
        nes.tell(w, torch.arange(len(w)))
    assert torch.equal(nes.mean, before["mean"]) and nes.generation == 1


def test_nan_is_the_worst_value() -> None:
    nes = [SpectralNES(torch.zeros(4), 1.0) for _ in range(2)]
    for _ in range(100):
        w = nes[0].ask()
        values = bowl(w)
        values[::3] = math.nan
        nes[0].tell(w, values)
        nes[1].tell(w, values.nan_to_num(math.inf))
    assert torch.equal(nes[0].mean, nes[1].mean) and nes[0].best_value == bowl(nes[0].best) < math.inf
    assert bowl(nes[0].mean) < 0.1 * bowl(torch.zeros(4, dtype=F64))

    lost = SpectralNES(torch.ones(4), 1.0)
    assert torch.equal(lost.minimize(lambda w: torch.full((len(w),), math.nan)), torch.ones(4, dtype=F64))
    assert lost.best_value == math.inf and lost.stop() == "flat"

    down = SpectralNES(torch.zeros(4), 1.0, target=-1e300)
    assert down.minimize(lambda w: torch.where(w[:, 0] > 0, -math.inf, bowl(w)))[0] > 0 and down.best_value == -math.inf


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((torch.zeros(2, 2), 1.0), {}), r"`mean` must be finite and have shape \(n,\)"),
        (((torch.zeros(0), 1.0), {}), r"`mean` must be finite and have shape \(n,\)"),
        ((([0.0, math.nan], 1.0), {}), r"`mean` must be finite"),
        (((torch.zeros(3), 0.0), {}), "`scale` must be positive and finite, .* got 0.0"),
        (((torch.zeros(3), [1.0, 2.0]), {}), r"`scale` .* of shape \(3,\), got \[1.0, 2.0\]"),
        (((torch.zeros(3), math.inf), {}), "`scale` must be positive and finite"),
        (((torch.zeros(3), 1e-200), {}), "`scale_limits` must be two numbers"),
        (((torch.zeros(3), 1.0), {"scale_limits": (2.0, 3.0)}), "`scale_limits` .* with `scale` between them, got"),
        (((torch.zeros(3), 1.0), {"scale_limits": (0.0, 3.0)}), "`scale_limits` must be two numbers"),
        (((torch.zeros(3), 1.0), {"scale_limits": (0.1, 1.0, 3.0)}), "`scale_limits` must be two numbers"),
        (((torch.zeros(3), 1.0), {"population_size": 7}), "`population_size` .* even with `mirrored=True`, got 7"),
        (((torch.zeros(3), 1.0), {"population_size": 2}), "`population_size` must be at least 4"),
        (((torch.zeros(3), 1.0), {"population_size": 8.0}), "`population_size` must be an integer"),
        (((torch.zeros(3), 1.0), {"mean_lr": 0.0}), "`mean_lr` must be positive, got 0.0"),
        (((torch.zeros(3), 1.0), {"scale_lr": math.inf}), "`scale_lr` must be positive"),
        (((torch.zeros(3), 1.0), {"mirrored": "yes"}), "`mirrored` must be one of True, False, got 'yes'"),
        (((torch.zeros(3), 1.0), {"max_evaluations": 5}), "`max_evaluations` must be at least a population, 8, got 5"),
        (((torch.zeros(3), 1.0), {"target": math.nan}), "`target` must be a number, got nan"),
        (((torch.zeros(3), 1.0), {"max_preconditioner_dim": 0}), "`max_preconditioner_dim` must be an integer of at least 1"),
        (((torch.zeros(3), 1.0), {"max_preconditioner_dim": None}), "`max_preconditioner_dim` must be an integer"),
        (((torch.zeros(3), 1.0), {"mean_lr": None}), "`mean_lr` must be a number, got None"),
        (((torch.zeros(3), 1.0), {"seed": 0.5}), "`seed` must be an integer, got 0.5"),
    ],
)
def test_flawed_arguments(arguments: tuple[Any, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        SpectralNES(*arguments[0], **arguments[1])


def test_flawed_solutions_and_values() -> None:
    nes = SpectralNES(torch.zeros(3), 1.0)
    w = nes.ask()
    nan = w.clone()
    nan[2, 1] = math.nan
    for solutions, values, message in (
        (w, torch.zeros(7), r"`values` must have shape \(8,\), one for each solution, got \(7,\)"),
        (w, torch.zeros(8, 1), r"`values` must have shape \(8,\)"),
        (w, 1.0, r"`values` must have shape \(8,\), .* got \(\)"),
        (w[:6], torch.zeros(6), r"`solutions` must be finite and have shape \(8, 3\), got shape \(6, 3\)"),
        (nan, torch.zeros(8), "`solutions` must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            nes.tell(solutions, values)
    assert nes.generation == nes.evaluations == 0 and torch.equal(nes.ask(), w)


# --- the test functions -----------------------------------------------------------------------------------------------

PRINTED: dict[str, Callable[[list[float]], float]] = {
    "ackley": lambda w: (
        20 - 20 * math.exp(-0.2 * math.sqrt(sum(x * x for x in w) / len(w)))
        + math.e - math.exp(sum(math.cos(2 * math.pi * x) for x in w) / len(w))
    ),
    "rosenbrock": lambda w: sum(100 * (y - x * x) ** 2 + (x - 1) ** 2 for x, y in itertools.pairwise(w)),
    "bohachevsky": lambda w: sum(
        x * x + 2 * y * y - 0.3 * math.cos(3 * math.pi * x) - 0.4 * math.cos(4 * math.pi * y) + 0.7
        for x, y in itertools.pairwise(w)
    ),
    "schaffer": lambda w: sum(
        (x * x + y * y) ** 0.25 * (math.sin(50 * (x * x + y * y) ** 0.1) ** 2 + 1) for x, y in itertools.pairwise(w)
    ),
    "griewank": lambda w: sum(x * x for x in w) / 4000 - math.prod(math.cos(x / math.sqrt(i)) for i, x in enumerate(w, 1)) + 1,
}  # fmt: skip


@pytest.mark.parametrize("name", PRINTED)
def test_functions_are_the_papers(name: str) -> None:
    f = FUNCTIONS[name]
    for n in (2, 5, 10):
        minimiser = torch.full((n,), f.minimiser, dtype=F64)
        assert f(minimiser) == 0
        w = 4 * torch.randn(3, 50, n, dtype=F64)
        assert f(w).shape == (3, 50) and (f(w) > 0).all()
        near = minimiser + 1e-3 * torch.randn(200, n, dtype=F64)
        assert (f(near) > 0).all()
        for x in (*w[0, :5], near[0]):
            assert f(x).item() == pytest.approx(PRINTED[name](x.tolist()), rel=1e-12, abs=1e-13)
    assert FUNCTIONS.keys() == PRINTED.keys()
