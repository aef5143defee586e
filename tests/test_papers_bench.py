"""The spectral paper's experiments: baselines by hand, what must hold at sizes that take seconds, and the command."""

import csv
import itertools
import math
import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from spectral_ops import KroneckerFactor
from spectral_ops.bench import cayley_maps, evolution, findings, matching, papers, spd_problems
from spectral_ops.bench.__main__ import COMMANDS
from spectral_ops.bench.findings import Claim, Point
from spectral_ops.bench.functions import FUNCTIONS

RATES = tuple(10 ** (-1.5 + i / 4) for i in range(6))
SMALL = {
    "full-matrix matching": partial(matching.full_matching, n=6, rate=0.02, steps=60),
    "Kronecker matching, unstructured truth": lambda seeds: matching.pair_matching(
        seeds, "unstructured", sides=(2, 3), rate=0.02, steps=60
    ),
    "Kronecker matching, Kronecker truth": lambda seeds: matching.pair_matching(
        seeds, "Kronecker", sides=(2, 3), rate=0.02, steps=60
    ),
    "SPD problems": partial(spd_problems.spd_problems, size=5, rates=RATES, most=300),
    "evolution": lambda seeds: evolution.evolution(
        seeds, {name: evolution.Setting(1.0, 0.5, 6, 300) for name in ("ackley", "rosenbrock", "griewank")}, size=3
    ),
    "Cayley maps": partial(cayley_maps.cayley_maps, preset="tiny", steps=4),
}


@pytest.fixture(autouse=True)
def _denormals() -> Iterator[None]:
    yield
    torch.set_flush_denormal(False)  # the program sets it for its process, which here is everyone's


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def spd(n: int, seed: int = 0) -> Tensor:
    a = normal(n, n, seed=seed)
    return a @ a.T / n + 0.2 * torch.eye(n, dtype=torch.float64)


def start_at(*sides: Tensor) -> matching.Start:
    d, b = zip(*(torch.linalg.eigh(s.unsqueeze(0)) for s in sides), strict=True)
    return matching.Start(b, d)


def point(method: str, seed: int, x: int, value: float, metric: str = "loss") -> Point:
    return Point("7", "experiment", method, str(seed), "step", x, metric, value)


# --- Matching -----------------------------------------------------------------------------------------------------------


def test_projection_recovers_an_exact_kronecker_product() -> None:
    c, k = torch.stack([spd(3), spd(3, 1)]), torch.stack([spd(4, 2), spd(4, 3)])
    full = matching.kron(c, k)
    torch.testing.assert_close(full[1], torch.kron(c[1], k[1]))
    found_c, found_k = matching.project(full, 3, 4)
    torch.testing.assert_close(matching.kron(found_c, found_k), full)
    assert torch.linalg.eigvalsh(found_c).amin() > 0 and torch.linalg.eigvalsh(found_k).amin() > 0


def test_projection_of_any_spd_matrix_is_spd_and_nothing_near_it_is_better() -> None:
    x = spd(12)
    c, k = matching.project(x, 3, 4)
    assert torch.linalg.eigvalsh(c).amin() > 0 and torch.linalg.eigvalsh(k).amin() > 0
    error = (torch.kron(c, k) - x).norm()
    for seed in range(20):
        other = torch.kron(c + 0.01 * normal(3, 3, seed=seed), k + 0.01 * normal(4, 4, seed=seed + 50))
        assert (other - x).norm() > error


def test_bures_distance_of_commuting_matrices_is_that_of_their_roots() -> None:
    q = torch.linalg.qr(normal(3, 3)).Q
    a, b = torch.tensor([1.0, 4.0, 9.0]).double(), torch.tensor([4.0, 4.0, 0.25]).double()
    expected = math.sqrt((1 - 2) ** 2 + 0 + (3 - 0.5) ** 2)
    assert matching.bures((q * a) @ q.T, (q * b) @ q.T).item() == pytest.approx(expected)
    assert matching.bures(spd(4), spd(4)).item() == pytest.approx(0, abs=1e-6)


