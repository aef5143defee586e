"""KrADagrad and KrADagrad*: the paper's lemma, proposition and corollary, Algorithm 1 in float64, the root without a
decomposition, the regret, low precision."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from spectral_ops.optim import KrADagrad, KrADagradStar
from spectral_ops.optim.kradagrad import tracked_root, whole

PAPER: dict[str, Any] = {"update_scale": None, "momentum": 0.0}
METHODS = (KrADagrad, KrADagradStar)
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def problem(*shape: int, ratio: float = 2.0) -> tuple[Tensor, Callable[[Tensor, int], Tensor]]:
    """A start, and gradients that change with the weights and, as a mini-batch's do, with the step. The indices of every axis
    differ in scale by `ratio` from one to the next."""
    generator = torch.Generator().manual_seed(sum(shape))
    draw = lambda *size: torch.randn(*size, dtype=torch.float64, generator=generator)  # noqa: E731
    start, noise, pull = draw(*shape), draw(60, *shape), draw(*shape).square()
    for axis, size in enumerate(shape):
        scale = (ratio ** -torch.arange(size, dtype=torch.float64)).view(-1, *[1] * (len(shape) - 1 - axis))
        noise, pull = noise * scale, pull * scale
    return start, lambda w, t: pull * w + noise[t % 60]


def sequence(n: int, m: int, scale: float = 1.0, decades: float = 2.0, drift: float = 0.0) -> Callable[[], Tensor]:
    """Gradients whose rows have a spectrum that falls by so many decades, in a basis that may turn."""
    q, s = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q, scale * 10 ** -torch.linspace(0, decades, n).double()

    def draw() -> Tensor:
        nonlocal q
        if drift:
            q = torch.linalg.qr(q + drift / math.sqrt(n) * torch.randn(n, n, dtype=torch.float64)).Q
        return (q * s) @ torch.randn(n, m, dtype=torch.float64)

    return draw


def train(method: type, w: Tensor, gradient: Callable[[Tensor, int], Tensor], steps: int, **options: Any) -> Tensor:
    p = w.clone().requires_grad_()
    optimizer = method([p], **(PAPER | options))
    for t in range(steps):
        p.grad = gradient(p.detach(), t)
        optimizer.step()
    return p.detach()


def start(method: type, *shape: int, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Tensor, Any]:
    """A parameter that never moves, and its optimizer: what is tested is what becomes of its factors."""
    w = torch.nn.Parameter(torch.zeros(*shape, dtype=dtype))
    return w, method([w], lr=0.0, **(PAPER | options))


def factors(optimizer: Any, w: Tensor) -> list[Tensor]:
    state = optimizer.state[w]
    count = sum(name.startswith("root_") for name in state)
    return [whole(state, axis).double().clone() for axis in range(count)]


def eye(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64)


def power(x: Tensor, exponent: float) -> Tensor:
    d, v = torch.linalg.eigh(x)
    return (v * d.clamp(min=0) ** exponent) @ v.T


def smallest(x: Tensor) -> float:
    return float(torch.linalg.eigvalsh(0.5 * (x + x.T))[0])


def unfold(x: Tensor, axis: int) -> Tensor:
    return x.movedim(axis, 0).reshape(x.shape[axis], -1)


def fold(x: Tensor, matrices: list[Tensor], but: int | None = None) -> Tensor:
    """A tensor times a symmetric matrix along each axis but one."""
    for axis, f in enumerate(matrices):
        if axis != but:
            x = torch.tensordot(f, x, ([1], [axis])).movedim(0, axis)
    return x


def vec(x: Tensor) -> Tensor:
    """By columns, as in the paper."""
    return x.T.reshape(-1)


# --- Sec. 3: what the paper proves ------------------------------------------------------------------------------------


@pytest.mark.parametrize("m,n,r", [(4, 3, 1), (3, 4, 5), (5, 5, 2), (1, 6, 3), (6, 1, 3)])
@pytest.mark.parametrize("decades", [0, 4])
def test_lemma_3_1_the_kronecker_product_dominates(m, n, r, decades):
    for _ in range(10):
        c = power(torch.randn(n, n).double(), 0) * 10 ** -torch.linspace(0, decades, n).double()
        c = c @ c.T + 1e-6 * eye(n)
        us = torch.randn(r, m, n, dtype=torch.float64)
        b = sum(u @ torch.linalg.inv(c) @ u.T for u in us)
        u = torch.stack([vec(x) for x in us], 1)
        left = torch.kron(c, b)
        assert smallest(left - u @ u.T / n) >= -1e-10 * float(left.norm())


def test_lemma_3_1_has_no_larger_constant():
    """Equality: an orthogonal `U` under `C = I`."""
    n = 4
    u = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q
    left, right = torch.kron(eye(n), u @ u.T), torch.outer(vec(u), vec(u))
    assert abs(smallest(left - right / n)) < 1e-14
    assert smallest(left - 1.01 * right / n) < -0.009


CASES = {
    "matrix": ((4, 6), 1.0, {}),
    "tall": ((7, 3), 1.0, {}),
    "huge": ((5, 4), 1e6, {}),
    "tiny": ((5, 4), 1e-6, {}),
    "damped": ((4, 6), 0.3, {"damping": 0.1}),
    "batch": ((4, 6), 0.3, {"batch_size": 32}),
    "tensor": ((3, 4, 5), 1.0, {"per_axis": True}),
    "damped tensor": ((3, 4, 5), 100.0, {"per_axis": True, "damping": 0.01}),
}


def curvature(method: type, g: Tensor, axis: int, before: list[Tensor], options: dict[str, Any]) -> Tensor:
    """`H` of an axis."""
    outer = fold(g, before, but=axis) if method is KrADagrad else g
    h = options.get("batch_size", 1) * unfold(g, axis) @ unfold(outer, axis).T
    return h + options.get("damping", 0.0) * g.numel() / g.shape[axis] * eye(g.shape[axis])


def advances(method: type, shape: tuple[int, ...], scale: float, options: dict[str, Any], roots: str):
    """The gradient, the factors before it and after it, and which axes had their turn."""
    w, optimizer = start(method, *shape, roots=roots, **options)
    before = [eye(size) for size in shape]
    _, gradient = problem(*shape)
    for t in range(30):
        w.grad = scale * gradient(w.detach(), t)
        optimizer.step()
        after = factors(optimizer, w)
        yield w.grad, before, after, [axis for axis in range(len(shape)) if method is KrADagradStar or t % len(shape) == axis]
        before = after


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES)
def test_proposition_3_2_what_is_taken_away_is_less_than_what_is_there(method, case):
    """With the optimizer's own factors, for both norms; and the step is the one that it is about."""
    shape, scale, options = CASES[case]
    for g, before, after, turns in advances(method, shape, scale, options, "eigh"):
        for axis in turns:
            l, h = before[axis], curvature(method, g, axis, before, options)
            root, product = power(l, 0.5), l @ h
            frobenius, spectral = (1 + torch.linalg.matrix_norm(product, p) for p in ("fro", 2))
            assert spectral <= frobenius
            for t in (spectral, frobenius):
                m = root @ h @ root / t
                assert smallest(m) >= -1e-9 and smallest(eye(len(m)) - m) >= -1e-9
                assert smallest(eye(len(m)) - m) > 0 or scale > 1e3  # where it is under the rounding error
            want = root @ (eye(len(l)) - root @ h @ root / frobenius) @ root
            assert (after[axis] - want).norm() <= 1e-12 * l.norm()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("roots,slack", [("eigh", 1e-14), ("tracking", 2e-3)])
