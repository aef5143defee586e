"""The structured matrices of SINGD (Lin et al., 2024), against Table 1 written out as masks and weights of dense matrices."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from spectral_ops.structures import (
    BlockDiagonal,
    BlockTriangular,
    Dense,
    Diagonal,
    Structure,
    Symmetric,
    Toeplitz,
    Triangular,
    structure,
)

F64 = {"dtype": torch.float64}
NAMES = (
    "dense", "diagonal", "blockdiagonal1", "blockdiagonal3", "tril", "triu", "rank2tril", "rank2triu", "rank3tril_bottomright",
    "rank3triu_bottomright", "hierarchical2_3", "hierarchical1_1", "triltoeplitz", "triutoeplitz",
)  # fmt: skip
SPARSE = (
    "diagonal", "blockdiagonal8", "rank8tril", "rank8triu", "rank8tril_bottomright", "rank8triu_bottomright", "hierarchical4_4",
    "triltoeplitz", "triutoeplitz",
)  # fmt: skip
SIZES = (1, 2, 3, 7, 8)  # alone in a block, smaller than k1 + k2, of whole blocks and not, odd, even
BATCHES = ((), (3,), (2, 3))
every_structure = pytest.mark.parametrize("name", NAMES)
every_size = pytest.mark.parametrize("n", SIZES)


# --- Table 1 ----------------------------------------------------------------------------------------------------------


def pattern(name: str, n: int) -> Tensor:
    """Where a matrix may be other than 0."""
    i, j = torch.arange(n)[:, None], torch.arange(n)[None, :]
    number = [int(digits) for digits in re.findall("[0-9]+", name)]
    k = min(number[0], n) if number else 0
    if name.startswith("hierarchical"):
        return (i < k) | (i == j) | ((j >= k) & (i >= n - min(number[1], n - k)))
    if name.startswith("rank"):
        full = {"tril": j < k, "triu": i < k, "tril_bottomright": i >= n - k, "triu_bottomright": j >= n - k}
        return (i == j) | full[re.sub("rank[0-9]+", "", name)]
    if name.startswith("blockdiagonal"):
        return i // number[0] == j // number[0]
    simple = {"dense": i == i + 0 * j, "diagonal": i == j, "tril": i >= j, "triu": i <= j}
    return simple[name.removesuffix("toeplitz")]


def projection(name: str, m: Tensor) -> Tensor:
    """`Π̂(m)`, dense: an entry counts twice where its mirror image is none of the pattern's."""
    n = m.shape[-1]
    mask = pattern(name, n)
    if name.endswith("toeplitz"):
        offset = torch.arange(n)[None, :] - torch.arange(n)[:, None]
        means = torch.stack([m.diagonal(j, -2, -1).mean(-1) for j in range(1 - n, n)], -1)
        m = means[..., offset + n - 1]
    return m * (mask * (2 - (mask & mask.T).long()))


def is_member(name: str, m: Tensor) -> bool:
    n = m.shape[-1]
    if name.endswith("toeplitz"):
        diagonals = (m.diagonal(j, -2, -1) for j in range(1 - n, n))
        if not all(torch.allclose(d, d[..., :1], rtol=0, atol=1e-12) for d in diagonals):
            return False
    return bool((m[..., ~pattern(name, n)].abs() < 1e-12).all())


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, **F64)


def near_identity(s: Structure) -> Tensor:
    return s.add_identity(draw(s.size) * 0.3 / s.n, 1.0)


def members(name: str, n: int, *batch: int) -> tuple[Structure, Tensor, Tensor, Tensor]:
    """Two matrices and a transposed `(n, 4)`, as callers pass `inputs.mT`."""
    s = structure(name, n)
    return s, draw(*batch, s.size), draw(*batch, s.size), draw(*batch, 4, n).mT