def test_relative_frobenius_norm() -> None:
    x, truth = torch.tensor([[3.0, 1.0], [1.0, 2.0]]), torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert matching.relative_frobenius(x, truth).item() == pytest.approx(math.sqrt(6) / 5)


@pytest.mark.parametrize(
    "scheme", [matching.Default, matching.Cholesky, partial(matching.Spectral, exact=True), matching.Spectral]
)
def test_full_schemes_are_the_default_one_up_to_first_order(scheme: type[matching.Default]) -> None:
    s, g = spd(5), normal(1, 5)
    errors = []
    for rate in (1e-2, 1e-3):
        mine = scheme(start_at(s), rate)
        torch.testing.assert_close(mine.matrix()[0], s)
        mine.update(g)
        errors.append((mine.matrix()[0] - (1 - rate) * s - rate * torch.outer(g[0], g[0])).norm().item())
    assert max(errors) < 1e-12 if scheme is matching.Default else errors[1] < errors[0] / 50


def test_cholesky_scheme_rests_at_its_fixed_point() -> None:
    s = spd(5)
    factor = torch.linalg.cholesky(torch.linalg.inv(s))
    torch.testing.assert_close(matching._inverse_free(factor, factor.T @ torch.linalg.cholesky(s), 0.1), factor)
    assert (matching._inverse_free(factor, factor.T @ torch.linalg.cholesky(2 * s), 0.1) - factor).norm() > 0.01


def test_structured_cholesky_scheme_by_hand() -> None:
    n, m, rate = 2, 3, 0.05
    s_c, s_k, g = spd(n), spd(m, 1), normal(n, m, seed=2)
    scheme = matching.StructuredCholesky(start_at(s_c, s_k), rate)
    scheme.update(g.flatten().unsqueeze(0))
    c, k = (torch.linalg.cholesky(torch.linalg.inv(s)) for s in (s_c, s_k))
    new_c = c @ (torch.eye(n) - rate / (2 * m) * (c.T @ g @ k @ k.T @ g.T @ c - m * torch.eye(n)))
    new_k = k @ (torch.eye(m) - rate / (2 * n) * (k.T @ g.T @ c @ c.T @ g @ k - n * torch.eye(m)))
    expected = torch.kron(torch.linalg.inv(new_c @ new_c.T), torch.linalg.inv(new_k @ new_k.T))
    torch.testing.assert_close(scheme.matrix()[0], expected)


def test_projection_scheme_by_hand() -> None:
    s_c, s_k, g = spd(2), spd(3, 1), normal(6)
    scheme = matching.Projection(start_at(s_c, s_k), 0.1)
    scheme.update(g.unsqueeze(0))
    expected = torch.kron(*matching.project(0.9 * torch.kron(s_c, s_k) + 0.1 * torch.outer(g, g), 2, 3))
    torch.testing.assert_close(scheme.matrix()[0], expected)


def test_seeds_do_not_depend_on_how_many_there_are() -> None:
    one, two = (list(matching.full_matching(seeds, n=4, steps=8)) for seeds in (1, 2))
    torch.testing.assert_close([p.value for p in two if p.seed == "0"], [p.value for p in one])
    ends = [p.value for p in two if p.x == 8 and p.method == matching.DEFAULT and p.metric.endswith(matching.FROBENIUS)]
    assert len(set(ends)) == 2


def test_full_matching_of_the_paper_holds_at_full_size() -> None:
    points = list(matching.full_matching(1, rate=0.005, steps=1500))
    held = list(matching.full_claims(points))
    assert len(held) == 6 and all(claim.holds for claim in held), "\n".join(map(str, held))
    default = [p.value for p in points if (p.method, p.metric) == (matching.DEFAULT, f"fixed point: {matching.FROBENIUS}")]
    assert default[-1] < 0.6 * default[0]  # it did learn
    tracked = [p.value for p in points if p.method == matching.OURS[2] and p.metric.startswith("iterate")]
    assert tracked and max(tracked) < 1e-3  # the tracking rotation keeps the default scheme's average whole


