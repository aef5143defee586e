"""SpectralFactor and KroneckerFactor as objects: what they learn, what they compute, batches, dtypes, state, what they refuse.
The formulas are tested in test_spectral_claims.py and, as the optimizers use them, against transcriptions of the boxes."""

import copy
import io
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from spectral_ops import KroneckerFactor, SpectralFactor
from spectral_ops.optim import SpectralFull, SpectralKron

F64 = {"dtype": torch.float64}
ROTATIONS = "riemannian", "tracking"
both_rotations = pytest.mark.parametrize("rotation", ROTATIONS)
N, M = 5, 3


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def orthogonal(n: int) -> Tensor:
    return torch.linalg.qr(draw(n, n)).Q


def spd(*shape: int) -> Tensor:
    x = draw(*shape, 2 * shape[-1])
    return x @ x.mT / (2 * shape[-1])


def spread(n: int) -> Tensor:
    return torch.linspace(0.5, 3, n, dtype=torch.float64)


def spectral(**options: Any) -> SpectralFactor:
    return SpectralFactor(N, **({"eigenvalues": spread(N), "basis": orthogonal(N)} | F64 | options))


def kronecker(**options: Any) -> KroneckerFactor:
    start = {"scale": 1.5, "eigenvalues": (spread(N), spread(M)), "bases": (orthogonal(N), orthogonal(M))}
    return KroneckerFactor(N, M, **(start | F64 | options))


def snapshot(factor: Any) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in factor.state_dict().items()}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], x) and got[name].dtype == x.dtype for name, x in want.items())


def power(s: Tensor, exponent: float) -> Tensor:
    e, v = torch.linalg.eigh(s)
    return v @ torch.diag_embed(e**exponent) @ v.mT


# --- What is read off it ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [spectral, kronecker])
def test_roots_inverse_and_determinant(make):
    factor = make()
    for _ in range(3):
        factor.update(*([spd(N)] if make is spectral else [draw(N, M)]), beta2=0.05)
    s, n = factor.matrix(), N if make is spectral else N * M
    v = draw(N, 2) if make is spectral else draw(N, M)
    flat = v if make is spectral else v.flatten()
    torch.testing.assert_close(factor.inverse() @ s, torch.eye(n, **F64), rtol=0, atol=1e-10)
    torch.testing.assert_close(factor.logdet(), torch.logdet(s), rtol=1e-10, atol=1e-10)
    for root in (1.0, 2.0, 4.0, 3.3, -1.0, -2.0):
        want = power(s, -1 / root)
        torch.testing.assert_close(factor.matrix(-1 / root), want, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(factor.apply(v, root), (want @ flat).view_as(v), rtol=1e-9, atol=1e-9)


def test_a_vector_and_its_column_are_the_same():
    factor, v = spectral(), draw(N)
    assert torch.equal(factor.apply(v, 2), factor.apply(v[:, None], 2)[:, 0]) and factor.apply(v, 2).shape == (N,)
    one, two = (copy.deepcopy(factor) for _ in range(2))
    one.update(x=v, beta2=0.1)
    two.update(x=v[:, None], beta2=0.1)
    assert_same(one.state_dict(), two.state_dict())


@pytest.mark.parametrize("make", [spectral, kronecker])
def test_the_matrix_is_bitwise_symmetric(make):
    factor = make(dtype=torch.float32, bases=(None, None)) if make is kronecker else make(dtype=torch.float32, basis=None)
    factor.update(*([spd(N)] if make is spectral else [draw(N, M)]), beta2=0.05)
    for exponent in (1.0, -0.5):
        s = factor.matrix(exponent)
        assert s.dtype == torch.float32 and torch.equal(s, s.T)


# --- What it learns from ----------------------------------------------------------------------------------------------


@both_rotations
def test_curvature_its_factor_and_its_rotation_are_one(rotation):
    """`h`, `x` with `h = x xᵀ`, and both in the factor's own basis."""
    factor, x = spectral(rotation=rotation), draw(N, 4)
    inside = factor.basis.T @ x
    ends = []
    for given in ({"h": x @ x.T}, {"x": x}, {"h": inside @ inside.T, "rotated": True}, {"x": inside, "rotated": True}):
        one = copy.deepcopy(factor)
        one.update(**given, beta2=0.1, damping=0.02)
        ends.append(one.matrix())
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=1e-9, atol=1e-9)
    assert (ends[0] - factor.matrix()).norm() > 0.01


