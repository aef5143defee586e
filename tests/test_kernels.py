"""Every Triton kernel with a product in it, in the interpreter, against its meaning in float64.

Each check is a function of the kernel's module, so that a mutant of it can be shown to fail.
"""

import pytest
import torch
from torch import Tensor

from spectral_ops import reference
from spectral_ops.kernels import average, cayley, gram, rotate, skew, tiles, track
from spectral_ops.kernels.config import Config
from spectral_ops.kernels.launch import recording

pytestmark = pytest.mark.usefixtures("poison")

TILE = Config(32, 32, 4, 1)
SMALL = Config(16, 16, 4, 1)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 1, 1), (2, 1, 5), (3, 7, 2), (1, 33, 40), (2, 45, 70), (0, 5, 4), (2, 0, 3), (2, 3, 0))


def positive(*shape: int) -> Tensor:
    return torch.rand(shape) + 0.5


def symmetric(b: int, n: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    x = torch.randn(b, n, n)
    return (scale * (x + x.mT)).to(dtype)


def hollow(b: int, n: int, dtype: torch.dtype, scale: float = 0.1) -> Tensor:
    x = torch.randn(b, n, n).tril(-1) * scale
    return (x + x.mT).to(dtype)


def skewed(b: int, n: int, dtype: torch.dtype, norm: float = 0.6) -> Tensor:
    x = torch.randn(b, n, n).tril(-1)
    return (norm * (x - x.mT) / (2 * max(n, 1) ** 0.5)).to(dtype)


def orthogonal(b: int, n: int, dtype: torch.dtype) -> Tensor:
    return torch.linalg.qr(torch.randn(b, n, n))[0].to(dtype).contiguous() if n else torch.zeros(b, n, n, dtype=dtype)


def double(*args):
    return [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]


# --- gram -------------------------------------------------------------------------------------------------------------


def check_gram_integers(module) -> None:
    """Integers have no rounding: bit for bit, with transposed and strided inputs, several tiles, and a mirror image."""
    for b, n, k in SHAPES:
        x, s = torch.randint(-3, 4, (b, n, k)).float(), torch.randint(1, 3, (b, k)).float()
        c = torch.randint(-3, 4, (b, n, n)).float()
        c = c + c.mT
        want = 2 * (x * s.unsqueeze(-2)) @ x.mT - c
        for config in (TILE, SMALL):
            assert torch.equal(module.gram(x, s, 2.0, -1.0, c, config), want)
            assert torch.equal(module.gram(x.mT.contiguous().mT, s, 2.0, -1.0, c, config), want)
            assert torch.equal(module.gram(torch.stack([x, x], -1)[..., 0], s, 2.0, -1.0, c, config), want)
        assert torch.equal(module.gram(x, None, 1.0, 0.0, None, SMALL), x @ x.mT)


def test_gram_integers():
    check_gram_integers(gram)


@pytest.mark.parametrize(
    "old,new",
    [
        ("store_both(out, w, w", "store_both(out, w, -w"),
        ("scale += matrix * k", "scale += 0"),
        ("+= beta *", "-= beta *"),
    ],
)
def test_gram_mutants_are_caught(mutant, old, new):
    with pytest.raises(AssertionError):
        check_gram_integers(mutant(gram, old, new))


@pytest.mark.parametrize(
    "old,new",
    [
        ("acc = tl.zeros((BLOCK, BLOCK), tl.float32)\n    for start in range(0, k, BK):\n        mk = ok < k - start",
         "acc = tl.zeros((BLOCK, BLOCK), tl.float32)\n    for start in range(0, k, BK):\n        mk = ok < BK"),
        ("t - i * (i + 1) // 2", "t - i * (i - 1) // 2"),
        ("mi, mj = oi < n - i * BLOCK,", "mi, mj = oi < n - i * BLOCK - 1,"),
    ],
)  # fmt: skip
def test_mutants_of_the_shared_functions_are_caught(mutant, monkeypatch, old, new):
    """The mask dropped along `k`, a wrong triangle, a wrong mask along the rows."""
    x = torch.randint(-3, 4, (2, 45, 64)).float()[..., :50]  # so that reading on stays inside the buffer
    want = x @ x.mT
    assert torch.equal(gram.gram(x, None, 1.0, 0.0, None, SMALL), want)
    monkeypatch.setattr(gram, "tiles", mutant(tiles, old, new))
    assert not torch.equal(gram.gram(x, None, 1.0, 0.0, None, SMALL), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gram(dtype, shape, composition, assert_as_accurate):
    b, n, k = shape
    args = torch.randn(b, n, k).to(dtype), positive(b, k).to(dtype), 0.7, -0.3, symmetric(b, n, dtype)
    got = gram.gram(*args, TILE)
    assert_as_accurate(got, composition(reference.gram, *args), reference.gram(*double(*args)))
    assert torch.equal(got, got.mT) and got.dtype == dtype


# --- skew -------------------------------------------------------------------------------------------------------------


def check_gram_skew_integers(module) -> None:
    """Gaps that are powers of two: bit for bit."""
    for b, n, k in SHAPES:
        x, s = torch.randint(-3, 4, (b, n, k)).float(), torch.randint(1, 3, (b, k)).float()
        d = 2.0 ** torch.randint(0, 2, (b, n))  # gaps of 0 and 1
        want, diag_w, sq_norm = reference.gram_skew(x, d, s, 1e-6)
        got = module.gram_skew(x.mT.contiguous().mT, d, s, 1e-6, SMALL)
        assert torch.equal(got[0], want) and torch.equal(got[1], diag_w) and torch.equal(got[2], sq_norm)
        w = (x * s.unsqueeze(-2)) @ x.mT
        assert torch.equal(module.skew_generator(w, d, 1e-6), want)


def test_gram_skew_integers():
    check_gram_skew_integers(skew)


@pytest.mark.parametrize(
    "old,new",
    [
        ("tl.store(squares", "tiles.store_both(out + matrix * n * n, u, u, i, j, n, BLOCK)\n    tl.store(squares"),
        ("u = u - tl.trans(u)", "u = u"),
        ("tl.where(near, 0.0, -w", "tl.where(near, w, -w"),
        ("tiles.load_vector(d, j, n", "tiles.load_vector(d, i, n"),
        ("tl.where(i == j, 1.0, 2.0)", "1.0"),
    ],
)
def test_gram_skew_mutants_are_caught(mutant, old, new):
    with pytest.raises(AssertionError):
        check_gram_skew_integers(mutant(skew, old, new))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gram_skew(dtype, shape, composition, assert_as_accurate):
    b, n, k = shape
    d = 1 + (torch.arange(n) + 0.1 * torch.rand(b, n)) / max(n, 1)  # no near-equal pair that would magnify every error
    args = torch.randn(b, n, k).to(dtype), d.to(dtype), positive(b, k).to(dtype), 1e-6
    got, exact = skew.gram_skew(*args, TILE), reference.gram_skew(*double(*args))
    for x, y, z in zip(got, composition(reference.gram_skew, *args), exact, strict=True):
        assert_as_accurate(x, y, z)
    assert torch.equal(got[0], -got[0].mT)
    w = symmetric(b, n, dtype)
    got, exact = skew.skew_generator(w, args[1], 1e-6), reference.skew_generator(*double(w, args[1], 1e-6))
    assert_as_accurate(got, composition(reference.skew_generator, w, args[1], 1e-6), exact)
    assert torch.equal(got, -got.mT)


# --- track ------------------------------------------------------------------------------------------------------------


def tracked(x: Tensor, weight: Tensor, diag: Tensor, old: Tensor | None, keep: Tensor, epsilon: float):
    """Generator and new residual of one side."""
    t = (x * weight.unsqueeze(-2)) @ x.mT
    if old is not None:
        t = t + keep[:, None, None] * old
    gap, total = diag[:, :, None] - diag[:, None, :], diag[:, :, None] + diag[:, None, :]
    generator = (-0.5 * t * gap / (gap**2 + epsilon**2 * total**2)).tril(-1)
    lower = t.tril(-1)
    return generator - generator.mT, lower + lower.mT


def check_track(module, dtype=torch.float32, assert_as_accurate=None) -> None:
    """Both sides, in place, with one matrix that is not usable."""
    for b, n, m in ((3, 7, 2), (2, 45, 70), (2, 1, 5), (0, 3, 4)):
        for sides in ((True, True), (True, False), (False, True)):
            x, keep = torch.randn(b, n, m).to(dtype), torch.rand(b, 2)
            weight, diag = (positive(b, m), positive(b, n)), (positive(b, n), positive(b, m))
            usable = torch.arange(b) != 1
            x[~usable] = float("nan")
            old = tuple(hollow(b, k, dtype, 1.0) for k in (n, m))
            new = tuple(t.clone() for t in old)
            present = tuple(t if p else None for t, p in zip(diag, sides, strict=True))
            got = module.track(x.mT.contiguous().mT, weight, present, new, new, keep, usable, 0.1, dtype, SMALL)
            for side, (z, p) in enumerate(zip((x, x.mT), sides, strict=True)):
                if not p:
                    assert got[side] is None and torch.equal(new[side], old[side])
                    continue
                generator, residual = got[side][usable], new[side][usable]
                args = [t[usable] for t in (z, weight[side], diag[side], old[side], keep[:, side])]
                exact = tracked(*double(*args), 0.1)
                if assert_as_accurate is None:
                    torch.testing.assert_close(generator, exact[0].float(), rtol=1e-4, atol=1e-4)
                    torch.testing.assert_close(residual, exact[1].float(), rtol=1e-4, atol=1e-4)
                else:
                    composed = tracked(*(t.to(dtype) for t in args), 0.1)
                    assert_as_accurate(generator, composed[0], exact[0])
                    assert_as_accurate(residual, composed[1], exact[1])
                assert torch.equal(got[side], -got[side].mT) and torch.equal(new[side], new[side].mT)
                assert torch.equal(new[side][~usable], old[side][~usable])
                assert (got[side][~usable] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_track(dtype, assert_as_accurate):
    check_track(track, dtype, assert_as_accurate)


@pytest.mark.parametrize(
    "old,new",
    [
        ("store_both(out, generator, -generator", "store_both(out, generator, generator"),
        ("tl.where(ok, w +", "tl.where(True, w +"),
        ("generator = generator - tl.trans(generator)", "generator = generator"),
        ("w = tl.where(below, w, 0.0)", "w = 0.5 * w"),
        ("2 * matrix + right.to(tl.int32)", "2 * matrix"),
        ("gap * gap + width", "gap * gap - width"),
    ],
)
def test_track_mutants_are_caught(mutant, old, new):
    with pytest.raises(AssertionError):
        check_track(mutant(track, old, new))


# --- Cayley chain -----------------------------------------------------------------------------------------------------


def check_cayley(module, dtype=torch.float32, orders=(2, 3, 4, 8), composition=None, assert_as_accurate=None) -> None:
    for order in orders:
        for b, n, m in ((2, 20, 35), (1, 1, 5), (0, 3, 4)):
            bases, generators = ([f(b, k, dtype) for k in (n, m)] for f in (orthogonal, skewed))
            residuals, d = [hollow(b, k, dtype) for k in (n, m)], [positive(b, k) for k in (n, m)]
            f = module.generator_map(bases, generators, order, limit=0.3, config=SMALL)
            turned, v = module.turn(bases, f, residual=residuals, diag=d, config=SMALL)
            new_d, new_r, new_b = ([torch.empty(t.shape, dtype=t.dtype) for t in ts] for ts in (d, residuals, bases))
            module.conjugate(f, v, d, new_d, new_r, b=new_b, turned=turned, config=SMALL)
            for side in (0, 1):
                args = bases[side], generators[side], d[side], residuals[side], 0.3, order, None
                exact = reference.cayley_track(*double(*args))
                results = new_b[side], new_d[side], new_r[side]
                if assert_as_accurate is None:
                    for x, z in zip(results, exact, strict=True):
                        torch.testing.assert_close(x, z.float(), rtol=1e-4, atol=1e-4)
                else:
                    for x, y, z in zip(results, composition(reference.cayley_track, *args), exact, strict=True):
                        assert_as_accurate(x, y, z)
                assert torch.equal(new_r[side], new_r[side].mT) and torch.equal(new_b[side], turned[side])
                assert (new_r[side].diagonal(dim1=-2, dim2=-1) == 0).all()
                update = module.generator_map(
                    (bases[side], None), (generators[side], None), order, step=torch.full((b,), 0.5), config=SMALL
                )
                (got, _), _ = module.turn((bases[side], None), update, config=SMALL)
                args = bases[side], generators[side], torch.full((b,), 0.5, dtype=dtype), order, True, None
                exact = reference.cayley_update(*double(*args))
                if assert_as_accurate is None:
                    torch.testing.assert_close(got, exact.float(), rtol=1e-4, atol=1e-4)
                else:
                    assert_as_accurate(got, composition(reference.cayley_update, *args), exact)


@pytest.mark.parametrize("order", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_cayley(dtype, order, composition, assert_as_accurate):
    check_cayley(cayley, dtype, (order,), composition, assert_as_accurate)


@pytest.mark.parametrize(
    "order,old,new",
    [
        (2, "SIGN * tiles.product", "tiles.product"),
        (2, "symmetric -= identity", "symmetric += identity"),
        (2, "even + odd, even - odd", "even + odd, even + odd"),
        (2, "* dj[None, :]", "* dj[:, None]"),
        (2, "w += tiles.load_tile(b, i, j", "w += 0 * tiles.load_tile(b, i, j"),
        (2, "w = tl.where(o[:, None] > o[None, :], w, tl.trans(w))", "w = w"),
        (2, "        if i != j:\n            _move", "        if i == j:\n            _move"),
        (2, "tl.minimum(limit / tl.maximum(sigma, TINY), 1.0)", "1.0 + 0.0 * sigma"),
        (3, "1.0 + 0.25 * turn * turn", "1.0"),
        (3, "s * s * s * x3", "s * s * x3"),
        (4, "else QUARTIC_A", "else QUARTIC_B"),
        (4, "(s * s) * (s * s) * x4", "(s * s) * x4"),
        (8, "x2 + odd, x2 - odd", "x2 + odd, x2 + odd"),
        (8, "+ s2 * x6", "- s2 * x6"),
    ],
)  # fmt: skip
def test_cayley_mutants_are_caught(mutant, order, old, new):
    with pytest.raises(AssertionError):
        check_cayley(mutant(cayley, old, new), orders=(order,))


def check_lost(module) -> None:
    """A turn that makes an eigenvalue negative: with a bfloat16 residual it stays, float32 follows."""
    generator = torch.tensor([[[0.0, 1.0], [-1.0, 0.0]]]) * 0.4142  # tan 22.5°
    for dtype in DTYPES[:2]:
        base, d = torch.eye(2, dtype=dtype)[None], torch.ones(1, 2)
        residual, g = torch.tensor([[[0.0, 1.05], [1.05, 0.0]]], dtype=dtype), generator.to(dtype)
        f = module.generator_map((base, None), (g, None), 8, limit=0.9, config=SMALL)
        _, v = module.turn((base, None), f, residual=(residual, None), diag=(d, None), config=SMALL)
        new_d = torch.empty(1, 2)
        module.conjugate(f, v, (d, None), (new_d, None), (residual.clone(), None), config=SMALL)
        want = reference.cayley_track(base, g, d, residual, 0.9, 8, None)[1]
        torch.testing.assert_close(new_d, want, rtol=0.02, atol=0.02)
        assert (new_d.min() == 1) == (dtype == torch.bfloat16)


def test_lost_eigenvalues(mutant):
    check_lost(cayley)
    for old, new in (("new > dj * LOST", "new > -9.0"), ("if r.dtype.element_ty == tl.bfloat16:", "if 1 == 1:")):
        with pytest.raises(AssertionError):
            check_lost(mutant(cayley, old, new))


def test_cayley_integers():
    """Every product of the chain bit for bit: `X²`, `BᵀB`, `B F`, `R F` and `Fᵀ V` of small integers, with unit steps."""
    b, n = 2, 21
    base, generator = torch.randint(-1, 2, (b, n, n)).float(), torch.randint(-1, 2, (b, n, n)).float().tril(-1)
    generator = generator - generator.mT
    residual = torch.randint(-2, 3, (b, n, n)).float().tril(-1)
    residual, d = residual + residual.mT, torch.randint(1, 5, (b, n)).float()
    f, _ = cayley.generator_map((base, None), (generator, None), 2, step=torch.ones(b), config=SMALL)
    eye = torch.eye(n)
    want = 2 * generator + 2 * generator @ generator - 0.5 * (base.mT @ base - eye)
    assert torch.equal(f, want)
    (turned, _), v = cayley.turn((base, None), (f, None), residual=(residual, None), diag=(d, None), config=SMALL)
    assert torch.equal(turned, base + base @ f)
    new_d, new_r = torch.empty(b, n), torch.empty(b, n, n)
    cayley.conjugate((f, None), v, (d, None), (new_d, None), (new_r, None), config=SMALL)
    t = (eye + f).mT @ (torch.diag_embed(d) + residual) @ (eye + f)
    assert torch.equal(new_d, t.diagonal(dim1=-2, dim2=-1))
    assert torch.equal(new_r, t - torch.diag_embed(new_d))


def test_stochastic_rounding_in_the_epilogues_is_the_references():
    """On integers the float32 results are exact, so the rounded bits must be those of `reference.stochastic_round`."""
    b, n = 2, 37
    base = torch.randint(-40, 41, (b, n, n)).bfloat16()
    f = torch.randint(-1, 2, (b, n, n)).bfloat16()
    residual, d = hollow(b, n, torch.bfloat16, 40.0).round(), torch.randint(1, 5, (b, n)).float()
    seed = torch.randint(2**60, (b,))
    seeds = (seed, None)
    (turned, _), (v, _) = cayley.turn(
        (base, None), (f, None), residual=(residual, None), diag=(d, None), seed=seeds, config=SMALL
    )
    want = base.float() + base.float() @ f.float()
    assert torch.equal(turned, reference.stochastic_round(want, seed)) and not torch.equal(turned, want.bfloat16())
    new_d, new_r = torch.empty(b, n), torch.empty(b, n, n, dtype=torch.bfloat16)
    cayley.conjugate((f, None), (v, None), (d, None), (new_d, None), (new_r, None), seed=seeds, config=SMALL)
    t = v.float() + f.float().mT * d.unsqueeze(-2) + f.float().mT @ v.float()
    lower = reference.stochastic_round(t, ~seed).tril(-1)
    assert torch.equal(new_r, lower + lower.mT)
    nearest, _ = cayley.turn((base, None), (f, None), config=SMALL)
    assert torch.equal(nearest[0], want.bfloat16())


# --- rotate and root --------------------------------------------------------------------------------------------------

ROTATIONS = ((2, 20, 35), (1, 1, 3), (2, 33, 16), (0, 3, 4))


def check_rotate(module, pairs=((torch.float32, torch.float32),), composition=None, assert_as_accurate=None) -> None:
    for dtype, basis in pairs:
        for b, n, m in ROTATIONS:
            for sides in ((True, True), (True, False), (False, True)):
                g, d_c, d_k, alpha = torch.randn(b, n, m).to(dtype), positive(b, n), positive(b, m), positive(b)
                b_c, b_k = (orthogonal(b, k, basis) if p else None for k, p in zip((n, m), sides, strict=True))
                x, rows, cols, squares = module.rotate(g, b_c, d_c, b_k, d_k, config=SMALL)
                exact = reference.rotate(*double(g, b_c, b_k))
                moments = (
                    (exact.square() / d_k.double().unsqueeze(-2)).sum(-1),
                    (exact.square() / d_c.double().unsqueeze(-1)).sum(-2),
                    exact.square().sum((-2, -1)),
                )
                u, u_squares = module.apply_root(g, b_c, d_c, b_k, d_k, alpha, 2.0, config=SMALL)
                exact_u, exact_squares = reference.apply_root(*double(g, b_c, d_c, b_k, d_k, alpha, 2.0))
                close = {"rtol": 1e-4, "atol": 1e-4} if torch.bfloat16 not in (dtype, basis) else {"rtol": 0.05, "atol": 0.05}
                for got, want in zip((rows.sum(1), cols.sum(1), squares.sum(-1)), moments, strict=True):
                    torch.testing.assert_close(got, want.float(), **close)
                torch.testing.assert_close(u_squares.sum(-1), exact_squares.sum(-1).float(), **close)
                if assert_as_accurate is None:
                    torch.testing.assert_close(x, exact.float(), **close)
                    torch.testing.assert_close(u, exact_u.float(), **close)
                else:
                    as_bf16 = [None if t is None else t.to(basis) for t in (g, b_c, d_c, b_k, d_k, alpha)]
                    composed = composition(reference.rotate, as_bf16[0], as_bf16[1], as_bf16[3])
                    assert_as_accurate(x, composed, exact)
                    assert_as_accurate(u, composition(reference.apply_root, *as_bf16, 2.0)[0], exact_u)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("basis", [torch.float32, torch.bfloat16])
def test_rotate(dtype, basis, composition, assert_as_accurate):
    check_rotate(rotate, ((dtype, basis),), composition, assert_as_accurate)


@pytest.mark.parametrize(
    "old,new",
    [
        ("square / dj[None, :], 1)", "square / dj[None, :], 1) * 0.5"),
        ("(matrix * down + i) * m", "(matrix * down) * m"),
        ("power * tl.log2(dj)", "tl.log2(dj)"),
        ("_product(_product(b_c.mT, g, torch.float32", "_product(_product(b_c, g, torch.float32"),
        ("tl.store(squares + tl.program_id(0)", "tl.store(squares + t"),
    ],
)
def test_rotate_mutants_are_caught(mutant, old, new):
    with pytest.raises(AssertionError):
        check_rotate(mutant(rotate, old, new))


def test_rotate_integers():
    g, b_c, b_k = (torch.randint(-3, 4, s).float() for s in ((2, 20, 35), (2, 20, 20), (2, 35, 35)))
    ones = torch.ones(2, 20), torch.ones(2, 35)
    x, *_ = rotate.rotate(g.mT.contiguous().mT, b_c, ones[0], b_k, ones[1], config=SMALL)
    want = b_c.mT @ g @ b_k
    assert torch.equal(x, want)
    u, _ = rotate.apply_root(g.mT.contiguous().mT, b_c, ones[0], None, ones[1], torch.ones(2), 1.0, config=SMALL)
    assert torch.equal(u, b_c @ (b_c.mT @ g))


def test_nothing_is_lost_between_the_two_rotations():
    """A strong direction beside weak ones: rounding to bf16 between the products would bury them."""
    n = 32
    b_c, b_k = orthogonal(1, n, torch.bfloat16), orthogonal(1, n, torch.bfloat16)
    strong = b_c[..., :1].float() @ b_k[..., :1].float().mT * 1e3
    g = strong + torch.randn(1, n, n) * 1e-2
    exact = reference.rotate(*double(g, b_c, b_k))
    x, *_ = rotate.rotate(g, b_c, positive(1, n), b_k, positive(1, n), config=SMALL)
    rounded = (b_c.mT @ g.bfloat16()) @ b_k
    weak = (slice(None), slice(1, None), slice(1, None))
    assert (x[weak].double() - exact[weak]).norm() < 0.01 * (rounded[weak].double() - exact[weak]).norm()


# --- average ----------------------------------------------------------------------------------------------------------


def check_average(module) -> None:
    """Against the diagonal's meaning in `reference.tracked_diagonal`; one gradient is NaN, one negligible."""
    b, n, m, floor, streams = 4, 21, 1100, 1e-3, (12345, 678)
    x = torch.randn(b, n, m, dtype=torch.float64) * 0.1
    x[0, 0, 0], x[1] = float("nan"), 1e-16
    d_c, d_k = positive(b, n), positive(b, m)
    d_c[2, 0] = 1e5  # lifts the floor over the others
    scale, seed = positive(b), torch.arange(b)
    updates = torch.tensor([2.0, 2.0, 2.0, 0.0])
    before = [t.clone() for t in (d_c, d_k, scale, updates)]
    parts = [(x.square() / d_k.double().unsqueeze(-2)).sum(-1), (x.square() / d_c.double().unsqueeze(-1)).sum(-2)]
    shares = torch.arange(1, 12) / 66  # of eleven parts
    parts = [torch.stack([share * p for share in shares], 1).float() for p in parts] + [x.square().sum(-1).float()]
    new = module.average(
        tuple(parts), d_c, d_k, scale, updates, seed, beta=0.2, damping=0.3, relative_floor=floor, streams=streams,
        negligible=1e-30,
    )
    assert new.finite.tolist() == [False, True, True, True] and new.usable.tolist() == [False, False, True, True]
    assert updates.tolist() == [2.0, 2.0, 3.0, 1.0]
    for now, old in zip((d_c, d_k, scale), before, strict=False):
        assert torch.equal(now[:2], old[:2])
    for i in (2, 3):
        beta = torch.tensor(0.25 if i == 2 else 0.5, dtype=torch.float64)
        alpha = before[2][i].double() if i == 2 else x[i].square().mean()
        logs = []
        for side, (z, k) in enumerate(((x[i], m), (x[i].mT, n))):
            old, other = before[side][i].double(), before[1 - side][i].double()
            weight, damping = 1 / (other * alpha * k), 0.3 * (1 / other).mean() / alpha
            diag, shrink, log_mean = reference.tracked_diagonal(z, old, weight, beta, damping)
            logs.append(log_mean)
            for got, want in (
                ((new.diag_c, new.diag_k)[side][i], diag),
                ((new.weight_c, new.weight_k)[side][i], beta * shrink * weight),
                (new.keep[i, side], (1 - beta) * shrink),
                (new.floor[i, side], floor * diag.max()),
                ((d_c, d_k)[side][i], diag.clamp(min=floor * diag.max())),
            ):
                torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(scale[i].double(), alpha * torch.exp((logs[0] + logs[1]) / 2), rtol=1e-5, atol=0)
    assert torch.equal(new.seeds[0], seed + updates.long() * streams[0])
    assert torch.equal(new.seeds[1], new.seeds[0] + streams[1])


def test_average():
    check_average(average)


@pytest.mark.parametrize(
    "old,new",
    [
        ('tl.abs(square) < float("inf")', "square == square"),
        ("is_finite & (square / n / m > negligible)", "is_finite"),
        ("square / n / m > negligible", "square > 0"),
        ("tl.maximum(new, floor)", "new"),
        ("tiles.mean_reciprocal(d_k, m, BLOCK)", "tiles.mean_reciprocal(d_c, n, BLOCK)"),
        ("1.0 / (count + 1.0)", "1.0 / count"),
        ("logs += tl.where(inside, tl.log(new), 0.0)", "logs += tl.log(new) + 1"),
        ("part < count", "part < 1"),
    ],
)
def test_average_mutants_are_caught(mutant, old, new):
    changed = mutant(average, old, new)
    if old == 'tl.abs(square) < float("inf")':  # also false for NaN: what it lets through is an infinity
        with recording() as launches:
            parts = [torch.ones(1, 1, 2), torch.ones(1, 1, 3), torch.full((1, 1), float("inf"))]
            state = [torch.ones(1, 2), torch.ones(1, 3), torch.ones(1), torch.ones(1), None]
            options = {"beta": 0.5, "damping": 0.0, "relative_floor": 0.0, "negligible": 0.0, "streams": (1, 1)}
            assert changed.average(parts, *state, **options).finite.item()
            assert not average.average(parts, *state, **options).finite.item()
        assert len(launches) == 2
        return
    with pytest.raises(AssertionError):
        check_average(changed)