@pytest.mark.parametrize("truth", matching.TRUTHS)
def test_kronecker_matching_of_the_paper_holds_at_full_size(truth: str) -> None:
    points = list(matching.pair_matching(1, truth, rate=0.01, steps=600))
    held = list(matching.pair_claims(points))
    assert len(held) == (12 if truth == "Kronecker" else 6) and all(claim.holds for claim in held), "\n".join(map(str, held))
    floor = next(p.value for p in points if p.method == matching.FLOOR and p.metric.endswith(matching.FROBENIUS))
    structured = [p for p in points if p.metric == f"fixed point: {matching.FROBENIUS}" and p.method != matching.DEFAULT]
    assert min(p.value for p in structured) >= floor - 1e-9
    assert floor < 1e-9 if truth == "Kronecker" else floor > 0.5


# --- SPD problems -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", spd_problems.PROBLEMS)
def test_spd_problems_are_the_papers(name: str) -> None:
    problem, s = spd_problems.PROBLEMS[name](0, 4), spd(4).requires_grad_()
    if isinstance(problem, spd_problems.MetricNearness):
        loss = sum((s @ problem.q @ x - x).square().sum() for x in problem.x) / (2 * len(problem.x))
    else:
        loss = (s @ problem.q).trace() - torch.logdet(s)
    assert problem.loss(s.detach()) == pytest.approx(loss.item())
    torch.testing.assert_close(problem.q @ problem.inverse, torch.eye(4).double())
    assert problem.gap(problem.inverse) == pytest.approx(0, abs=1e-12)
    assert problem.gap(s.detach()) == pytest.approx(loss.item() - problem.loss(problem.inverse))
    expected = spd_problems.symmetric(torch.autograd.grad(loss, s)[0])
    steps = range(400 if name == "metric nearness" else 1)
    found = torch.stack([problem.gradient(s.detach(), step) for step in steps]).mean(0)  # batches are drawn evenly
    torch.testing.assert_close(found, expected, rtol=0.1 if len(steps) > 1 else 1e-9, atol=0.02 if len(steps) > 1 else 1e-9)


def test_methods_are_the_same_riemannian_descent_up_to_first_order() -> None:
    e = spd_problems.symmetric(normal(5, 5))
    for name, make in spd_problems.METHODS.items():
        errors = []
        for rate in (1e-2, 1e-3):
            method = make(5)
            method.step(e, rate)
            errors.append((method.matrix() - (torch.eye(5) - 2 * rate * e)).norm().item())
        # The identity has equal eigenvalues: there the spectral coordinates turn nothing (App. E), and only the diagonal moves.
        expected = 2e-3 * (e - e.diag().diag()).norm().item() if name == spd_problems.OURS else 0.0
        assert errors[1] == pytest.approx(expected, abs=1e-4), name
        assert name == spd_problems.OURS or errors[1] < errors[0] / 50


def test_spectral_descent_is_the_retractions_from_distinct_eigenvalues() -> None:
    e, s = spd_problems.symmetric(normal(5, 5)), spd(5, 3)
    d, b = torch.linalg.eigh(s)
    errors = []
    for rate in (1e-3, 1e-4):
        ours, theirs = spd_problems.Spectral(5), spd_problems.Retraction(5)
        ours.factor.basis.copy_(b)
        ours.factor.eigenvalues.copy_(d)
        theirs.s = s
        for method in (ours, theirs):
            method.step(e, rate)
        errors.append((ours.matrix() - theirs.matrix()).norm().item())
    assert errors[1] < errors[0] / 50