def test_gradients_and_their_outer_products_are_one():
    one = kronecker()
    two = copy.deepcopy(one)
    for exact in (True, False, True):
        g = draw(N, M)
        one.update(g, 0.05, exact=exact)
        two.update(h=torch.outer(g.flatten(), g.flatten()), beta2=0.05, exact=exact)
    torch.testing.assert_close(one.matrix(), two.matrix(), rtol=1e-9, atol=1e-9)


def test_indefinite_curvature_of_a_kronecker_factor():
    """To first order in β₂ it moves by the projection of `H − S` on what a Kronecker product can do, which the fixed point
    shows: where `H` is a Kronecker product, `S` ends there."""
    target = torch.kron(spd(N), spd(M))
    factor = kronecker()
    for t in range(400):
        noise = 0.3 * draw(N * M, N * M) / (1 + t)
        factor.update(h=target + noise + noise.T, beta2=0.05, exact=True)
    assert (factor.matrix() - target).norm() < 0.02 * target.norm()


def test_tracking_is_the_average():
    """Whatever `B` did: `S = B T Bᵀ`, to the orthogonality of `B`."""
    factor = spectral(rotation="tracking", cayley_order=8)
    s = factor.matrix()
    for gamma in (1, 1, 0, 1, 0):
        h = spd(N)
        factor.update(h, beta2=0.02, gamma=gamma, damping=0.01)
        s = (1 - 0.02 * gamma) * s + 0.02 * (h + 0.01 * torch.eye(N, **F64))
        torch.testing.assert_close(factor.matrix(), s, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", [{"exact": True}, {"exact": False}, {"gamma": 0}], ids=str)
@pytest.mark.parametrize("order", [None, 4])
def test_it_is_what_the_optimizers_have(options, order):
    """SpectralFull and SpectralKron learn as these objects do."""
    start, beta2 = {"cayley_order": order}, 1 - 0.98
    full, pair = SpectralFactor(N * M, **start, **F64), KroneckerFactor(N, M, **start, **F64)
    p, q = (torch.zeros(N, M, **F64).requires_grad_() for _ in range(2))
    shared = {"rotation": "riemannian", "betas": (0.0, 0.98)} | options | start
    optimizers = SpectralFull([p], **shared), SpectralKron([q], **shared)
    for _ in range(5):
        p.grad = q.grad = draw(N, M)
        for optimizer in optimizers:
            optimizer.step()
        full.update(x=p.grad.flatten(), beta2=beta2, **options)
        pair.update(q.grad, beta2, **options)
    for name in ("eigenvalues", "basis"):
        torch.testing.assert_close(getattr(full, name), optimizers[0].state[p][name], rtol=1e-8, atol=1e-8)
    for theirs, ours in (("basis_left", "basis_c"), ("eigenvalues_right", "eigenvalues_k"), ("scale", "scale")):
        torch.testing.assert_close(getattr(pair, ours), optimizers[1].state[q][theirs], rtol=1e-8, atol=1e-8)


def test_tracking_pairs_are_what_spectral_kron_has():
    pair = KroneckerFactor(N, M, rotation="tracking", **F64)
    q = torch.zeros(N, M, **F64).requires_grad_()
    optimizer = SpectralKron([q], betas=(0.0, 0.9))
    for _ in range(5):
        q.grad = draw(N, M)
        optimizer.step()
        pair.update(q.grad, 1 - 0.9)
    for theirs, ours in (("basis_left", "basis_c"), ("residual_right", "residual_k"), ("scale", "scale"), ("updates",) * 2):
        torch.testing.assert_close(getattr(pair, ours), optimizer.state[q][theirs], rtol=0, atol=0)


# --- Batches and dtypes -----------------------------------------------------------------------------------------------


@both_rotations
@pytest.mark.parametrize("batch", [(3,), (2, 2), (0,)])
def test_a_batch_is_as_many_factors(rotation, batch):
    count = math.prod(batch)
    b, d = torch.stack([orthogonal(N) for _ in range(max(count, 1))])[:count], 0.5 + draw(count, N).abs()
    many = SpectralFactor(
        N, batch=batch, rotation=rotation, basis=b.view(*batch, N, N), eigenvalues=d.view(*batch, N), **F64
    )
    singles = [SpectralFactor(N, rotation=rotation, basis=b[i], eigenvalues=d[i], **F64) for i in range(count)]
    rates = 0.01 + 0.1 * torch.rand(batch, **F64)
    for _ in range(3):
        x = draw(*batch, N, 2)
        many.update(x=x, beta2=rates)
        for one, mine, rate in zip(singles, x.view(count, N, 2), rates.flatten().tolist(), strict=True):
            one.update(x=mine, beta2=rate)
    v = draw(*batch, N)
    assert many.matrix().shape == (*batch, N, N) and many.logdet().shape == batch and many.apply(v, 2).shape == v.shape
    for i, one in enumerate(singles):
        torch.testing.assert_close(many.matrix().view(count, N, N)[i], one.matrix())
        torch.testing.assert_close(many.apply(v, 2).view(count, N)[i], one.apply(v.view(count, N)[i], 2))


@both_rotations
def test_a_batch_of_pairs_is_as_many_pairs(rotation):
    many = KroneckerFactor(N, M, batch=(2, 2), rotation=rotation, **F64)
    singles = [KroneckerFactor(N, M, rotation=rotation, **F64) for _ in range(4)]
    for _ in range(3):
        g = draw(2, 2, N, M)
        many.update(g, 0.1)
        for one, mine in zip(singles, g.view(4, N, M), strict=True):
            one.update(mine, 0.1)
    for i, one in enumerate(singles):
        torch.testing.assert_close(many.matrix().view(4, N * M, N * M)[i], one.matrix())
        torch.testing.assert_close(many.logdet().view(4)[i], one.logdet())


@both_rotations
@pytest.mark.parametrize("order", [None, 8])
def test_bfloat16_bases_are_rounded_without_bias_and_stay_orthogonal(rotation, order):
    """Small turns would vanish if they were rounded to nearest; the same seed gives the same bits."""
    mix = torch.randn(16, 16) * torch.logspace(0, -1, 16)

    def end(dtype: torch.dtype, seed: int = 0) -> SpectralFactor:
        factor = SpectralFactor(16, rotation=rotation, cayley_order=order, dtype=dtype, seed=seed)
        generator = torch.Generator().manual_seed(1)
        for _ in range(300):
            factor.update(x=mix @ torch.randn(16, generator=generator), beta2=0.01)
        return factor

    low, again, other, wide = end(torch.bfloat16), end(torch.bfloat16), end(torch.bfloat16, 1), end(torch.float32)
    assert_same(low.state_dict(), again.state_dict())
    assert not torch.equal(low.basis, other.basis)
    assert low.basis.dtype == torch.bfloat16 and low.eigenvalues.dtype == torch.float32
    defect = low.basis.T.float() @ low.basis.float() - torch.eye(16)
    assert defect.norm() / 4 < 0.01
    target = mix @ mix.T
    assert (low.matrix() - target).norm() < (wide.matrix() - target).norm() + 0.1 * target.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_arguments_of_any_dtype(dtype):
    factor, pair = SpectralFactor(N), KroneckerFactor(N, M)
    factor.update(x=draw(N).to(dtype), beta2=0.1)
    pair.update(draw(N, M).to(dtype), 0.1)
    assert factor.apply(draw(N).to(dtype), 2).dtype == dtype and pair.apply(draw(N, M).to(dtype), 2).dtype == dtype
    assert factor.matrix().dtype == pair.matrix().dtype == torch.float32


@pytest.mark.parametrize("n", [0, 1])
@both_rotations
def test_small_sizes(n, rotation):
    factor, pair = SpectralFactor(n, rotation=rotation, **F64), KroneckerFactor(n, 1, rotation=rotation, **F64)
    factor.update(x=draw(n, 2), beta2=0.1)
    if n:
        pair.update(draw(n, 1), 0.1)
        assert factor.eigenvalues.item() > 0 and pair.scale.isfinite()
    assert factor.matrix().shape == (n, n) and factor.logdet().shape == ()


# --- Edges ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rotation,exact", [("riemannian", True), ("riemannian", False), ("tracking", False)])
def test_zero_and_rank_one_curvature_from_the_identity(rotation, exact):
    """A start at `d = 1` has no order of its eigenvectors: the first update tells only the eigenvalues apart."""
    factor, x = SpectralFactor(N, rotation=rotation, **F64), draw(N)
    factor.update(torch.zeros(N, N, **F64), beta2=0.1, exact=exact)
    shrunk = math.exp(-0.1) if exact else 0.9
    torch.testing.assert_close(factor.matrix(), shrunk * torch.eye(N, **F64))
    factor.update(torch.zeros(N, N, **F64), beta2=0.1, gamma=0, exact=exact)
    torch.testing.assert_close(factor.matrix(), shrunk * torch.eye(N, **F64))
    for _ in range(100):
        factor.update(x=x, beta2=0.1, exact=exact)
    assert all(value.isfinite().all() for value in factor.state_dict().values()) and (factor.eigenvalues > 0).all()
    assert factor.apply(x, 1) @ x > 0
    leading = factor.matrix() @ x / (x @ x)
    assert (leading - x).norm() < 0.2 * x.norm()


@pytest.mark.parametrize("gap", [0.0, 1e-16, 1e-12, 1e-9, 1e-7, 1e-3])
@both_rotations
def test_equal_and_nearly_equal_eigenvalues(gap, rotation):
    """Where a gap is so small that the quotient is noise it counts as none; either way all stays orthogonal and positive."""
    d = torch.tensor([1.0, 1.0 + gap, 2.0, 2.0 * (1 + gap), 3.0], **F64)
    factor = spectral(eigenvalues=d, rotation=rotation)
    for _ in range(20):
        factor.update(spd(N), beta2=0.05)
        assert (factor.basis.T @ factor.basis - torch.eye(N, **F64)).norm() < (1e-2 if rotation == "tracking" else 1e-9)
        assert (factor.eigenvalues > 0).all() and factor.matrix().isfinite().all()


@pytest.mark.parametrize("dtype,bound", [(torch.float64, 1e-12), (torch.float32, 2e-4)])
@pytest.mark.parametrize("start", ["equal", "spread"])
def test_the_exact_map_stays_orthogonal_however_far_it_turns(dtype, bound, start):
    """Where eigenvalues nearly meet it turns by up to 180°. A correction turned with it would feed the defect."""
    n = 20
    d = torch.ones(n) if start == "equal" else torch.linspace(0.5, 3, n)
    factor, worst = SpectralFactor(n, eigenvalues=d, dtype=dtype), 0.0
    for _ in range(300):
        h = draw(n, n)
        factor.update(h + h.T, beta2=0.02, gamma=0, exact=True, rotated=True)
        worst = max(worst, (factor.basis.double().T @ factor.basis.double() - torch.eye(n, **F64)).norm().item())
        factor.eigenvalues.clamp_(1e-2, 1e2)
    assert worst < bound


def test_twelve_decades():
    factor = SpectralFactor(N, eigenvalues=torch.logspace(-6, 6, N), **F64)
    for _ in range(20):
        factor.update(x=draw(N) * torch.logspace(-3, 3, N, **F64), beta2=0.05)
    assert (factor.basis.T @ factor.basis - torch.eye(N, **F64)).norm() < 1e-9 and (factor.eigenvalues > 0).all()


# --- State ------------------------------------------------------------------------------------------------------------


@both_rotations
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ["full", "pair"])
def test_a_loaded_factor_goes_on_bit_for_bit(rotation, dtype, kind):
    def make() -> Any:
        options = {"rotation": rotation, "dtype": dtype}
        return SpectralFactor(N, **options) if kind == "full" else KroneckerFactor(N, M, **options)

    def learn(factor: Any, t: int) -> None:
        x = torch.randn(N, M, generator=torch.Generator().manual_seed(t))
        factor.update(x=x, beta2=0.05) if kind == "full" else factor.update(x, 0.05)

    one, two = make(), make()
    for t in range(4):
        learn(one, t)
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    two.load_state_dict(torch.load(file, weights_only=True))
    three = copy.deepcopy(one)
    for t in range(4, 8):
        for factor in (one, two, three):
            learn(factor, t)
    assert_same(two.state_dict(), one.state_dict())
    assert_same(three.state_dict(), one.state_dict())
    assert one.updates == 8


