"""minimize_spd: the paper's two problems against descent with a retraction, its update in loops, hard starts, errors."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from spectral_ops import SpectralFactor
from spectral_ops.optim import SPDResult, minimize_spd

F64 = torch.float64
SIZE = 60  # the paper's


class Problem(NamedTuple):
    loss: Callable[[Tensor], Tensor]
    gradient: Callable[[], Callable[[Tensor], Tensor]]  # a new sequence of gradients
    minimum: float
    solution: Tensor


def spd(eigenvalues: Tensor) -> Tensor:
    n = len(eigenvalues)
    q = torch.linalg.qr(torch.randn(n, n, dtype=F64)).Q
    s = (q * eigenvalues) @ q.T
    return 0.5 * (s + s.T)


def log_det(q: Tensor) -> Problem:
    """`Tr(SQ) − log det S`"""
    solution = torch.linalg.inv(q)
    minimum = len(q) + torch.linalg.slogdet(q)[1].item()
    return Problem(
        lambda s: (s * q).sum() - torch.linalg.slogdet(s)[1], lambda: lambda s: q - torch.linalg.inv(s), minimum, solution
    )


def nearness(q: Tensor, count: int = 600, batch: int = 100) -> Problem:
    """`1/(2N) Σ ‖S Q x_i − x_i‖²`; an iteration's gradient is of a part of the points, as in Sec. 4.2."""
    x = torch.randn(count, len(q), dtype=F64)
    y = x @ q

    def gradient() -> Callable[[Tensor], Tensor]:
        generator = torch.Generator().manual_seed(1)

        def g(s: Tensor) -> Tensor:
            i = torch.randint(0, count, (batch,), generator=generator)
            return y[i].T @ (y[i] @ s - x[i]) / batch  # not symmetric

        return g

    return Problem(lambda s: 0.5 * (y @ s - x).square().sum(1).mean(), gradient, 0.0, torch.linalg.inv(q))


PROBLEMS = {
    "log-det": (log_det, (0.05, 0.1, 0.2, 0.3, 0.5)),
    "nearness": (nearness, (0.003, 0.005, 0.007, 0.01, 0.03, 0.05)),
}


def first(history: tuple[float, ...], minimum: float) -> float:
    return next((i for i, x in enumerate(history) if x - minimum <= 1e-8), math.inf)


def retraction(problem: Problem, lr: float, limit: int) -> float:
    """Iterations of Riemannian gradient descent on `S` itself with Manopt's retraction `S + η + ½ η S⁻¹ η`."""
    s, gradient = torch.eye(SIZE, dtype=F64), problem.gradient()
    for iteration in range(limit + 1):
        gap = problem.loss(s).item() - problem.minimum
        if not math.isfinite(gap):
            break
        if gap <= 1e-8:
            return iteration
        e = gradient(s)
        eta = -lr * s @ (e + e.T) @ s
        s = s + eta + 0.5 * eta @ torch.linalg.solve(s, eta)
        s = 0.5 * (s + s.T)
    return math.inf


def spectral(problem: Problem, lr: float, limit: int) -> float:
    try:
        found = minimize_spd(SIZE, problem.loss, gradient=problem.gradient(), lr=lr, max_iterations=limit, tolerance=1e-5)
    except ValueError:  # diverged
        return math.inf
    return first(found.history, problem.minimum)


@pytest.mark.parametrize("name", PROBLEMS)
def test_papers_problems_with_fixed_steps(name: str) -> None:
    """Within 1e-8 of the minimum in the iterations of the baseline, each at its best step of one grid."""
    make, grid = PROBLEMS[name]
    problem = make(spd(torch.logspace(0, 1, SIZE, dtype=F64)))
    ours, theirs = (min(method(problem, lr, 1200) for lr in grid) for method in (spectral, retraction))
    assert theirs < math.inf  # the baseline works
    assert ours <= 1.1 * theirs, f"{ours} iterations, with a retraction {theirs}"


