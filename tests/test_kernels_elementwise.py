"""Rounding, spectrum, inverse-free factor, momentum, parameter and elementwise-optimizer kernels, in the interpreter.

Each check is a function of the kernel's module, so that a mutant of it can be shown to fail.
"""

import copy
import itertools

import pytest
import torch
from torch import Tensor

import spectral_ops as ops
from spectral_ops import reference
from spectral_ops.kernels import diagonal, factor, rounding, spectrum, update
from spectral_ops.kernels.config import Config
from spectral_ops.kernels.launch import recording

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),  # NumPy's, of lanes that are not stored, NaN and infinity
]

SMALL = Config(16, 16, 4, 1)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAN = float("nan")


def positive(*shape: int) -> Tensor:
    return torch.rand(shape) + 0.5


def integers(*shape: int, largest: int = 4) -> Tensor:
    return torch.randint(-largest, largest + 1, shape).float()


def double(*args):
    return [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]


def clones(tensors):
    return [x.clone() for x in tensors]


def bits(x: Tensor) -> Tensor:
    return x.view({2: torch.int16, 4: torch.int32}[x.element_size()])


def padded(*shape: int, dtype: torch.dtype = torch.float32, offset: int = 8) -> tuple[Tensor, Tensor]:
    """A contiguous tensor inside a buffer of sevens, from element `offset` on; and the buffer."""
    size = int(torch.Size(shape).numel())
    buffer = torch.full((size + offset + 5000,), 7.0, dtype=dtype)
    return buffer[offset : offset + size].view(shape), buffer


def assert_only_changed(x: Tensor, buffer: Tensor) -> None:
    """Nothing of a padded tensor's buffer was written but the tensor."""
    x.fill_(7)
    assert (buffer == 7).all()


# --- rounding ---------------------------------------------------------------------------------------------------------


