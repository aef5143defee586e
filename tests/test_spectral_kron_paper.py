"""SpectralKron against plain float64 transcriptions: the paper's boxes (Fig. 1, Fig. 6) and the tracking rotation."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from spectral_ops.optim import SpectralKron

SHAPES = ((5, 8), (8, 5), (6, 6), (1, 4), (3, 1))


def problem(n: int, m: int, ratio: float = 4.0):
    """A least-squares loss whose gradient changes with the weights and, as a mini-batch does, with the step.

    Rows and columns differ in scale by `ratio` from one to the next. The paper's rotation is chaotic where eigenvalues
    meet (it divides by their gap): on an isotropic problem two float64 programs of it part by a factor of 3 a step.
    """
    generator = torch.Generator().manual_seed(n * 100 + m)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    rows, columns = (ratio ** -torch.arange(size, dtype=torch.float64) for size in (n, m))
    a, b, target, start = draw(60, 9, n) * rows, draw(60, m, 7) * columns[:, None], 3 * draw(60, 9, 7), draw(n, m)

    def gradient(w: Tensor, t: int) -> Tensor:
        return 0.1 * a[t].T @ (a[t] @ w @ b[t] - target[t]) @ b[t].T

    return start, gradient


def train(optimizer: SpectralKron, w: Tensor, gradient, steps: int) -> Tensor:
    for t in range(steps):
        w.grad = gradient(w.detach(), t)
        optimizer.step()
    return w.detach()


def paper(w: Tensor, gradient, steps: int, lr: float, beta2: float, p: float, gamma: float, exact: bool, damping: float):
    """Lin et al., 2025, Fig. 1 (exact) and Fig. 6, one matrix, with loops where the paper has indices."""
    n, m = w.shape
    d_c, d_k, alpha = torch.ones(n).double(), torch.ones(m).double(), 1.0
    b_c, b_k = torch.eye(n).double(), torch.eye(m).double()

    def rotate(b: Tensor, d: Tensor, curvature: Tensor, k: int) -> Tensor:
        u = torch.zeros_like(b)
        for i, j in itertools.product(range(len(d)), range(len(d))):
            if i > j and abs(d[i] - d[j]) > 1e-6 * max(d[i], d[j]):
                u[i, j] = -curvature[i, j] / (d[i] - d[j])
        x = beta2 / (2 * alpha * k) * (u - u.T)
        eye = torch.eye(len(d)).double()
        return b @ (eye + x) @ torch.linalg.inv(eye - x)

    for t in range(steps):
        g = gradient(w, t)
        s_c, s_k = b_c @ torch.diag(d_c) @ b_c.T, b_k @ torch.diag(d_k) @ b_k.T
        w_c = b_c.T @ g @ torch.linalg.inv(s_k) @ g.T @ b_c
        w_k = b_k.T @ g.T @ torch.linalg.inv(s_c) @ g @ b_k
        new_b_c, new_b_k = rotate(b_c, d_c, w_c, m), rotate(b_k, d_k, w_k, n)
        if exact:
            m_c = (-gamma * d_c + w_c.diagonal() / (alpha * m)) / d_c
            m_k = (-gamma * d_k + w_k.diagonal() / (alpha * n)) / d_k
            assert abs(w_c.diagonal().div(d_c).mean() / m - w_k.diagonal().div(d_k).mean() / n) < 1e-10  # Claim 7
            d_c = d_c * torch.exp(beta2 * (m_c - m_c.mean()))
            d_k = d_k * torch.exp(beta2 * (m_k - m_k.mean()))
            alpha = alpha * math.exp(beta2 / 2 * (m_c.mean() + m_k.mean()))
        else:
            lambda_c, lambda_k = damping * m * (1 / d_k).mean(), damping * n * (1 / d_c).mean()
            n_c = (1 - gamma * beta2) * d_c + beta2 / (alpha * m) * (w_c.diagonal() + lambda_c)
            n_k = (1 - gamma * beta2) * d_k + beta2 / (alpha * n) * (w_k.diagonal() + lambda_k)
            d_c = torch.exp(n_c.log() - n_c.log().mean())
            d_k = torch.exp(n_k.log() - n_k.log().mean())
            alpha = alpha * math.exp((n_c.log().mean() + n_k.log().mean()) / 2)
        b_c, b_k = new_b_c, new_b_k
        left = b_c @ torch.diag(d_c ** (-1 / p)) @ b_c.T
        right = b_k @ torch.diag(d_k ** (-1 / p)) @ b_k.T
        w = w - lr * alpha ** (-1 / p) * left @ g @ right
    return w


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("root", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("gamma", [0, 1])
@pytest.mark.parametrize("exact", [True, False])
def test_riemannian_is_the_papers_box(shape, root, gamma, exact):
    start, gradient = problem(*shape)
    lr, beta2, damping, steps = 0.01, 0.02, 0.0 if exact else 0.02, 50
    w = start.clone().requires_grad_()
    optimizer = SpectralKron(
        [w],
        lr=lr,
        betas=(0, 1 - beta2),
        rotation="riemannian",
        update_scale=None,
        root=root,
        gamma=gamma,
        exact=exact,
        damping=damping,
    )
    got = train(optimizer, w, gradient, steps)
    want = paper(start, gradient, steps, lr, 1 - (1 - beta2), root, gamma, exact, damping)
    assert (want - start).norm() > 0.01 * start.norm()  # it did move
    assert (got - want).abs().max() <= 1e-12 * want.abs().max().clamp(min=1)


def tracking(w, gradient, steps, *, lr, mu, beta2, root, epsilon, limit, carry, nesterov):
    """The tracking rotation: warm averages, bounded generators, spectral limit, carried residual; order 2."""
    size = dict(zip("ck", w.shape, strict=True))
    b = {s: torch.eye(size[s]).double() for s in "ck"}
    t_ = {s: torch.eye(size[s]).double() for s in "ck"}
    alpha, momentum = None, torch.zeros_like(w)
    for t in range(steps):
        g = gradient(w, t)
        alpha = (g**2).mean() if alpha is None else alpha
        beta = max(beta2, 1 / (t + 2))
        rotated = b["c"].T @ g @ b["k"]
        d = {s: t_[s].diagonal().clone() for s in "ck"}
        curvature = {
            "c": rotated @ torch.diag(1 / d["k"]) @ rotated.T / (alpha * size["k"]),
            "k": rotated.T @ torch.diag(1 / d["c"]) @ rotated / (alpha * size["c"]),
        }
        logs = 0.0
        for s in "ck":
            n, eye = size[s], torch.eye(size[s]).double()
            matrix = (1 - beta) * t_[s] + beta * curvature[s]
            log_mean = matrix.diagonal().log().mean()
            logs, matrix = logs + log_mean, matrix / log_mean.exp()
            floor = 1e-6 * matrix.diagonal().max()
            if n > 1:
                x = torch.zeros(n, n).double()
                for i, j in itertools.product(range(n), range(n)):
                    if i > j:
                        gap, total = matrix[i, i] - matrix[j, j], matrix[i, i] + matrix[j, j]
                        x[i, j] = -0.5 * matrix[i, j] * gap / (gap**2 + epsilon**2 * total**2)
                x = x - x.T
                bound = ((x @ x).norm() / math.sqrt(2)).sqrt()
                x, sigma = x * min(1.0, limit / bound), min(bound, limit)
                p = eye + 2 * x + 4 / (1 + math.sqrt(1 - 4 * sigma**2)) * x @ x - 0.5 * (b[s].T @ b[s] - eye)
                b[s] = b[s] @ p
                if carry:
                    matrix = p.T @ matrix @ p
            t_[s] = (matrix if carry else torch.diag(matrix.diagonal())).clone()
            t_[s].diagonal().clamp_(min=floor)
        alpha = alpha * (logs / 2).exp()
        momentum = mu * momentum + (1 - mu) * g
        direction = mu * momentum + (1 - mu) * g if nesterov else momentum
        left = b["c"] @ torch.diag(t_["c"].diagonal() ** (-1 / root)) @ b["c"].T
        right = b["k"] @ torch.diag(t_["k"].diagonal() ** (-1 / root)) @ b["k"].T
        u = alpha ** (-1 / root) * left @ direction @ right
        w = w - lr * u * 0.2 / ((u**2).mean().sqrt() + 1e-8)
    return w


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("carry", [True, False])
@pytest.mark.parametrize("root,nesterov", [(2.0, True), (4.0, False)])
def test_tracking_is_its_transcription(shape, carry, root, nesterov):
    start, gradient = problem(*shape)
    settings = {"root": root, "nesterov": nesterov}
    w = start.clone().requires_grad_()
    optimizer = SpectralKron(
        [w],
        lr=0.05,
        betas=(0.9, 0.7),
        carry_residual=carry,
        cayley_order=2,
        rotation_limit=0.4,
        rotation_epsilon=0.1,
        **settings,
    )
    got = train(optimizer, w, gradient, 50)
    want = tracking(start, gradient, 50, lr=0.05, mu=0.9, beta2=1 - 0.7, epsilon=0.1, limit=0.4, carry=carry, **settings)
    assert (want - start).norm() > 0.05 * start.norm()
    assert (got - want).abs().max() <= 1e-9 * want.abs().max().clamp(min=1)


# --- invariances ------------------------------------------------------------------------------------------------------

METHODS = (
    {"rotation": "tracking"},
    {"rotation": "tracking", "carry_residual": False, "cayley_order": 4},
    {"rotation": "riemannian", "betas": (0.9, 0.95)},
    {"rotation": "riemannian", "betas": (0.9, 0.95), "cayley_order": 8},
)


@pytest.mark.parametrize("options", METHODS)
def test_transposing_the_weight_transposes_the_update(options):
    start, gradient = problem(5, 8)
    w, v = start.clone().requires_grad_(), start.T.clone().requires_grad_()
    train(SpectralKron([w], lr=0.02, **options), w, gradient, 30)
    train(SpectralKron([v], lr=0.02, **options), v, lambda x, t: gradient(x.T, t).T, 30)
    torch.testing.assert_close(w.detach(), v.detach().T, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("update_scale", ["rms", "clip", None])
def test_tracking_is_invariant_to_the_scale_of_the_loss(scale, update_scale):
    start, gradient = problem(5, 8)
    w, v = start.clone().requires_grad_(), start.clone().requires_grad_()
    train(SpectralKron([w], lr=0.01, update_scale=update_scale), w, gradient, 30)
    train(SpectralKron([v], lr=0.01, update_scale=update_scale), v, lambda x, t: scale * gradient(x, t), 30)
    assert (w.detach() - start).norm() > 0.05
    torch.testing.assert_close(w, v, rtol=1e-6, atol=1e-6)


def test_the_papers_factors_follow_the_moving_average_to_first_order():
    """App. A.3: to first order in β₂ each factor is `S_l ← (1 − β₂) S_l + β₂/(α k_l) Q_l`, up to its determinant."""
    g, d_c, d_k = torch.randn(5, 7).double(), torch.tensor([4, 2, 1, 0.5, 0.25]).double(), torch.rand(7).double() + 0.5
    b_c, b_k = (torch.linalg.qr(torch.randn(n, n).double())[0] for n in (5, 7))
    d_k = d_k / d_k.log().mean().exp()
    errors = []
    for beta2 in (1e-2, 5e-3):
        w = torch.zeros(5, 7, dtype=torch.float64, requires_grad=True)
        optimizer = SpectralKron([w], lr=0.0, betas=(0, 1 - beta2), rotation="riemannian", update_scale=None)
        w.grad = g.clone()
        optimizer.step()
        for name, value in zip(
            ("basis_left", "basis_right", "eigenvalues_left", "eigenvalues_right", "scale"),
            (b_c, b_k, d_c, d_k, torch.ones(())),
            strict=True,
        ):
            optimizer.state[w][name].copy_(value)
        want = (1 - beta2) * b_c @ torch.diag(d_c) @ b_c.T + beta2 / 7 * g @ b_k @ torch.diag(1 / d_k) @ b_k.T @ g.T
        want = want / torch.linalg.det(want) ** (1 / 5)
        optimizer.step()
        b, d = optimizer.state[w]["basis_left"], optimizer.state[w]["eigenvalues_left"]
        errors.append((b @ torch.diag(d) @ b.T - want).norm().item())
    assert 1.8 < math.log2(errors[0] / errors[1]) < 2.2


def test_tracking_carries_the_exact_moving_average():
    """With the residual, `S = B T Bᵀ` is the moving average of the curvature, wherever the basis stands."""
    n = 4
    w = torch.zeros(n, 1, dtype=torch.float64, requires_grad=True)  # the right side is a number: one factor
    optimizer = SpectralKron([w], lr=0.0, betas=(0.9, 0.7), cayley_order=4, rotation_limit=0.05)
    want, scales = None, torch.tensor([[1.0], [2.0], [4.0], [0.5]]).double()
    for t in range(40):
        w.grad = torch.randn(n, 1, dtype=torch.float64) * scales
        beta = max(1 - 0.7, 1 / (t + 2))
        want = (w.grad**2).mean() * torch.eye(n) if want is None else want
        # α S_C ⊗ S_K with a right factor that is its own scale: Q_C = G Gᵀ and the mean over both sides' logarithms.
        optimizer.step()
        want = (1 - beta) * want + beta * w.grad @ w.grad.T
    s = optimizer.state[w]
    t_ = torch.diag(s["eigenvalues_left"]) + s["residual_left"]
    got = s["basis_left"] @ t_ @ s["basis_left"].T
    assert s["residual_left"].norm() > 0.01 * t_.norm()  # the basis lags, the average does not
    want, got = want / want.trace(), got / got.trace()
    assert (got - want).norm() < 0.05 * want.norm()


def test_a_limit_holds_for_the_exact_map_too():
    """Both maps with the same limited step: the truncated one is the exact one to its eighth power."""
    ends = {}
    for order, limit in ((None, 0.1), (8, 0.1), (None, None)):
        start, gradient = problem(6, 8)
        w = start.clone().requires_grad_()
        options = {"betas": (0, 0.9), "rotation": "riemannian", "update_scale": None, "lr": 0.01}
        optimizer = SpectralKron([w], cayley_order=order, rotation_limit=limit, **options)
        ends[order, limit] = train(optimizer, w, gradient, 10)
    moved = (ends[None, 0.1] - start).norm()
    assert (ends[None, 0.1] - ends[8, 0.1]).norm() < 1e-6 * moved
    assert (ends[None, 0.1] - ends[None, None]).norm() > 1e-3 * moved