@pytest.mark.parametrize("rate", [1e-2, 1.0, 100.0])
def test_retraction_stays_spd(rate: float) -> None:
    method = spd_problems.Retraction(5)
    for seed in range(3):
        before = torch.linalg.eigvalsh(method.matrix()).amin()
        method.step(spd_problems.symmetric(normal(5, 5, seed=seed)), rate)
        # S + η + ½ η S⁻¹ η = ½ S + ½ (S + η) S⁻¹ (S + η) ⪰ ½ S
        assert torch.linalg.eigvalsh(method.matrix()).amin() >= 0.499 * before - 1e-9 * method.matrix().norm()


@pytest.mark.parametrize("method", spd_problems.METHODS)
def test_best_is_the_best_of_all_rates(method: str) -> None:
    problem = spd_problems.LogDet(0, 5)
    alone = [spd_problems.descend(problem, spd_problems.METHODS[method](5), rate, 300).iterations for rate in RATES]
    run = spd_problems.best(problem, method, RATES, 300)
    assert run.iterations == min(alone) < 300
    assert len(run.gaps) == run.iterations + 1 and run.gaps[-1] <= spd_problems.TARGET < run.gaps[-2]


def test_spd_claims_hold_at_a_smaller_size() -> None:
    points = list(spd_problems.spd_problems(1, size=12))
    held = list(spd_problems.claims(points))
    assert len(held) == 2 and all(claim.holds for claim in held), "\n".join(map(str, held))


# --- Evolution ----------------------------------------------------------------------------------------------------------


def told(make: type[evolution.Factored], rate: float) -> tuple[evolution.Factored, Tensor, Tensor, Tensor]:
    """A strategy before and after: its samples, the natural gradients by plain loops, and what it became."""
    nes = make(torch.tensor([1.0, 2.0]).double(), 0.5, 6, rate, 0)
    nes.a = torch.tensor([[0.5, 0.1], [0.0, 0.3]]).double()
    mean, a = nes.mean.clone(), nes.a.clone()
    w = nes.ask()
    values = FUNCTIONS["rosenbrock"](w)
    weights = [max(0.0, math.log(4) - math.log(k)) for k in range(1, 7)]
    utilities = [x / sum(weights) - 1 / 6 for x in weights]
    step, g = torch.zeros(2).double(), torch.zeros(2, 2).double()
    for u, i in zip(utilities, sorted(range(6), key=lambda i: values[i].item()), strict=True):
        z = torch.linalg.solve(a, w[i] - mean)
        step += u * z
        g += u * (torch.outer(z, z) - torch.eye(2))
    nes.tell(w, values)
    torch.testing.assert_close(nes.mean, mean + a @ step)
    torch.testing.assert_close(w[:3] + w[3:], (2 * mean).expand(3, 2))  # mirrored
    return nes, a, g, w


def test_exponential_nes_with_plain_loops() -> None:
    nes, a, g, _ = told(evolution.ExponentialNES, 0.3)
    torch.testing.assert_close(nes.a @ nes.a.T, a @ torch.linalg.matrix_exp(0.3 * g) @ a.T)


def test_plain_nes_with_plain_loops() -> None:
    nes, a, g, _ = told(evolution.PlainNES, 0.3)
    assert torch.linalg.eigvalsh(torch.eye(2) + 0.3 * g).amin() > evolution.PlainNES.FLOOR
    torch.testing.assert_close(nes.a @ nes.a.T, a @ (torch.eye(2) + 0.3 * g) @ a.T)


def test_plain_nes_stays_spd_where_its_step_would_not() -> None:
    nes, a, g, _ = told(evolution.PlainNES, 50.0)
    assert torch.linalg.eigvalsh(torch.eye(2) + 50 * g).amin() < 0
    inverse = torch.linalg.inv(a)
    assert torch.linalg.eigvalsh(inverse @ nes.a @ nes.a.T @ inverse.T).amin().item() == pytest.approx(0.1)