def same(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def total(m: Tensor) -> Tensor:
    return m.sum((-2, -1))


# --- What they compute ------------------------------------------------------------------------------------------------


@every_size
@every_structure
def test_stored_numbers_are_the_pattern(name, n):
    """Each number stands somewhere in it and nothing stands elsewhere; all different numbers, but for Toeplitz matrices."""
    s = structure(name, n)
    numbers = torch.arange(1, s.size + 1, **F64)
    dense = s.dense(numbers)
    assert torch.equal(dense != 0, pattern(name, n)) and torch.equal(dense.unique()[-s.size :], numbers)
    assert (s.name, s.n) == (name, n)


@pytest.mark.parametrize("batch", BATCHES, ids=str)
@every_size
@every_structure
def test_operations(name, n, batch):
    s, a, b, x = members(name, n, *batch)
    da, db = s.dense(a), s.dense(b)
    same(s.dense(s.project(x)), projection(name, x @ x.mT))
    same(s.apply(a, x), da @ x)
    same(s.apply(a, x, transpose=True), da.mT @ x)
    same(s.dense(s.product(a, b)), da @ db)
    same(s.dense(s.gram(a)), projection(name, da.mT @ da))
    same(s.trace(a), da.diagonal(dim1=-2, dim2=-1).sum(-1))
    same(s.inner(a, b), total(da * db))
    same(s.norm(a), total(da * da).sqrt())
    same(s.dense(s.identity(**F64, device="cpu")), torch.eye(n, **F64))


@pytest.mark.parametrize("batch", BATCHES, ids=str)
@every_structure
def test_add_identity_is_in_place(name, batch):
    s, a, _, _ = members(name, 7, *batch)
    before, value = s.dense(a), draw(*batch)
    assert s.add_identity(a, value) is a
    same(s.dense(a), before + value[..., None, None] * torch.eye(7, **F64))
    s.add_identity(a, -0.5)
    same(s.dense(a), before + (value[..., None, None] - 0.5) * torch.eye(7, **F64))


@every_size
@every_structure
def test_congruence_where_transposes_are_members(name, n):
    s, a, b, _ = members(name, n, 3)
    da, db = s.dense(a), s.dense(b)
    assert s.symmetric == isinstance(s, Symmetric) == (name in ("dense", "diagonal") or "block" in name)
    assert not s.symmetric or is_member(name, da.mT)
    if isinstance(s, Symmetric):
        h = s.gram(b)  # any symmetric member
        same(s.dense(h), s.dense(h).mT)
        same(s.dense(s.congruence(a, h)), da.mT @ projection(name, db.mT @ db) @ da)
    else:
        assert not hasattr(s, "congruence") and (n == 1 or pattern(name, n).all() or not is_member(name, da.mT))


@every_structure
def test_strides_do_not_matter(name):
    s, a, b, x = members(name, 7, 3)
    strided_a, strided_x = torch.stack((b, a), -1)[..., 1], torch.stack((x, x), -1).movedim(0, 2)[..., 0].movedim(2, 0)
    assert not strided_a.is_contiguous() and not strided_x.is_contiguous() and strided_x.stride() != x.stride()
    for op in (s.gram, s.dense, s.trace, s.norm):
        same(op(strided_a), op(a))
    same(s.project(strided_x), s.project(x))
    same(s.project(x.contiguous()), s.project(x))
    same(s.apply(strided_a, strided_x), s.apply(a, x))
    same(s.product(strided_a, b), s.product(a, b))
    want = s.dense(a) + torch.eye(7, **F64)
    same(s.dense(s.add_identity(strided_a, 1.0)), want)


@every_structure
def test_nothing_gives_nothing(name):
    for n, c, batch in ((0, 4, ()), (3, 0, (2,)), (3, 4, (0,))):
        s = structure(name, n)
        a, x = torch.ones(*batch, s.size), torch.ones(*batch, n, c)
        assert not s.project(x).any()
        assert s.project(x).shape == s.product(a, a).shape == s.gram(a).shape == a.shape and s.apply(a, x).shape == x.shape
        assert s.trace(a).shape == s.norm(a).shape == batch and s.dense(a).shape == (*batch, n, n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_structure
def test_precision(name, dtype, assert_as_accurate):
    """At most twice the error of dense matrices in PyTorch, of the same dtype, for what a step meets: near the identity and
    not."""
    for scale in (1.0, 0.05):
        s, a, b, x = members(name, 24, 2)
        a, b = (s.add_identity(scale * m / math.sqrt(24), 1.0) for m in (a, b))
        low = a.to(dtype), b.to(dtype), x.to(dtype)
        wide = [s.dense(m.double()) for m in low[:2]] + [low[2].double()]

        def check(got: Tensor, function: Callable[..., Tensor], wide: Any = wide, dtype: torch.dtype = dtype) -> None:
            composed = function(*(m.to(dtype) for m in wide))
            assert got.dtype == composed.dtype == dtype
            assert_as_accurate(got, composed, function(*wide))

        a, b, x = low
        check(s.dense(s.project(x)), lambda a, b, x: projection(name, x @ x.mT))
        check(s.apply(a, x), lambda a, b, x: a @ x)
        check(s.apply(a, x, transpose=True), lambda a, b, x: a.mT @ x)
        check(s.dense(s.product(a, b)), lambda a, b, x: a @ b)
        check(s.dense(s.gram(a)), lambda a, b, x: projection(name, a.mT @ a))
        check(s.trace(a), lambda a, b, x: a.diagonal(dim1=-2, dim2=-1).sum(-1))
        check(s.inner(a, b), lambda a, b, x: total(a * b))
        check(s.norm(a), lambda a, b, x: torch.linalg.matrix_norm(a))
        if isinstance(s, Symmetric):
            h = s.gram(b)
            wide[1] = s.dense(h.double())
            check(s.dense(s.congruence(a, h)), lambda a, h, x: a.mT @ h @ a)


@pytest.mark.parametrize("name", ["triltoeplitz", "triutoeplitz"])
def test_precision_of_long_diagonals(name, assert_as_accurate):
    """The mean over few entries of an outer diagonal must not get the rounding error of the sum over a thousand."""
    s = structure(name, 1000)
    x, a = torch.randn(8, 1000).mT, 0.1 * torch.randn(1000)
    a[0] = 1
    wide, a64 = x.double(), s.dense(a.double())
    assert_as_accurate(s.dense(s.project(x)), projection(name, x @ x.mT), projection(name, wide @ wide.mT))
    assert_as_accurate(s.dense(s.gram(a)), projection(name, s.dense(a).mT @ s.dense(a)), projection(name, a64.mT @ a64))
    assert_as_accurate(s.apply(a, x), s.dense(a) @ x, a64 @ wide)


@every_structure
def test_half_precision_accumulates_in_single(name):
    """3072 squares of a number whose square bfloat16 rounds, which shows in their sum; where that is kept in bfloat16, it stops
    long before the end."""
    s, v, bf16 = structure(name, 3), 147 / 128, {"dtype": torch.bfloat16}
    want = torch.tensor(3072 * v * v, **bf16)
    assert want != 3072 * torch.tensor(v, **bf16).square()
    assert torch.equal(s.dense(s.project(torch.full((3, 3072), v, **bf16))).diagonal(), want.expand(3))
    many = structure(name, n := 3072 if s.size == s.n else 96)
    a = many.identity(**bf16) * v
    assert many.inner(a, a) == torch.tensor(n * v * v, **bf16) and many.trace(a) == torch.tensor(n * v, **bf16)
    assert many.norm(a) == torch.tensor((n * v * v) ** 0.5, **bf16)


# --- What makes them fit for SINGD ------------------------------------------------------------------------------------


@every_size
@every_structure
def test_products_and_inverses_are_members(name, n):
    s = structure(name, n)
    a, b = (s.dense(near_identity(s)) for _ in range(2))
    assert is_member(name, a) and is_member(name, a @ b) and is_member(name, torch.linalg.inv(a))
    assert pattern(name, n).all() or not is_member(name, torch.linalg.inv(a) + 1e-6)


@pytest.mark.parametrize("n", [1, 4, 6])
@every_structure
def test_projection_makes_the_fisher_block_the_identity(name, n):
    """Section 3.2. Of a Gaussian with precision `S = A⁻ᵀ A⁻¹`, `A = K Expm(M) ⊗ C`, by automatic differentiation in the stored
    numbers of `M`, at `M = 0`: natural gradients are `Π̂` of the gradient in `M`, and with `M = Π̂(m) / √(2 d_o)` the Fisher
    block is the identity in `m`, on what of the symmetric matrices the structure can see. The skew part of a dense block
    changes nothing to first order, so natural gradients are those of least norm."""
    s, d_o = structure(name, n), 2
    k, c = s.dense(near_identity(s)), torch.eye(d_o, **F64) + 0.2 * draw(d_o, d_o)
    u, g = draw(n, n + 2), draw(d_o, d_o + 2)
    hessian = torch.kron(u @ u.T, g @ g.T)
    basis = s.dense(torch.eye(s.size, **F64))  # of the subspace

    def factor(coordinates: Tensor) -> Tensor:
        return torch.kron(k @ torch.linalg.matrix_exp(torch.einsum("s,sij->ij", coordinates, basis)), c)

    start = torch.zeros(s.size, **F64)
    covariance = factor(start) @ factor(start).T

    def negative_log_density(coordinates: Tensor) -> Tensor:
        """Its expectation at `M = 0`, but for a constant."""
        inverse = torch.linalg.inv(factor(coordinates))
        precision = inverse.T @ inverse
        return 0.5 * (precision @ covariance).trace() - 0.5 * torch.logdet(precision)

    def loss(coordinates: Tensor) -> Tensor:
        a = factor(coordinates)
        return 0.5 * (hessian @ a @ a.T).trace() - torch.linalg.slogdet(a).logabsdet

    fisher = torch.func.hessian(negative_log_density)(start)
    natural = torch.linalg.pinv(fisher, rtol=1e-9, hermitian=True) @ torch.func.grad(loss)(start)

    # SINGD's update of m_K: Π̂(N) / (2 d_o), N = Tr(H_C) H_K − d_o I, H_K = (Kᵀu)(Kᵀu)ᵀ
    trace = ((c.T @ g) ** 2).sum()
    update = s.add_identity(trace * s.project(k.T @ u), -d_o) / (2 * d_o)
    torch.testing.assert_close(natural, update, rtol=1e-8, atol=1e-8)

    ij = torch.triu_indices(n, n).T.tolist()
    symmetric = torch.zeros(len(ij), n, n, **F64)  # an orthonormal basis of the symmetric matrices
    for m, (i, j) in zip(symmetric, ij, strict=True):
        m[i, j] = m[j, i] = 1 if i == j else 0.5**0.5
    seen = projection(name, symmetric).flatten(1) @ torch.linalg.pinv(basis.flatten(1)) / (2 * d_o) ** 0.5
    block = seen @ fisher @ seen.T
    mask = pattern(name, n)
    visible = n if name.endswith("toeplitz") else int((mask | mask.T).triu().sum())  # dimensions
    torch.testing.assert_close(block @ block, block, rtol=1e-8, atol=1e-8)  # a projection, of that rank
    torch.testing.assert_close(block.trace(), torch.tensor(visible, **F64), rtol=1e-8, atol=1e-8)


# --- What they cost ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, formula",
    {
        "dense": lambda n: n**2,
        "diagonal": lambda n: n,
        "blockdiagonal3": lambda n: n // 3 * 9 + (n % 3) ** 2,
        "tril": lambda n: n * (n + 1) // 2,
        "triu": lambda n: n * (n + 1) // 2,
        "rank3tril": lambda n: 3 * n + n - 3,
        "rank3triu": lambda n: 3 * n + n - 3,
        "rank3tril_bottomright": lambda n: 3 * n + n - 3,
        "rank3triu_bottomright": lambda n: 3 * n + n - 3,
        "hierarchical2_3": lambda n: 2 * n + 3 * (n - 2) + n - 5,
        "triltoeplitz": lambda n: n,
        "triutoeplitz": lambda n: n,
    }.items(),
)
def test_size(name, formula):
    for n in (5, 6, 7, 100):
        assert structure(name, n).size == formula(n)


class Largest(TorchDispatchMode):
    """How many numbers the largest result holds."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            if isinstance(x, Tensor):
                self.numbers = max(self.numbers, x.numel())
        return result


def operations(s: Structure, a: Tensor, x: Tensor) -> list[Tensor]:
    """Each, but for `dense`."""
    done = [s.project(x), s.apply(a, x), s.apply(a, x, transpose=True), s.product(a, a), s.gram(a), s.trace(a)]
    done += [s.inner(a, a), s.norm(a), s.add_identity(1 * a, 0.5), s.identity(dtype=a.dtype, device=a.device)]
    return [*done, s.congruence(a, a)] if isinstance(s, Symmetric) else done


def largest(name: str) -> int:
    s = structure(name, 512)
    a, x = torch.ones(s.size), torch.ones(8, 512).mT
    with Largest() as record:
        operations(s, a, x)
    return record.numbers


@pytest.mark.parametrize("name", SPARSE)
def test_memory(name):
    """Linear in `n`: for k = c = 8 no temporary has more than 32 numbers for a row, of 512."""
    assert 512 * 8 <= largest(name) <= 32 * 512


def test_memory_of_others():
    assert largest("dense") == largest("tril") == 512 * 512


def multiply_adds(name: str, n: int) -> int:
    s = structure(name, n)
    with FlopCounterMode(display=False) as counter:
        operations(s, torch.ones(s.size), torch.ones(8, n).mT)
    return counter.get_total_flops()


@pytest.mark.parametrize("name, growth", [*((n, 2) for n in SPARSE if re.search("[0-9]", n)), ("dense", 8), ("tril", 8)])
def test_multiply_adds_grow_as_in_table_2(name, growth, monkeypatch):
    for module in ("dense", "triangular"):  # the counter does not look into the op
        monkeypatch.setattr(f"spectral_ops.structures.{module}.gram", lambda x: x @ x.mT)
    assert multiply_adds(name, 1024) == pytest.approx(growth * multiply_adds(name, 512), rel=0.05)


def test_sums_of_squares_need_no_temporary_on_a_gpu():
    with FakeTensorMode():
        x = torch.empty(8, 512, dtype=torch.bfloat16, device="cuda").mT
        with Largest() as record:
            assert (y := Diagonal(512).project(x)).dtype == x.dtype and y.shape == (512,)
    assert record.numbers == 512


# --- Objects ----------------------------------------------------------------------------------------------------------


@every_structure
def test_fake_tensors(name):
    """Shapes do not depend on values: they run where there are none."""
    s = structure(name, 7)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        real = operations(s, torch.ones(2, s.size, dtype=dtype), torch.ones(2, 4, 7, dtype=dtype).mT)
        with FakeTensorMode():
            fake = operations(s, torch.ones(2, s.size, dtype=dtype), torch.ones(2, 4, 7, dtype=dtype).mT)
        assert [(x.shape, x.dtype) for x in fake] == [(x.shape, x.dtype) for x in real]
        assert all(x.dtype == dtype for x in real)


@pytest.mark.parametrize("name", ["dense", "blockdiagonal3", "tril", "hierarchical2_3", "triutoeplitz"])
def test_dynamo_traces_them_whole(name):
    s, a, _, x = members(name, 7, 2)
    torch._dynamo.reset()
    for got, want in zip(torch.compile(operations, backend="eager", fullgraph=True)(s, a, x), operations(s, a, x), strict=True):
        assert torch.equal(got, want)


def test_equal_patterns_are_equal():
    every = [structure(name, n) for name in NAMES for n in (6, 7)]
    assert len(set(every)) == len(every) and every == [structure(name, n) for name in NAMES for n in (6, 7)]
    assert structure("rank2triu", 7) == BlockTriangular(Dense(2), Diagonal(5), upper=True)
    rest = BlockTriangular(Diagonal(2), Dense(3), upper=False)
    assert structure("hierarchical2_3", 7) == BlockTriangular(Dense(2), rest, upper=True)
    assert structure("blockdiagonal3", 7) == BlockDiagonal(7, 3) and structure("tril", 7) == Triangular(7, upper=False)
    assert structure("triutoeplitz", 7) == Toeplitz(7, upper=True)


def test_structures_nest():
    """Any two make a third."""
    s = BlockTriangular(Triangular(3, upper=True), BlockDiagonal(4, 3), upper=False)
    a, b = draw(2, s.size), draw(2, s.size)
    same(s.dense(s.product(a, b)), s.dense(a) @ s.dense(b))
    same(s.dense(s.gram(a)), s.dense(s.project(s.dense(a).mT)))


UNKNOWN = (
    "Dense", "", "blockdiagonal", "blockdiagonal0", "rank0tril", "rank-1tril", "rank2", "rank2trim", "rank2tril_topleft",
    "hierarchical2", "hierarchical0_2", "hierarchical2_0", "hierarchical2_3_4", "rank02tril", "rank2tril\n", "rank٢tril",
    "toeplitz", None,
)  # fmt: skip


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_names(name):
    with pytest.raises(ValueError, match=r"^structure: `name` must be dense, .*hierarchical\{k1\}_\{k2\}.* got ") as error:
        structure(name, 4)
    assert str(error.value).endswith(repr(name))


@pytest.mark.parametrize("n", [-1, 2.0, "3", True, None])
def test_wrong_sizes(n):
    makers = {
        "structure": lambda: structure("dense", n), "Dense": lambda: Dense(n), "Diagonal": lambda: Diagonal(n),
        "BlockDiagonal": lambda: BlockDiagonal(n, 2), "Triangular": lambda: Triangular(n, True),
        "Toeplitz": lambda: Toeplitz(n, True),
    }  # fmt: skip
    for owner, make in makers.items():
        with pytest.raises(ValueError, match=f"^{owner}: `n` must be an integer of at least 0, got {re.escape(repr(n))}$"):
            make()
    with pytest.raises(ValueError, match=r"^BlockDiagonal: `k` must be an integer of at least 1, got 0$"):
        BlockDiagonal(4, 0)


@pytest.mark.parametrize("name", ["dense", "diagonal", "blockdiagonal3"])
def test_inverses_are_exact_or_not_a_number(name):
    """Of what is not positive definite there is none; its neighbours in the batch have theirs."""
    s = structure(name, 7)
    x = s.project(torch.randn(3, 7, 20, dtype=torch.float64))
    want = torch.linalg.inv(s.dense(x))
    torch.testing.assert_close(s.dense(s.inverse(x)), want, rtol=1e-10, atol=1e-10)
    for wrong in (s.add_identity(x[1].clone(), -1e6), torch.tensor(0.0), torch.tensor(torch.inf), torch.tensor(torch.nan)):
        spoilt = x.clone()
        spoilt[1] = wrong
        got = s.inverse(spoilt)
        assert got[1].isnan().any()
        torch.testing.assert_close(s.dense(got[::2]), want[::2], rtol=1e-10, atol=1e-10)
