"""`kron_track`: both sides in one call, against the ops it is made of, and its kernels against its reference."""

import itertools

import pytest
import torch
from torch import Tensor

import spectral_ops as ops
from spectral_ops import reference
from spectral_ops.kernels.launch import recording

BETA, DAMPING, LIMIT = 0.4, 0.1, 0.42
SIDES = ((True, True), (True, False), (False, True))


def state(b: int, n: int, m: int, dtype: torch.dtype, carry: bool = True, sides: tuple[bool, bool] = (True, True)):
    """Keyword arguments of `kron_track` that it changes."""
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    bases, residuals = [], []
    for size, present in zip((n, m), sides, strict=True):
        q = torch.linalg.qr(torch.randn(b, size, size, dtype=torch.float64))[0]
        r = 0.05 * torch.randn(b, size, size, dtype=torch.float64).tril(-1)
        bases.append(q.to(dtype).contiguous() if present else None)
        residuals.append((r + r.mT).to(dtype) if present and carry else None)
    return {
        "bases": tuple(bases),
        "residuals": tuple(residuals),
        "eigenvalues": tuple(torch.rand(b, size, dtype=acc) + 0.5 for size in (n, m)),
        "scale": torch.rand(b, dtype=acc) + 0.5,
        "updates": torch.full((b,), 3.0, dtype=acc),
    }


def mapped(f, values: dict) -> dict:
    def apply(v):
        return None if v is None else tuple(map(apply, v)) if isinstance(v, tuple) else f(v)

    return {name: apply(value) for name, value in values.items()}


def flat(values: dict) -> dict[str, Tensor]:
    pairs = {f"{k}[{i}]": x for k, v in values.items() for i, x in enumerate(v if isinstance(v, tuple) else (v,))}
    return {name: x for name, x in pairs.items() if x is not None}