@pytest.mark.parametrize("by_autograd", [True, False])
@pytest.mark.parametrize("name", PROBLEMS)
def test_papers_problems_with_a_line_search(name: str, by_autograd: bool) -> None:
    problem = PROBLEMS[name][0](spd(torch.logspace(0, 1, SIZE, dtype=F64)))

    def gradient(s: Tensor) -> Tensor:  # of all the points
        s = s.clone().requires_grad_()
        (e,) = torch.autograd.grad(problem.loss(s), s)
        return e

    found = minimize_spd(SIZE, problem.loss, gradient=None if by_autograd else gradient)
    assert found.converged and first(found.history, problem.minimum) < 500
    assert found.loss == found.history[-1] and len(found.history) == found.iterations + 1
    assert found.loss - problem.minimum <= 1e-12
    torch.testing.assert_close(found.matrix, problem.solution, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found.matrix, found.factor.matrix(), rtol=0, atol=0)
    b, noise = found.factor.basis, 1e-12 * abs(found.loss)
    torch.testing.assert_close(b.T @ b, torch.eye(SIZE, dtype=F64), rtol=0, atol=1e-11)
    assert all(b <= a + noise for a, b in zip(found.history, found.history[1:], strict=False))


@pytest.mark.parametrize("eigenvalues", [[3.0] * 12, [1.0] * 6 + [4.0] * 6, [1e8, 2e8, 5e8], [1e-3, 1.0, 1e2]])
@pytest.mark.parametrize("name", PROBLEMS)
def test_line_search_with_repeated_and_distant_eigenvalues(name: str, eigenvalues: list[float]) -> None:
    if name == "nearness" and eigenvalues[0] < 1e-2:
        eigenvalues = [1e-1, 1.0, 1e1]  # its curvature has the square of that condition
    problem = PROBLEMS[name][0](spd(torch.tensor(eigenvalues, dtype=F64)))
    found = minimize_spd(len(eigenvalues), problem.loss, max_iterations=2000)
    assert found.loss is not None and found.loss - problem.minimum <= 1e-8
    assert (found.matrix - problem.solution).norm() <= 1e-4 * problem.solution.norm()


def test_identity_is_left_also_where_the_gradient_has_no_diagonal() -> None:
    """A correlation matrix: `E = Q − I` at the identity, and in the basis `I` no eigenvalue would ever move."""
    q = spd(torch.linspace(0.2, 2, 8, dtype=F64))
    q = q / (q.diagonal()[:, None] * q.diagonal()).sqrt()
    problem = log_det(q)
    stuck = minimize_spd(SpectralFactor(8, dtype=F64), problem.loss, gradient=problem.gradient(), lr=0.1, max_iterations=50)
    assert not stuck.converged and (stuck.matrix - torch.eye(8)).abs().max() < 1e-6
    found = minimize_spd(8, problem.loss)
    assert found.converged
    torch.testing.assert_close(found.matrix, problem.solution, rtol=1e-6, atol=1e-7)


def test_equal_eigenvalues_at_the_start() -> None:
    """`d = 1` in the basis `I`, which is not that of the solution."""
    problem = log_det(spd(torch.logspace(0, 1, 12, dtype=F64)))
    found = minimize_spd(SpectralFactor(12, dtype=F64), problem.loss)
    assert found.converged and (found.factor.basis - torch.eye(12)).abs().max() > 0.1
    torch.testing.assert_close(found.matrix, problem.solution, rtol=1e-6, atol=1e-7)


# --- the update -------------------------------------------------------------------------------------------------------


def plain_iteration(b: Tensor, d: Tensor, e: Tensor, lr: float) -> tuple[Tensor, Tensor]:
    """App. L, (29), with `2 ∂ℓ/∂S⁻¹ = −2 S E S`, entry by entry."""
    n, s = len(d), b @ torch.diag(d) @ b.T
    w = b.T @ (-s @ (e + e.T) @ s) @ b
    x, new = torch.zeros(n, n, dtype=F64), d.clone()
    for i in range(n):
        new[i] = d[i] * math.exp(lr * w[i, i] / d[i])
        for j in range(i):
            if abs(d[i] - d[j]) > 1e-6 * max(d[i], d[j]):
                x[i, j] = -lr / 2 * w[i, j] / (d[i] - d[j])
                x[j, i] = -x[i, j]
    eye = torch.eye(n, dtype=F64)
    return b @ (eye + x) @ torch.linalg.inv(eye - x), new


