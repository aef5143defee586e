"""Every public op against its formula in float64, element by element, and its behaviour as a torch op."""

import itertools
import math

import pytest
import torch
from torch import Tensor

import spectral_ops as ops
from spectral_ops import reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 1), (1, 5), (5, 1), (7, 13), (16, 8), (33, 33))
BATCHES = ((), (3,), (2, 1, 3))
CASES = list(itertools.product(SHAPES, BATCHES))
# The others have tests of their own.
IN_PLACE = ("diagonal_update", "inverse_free_update", "kron_track", "momentum_sum", "momentum_update", "parameter_update")
FUNCTIONAL = [name for name in ops.__all__ if name not in IN_PLACE and not isinstance(getattr(ops, name), type)]


def skew(*shape: int, norm: float = 0.5, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(*shape, shape[-1], dtype=torch.float64).tril(-1)
    x = x - x.mT
    return (x * (norm / torch.linalg.matrix_norm(x, 2).clamp(min=1e-30))[..., None, None]).to(dtype)


def orthogonal(*shape: int) -> Tensor:
    return torch.linalg.qr(torch.randn(*shape, shape[-1], dtype=torch.float64))[0]


def positive(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64) + 0.5


def assert_close(got: Tensor, want: Tensor, tol: float = 1e-12) -> None:
    assert got.shape == want.shape
    torch.testing.assert_close(got.double(), want.double(), rtol=tol, atol=tol)


def assert_as_accurate(got: Tensor, composition: Tensor, exact: Tensor) -> None:
    """At most twice the error of the same formula written in plain PyTorch in the same dtype."""
    scale = exact.abs().max() * torch.finfo(got.dtype).eps if exact.numel() else 0
    assert (got.double() - exact).norm() <= 2 * (composition.double() - exact).norm() + scale


# --- gram -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape,batch", CASES)
def test_gram_formula(shape, batch):
    x, s = torch.randn(*batch, *shape, dtype=torch.float64), positive(*batch, shape[1])
    c = torch.randn(*batch, shape[0], shape[0], dtype=torch.float64)
    c = c + c.mT
    want = 0.7 * x @ torch.diag_embed(s) @ x.mT - 0.3 * c
    got = ops.gram(x, s, alpha=0.7, beta=-0.3, c=c)
    assert_close(got, want)
    assert torch.equal(got, got.mT)
    assert_close(ops.gram(x), x @ x.mT)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gram_is_exact_on_integers(dtype):
    x, s = torch.randint(-3, 4, (2, 9, 11)).to(dtype), torch.randint(1, 3, (2, 11)).to(dtype)
    want = (x.double() * s.double().unsqueeze(-2)) @ x.double().mT
    assert torch.equal(ops.gram(x, s), want.to(dtype))
    transposed = x.mT.contiguous().mT
    assert torch.equal(ops.gram(transposed, s), want.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_gram_is_as_accurate_as_the_composition(dtype):
    x = torch.randn(3, 20, 30, dtype=torch.float64).to(dtype)
    assert_as_accurate(ops.gram(x), x @ x.mT, x.double() @ x.double().mT)


# --- skew -------------------------------------------------------------------------------------------------------------


def skew_by_loops(w: Tensor, d: Tensor, tol: float) -> Tensor:
    n = len(d)
    u = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        for j in range(i):
            if abs(d[i] - d[j]) > tol * max(d[i], d[j]):
                u[i, j] = -w[i, j] / (d[i] - d[j])
    return u - u.T


@pytest.mark.parametrize("n", [1, 2, 5, 17])
def test_skew_generator_formula(n):
    w = torch.randn(n, n, dtype=torch.float64)
    w, d = w + w.T, positive(n)
    if n > 3:
        d[1], d[3] = d[0], d[2] * (1 + 1e-9)  # equal, and nearer than tol
    got = ops.skew_generator(w, d)
    assert_close(got, skew_by_loops(w, d, 1e-6))
    assert torch.equal(got, -got.mT)
    if n > 3:
        assert got[1, 0] == 0 and got[3, 2] == 0
        assert ops.skew_generator(w, d, tol=0.0)[3, 2] != 0


def test_skew_generator_reads_only_the_lower_triangle():
    w, d = torch.randn(6, 6), torch.rand(6)
    assert torch.equal(ops.skew_generator(w, d), ops.skew_generator(w.tril(), d))


@pytest.mark.parametrize("shape,batch", CASES)
def test_gram_skew_is_gram_then_skew(shape, batch):
    x, s, d = torch.randn(*batch, *shape, dtype=torch.float64), positive(*batch, shape[1]), positive(*batch, shape[0])
    w = ops.gram(x, s)
    got, diag_w, sq_norm = ops.gram_skew(x, d, s)
    assert_close(got, ops.skew_generator(w, d), 1e-9)
    assert_close(diag_w, w.diagonal(dim1=-2, dim2=-1))
    assert_close(sq_norm, got.square().sum((-2, -1)))
    assert torch.equal(got, -got.mT)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_gram_skew_divides_before_it_rounds(dtype):
    x, d = torch.randn(3, 12, 20).to(dtype), torch.rand(3, 12) + 0.5
    exact = ops.gram_skew(x.double(), d.double())[0]
    got, diag_w, sq_norm = ops.gram_skew(x, d)
    assert got.dtype == dtype and diag_w.dtype == sq_norm.dtype == torch.float32
    composition = ops.skew_generator((x @ x.mT), d)
    assert_as_accurate(got, composition, exact)
    assert torch.equal(got, -got.mT)


# --- tracking ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape,batch", CASES)
@pytest.mark.parametrize("carry", [True, False])
def test_gram_track_formula(shape, batch, carry):
    (n, k), epsilon = shape, 0.1
    x, s, d = torch.randn(*batch, n, k, dtype=torch.float64), positive(*batch, k), positive(*batch, n)
    beta, damping = 0.2 * positive(*batch), 0.1 * positive(*batch)
    r = torch.randn(*batch, n, n, dtype=torch.float64).tril(-1)
    r = 0.1 * (r + r.mT) if carry else None
    generator, new_d, new_r, log_mean = ops.gram_track(x, d, s, beta, residual=r, damping=damping, epsilon=epsilon)

    b = beta[..., None, None]
    old = torch.diag_embed(d) + (r if carry else 0)
    t = (1 - b) * old + b * (x @ torch.diag_embed(s) @ x.mT + damping[..., None, None] * torch.eye(n))
    mean = t.diagonal(dim1=-2, dim2=-1).log().mean(-1)
    t = t / mean.exp()[..., None, None]
    nn = t.diagonal(dim1=-2, dim2=-1)
    gap, total = nn.unsqueeze(-1) - nn.unsqueeze(-2), nn.unsqueeze(-1) + nn.unsqueeze(-2)
    want = (-0.5 * t * gap / (gap**2 + epsilon**2 * total**2)).tril(-1)
    assert_close(generator, want - want.mT)
    assert torch.equal(generator, -generator.mT)
    assert_close(new_d, nn)
    assert_close(log_mean, mean)
    assert_close(new_d.log().sum(-1), torch.zeros(batch, dtype=torch.float64), 1e-10)
    if carry:
        assert_close(new_r, t - torch.diag_embed(nn))
    else:
        assert new_r is None


def test_gram_track_is_the_papers_generator_for_separated_eigenvalues():
    d = torch.tensor([1.0, 3.0, 9.0, 27.0], dtype=torch.float64)
    x, beta = torch.randn(4, 6, dtype=torch.float64), 1e-6
    generator = ops.gram_track(x, d, torch.ones(6, dtype=torch.float64), beta, epsilon=1e-6)[0]
    assert_close(generator, beta / 2 * ops.gram_skew(x, d)[0], 1e-10)


@pytest.mark.parametrize("order", [2, 3, 4, 8])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("norm", [0.1, 5.0])
def test_cayley_track_formula(order, batch, norm):
    n, limit = 7, 0.42
    b, x, d = orthogonal(*batch, n), skew(*batch, n, norm=norm), positive(*batch, n)
    r = torch.randn(*batch, n, n, dtype=torch.float64).tril(-1)
    r = 0.1 * (r + r.mT)
    new_b, new_d, new_r = ops.cayley_track(b, x, d, residual=r, limit=limit, order=order)
    bound = ((x @ x).square().sum((-2, -1)) / 2) ** 0.25
    step = (limit / bound).clamp(max=1)[..., None, None]
    assert (torch.linalg.matrix_norm(step * x, 2) <= limit + 1e-12).all()
    eye, y = torch.eye(n), step * x
    c = (4 / (1 + (1 - 4 * (step[..., 0, 0] * bound) ** 2).sqrt()))[..., None, None]
    p = eye + 2 * y + c * y @ y if order == 2 else ops.cayley_truncated(y, order=order)
    if order == 3:
        p = p + ((step[..., 0, 0] * bound) ** 2 / 4)[..., None, None] * (y @ y @ y)
    p = p - 0.5 * (b.mT @ b - eye)
    t = p.mT @ (torch.diag_embed(d) + r) @ p
    assert_close(new_b, b @ p)
    assert_close(new_d, t.diagonal(dim1=-2, dim2=-1))
    assert_close(new_r, t - torch.diag_embed(new_d))
    assert torch.equal(new_r, new_r.mT)


def test_eigenvalues_that_rounding_extinguishes_are_kept():
    """A turn by 45° of `[[1, 1], [1, 1]]` leaves eigenvalues 2 and 0, and of `[[1, 0.9], …]` 1.9 and 0.1."""
    x = torch.tensor([[0.0, 1.0], [-1.0, 0.0]]) * math.tan(math.pi / 8)
    b, d = torch.eye(2), torch.ones(2)
    for off, dtype, least in ((1.0, torch.float32, 0.0), (1.0, torch.bfloat16, 1.0), (0.9, torch.bfloat16, 0.1)):
        r = torch.tensor([[0.0, off], [off, 0.0]], dtype=dtype)
        new = ops.cayley_track(b.to(dtype), x, d, residual=r, order=8, limit=0.9)[1]
        assert abs(new.min() - least) < 0.01 and new.max() > 1.8


def test_cayley_track_without_residual_leaves_d():
    b, x, d = orthogonal(5), skew(5, norm=0.2), positive(5)
    new_b, new_d, new_r = ops.cayley_track(b, x, d)
    assert torch.equal(new_d, d) and new_r is None
    x2 = x @ x
    sigma2 = x2.norm() / math.sqrt(2)
    p = torch.eye(5) + 2 * x + 2 * x2 + (1 + sigma2 / 4) * (x2 @ x)
    assert_close(new_b, b @ (p - 0.5 * (b.mT @ b - torch.eye(5))))


EDGE = [(order, angle, angle == 61) for order in (2, 3, 4) for angle in (59, 61)]


@pytest.mark.parametrize("order,angle,grows", [*EDGE, (8, 59, False)])
def test_turns_of_60_degrees_are_the_edge_of_stability(order, angle, grows):
    """`2 sin(θ/2)` is what an update does to the difference of a plane's two lengths (order 8 also shrinks both)."""
    low, high = 0.3, 0.5 if order == 2 else 0.9
    for _ in range(60):  # the limit whose turn is `angle`
        limit = (low + high) / 2
        x = torch.tensor([[0.0, -9.0], [9.0, 0.0]], dtype=torch.float64)
        p = ops.cayley_track(torch.eye(2).double(), x, torch.ones(2).double(), limit=limit, order=order)[0]
        low, high = (limit, high) if math.degrees(math.atan2(p[1, 0], p[0, 0])) < angle else (low, limit)
    b = torch.diag(torch.tensor([1.001, 0.999], dtype=torch.float64))
    defects = []
    for _ in range(61):
        b = ops.cayley_track(b, x, torch.ones(2).double(), limit=limit, order=order)[0]
        s = torch.linalg.svdvals(b)
        defects.append((s[0] ** 2 - s[1] ** 2).item())
    assert (defects[-1] > defects[0]) == grows


@pytest.mark.parametrize("limit", [0.1, 0.3, 0.48])
def test_order_3_keeps_lengths(limit):
    """To `0.15 ‖X‖⁶`, over all planes from still to the fastest."""
    x = torch.zeros(80, 80, dtype=torch.float64)
    for i, size in enumerate(torch.linspace(0, 1, 39)):
        x[2 * i, 2 * i + 1], x[2 * i + 1, 2 * i] = -size, size
    bound = ((x @ x).norm() / math.sqrt(2)).sqrt()
    x = x / bound * limit  # so that the bound is at the limit, and the planes lie under it
    y = x * bound  # and here the fastest plane is at it
    y2 = y @ y
    p = torch.eye(80) + 2 * y + 2 * y2 + (1 + limit**2 / 4) * (y2 @ y)
    departures = torch.linalg.eigvalsh(p @ p.mT - torch.eye(80)) / limit**6
    assert -0.15 < departures[0] < -0.11 and departures[-1] < 0.13
    assert limit < 0.48 or departures[-1] > 0.11
    turned = ops.cayley_track(torch.eye(80, dtype=torch.float64), 100 * x, torch.ones(80).double(), limit=limit, order=3)[0]
    assert torch.linalg.matrix_norm(turned @ turned.mT - torch.eye(80), 2) < 0.15 * limit**6


# --- Cayley -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 8, 31])
@pytest.mark.parametrize("batch", BATCHES)
def test_cayley_is_exact_and_orthogonal(n, batch):
    x, eye = skew(*batch, n, norm=3.0), torch.eye(n, dtype=torch.float64)
    got = ops.cayley(x)
    assert_close(got, (eye + x) @ torch.linalg.inv(eye - x), 1e-11)
    assert_close(got @ got.mT, eye.expand_as(got), 1e-11)


def test_truncated_maps_are_the_stated_polynomials():
    x, eye = skew(3, 9, norm=0.6), torch.eye(9, dtype=torch.float64)
    x2 = x @ x
    x3, x4 = x2 @ x, x2 @ x2
    a, b = 4 - 2 * math.sqrt(2), 6 - 4 * math.sqrt(2)
    assert_close(ops.cayley_truncated(x, order=2), eye + 2 * x + 2 * x2)
    assert_close(ops.cayley_truncated(x, order=3), eye + 2 * x + 2 * x2 + x3)
    assert_close(ops.cayley_truncated(x, order=4), eye + 2 * x + 2 * x2 + a * x3 + b * x4)
    want = (eye + x) @ (eye + x) @ (eye + x2) @ (eye + x4)
    assert_close(ops.cayley_truncated(x), want)
    powers = [eye]
    for _ in range(8):
        powers.append(powers[-1] @ x)
    assert_close(want, eye + 2 * sum(powers[1:8]) + powers[8])


@pytest.mark.parametrize(
    "order,defect", [(2, 4 * 0.6**4), (3, 0.6**6), (4, (6 - 4 * math.sqrt(2)) ** 2 * 0.6**8), (8, 1 - (1 - 0.6**8) ** 2)]
)
def test_orthogonality_defects_are_as_documented(order, defect):
    p = ops.cayley_truncated(skew(2, 10, norm=0.6), order=order)
    got = torch.linalg.matrix_norm(p @ p.mT - torch.eye(10), 2)
    assert_close(got, torch.full((2,), defect, dtype=torch.float64), 1e-10)


@pytest.mark.parametrize("order", [2, 3, 4, 8])
def test_truncated_maps_approach_the_cayley_map(order):
    x = skew(6, norm=1.0)
    errors = [(ops.cayley_truncated(h * x, order=order) - ops.cayley(h * x)).norm().item() for h in (0.1, 0.05)]
    power = math.log2(errors[0] / errors[1])
    assert abs(power - (8 if order == 8 else 3)) < 0.1


@pytest.mark.parametrize("order", [2, 3, 4, 8])
@pytest.mark.parametrize("correct", [True, False])
@pytest.mark.parametrize("batch", BATCHES)
def test_cayley_update_formula(order, correct, batch):
    b, x, step = orthogonal(*batch, 6) + 0.01, skew(*batch, 6, norm=1.0), 0.4 * positive(*batch)
    p = ops.cayley_truncated(step[..., None, None] * x, order=order)
    if correct:
        p = p - 0.5 * (b.mT @ b - torch.eye(6))
    assert_close(ops.cayley_update(b, x, step, order=order, correct=correct), b @ p)


def test_self_correction_brings_a_basis_back():
    b = orthogonal(20)
    b = (b + 0.01 * torch.randn_like(b)).to(torch.bfloat16)
    zero = torch.zeros_like(b)

    def defect(b: Tensor) -> float:
        return ((b.double().mT @ b.double() - torch.eye(20)).norm() / math.sqrt(20)).item()

    before = defect(b)
    for step in range(5):
        b = ops.cayley_update(b, zero, correct=True, rounding="stochastic", seed=step)
    assert defect(b) < min(0.01, before / 4)


# --- spectrum, root, factor -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape,batch", CASES)
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_spectrum_update_formula(shape, batch, exact, gamma):
    (n, m), beta2, damping = shape, 0.1, 0.0 if exact else 0.3
    d_c, d_k, alpha = positive(*batch, n), positive(*batch, m), positive(*batch)
    w_c, w_k = positive(*batch, n), positive(*batch, m)
    got = ops.spectrum_update(d_c, d_k, alpha, w_c, w_k, beta2, gamma=gamma, damping=damping, exact=exact)
    a = alpha[..., None]
    if exact:
        m_c, m_k = (-gamma * d_c + w_c / (a * m)) / d_c, (-gamma * d_k + w_k / (a * n)) / d_k
        want_c = d_c * torch.exp(beta2 * (m_c - m_c.mean(-1, keepdim=True)))
        want_k = d_k * torch.exp(beta2 * (m_k - m_k.mean(-1, keepdim=True)))
        want_a = alpha * torch.exp(beta2 / 2 * (m_c.mean(-1) + m_k.mean(-1)))
    else:
        lam_c, lam_k = damping * m * (1 / d_k).mean(-1, True), damping * n * (1 / d_c).mean(-1, True)
        n_c = (1 - gamma * beta2) * d_c + beta2 / (a * m) * (w_c + lam_c)
        n_k = (1 - gamma * beta2) * d_k + beta2 / (a * n) * (w_k + lam_k)
        want_c = torch.exp(n_c.log() - n_c.log().mean(-1, True))
        want_k = torch.exp(n_k.log() - n_k.log().mean(-1, True))
        want_a = alpha * torch.exp((n_c.log().mean(-1) + n_k.log().mean(-1)) / 2)
    for x, y in zip(got, (want_c, want_k, want_a), strict=True):
        assert_close(x, y)


@pytest.mark.parametrize("shape,batch", CASES)
@pytest.mark.parametrize("root", [1.0, 2.0, 4.0])
def test_apply_root_formula(shape, batch, root):
    n, m = shape
    g, alpha = torch.randn(*batch, n, m, dtype=torch.float64), positive(*batch)
    b_c, b_k, d_c, d_k = orthogonal(*batch, n), orthogonal(*batch, m), positive(*batch, n), positive(*batch, m)
    left = b_c @ torch.diag_embed(d_c ** (-1 / root)) @ b_c.mT
    right = b_k @ torch.diag_embed(d_k ** (-1 / root)) @ b_k.mT
    scale = (alpha ** (-1 / root))[..., None, None]
    assert_close(ops.apply_root(g, b_c, d_c, b_k, d_k, alpha, root), scale * left @ g @ right)
    diagonal = torch.diag_embed(d_c ** (-1 / root))
    assert_close(ops.apply_root(g, None, d_c, b_k, d_k, alpha, root), scale * diagonal @ g @ right)
    diagonal = torch.diag_embed(d_k ** (-1 / root))
    assert_close(ops.apply_root(g, b_c, d_c, None, d_k, alpha, root), scale * left @ g @ diagonal)


@pytest.mark.parametrize("scale", [0.01, 10.0])
@pytest.mark.parametrize("batch", BATCHES)
def test_factor_update_formula(scale, batch):
    k, m = torch.randn(*batch, 5, 5, dtype=torch.float64), scale * torch.randn(*batch, 5, 5, dtype=torch.float64)
    norm = m.flatten(-2).norm(dim=-1).clamp(min=1)[..., None, None]
    assert_close(ops.factor_update(k, m, 0.3), k @ (torch.eye(5) - 0.3 * m / norm))


def test_factor_update_is_unbiased_with_stochastic_rounding():
    count, k, m = 20000, torch.randn(3, 3).bfloat16(), 0.1 * torch.randn(3, 3)
    exact = ops.factor_update(k.float(), m, 0.01).double()
    many = ops.factor_update(k.expand(count, 3, 3), m.expand(count, 3, 3), 0.01, rounding="stochastic").double()
    gap = torch.exp2(exact.abs().log2().floor() - 7)  # between bfloat16 neighbours
    bound = 5 * gap / 2 / math.sqrt(count)
    assert ((many.mean(0) - exact).abs() < bound).all() and ((many - exact).abs() < gap).all()
    assert ((ops.factor_update(k, m, 0.01).double() - exact).abs() > bound).any()


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_factor_update_with_step_0_keeps_every_bit(rounding):
    k, m = torch.randn(2, 9, 9).bfloat16(), 10 * torch.randn(2, 9, 9)
    k[:, ::2, 3] = -0.0
    got = ops.factor_update(k, m, 0.0, rounding=rounding, seed=4)
    assert torch.equal(got.view(torch.int16), k.view(torch.int16))


def test_the_seed_of_factor_update_may_be_left_out():
    k, m, step = torch.randn(4, 4).bfloat16(), torch.randn(4, 4).bfloat16(), torch.tensor(0.1)
    assert torch.equal(torch.ops.spectral_ops.factor_update(k, m, step), ops.factor_update(k, m, 0.1))


# --- rounding ---------------------------------------------------------------------------------------------------------


def test_stochastic_round_is_unbiased():
    values = torch.tensor([1.001, -3.3, 1e-30, 123.456, 7e-41])
    rounded = ops.stochastic_round(values.repeat(40000, 1), 0).double()
    gap = torch.tensor([2.0**-7, 2.0**-6, 2.0**-107, 0.5, 2.0**-133]).double()  # between bfloat16 neighbours
    assert ((rounded.mean(0) - values.double()).abs() < 5 * gap / 2 / math.sqrt(40000)).all()
    assert ((rounded - values.double()).abs() < gap).all()


def test_stochastic_round_keeps_what_bfloat16_holds():
    values = torch.randn(9, 17).to(torch.bfloat16).float()
    values[0, :4] = torch.tensor([math.inf, -math.inf, 0.0, -0.0])
    for seed in range(5):
        got = ops.stochastic_round(values, seed)
        assert torch.equal(got.view(torch.int16), values.to(torch.bfloat16).view(torch.int16))
    assert ops.stochastic_round(torch.tensor([math.nan]), 0).isnan().all()


def test_stochastic_round_bits_are_philox():
    """Random123's published vectors for philox4x32-10: counter and key all zeros, all ones."""
    from spectral_ops.reference import philox

    zero = torch.zeros((), dtype=torch.int64)
    assert [int(w) for w in philox(zero, zero, zero)] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_stochastic_round_does_not_depend_on_the_batch():
    x, seeds = torch.randn(3, 5, 9), torch.tensor([11, -4, 1 << 40])
    together = ops.stochastic_round(x, seeds)
    for i in range(3):
        assert torch.equal(together[i], ops.stochastic_round(x[i], int(seeds[i])))
    assert torch.equal(ops.stochastic_round(x, 5)[2], ops.stochastic_round(x[2], 7))
    assert not torch.equal(ops.stochastic_round(x, 5), ops.stochastic_round(x, 50))


def test_stochastic_round_takes_any_strides():
    x = torch.randn(4, 6)
    assert torch.equal(ops.stochastic_round(x.T.contiguous().T, 3), ops.stochastic_round(x, 3))


# --- every op: dtypes, strides, sizes, errors, torch.compile ----------------------------------------------------------


def arguments(name: str, dtype: torch.dtype, n: int = 6, m: int = 9, batch: tuple[int, ...] = (2,)):
    """Positional and keyword arguments of a public op."""
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(*batch, n, m, dtype=torch.float64).to(dtype)
    d_n, d_m, alpha = (positive(*batch, *s).to(acc) for s in ((n,), (m,), ()))
    b_n, b_m = orthogonal(*batch, n).to(dtype), orthogonal(*batch, m).to(dtype)
    w = torch.randn(*batch, n, n, dtype=torch.float64).tril(-1)
    generator, residual = skew(*batch, n, norm=0.3, dtype=dtype), (w + w.mT).to(dtype)
    return {
        "gram": ((x, d_m), {"alpha": 0.5, "beta": 0.5, "c": residual}),
        "skew_generator": ((residual, d_n), {}),
        "gram_skew": ((x, d_n, d_m), {}),
        "gram_track": ((x, d_n, d_m, 0.3), {"residual": residual}),
        "cayley": ((generator,), {}),
        "cayley_truncated": ((generator,), {"order": 4}),
        "cayley_update": ((b_n, generator, 0.5), {"correct": True, "rounding": "stochastic", "seed": 3}),
        "cayley_track": ((b_n, generator, d_n), {"residual": residual, "seed": 3}),
        "spectrum_update": ((d_n, d_m, alpha, d_n, d_m, 0.1), {}),
        "apply_root": ((x, b_n, d_n, b_m, d_m, alpha, 2.0), {}),
        "factor_update": ((b_n, generator, 0.1), {"rounding": "stochastic", "seed": 3}),
        "stochastic_round": ((x.float(), 3), {}),
    }[name]


def outputs(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def map_tensors(f, args, kwargs):
    apply = lambda v: f(v) if isinstance(v, Tensor) else v  # noqa: E731
    return tuple(map(apply, args)), {k: apply(v) for k, v in kwargs.items()}


@pytest.mark.parametrize("name", FUNCTIONAL)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(name, dtype):
    args, kwargs = arguments(name, dtype)
    got = outputs(getattr(ops, name)(*args, **kwargs))
    assert all(x.isfinite().all() for x in got)
    main = got[0].dtype
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    assert main == {"stochastic_round": torch.bfloat16, "spectrum_update": acc}.get(name, dtype)


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_strides_and_inputs_untouched(name):
    args, kwargs = arguments(name, torch.float32)
    want = outputs(getattr(ops, name)(*args, **kwargs))
    strided = map_tensors(lambda t: t.mT.contiguous().mT if t.ndim > 2 else torch.stack([t, t], -1)[..., 0], args, kwargs)
    before = map_tensors(Tensor.clone, *strided)
    for x, y in zip(outputs(getattr(ops, name)(*strided[0], **strided[1])), want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-2 if x.dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    for x, y in zip([*strided[0], *strided[1].values()], [*before[0], *before[1].values()], strict=True):
        assert not isinstance(x, Tensor) or torch.equal(x, y)


@pytest.mark.parametrize("name", FUNCTIONAL)
@pytest.mark.parametrize("n,m,batch", [(1, 1, ()), (1, 4, (2,)), (3, 2, (0,)), (5, 4, (2, 2))])
def test_sizes(name, n, m, batch):
    args, kwargs = arguments(name, torch.float32, n, m, batch)
    for x in outputs(getattr(ops, name)(*args, **kwargs)):
        assert x.shape[: len(batch)] == batch and x.isfinite().all()


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_a_batch_is_its_matrices_one_by_one(name):
    args, kwargs = arguments(name, torch.float64)
    together = outputs(getattr(ops, name)(*args, **kwargs))
    if "seed" in kwargs or name == "stochastic_round":
        return  # covered by test_stochastic_round_does_not_depend_on_the_batch
    for i in range(2):
        alone_args, alone_kwargs = map_tensors(lambda t, i=i: t[i], args, kwargs)
        for x, y in zip(together, outputs(getattr(ops, name)(*alone_args, **alone_kwargs)), strict=True):
            assert_close(x[i], y)


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_opcheck(name, monkeypatch):
    """The registered op behind each public function, with the arguments the function passes to it."""
    module = __import__(f"spectral_ops.{getattr(ops, name).__module__.rpartition('.')[2]}", fromlist=["x"])
    calls = []
    op = getattr(module, f"_{name}")
    monkeypatch.setattr(module, f"_{name}", lambda *a: calls.append(a) or op(*a))
    for dtype in (torch.float32, torch.bfloat16):
        args, kwargs = arguments(name, dtype)
        getattr(ops, name)(*args, **kwargs)
        torch.library.opcheck(op, calls[-1])
    assert op is getattr(torch.ops.spectral_ops, name).default


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_compiles_without_a_graph_break(name):
    args, kwargs = arguments(name, torch.float32)
    want = outputs(getattr(ops, name)(*args, **kwargs))
    got = outputs(torch.compile(getattr(ops, name), fullgraph=True, backend="aot_eager")(*args, **kwargs))
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_wrong_types_are_named(name):
    args, kwargs = arguments(name, torch.float32)
    function = getattr(ops, name)
    with pytest.raises(TypeError, match=rf"{name}: `\w+` must be a tensor, got list"):
        function([1.0], *args[1:], **kwargs)
    with pytest.raises(TypeError, match=rf"{name}: `\w+` must be float64, .*got torch.int64"):
        function(args[0].long(), *args[1:], **kwargs)


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda x, d: ops.gram(d[0]), r"gram: `x` must have shape \(..., rows, columns\), got \(6,\)"),
        (lambda x, d: ops.gram(x, d), r"gram: `scale` must have shape \(2, 9\), got \(2, 6\)"),
        (lambda x, d: ops.gram(x, beta=1.0), r"gram: `beta` is 1.0 but there is no `c`"),
        (lambda x, d: ops.skew_generator(x, d), r"skew_generator: `w` must have shape \(..., n, n\), got \(2, 6, 9\)"),
        (lambda x, d: ops.gram_skew(x, d, tol=-1.0), r"gram_skew: `tol` must be at least 0, got -1.0"),
        (lambda x, d: ops.cayley_truncated(x[..., :6], order=5), r"`order` must be one of 2, 3, 4, 8, got 5"),
        (lambda x, d: ops.cayley_update(x[..., :6], x), r"`x` must have shape \(2, 6, 6\), got \(2, 6, 9\)"),
        (
            lambda x, d: ops.cayley_update(x[..., :6], x[..., :6], rounding="up"),
            r"`rounding` must be one of .*got 'up'",
        ),
        (lambda x, d: ops.factor_update(x[..., :6], x[..., :6], 1.0, rounding="up"), r"`rounding` must be one of .*got 'up'"),
        (lambda x, d: ops.cayley_update(x[..., :6], x[..., :6], d), r"`step` must be a number or have shape \(2,\)"),
        (
            lambda x, d: ops.cayley_track(x[..., :6], x[..., :6], d, limit=1.5, order=2),
            r"`limit` must be in \(0, 0.5\] for order 2, got 1.5",
        ),
        (lambda x, d: ops.apply_root(x, None, d, None, d, 1.0, 2.0), r"`d_k` must have shape \(2, 9\), got \(2, 6\)"),
        (lambda x, d: ops.apply_root(x, None, d, None, x[:, 0], 1.0, 0.0), r"`root` must be positive, got 0.0"),
        (lambda x, d: ops.spectrum_update(d, d, d, d, d, 0.1), r"`alpha` must have shape \(2,\), got \(2, 6\)"),
        (lambda x, d: ops.stochastic_round(x, d.long()), r"`seed` must be an int or an int64 tensor of shape \(2,\)"),
        (lambda x, d: ops.gram(x.to("meta"), d.new_ones(2, 9)), r"`scale` must be on meta like the other arguments"),
    ],
)
def test_wrong_values_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(2, 6, 9), torch.rand(2, 6))


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda x: ops.stochastic_round(x.double(), 0), r"`x` must be float32, got torch.float64"),
        (lambda x: ops.stochastic_round(x, 1.5), r"`seed` must be an int or an int64 tensor, got float"),
        (lambda x: ops.factor_update(x, x, "1"), r"`step` must be a number or a tensor, got str"),
        (lambda x: ops.gram(x.to_sparse()), r"`x` must be a dense tensor, got layout torch.sparse_coo"),
    ],
)
def test_wrong_dtypes_are_named(call, message):
    with pytest.raises(TypeError, match=message):
        call(torch.randn(6, 6))


def test_norms_of_large_matrices_are_accurate():
    """Where a sum is added up one number after the other, float32 loses three digits here."""
    x = torch.randn(2, 1024, 1024)
    wanted = x.double().square().sum((-2, -1)).sqrt()
    torch.testing.assert_close(reference.frobenius(x).double(), wanted, rtol=5e-7, atol=0)
    assert reference.frobenius(x[:, :0]).tolist() == reference.frobenius(x[:, :, :0]).tolist() == [0, 0]
