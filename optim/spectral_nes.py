"""Natural evolution strategies with a spectral factor: minimisation from function values alone.

Lin et al., 2025, "Spectral-factorized Positive-definite Curvature Learning for NN Training", Sec. 4.3, App. C, App. L;
Wierstra et al., 2008, "Natural Evolution Strategies" (ranks in place of values); Fukushima et al., 2011, "Proposal of
Distance-weighted Exponential Natural Evolution Strategies" (mirrored samples).
"""

import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from spectral_ops.factors import SpectralFactor
from spectral_ops.optim import _options as check
from spectral_ops.reference import STREAM_STEP

FLAT = 20  # generations
SMALLEST = 1e-150  # standard deviation whose square is well within float64


class SpectralNES:
    r"""Minimise a function by its values, with samples from a Gaussian `N(μ, S⁻¹)` that learns, `S = B Diag(d) Bᵀ`.

    A generation of `λ` samples, ranked, `k = 1` the best:

        w_k = μ + B d^(−1/2) z_k,   z_k ~ N(0, I)
        u_k = max(0, log(λ/2 + 1) − log k) / Σ_j max(0, log(λ/2 + 1) − log j) − 1/λ
        W   = −D^(1/2) (Σ u_k (z_k z_kᵀ − I)) D^(1/2)            curvature, in the basis B (Stein's identity)
        μ   ← μ + β₁ B d^(−1/2) Σ u_k z_k
        B, d ← `SpectralFactor.update` of W by its exact map with β₂, γ = 0

    Only ranks count, so that strictly increasing transformations of the function change nothing. Equal values share the mean of
    their utilities, and NaN counts as `inf`. `S` is never decomposed: samples need `d^(−1/2)` only.

        nes = SpectralNES(torch.zeros(10), 0.5, target=1e-8)
        while not nes.stop():
            w = nes.ask()
            nes.tell(w, function(w))

    Args:
        mean: `(n,)`, where `μ` starts. All is float64, on its device.
        scale: standard deviation at the start, a number or `(n,)`, in units of `mean`.
        population_size: `λ`, at least 4, even with `mirrored`. None: `4 + ⌊3 log n⌋`, the next even number with `mirrored`.
        mean_lr: `β₁`.
        scale_lr: `β₂`. None: `(9 + 3 log n) / (5 n √n)`; for a diagonal `S` `(3 + log n) / (5 √n)`, as it has fewer numbers to
            learn (Schaul et al., 2011).
        mirrored: samples come in pairs `z, −z`, of lower variance.
        max_evaluations: stop before more of them. None: no limit.
        target: stop at this value. None: no target.
        scale_limits: smallest and largest standard deviation, in units of `mean`: `d` is kept within. None: 1e-12 times the
            smallest and 1e12 times the largest of `scale`. A function with a cusp at its minimum may want smaller ones.
        max_preconditioner_dim: for more coordinates `S` stays diagonal (separable NES): the state is of size `n`, not `n²`.
        seed: of the samples, which are a function of it and the generation.

    Attributes:
        mean: `μ`, `(n,)`.
        best: the best solution told; `mean` before there is one.
        best_value: its value; `inf` before there is one.
        evaluations: how many values were told.
        generation: how many generations there were.
        factor: `S`; a diagonal one is a batch of `n` factors of size 1.

    Raises:
        ValueError, TypeError: an argument of a wrong shape or value.

    Lin et al., 2025, "Spectral-factorized Positive-definite Curvature Learning for NN Training", Fig. 1 and Sec. 4.3.
    """

    def __init__(
        self,
        mean: Any,
        scale: float | Any,
        *,
        population_size: int | None = None,
        mean_lr: float = 1.0,
        scale_lr: float | None = None,
        mirrored: bool = True,
        max_evaluations: int | None = None,
        target: float | None = None,
        scale_limits: tuple[float, float] | None = None,
        max_preconditioner_dim: int = 1024,
        seed: int = 0,
    ):
        options = dict(locals())
        for name in ("max_preconditioner_dim", "population_size", "max_evaluations"):
            if options[name] is not None or name == "max_preconditioner_dim":
                check.whole(options, name)
        for name in ("mean_lr", "scale_lr"):
            if options[name] is not None or name == "mean_lr":
                check.number(options, name, positive=True)
        check.choice(options, "mirrored", (True, False))
        if target is not None and (isinstance(target, bool) or not isinstance(target, int | float) or math.isnan(target)):
            raise ValueError(f"`target` must be a number, got {target!r}")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"`seed` must be an integer, got {seed!r}")
        self.mean = torch.as_tensor(mean, dtype=torch.float64).detach().clone()
        if self.mean.ndim != 1 or not self.mean.numel() or not self.mean.isfinite().all():
            raise ValueError(f"`mean` must be finite and have shape (n,), n ≥ 1, got {mean}, of shape {tuple(self.mean.shape)}")
        n, log_n = len(self.mean), math.log(len(self.mean))
        scales = self._tensor(scale)
        if scales.shape not in ((), (n,)) or not ((scales > 0) & scales.isfinite()).all():
            raise ValueError(f"`scale` must be positive and finite, a number or of shape ({n},), got {scale}")
        low, high = scales.amin().item(), scales.amax().item()
        limits = (max(1e-12 * low, SMALLEST), min(1e12 * high, 1 / SMALLEST)) if scale_limits is None else tuple(scale_limits)
        if not (len(limits) == 2 and SMALLEST <= limits[0] <= low <= high <= limits[1] <= 1 / SMALLEST):
            raise ValueError(
                f"`scale_limits` must be two numbers in [{SMALLEST}, {1 / SMALLEST}] with `scale` between them, got {limits} "
                f"and a scale of {low} to {high}"
            )
        diagonal = n > max_preconditioner_dim
        if population_size is None:
            population_size = 4 + math.floor(3 * log_n)
            population_size += population_size % 2 if mirrored else 0
        if population_size < 4 or (mirrored and population_size % 2):
            raise ValueError(f"`population_size` must be at least 4, and even with `mirrored=True`, got {population_size}")
        if max_evaluations is not None and max_evaluations < population_size:
            raise ValueError(f"`max_evaluations` must be at least a population, {population_size}, got {max_evaluations}")
        if scale_lr is None:
            scale_lr = (3 + log_n) / (5 * math.sqrt(n)) if diagonal else (9 + 3 * log_n) / (5 * n * math.sqrt(n))

        self.population_size, self.mean_lr, self.scale_lr, self.mirrored = population_size, mean_lr, scale_lr, mirrored
        self.max_evaluations, self.target, self.seed, self.diagonal = max_evaluations, target, seed, diagonal
        self.limits = limits[1] ** -2.0, limits[0] ** -2.0  # of the eigenvalues
        self.factor = SpectralFactor(
            1 if diagonal else n,
            batch=(n,) if diagonal else (),
            eigenvalues=(scales**-2).expand(n).view(-1, 1) if diagonal else scales**-2,
            dtype=torch.float64,
            device=self.mean.device,
            validate=False,  # `tell` looks itself, and what leaves the range of the numbers is clamped
        )
        self.best, self.best_value = self.mean, math.inf
        self.evaluations = self.generation = self.flat = 0

    def ask(self) -> Tensor:
        """The samples of this generation, `(population_size, n)`: the same ones until `tell`."""
        # On the CPU, so that all devices draw the same. Its generator reads 32 bits of the seed; the step is odd.
        generator = torch.Generator().manual_seed((self.seed + self.generation * STREAM_STEP) % 2**32)
        rows = self.population_size // 2 if self.mirrored else self.population_size
        z = torch.randn(rows, len(self.mean), dtype=torch.float64, generator=generator).to(self.mean.device)
        x = self._to_space(z)
        return self.mean + (torch.cat([x, -x]) if self.mirrored else x)

    def tell(self, solutions: Any, values: Any) -> None:
        """Learn from values of the function, and end the generation.

        Args:
            solutions: `(population_size, n)`. They need not be those of `ask`, but who is many standard deviations off moves
                the distribution far.
            values: `(population_size,)`, one for each solution. NaN counts as `inf`.

        Raises:
            ValueError: a wrong shape, a solution that is not finite, or is too far off for float64. Then nothing has changed.
        """
        shape = (self.population_size, len(self.mean))
        w, f = self._tensor(solutions), self._tensor(values)
        if w.shape != shape or not w.isfinite().all():
            raise ValueError(f"`solutions` must be finite and have shape {shape}, got shape {tuple(w.shape)}")
        if f.shape != shape[:1]:
            raise ValueError(f"`values` must have shape ({shape[0]},), one for each solution, got {tuple(f.shape)}")
        f = f.nan_to_num(math.inf, math.inf, -math.inf)
        d, u, x = self.factor.eigenvalues.view(-1), utilities(f), w - self.mean
        root = d.sqrt()
        z = (x if self.diagonal else x @ self.factor.basis) * root
        if self.diagonal:
            curvature = -(d * (u @ z.square())).view(-1, 1, 1)
        else:
            curvature = -root.unsqueeze(-1) * (z.mT @ (u.unsqueeze(-1) * z)) * root  # the identity falls out, as Σ u = 0
        if not curvature.isfinite().all():
            raise ValueError(f"`solutions` are too far from the mean for float64: got one at {x.abs().amax():.2g}")
        self.mean = self.mean + self.mean_lr * self._to_space(u @ z)
        self.factor.update(curvature, rotated=True, beta2=self.scale_lr, gamma=0, exact=True)
        self.factor.eigenvalues.clamp_(*self.limits)

        i = int(f.argmin())
        if f[i] < self.best_value:
            self.best, self.best_value = w[i].clone(), f[i].item()
        self.evaluations += len(f)
        self.generation += 1
        self.flat = self.flat + 1 if f.amin() == f.amax() else 0

    def stop(self) -> str | None:
        """The criterion that is met, or None.

        "target": the best value is at most `target`. "max_evaluations": another generation would exceed it. "scale": every
        standard deviation is at one of its limits. "flat": in each of the last 20 generations all values were equal.
        """
        d, (low, high) = self.factor.eigenvalues, self.limits
        met = {
            "target": self.target is not None and self.best_value <= self.target,
            "max_evaluations": self.max_evaluations is not None
            and self.evaluations + self.population_size > self.max_evaluations,
            "scale": bool(((d <= low) | (d >= high)).all()),
            "flat": self.flat >= FLAT,
        }
        return next((name for name, value in met.items() if value), None)

    def minimize(self, function: Callable[[Tensor], Any]) -> Tensor:
        """Ask and tell until `stop`.

        Args:
            function: takes `(population_size, n)` to values `(population_size,)`.

        Returns:
            `best`, `(n,)`. Where values are noise no criterion may ever be met but `max_evaluations`.
        """
        while not self.stop():
            solutions = self.ask()
            self.tell(solutions, function(solutions))
        return self.best

    def state_dict(self) -> dict[str, Any]:
        """All that changes and the seed, as copies: with it, an object of the same arguments goes on bit for bit."""
        return deepcopy({name: getattr(self, name) for name in STATE} | {"factor": self.factor.state_dict()})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over another object's state.

        Args:
            state_dict: what the other's `state_dict()` gave.

        Raises:
            ValueError: names or shapes differ; then nothing has changed.
        """
        if state_dict.keys() != {*STATE, "factor"}:
            raise ValueError(f"the state of SpectralNES is {[*STATE, 'factor']}, got {list(state_dict)}")
        tensors = {name: self._tensor(state_dict[name]).clone() for name in ("mean", "best")}
        for name, value in tensors.items():
            if value.shape != self.mean.shape:
                raise ValueError(f"`{name}` must have shape {tuple(self.mean.shape)}, got {tuple(value.shape)}")
        self.factor.load_state_dict(state_dict["factor"])
        for name in STATE:
            setattr(self, name, tensors.get(name, state_dict[name]))

    def _tensor(self, x: Any) -> Tensor:
        return torch.as_tensor(x, dtype=torch.float64, device=self.mean.device).detach()

    def _to_space(self, z: Tensor) -> Tensor:
        """`B d^(−1/2) z`, `(..., n)`."""
        x = z * self.factor.eigenvalues.view(-1).rsqrt()
        return x if self.diagonal else x @ self.factor.basis.mT


STATE = ("mean", "best", "best_value", "evaluations", "generation", "flat", "seed")


def utilities(values: Tensor) -> Tensor:
    """`u`, `(population,)`, for the values, which may be infinite. Equal ones share their mean, `Σ u = 0`."""
    size = len(values)
    weights = (math.log(size / 2 + 1) - torch.arange(1, size + 1, dtype=values.dtype, device=values.device).log()).clamp(min=0)
    total = torch.nn.functional.pad(weights.cumsum(0), (1, 0))  # of the first k, so that ends of a tie give its sum
    share = torch.linspace(0, 1, size + 1, dtype=values.dtype, device=values.device)
    total = total / total[-1] - share  # 0 at both ends: u is exactly 0 where all are equal
    ordered = values.sort().values
    first, end = (torch.searchsorted(ordered, values, right=right) for right in (False, True))
    return (total[end] - total[first]) / (end - first)