@pytest.mark.parametrize("change", ["missing", "more", "shape", "number"])
def test_a_state_that_does_not_fit_changes_nothing(change):
    factor = spectral()
    state, before = snapshot(spectral()), snapshot(factor)
    if change == "missing":
        del state["basis"]
    else:
        state |= {"more": {"residual": state["basis"]}, "shape": {"basis": draw(N, N + 1)}, "number": {"updates": 3}}[change]
    with pytest.raises(ValueError, match="SpectralFactor: "):
        factor.load_state_dict(state)
    assert_same(factor.state_dict(), before)


def test_it_keeps_no_reference_to_what_it_was_given():
    basis, d = orthogonal(N), spread(N)
    factor = SpectralFactor(N, basis=basis, eigenvalues=d, **F64)
    kept = basis.clone(), d.clone()
    factor.update(spd(N), beta2=0.1)
    assert torch.equal(basis, kept[0]) and torch.equal(d, kept[1])


# --- What is refused --------------------------------------------------------------------------------------------------


def lopsided() -> Tensor:
    h = spd(N)
    h[0, 1] += 1e-3
    return h


def flawed(value: float) -> Tensor:
    h = spd(N)
    h[2, 2] = value
    return h


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "not symmetric": ({"h": lopsided()}, ValueError, "`h` must be symmetric, but h − hᵀ has an entry of 0.001"),
    "NaN": ({"h": flawed(math.nan)}, ValueError, "`h` has a NaN or an infinity"),
    "infinity": ({"h": flawed(math.inf)}, ValueError, "`h` has a NaN or an infinity"),
    "NaN in x": ({"x": torch.full((N,), math.nan)}, ValueError, "`x` has a NaN or an infinity"),
    "wrong size": ({"h": spd(N + 1)}, ValueError, r"`h` must have shape \(5, 5\), got \(6, 6\)"),
    "no matrix": ({"h": torch.ones(N)}, ValueError, r"`h` must have shape \(5, 5\), got \(5,\)"),
    "wrong x": ({"x": torch.ones(N + 1)}, ValueError, r"`x` must have shape \(5,\) or \(5, k\), got \(6,\)"),
    "nothing": ({}, ValueError, "takes either `h` or `x`, got neither"),
    "both": ({"h": spd(N), "x": torch.ones(N)}, ValueError, "takes either `h` or `x`, got both"),
    "integers": ({"h": torch.eye(N).int()}, TypeError, "`h` must be float64, float32, bfloat16 or float16, got torch.int32"),
    "a list": ({"h": [[1.0]]}, TypeError, "`h` must be a tensor, got list"),
    "another device": ({"h": torch.ones(N, N, device="meta")}, ValueError, "`h` must be on cpu like the factor, got meta"),
    "indefinite": ({"h": -100 * torch.eye(N)}, ValueError, "the truncated map needs curvature ⪰ 0"),
    "too much": ({"h": 1e6 * torch.eye(N), "exact": True}, ValueError, "left the range of torch.float64: take a smaller"),
    "gamma": ({"h": spd(N), "gamma": 0.5}, ValueError, "`gamma` must be one of 0, 1, got 0.5"),
    "damping": ({"h": spd(N), "damping": -1.0}, ValueError, "`damping` must be at least 0, got -1.0"),
    "exact damping": ({"h": spd(N), "damping": 1.0, "exact": True}, ValueError, "`damping` belongs to the truncated map"),
    "negative beta2": ({"h": spd(N), "beta2": -0.1}, ValueError, "`beta2` must be at least 0, got -0.1"),
    "beta2 of a shape": ({"h": spd(N), "beta2": torch.ones(2)}, ValueError, r"`beta2` must be a number or have shape \(\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_flawed_curvature_raises_and_changes_nothing(case):
    given, error, words = REFUSED[case]
    factor = spectral()
    before = snapshot(factor)
    with pytest.raises(error, match=words):
        factor.update(**({"beta2": 0.1} | given))
    assert_same(factor.state_dict(), before)


PAIRS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "NaN": ({"g": torch.full((N, M), math.nan)}, ValueError, "`g` has a NaN or an infinity"),
    "wrong size": ({"g": torch.ones(M, N)}, ValueError, r"`g` must have shape \(5, 3\), got \(3, 5\)"),
    "nothing": ({}, ValueError, "takes either `g` or `h`, got neither"),
    "not symmetric": ({"h": draw(N * M, N * M)}, ValueError, "`h` must be symmetric"),
    "indefinite": ({"h": -100 * torch.eye(N * M, **F64)}, ValueError, "the truncated map needs curvature ⪰ 0"),
    "size of h": ({"h": spd(N)}, ValueError, r"`h` must have shape \(15, 15\), got \(5, 5\)"),
}


