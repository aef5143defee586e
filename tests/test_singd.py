"""SINGD against its authors' package, against the paper's boxes in dense matrices, and what the paper claims of it.

The capture of curvature is test_curvature.py's; here it is part of the way that a whole run goes.
"""

import copy
import itertools
import re
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from spectral_ops.optim import IKFAC, INGD, KFAC, SINGD
from spectral_ops.structures import structure

SIDES = ("k", "c")


def error(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def identity(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64)


def layers(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]


def dims(layer: nn.Module) -> tuple[int, int]:
    return layer.weight[0].numel() + (layer.bias is not None), len(layer.weight)


def factors(optimizer: SINGD, layer: nn.Module, structures: tuple[str, str], of: str = "factor") -> tuple[Tensor, Tensor]:
    """Both, as dense matrices."""
    state = optimizer.state[layer.weight]
    sides = zip(SIDES, structures, dims(layer), strict=True)
    k, c = (structure(name, n).dense(state[f"{of}_{side}"]).double() for side, name, n in sides)
    return k, c


# --- The authors' package ---------------------------------------------------------------------------------------------


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 9, 3, stride=(2, 1), padding=(1, 0)), nn.ReLU(), nn.Conv2d(9, 5, 2, dilation=2), nn.Tanh(),
        nn.Flatten(), nn.Linear(30, 34), nn.Tanh(), nn.Linear(34, 3, bias=False),
    )  # fmt: skip


def sequence_net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 33), nn.Tanh(), nn.Linear(33, 31, bias=False), nn.Tanh(), nn.Linear(31, 3))


# With the shape of an input, and the size of the loss at which curvature and identity weigh alike.
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], float]] = {
    "conv": (conv_net, (4, 7, 7), 1.6),
    "sequence": (sequence_net, (5, 6), 0.4),
}
STRUCTURES = {
    "dense": "dense",
    "diagonal": "diagonal",
    "block30diagonal": "blockdiagonal30",
    "hierarchical15_15": "hierarchical15_15",
    "triltoeplitz": "triltoeplitz",
    "triutoeplitz": "triutoeplitz",
}
OPTIONS = {
    "lr_cov": "preconditioner_lr",
    "alpha1": "riemannian_momentum",
    "normalize_lr_cov": "normalize_preconditioner_lr",
    "T": "update_interval",
}