def test_corollary_3_3_factors_shrink_and_stay_positive(method, case, roots, slack):
    """`0 ≺ L_k ⪯ L_{k−1}`: up to rounding, or to how little a turn departs from orthogonality."""
    shape, scale, options = CASES[case]
    for _, before, after, turns in advances(method, shape, scale, options, roots):
        for axis, (old, new) in enumerate(zip(before, after, strict=True)):
            assert smallest(new) > 0
            assert smallest(old - new) >= -slack * float(old.norm())
            assert axis in turns or torch.equal(old, new)


@pytest.mark.parametrize("shape", [(3, 4), (5, 2)])
def test_the_inverse_factors_dominate_all_gradients(shape):
    """(7) to (13): `R⁻¹ ⊗ L⁻¹ ⪰ I + Σ g gᵀ / (k t)`, `k` columns of the side whose turn it was."""
    total = eye(math.prod(shape))
    for g, before, after, (axis,) in advances(KrADagrad, shape, 1.0, {}, "eigh"):
        t = 1 + (before[axis] @ curvature(KrADagrad, g, axis, before, {})).norm()
        total += torch.outer(vec(g), vec(g)) / (t * shape[1 - axis])
        left, right = (torch.linalg.inv(x) for x in after)
        assert smallest(torch.kron(right, left) - total) >= -1e-9 * float(total.norm())
    assert total.diagonal().max() > 2  # the gradients count