@pytest.mark.parametrize("case", PAIRS)
def test_flawed_curvature_of_a_pair_raises_and_changes_nothing(case):
    given, error, words = PAIRS[case]
    factor = kronecker()
    before = snapshot(factor)
    with pytest.raises(error, match=words):
        factor.update(**({"beta2": 0.1} | given))
    assert_same(factor.state_dict(), before)


def test_tracking_refuses_what_is_no_average():
    factor, pair = spectral(rotation="tracking"), kronecker(rotation="tracking")
    with pytest.raises(ValueError, match="`exact=True` is of rotation"):
        factor.update(spd(N), beta2=0.1, exact=True)
    with pytest.raises(ValueError, match="the truncated map needs curvature ⪰ 0"):
        factor.update(-100 * torch.eye(N, **F64), beta2=0.1)
    for given in ({"h": spd(N * M)}, {"g": draw(N, M), "gamma": 0}, {"g": draw(N, M), "beta2": torch.tensor(0.1)}):
        with pytest.raises(ValueError, match='are of rotation="riemannian"'):
            pair.update(**({"beta2": 0.1} | given))


def test_flawed_starts():
    for options, words in (
        ({"eigenvalues": 0.0}, "`eigenvalues` must be positive and finite"),
        ({"eigenvalues": torch.ones(N + 1)}, r"`eigenvalues` must be a number or have shape \(5,\), got \(6,\)"),
        ({"basis": 2 * torch.eye(N, **F64)}, "`basis` must be orthogonal, but BᵀB − I has an entry of 3"),
        ({"basis": torch.eye(N + 1, **F64)}, r"`basis` must be a tensor of shape \(5, 5\)"),
        ({"rotation": "eigh"}, "`rotation` must be one of 'riemannian', 'tracking', got 'eigh'"),
        ({"cayley_order": 5}, "`cayley_order` must be one of None, 2, 3, 4, 8, got 5"),
        ({"dtype": torch.float16}, "`dtype` must be one of"),
    ):
        with pytest.raises(ValueError, match=words):
            spectral(**options)
    for wrong in (-1, 2.0, "3"):
        with pytest.raises(ValueError, match="a size must be an integer of at least 0, got "):
            SpectralFactor(wrong)
    with pytest.raises(ValueError, match="`scale` must be positive and finite"):
        kronecker(scale=-1.0)
    for factor, v in ((spectral(), draw(N)), (kronecker(), draw(N, M))):
        with pytest.raises(ValueError, match="`root` must not be 0"):
            factor.apply(v, 0)
    with pytest.raises(ValueError, match=r"`v` must have shape"):
        spectral().apply(draw(N + 1), 2)


