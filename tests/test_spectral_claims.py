"""The claims of the spectral paper, one by one, in float64.

Lin et al., 2025, "Spectral-factorized Positive-definite Curvature Learning for NN Training". Its appendix numbers them
otherwise ("Claim 5" in App. I is Claim 4, "Claim 6" in App. J is Claim 5); the numbers here are those of the text.
"""

import itertools
import math

import pytest
import torch
from torch import Tensor

from spectral_ops import KroneckerFactor, SpectralFactor, cayley, riemannian
from spectral_ops.reference import rotate, skew_from_lower

F64 = {"dtype": torch.float64}


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def eye(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64)


def orthogonal(n: int) -> Tensor:
    return torch.linalg.qr(draw(n, n)).Q


def symmetric(n: int) -> Tensor:
    x = draw(n, n)
    return x + x.T


def spd(n: int) -> Tensor:
    x = draw(n, 2 * n)
    return x @ x.T / (2 * n)


def spread(n: int) -> Tensor:
    """Distinct eigenvalues, not in order."""
    return torch.linspace(0.5, 3.0, n, dtype=torch.float64)[torch.randperm(n)]


def assert_halves_to_a_quarter(errors: list[float]) -> None:
    """An error of second order in what halves from one entry to the next."""
    for larger, smaller in itertools.pairwise(errors):
        assert 3.8 < larger / smaller < 4.2, errors


RATES = (8e-3, 4e-3, 2e-3, 1e-3)


# --- Claim 1 ----------------------------------------------------------------------------------------------------------


