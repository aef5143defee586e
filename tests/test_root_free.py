"""Root-free optimizers against the paper: its boxes as plain float64 loops, its Claims 1 to 10, fixed points.

Lin et al., 2024, "Can We Remove the Square-Root in Adaptive Gradient Methods? A Second-Order Perspective".
"""

import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from spectral_ops.optim import IFShampoo, RFAdaGrad, RFFullAdaGrad, RFRMSprop, RFShampoo

BOX = {"update_scale": None}
Gradient = Callable[[Tensor, int], Tensor]


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def eye(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64)


def problem(*shape: int) -> tuple[Tensor, Gradient]:
    """A start and a gradient that changes with the weights and, as a mini-batch's does, with the step."""
    start, target, noise = draw(*shape), draw(*shape), draw(60, *shape)
    return start, lambda w, t: torch.tanh(w - target) + 0.5 * noise[t]


def train(optimizer: Optimizer, w: Tensor, gradient: Gradient, steps: int) -> Tensor:
    for t in range(steps):
        w.grad = gradient(w.detach(), t)
        optimizer.step()
    return w.detach()


def started(optimizer: Optimizer, w: Tensor, **state: Tensor) -> Optimizer:
    """With this state in place of the identity, which a step of nothing makes."""
    (group,) = optimizer.param_groups
    lr, group["lr"], w.grad = group["lr"], 0.0, torch.zeros_like(w)
    optimizer.step()
    group["lr"] = lr
    for name, value in state.items():
        optimizer.state[w][name].copy_(value)
    return optimizer


def parameter(start: Tensor) -> Tensor:
    return start.clone().requires_grad_()