# --- Algorithm 1 ------------------------------------------------------------------------------------------------------


def algorithm(
    method: type, w: Tensor, gradient: Callable[[Tensor, int], Tensor], steps: int, lr: float, **options: Any
) -> Tensor:
    """Algorithm 1 for KrADagradStar, (9) to (13) for KrADagrad, which begins with the left side; as plain loops."""
    mu, damping, batch = options.get("momentum", 0.0), options.get("damping", 0.0), options.get("batch_size", 1)
    kept, velocity = [eye(size) for size in w.shape], torch.zeros_like(w)
    order = 2 if method is KrADagrad else 2 * w.ndim
    for t in range(steps):
        g = gradient(w, t)
        new = list(kept)
        for axis, l in enumerate(kept):
            if method is KrADagrad and t % w.ndim != axis:
                continue
            x = unfold(g, axis)
            y = unfold(fold(g, kept, but=axis), axis) if method is KrADagrad else x
            h = batch * x @ y.T + damping * x.shape[1] * eye(len(l))
            new[axis] = l - l @ h @ l / (1 + (h @ l).norm())
        kept = new
        u = fold(g, [power(l, 1 / order) for l in kept])
        velocity = mu * velocity + u
        w = w - lr * velocity
    return w


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "shape,options",
    [
        ((5, 8), {}),
        ((8, 5), {"momentum": 0.8}),
        ((6, 6), {"damping": 0.02}),
        ((4, 7), {"batch_size": 16, "damping": 0.01, "momentum": 0.9}),
        ((1, 4), {}),
        ((3, 4, 5), {"per_axis": True}),
        ((5, 3, 4), {"per_axis": True, "damping": 0.02, "momentum": 0.5}),
    ],
)
def test_50_steps_are_algorithm_1(method, shape, options):
    begin, gradient = problem(*shape)
    got = train(method, begin, gradient, 50, lr=0.05, roots="eigh", **options)
    loop = {k: v for k, v in options.items() if k != "per_axis"}
    want = algorithm(method, begin, gradient, 50, 0.05, **loop)
    assert (want - begin).norm() > 0.04 * begin.norm()
    assert (got - want).abs().max() <= 1e-10 * want.abs().max()


def test_kradagrad_takes_turns_and_begins_on_the_left():
    w, optimizer = start(KrADagrad, 3, 4)
    moved = []
    for _ in range(4):
        before = factors(optimizer, w) if optimizer.state else [eye(3), eye(4)]
        w.grad = torch.randn(3, 4, dtype=torch.float64)
        optimizer.step()
        moved += [[not torch.equal(x, y) for x, y in zip(before, factors(optimizer, w), strict=True)]]
    assert moved == [[True, False], [False, True]] * 2


@pytest.mark.parametrize("method", METHODS)
def test_tracking_is_near_algorithm_1(method):
    """Measured: 4 % of the way, most of it in the first steps, after which the basis has turned."""
    begin, gradient = problem(6, 8)
    want = algorithm(method, begin, gradient, 50, 0.05)
    got = train(method, begin, gradient, 50, lr=0.05)
    assert (got - want).norm() <= 0.08 * (want - begin).norm()


# --- the root without a decomposition ---------------------------------------------------------------------------------


def spectrum(n: int, decades: float = 4.0) -> tuple[Tensor, Tensor]:
    """An orthogonal matrix, and eigenvalues."""
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q, 10 ** -torch.linspace(0, decades, n, dtype=torch.float64)


@pytest.mark.parametrize("root", [2, 4, 6])
def test_a_tracked_root_in_the_eigenbasis_is_exact(root):
    q, d = spectrum(24)
    turned, kept, off, got = tracked_root(torch.diag(d), q, root)
    want = power((q * d) @ q.T, 1 / root)
    assert (got - want).norm() <= 1e-10 * want.norm()
    assert off.norm() < 1e-14 and (kept - d).norm() < 1e-14 and (turned - q).norm() < 1e-12