def check_rounding(module) -> None:
    """Bit for bit, also what is not finite."""
    for b, n, m in ((1, 1, 1), (2, 1, 5000), (3, 7, 2), (1, 33, 270), (2, 17, 9), (0, 5, 4), (2, 0, 3), (2, 3, 0)):
        x, seed = torch.randn(b, n, m) * 10.0 ** torch.randint(-38, 38, (b, n, m)), torch.randint(-(2**62), 2**62, (b,))
        x.view(-1)[:: max(x.numel() // 7, 1)] = torch.tensor(float("inf"))
        x.view(-1)[1 :: max(x.numel() // 7, 2)] = torch.tensor(-float("inf"))
        with recording() as launches:
            got = module.stochastic_round(x, seed)
        assert torch.equal(bits(got), bits(reference.stochastic_round(x, seed)))
        assert len(launches) == (x.numel() > 0)
    assert module.stochastic_round(torch.full((1, 1, 1), NAN), torch.zeros(1, dtype=torch.int64)).isnan().all()


def test_rounding():
    check_rounding(rounding)


@pytest.mark.parametrize(
    "old,new",
    [
        ("tl.load(seed + matrix), i, j", "tl.load(seed + matrix), i, i"),
        ("tl.load(seed + matrix)", "tl.load(seed)"),
        ("out + matrix * n * m", "out + matrix * n"),
        ("tiles.to_bfloat16(tile, bits)", "tiles.to_bfloat16(tile, None)"),
    ],
)
def test_rounding_mutants_are_caught(mutant, old, new):
    with pytest.raises(AssertionError):
        check_rounding(mutant(rounding, old, new))


# --- spectrum ---------------------------------------------------------------------------------------------------------

SPECTRA = ((3, 21, 1100), (2, 1, 5), (1, 1, 1), (2, 1024, 3), (0, 3, 4))


def spectrum_arguments(b: int, n: int, m: int, dtype: torch.dtype):
    tensors = [positive(*s).to(dtype) for s in ((b, n), (b, m), (b,), (b, n), (b, m), (b,))]
    return [*tensors[:5], 0.3 * tensors[5]]  # the share of the new curvature is less than 1


def check_spectrum(module, dtype=torch.float32, composition=None, assert_as_accurate=None) -> None:
    for (b, n, m), gamma, exact in itertools.product(SPECTRA, (0.0, 1.0), (True, False)):
        args = [*spectrum_arguments(b, n, m, dtype), gamma, 0.0 if exact else 0.3, exact]
        with recording() as launches:
            got = module.spectrum_update(*args)
        assert len(launches) == (b > 0)
        want = reference.spectrum_update(*double(*args))
        composed = want if composition is None else composition(reference.spectrum_update, *args)
        for x, y, z in zip(got, composed, want, strict=True):
            if assert_as_accurate is None:
                torch.testing.assert_close(x, z.float(), rtol=1e-5, atol=1e-6)
            else:
                assert x.dtype == dtype
                assert_as_accurate(x, y, z)


@pytest.mark.parametrize("dtype", DTYPES)
def test_spectrum(dtype, composition, assert_as_accurate):
    check_spectrum(spectrum, dtype, composition, assert_as_accurate)


@pytest.mark.parametrize(
    "old,new",
    [
        ("< n, x, 0.0)", "< n + 1, x, 0.0)"),
        ("share_c, share_k = 1.0 / (scale * m), 1.0 / (scale * n)", "share_c, share_k = 1.0 / (scale * n), 1.0 / (scale * m)"),
        ("damping * m * tiles.mean_reciprocal", "damping * n * tiles.mean_reciprocal"),
        ("BLOCK) - mean\n", "BLOCK)\n"),
        ("(beta if EXACT else 1.0) * 0.5", "0.5"),
    ],
)
def test_spectrum_mutants_are_caught(mutant, old, new):
    with pytest.raises(AssertionError):
        check_spectrum(mutant(spectrum, old, new))


# --- factor -----------------------------------------------------------------------------------------------------------


def check_factor_integers(module) -> None:
    """Norms that are powers of two: bit for bit, for all strides, with the limit at work and without."""
    config = Config(32, 32, 4, 1)
    for (b, n), value in itertools.product(((1, 1), (2, 2), (3, 7), (2, 70), (0, 5), (2, 0)), (8.0, 0.25)):
        k, step, norm = integers(b, n, n), torch.tensor([1.0, 2.0, 4.0])[:b], value * torch.tensor([1.0, 2.0, 0.5])[:b]
        m = torch.zeros(b, n, n)
        if n >= 4:
            m[:, (0, 1, 2, 0), (-1, -1, -1, -2)] = norm[:, None] / 2
        elif n:
            m[:, 0, -1] = norm
        want = k - (step / norm.clamp(min=1))[:, None, None] * (k @ m)
        transposed = k.mT.contiguous().mT, m.mT.contiguous().mT
        for left, right in ((k, m), (transposed[0], torch.stack([m, m], -1)[..., 0]), transposed)[2 * (n > 32) :]:
            with recording() as launches:
                assert torch.equal(module.factor_update(left, right, step, config), want)
            assert len(launches) == (2 if k.numel() else 0)


def test_factor_integers():
    check_factor_integers(factor)


@pytest.mark.parametrize(
    "old,new",
    [
        ("tl.where(norm <= 1, 1.0, norm)", "1.0"),
        ("BLOCK) - (bounded * w", "BLOCK) + (bounded * w"),
        ("_load(k, k_row, k_col, i", "_load(k, k_col, k_row, i"),
        (
            "inside = (o < n - i * BLOCK)[:, None] & (o < n - j * BLOCK)[None, :]",
            "inside = (o < n - i * BLOCK)[:, None] & (o < BLOCK)[None, :]",
        ),
        ("squares + matrix * parts", "squares"),
        ("t // size, t % size, n", "t // size, t // size, n"),
    ],
)
def test_factor_mutants_are_caught(mutant, old, new):
    with pytest.raises(AssertionError):
        check_factor_integers(mutant(factor, old, new))


@pytest.mark.parametrize("dtypes", [*zip(DTYPES, DTYPES, strict=True), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("scale", [0.01, 10.0])
def test_factor(dtypes, scale, composition, assert_as_accurate):
    for b, n in ((2, 1), (3, 7), (2, 40)):
        k, m, step = torch.randn(b, n, n).to(dtypes[0]), (scale * torch.randn(b, n, n)).to(dtypes[1]), positive(b)
        got = factor.factor_update(k, m, step, SMALL)
        composed = composition(reference.factor_update, k, m.to(k.dtype), step.to(k.dtype))
        assert got.dtype == k.dtype
        assert_as_accurate(got, composed, reference.factor_update(*double(k, m, step)))


def check_factor_rounding(module) -> None:
    """Fractions that bfloat16 cannot hold, with the limit at work (n = 16) and without: bit for bit. Other dtypes have no
    use for random bits."""
    for b, n in ((1, 1), (3, 7), (2, 16), (2, 37), (0, 5), (2, 0)):
        k, step, seed = integers(b, n, n, largest=255), torch.tensor([1.0, 2.0, 4.0])[:b], torch.randint(-(2**62), 2**62, (b,))
        m = (1 - 2 * torch.randint(2, (b, n, n))) * (1.0 if n == 16 else 1 / 64)
        k16, m16 = k.bfloat16(), m.bfloat16()
        want = reference.factor_update(k16, m16, step, seed)
        if n > 1 and b:
            assert not torch.equal(want, reference.factor_update(k16, m16, step))
        strided, transposed = torch.stack([m16, m16], -1)[..., 0], m16.mT.contiguous().mT
        for left, right in ((k16, strided), (k16.mT.contiguous().mT, transposed), (k16, m)):
            assert torch.equal(bits(module.factor_update(left, right, step, SMALL, seed)), bits(want))
        assert torch.equal(module.factor_update(k, m, step, SMALL, seed), reference.factor_update(k, m, step))


def test_factor_rounding():
    check_factor_rounding(factor)


@pytest.mark.parametrize(
    "old,new",
    [
        ("tl.load(seed + matrix), i, j", "tl.load(seed + matrix), j, i"),
        ("tl.load(seed + matrix)", "tl.load(seed)"),
        ("element_ty, bits)", "element_ty, None)"),
    ],
)
def test_factor_rounding_mutants_are_caught(mutant, old, new):
    with pytest.raises(AssertionError):
        check_factor_rounding(mutant(factor, old, new))


def check_factor_step_0(module, seed=None) -> None:
    """Every bit stays, also of a zero's sign."""
    for dtype in DTYPES:
        k, m = torch.randn(2, 21, 21).to(dtype), torch.randn(2, 21, 21).to(dtype)
        k[:, ::2, 3] = -0.0
        assert torch.equal(bits(module.factor_update(k, m, torch.zeros(2), SMALL, seed)), bits(k))


@pytest.mark.parametrize("seed", [None, torch.tensor([5, -6])])
def test_factor_with_step_0(mutant, seed):
    check_factor_step_0(factor, seed)
    with pytest.raises(AssertionError):
        check_factor_step_0(mutant(factor, "bounded * w + 0.0", "bounded * w"), seed)


@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_stochastic_factor_updates_have_the_references_bits(batch, request):
    k, m = integers(*batch, 35, 35, largest=255).bfloat16(), torch.full((*batch, 35, 35), 1 / 64)
    stochastic = {"rounding": "stochastic"}
    calls = [(k.mT, {**stochastic, "seed": seed}) for seed in (3, torch.randint(2**62, batch))]
    calls += [(k.float(), stochastic), (k, {})]
    want = [ops.factor_update(x, m, 2.0, **options) for x, options in calls]
    request.getfixturevalue("kernels_on_cpu")
    for (x, options), expected in zip(calls, want, strict=True):
        with recording() as launches:
            assert torch.equal(bits(ops.factor_update(x, m, 2.0, **options)), bits(expected))
        assert len(launches) == 2


def test_factor_with_a_momentum_that_is_not_finite_is_the_references():
    k, step = integers(3, 5, 5), torch.ones(3)
    m = integers(3, 5, 5)
    m[0, 0, 0], m[1, 0, 0] = NAN, float("inf")
    got, want = factor.factor_update(k, m, step, SMALL), reference.factor_update(k, m, step)
    torch.testing.assert_close(got, want, equal_nan=True)
    assert got[:2].isnan().any() and got[2].isfinite().all()


# --- momentum ---------------------------------------------------------------------------------------------------------

MOMENTA = ((3, 20, 55), (2, 1, 1), (1, 7, 13), (2, 33, 62), (0, 3, 4), (2, 0, 3))


def check_momentum_integers(module) -> None:
    """Halves of integers: bit for bit in every dtype. A matrix that is not finite keeps its bits."""
    for (b, n, m), dtype, nesterov, maximize in itertools.product(MOMENTA, DTYPES, (True, False), (True, False)):
        (buffer, whole), g, finite = padded(b, n, m, dtype=dtype), integers(b, n, m).to(dtype), torch.arange(b) != 1
        buffer.copy_(integers(b, n, m))
        g[~finite] = NAN
        before, sign = buffer.clone(), -1 if maximize else 1
        with recording() as launches:
            direction = module.momentum(buffer, g, finite, 0.5, nesterov, maximize)
        assert len(launches) == (buffer.numel() > 0)
        new = 0.5 * before[finite].float() + 0.5 * sign * g[finite].float()
        assert direction.dtype == torch.float32
        assert torch.equal(buffer[finite].float(), new)
        assert torch.equal(direction[finite], 0.5 * new + 0.5 * sign * g[finite].float() if nesterov else new)
        assert torch.equal(bits(buffer[~finite]), bits(before[~finite])) and (direction[~finite] == 0).all()
        assert_only_changed(buffer, whole)


def test_momentum_integers():
    check_momentum_integers(update)


@pytest.mark.parametrize(
    "old,new",
    [
        ("    if tl.load(finite + matrix):\n        old =", "    if tl.load(finite):\n        old ="),
        ("tl.store(buffer + start + o, stored, mask=inside)", "tl.store(buffer + start + o, stored)"),
        ("new = -new if MAXIMIZE", "new = new if MAXIMIZE"),
        ("new + decay * (average - new)", "average + decay * (average - new)"),
        ("tl.zeros((BLOCK,), tl.float32), mask=inside)", "tl.zeros((BLOCK,), tl.float32), mask=inside & (o > 0))"),
        ("start += matrix * size\n    if", "start += matrix\n    if"),
    ],
)
def test_momentum_mutants_are_caught(mutant, old, new):
    with pytest.raises(AssertionError):
        check_momentum_integers(mutant(update, old, new))


@pytest.mark.parametrize("dtype,other", [*zip(DTYPES, DTYPES, strict=True), (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("nesterov", [True, False])
def test_momentum(dtype, other, nesterov, composition, assert_as_accurate):
    """The direction is that of the buffer as it is stored: its exact meaning starts from the rounded one."""
    buffer, g, finite = torch.randn(3, 7, 13).to(dtype), torch.randn(3, 7, 13).to(other), torch.ones(3, dtype=torch.bool)
    before, exact, composed = buffer.clone(), buffer.double(), buffer.clone()
    direction = update.momentum(buffer, g, finite, 0.95, nesterov, False)
    reference.momentum_update(exact, g.double(), finite, 0.95, nesterov, False)
    composition(reference.momentum_update, composed, g.to(dtype), finite, 0.95, nesterov, False)
    assert_as_accurate(buffer, composed, exact)
    want = 0.95 * buffer.double() + 0.05 * g.double() if nesterov else buffer.double()
    torch.testing.assert_close(direction.double(), want, rtol=1e-6, atol=1e-6)
    assert not torch.equal(buffer, before)


# --- parameters -------------------------------------------------------------------------------------------------------


def check_parameters_integers(module) -> None:
    """Halves of integers, so that only the store rounds: bit for bit in every dtype, by an `lr` on the device or not."""
    cases = itertools.product(((20, 55), (1, 1), (7, 13), (16, 64), (90, 100)), DTYPES, (0, 8, 1))
    for (n, m), dtype, offset in cases:
        shapes = ((2, n, m), (n, m), (1, n, m), (0, n, m))
        pairs = [padded(*s, dtype=dtype, offset=offset) for s in shapes]
        params = [p for p, _ in pairs]
        for p in params:
            p.copy_(integers(*p.shape, largest=100))
        u, finite = integers(4, n, m, largest=100), torch.tensor([False, True, True, True])
        u[0] = NAN
        counts = torch.ones(4), torch.ones(4).long()
        stacked = torch.cat([p.reshape(-1, n, m) for p in params])
        with recording() as launches:
            module.parameter_update(params, u, torch.full((4, 3), NAN), finite, *counts, torch.tensor(0.25), 0.5, "none", 0.2)
        assert [x.tolist() for x in counts] == [[1, 2, 2, 2], [2, 1, 1, 1]]
        assert [item.name for item in launches] == ["parameter_update"]
        assert launches[0].arguments["ALIGNED"] == all(p.data_ptr() % 16 == 0 for p in [*params, params[0][1]])
        want = (stacked.float() - 0.25 * (u + 0.5 * stacked.float())).to(dtype)
        want = torch.where(finite[:, None, None], want, stacked).split([2, 1, 1, 0])
        for p, x, (_, buffer) in zip(params, want, pairs, strict=True):
            assert torch.equal(bits(p), bits(x.reshape(p.shape)))
            assert_only_changed(p, buffer)


def test_parameters_integers(monkeypatch):
    check_parameters_integers(update)
    monkeypatch.setattr(update, "learning_rate", lambda lr, device: lr.item())
    check_parameters_integers(update)


def check_parameters(module, dtype=torch.float32, composition=None, assert_as_accurate=None) -> None:
    for (n, m, parts), normalize, size in itertools.product(
        ((20, 55, 4), (1, 1, 1), (9, 5, 1500)), ("rms", "clip", "none"), (0.01, 10.0)
    ):
        u = size * torch.randn(3, n, m)
        u[2] *= composition is not None  # an update of zeros stays one
        share = torch.rand(3, parts)
        squares = u.square().sum((-2, -1)).unsqueeze(-1) * share / share.sum(-1, keepdim=True)
        params = [torch.randn(2, n, m).to(dtype), torch.randn(1, n, m).to(dtype)]
        finite, lr, counts = torch.ones(3) > 0, torch.tensor(0.1), [torch.zeros(3), torch.zeros(3).long()]
        exact, composed = [p.double() for p in params], clones(params)
        module.parameter_update(params, u, squares, finite, *counts, lr, 0.3, normalize, 0.2)
        assert counts[0].tolist() == [1, 1, 1] and not counts[1].any()
        reference.parameter_update(exact, u.double(), squares.double(), finite, *counts, lr.double(), 0.3, normalize, 0.2)
        as_dtype = [u.to(dtype), squares.to(dtype) if dtype != torch.float16 else squares]
        (composition or (lambda f, *a: f(*a)))(
            reference.parameter_update, composed, *as_dtype, finite, *counts, lr.to(dtype), 0.3, normalize, 0.2
        )
        for p, x, y in zip(params, composed, exact, strict=True):
            if assert_as_accurate is None:
                torch.testing.assert_close(p, y.float(), rtol=1e-5, atol=1e-5)
            else:
                assert_as_accurate(p, x, y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_parameters(dtype, composition, assert_as_accurate):
    check_parameters(update, dtype, composition, assert_as_accurate)


@pytest.mark.parametrize(
    "old,new",
    [
        ("    if not tl.load(finite + matrix):", "    if False:"),
        ("tl.load(skipped + matrix) + 1", "tl.load(skipped + matrix)"),
        ("        if t == 0:  # a step", "        if t >= 0:  # a step"),
        ("tl.store(p + o, tiles.rounded(new, TYPE, None), mask=inside)", "tl.store(p + o, tiles.rounded(new, TYPE, None))"),
        ("weight_decay * old", "weight_decay"),
        ("p + i * stride for", "p for"),
        ("for first in range(0, left, BLOCK)", "for first in range(0, min(left, BLOCK), BLOCK)"),
        ("(p.data_ptr(), p.numel() // (n * m))", "(params[0].data_ptr(), p.numel() // (n * m))"),
    ],
)
def test_parameters_mutants_are_caught(mutant, old, new):
    with pytest.raises(AssertionError):
        check_parameters_integers(mutant(update, old, new))


@pytest.mark.parametrize(
    "old,new",
    [
        ("1.0 / tl.maximum(rms, 1.0)", "1.0 / rms"),
        ("target / rms if", "1.0 / rms if"),
        ("squares + matrix * parts", "squares"),
        ("tl.sqrt(square / size)", "tl.sqrt(square)"),
    ],
)
def test_parameters_norm_mutants_are_caught(mutant, old, new):
    with pytest.raises(AssertionError):
        check_parameters(mutant(update, old, new))


def test_parameters_round_to_nearest_even_once():
    """The step lands on, over and under the middle between two bfloat16 numbers."""
    p = torch.ones(1, 1, 4, dtype=torch.bfloat16)  # neighbours: 1 + k / 128
    u = -torch.tensor([[[1.0, 3.0, 1.001, 0.999]]]) / 256
    counts = torch.zeros(1), torch.zeros(1).long()
    update.parameter_update([p], u, torch.ones(1, 1), torch.tensor([True]), *counts, torch.tensor(1.0), 0.0, "none", 0.2)
    assert p.flatten().tolist() == [1.0, 1 + 2 / 128, 1 + 1 / 128, 1.0]


def test_tables_are_remembered_and_bounded(monkeypatch):
    monkeypatch.setattr(update, "_tables", {})
    device = torch.device("cpu")
    first = update.table(("a",), lambda: [1, 2], device)
    assert first.tolist() == [1, 2] and first.dtype == torch.int64
    assert update.table(("a",), lambda: [3], device) is first
    for i in range(2 * update.TABLES):
        update.table((i,), lambda: [0], device)
    assert len(update._tables) == update.TABLES
    assert update.table(("a",), lambda: [4], device).tolist() == [4]


def test_a_captured_graph_keeps_its_tables_and_makes_none(monkeypatch):
    device = torch.device("cuda")
    monkeypatch.setattr(update, "_tables", {((1, 2), device): (torch.ones(1), torch.zeros(1))})
    monkeypatch.setattr(update, "_captured", [])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    known = update.table((1, 2), lambda: [1], device)
    assert update._captured[0][1] is known
    with pytest.raises(RuntimeError, match="captures tensors that were not seen before"):
        update.table((3, 4), lambda: [1], device)


def test_a_learning_rate_elsewhere_goes_by_value():
    u, p = torch.empty(2, 3, 4, device="meta"), torch.empty(2, 3, 4, device="meta", dtype=torch.bfloat16)
    for lr in (torch.tensor(0.1, dtype=torch.float64), torch.empty((), device="meta")):
        with recording(run=False) as launches:
            update.parameter_update([p], u, u[..., 0], u[:, 0, 0] > 0, u[:, 0, 0], u[:, 0, 0], lr, 0.0, "rms", 0.2)
            diagonal.diagonal_step([p], [p], [p], [u], [u], [u], lr, [0.0], 0.9, 0.9, 1.0, 1e-8, 1.0, "rf", False)
        launches = [item for item in launches if item.name != "diagonal_squares"]
        assert [item.arguments["LOAD_LR"] for item in launches] == [lr.is_meta, lr.is_meta]
        assert lr.is_meta or [item.arguments["lr"] for item in launches] == [0.1, 0.1]


# --- elementwise optimizers -------------------------------------------------------------------------------------------

SIZES = ((), (5,), (0,), (1024,), (3, 7, 11), (8192,), (8193,), (90, 100), (0, 4))
RULES = (("rf", 1.0, 8.0), ("rf", 0.0, 1.0), ("rfw", 0.0, 8.0), ("adamw", 1.0, 1.0))


def diagonal_arguments(sizes, dtypes=(torch.float32,) * 4, offset: int = 8):
    """Four lists, and the buffers that the tensors lie in."""
    pairs = [[padded(*s, dtype=t, offset=offset) for s in sizes] for t in dtypes]
    lists = [[x for x, _ in row] for row in pairs]
    for x in itertools.chain(*lists):
        x.copy_(torch.randn(x.shape))
    for x in lists[3]:
        x.copy_(positive(*x.shape))
    return lists, [[buffer for _, buffer in row] for row in pairs]


def check_diagonal(module, dtypes=(torch.float32,) * 4, offset=8, composition=None, assert_as_accurate=None) -> None:
    for (rule, gamma, batch_size), maximize, step in itertools.product(RULES, (True, False), (1, 7)):
        lists, buffers = diagonal_arguments(SIZES, dtypes, offset)
        exact, composed = ([[x.to(t) for x in row] for row in lists] for t in (torch.float64, dtypes[0]))
        composed = [clones(row) for row in composed]
        grads = clones(lists[1])
        decays = [0.1 * i for i in range(len(SIZES))]
        options = [decays, 0.9, 0.99, gamma, 1e-6, batch_size, rule, maximize]
        counts = [[torch.tensor(step - 1.0 + i) for i in range(len(SIZES))], [torch.tensor(3) for _ in SIZES]]
        expected, other = copy.deepcopy(counts), copy.deepcopy(counts)
        with recording() as launches:
            module.diagonal_step(*lists, *counts, torch.tensor(0.05), *options)
        assert [item.name for item in launches] == ["diagonal_squares", "diagonal"]
        lr = torch.tensor(0.05, dtype=torch.float64)
        reference.diagonal_update(*exact, *expected, lr, *options)
        assert counts == expected and [x.item() for x in counts[0]] == [step + i for i in range(len(SIZES))]
        if composition is not None:
            composition(reference.diagonal_update, *composed, *other, lr, *options)
        for i in (0, 2, 3):
            for x, y, z, buffer in zip(lists[i], composed[i], exact[i], buffers[i], strict=True):
                if composition is None:
                    torch.testing.assert_close(x, z.float(), rtol=1e-5, atol=2e-6)
                else:
                    assert_as_accurate(x, y, z)
                assert_only_changed(x, buffer)
        assert all(torch.equal(x, y) for x, y in zip(lists[1], grads, strict=True))


@pytest.mark.parametrize(
    "dtypes,offset",
    [*(((t,) * 4, 8) for t in DTYPES), ((torch.bfloat16, torch.bfloat16, torch.float32, torch.float32), 1)],
)
def test_diagonal(dtypes, offset, composition, assert_as_accurate):
    check_diagonal(diagonal, dtypes, offset, composition, assert_as_accurate)


@pytest.mark.parametrize(
    "old,new",
    [
        ("begun - 1", "tl.maximum(begun - 2, 0)"),  # in bounds, since the interpreter dies of bad addresses
        ("begun - 1", "0"),
        ("grad = -grad if", "grad = grad if"),
        ("gain * grad * grad", "gain * grad"),
        ("i + BLOCK <= left", "i <= left"),
        ("/ (second + eps)", "/ second"),
        ("1 - (1 - beta2) * gamma", "beta2"),
        ("average + weight_decay * old", "average + weight_decay"),
        ("change if COUPLED else average", "average"),
        ("change if COUPLED else average", "change"),
        ("result + rest * (1.0 - result)", "result + rest"),
        ("old - rate * weight_decay * old -", "old - rate * weight_decay -"),
        ("tl.sqrt(second) / root + eps", "tl.sqrt(second) + eps"),
        ("    start = t * CHUNK", "    start = t * BLOCK"),
        ("tl.load(before + index) + 1", "tl.load(before + index)"),
        ("tl.load(before + index) + 1", "tl.load(before) + 1"),
        ("tl.load(table + DECAY * count + index)", "tl.load(table + DECAY * count)"),
    ],
)
def test_diagonal_mutants_are_caught(mutant, old, new):
    changed = mutant(diagonal, old, new)
    if "(second + eps)" in old:  # eps only matters where the second moment is not far from it
        check_eps(diagonal)
        check = check_eps
    else:
        check = check_diagonal
    with pytest.raises(AssertionError):
        check(changed)


def check_flaws(module) -> None:
    """What is wrong with a gradient is found wherever it is, and only its own tensor stays as it is."""
    sizes = (3,), (module.CHECKED + 1,), (7,), (7,), (2,), (4,)
    for lr, rule in itertools.product((0.1, 0.0), ("adamw", "rf", "rfw")):
        lists = [[torch.randn(s) for s in sizes] for _ in range(3)] + [[positive(*s) for s in sizes]]
        for i, flaw in ((1, NAN), (2, float("-inf")), (4, 1e30)):
            lists[1][i][-1] = flaw
        lists[1][3].zero_()
        expected, before = copy.deepcopy(lists), copy.deepcopy(lists)
        counts = [[torch.tensor(float(i)) for i in range(6)], [torch.tensor(i) for i in range(6)]]
        options, same_counts = ([0.1] * 6, 0.9, 0.99, 1.0, 1e-6, 1.0, rule, False), copy.deepcopy(counts)
        module.diagonal_step(*lists, *counts, torch.tensor(lr), *options)
        reference.diagonal_update(*expected, *same_counts, torch.tensor(lr), *options)
        moving = {0, 3, 5} if lr else {0, 5}
        assert [x.item() for x in counts[0]] == [i + (i in moving) for i in range(6)]
        assert [x.item() for x in counts[1]] == [i + (i in (1, 2, 4)) for i in range(6)]
        for row, want, old in zip(lists, expected, before, strict=True):
            for i in range(6):
                torch.testing.assert_close(row[i], want[i], rtol=1e-5, atol=2e-6, equal_nan=True)
                assert i in moving or torch.equal(bits(row[i]), bits(old[i]))


def test_diagonal_leaves_tensors_with_flawed_gradients():
    check_flaws(diagonal)


@pytest.mark.parametrize(
    "old,new",
    [
        ('finite = square < float("inf")', "finite = square >= 0"),
        ('finite = square < float("inf")', 'finite = square <= float("inf")'),
        ("moves = finite & ((square > 0) | (rate != 0))", "moves = finite"),
        ("moves = finite & ((square > 0) | (rate != 0))", "moves = finite & (square > 0)"),
        ("parts, BLOCK)", "1, BLOCK)"),
        ("squares + tl.load(table + FIRST_CHECK * count + index)", "squares"),
        ("tl.load(skipped) + 1", "tl.load(skipped)"),
        ("mask=o < left, other=0.0", "mask=o < left - 1, other=0.0"),
    ],
)
def test_flaws_that_mutants_miss_are_noticed(mutant, old, new):
    with pytest.raises(AssertionError):
        check_flaws(mutant(diagonal, old, new))


def check_eps(module) -> None:
    p, g, m, s = torch.zeros(3), torch.ones(3), torch.zeros(3), torch.zeros(3)
    counts = [torch.zeros(())], [torch.tensor(0)]
    module.diagonal_step([p], [g], [m], [s], *counts, torch.tensor(1.0), [0.0], 0.0, 0.5, 1.0, 0.5, 1.0, "rf", False)
    assert torch.equal(p, -torch.ones(3)) and torch.equal(s, torch.full((3,), 0.5))


def test_the_bias_corrections_of_adamw_do_not_cancel():
    """`1 − 0.9999^t` in float32, at the first step and at the ten-thousandth: the first step of AdamW is `lr` long."""
    for step in (1, 2, 3, 100, 10_000):
        p, g = torch.zeros(1), torch.ones(1)
        m, s = torch.full((1,), 1 - 0.9 ** (step - 1)), torch.full((1,), 1 - 0.9999 ** (step - 1))
        counts = [torch.tensor(step - 1.0)], [torch.tensor(0)]
        args = *counts, torch.tensor(1.0), [0.0], 0.9, 0.9999, 1.0, 0.0, 1.0, "adamw", False
        diagonal.diagonal_step([p], [g], [m], [s], *args)
        torch.testing.assert_close(p, torch.tensor([-1.0]), rtol=2e-6, atol=0)


def test_the_reference_is_torchs_adamw():
    p, reset = torch.randn(5, 3, dtype=torch.float64), torch.zeros(5, 3, dtype=torch.float64)
    theirs = torch.nn.Parameter(p.clone())
    optimizer = torch.optim.AdamW([theirs], lr=0.03, betas=(0.8, 0.97), eps=1e-7, weight_decay=0.2, maximize=True)
    m, s, step, skipped = reset.clone(), reset.clone(), torch.tensor(0.0), torch.tensor(0)
    for _ in range(5):
        theirs.grad = torch.randn_like(p)
        optimizer.step()
        options = {"betas": (0.8, 0.97), "eps": 1e-7, "weight_decay": 0.2, "maximize": True}
        ops.diagonal_update([p], [theirs.grad], [m], [s], [step], [skipped], 0.03, rule="adamw", **options)
        torch.testing.assert_close(p, theirs.detach(), rtol=1e-13, atol=1e-13)


def test_the_reference_is_root_free():
    """Lin et al., 2024, Fig. 6, element by element; "rfw" has the decay in the parameter alone."""
    p, g, m, s = (torch.rand(4, dtype=torch.float64) + 0.5 for _ in range(4))
    for rule, gamma, batch_size in itertools.product(("rf", "rfw"), (1.0, 0.0), (8.0, 1.0)):
        want = []
        for a, b, c, d in zip(*(x.tolist() for x in (p, g, m, s)), strict=True):
            d = (1 - 0.01 * gamma) * d + 0.01 * batch_size * b * b
            c = 0.9 * c + b / (d + 0.1) + (0.2 * a if rule == "rf" else 0.0)
            want.append((a - 0.5 * (c + (0.2 * a if rule == "rfw" else 0.0)), c, d))
        options = {"betas": (0.9, 0.99), "gamma": gamma, "eps": 0.1, "weight_decay": 0.2, "batch_size": batch_size}
        counts = [torch.tensor(0.0)], [torch.tensor(0)]
        ops.diagonal_update([p], [g], [m], [s], *counts, torch.tensor(0.5).double(), rule=rule, **options)
        torch.testing.assert_close(torch.stack([p, m, s], -1), torch.tensor(want, dtype=torch.float64), rtol=1e-13, atol=0)


# --- the ops ----------------------------------------------------------------------------------------------------------


def op_cases(dtype: torch.dtype = torch.float32):
    """What each op is given, with leading dimensions where it takes them; the tensors it changes are found by comparison."""
    x, flags = torch.randn(2, 3, 7, 9).to(dtype), torch.tensor([True, False, True])
    vector = [positive(2, 3, *s) for s in ((7,), (9,), (), (7,), (9,))]
    k, momentum = torch.randn(2, 3, 7, 7).to(dtype), torch.randn(2, 3, 7, 7).to(dtype)
    lr, u = torch.tensor(0.1, dtype=torch.float64), torch.randn(3, 7, 9)
    counts = torch.ones(3), torch.ones(3).long()
    lists = [torch.ones(()), torch.ones(())], [torch.tensor(1), torch.tensor(2)]
    four = [[torch.randn(4, 5).to(dtype), torch.randn(3).to(dtype)] for _ in range(3)]
    four.append([x.abs() for x in four[0]])
    options = {"betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    return {
        "stochastic_round": ((x.float(), 5), {}),
        "spectrum_update": ((*vector, 0.1), {"damping": 0.2}),
        "factor_update": ((k.mT, momentum, 0.3), {"rounding": "stochastic", "seed": 5}),
        "momentum_update": ((x[0], x[1].mT.contiguous().mT, flags, 0.9), {"maximize": True}),
        "momentum_sum": ((x[0], x[1].mT.contiguous().mT, flags, 0.9), {"maximize": True}),
        "parameter_update": (([x[0, :2], x[1, :1]], u, u.square().sum(-1), flags, *counts, lr), {"weight_decay": 0.1}),
        "diagonal_update": ((*four, *lists, lr), {"rule": "adamw", **options}),
    }


COUNTS = {"factor_update": 2, "diagonal_update": 2}
NAMES = list(op_cases())


def copied(value):
    if isinstance(value, Tensor):
        return value.clone()
    return [copied(x) for x in value] if isinstance(value, list | tuple) else value


def tensors(value):
    if isinstance(value, Tensor):
        return [value]
    return [x for item in value for x in tensors(item)] if isinstance(value, list | tuple) else []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ops_with_their_kernels_give_the_references_results(name, dtype, request):
    args, kwargs = op_cases(dtype)[name]
    expected, function = copied(args), getattr(ops, name)
    want = function(*expected, **kwargs)
    request.getfixturevalue("kernels_on_cpu")
    with recording() as launches:
        got = function(*args, **kwargs)
    assert len(launches) == COUNTS.get(name, 1)
    for x, y in zip(tensors([got, *args]), tensors([want, *expected]), strict=True):
        tolerance = 1e-6 if x.dtype == torch.float32 else torch.finfo(x.dtype).eps if x.is_floating_point() else 0
        torch.testing.assert_close(x, y, rtol=4 * tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_ops_without_their_kernels(name, kernels_on_cpu):
    """Double precision, and layouts that the in-place kernels do not serve, go to the reference."""
    args, kwargs = op_cases()[name]

    def change(value, f):
        if isinstance(value, Tensor):
            counter = not value.ndim or (name == "parameter_update" and value.ndim == 1)
            return f(value) if value.is_floating_point() and not counter else value
        return [change(x, f) for x in value] if isinstance(value, list | tuple) else value

    with recording() as launches:
        if name != "stochastic_round":
            getattr(ops, name)(*(change(x, Tensor.double) for x in args), **kwargs)
        if name in ("momentum_sum", "momentum_update", "parameter_update", "diagonal_update"):
            getattr(ops, name)(*(change(x, lambda t: torch.stack([t, t], -1)[..., 0]) for x in args), **kwargs)
    assert not launches


@pytest.mark.parametrize("name", ["parameter_update", "diagonal_update"])
def test_autograd_hears_of_changed_parameters(name, kernels_on_cpu):
    args, kwargs = op_cases()[name]
    p = args[0][0]
    before = p._version
    getattr(ops, name)(*args, **kwargs)
    assert p._version > before


@pytest.mark.parametrize("name", ["momentum_sum", "momentum_update", "parameter_update", "diagonal_update"])
def test_opcheck(name, monkeypatch):
    module = __import__(getattr(ops, name).__module__, fromlist=["x"])
    calls, op = [], getattr(module, f"_{name}")
    monkeypatch.setattr(module, f"_{name}", lambda *a: calls.append(a) or op(*a))
    for dtype in (torch.float32, torch.bfloat16):
        args, kwargs = op_cases(dtype)[name]
        args = [copied(x) for x in args]  # no two views of one tensor
        getattr(ops, name)(*args, **kwargs)
        torch.library.opcheck(op, calls[-1])
    assert op is getattr(torch.ops.spectral_ops, name).default


@pytest.mark.parametrize("name", ["momentum_sum", "momentum_update", "parameter_update", "diagonal_update"])
def test_compiles_without_a_graph_break(name):
    args, kwargs = op_cases()[name]
    args, expected = [copied(x) for x in args], [copied(x) for x in args]
    function = getattr(ops, name)
    want = function(*expected, **kwargs)
    got = torch.compile(lambda *a: function(*a, **kwargs), fullgraph=True, backend="aot_eager")(*args)
    for x, y in zip(tensors([got, *args]), tensors([want, *expected]), strict=True):
        assert torch.equal(x, y)


def diagonal_call(**options):
    x = torch.ones(3)
    lists = {name: [x.clone()] for name in ("params", "grads", "momenta", "seconds")}
    lists |= {"steps": [torch.ones(())], "skipped": [torch.tensor(0)]}
    defaults = {"lr": torch.tensor(0.1), "rule": "adamw", "betas": (0.9, 0.99), "eps": 1e-8}
    ops.diagonal_update(**(lists | defaults | options))


@pytest.mark.parametrize(
    "options,error,message",
    [
        ({"rule": "adam"}, ValueError, r"`rule` must be one of 'adamw', 'rf', 'rfw', got 'adam'"),
        ({"grads": []}, ValueError, r"`grads` must be as long as `params`, 1, got 0"),
        ({"seconds": [torch.ones(4)]}, ValueError, r"`seconds\[0\]` must have shape \(3,\), got \(4,\)"),
        ({"momenta": [3]}, TypeError, r"`momenta\[0\]` must be a tensor, got int"),
        ({"betas": (0.9, 1.0)}, ValueError, r"`betas\[1\]` must be in \[0, 1\), got 1.0"),
        ({"eps": -1.0}, ValueError, r"`eps` must be at least 0, got -1.0"),
        ({"gamma": 0.0}, ValueError, r'`gamma` and `batch_size` are of "rf" and "rfw", got 0.0 and 1.0 with "adamw"'),
        ({"lr": torch.ones(2)}, ValueError, r"`lr` must have one element, got shape \(2,\) on cpu"),
        ({"steps": [torch.tensor(1)]}, ValueError, r"`steps\[0\]` must hold 1 torch.float32 on cpu, got torch.int64"),
        ({"skipped": [torch.ones(2).long()]}, ValueError, r"`skipped\[0\]` must hold 1 torch.int64 on cpu, got .* \(2,\)"),
        ({"weight_decay": [0.1, 0.2]}, ValueError, r"`weight_decay` must be as long as `params`, 1, got 2"),
        ({"weight_decay": -0.1}, ValueError, r"`weight_decay` must be at least 0, got -0.1"),
    ],
)
def test_wrong_arguments_are_named(options, error, message):
    with pytest.raises(error, match=f"diagonal_update: {message}"):
        diagonal_call(**options)
    diagonal_call()
    diagonal_call(params=[], grads=[], momenta=[], seconds=[], steps=[], skipped=[])