@pytest.fixture
def released(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`singd` as it is, but for float64, which its structures refuse where they choose the dtype of a product."""
    reason = "it is of the extra `bench`, which `make setup` installs"
    optimizer = pytest.importorskip("singd.optim.optimizer", reason=reason)
    from singd.structures import blockdiagonal, hierarchical, triltoeplitz, triutoeplitz

    for module in (blockdiagonal, hierarchical, triltoeplitz, triutoeplitz):
        monkeypatch.setattr(module, "lowest_precision", lambda *dtypes: dtypes[0])
    return optimizer


@pytest.fixture
def package(released: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Where its block-diagonal matrices multiply by their transpose they take the matrix itself: here they do not."""
    from singd.structures.blockdiagonal import BlockDiagonalMatrixTemplate

    monkeypatch.setattr(BlockDiagonalMatrixTemplate, "rmatmat", transposed_product)
    monkeypatch.setattr(BlockDiagonalMatrixTemplate, "from_inner", inner_product)
    return released


def transposed_product(self, x: Tensor) -> Tensor:
    return type(self)(self._blocks.mT, self._last.mT) @ x


def inner_product(self, X: Tensor | None = None):
    if X is not None:
        return self.from_mat_inner(self.rmatmat(X))
    return type(self)(self._blocks.mT @ self._blocks, self._last.T @ self._last)


def batches(shape: tuple[int, ...], outputs: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Inputs whose second moment is far from the identity, and targets that depend on them."""
    scale = torch.linspace(0.3, 2.0, shape[-1]).to(dtype)
    result = []
    for t in range(3):
        generator = torch.Generator().manual_seed(t)
        x = 0.5 + scale * torch.randn(8, *shape, generator=generator, dtype=torch.float64).to(dtype)
        lead = (8,) if len(shape) == 3 else (8, *shape[:-1])
        features = x.reshape(*lead, -1)[..., : 2 * outputs].reshape(*lead, outputs, 2)
        result.append((x, torch.sin(features.sum(-1)) + 0.5))
    return result


def loss_of(model: nn.Module, x: Tensor, y: Tensor, average: str | None, scale: float) -> Tensor:
    total = scale * (model(x) - y).square().sum()
    return total / {"batch": len(y), "batch+sequence": y[..., 0].numel(), None: 1}[average]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: list, average: str | None, scale: float) -> list[float]:
    losses = []
    for t in range(30):
        loss = loss_of(model, *data[t % len(data)], average, scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def pair(package: ModuleType, net: str, structures: tuple[str, str], dtype: torch.dtype = torch.float64, **options):
    """The package and ours, trained from one start on the same data; options by the package's names."""
    make, shape, scale = NETS[net]
    scale *= options.pop("scale", 1.0)
    theirs = make().to(dtype)
    mine = copy.deepcopy(theirs)
    options = {"lr": 0.003, "lr_cov": 0.04, "T": 1, "loss_average": "batch"} | options
    data, average = batches(shape, 3, dtype), options["loss_average"]
    first = package.SINGD(theirs, structures=structures, **options)
    losses = train(theirs, first, data, average, scale)
    ours = {OPTIONS.get(name, name): value for name, value in options.items()}
    second = SINGD(mine, structures=tuple(STRUCTURES[name] for name in structures), **ours)
    train(mine, second, data, average, scale)
    return theirs, mine, first, second, losses


def assert_same_way(package: ModuleType, net: str, structures: tuple[str, str], bound: float = 1e-9, **options) -> None:
    """Parameters and factors agree; the factors are far from a multiple of the identity, and the loss falls."""
    theirs, mine, first, second, losses = pair(package, net, structures, **options)
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    ours, learned = tuple(STRUCTURES[name] for name in structures), []
    for name, twin in zip(first.module_names.values(), layers(mine), strict=True):
        want = (first.Ks[name].to_dense().double(), first.Cs[name].to_dense().double())
        for x, y in zip(factors(second, twin, ours), want, strict=True):
            learned.append(error(y.diag().mean() * identity(len(y)), y))
            assert learned[-1] > 0.003 and error(x, y) < bound, name
    assert max(learned) > 0.1
    for p, q in zip(theirs.parameters(), mine.parameters(), strict=True):
        assert error(q, p) < bound


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
@pytest.mark.parametrize("name", STRUCTURES)
def test_it_is_the_authors_package(package, net, kfac_approx, name):
    """30 steps. Every side but those of 3 and 5 is longer than 30, and none a multiple of it."""
    assert_same_way(package, net, (name, name), kfac_approx=kfac_approx)


@pytest.mark.parametrize("structures", list(itertools.pairwise([*STRUCTURES, "dense"])), ids="-".join)
def test_sides_of_different_structures_are_the_packages(package, structures):
    assert_same_way(package, "sequence", structures)


@pytest.mark.parametrize(
    "net,structures",
    [("conv", ("dense", "dense")), ("sequence", ("hierarchical15_15", "triltoeplitz"))],
    ids=["conv", "sequence"],
)
@pytest.mark.parametrize(
    "options",
    [
        {"loss_average": "batch+sequence", "scale": 0.8},
        {"loss_average": None, "scale": 0.12},
        {"kfac_like": True, "alpha1": 0.0, "lr_cov": 0.02},
        {"normalize_lr_cov": True, "lr_cov": 0.1},
        {"normalize_lr_cov": True, "lr_cov": 0.05, "alpha1": 0.0},
        {"weight_decay": 0.1},
        {"momentum": 0.0, "alpha1": 0.9, "damping": 0.1, "lr_cov": 0.02},
    ],
    ids=str,
)
def test_with_these_options_too(package, net, options, structures):
    assert_same_way(package, net, structures, **options)


@pytest.mark.parametrize("net", NETS)
def test_the_packages_block_diagonal_factors_are_not_the_papers(released, net):
    """`K` stands where Fig. 4 has `Kᵀ`: the same until `K` is a product of two updates. After 30 the parameters of the
    convolutional net are 0.16 away from the paper's, those of the other 0.06; with `Kᵀ` in both places all agree, as above."""
    theirs, mine, *_ = pair(released, net, ("block30diagonal", "block30diagonal"))
    assert max(error(q, p) for p, q in zip(theirs.parameters(), mine.parameters(), strict=True)) > 0.03


# --- The boxes --------------------------------------------------------------------------------------------------------


def weights(name: str, n: int) -> Tensor:
    """Table 1: what the projection multiplies the numbers of a symmetric matrix by."""
    w, (k, k2) = identity(n), sizes(name, n)
    below, above = 2 * torch.ones(n, n, dtype=torch.float64).tril(-1), 2 * torch.ones(n, n, dtype=torch.float64).triu(1)
    if name == "dense":
        return torch.ones(n, n, dtype=torch.float64)
    if name in ("tril", "triltoeplitz"):
        return w + below
    if name in ("triu", "triutoeplitz"):
        return w + above
    if name.startswith("blockdiagonal"):
        return torch.block_diag(*(torch.ones(len(x), len(x), dtype=torch.float64) for x in torch.arange(n).split(k)))
    if name.startswith("rank"):
        first, last = (slice(n - k, n), slice(n - k)) if name.endswith("bottomright") else (slice(k), slice(k, n))
        w[first, first] = 1
        # The dense part's rows or columns, on the side of the diagonal where the name says.
        if ("triu" in name) != name.endswith("bottomright"):
            w[first, last] = 2
        else:
            w[last, first] = 2
    if name.startswith("hierarchical"):
        w[:k, :k], w[:k, k:] = 1, 2
        w[n - k2 :, k : n - k2], w[n - k2 :, n - k2 :] = 2, 1
    return w


def sizes(name: str, n: int) -> tuple[int, int]:
    """The numbers in a name, cut to what there is room for."""
    k, k2 = (*map(int, re.findall(r"\d+", name)), 0, 0)[:2]
    return min(k, n), min(k2, n - min(k, n))


def projection(name: str, m: Tensor) -> Tensor:
    n = len(m)
    if name.endswith("toeplitz"):
        mean = {j: m.diagonal(j).mean() for j in range(1 - n, n)}
        m = torch.stack([torch.stack([mean[j - i] for j in range(n)]) for i in range(n)])
    return weights(name, n) * m


class Box:
    """One layer in dense matrices: Fig. 4 (right), with `Tr(H_K)` in its second and `m_K` in its third line, or Fig. 3."""

    def __init__(self, weight: Tensor, structures: tuple[str, str], method: type, options: dict):
        self.weight, self.structures, self.method, self.options = weight, structures, method, options
        d_o, d_i = weight.shape
        self.k, self.c = identity(d_i), identity(d_o)  # of KFAC: S_K and S_C
        self.m_k, self.m_c, self.momentum = torch.zeros_like(self.k), torch.zeros_like(self.c), torch.zeros_like(weight)

    def step(self, u: Tensor, g: Tensor, gradient: Tensor) -> None:
        o = self.options
        beta, damping = o["preconditioner_lr"], o["damping"]
        d_o, d_i = self.weight.shape
        i_k, i_c = identity(d_i), identity(d_o)
        if self.method is KFAC:
            self.k = (1 - beta) * self.k + beta * u
            self.c = (1 - beta) * self.c + beta * g
            a, b = torch.linalg.inv(self.c + damping * i_c), torch.linalg.inv(self.k + damping * i_k)
        else:
            k, c = self.k, self.c
            h_k, h_c, kk, cc = k.T @ u @ k, c.T @ g @ c, k.T @ k, c.T @ c
            if self.method is IKFAC:
                alpha, n_k, n_c = 0.0, h_k + damping * kk - i_k, h_c + damping * cc - i_c
            else:
                alpha = o["riemannian_momentum"]
                n_k = (h_c.trace() * h_k + damping * cc.trace() * kk - d_o * i_k) / d_o
                n_c = (h_k.trace() * h_c + damping * kk.trace() * cc - d_i * i_c) / d_i
            self.m_k = alpha * self.m_k + projection(self.structures[0], n_k) / 2
            self.m_c = alpha * self.m_c + projection(self.structures[1], n_c) / 2
            for m in (self.m_k, self.m_c):
                mean = m.diag().mean()
                assert beta * (mean.abs() + (m - mean * identity(len(m))).norm()) < 0.5  # longer steps are shortened
            self.k, self.c = k @ (i_k - beta * self.m_k), c @ (i_c - beta * self.m_c)
            a, b = self.c @ self.c.T, self.k @ self.k.T
        self.momentum = o["momentum"] * self.momentum + a @ gradient @ b + o["weight_decay"] * self.weight
        self.weight = self.weight - o["lr"] * self.momentum


def by_hand(boxes: list[Box], x: Tensor, y: Tensor, scale: float) -> float:
    """A step of a net whose layers have tanh between them, and a loss that is a mean over the batch, not over the sequence."""
    inputs, outputs = [], []
    for box in boxes:
        inputs.append(torch.cat([x, torch.ones_like(x[..., :1])], -1))
        outputs.append((inputs[-1] @ box.weight.T).requires_grad_())
        x = outputs[-1].tanh()
    loss = scale * (outputs[-1] - y).square().sum() / len(y)
    for box, a, g in zip(boxes, inputs, torch.autograd.grad(loss, outputs), strict=True):
        a, g = a.detach().flatten(0, -2), g.flatten(0, -2)
        box.step(a.T @ a / len(a), len(y) * g.T @ g, g.T @ a)
    return loss.item()


def joined(layer: nn.Module) -> Tensor:
    return torch.cat([layer.weight.detach().flatten(1), layer.bias.detach()[:, None]], 1)


def assert_is_the_box(method: type, structures: tuple[str, str] | None, sequence: int | None = None, **options) -> None:
    options = {
        "lr": 0.01, "momentum": 0.9, "preconditioner_lr": 0.05, "damping": 0.02, "weight_decay": 0.1,
        **({"riemannian_momentum": 0.6} if method in (SINGD, INGD) else {}), **options,
    }  # fmt: skip
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    given = {} if structures is None else {"structures": structures}
    optimizer = method(model, update_interval=1, loss_average="batch", **given, **options)
    structures = structures or ("dense", "dense")
    boxes = [Box(joined(layer), structures, method, options) for layer in layers(model)]
    data = batches((sequence, 6) if sequence else (6,), 3, torch.float64)
    scale = 0.2 if sequence else 0.5
    losses = train(model, optimizer, data, "batch", scale)
    want = [by_hand(boxes, *data[t % len(data)], scale) for t in range(30)]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3]) and abs(losses[-1] / want[-1] - 1) < 1e-10
    for box, layer in zip(boxes, layers(model), strict=True):
        assert error(joined(layer), box.weight) < 1e-10
        for name, n, got, x in zip(structures, dims(layer), factors(optimizer, layer, structures), (box.k, box.c), strict=True):
            assert error(x, identity(n)) > 0.05 and error(got, x) < 1e-10, name