@pytest.mark.parametrize("root", [2, 4, 6])
def test_the_error_of_a_tracked_root_falls_with_the_square_of_the_rest(root):
    q, d = spectrum(24, 2.0)
    rest = torch.randn(24, 24, dtype=torch.float64)
    rest = (rest + rest.T).fill_diagonal_(0) * (d.sqrt() * d.sqrt().unsqueeze(-1))
    errors = []
    for size in (2e-3, 1e-3, 5e-4):
        t = torch.diag(d) + size * rest
        turned, kept, off, got = tracked_root(t, q, root)
        whole_before, whole_after = q @ t @ q.T, turned @ (off + torch.diag(kept)) @ turned.T
        assert (whole_after - whole_before).norm() <= 1e-9 * whole_before.norm()  # the turn changes the basis alone
        assert off.norm() < 0.5 * (size * rest).norm()
        want = power(whole_before, 1 / root)
        errors.append(float((got - want).norm() / want.norm()))
    assert errors[0] < 1e-4
    assert all(3.5 < coarse / fine < 4.5 for coarse, fine in itertools.pairwise(errors))


@pytest.mark.parametrize("root", [2, 3, 4, 6])
@pytest.mark.parametrize("rank", [1, 3, 24])
def test_a_tracked_root_is_positive_wherever_the_basis_stands(root, rank):
    """At least `1 − 1 / root` of the root of the diagonal, for any `T ⪰ 0`, however far from diagonal."""
    for decades in (0.0, 3.0, 8.0):
        x = torch.randn(24, rank, dtype=torch.float64) * spectrum(24, decades)[1].sqrt().unsqueeze(-1)
        t = x @ x.T + 1e-9 * torch.diag(spectrum(24, decades)[1])
        turned, d, _, got = tracked_root(t, eye(24), root)
        scale = d ** (-0.5 / root)
        inside = torch.linalg.solve(turned, torch.linalg.solve(turned, got).T)
        assert smallest(inside * scale * scale.unsqueeze(-1)) >= 1 - 1 / root - 1e-6
        assert smallest(got) > 0


def test_a_tracked_root_of_equal_eigenvalues_is_exact():
    q, _ = spectrum(24)
    d = torch.tensor([1.0] * 10 + [0.2] * 13 + [1e-5]).double()
    for basis in (q, eye(24)):
        a = (q * d) @ q.T
        for _ in range(40):
            basis, _, _, got = tracked_root(basis.T @ a @ basis, basis, 4)
        want = power(a, 1 / 4)
        assert (got - want).norm() <= 1e-10 * want.norm()


# Relative error of the root against that of Algorithm 1 in float64: in steps 1 to 10, to 100, and to 300. Measured: half of it.
BOUNDS = {torch.float64: (0.02, 0.012, 7e-4), torch.float32: (0.02, 0.012, 7e-4), torch.bfloat16: (0.02, 0.012, 0.025)}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n,m,drift", [(24, 40, 0.0), (40, 24, 0.0), (40, 24, 0.02)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_tracked_root_is_that_of_algorithm_1(method, n, m, drift, dtype):
    draw = sequence(n, m, scale=0.3, drift=drift)
    w, optimizer = start(method, n, m, preconditioner_dtype=dtype)
    exact, reference = start(method, n, m, roots="eigh")
    worst = [0.0, 0.0, 0.0]
    for t in range(300):
        w.grad = exact.grad = draw()
        optimizer.step()
        reference.step()
        for axis in range(2):
            want, got = reference.state[exact][f"root_{axis}"], optimizer.state[w][f"root_{axis}"].double()
            i = (t >= 10) + (t >= 100)
            worst[i] = max(worst[i], float((got - want).norm() / want.norm()))
            assert smallest(got) > 0
    assert all(x <= bound for x, bound in zip(worst, BOUNDS[dtype], strict=True)), worst


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("roots", ["tracking", "eigh"])
def test_a_multiple_of_the_identity_stays_one(method, roots):
    w, optimizer = start(method, 16, 16, roots=roots)
    for _ in range(5):
        w.grad = 3 * torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64)).Q
        optimizer.step()
    for axis, l in enumerate(factors(optimizer, w)):
        value = l.diagonal().mean()
        assert 0.01 < value < 0.9 and (l - value * eye(16)).norm() < 1e-12
        root = value ** (1 / (2 if method is KrADagrad else 4))
        assert (optimizer.state[w][f"root_{axis}"] - root * eye(16)).norm() < 1e-12