def gradients(b: int, n: int, m: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(b, n, m, dtype=torch.float64).to(dtype)


def flawed(g: Tensor) -> Tensor:
    """NaN in the first, the second infinite, the third zero."""
    g = g.clone()
    g[0, 0, 0], g[1, -1, -1], g[2] = float("nan"), float("inf"), 0
    return g


def track(g: Tensor, s: dict, **options) -> Tensor:
    return ops.kron_track(g, **s, **({"beta": BETA, "damping": DAMPING, "limit": LIMIT} | options))


@pytest.mark.parametrize("carry", [True, False])
@pytest.mark.parametrize("sides", SIDES)
def test_it_is_gram_track_and_cayley_track_of_both_sides(carry, sides):
    b, n, m = 3, 6, 9
    s, g = state(b, n, m, torch.float64, carry, sides), gradients(b, n, m)
    old = mapped(Tensor.clone, s)
    finite = track(g, s)
    assert finite.all() and (s["updates"] == 4).all()
    x = reference.rotate(g, *old["bases"])
    logs = []
    for i, (z, k) in enumerate(((x, m), (x.mT, n))):
        inverse = 1 / old["eigenvalues"][1 - i]
        weight, damping = inverse / (old["scale"][:, None] * k), DAMPING * inverse.mean(-1) / old["scale"]
        base, residual, d = old["bases"][i], old["residuals"][i], old["eigenvalues"][i]
        generator, d, residual, log_mean = ops.gram_track(z, d, weight, BETA, residual=residual, damping=damping)
        if base is not None:
            base, d, residual = ops.cayley_track(base, generator, d, residual=residual, limit=LIMIT)
            torch.testing.assert_close(s["bases"][i], base)
        if carry and base is not None:
            torch.testing.assert_close(s["residuals"][i], residual)
        torch.testing.assert_close(s["eigenvalues"][i], d)
        logs.append(log_mean)
    torch.testing.assert_close(s["scale"], old["scale"] * torch.exp((logs[0] + logs[1]) / 2))


def test_the_first_update_takes_its_scale_from_the_gradient_and_half_of_its_curvature():
    s, g = state(2, 4, 5, torch.float64), gradients(2, 4, 5)
    s["updates"].zero_()
    same = mapped(Tensor.clone, s)
    same["scale"] = g.square().mean((-2, -1))
    same["updates"] += 1  # past the first update, the scale stays and the share is 1/3
    track(g, s, beta=0.1)
    track(g, same, beta=0.5)
    torch.testing.assert_close(s["eigenvalues"][0], same["eigenvalues"][0])
    torch.testing.assert_close(s["scale"], same["scale"])


def test_eigenvalues_stay_over_a_share_of_the_largest():
    s = state(1, 3, 3, torch.float64, carry=False)
    s["bases"] = (torch.eye(3).double()[None], torch.eye(3).double()[None])
    track(torch.diag(torch.tensor([1e6, 1.0, 1e-6])).double()[None], s, beta=1.0, damping=0.0)
    d = s["eigenvalues"][0][0]
    torch.testing.assert_close(d.min() / d.max(), torch.tensor(1e-6, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("on_kernels", [False, True])
def test_flawed_gradients_leave_their_matrices_untouched(dtype, on_kernels, request):
    if on_kernels:
        request.getfixturevalue("kernels_on_cpu")
    s, g = state(4, 6, 9, dtype), flawed(gradients(4, 6, 9, torch.float32))
    old = mapped(Tensor.clone, s)
    seed = torch.arange(4) if dtype == torch.bfloat16 else None
    assert track(g, s, seed=seed).tolist() == [False, False, True, True]
    assert s["updates"].tolist() == [3.0, 3.0, 3.0, 4.0]
    for (name, now), before in zip(flat(s).items(), flat(old).values(), strict=True):
        if name != "updates[0]":
            assert torch.equal(now[:3], before[:3]), name
            assert not torch.equal(now[3], before[3]) and now[3].isfinite().all(), name


KERNEL_CASES = [*itertools.product([(3, 40, 21), (2, 1, 5)], [True, False], SIDES), ((1, 33, 33), True, (True, True))]


@pytest.mark.parametrize("shape,carry,sides", KERNEL_CASES)
@pytest.mark.parametrize("dtype,order", [(torch.float32, 2), (torch.float32, 8), (torch.bfloat16, 2), (torch.bfloat16, 4)])
def test_kernels_are_as_accurate_as_the_composition(dtype, order, shape, carry, sides, kernels_on_cpu, composition):
    """In bfloat16 the composition rounds every intermediate result to bfloat16; the kernels round fewer."""
    s, g = state(*shape, dtype, carry, sides), gradients(*shape, torch.float32)
    exact = mapped(Tensor.double, s)
    composed = mapped(lambda t: t.to(dtype, copy=True), s)

    def run(values: dict, g: Tensor) -> None:
        v = values
        rest = v["scale"], v["updates"], None, BETA, DAMPING, 0.1, LIMIT, order
        reference.kron_track(g, *v["bases"], *v["residuals"], *v["eigenvalues"], *rest)

    run(exact, g.double())
    composition(run, composed, g.to(dtype))
    with recording() as launches:
        seed = torch.arange(shape[0]) if dtype == torch.bfloat16 else None
        track(g, s, seed=seed, order=order)
    assert launches
    for (name, got), want, rough in zip(flat(s).items(), flat(exact).values(), flat(composed).values(), strict=True):
        error, bound = (got.double() - want).norm(), (rough.double() - want).norm()
        # Stochastic rounding has twice the error of rounding to nearest, and what is carried is rounded once more.
        rounding = (4 if dtype == torch.bfloat16 else 1) * torch.finfo(dtype).eps * want.norm()
        assert error <= 2 * bound + rounding, name


def test_launches_do_not_depend_on_the_batch(kernels_on_cpu):
    counts = []
    for b in (1, 4):
        with recording() as launches:
            track(gradients(b, 20, 12, torch.float32), state(b, 20, 12, torch.float32))
        counts.append([item.name for item in launches])
    assert counts[0] == counts[1] == ["rotate", "rotate", "average", "track", "square", "map", "turn", "conjugate"]


@pytest.mark.parametrize("bases", [torch.float64, torch.float16])
def test_other_dtypes_take_pytorch(bases, kernels_on_cpu):
    """Such as float64 factors of float32 parameters."""
    s = state(2, 4, 3, torch.float32)
    s |= {name: tuple(x.to(bases) for x in s[name]) for name in ("bases", "residuals")}
    with recording() as launches:
        track(gradients(2, 4, 3, torch.float32), s)
    assert not launches and all(x.isfinite().all() for x in flat(s).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    s = state(2, 4, 3, dtype)
    seed = torch.arange(2) if dtype == torch.bfloat16 else None
    state_args = *s["bases"], *s["residuals"], *s["eigenvalues"], s["scale"], s["updates"]
    args = gradients(2, 4, 3, torch.float32), *state_args, seed, 0.4, 0.0, 0.1, 0.42, 2
    torch.library.opcheck(torch.ops.spectral_ops.kron_track.default, args)


def test_compiles_without_a_graph_break():
    s, g = state(2, 4, 3, torch.float32), gradients(2, 4, 3, torch.float32)
    same = mapped(Tensor.clone, s)
    want = track(g, s)
    got = torch.compile(track, fullgraph=True, backend="aot_eager")(g, same)
    assert torch.equal(got, want)
    for x, y in zip(flat(s).values(), flat(same).values(), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"bases": (torch.eye(3)[None], None)}, r"`bases\[0\]` must have shape \(2, 4, 4\), got \(1, 3, 3\)"),
        ({"residuals": (None, torch.zeros(2, 3, 3))}, r"a side has both a basis and a residual or neither, but not side 0"),
        ({"scale": torch.ones(3)}, r"`scale` must have shape \(2,\), got \(3,\)"),
    ],
)
def test_wrong_values_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        track(torch.randn(2, 4, 3), state(2, 4, 3, torch.float32) | change)