def test_claim_1_descent_is_invariant_under_linear_reparametrization():
    """Riemannian gradient descent of a Gaussian's precision in `τ` and in `λ`, `τ = U λ`, where `λ` has more entries than it
    needs, so that its metric `Uᵀ F U` is singular. Plain gradient descent is not invariant."""
    n, p = 3, 9
    q, u, over = spd(n), draw(n * (n + 1) // 2, p), torch.tril_indices(n, n)

    def loss(tau: Tensor) -> Tensor:  # of Tr(S Q) − log det S
        s = torch.zeros(n, n, **F64).index_put((over[0], over[1]), tau)
        s = s + s.tril(-1).T
        return (s * q).sum() - torch.logdet(s)

    metric = torch.func.hessian(lambda tau: -torch.logdet(_symmetric_of(tau, over, n)))  # half of it is Fisher and Rao's
    tau = eye(n)[over[0], over[1]]
    lam = torch.linalg.lstsq(u, tau.unsqueeze(-1)).solution.squeeze(-1)
    plain_tau, plain_lam = tau, lam
    for _ in range(8):
        tau = tau - 0.2 * torch.linalg.solve(metric(tau), torch.func.grad(loss)(tau))
        inside = u @ lam
        gradient, f = u.T @ torch.func.grad(loss)(inside), u.T @ metric(inside) @ u
        assert torch.linalg.matrix_rank(f) == len(tau) < p
        lam = lam - 0.2 * torch.linalg.pinv(f, hermitian=True, rtol=1e-10) @ gradient
        plain_tau = plain_tau - 0.01 * torch.func.grad(loss)(plain_tau)
        plain_lam = plain_lam - 0.01 * u.T @ torch.func.grad(loss)(u @ plain_lam)
    moved = (tau - eye(n)[over[0], over[1]]).norm()
    assert (tau - u @ lam).norm() < 1e-8 * moved
    assert (plain_tau - u @ plain_lam).norm() > 0.01 * moved


def _symmetric_of(tau: Tensor, places: Tensor, n: int) -> Tensor:
    s = torch.zeros(n, n, **F64).index_put((places[0], places[1]), tau)
    return s + s.tril(-1).T


# --- Claim 2 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0, 1])
@pytest.mark.parametrize("order", [None, 8, 3])
@pytest.mark.parametrize("exact,kind", [(True, "indefinite"), (True, "rank 1"), (False, "rank 1"), (False, "spd")])
def test_claim_2_one_step_is_the_default_scheme_up_to_second_order(gamma, order, exact, kind):
    """`S ← (1 − γβ₂) S + β₂ H`, as a slope: the error of one step falls by 4 when β₂ halves."""
    n = 6
    d, b, g = spread(n), orthogonal(n), draw(n, 1)
    h = {"indefinite": symmetric(n), "rank 1": g @ g.T, "spd": spd(n)}[kind]
    errors = []
    for beta2 in RATES:
        factor = SpectralFactor(n, eigenvalues=d, basis=b, cayley_order=order, **F64)
        s = factor.matrix()
        factor.update(h, beta2=beta2, gamma=gamma, exact=exact)
        errors.append((factor.matrix() - ((1 - gamma * beta2) * s + beta2 * h)).norm().item())
    assert_halves_to_a_quarter(errors)
    assert errors[0] < 0.5 * RATES[0] * h.norm()


@pytest.mark.parametrize("exact", [True, False])
def test_claim_2_holds_for_a_sequence_of_gradients(exact):
    """As many steps from the same start, whatever β₂: the iterates part by O(β₂²)."""
    n, steps = 5, 6
    d, b, g = spread(n), orthogonal(n), draw(steps, n)
    errors = []
    for beta2 in RATES[1:]:
        factor = SpectralFactor(n, eigenvalues=d, basis=b, **F64)
        s = factor.matrix()
        for x in g:
            factor.update(x=x, beta2=beta2, exact=exact)
            s = (1 - beta2) * s + beta2 * torch.outer(x, x)
        errors.append((factor.matrix() - s).norm().item())
    assert_halves_to_a_quarter(errors)


def test_claim_2_needs_distinct_eigenvalues():
    """Where two are equal the update leaves out what would mix them: an error of first order."""
    n, errors = 4, []
    b, h = orthogonal(n), symmetric(n)
    for beta2 in RATES:
        factor = SpectralFactor(n, eigenvalues=torch.tensor([1.0, 1.0, 2.0, 3.0]), basis=b, **F64)
        s = factor.matrix()
        factor.update(h, beta2=beta2, exact=True)
        errors.append((factor.matrix() - ((1 - beta2) * s + beta2 * h)).norm().item())
    assert all(1.9 < x / y < 2.1 for x, y in itertools.pairwise(errors))


# --- Claim 3 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order,bound", [(None, 1e-12), (8, 1e-2)])
def test_claim_3_the_map_keeps_the_constraints(order, bound):
    """`B` stays orthogonal and `d` positive, whatever the tangent: here of any size and sign. The truncated map is orthogonal
    to `‖X‖⁸`, which its limit keeps under 1e-2."""
    n = 7
    factor = SpectralFactor(n, eigenvalues=spread(n), basis=orthogonal(n), cayley_order=order, **F64)
    for size in (0.01, 1.0, 100.0):
        factor.update(size * symmetric(n), beta2=0.1 / size**0.5, gamma=0, exact=True)
        assert (factor.basis.T @ factor.basis - eye(n)).norm() < bound
        assert (factor.eigenvalues > 0).all()


def test_the_exact_map_stays_positive_for_indefinite_curvature():
    """Where the default scheme leaves the SPD matrices, and the truncated map says that it would."""
    n = 6
    for _ in range(20):
        factor = SpectralFactor(n, eigenvalues=spread(n), basis=orthogonal(n), **F64)
        s, h = factor.matrix(), symmetric(n) - 4 * eye(n)
        assert torch.linalg.eigvalsh(0.75 * s + 0.25 * h)[0] < 0
        factor.update(h, beta2=0.25, exact=True)
        assert (factor.eigenvalues > 0).all() and torch.linalg.cholesky_ex(factor.matrix()).info == 0
        assert factor.logdet() < torch.logdet(s)  # and it went there
    before = {name: x.clone() for name, x in factor.state_dict().items()}
    with pytest.raises(ValueError, match="the truncated map needs curvature ⪰ 0"):
        factor.update(-1e6 * eye(n), beta2=0.2)
    assert all(torch.equal(x, before[name]) for name, x in factor.state_dict().items())


# --- Claim 4 ----------------------------------------------------------------------------------------------------------


def kl(s_old: Tensor, s_new: Tensor, mean: Tensor) -> Tensor:
    """Of two Gaussians by their precisions and the difference of their means: its Hessian, where they are one, is Fisher and
    Rao's metric."""
    n = len(s_old)
    trace = torch.linalg.solve(s_old, s_new).trace()
    return 0.5 * (trace - torch.logdet(s_new) + torch.logdet(s_old) - n + mean @ s_new @ mean)


def turned(b: Tensor, values: Tensor) -> Tensor:
    """`B Cayley(Skew(Tril(M)))`, of the entries of `vecTril(M)`."""
    n = len(b)
    rows, columns = torch.tril_indices(n, n, -1)
    x = skew_from_lower(torch.zeros(n, n, **F64).index_put((rows, columns), values))
    return b @ (eye(n) + x) @ torch.linalg.inv(eye(n) - x)


def ratios(d: Tensor) -> Tensor:
    """`vecTril(C)`, `C_ij = 4 (d_i/d_j + d_j/d_i − 2)`, (17)."""
    rows, columns = torch.tril_indices(len(d), len(d), -1)
    return 4 * (d[rows] / d[columns] + d[columns] / d[rows] - 2)


@pytest.mark.parametrize("repeated", [False, True])
def test_claim_4_the_metric_is_diagonal_in_closed_form(repeated):
    """(17) against automatic differentiation; with a repeated eigenvalue it is singular, as the paper says."""
    n = 4
    d, b = spread(n), orthogonal(n)
    if repeated:
        d[1] = d[0]
    s, pairs = b @ d.diag() @ b.T, n * (n - 1) // 2

    def divergence(eta: Tensor) -> Tensor:
        m, tril, delta = eta.split([n, pairs, n])
        basis, eigenvalues = turned(b, tril), d * torch.exp(m)
        return kl(s, basis @ eigenvalues.diag() @ basis.T, b @ (delta / d.sqrt()))

    metric = torch.func.hessian(divergence)(torch.zeros(2 * n + pairs, **F64))
    want = torch.cat([torch.full((n,), 0.5, **F64), ratios(d), torch.ones(n, **F64)])
    torch.testing.assert_close(metric, want.diag(), rtol=1e-9, atol=1e-9)
    assert ((want == 0).sum() == 1) == repeated


# --- Claim 5 ----------------------------------------------------------------------------------------------------------


def test_claim_5_the_factorization_is_unique():
    """Whatever scales the two sides came with, one state; and it can be read off `S`."""
    n, m, c = 3, 4, 7.0
    d_c, d_k, bases = spread(n), spread(m), (orthogonal(n), orthogonal(m))
    one = KroneckerFactor(n, m, scale=2.0, eigenvalues=(d_c, d_k), bases=bases, **F64)
    two = KroneckerFactor(n, m, scale=2.0 / c, eigenvalues=(d_c * c**3, d_k / c**2), bases=bases, **F64)
    torch.testing.assert_close(one.matrix(), two.matrix(), rtol=1e-12, atol=0)
    for name, x in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], x, rtol=1e-12, atol=1e-14)
    s = one.matrix()
    alpha = torch.exp(torch.logdet(s) / (n * m))
    side = torch.einsum("ijkj->ik", s.view(n, m, n, m))
    side = side / torch.exp(torch.logdet(side) / n)
    torch.testing.assert_close(one.scale, alpha, rtol=1e-12, atol=0)
    torch.testing.assert_close(bases[0] @ one.eigenvalues_c.diag() @ bases[0].T, side, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("order", [None, 4])
def test_the_determinant_constraint_is_kept(exact, order):
    factor = KroneckerFactor(5, 7, cayley_order=order, **F64)
    for _ in range(500):
        factor.update(draw(5, 7) * torch.logspace(-1, 1, 7), 0.02, exact=exact)
    assert factor.eigenvalues_c.std() > 0.01 and factor.eigenvalues_k.std() > 0.1
    for d in (factor.eigenvalues_c, factor.eigenvalues_k):
        assert abs(d.prod() - 1) < 1e-12
    torch.testing.assert_close(factor.logdet(), 35 * factor.scale.log(), rtol=1e-12, atol=1e-10)


# --- Claim 6 ----------------------------------------------------------------------------------------------------------


def test_claim_6_the_kronecker_metric_is_block_diagonal_in_closed_form():
    """(20) against automatic differentiation. Three entries are misprinted in App. K: `F_αα` is `nm/2`, not `1/2`; the blocks
    of a side carry the size `k` of the other one; and the inverse of `F_mm` is `2/k (I − 11ᵀ/l)`, with a minus. The box of
    Fig. 1 has all three right: `α ← α exp(β₂ (…)/(nm))` and steps of `β₂ / (α k)`."""
    n, m, alpha = 3, 4, 1.7
    sizes, k = (n, m), (m, n)
    d = [x / x.log().mean().exp() for x in (spread(n), spread(m))]
    b = [orthogonal(n), orthogonal(m)]
    pairs = [x * (x - 1) // 2 for x in sizes]

    def precision(scale: Tensor, eigenvalues: list[Tensor], bases: list[Tensor]) -> Tensor:
        sides = [basis @ x.diag() @ basis.T for basis, x in zip(bases, eigenvalues, strict=True)]
        return scale * torch.kron(*sides)

    s = precision(torch.tensor(alpha, **F64), d, b)
    root = torch.kron(*b) / (alpha * torch.kron(*d)).sqrt()

    def divergence(eta: Tensor) -> Tensor:
        scale, m_c, tril_c, m_k, tril_k, delta = eta.split([1, n - 1, pairs[0], m - 1, pairs[1], n * m])
        free = [torch.cat([x, -x.sum(0, keepdim=True)]) for x in (m_c, m_k)]
        eigenvalues = [x * torch.exp(change) for x, change in zip(d, free, strict=True)]
        bases = [turned(basis, x) for basis, x in zip(b, (tril_c, tril_k), strict=True)]
        return kl(s, precision(alpha * torch.exp(scale), eigenvalues, bases), root @ delta)

    metric = torch.func.hessian(divergence)(torch.zeros(1 + n - 1 + pairs[0] + m - 1 + pairs[1] + n * m, **F64))
    blocks = [torch.full((1, 1), n * m / 2, **F64)]
    for size, other, x in zip(sizes, k, d, strict=True):
        f_mm = other / 2 * (eye(size - 1) + 1)
        torch.testing.assert_close(torch.linalg.inv(f_mm), 2 / other * (eye(size - 1) - 1 / size))
        blocks += [f_mm, other * ratios(x).diag()]
    torch.testing.assert_close(metric, torch.block_diag(*blocks, eye(n * m)), rtol=1e-9, atol=1e-9)


# --- Claims 7 and 8 ---------------------------------------------------------------------------------------------------


def worn(n: int, m: int) -> KroneckerFactor:
    """With a state that is not the start's."""
    options = {"scale": 0.3, "eigenvalues": (spread(n), spread(m)), "bases": (orthogonal(n), orthogonal(m))}
    return KroneckerFactor(n, m, **options, **F64)


def curvature(factor: KroneckerFactor, g: Tensor) -> tuple[riemannian.Curvature, riemannian.Curvature]:
    bases, d = (factor.basis_c, factor.basis_k), (factor.eigenvalues_c, factor.eigenvalues_k)
    return riemannian.kron_curvature(rotate(g, *bases), bases, d)


def test_claim_7_both_sides_have_the_same_mean():
    """`mean(d_l⁻¹ ⊙ diag W_l) / (α k_l) = Tr(S_C⁻¹ G S_K⁻¹ Gᵀ) / (mnα)`."""
    n, m = 4, 6
    factor, g = worn(n, m), draw(n, m)
    w_c, w_k = curvature(factor, g)
    left = (w_c.diagonal / factor.eigenvalues_c).mean() / (factor.scale * m)
    right = (w_k.diagonal / factor.eigenvalues_k).mean() / (factor.scale * n)
    s_c = factor.basis_c @ factor.eigenvalues_c.diag() @ factor.basis_c.T
    s_k = factor.basis_k @ factor.eigenvalues_k.diag() @ factor.basis_k.T
    trace = (torch.linalg.inv(s_c) @ g @ torch.linalg.inv(s_k) @ g.T).trace() / (m * n * factor.scale)
    torch.testing.assert_close(torch.stack([left, right]), trace.expand(2), rtol=1e-12, atol=0)
    assert trace > 0.01


@pytest.mark.parametrize("gamma", [0, 1])
def test_claim_8_scale_and_eigenvalues_merge(gamma):
    """`α d_l ← α d_l ⊙ exp(β₂ m_l)` with the exact map, and `α² d_C ⊗ d_K ← (α n_C) ⊗ (α n_K)` with the truncated one, which
    is that up to second order."""
    n, m = 4, 5
    start, g, errors = worn(n, m), draw(n, m), []
    sides = curvature(start, g)
    old, k = (start.eigenvalues_c, start.eigenvalues_k), (m, n)
    for beta2 in RATES:
        exact, truncated = worn(n, m), worn(n, m)
        for factor, is_exact in ((exact, True), (truncated, False)):
            factor.load_state_dict(start.state_dict())
            factor.update(g, beta2, gamma=gamma, exact=is_exact)
        power = [w.diagonal / (start.scale * size) for w, size in zip(sides, k, strict=True)]
        for d, new, p in zip(old, (exact.eigenvalues_c, exact.eigenvalues_k), power, strict=True):
            torch.testing.assert_close(exact.scale * new, start.scale * d * torch.exp(beta2 * (p / d - gamma)))
        n_c, n_k = ((1 - gamma * beta2) * d + beta2 * p for d, p in zip(old, power, strict=True))
        merged = truncated.scale**2 * torch.kron(truncated.eigenvalues_c, truncated.eigenvalues_k)
        torch.testing.assert_close(merged, start.scale**2 * torch.kron(n_c, n_k))
        errors.append((exact.scale * exact.eigenvalues_c - start.scale * n_c).norm().item())
    assert_halves_to_a_quarter(errors)


# --- Claim 9 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_claim_9_the_cayley_map_is_defined_orthogonal_and_injective(size):
    n = 6
    x = size * skew_from_lower(draw(n, n))
    q = cayley(x)
    assert torch.linalg.svdvals(eye(n) - x).min() >= 1 - 1e-9
    torch.testing.assert_close(q.T @ q, eye(n), rtol=0, atol=1e-11)
    torch.testing.assert_close(torch.linalg.det(q), torch.tensor(1.0, **F64))
    back = torch.linalg.solve(q + eye(n), q - eye(n))
    torch.testing.assert_close(back, x, rtol=1e-6, atol=1e-9 * size)
    assert math.isfinite(back.norm())
