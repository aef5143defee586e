"""The examples that put the ops into other people's preconditioners, against plain transcriptions in float64."""

import copy
import io
import runpy
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim._muon import _zeropower_via_newtonschulz

from spectral_ops import gram_track, reference
from spectral_ops.bench import output
from spectral_ops.bench.steps import CANDIDATES, SETTINGS, gate
from spectral_ops.bench.training import state_bytes

EXAMPLES = Path(__file__).parents[1] / "examples"
Build = Callable[..., torch.optim.Optimizer]


def example(file: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / file), run_name="example")


SOAP, MUON, KL = example("soap_tracked.py"), example("muon_gram.py"), example("kl_shampoo.py")
CLASSES: dict[str, Build] = {"soap": SOAP["TrackedSOAP"], "muon": MUON["MuonGram"], "kl": KL["KLShampoo"]}


def gradients(count: int, n: int, m: int, dtype: torch.dtype = torch.float64) -> Iterator[Tensor]:
    """Of one distribution: of separate variances in bases that are not the axes."""
    left, right = (torch.linalg.qr(torch.randn(k, k, dtype=dtype))[0] for k in (n, m))
    d_left, d_right = (torch.logspace(0, -1, k, dtype=dtype) for k in (n, m))
    for _ in range(count):
        yield left @ (torch.randn(n, m, dtype=dtype) * d_left[:, None] * d_right) @ right.mT


def stepped(build: Build, grads: list[list[Tensor]], **options: Any) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    parameters = [nn.Parameter(torch.zeros_like(g)) for g in grads[0]]
    optimizer = build(parameters, lr=0.1, weight_decay=0.0, **options)
    for each in grads:
        for p, g in zip(parameters, each, strict=True):
            p.grad = g.clone()
        optimizer.step()
    return parameters, optimizer


# --- All of them ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", CLASSES.values(), ids=CLASSES)
def test_the_batch_of_a_matrix_does_not_matter(build):
    grads = [list(each) for each in zip(*(gradients(5, *shape) for shape in ((6, 4), (6, 4), (3, 7))), strict=True)]
    together, _ = stepped(build, grads)
    for i, p in enumerate(together):
        (alone,), _ = stepped(build, [[each[i]] for each in grads])
        torch.testing.assert_close(p, alone, rtol=0, atol=(0.02 if build is CLASSES["muon"] else 1e-12) * p.abs().max().item())