OTHERS = (
    "tril", "triu", "rank2tril", "rank2triu", "rank2tril_bottomright", "rank2triu_bottomright", "blockdiagonal3",
    "hierarchical2_3",
)  # fmt: skip


@pytest.mark.parametrize("name", ["dense", "diagonal", *OTHERS, "triltoeplitz", "triutoeplitz"])
def test_it_is_the_box(name):
    assert_is_the_box(SINGD, (name, name))


@pytest.mark.parametrize("structures", list(itertools.pairwise(["dense", *OTHERS, "triutoeplitz", "diagonal"])), ids="-".join)
def test_sides_of_different_structures_are_the_box(structures):
    assert_is_the_box(SINGD, structures, sequence=3)


@pytest.mark.parametrize("method", [INGD, IKFAC, KFAC])
@pytest.mark.parametrize("sequence", [None, 3])
def test_its_siblings_are_their_boxes(method, sequence):
    """INGD is Fig. 4 (left), KFAC and IKFAC are Fig. 3."""
    assert_is_the_box(method, None, sequence)


@pytest.mark.parametrize("name", ["tril", "hierarchical2_3", "triutoeplitz"])
def test_structured_ikfac_is_the_box(name):
    assert_is_the_box(IKFAC, (name, name))


# --- Claims -----------------------------------------------------------------------------------------------------------