# --- low precision ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("roots", ["tracking", "eigh"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 1e3, 1e6, 1e15])
def test_factors_stay_bounded_whatever_the_gradients(method, roots, dtype, scale):
    """A factor that rounding made indefinite diverges under large gradients, since `L − L H L / t` doubles what is negative: as
    a rounded matrix `L` reaches −1e7 in 100 steps."""
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    w, optimizer = start(method, 12, 20, dtype=kind, roots=roots, preconditioner_dtype=dtype)
    u, v = torch.randn(12, dtype=kind), torch.randn(20, dtype=kind)
    draw = sequence(12, 20, decades=6)
    for t in range(150):
        w.grad = scale * (torch.outer(u, v) if t < 80 else draw().to(kind))
        optimizer.step()
        assert w.isfinite().all() and all(x.isfinite().all() for x in optimizer.state[w].values())
    largest = 1.1 if dtype == torch.bfloat16 else 1.02
    for axis, l in enumerate(factors(optimizer, w)):
        e = torch.linalg.eigvalsh(l)
        assert -1e-3 * float(e[-1]) <= e[0] and 0 < e[-1] <= largest
        root = torch.linalg.eigvalsh(optimizer.state[w][f"root_{axis}"].double())
        assert root[0] > 0 and root[-1] <= largest


@pytest.mark.parametrize("method", METHODS)
def test_float32_keeps_small_eigenvalues(method):
    """Of a condition near 1e6: whitened by the factor in float64, the one in float32 is near the identity."""
    strong = torch.linalg.qr(torch.randn(24, 3, dtype=torch.float64)).Q
    w, optimizer = start(method, 24, 40, preconditioner_dtype=torch.float32)
    exact, reference = start(method, 24, 40)
    for _ in range(200):
        w.grad = 1e3 * strong @ torch.randn(3, 40, dtype=torch.float64) + 0.1 * torch.randn(24, 40, dtype=torch.float64)
        exact.grad = w.grad.clone()
        optimizer.step()
        reference.step()
    got, want = (factors(o, p)[0] for o, p in ((optimizer, w), (reference, exact)))
    e = torch.linalg.eigvalsh(want)
    white = power(want, -0.5)
    assert e[-1] / e[0] > 5e5
    assert torch.linalg.matrix_norm(white @ got @ white - eye(24), 2) < 0.2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("roots", ["tracking", "eigh"])
@pytest.mark.parametrize("limit", [8192, 20, 1])
@pytest.mark.filterwarnings("ignore:.*keeps a diagonal factor")
def test_squares_that_are_no_numbers_do_not_matter(method, roots, limit):
    """Of eigenvalues near 1e-24, under gradients near 1e12, in float32."""
    results = []
    for dtype in (torch.float64, torch.float32):
        torch.manual_seed(0)
        w, optimizer = start(method, 16, 40, dtype=dtype, max_preconditioner_dim=limit, roots=roots)
        for t in range(20):
            w.grad = (1.0 if t < 10 else 1e12) * torch.randn(16, 40, dtype=torch.float64).to(dtype)
            optimizer.step()
            if t == 9:
                for name, x in optimizer.state[w].items():
                    if name.startswith(("factor", "eigenvalues", "residual")):
                        x *= 1e-24
        results.append([x.double() for name, x in sorted(optimizer.state[w].items()) if name.startswith("root")])
    for want, got in zip(*results, strict=True):
        assert 0 < want.norm() < 1e-4
        assert (got - want).norm() <= 1e-3 * want.norm()


@pytest.mark.parametrize("method", METHODS)
def test_one_huge_gradient_does_not_stop_a_single_number(method):
    """`1 − x` of what remains of a factor rounds to 0."""
    w, optimizer = start(method, 1, 1, dtype=torch.float32)
    for _ in range(6):
        w.grad = torch.full((1, 1), 1e8)
        optimizer.step()
    w.grad = torch.ones(1, 1)
    optimizer.step()
    assert all(1e-20 < x < 1e-4 for x in factors(optimizer, w))
    assert all(optimizer.state[w][f"root_{axis}"] > 0 for axis in range(2))


# --- Theorem 3.6 ------------------------------------------------------------------------------------------------------