@both_rotations
def test_without_validation_no_value_is_read(rotation):
    """Tensors without values: whatever asks for one fails."""
    factor = SpectralFactor(N, rotation=rotation, device="meta", validate=False)
    pair = KroneckerFactor(N, M, rotation=rotation, device="meta", validate=False)
    factor.update(x=torch.ones(N, device="meta"), beta2=0.1)
    pair.update(torch.ones(N, M, device="meta"), 0.1)
    assert factor.matrix().shape == (N, N) and pair.logdet().is_meta


def test_no_decomposition_is_called(monkeypatch):
    """Neither to learn nor to read; the exact Cayley map alone solves a linear system."""
    called: list[str] = []
    for name in ("eigh", "eig", "svd", "qr", "cholesky", "cholesky_ex", "inv", "inv_ex", "solve", "solve_ex", "lu_factor"):
        monkeypatch.setattr(torch.linalg, name, lambda *_, _name=name, **__: called.append(_name))
    for rotation, order in itertools.product(ROTATIONS, (3, 8)):
        factor = SpectralFactor(N, rotation=rotation, cayley_order=order, **F64)
        pair = KroneckerFactor(N, M, rotation=rotation, cayley_order=order, **F64)
        factor.update(x=draw(N), beta2=0.1)
        pair.update(draw(N, M), 0.1)
        for one in (factor, pair):
            one.matrix(), one.inverse(), one.logdet()
        factor.apply(draw(N), 3)
        pair.apply(draw(N, M), 3)
    assert not called
