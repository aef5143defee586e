"""Fig. 2, 7 and 8 of Lin et al., 2025: how near curvature estimates come to the covariance of the gradients that they learn
from (fixed-point matching), and to the estimate of the default scheme at the same step (iterate matching).

Schemes and baselines take the same sequence of Gaussian gradients from the same start. Seeds are a batch of matrices. All in
float64; baselines may decompose matrices.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from spectral_ops import KroneckerFactor, SpectralFactor
from spectral_ops.bench.findings import Claim, Point, compared, ending

# The paper gives sizes and no more. Σ is that of Gaussian matrices, with a ridge that makes its condition number about 40.
SIZE, SIDES = 100, (9, 11)
RATE, STEPS, RECORDS = 0.002, 4000, 40
RIDGE = 0.1
DEFAULT, PROJECTION, FLOOR = "default", "projection", "nearest Kronecker product"
OURS = ("spectral, exact map", "spectral, truncated map", "spectral, tracking")
FROBENIUS, BURES = "relative Frobenius norm", "Wasserstein-2 distance"
TRUTHS = ("unstructured", "Kronecker")

Pair = tuple[Tensor, Tensor]


# --- Distances ----------------------------------------------------------------------------------------------------------


def relative_frobenius(x: Tensor, truth: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(x - truth) / torch.linalg.matrix_norm(truth)


def matrix_power(x: Tensor, power: float) -> Tensor:
    """Of symmetric positive semi-definite matrices."""
    d, v = torch.linalg.eigh(x)
    return (v * d.clamp(min=0).pow(power).unsqueeze(-2)) @ v.mT


def bures(x: Tensor, truth: Tensor) -> Tensor:
    """Wasserstein-2 distance between zero-mean Gaussians: `d² = tr X + tr Y − 2 tr (Y^½ X Y^½)^½`."""
    root = matrix_power(truth, 0.5)
    cross = torch.linalg.eigvalsh(root @ x @ root).clamp(min=0).sqrt().sum(-1)
    return (trace(x) + trace(truth) - 2 * cross).clamp(min=0).sqrt()


def trace(x: Tensor) -> Tensor:
    return x.diagonal(dim1=-2, dim2=-1).sum(-1)


METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {FROBENIUS: relative_frobenius, BURES: bures}


# --- Kronecker products -------------------------------------------------------------------------------------------------


def kron(c: Tensor, k: Tensor) -> Tensor:
    """Of each pair of matrices."""
    size = c.shape[-1] * k.shape[-1]
    return (c[..., :, None, :, None] * k[..., None, :, None, :]).reshape(*c.shape[:-2], size, size)


def project(x: Tensor, n: int, m: int) -> Pair:
    """The nearest Kronecker product of an `n × n` and an `m × m` matrix in the Frobenius norm (Van Loan & Pitsianis, 1993).

    It is the leading singular pair of `x`, rearranged so that a Kronecker product has rank 1; SPD where `x` is.
    """
    batch = x.shape[:-2]
    rearranged = x.view(*batch, n, m, n, m).transpose(-3, -2).reshape(*batch, n * n, m * m)
    u, s, vh = torch.linalg.svd(rearranged, full_matrices=False)
    root = s[..., 0].sqrt()[..., None, None]
    c, k = root * u[..., 0].view(*batch, n, n), root * vh[..., 0, :].view(*batch, m, m)
    sign = trace(c).sign()[..., None, None]  # both have this sign, or neither
    return sign * c, sign * k


# --- Schemes ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """`B Diag(d) Bᵀ`, or the Kronecker product of two of these; every scheme starts there."""

    bases: tuple[Tensor, ...]
    eigenvalues: tuple[Tensor, ...]

    def side(self, i: int, power: float = 1.0) -> Tensor:
        b = self.bases[i]
        return (b * self.eigenvalues[i].pow(power).unsqueeze(-2)) @ b.mT

    def matrix(self) -> Tensor:
        return self.side(0) if len(self.bases) == 1 else kron(self.side(0), self.side(1))


class Scheme(Protocol):
    def update(self, g: Tensor) -> None:
        """Learn from one gradient of each seed, `(seeds, n)`."""

    def matrix(self) -> Tensor:
        """The estimate, `(seeds, n, n)`."""


class Default:
    """`S ← (1 − β) S + β g gᵀ`."""

    def __init__(self, start: Start, rate: float):
        self.s, self.rate = start.matrix().clone(), rate

    def update(self, g: Tensor) -> None:
        self.s.lerp_(g.unsqueeze(-1) * g.unsqueeze(-2), self.rate)

    def matrix(self) -> Tensor:
        return self.s


class Cholesky:
    """Lin et al., 2024: a factor of the inverse, `S⁻¹ = C Cᵀ`, `C ← C exp(−β/2 (Cᵀ g gᵀ C − I))`, from the Cholesky factor.

    The exponential is truncated after its linear term, as it is in that paper.
    """

    def __init__(self, start: Start, rate: float):
        self.c, self.rate = torch.linalg.cholesky(start.side(0, -1)), rate

    def update(self, g: Tensor) -> None:
        self.c = _inverse_free(self.c, self.c.mT @ g.unsqueeze(-1), self.rate)

    def matrix(self) -> Tensor:
        return torch.linalg.inv(self.c @ self.c.mT)


class StructuredCholesky:
    """Lin et al., 2024, Fig. 5, inverse- and root-free Shampoo: `S_C⁻¹ = C Cᵀ`, `S_K⁻¹ = K Kᵀ`, each as in `Cholesky` from
    `Cᵀ G K Kᵀ Gᵀ C / m` and `Kᵀ Gᵀ C Cᵀ G K / n`; without momentum and damping."""

    def __init__(self, start: Start, rate: float):
        self.c, self.k = (torch.linalg.cholesky(start.side(i, -1)) for i in range(2))
        self.rate = rate

    def update(self, g: Tensor) -> None:
        n, m = self.c.shape[-1], self.k.shape[-1]
        x = self.c.mT @ g.view(len(g), n, m) @ self.k
        self.c, self.k = (
            _inverse_free(self.c, x / math.sqrt(m), self.rate),
            _inverse_free(self.k, x.mT / math.sqrt(n), self.rate),
        )

    def matrix(self) -> Tensor:
        return kron(*(torch.linalg.inv(f @ f.mT) for f in (self.c, self.k)))


def _inverse_free(c: Tensor, x: Tensor, rate: float) -> Tensor:
    """`c (I − β/2 (x xᵀ − I))`."""
    return (1 + rate / 2) * c - rate / 2 * (c @ x) @ x.mT


class Projection:
    """`(S_C, S_K) ← Proj((1 − β) S_C ⊗ S_K + β g gᵀ)`: a full matrix and its projection in every step."""

    def __init__(self, start: Start, rate: float):
        self.c, self.k = start.side(0), start.side(1)
        self.rate = rate

    def update(self, g: Tensor) -> None:
        full = torch.lerp(self.matrix(), g.unsqueeze(-1) * g.unsqueeze(-2), self.rate)
        self.c, self.k = project(full, self.c.shape[-1], self.k.shape[-1])

    def matrix(self) -> Tensor:
        return kron(self.c, self.k)


class Spectral:
    """`SpectralFactor`."""

    def __init__(self, start: Start, rate: float, rotation: str = "riemannian", exact: bool = False):
        (basis,), (d,) = start.bases, start.eigenvalues
        self.factor = SpectralFactor(
            d.shape[-1], batch=tuple(d.shape[:-1]), eigenvalues=d, basis=basis, rotation=rotation, dtype=d.dtype
        )
        self.rate, self.exact = rate, exact

    def update(self, g: Tensor) -> None:
        self.factor.update(x=g, beta2=self.rate, exact=self.exact)

    def matrix(self) -> Tensor:
        return self.factor.matrix()


class SpectralPair:
    """`KroneckerFactor`."""

    def __init__(self, start: Start, rate: float, rotation: str = "riemannian", exact: bool = False):
        (d_c, d_k), bases = start.eigenvalues, (start.bases[0], start.bases[1])
        self.factor = KroneckerFactor(
            d_c.shape[-1], d_k.shape[-1], batch=tuple(d_c.shape[:-1]), eigenvalues=(d_c, d_k), bases=bases, rotation=rotation,
            dtype=d_c.dtype,
        )  # fmt: skip
        self.rate, self.exact = rate, exact

    def update(self, g: Tensor) -> None:
        self.factor.update(g.view(len(g), self.factor.n, self.factor.m), self.rate, exact=self.exact)

    def matrix(self) -> Tensor:
        return self.factor.matrix()


def full_schemes(start: Start, rate: float) -> dict[str, Scheme]:
    return {
        DEFAULT: Default(start, rate),
        "Cholesky": Cholesky(start, rate),
        OURS[0]: Spectral(start, rate, exact=True),
        OURS[1]: Spectral(start, rate),
        OURS[2]: Spectral(start, rate, "tracking"),
    }


def pair_schemes(start: Start, rate: float) -> dict[str, Scheme]:
    return {
        DEFAULT: Default(start, rate),
        PROJECTION: Projection(start, rate),
        "structured Cholesky": StructuredCholesky(start, rate),
        OURS[0]: SpectralPair(start, rate, exact=True),
        OURS[1]: SpectralPair(start, rate),
        OURS[2]: SpectralPair(start, rate, "tracking"),
    }


# --- Experiments --------------------------------------------------------------------------------------------------------


def normal(seeds: int, *shape: int, stream: int) -> Tensor:
    """Normal numbers, of which every seed has its own, however many seeds there are."""
    generators = [torch.Generator().manual_seed(1000 * seed + stream) for seed in range(seeds)]
    return torch.stack([torch.randn(*shape, dtype=torch.float64, generator=generator) for generator in generators])


def covariance(seeds: int, n: int, stream: int) -> Tensor:
    a = normal(seeds, n, n, stream=stream)
    return a @ a.mT / n + RIDGE * torch.eye(n, dtype=a.dtype)


def beginning(seeds: int, *sizes: int) -> Start:
    """Random bases, and distinct eigenvalues between 0.5 and 1.5."""
    bases = tuple(torch.linalg.qr(normal(seeds, n, n, stream=10 + i)).Q for i, n in enumerate(sizes))
    return Start(bases, tuple(torch.linspace(0.5, 1.5, n, dtype=torch.float64).expand(seeds, n) for n in sizes))


def full_matching(seeds: int, *, n: int = SIZE, rate: float = RATE, steps: int = STEPS) -> Iterator[Point]:
    """Fig. 2, left, and Fig. 7."""
    schemes = full_schemes(beginning(seeds, n), rate)
    yield from _match("7", "full matrix", covariance(seeds, n, stream=0), schemes, steps)


def pair_matching(
    seeds: int, truth: str, *, sides: tuple[int, int] = SIDES, rate: float = RATE, steps: int = STEPS
) -> Iterator[Point]:
    """Fig. 2, right, and Fig. 8: what is learned is a Kronecker product, the truth need not be one."""
    n, m = sides
    if truth == "Kronecker":
        sigma = kron(covariance(seeds, n, stream=0), covariance(seeds, m, stream=1))
    else:
        sigma = covariance(seeds, n * m, stream=0)
    schemes = pair_schemes(beginning(seeds, n, m), rate)
    name = f"{truth} truth"
    yield from _match("8", name, sigma, schemes, steps)
    nearest = kron(*project(sigma, n, m))
    for metric, distance in METRICS.items():
        for seed, value in enumerate(distance(nearest, sigma).tolist()):
            for step in (0, steps):
                yield Point("8", name, FLOOR, str(seed), "step", step, f"fixed point: {metric}", value)


def _match(figure: str, experiment: str, sigma: Tensor, schemes: dict[str, Scheme], steps: int) -> Iterator[Point]:
    root = torch.linalg.cholesky(sigma)
    seeds, n, _ = sigma.shape
    gradients = (root @ normal(seeds, n, steps, stream=2)).mT.contiguous()
    every = max(1, steps // RECORDS)
    for step in range(steps + 1):
        if step % every == 0 or step == steps:
            for name, target, metric, values in _distances(schemes, sigma):
                for seed, value in enumerate(values):
                    yield Point(figure, experiment, name, str(seed), "step", step, f"{target}: {metric}", value)
        if step < steps:
            for scheme in schemes.values():
                scheme.update(gradients[:, step])


def _distances(schemes: dict[str, Scheme], sigma: Tensor) -> Iterator[tuple[str, str, str, list[float]]]:
    found = {name: scheme.matrix() for name, scheme in schemes.items()}
    for name, x in found.items():
        for metric, distance in METRICS.items():
            yield name, "fixed point", metric, distance(x, sigma).tolist()
            if name != DEFAULT:
                yield name, "iterate", metric, distance(x, found[DEFAULT]).tolist()


# --- Claims -------------------------------------------------------------------------------------------------------------


def full_claims(points: list[Point]) -> Iterator[Claim]:
    """Final errors are means over the last quarter of the steps, since they fluctuate, and medians over the seeds."""
    for metric in METRICS:
        for name in OURS:
            yield _claim(points, "full matrix", metric, name, DEFAULT)


def pair_claims(points: list[Point]) -> Iterator[Claim]:
    """Of what was run. Without structure in the truth no Kronecker product comes near it: all have the same gap."""
    for truth in TRUTHS:
        experiment = f"{truth} truth"
        if any(p.experiment == experiment for p in points):
            for baseline in (DEFAULT, PROJECTION) if truth == "Kronecker" else (PROJECTION,):
                for metric in METRICS:
                    for name in OURS:
                        yield _claim(points, experiment, metric, name, baseline)


def _claim(points: list[Point], experiment: str, metric: str, name: str, baseline: str) -> Claim:
    curve = [p for p in points if (p.experiment, p.metric) == (experiment, f"fixed point: {metric}")]
    ours, theirs = (ending(p for p in curve if p.method == method) for method in (name, baseline))
    return compared(f"Fig. {curve[0].figure}, {experiment}, final {metric}, {name} / {baseline}", ours, theirs, 1.1)