def regret(kind: str, seed: int, lr: float, counts: tuple[int, ...]) -> Tensor:
    """After so many steps, over the square root of their number; losses on a matrix with the Lipschitz constant 1."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, dtype=torch.float64, generator=generator)  # noqa: E731
    truth, scale = draw(5, 4), 2.0 ** -torch.arange(5).unsqueeze(-1)
    truth = truth / truth.norm()
    w = torch.nn.Parameter(torch.zeros_like(truth))
    optimizer = KrADagradStar([w], lr=lr, **PAPER)
    found, total, sum_of_gradients = [], 0.0, torch.zeros_like(truth)
    for t in range(counts[-1]):
        x = draw(5, 4) * scale
        x = x / x.norm()
        here = (x * w.detach()).sum()
        if kind == "linear":  # against the best matrix of the unit ball, in hindsight
            w.grad, loss, best = x, here, 0.0
            sum_of_gradients += x
        else:  # regression by absolute errors, against what the targets are made of
            y = (x * truth).sum() + 0.3 * draw(())
            w.grad, loss, best = (here - y).sign() * x, (here - y).abs(), ((x * truth).sum() - y).abs()
        total += float(loss - best)
        if lr:
            optimizer.step()
        if t + 1 in counts:
            found.append((total + float(sum_of_gradients.norm())) / math.sqrt(t + 1))
    return torch.tensor(found)


@pytest.mark.parametrize("kind", ["linear", "absolute"])
def test_theorem_3_6_regret_grows_with_the_square_root_of_the_steps(kind):
    counts = (100, 400, 1600)
    ratios = sum(regret(kind, seed, 0.2, counts) for seed in range(2)) / 2
    assert 0.1 < ratios[0] < 2 and ratios.max() < 1.75 * ratios[0], ratios
    if kind == "absolute":  # without any steps it is linear
        still = regret(kind, 0, 0.0, counts)
        assert still[2] > 3 * still[0] and still[2] > 5 * ratios[2]


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("update_scale", [None, "rms"])
@pytest.mark.filterwarnings("ignore:.*keeps a diagonal factor")
def test_diagonal_sides_are_dense_ones_where_gradients_keep_factors_diagonal(method, update_scale):
    """Gradients with one number in each row and column."""
    options = {"lr": 0.1, "update_scale": update_scale, "momentum": 0.0, "damping": 0.01}
    results = []
    for limit, dims in ((8192, [2, 2]), (6, [2, 1]), (5, [1, 1])):
        w = torch.nn.Parameter(torch.zeros(6, 8, dtype=torch.float64))
        optimizer = method([w], max_preconditioner_dim=limit, roots="eigh", **options)
        generator = torch.Generator().manual_seed(0)
        for _ in range(20):
            w.grad = torch.zeros_like(w)
            w.grad[range(6), torch.arange(6)] = torch.randn(6, dtype=torch.float64, generator=generator) * 10.0 ** torch.arange(
                6
            )
            optimizer.step()
        assert [optimizer.state[w][f"root_{axis}"].ndim for axis in range(2)] == dims
        results.append((w.detach().clone(), [x if x.ndim == 2 else x.diag() for x in factors(optimizer, w)]))
    for w, sides in results[1:]:
        torch.testing.assert_close(w, results[0][0], rtol=1e-9, atol=1e-12)
        for side, dense in zip(sides, results[0][1], strict=True):
            torch.testing.assert_close(side, dense, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "options,message",
    [
        ({"roots": "svd"}, "`roots` must be one of tracking, eigh, got 'svd'"),
        ({"roots": None}, "`roots`"),
        ({"damping": -0.1}, "`damping`"),
        ({"momentum": 1.0}, "`momentum`"),
        ({"update_scale": "graft"}, "`update_scale`"),
        ({"max_preconditioner_dim": 0}, "`max_preconditioner_dim`"),
        ({"preconditioner_dtype": torch.float16}, "`preconditioner_dtype`"),
        ({"batch_size": 0}, "`batch_size`"),
        ({"update_interval": 0}, "`update_interval`"),
    ],
)
def test_options_out_of_range_are_refused(method, options, message):
    with pytest.raises((ValueError, TypeError)) as error:
        method([torch.nn.Parameter(torch.zeros(3, 4))], **options)
    assert message in str(error.value)


@pytest.mark.parametrize("method", METHODS)
def test_groups_may_differ_in_their_roots(method):
    a, b = (torch.nn.Parameter(torch.zeros(5, 4, dtype=torch.float64)) for _ in range(2))
    optimizer = method([{"params": [a]}, {"params": [b], "roots": "eigh"}], lr=0.1, **PAPER)
    for _ in range(30):
        a.grad = torch.randn(5, 4, dtype=torch.float64)
        b.grad = a.grad.clone()
        optimizer.step()
    assert "basis_0" in optimizer.state[a] and "basis_0" not in optimizer.state[b]
    assert 0 < (a - b).detach().norm() < 0.05 * b.detach().norm()
    state = optimizer.state_dict()
    other = method([{"params": [a]}, {"params": [b], "roots": "eigh"}], lr=0.1, **PAPER)
    other.load_state_dict(state)
    assert all(torch.equal(x, optimizer.state[a][name]) for name, x in other.state[a].items())