def test_all_methods_have_the_same_start_and_utilities() -> None:
    nes = {name: make(torch.ones(3).double(), 0.5, 8, 0.2, 0) for name, make in evolution.METHODS.items()}
    w = 1 + 0.5 * torch.cat([normal(4, 3), -normal(4, 3)])
    for strategy in nes.values():
        if isinstance(strategy, evolution.Factored):
            strategy.ask()
            strategy.z = (w - 1) / 0.5
        strategy.tell(w, FUNCTIONS["ackley"](w))
    for strategy in nes.values():
        torch.testing.assert_close(strategy.mean, nes[evolution.EXPONENTIAL].mean)
        assert (strategy.mean - 1).abs().amax() > 0.01


@pytest.mark.parametrize("name", ["rosenbrock", "ackley"])
def test_evolution_of_the_paper_holds(name: str) -> None:
    setting = evolution.SETTINGS[name]
    needed = {
        method: statistics.median(
            evolution.minimise(name, evolution.METHODS[method], setting, seed).needed for seed in range(3)
        )
        for method in (evolution.OURS, evolution.EXPONENTIAL)
    }
    assert needed[evolution.OURS] <= 1.2 * needed[evolution.EXPONENTIAL] < setting.most


# --- Cayley maps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [None, 8])
def test_every_generator_has_the_same_norm_and_the_rest_is_the_papers(order: int | None) -> None:
    p, g = Parameter(torch.zeros(4, 6)), normal(4, 6).float()
    options = {"lr": 0.1, "beta1": 0.0, "beta2": 0.1, "rms": 0.2, "rotation": 0.5, "order": order}
    optimizer = cayley_maps.NonconstantKron([p], **options)
    factor = KroneckerFactor(4, 6, scale=g.square().mean())
    p.grad = g
    optimizer.step()  # from equal eigenvalues nothing turns
    factor.update(g, 0.1)
    (state,) = optimizer.factors
    assert torch.equal(state["b_c"][0], torch.eye(4))
    for mine, other in (("d_c", "eigenvalues_c"), ("d_k", "eigenvalues_k"), ("alpha", "scale")):
        torch.testing.assert_close(state[mine][0], getattr(factor, other))
    expected = factor.apply(g, 2.0)
    torch.testing.assert_close(p.detach(), -0.1 * 0.2 * expected / expected.square().mean().sqrt())
    p.grad = normal(4, 6, seed=1).float()
    optimizer.step()
    for b in (state["b_c"][0].double(), state["b_k"][0].double()):
        eye = torch.eye(len(b)).double()
        generator = torch.linalg.solve(b + eye, b - eye)  # of the exact map, by which the truncated one is off by its 8th power
        assert generator.norm().item() == pytest.approx(0.25, rel=1e-4)
    factor.update(p.grad, 0.1)
    torch.testing.assert_close(state["d_k"][0], factor.eigenvalues_k)


def test_both_maps_train_alike_and_are_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cayley_maps, "ROTATION", 0.8)  # at the experiment's own the losses of so few steps are the same
    monkeypatch.setitem(cayley_maps.OPTIONS, "lr", 1.5e-2)
    points = list(cayley_maps.cayley_maps(1, preset="tiny", steps=8))
    assert {p.method for p in points} == set(cayley_maps.MAPS)
    (claim,) = cayley_maps.claims(points)
    assert claim.holds and 0 < claim.value < 0.005 and cayley_maps.time(points, "exact") > 0
    losses = [p.value for p in points if p.metric == cayley_maps.LOSS and p.method == "truncated"]
    assert len(losses) == 8 and losses[-1] < losses[0] - 0.1


# --- What is made of points ---------------------------------------------------------------------------------------------


def test_medians_are_over_seeds_where_all_have_a_point() -> None:
    points = [point("a", seed, x, 10.0 * seed + x) for seed, last in enumerate((3, 2, 3)) for x in range(last)]
    assert [(p.x, p.value, p.seed) for p in findings.medians(points)] == [(0, 10.0, "median"), (1, 11.0, "median")]


def test_thinned_curves_keep_their_ends() -> None:
    curve = [point("a", 0, x, 0.0) for x in range(101)]
    assert [p.x for p in findings.thinned(curve, 5)] == [0, 25, 50, 75, 100]
    assert findings.thinned(curve[:3], 5) == curve[:3] and findings.thinned(curve, 1) == curve[:1]


