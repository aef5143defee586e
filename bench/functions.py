"""The five functions of Lin et al., 2025, App. C, for gradient-free minimisation.

Each takes points `(..., n)`, `n ≥ 2`, to values `(...)`, is positive but for its minimiser, and is 0 there. They are written so
that nothing cancels on the way to the minimum: `1 − cos x` as `2 sin²(x/2)`, `1 − exp x` as `−expm1 x`. The paper's text has no
misprint here; its Ackley is the usual one, with averages over the coordinates.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


def ackley(w: Tensor) -> Tensor:
    """`20 − 20 exp(−0.2 √(mean w²)) + e − exp(mean cos 2πw)`: a funnel with a local minimum at every integer point."""
    funnel = -20 * torch.expm1(-0.2 * w.square().mean(-1).sqrt())
    return funnel - math.e * torch.expm1(-2 * (math.pi * w).sin().square().mean(-1))


def rosenbrock(w: Tensor) -> Tensor:
    """`Σ 100 (w_{i+1} − w_i²)² + (w_i − 1)²`: a flat, bent valley. For `n ≥ 4` a second minimum is near `(−1, 1, …, 1)`."""
    x, y = w[..., :-1], w[..., 1:]
    return (100 * (y - x.square()).square() + (x - 1).square()).sum(-1)


def bohachevsky(w: Tensor) -> Tensor:
    """`Σ w_i² + 2 w_{i+1}² − 0.3 cos 3πw_i − 0.4 cos 4πw_{i+1} + 0.7`: a rippled bowl."""
    x, y = w[..., :-1], w[..., 1:]
    ripples = 0.6 * (1.5 * math.pi * x).sin().square() + 0.8 * (2 * math.pi * y).sin().square()
    return (x.square() + 2 * y.square() + ripples).sum(-1)


def schaffer(w: Tensor) -> Tensor:
    """`Σ r^(1/4) (sin²(50 r^(1/10)) + 1)`, `r = w_i² + w_{i+1}²`: rings, ever closer, and a cusp at the minimum."""
    r = w[..., :-1].square() + w[..., 1:].square()
    return (r.pow(0.25) * ((50 * r.pow(0.1)).sin().square() + 1)).sum(-1)


def griewank(w: Tensor) -> Tensor:
    """`Σ w_i²/4000 − Π cos(w_i/√i) + 1`: a wide bowl with a product of cosines on it."""
    i = torch.arange(1, w.shape[-1] + 1, dtype=w.dtype, device=w.device)
    return w.square().sum(-1) / 4000 - (w / i.sqrt()).cos().prod(-1) + 1


class Function(NamedTuple):
    """A function, called as such, and every coordinate of its minimiser."""

    function: Callable[[Tensor], Tensor]
    minimiser: float

    def __call__(self, w: Tensor) -> Tensor:
        return self.function(w)


FUNCTIONS = {
    "ackley": Function(ackley, 0.0),
    "rosenbrock": Function(rosenbrock, 1.0),
    "bohachevsky": Function(bohachevsky, 0.0),
    "schaffer": Function(schaffer, 0.0),
    "griewank": Function(griewank, 0.0),
}