def test_iterations_are_the_papers() -> None:
    n, lr = 6, 0.03
    problem = nearness(spd(torch.linspace(1, 3, n, dtype=F64)))
    b, d = torch.linalg.qr(torch.randn(n, n, dtype=F64)).Q, torch.linspace(0.3, 1.2, n, dtype=F64)
    start = SpectralFactor(n, eigenvalues=d, basis=b, dtype=F64)
    before, gradient = start.state_dict() | {"basis": start.basis.clone()}, problem.gradient()
    for count in range(1, 9):
        b, d = plain_iteration(b, d, gradient((b * d) @ b.T), lr)
        found = minimize_spd(start, gradient=problem.gradient(), lr=lr, max_iterations=count)
        torch.testing.assert_close(found.factor.basis, b, rtol=0, atol=1e-12)
        torch.testing.assert_close(found.factor.eigenvalues, d, rtol=1e-12, atol=0)
        assert (found.iterations, found.loss, found.history, found.converged) == (count, None, (), False)
    assert torch.equal(start.basis, before["basis"]) and start.updates == 0  # a copy went on
    assert (found.matrix - start.matrix()).abs().max() > 0.1


def test_autograd_gives_the_gradient() -> None:
    problem = log_det(spd(torch.linspace(1, 3, 7, dtype=F64)))
    one, two = (minimize_spd(7, problem.loss, gradient=g, lr=0.1, max_iterations=20) for g in (None, problem.gradient()))
    torch.testing.assert_close(one.matrix, two.matrix, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        again = minimize_spd(7, problem.loss, lr=0.1, max_iterations=20)
    assert torch.equal(again.matrix, one.matrix) and not again.matrix.requires_grad and one.iterations == 20


def test_one_number() -> None:
    """`n = 1`: `s a − log s` is a number's."""
    found = minimize_spd(1, lambda s: 5 * s.sum() - s.log().sum())
    assert found.converged and found.matrix.shape == (1, 1) and found.matrix.item() == pytest.approx(0.2, rel=1e-7)
    fixed = minimize_spd(1, gradient=lambda s: 5 - 1 / s, lr=0.2, max_iterations=1)
    assert fixed.matrix.item() == pytest.approx(math.exp(-2 * 0.2 * 4), rel=1e-12)


@pytest.mark.parametrize("order", [None, 3, 8])
def test_every_iterate_is_positive_definite(order: int | None) -> None:
    """Whatever the gradients are: indefinite, and far too long."""
    seen: list[float] = []
    generator = torch.Generator().manual_seed(0)

    def gradient(s: Tensor) -> Tensor:
        seen.append((torch.linalg.eigvalsh(s)[0] / s.diagonal().mean()).item())
        inverse = torch.linalg.inv(torch.linalg.cholesky(s))  # as the gradient of log det is S⁻¹
        return inverse.T @ torch.randn(8, 8, dtype=F64, generator=generator) @ inverse

    start = SpectralFactor(8, dtype=F64, cayley_order=order)
    found = minimize_spd(start, gradient=gradient, lr=0.25, max_iterations=60)
    assert found.iterations == 60 and len(seen) == 61 and 0 < min(seen) < 0.1
    assert (found.factor.eigenvalues > 0).all() and (found.factor.eigenvalues.log().abs().max() > 1)
    b = found.factor.basis
    torch.testing.assert_close(b.T @ b, torch.eye(8, dtype=F64), rtol=0, atol=1e-12 if order is None else 1e-2)


def test_start_of_any_precision() -> None:
    problem = log_det(spd(torch.linspace(1, 3, 10, dtype=F64)))
    start = SpectralFactor(10, dtype=torch.float32)

    def loss(s: Tensor) -> Tensor:
        assert s.dtype == torch.float32
        return problem.loss(s.double())

    found = minimize_spd(start, loss, tolerance=1e-4)
    assert found.converged and found.matrix.dtype == torch.float32
    torch.testing.assert_close(found.matrix.double(), problem.solution, rtol=1e-3, atol=1e-4)


# --- where it ends ----------------------------------------------------------------------------------------------------


def test_stops() -> None:
    problem = log_det(spd(torch.linspace(1, 3, 5, dtype=F64)))
    found = minimize_spd(5, problem.loss, max_iterations=4)
    assert (found.iterations, found.converged) == (4, False) and found.loss is not None and found.loss > problem.minimum
    again = minimize_spd(found.factor, problem.loss)
    assert again.converged and again.history[0] == found.loss and again.iterations > 4

    s = again.matrix
    norm = (s @ (q := torch.linalg.inv(problem.solution) - torch.linalg.inv(s)) @ s * q).sum().clamp(min=0).sqrt()
    assert norm <= 2e-8  # Tr(SESE)
    done = minimize_spd(again.factor, problem.loss)
    assert (done.iterations, done.converged, done.loss) == (0, True, again.loss) and torch.equal(done.matrix, s)
    with pytest.raises(dataclasses.FrozenInstanceError):
        done.loss = 0.0  # type: ignore[misc]
    assert isinstance(done, SPDResult)

    flat = minimize_spd(3, lambda s: 0 * s.sum(), tolerance=0)
    assert (flat.iterations, flat.converged) == (0, True)
    wrong = minimize_spd(3, lambda s: s.sum(), gradient=lambda s: -torch.ones_like(s))  # uphill: no step is of use
    assert (wrong.iterations, wrong.converged) == (0, False)


def test_without_a_minimum() -> None:
    """`−log det S` and `log det S` lead out of the numbers: the last iterate within them is the result."""
    for sign in (1.0, -1.0):
        found = minimize_spd(2, lambda s, sign=sign: sign * torch.linalg.slogdet(s)[1], max_iterations=3000)
        assert not found.converged and found.factor.eigenvalues.isfinite().all() and (found.factor.eigenvalues > 0).all()
        assert found.iterations > 50 and abs(found.loss or 0.0) > 100


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((3,), {}, "`loss` or `gradient` is needed, got None"),
        ((3,), {"lr": 0.1}, "`loss` or `gradient` is needed, got None"),
        ((3,), {"gradient": torch.zeros_like}, "`loss` is needed by the line search of lr=None, got None"),
        ((0, torch.sum), {}, "`start` must be a SpectralFactor or a size of at least 1, got 0"),
        ((torch.eye(3), torch.sum), {}, "`start` must be a SpectralFactor or a size"),
        ((SpectralFactor(3, rotation="tracking"), torch.sum), {}, "`start` must be one matrix with rotation='riemannian', got"),
        ((SpectralFactor(3, batch=(2,)), torch.sum), {}, "`start` must be one matrix .*batch=\\(2,\\)"),
        ((3, torch.sum), {"lr": 0.0}, "`lr` must be positive, got 0.0"),
        ((3, torch.sum), {"tolerance": -1.0}, "`tolerance` must be at least 0, got -1.0"),
        ((3, torch.sum), {"max_iterations": 0}, "`max_iterations` must be an integer of at least 1, got 0"),
        ((3, lambda s: s.sum() * math.nan), {}, "`loss` must be finite at the start, got nan"),
        ((3,), {"gradient": lambda s: s / 0, "lr": 0.1}, "`gradient` must be finite at the start, got"),
        ((3,), {"gradient": lambda s: s[0], "lr": 0.1}, r"`gradient` must return a tensor of shape \(3, 3\), got shape \(3,\)"),
        ((3,), {"gradient": lambda s: 1.0, "lr": 0.1}, r"`gradient` must return a tensor of shape \(3, 3\), got float"),
        ((3, lambda s: s.detach().sum()), {}, "`loss` must depend on `S` by autograd, or `gradient` be given"),
        ((3, lambda s: 1.0), {}, "`loss` must depend on `S` by autograd, or `gradient` be given, got 1.0"),
        ((3,), {"gradient": lambda s: -((10.0 * s) ** 3), "lr": 10.0}, "`lr` must be smaller, got 10.0: iteration 0 left"),
    ],
)
def test_errors(arguments: tuple[Any, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        minimize_spd(*arguments, **options)