def test_an_ending_is_the_mean_of_the_last_quarter() -> None:
    points = [point("a", seed, x, seed + float(x >= 6) * x) for seed in range(3) for x in range(9)]
    assert findings.ending(points) == pytest.approx(1 + 7)


@pytest.mark.parametrize(("ours", "holds"), [(11.0, True), (11.2, False), (math.inf, False), (math.nan, False)])
def test_claims(ours: float, holds: bool) -> None:
    claim = findings.compared("ours / theirs", ours, 10.0, 1.1)
    assert claim.holds is holds and str(claim).startswith("holds" if holds else "DOES NOT HOLD")
    assert not findings.compared("neither came there", math.inf, math.inf, 1.1).holds


# --- The command --------------------------------------------------------------------------------------------------------


def test_command_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert "papers" in COMMANDS and papers.EXPERIMENTS.keys() == SMALL.keys()
    made: list[Point] = []

    def recorded(name: str, seeds: int) -> list[Point]:
        found = list(SMALL[name](seeds))
        made.extend(found)
        return found

    small = {name: (figures, partial(recorded, name)) for name, (figures, _) in papers.EXPERIMENTS.items()}
    monkeypatch.setattr(papers, "EXPERIMENTS", small)
    papers.main(["--seeds", "2", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    for figure in ("2", "3", "7", "8", "9", "10"):
        assert (tmp_path / f"papers-fig{figure}.png").read_bytes().startswith(b"\x89PNG")
    assert printed.count("holds: ") + printed.count("DOES NOT HOLD: ") == 6 + 18 + 2 + 3 + 1
    assert "times as long" in printed

    with (tmp_path / "papers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["figure"] for row in rows} == {"3", "7", "8", "9", "10"}
    assert all(row["code"] and row["hardware"] and row["command"].endswith("papers --seeds 2") for row in rows)

    def values(row: dict[str, str]) -> list[float]:
        name = tuple(row[key] for key in ("figure", "experiment", "method", "x_name", "metric"))
        curve = [p for p in made if (p.figure, p.experiment, p.method, p.x_name, p.metric) == name and p.x == int(row["x"])]
        return [p.value for p in curve if row["seed"] in (p.seed, "median")]

    for row in rows:
        found = values(row)
        assert found and float(row["value"]) == pytest.approx(statistics.median(found), rel=6e-4), row
    names = {(p.figure, p.experiment, p.method, p.metric) for p in made}
    assert {tuple(row[key] for key in ("figure", "experiment", "method", "metric")) for row in rows} == names


@pytest.mark.parametrize("argv", [["--figures", "4"], ["--seeds", "0"]])
def test_command_refuses(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        papers.main(argv)
    assert raised.value.code == 2 and argv[0] in capsys.readouterr().err


def test_only_the_experiments_of_the_figures_run(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def experiment(name: str, seeds: int) -> list[Point]:
        ran.append(name)
        return [point("a", seed, 0, 1.0) for seed in range(seeds)]

    small = {name: (figures, partial(experiment, name)) for name, (figures, _) in papers.EXPERIMENTS.items()}
    monkeypatch.setattr(papers, "EXPERIMENTS", small)
    assert len(papers.run(["7"], 2)) == 2 and ran == ["full-matrix matching"]
    ran.clear()
    papers.run(["3"], 1)
    assert ran == ["SPD problems", "evolution"]


def test_figures_that_show_parts() -> None:
    found = itertools.product("7", ["full matrix"], [f"iterate: {m}" for m in matching.METRICS])
    assert [papers.shown("2", *name) for name in found] == [True, False]
    assert not papers.shown("2", "8", "Kronecker truth", f"iterate: {matching.FROBENIUS}")
    assert papers.shown("3", "9", "ackley", "loss") and not papers.shown("3", "9", "schaffer", "loss")
    assert Claim("text", 1.0, 1.0).holds