def fed(method: type, weight: Tensor, steps: list[tuple[Tensor, Tensor]], **options) -> tuple[nn.Module, SINGD]:
    """A layer trained on curvature told by hand, `U = aᵀ a / rows` and `G = bᵀ b`, and gradients that depend on the weight."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False).double()
    layer.weight.data.copy_(weight)
    optimizer = method(layer, update_interval=1, loss_average=None, **options)
    for t, (a, b) in enumerate(steps):
        noise = torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(t))
        layer.weight.grad = layer.weight.detach() + noise
        optimizer.observe(layer.weight, a, b)
        optimizer.step()
    return layer, optimizer


def rows(count: int, n: int, steps: int, size: float = 1.0) -> list[Tensor]:
    """With columns of unlike size, and correlated."""
    mix = torch.randn(n, n, dtype=torch.float64) / n**0.5
    return [size * torch.randn(count, n, dtype=torch.float64) @ mix for _ in range(steps)]


def test_ikfac_is_kfac_up_to_the_square_of_the_step():
    """Theorem 1: after a number of updates from one start on the same curvature, `K Kᵀ` is `(S_K + λI)⁻¹` up to `O(β₁²)`, and
    `C Cᵀ` is `(S_C + λI)⁻¹`: half of `β₁` leaves a fourth of the difference. `lr` is 0; the start is written into the state."""
    n, m, damping, count = 6, 4, 0.1, 5
    steps = list(zip(rows(20, n, count + 1), rows(20, m, count + 1, 0.2), strict=True))
    start = [x @ x.T + 0.5 * identity(len(x)) for x in (torch.randn(d, d, dtype=torch.float64) for d in (n, m))]

    def differences(beta: float) -> list[float]:
        results = []
        for method in (IKFAC, KFAC):
            layer, optimizer = fed(method, torch.zeros(m, n), steps[:1], lr=0.0, preconditioner_lr=beta, damping=damping)
            state = optimizer.state[layer.weight]
            for side, s in zip(SIDES, start, strict=True):
                turn = torch.linalg.qr(torch.randn(len(s), len(s), dtype=torch.float64))[0]
                root = torch.linalg.cholesky(torch.linalg.inv(s + damping * identity(len(s))))
                state[f"factor_{side}"].copy_((s if method is KFAC else root @ turn).flatten())
            for a, b in steps[1:]:
                layer.weight.grad = torch.ones_like(layer.weight)
                optimizer.observe(layer.weight, a, b)
                optimizer.step()
            assert not layer.weight.any()
            results.append(factors(optimizer, layer, ("dense", "dense")))
        roots, kfac = results
        inverses = [torch.linalg.inv(s + damping * identity(len(s))) for s in kfac]
        return [error(k @ k.T, x) for k, x in zip(roots, inverses, strict=True)]

    errors = [differences(0.08 / 2**i) for i in range(6)]
    for large, small in itertools.pairwise(errors):
        assert all(y < x for x, y in zip(large, small, strict=True))
    for large, small in itertools.pairwise(errors[2:]):
        assert all(3.6 < x / y < 4.4 for x, y in zip(large, small, strict=True)), errors


INVARIANT = [(INGD, None), *((SINGD, pair) for pair in (
    ("diagonal", "dense"), ("hierarchical2_1", "rank1tril"), ("triutoeplitz", "blockdiagonal2"),
))]  # fmt: skip


@pytest.mark.parametrize("method,structures", [*INVARIANT, (IKFAC, None), (KFAC, None)])
@pytest.mark.parametrize("scale", [1 / 9, 4.0])
def test_invariance_to_the_scale_of_the_approximation(method, structures, scale):
    """Appendix F: `U ⊗ G` is also `aU ⊗ G/a`. INGD and SINGD go the same way with both, KFAC and IKFAC do not."""
    n, m = 6, 4
    steps = list(zip(rows(20, n, 20, 1.5), rows(20, m, 20, 0.3), strict=True))
    other = [(scale**0.5 * a, scale**-0.5 * b) for a, b in steps]
    options = {"lr": 0.02, "preconditioner_lr": 0.05, "damping": 0.1}
    options |= {} if structures is None else {"structures": structures}
    weight = torch.randn(m, n, dtype=torch.float64)
    (layer, optimizer), (twin, second) = fed(method, weight, steps, **options), fed(method, weight, other, **options)
    pairs = zip(
        *(factors(o, x, structures or ("dense", "dense")) for o, x in ((optimizer, layer), (second, twin))), strict=True
    )
    differences = [error(layer.weight, twin.weight), *(error(x, y) for x, y in pairs)]
    assert error(layer.weight, weight) > 0.05
    if method in (INGD, SINGD):
        assert max(differences) < 1e-12
    else:
        assert min(differences) > 0.01


def lower(n: int, k: int = 0) -> int:
    """Numbers of a dense block of `k`, a diagonal one of `n − k`, and what is beside or below them."""
    return k * k + k * (n - k) + n - k


SIZES: dict[str, Callable[[int], int]] = {
    "dense": lambda n: n * n,
    "diagonal": lambda n: n,
    "blockdiagonal4": lambda n: n // 4 * 16 + (n % 4) ** 2,
    "tril": lambda n: n * (n + 1) // 2,
    "triu": lambda n: n * (n + 1) // 2,
    **{f"rank3{end}": lambda n: lower(n, 3) for end in ("tril", "triu", "tril_bottomright", "triu_bottomright")},
    "hierarchical2_3": lambda n: 4 + 2 * (n - 2) + lower(n - 2, 3),
    "triltoeplitz": lambda n: n,
    "triutoeplitz": lambda n: n,
}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("riemannian_momentum", [0.5, 0.0])
def test_factors_take_the_memory_of_their_structure(name, dtype, riemannian_momentum):
    """And so do their momenta, which there are none of without momentum."""
    model = nn.Sequential(nn.Linear(18, 23), nn.Tanh(), nn.Linear(23, 10, bias=False))
    options = {"preconditioner_dtype": dtype, "riemannian_momentum": riemannian_momentum}
    optimizer = SINGD(model, structures=(name, name), update_interval=1, **options)
    model(torch.randn(7, 18)).square().mean().backward()
    optimizer.step()
    state = [x for held in optimizer.state.values() for key, x in held.items() if key.endswith(("_k", "_c"))]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in state}
    expected = sum(SIZES[name](n) for n in (19, 23, 23, 10)) * dtype.itemsize * (2 if riemannian_momentum else 1)
    assert all(x.dtype == dtype for x in state)
    assert sum(storages.values()) == sum(x.numel() * x.element_size() for x in state) == expected


@pytest.mark.parametrize(
    "structures", [("dense", "dense"), ("hierarchical4_4", "triltoeplitz"), ("diagonal", "tril")], ids="-".join
)
def test_bfloat16_factors_follow_those_of_float32(structures):
    model = sequence_net()
    data, losses = batches((5, 6), 3, torch.float32), {}
    for dtype in (torch.float32, torch.bfloat16):
        twin = copy.deepcopy(model)
        optimizer = SINGD(
            twin, lr=0.003, preconditioner_lr=0.03, update_interval=1, structures=structures, preconditioner_dtype=dtype
        )
        losses[dtype] = train(twin, optimizer, data, "batch", 0.4)
        for layer in layers(twin):
            for of in ("factor", "momentum"):
                assert all(optimizer.state[layer.weight][f"{of}_{side}"].dtype == dtype for side in SIDES)
            assert all(x.isfinite().all() and error(identity(len(x)), x) > 0.1 for x in factors(optimizer, layer, structures))
    want, got = (torch.tensor(losses[dtype]) for dtype in (torch.float32, torch.bfloat16))
    assert want[-3:].mean() < 0.5 * want[:3].mean() and error(got, want) < 0.03


@pytest.mark.parametrize("structures", [("dense", "dense"), ("diagonal", "blockdiagonal2")], ids="-".join)
@pytest.mark.parametrize("size", [30.0, 1e3, 1e6])
def test_large_curvature_makes_no_factor_larger(structures, size):
    """`I − β₁ m` has eigenvalues under −1 where `β₁ m` has some over 2, and a factor would grow where it should shrink, and
    explode. So the step is shortened there, and what is left of growth is what no curvature gives, `β₁ / (2 (1 − α₁))`."""
    n, m, beta = 6, 4, 0.2
    steps = list(zip(rows(20, n, 30, size), rows(20, m, 30), strict=True))
    largest = [1.0, 1.0]
    for count in range(1, 31, 3):
        layer, optimizer = fed(SINGD, torch.zeros(m, n), steps[:count], lr=1e-6, preconditioner_lr=beta, structures=structures)
        norms = [torch.linalg.matrix_norm(x, 2).item() for x in factors(optimizer, layer, structures)]
        assert all(norm <= (1 + beta) ** 3 * before for norm, before in zip(norms, largest, strict=True))
        largest = norms
    assert max(largest) < 2


# --- Turns ------------------------------------------------------------------------------------------------------------


def test_layers_update_in_turns_after_ten_steps():
    """Ten in which all do, then each layer in one of three: none does in a step in which another does."""
    model = nn.Sequential(*(nn.Linear(5, 5) for _ in range(3)))
    optimizer = SINGD(model, update_interval=3, lr=0.01)
    changed: list[list[bool]] = []
    held = [torch.zeros(())] * 3
    for _ in range(16):
        optimizer.zero_grad()
        model(torch.randn(7, 5)).square().mean().backward()
        optimizer.step()
        now = [optimizer.state[layer.weight]["factor_k"].clone() for layer in model]
        changed.append([not torch.equal(x, y) for x, y in zip(now, held, strict=True)])
        held = now
    assert all(map(all, changed[:10])) and all(sum(turn) == 1 for turn in changed[10:])
    assert changed[10:13] == changed[13:] and all(map(any, zip(*changed[10:13], strict=True)))


def test_each_side_has_a_dtype_of_its_own(tmp_path):
    """Through a checkpoint too, whose options are plain values."""
    model = sequence_net()
    options = {"lr": 0.01, "update_interval": 1, "preconditioner_dtype": (torch.bfloat16, None)}
    optimizer = SINGD(model, **options)
    data = batches((5, 6), 3, torch.float32)
    train(model, optimizer, data, "batch", 0.4)
    state = optimizer.state[layers(model)[0].weight]
    assert [state[f"factor_{side}"].dtype for side in SIDES] == [torch.bfloat16, torch.float32]
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    twin = copy.deepcopy(model)
    second = SINGD(twin, **options)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for each in ((model, optimizer), (twin, second)):
        train(*each, data, "batch", 0.4)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