def error(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def assert_same_way(got: Tensor, want: Tensor, start: Tensor) -> None:
    assert (want - start).norm() > 0.01 * start.norm()  # it did move
    assert (got - want).abs().max() <= 1e-12 * want.abs().max().clamp(min=1)


# --- The boxes, transcribed -------------------------------------------------------------------------------------------


def unfold(g: Tensor, axis: int) -> Tensor:
    return g.movedim(axis, 0).reshape(g.shape[axis], -1)


def others(matrices: list[Tensor], axis: int) -> Tensor:
    """The Kronecker product of all but one, as the columns of an unfolding have it."""
    product = torch.ones(1, 1, dtype=torch.float64)
    for i, x in enumerate(matrices):
        product = product if i == axis else torch.kron(product, x)
    return product


def preconditioned(inverses: list[Tensor], g: Tensor) -> Tensor:
    for axis, x in enumerate(inverses):
        g = torch.tensordot(x, g, ([1], [axis])).movedim(0, axis)
    return g


def box(learn: Callable[[Tensor], list[Tensor]], w: Tensor, gradient: Gradient, steps: int, lr, momentum, kappa) -> Tensor:
    """Fig. 7 but for line 1: `learn` takes the gradient and returns the inverse of each factor."""
    m = torch.zeros_like(w)
    for t in range(steps):
        g = gradient(w, t)
        m = momentum * m + preconditioned(learn(g), g) + kappa * w
        w = w - lr * m
    return w


def rf_shampoo(dims, beta, gamma, damping, b):
    factors = [eye(n) for n in dims]

    def learn(g: Tensor) -> list[Tensor]:
        inverses = [torch.linalg.inv(s) for s in factors]
        for axis, n in enumerate(dims):
            u, rest, k = unfold(g, axis), g.numel() // n, others(inverses, axis)
            h = b * u @ k @ u.T + damping * k.trace() * eye(n)
            factors[axis] = (1 - beta * gamma) * factors[axis] + beta / rest * h
        return [torch.linalg.inv(s) for s in factors]

    return learn


def if_shampoo(dims, beta, gamma, damping, b, decay):
    factors, momenta = [eye(n) for n in dims], [0 * eye(n) for n in dims]

    def learn(g: Tensor) -> list[Tensor]:
        old = list(factors)
        for axis, n in enumerate(dims):
            u, rest, k, c = unfold(g, axis), g.numel() // n, others([x @ x.T for x in old], axis), old[axis]
            curvature = b * c.T @ u @ k @ u.T @ c + damping * k.trace() * c.T @ c
            momenta[axis] = decay * momenta[axis] + (1 - decay) / (2 * rest) * (curvature - gamma * rest * eye(n))
            factors[axis] = c @ (eye(n) - beta * momenta[axis] / max(1.0, momenta[axis].norm().item()))
        return [x @ x.T for x in factors]

    return learn


AXES = ((5, 8), (8, 5), (1, 4), (3, 1), (6,), (3, 4, 2))  # one factor each, a matrix has two in any case


def groups(w: Tensor) -> dict:
    return {"params": [w], "algorithm": "matrix", "per_axis": w.ndim != 2}


@pytest.mark.parametrize("shape", AXES, ids=str)
@pytest.mark.parametrize("gamma", [0, 1])
@pytest.mark.parametrize("damping,weight_decay", [(0.0, 0.0), (0.2, 0.1)])
def test_rf_shampoo_is_the_papers_box(shape, gamma, damping, weight_decay):
    """Fig. 5 and 7, with damping as a part λ I of the curvature (App. G), which IF-Shampoo has too."""
    start, gradient = problem(*shape)
    w = parameter(start)
    options = {"momentum": 0.8, "preconditioner_lr": 0.05, "gamma": gamma, "damping": damping, "weight_decay": weight_decay}
    got = train(RFShampoo([groups(w)], lr=0.01, batch_size=3, **options, **BOX), w, gradient, 50)
    learn = rf_shampoo(shape, 0.05, gamma, damping, 3)
    assert_same_way(got, box(learn, start, gradient, 50, 0.01, 0.8, weight_decay), start)


@pytest.mark.parametrize("shape", AXES, ids=str)
@pytest.mark.parametrize("gamma", [0, 1])
@pytest.mark.parametrize("damping,decay,beta", [(0.0, 0.0, 0.02), (0.2, 0.5, 0.3)])
def test_if_shampoo_is_the_papers_box(shape, gamma, damping, decay, beta):
    start, gradient = problem(*shape)
    w = parameter(start)
    options = {"momentum": 0.8, "preconditioner_lr": beta, "gamma": gamma, "damping": damping, "weight_decay": 0.1}
    optimizer = IFShampoo([groups(w)], lr=0.01, batch_size=3, riemannian_momentum=decay, **options, **BOX)
    got = train(optimizer, w, gradient, 50)
    learn = if_shampoo(shape, beta, gamma, damping, 3, decay)
    assert_same_way(got, box(learn, start, gradient, 50, 0.01, 0.8, 0.1), start)


@pytest.mark.parametrize("gamma", [0, 1])
@pytest.mark.parametrize("damping", [0.0, 0.2])
def test_rf_full_adagrad_is_equation_17(gamma, damping):
    start, gradient = problem(3, 4)
    w = parameter(start)
    options = {"momentum": 0.8, "preconditioner_lr": 0.05, "gamma": gamma, "damping": damping, "weight_decay": 0.1}
    got = train(RFFullAdaGrad([w], lr=0.01, batch_size=3, inverse_free=False, **options, **BOX), w, gradient, 50)
    flat = box(
        rf_shampoo((12,), 0.05, gamma, damping, 3), start.flatten(), lambda x, t: gradient(x.view(3, 4), t).flatten(), 50,
        0.01, 0.8, 0.1,
    )  # fmt: skip
    assert_same_way(got, flat.view(3, 4), start)


def inverse_free(n: int, beta: float, gamma: float, b: float, limited: list[bool]):
    """(18), and for γ = 1 the moving average that (25) is meant to be, see `test_the_papers_inverse_of_an_average_vanishes`.
    The step is not the paper's where it is over `1 / (b gᵀS⁻¹g)`: there the box's inverse would grow with the gradient."""
    s = eye(n)

    def learn(g: Tensor) -> list[Tensor]:
        nonlocal s
        h = b * torch.outer(g, g)
        limit = 1 / (b * g @ s @ g).item()
        limited.append(beta > limit)
        step, y = min(beta, limit), s @ h @ s
        s = (1 + step * gamma) * s - step * y + step**2 / 2 * (y @ h @ s - 2 * gamma * y + gamma**2 * s)
        return [s]

    return learn


@pytest.mark.parametrize("gamma", [0, 1])
@pytest.mark.parametrize("beta,b,limits", [(0.01, 1, {False}), (0.2, 1, {False, True}), (0.9, 1e12, {True})])
def test_rf_full_adagrad_is_equation_18(gamma, beta, b, limits):
    """Under the limit on its step in all 50 steps, sometimes over it, always over it."""
    start, gradient = problem(3, 4)
    w, limited = parameter(start), []
    options = {"momentum": 0.8, "preconditioner_lr": beta, "gamma": gamma, "weight_decay": 0.1, "batch_size": b}
    got = train(RFFullAdaGrad([w], lr=0.01, **options, **BOX), w, gradient, 50)
    learn = inverse_free(12, beta, gamma, b, limited)
    flat = box(learn, start.flatten(), lambda x, t: gradient(x.view(3, 4), t).flatten(), 50, 0.01, 0.8, 0.1)
    assert set(limited) == limits
    assert_same_way(got, flat.view(3, 4), start)


@pytest.mark.parametrize("shape", [(), (3, 4)], ids=str)
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("gamma", [0, 1])
def test_rf_rmsprop_and_rf_adagrad_are_figure_6(shape, decoupled, gamma):
    start, gradient = problem(*shape)
    w = parameter(start)
    options = {"weight_decay": 0.1, "momentum": 0.8, "eps": 0.2, "batch_size": 3, "decoupled_weight_decay": decoupled}
    if gamma:
        optimizer = RFRMSprop([w], lr=0.02, alpha=0.9, **options)
    else:
        optimizer = RFAdaGrad([w], lr=0.02, preconditioner_lr=1 - 0.9, **options)
    got = train(optimizer, w, gradient, 50)
    want, m, s = start, torch.zeros_like(start), torch.ones_like(start)
    for t in range(50):
        g = gradient(want, t)
        s = (1 - (1 - 0.9) * gamma) * s + (1 - 0.9) * 3 * g**2
        m = 0.8 * m + g / (s + 0.2) + (0 if decoupled else 0.1 * want)
        want = want - 0.02 * (m + (0.1 * want if decoupled else 0))
    assert_same_way(got, want, start)


# --- Fixed points -----------------------------------------------------------------------------------------------------


def product(optimizer: IFShampoo | RFShampoo, w: Tensor) -> Tensor:
    """`S⁻¹` as one matrix."""
    state = optimizer.state[w]
    inverses = [state[f"factor_{i}"] for i in range(9) if f"factor_{i}" in state]
    if isinstance(optimizer, IFShampoo):
        return others([k @ k.mT for k in inverses], -1)
    return others([torch.linalg.inv(s) for s in inverses], -1)


@pytest.mark.parametrize("method", [IFShampoo, RFShampoo])
def test_the_inverse_of_a_vectors_constant_curvature(method):
    g, w = torch.tensor([1, 2, -1, 0.5]).double(), torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = method([groups(w)], lr=0.0, damping=0.1, preconditioner_lr=0.2, **BOX)
    train(optimizer, w, lambda *_: g, 400)
    assert error(product(optimizer, w), torch.linalg.inv(0.1 * eye(4) + torch.outer(g, g))) < 1e-10


def test_both_find_the_factors_that_explain_each_other():
    """A matrix's constant gradient: d S_C = b G S_K⁻¹ Gᵀ + λ Tr(S_K⁻¹) I, p S_K = b Gᵀ S_C⁻¹ G + λ Tr(S_C⁻¹) I. They have one
    solution but for a number that goes from one factor to the other."""
    g, found = draw(3, 4), []
    for method in (IFShampoo, RFShampoo):
        w = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
        optimizer = method([w], lr=0.0, damping=0.3, preconditioner_lr=0.3, batch_size=2, **BOX)
        train(optimizer, w, lambda *_: g, 400)
        factors = [optimizer.state[w][f"factor_{i}"] for i in (0, 1)]
        c, k = [x @ x.T if method is IFShampoo else torch.linalg.inv(x) for x in factors]
        assert error(torch.linalg.inv(c), (2 * g @ k @ g.T + 0.3 * k.trace() * eye(3)) / 4) < 1e-10
        assert error(torch.linalg.inv(k), (2 * g.T @ c @ g + 0.3 * c.trace() * eye(4)) / 3) < 1e-10
        found.append(torch.kron(c, k))
    assert error(*found) < 1e-10


# --- Claims -----------------------------------------------------------------------------------------------------------


def test_claim_1_the_mini_batch_fisher_is_unbiased():
    """Softmax regression, all labels of all mini-batches: the mean of `B ḡ ḡᵀ`, what the optimizers learn from the gradient ḡ
    of a mean over B, is F / N, and F is the Hessian."""
    inputs, weight, classes, size = draw(4, 2), draw(2, 3), 3, 2
    p = torch.softmax(inputs @ weight, -1)

    def gradients(rows: tuple[int, ...]) -> Iterator[tuple[Tensor, Tensor]]:
        """The probability of each choice of labels, and the gradient of its loss, a sum."""
        for labels in itertools.product(range(classes), repeat=len(rows)):
            residual = p[list(rows)] - torch.eye(classes, dtype=torch.float64)[list(labels)]
            yield p[list(rows), list(labels)].prod(), (inputs[list(rows)].T @ residual).flatten()

    full = sum(q * torch.outer(g, g) for q, g in gradients((0, 1, 2, 3)))
    batches = list(itertools.combinations(range(4), size))
    mini = sum(q * size * torch.outer(g / size, g / size) for rows in batches for q, g in gradients(rows)) / len(batches)
    assert error(mini, full / 4) < 1e-12
    standard = sum(q * torch.outer(g, g) for i in range(4) for q, g in gradients((i,)))
    assert error(full, standard) < 1e-12
    loss = lambda w: torch.logsumexp(inputs @ w.view(2, 3), -1).sum()  # noqa: E731  but for what is linear in w
    assert error(full, torch.autograd.functional.hessian(loss, weight.flatten())) < 1e-12


def full_state(s: Tensor, options: dict) -> dict[str, Tensor]:
    inverse = {"inverse_0": torch.linalg.inv(s)}
    return inverse if options.get("inverse_free", True) else inverse | {"factor_0": s}


def assert_affine_invariant(**options) -> None:
    """μ = A m + c, S_rep = Aᵀ S A."""
    start, gradient = problem(5)
    a, c, s = draw(5, 5), draw(5), draw(5, 5)
    s = s @ s.T + eye(5)
    w, v = parameter(start), parameter(torch.linalg.solve(a, start - c))
    first, second = (RFFullAdaGrad([x], lr=0.05, batch_size=2, **options, **BOX) for x in (w, v))
    got = train(started(first, w, **full_state(s, options)), w, gradient, 30)
    started(second, v, **full_state(a.T @ s @ a, options))
    rep = train(second, v, lambda m, t: a.T @ gradient(a @ m + c, t), 30)
    assert error(got, start) > 0.01
    assert error(a @ rep + c, got) < 1e-10


@pytest.mark.parametrize("gamma", [0, 1])
def test_claim_2_the_update_is_affine_invariant(gamma):
    assert_affine_invariant(inverse_free=False, gamma=gamma, preconditioner_lr=0.2)


@pytest.mark.parametrize("gamma", [0, 1])
def test_claim_3_the_inverse_stays_positive_definite(gamma):
    """(26): at least half of it remains in every direction, whatever the gradient."""
    w = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    optimizer = started(RFFullAdaGrad([w], lr=0.0, gamma=gamma, preconditioner_lr=0.9, **BOX), w)
    for decade in torch.linspace(-3, 6, 40).tolist():
        before = torch.linalg.cholesky(optimizer.state[w]["inverse_0"])
        w.grad = 10**decade * draw(5)
        optimizer.step()
        kept = torch.linalg.solve(before, torch.linalg.solve(before, optimizer.state[w]["inverse_0"]).T)
        assert torch.linalg.eigvalsh(kept).min() > 0.5 - 1e-9


def halvings(run: Callable[[float], list[float]], beta: float = 1e-3) -> list[float]:
    """By which power of two errors fall where β₂ is halved, step by step."""
    return [math.log2(x / y) for x, y in zip(run(beta), run(beta / 2), strict=True)]


def second_order(orders: list[float]) -> bool:
    return all(1.9 < order < 2.1 for order in orders)


def inverses_apart(first, second, gradients: list[Tensor]) -> Callable[[float], list[float]]:
    """`‖S̄⁻¹ S − I‖` after each step. `first` and `second` build an optimizer for a parameter and β₂ and say its inverse."""

    def run(beta: float) -> list[float]:
        ways = []
        for build, inverse in (first, second):
            w, found = torch.zeros_like(gradients[0], requires_grad=True), []
            optimizer = build(w, beta)
            for g in gradients:
                w.grad = g
                optimizer.step()
                state = optimizer.state[w]
                assert all(state[name].norm() < 1 for name in ("momentum_0", "momentum_1") if name in state)  # no limit at work
                found.append(inverse(state).clone())
            ways.append(found)
        return [(torch.linalg.solve(b, a) - eye(len(a))).norm().item() for a, b in zip(*ways, strict=True)]

    return run


def of_norm(size: float, *shape: int) -> list[Tensor]:
    return [size * x / x.norm() for x in draw(*shape)]


def full(inverse_free: bool, gamma: float = 0.0):
    def build(w: Tensor, beta: float) -> Optimizer:
        return RFFullAdaGrad([w], lr=0.0, preconditioner_lr=beta, inverse_free=inverse_free, gamma=gamma, **BOX)

    return build, lambda state: state["inverse_0"]


@pytest.mark.parametrize("gamma", [0, 1])
def test_claim_4_the_inverse_free_update_is_the_root_free_one_to_first_order(gamma):
    """The claim has γ = 0."""
    run = inverses_apart(full(True, gamma), full(False, gamma), of_norm(2, 5, 4))
    assert second_order(halvings(run))


def test_the_papers_inverse_of_an_average_vanishes():
    """(24) to (26) print `(1 − β₂ γ) S⁻¹` and `N = AᵀHA + γ I`. From (15), `2 ∂_{S⁻¹} L = H − γ S`, the natural gradient gives
    `S⁻¹ − β₂ S⁻¹ (H − γ S) S⁻¹ = (1 + β₂ γ) S⁻¹ − …` and N = AᵀHA − γ I, as (27) has it. What is printed differs from the
    inverse of the moving average in the first order, and goes to zero under any gradients; what is built does neither."""
    errors, g = [], draw(300, 3)
    for beta in (1e-3, 5e-4):
        s, average = eye(3), eye(3)
        for x in g[:5]:
            h = torch.outer(x, x)
            s = s @ (eye(3) - beta * (h @ s + eye(3)) + beta**2 / 2 * (h @ s + eye(3)) @ (h @ s + eye(3)))
            average = (1 - beta) * average + beta * h
        errors.append((s @ average - eye(3)).norm().item())
    assert 0.9 < math.log2(errors[0] / errors[1]) < 1.1

    w, s = torch.zeros(3, dtype=torch.float64, requires_grad=True), eye(3)
    optimizer = RFFullAdaGrad([w], lr=0.0, gamma=1, preconditioner_lr=0.1, **BOX)
    for x in g:
        n = torch.outer(x, x) @ s + eye(3)
        s = s @ (eye(3) - 0.1 * n + 0.1**2 / 2 * n @ n)
        w.grad = x
        optimizer.step()
    assert s.norm() < 1e-10
    assert 0.2 < torch.linalg.eigvalsh(optimizer.state[w]["inverse_0"]).min() < 5  # E[ggᵀ] = I


def inverse_of(axis: int) -> Callable[[dict[str, Tensor]], Tensor]:
    return lambda s: s[f"inverse_{axis}"] if "inverse_0" in s else s[f"factor_{axis}"] @ s[f"factor_{axis}"].T


def shampoo(method: type, axis: int, gamma: float):
    options = {"riemannian_momentum": 0.0} if method is IFShampoo else {}

    def build(w: Tensor, beta: float) -> Optimizer:
        return method([groups(w)], lr=0.0, preconditioner_lr=beta, gamma=gamma, damping=0.0, **options, **BOX)

    return build, inverse_of(axis)


@pytest.mark.parametrize("gamma", [0, 1])
def test_claim_5_a_factor_of_the_inverse_is_the_root_free_update_to_first_order(gamma):
    """(27) is IF-Shampoo of a vector. The claim has γ = 0."""
    run = inverses_apart(shampoo(IFShampoo, 0, gamma), full(False, gamma), of_norm(1, 5, 3))
    assert second_order(halvings(run))


@pytest.mark.parametrize("options", [{}, {"gamma": 1}, {"inverse_free": False}], ids=str)
@pytest.mark.parametrize("preconditioner_lr", [0.05, 0.9])
def test_claim_6_the_scale_of_the_loss_makes_no_difference(options, preconditioner_lr):
    """The loss over B, `batch_size` B, S over B; with a step under its limit and over it."""
    start, gradient = problem(5)
    w, v = parameter(start), parameter(start)
    options = {"lr": 0.05, "preconditioner_lr": preconditioner_lr, **options, **BOX}
    got = train(RFFullAdaGrad([w], **options), w, gradient, 30)
    second = started(RFFullAdaGrad([v], batch_size=64, **options), v, **full_state(eye(5) / 64, options))
    assert error(train(second, v, lambda x, t: gradient(x, t) / 64, 30), got) < 1e-10
    assert error(got, start) > 0.01


@pytest.mark.parametrize("gamma", [0, 1])
@pytest.mark.parametrize("preconditioner_lr", [0.05, 0.9])
def test_claim_7_the_inverse_free_update_is_affine_invariant(gamma, preconditioner_lr):
    assert_affine_invariant(inverse_free=True, gamma=gamma, preconditioner_lr=preconditioner_lr)


METHODS = (
    (RFShampoo, {"preconditioner_lr": 0.1}),
    (RFShampoo, {"preconditioner_lr": 0.1, "gamma": 0}),
    (IFShampoo, {"preconditioner_lr": 0.1}),
    (IFShampoo, {"preconditioner_lr": 0.5, "gamma": 0, "riemannian_momentum": 0.0}),
)


def factors_of(method: type, s_c: Tensor, s_k: Tensor) -> dict[str, Tensor]:
    """State for these preconditioners. `C Cᵀ = S_C⁻¹` leaves C free but for a rotation."""
    if method is IFShampoo:
        return {f"factor_{i}": torch.linalg.inv(torch.linalg.cholesky(s)).T for i, s in enumerate((s_c, s_k))}
    pairs = [{f"factor_{i}": s, f"inverse_{i}": torch.linalg.inv(s)} for i, s in enumerate((s_c, s_k))]
    return pairs[0] | pairs[1]


@pytest.mark.parametrize("method,options", METHODS)
def test_claim_8_the_scale_of_the_loss_makes_no_difference_to_shampoo(method, options):
    """The loss over B, `batch_size` B, both factors over √B. Of IF-Shampoo the paper says it without a proof."""
    start, gradient = problem(3, 4)
    w, v = parameter(start), parameter(start)
    options = {"lr": 0.05, "damping": 0.0, **options, **BOX}
    got = train(method([w], **options), w, gradient, 30)
    second = started(method([v], batch_size=64, **options), v, **factors_of(method, eye(3) / 8, eye(4) / 8))
    assert error(train(second, v, lambda x, t: gradient(x, t) / 64, 30), got) < 1e-10
    assert error(got, start) > 0.01


@pytest.mark.parametrize("method,options", METHODS)
def test_claim_9_shampoo_is_invariant_to_a_kronecker_factored_affine_map(method, options):
    """M = E N Fᵀ + O. App. H prints the start as `E⁻ᵀ S_C E⁻¹`; what its proof uses is S_C,rep = Eᵀ S_C E."""
    start, gradient = problem(3, 4)
    e, f, o, s_c, s_k = draw(3, 3), draw(4, 4), draw(3, 4), draw(3, 3), draw(4, 4)
    s_c, s_k = s_c @ s_c.T + eye(3), s_k @ s_k.T + eye(4)
    w, v = parameter(start), parameter(torch.linalg.inv(e) @ (start - o) @ torch.linalg.inv(f).T)
    first, second = (method([x], lr=0.05, damping=0.0, **options, **BOX) for x in (w, v))
    got = train(started(first, w, **factors_of(method, s_c, s_k)), w, gradient, 30)
    started(second, v, **factors_of(method, e.T @ s_c @ e, f.T @ s_k @ f))
    rep = train(second, v, lambda n, t: e.T @ gradient(e @ n @ f.T + o, t) @ f, 30)
    assert error(got, start) > 0.01
    assert error(e @ rep @ f.T + o, got) < 1e-10


@pytest.mark.parametrize("gamma", [0, 1])
@pytest.mark.parametrize("axis", [0, 1])
def test_claim_10_if_shampoo_is_rf_shampoo_to_first_order(gamma, axis):
    run = inverses_apart(shampoo(IFShampoo, axis, gamma), shampoo(RFShampoo, axis, gamma), of_norm(2, 5, 3, 3))
    assert second_order(halvings(run))


# --- What the paper leaves open ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [IFShampoo, RFShampoo])
@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 2)], ids=str)
def test_what_a_factor_has_too_much_goes_to_the_others(method, shape):
    """`S_C ⊗ S_K` does not say how large either is. With β₂ of the defaults that drifts, by e in a hundred steps."""
    start, gradient = problem(*shape)
    w, v = parameter(start), parameter(start)
    first, second = (started(method([groups(x)], lr=0.01), x) for x in (w, v))
    for name, x in second.state[v].items():
        if name.startswith(("factor", "inverse")):
            up = 2.0 if name.startswith("factor") else 0.5
            x.mul_({"0": up**20, "1": up**-20}.get(name[-1], 1.0))
    want, got = (train(optimizer, x, gradient, 5) for optimizer, x in ((first, w), (second, v)))
    assert error(got, want) < 1e-12
    sizes = [x.norm().log2().item() for name, x in second.state[v].items() if name.startswith("factor")]
    assert max(sizes) - min(sizes) < 10