@pytest.mark.parametrize("build", CLASSES.values(), ids=CLASSES)
def test_runs_resume_to_the_bit(build):
    model, data = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Linear(8, 8, bias=False)), torch.randn(40, 16, 6)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, part: Tensor) -> None:
        for x in part:
            (model(x) - x.sum(-1, keepdim=True)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    optimizer = build(model.parameters(), lr=0.01)
    train(model, optimizer, data[:20])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    other = copy.deepcopy(model)
    train(model, optimizer, data[20:])
    resumed = build(other.parameters(), lr=0.5)
    resumed.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert resumed.param_groups[0]["lr"] == 0.01
    train(other, resumed, data[20:])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("build", CLASSES.values(), ids=CLASSES)
def test_a_learning_rate_that_changes_counts(build):
    """Also after loading, which replaces the groups."""
    p = nn.Parameter(torch.zeros(3, 4))
    optimizer = build([p], lr=0.1, weight_decay=0.0)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[0]["lr"] = 0.0
    p.grad = torch.randn_like(p)
    optimizer.step()
    assert not p.any()


@pytest.mark.parametrize("name", ["SOAP, tracked", "Muon on gram", "KL-Shampoo"])
def test_what_is_timed_is_right(name):
    (setting,) = (setting for setting in SETTINGS["cpu"] if setting.name == "reuse")
    assert name in setting.candidates and gate(CANDIDATES[name], (24, 32), "cpu") == "passed"


def test_state_in_objects_is_counted():
    n, m = 6, 4
    _, optimizer = stepped(CLASSES["kl"], [[g.float()] for g in gradients(1, n, m)])
    assert state_bytes(optimizer) == 4 * (n * m + 2 * n * n + 2 * m * m + n + m + 2)


# --- SOAP -------------------------------------------------------------------------------------------------------------


def averages(grads: list[Tensor], beta2: float) -> tuple[Tensor, Tensor]:
    """`L` and `R`, the start counting as a gradient that is white and as large as the first."""
    n, m = grads[0].shape
    square = grads[0].square().mean()
    left, right = square * torch.eye(n, dtype=torch.float64), square * torch.eye(m, dtype=torch.float64)
    for t, g in enumerate(grads, 1):
        share = max(1 - beta2, 1 / (t + 1))
        left, right = left.lerp(g @ g.mT / m, share), right.lerp(g.mT @ g / n, share)
    return left, right


@pytest.mark.parametrize("n,m", [(8, 5), (5, 8), (1, 6)])
def test_soap_averages_what_it_should_and_finds_the_eigenbases(n, m):
    grads = list(gradients(60, n, m))
    _, optimizer = stepped(CLASSES["soap"], [[g] for g in grads], betas=(0.9, 0.95))
    (s,) = optimizer.state.values()
    for side, average in zip(("left", "right"), averages(grads, 0.95), strict=True):
        b, scale = s[f"basis_{side}"], s[f"scale_{side}"]
        t = scale * (s[f"residual_{side}"] + s[f"eigenvalues_{side}"].diag())
        assert (b @ t @ b.mT - average).norm() < 2e-3 * average.norm()
        assert (b.mT @ b - torch.eye(len(b), dtype=torch.float64)).norm() < 2e-3 * len(b) ** 0.5
        # Of the off-diagonal part in the axes, where the basis started, hardly anything is left.
        assert (t - t.diag().diag()).norm() <= 0.03 * (average - average.diag().diag()).norm()


def test_soap_moves_as_adam_does_in_the_exact_eigenbases():
    """Once the bases stand: eigenvectors of the averages, which change slowly here, from a decomposition in each step."""
    beta1, beta2, n, m = 0.9, 0.99, 6, 4
    grads = list(gradients(400, n, m))
    parameters, optimizer = stepped(CLASSES["soap"], [[g] for g in grads[:-1]], betas=(beta1, beta2))
    left, right = (torch.linalg.eigh(x)[1] for x in averages(grads, beta2))
    first = second = torch.zeros(n, m, dtype=torch.float64)
    for g in grads:
        first, second = first.lerp(g, 1 - beta1), second.lerp((left.mT @ g @ right).square(), 1 - beta2)
    step = (left.mT @ first @ right / (1 - beta1 ** len(grads))) / (second / (1 - beta2 ** len(grads))).sqrt()
    expected = left @ step @ right.mT
    before = parameters[0].detach().clone()
    parameters[0].grad = grads[-1].clone()
    optimizer.step()
    got = (before - parameters[0].detach()) / 0.1
    assert (got - expected).norm() < 0.1 * expected.norm()


# --- Muon -------------------------------------------------------------------------------------------------------------


def plain(g: Tensor) -> Tensor:
    x = g / g.norm()
    for _ in range(5):
        y = x @ x.mT
        x = MUON["A"] * x + (MUON["B"] * y + MUON["C"] * y @ y) @ x
    return x


@pytest.mark.parametrize("n,m", [(5, 9), (9, 5), (1, 4), (7, 7)])
def test_muon_orthogonalizes(n, m):
    g = torch.randn(3, n, m, dtype=torch.float64)
    exact = torch.stack([plain(x) for x in g])
    torch.testing.assert_close(MUON["orthogonalized"](g, torch.float64), exact, rtol=0, atol=1e-12)
    ours, theirs = MUON["orthogonalized"](g), torch.stack([bf16(x) for x in g])
    assert (ours.double() - exact).norm() <= 2 * (theirs.double() - exact).norm()
    values = torch.linalg.svdvals(exact)
    assert values.min() > 0.6 and values.max() < 1.3


def bf16(g: Tensor) -> Tensor:
    return _zeropower_via_newtonschulz(g, (MUON["A"], MUON["B"], MUON["C"]), 5, 1e-7)


@pytest.mark.parametrize("shape", [(12, 8), (8, 12)])
def test_muon_makes_the_steps_of_torchs(shape):
    """As far as bfloat16 tells."""
    grads = list(gradients(10, *shape, dtype=torch.float32))
    ours, theirs = (nn.Parameter(torch.ones(shape)) for _ in range(2))
    optimizers = [
        MUON["MuonGram"]([ours], lr=0.1, momentum=0.9),
        torch.optim.Muon([theirs], lr=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw"),
    ]
    for g in grads:
        for p, optimizer in zip((ours, theirs), optimizers, strict=True):
            p.grad = g.clone()
            optimizer.step()
    moved = theirs.detach() - 1
    assert (ours - theirs).norm() < 0.02 * moved.norm()


# --- KL-Shampoo -------------------------------------------------------------------------------------------------------


def kl_shampoo(grads: list[Tensor], beta1: float, beta2: float) -> tuple[Tensor, Tensor, Tensor]:
    """The step after these gradients, by inverses and roots of whole matrices, and the two factors."""
    n, m = grads[0].shape
    scale = grads[0].square().mean().sqrt()
    s_c, s_k = scale * torch.eye(n, dtype=torch.float64), scale * torch.eye(m, dtype=torch.float64)
    average = torch.zeros_like(grads[0])
    for t, g in enumerate(grads, 1):
        share = max(1 - beta2, 1 / (t + 1))
        s_c, s_k = s_c.lerp(g @ s_k.inverse() @ g.mT / m, share), s_k.lerp(g.mT @ s_c.inverse() @ g / n, share)
        average = average.lerp(g, 1 - beta1)
    return inverse_root(s_c) @ average @ inverse_root(s_k), s_c, s_k


def inverse_root(s: Tensor) -> Tensor:
    d, b = torch.linalg.eigh(s)
    return b * d.rsqrt() @ b.mT


@pytest.mark.parametrize("n,m", [(6, 4), (4, 6)])
def test_kl_shampoo_keeps_the_nearest_kronecker_product(n, m):
    grads = list(gradients(200, n, m))
    parameters, optimizer = stepped(CLASSES["kl"], [[g] for g in grads[:-1]], betas=(0.9, 0.98))
    before = parameters[0].detach().clone()
    parameters[0].grad = grads[-1].clone()
    optimizer.step()
    step, s_c, s_k = kl_shampoo(grads, 0.9, 0.98)
    got = (before - parameters[0].detach()) / 0.1
    assert (got - step).norm() < 0.02 * step.norm()
    ((*_, factor),) = optimizer.batches
    expected = torch.kron(s_c, s_k)
    assert (factor.matrix()[0] - expected).norm() < 0.02 * expected.norm()


@pytest.mark.usefixtures("kernels_on_cpu")
def test_soaps_second_turn_by_kernels():
    """It has no new curvature: `gram_track` gets no columns."""
    n = 20
    d, residual = torch.rand(2, n) + 0.5, torch.randn(2, n, n).tril(-1)
    residual = 0.1 * (residual + residual.mT)
    x, weight, share = torch.empty(2, n, 0), torch.empty(2, 0), torch.zeros(2)
    got = gram_track(x, d, weight, share, residual=residual)
    exact = reference.gram_track(*(y.double() for y in (x, d, residual, weight, share, share)), 0.1)
    for a, b in zip(got, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


# --- What is said of them ---------------------------------------------------------------------------------------------

TOLD = {
    "SOAP with tracked bases": ("soap_tracked", "SOAP, tracked"),
    "SOAP, QR in every step": ("soap", "SOAP"),
    "KL-Shampoo on": ("kl_shampoo", "KL-Shampoo"),
    "Muon on": ("muon_gram", "Muon on gram"),
    "Muon (": ("muon", "Muon"),
}


def test_the_documentation_tells_what_was_measured():
    results = EXAMPLES.parent / "bench" / "results"
    times = {row["optimizer"]: float(row["p50_ms"]) for row in output.read_csv(results / "reuse-steps.csv")}
    section = (EXAMPLES.parent / "docs" / "reuse.md").read_text().partition("|---|---|---|---|\n")[2].partition("\n\n")[0]
    rows = section.splitlines()
    assert len(rows) == len(TOLD)
    for row, (start, (method, timed)) in zip(rows, TOLD.items(), strict=True):
        cells = [f"{times[timed] / times['SOAP']:.2f}"]
        for task, steps in (("text", "250"), ("digits", "200")):
            curves = output.read_csv(results / f"train-{task}-reuse.csv")
            last = [float(x["loss"]) for x in curves if (x["method"], x["step"]) == (method, steps)]
            assert len(last) == 5
            cells.insert(-1, f"{statistics.mean(last):.3f} ± {statistics.stdev(last):.3f}")
        assert row.startswith(f"| {start}")
        assert row.endswith(" | ".join(["", *cells, ""]).rstrip())