LARGE = (
    (IFShampoo, {}),
    (RFShampoo, {}),
    (RFFullAdaGrad, {}),
    (RFFullAdaGrad, {"gamma": 1}),
    (RFFullAdaGrad, {"inverse_free": False}),
)


@pytest.mark.parametrize("method,options", LARGE)
@pytest.mark.parametrize("update_scale", ["rms", None])
@pytest.mark.parametrize("batch_size", [1, 128])
def test_a_gradient_whose_curvature_overflows_leaves_the_factors(method, options, update_scale, batch_size):
    """Its square is finite, so it is not skipped."""
    w = torch.zeros(3, 4, requires_grad=True)
    optimizer = method([w], lr=1e-3, update_scale=update_scale, batch_size=batch_size, **options)
    sizes = [1e-3] * 10 + [2e18] + [1e-3] * 3
    for size in sizes:
        w.grad = size * torch.randn(3, 4)
        optimizer.step()
    assert w.isfinite().all() and optimizer.skipped_steps() == 0
    assert all(x.isfinite().all() for x in optimizer.state[w].values())


def test_the_inverse_of_an_average_stays_finite_where_no_gradient_points():
    w = torch.zeros(4, requires_grad=True)
    optimizer = RFFullAdaGrad([w], lr=1e-3, gamma=1, preconditioner_lr=0.9)
    for _ in range(150):  # over (1 + 0.9)¹⁵⁰, which float32 does not hold
        w.grad = torch.randn(4) * torch.tensor([1.0, 1.0, 1.0, 0.0])
        optimizer.step()
    inverse = optimizer.state[w]["inverse_0"]
    assert w.isfinite().all() and 1e14 < inverse[3, 3] < 1e17 and inverse[:3, :3].abs().max() < 1e3


def test_the_full_inverse_is_not_kept_in_bfloat16():
    """Its rounding would make it indefinite, and where it is the update feeds that."""
    w = nn.Parameter(torch.zeros(12, dtype=torch.bfloat16))
    optimizer = RFFullAdaGrad([w], lr=1e-3, preconditioner_dtype=torch.bfloat16)
    for _ in range(300):
        w.grad = (torch.randn(12) * torch.logspace(0, -2, 12)).bfloat16()
        optimizer.step()
    inverse = optimizer.state[w]["inverse_0"]
    assert inverse.dtype == torch.float32 and torch.linalg.eigvalsh(inverse).min() > 0
