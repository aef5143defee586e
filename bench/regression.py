"""The small regression that faults happen to, and what an optimizer made of one.

Its gradients depend on nothing but a parameter's own value and the step. So a fault of one parameter leaves the others bit for
bit where they are without it: that is what is checked, not only that nothing breaks.
"""

import copy
import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from spectral_ops.bench.optimizers import Build

WARM = 11  # steps before most faults: in the first ten an update interval does not count
STEPS = 4  # with a fault and after it: more than the longest update interval
LR = 0.05
SHAPES = {"query": (6, 4), "experts": (3, 6, 4), "bias": (4,), "fused": (9, 4)}
NAMES = tuple(SHAPES)
NOT_STATE = ("params", "differentiable")  # of a parameter group; torch adds the second when it loads
ODD = {  # what may stand beside those
    "scalar": ("a parameter of no dimension", torch.tensor(1.0)),
    "1 x n": ("a matrix of one row", torch.ones(1, 5)),
    "n x 1": ("a matrix of one column", torch.ones(5, 1)),
    "1 x 1": ("a matrix of one element", torch.ones(1, 1)),
    "convolution": ("a weight of four dimensions", torch.ones(4, 2, 3, 3)),
    "empty": ("a matrix of no rows", torch.ones(0, 4)),
    "no experts": ("an empty stack", torch.ones(0, 4, 3)),
    "float16": ("a matrix of that dtype", torch.ones(6, 4, dtype=torch.float16)),
    "bfloat16": ("a matrix of that dtype", torch.ones(6, 4, dtype=torch.bfloat16)),
    "float64": ("a matrix of that dtype", torch.ones(6, 4, dtype=torch.float64)),
    "contiguous": ("a matrix like any other", torch.ones(6, 4)),
    "transposed": ("a matrix that is not contiguous: trains as a contiguous one", torch.ones(4, 6).mT),
    "frozen": ("a matrix that requires no gradient", torch.ones(6, 4)),
}

Spoil = Callable[[Tensor], Tensor | None]  # what takes a gradient's place
Snapshot = dict[str, dict[str, Any]]


class Unexpected(Exception):
    """What no optimizer must do."""


def need(condition: Any, otherwise: str) -> None:
    if not condition:
        raise Unexpected(otherwise)


# --- what is trained --------------------------------------------------------------------------------------------------


class Regression:
    """A matrix, a stack of experts of its shape, a bias, a fused weight in two parts: each on its way to a target."""

    def __init__(self, build: Build, odd: str = "", **options: Any):
        values = {name: _noise(shape, i) for i, (name, shape) in enumerate(SHAPES.items())}
        values |= {"odd": ODD[odd][1].clone()} if odd else {}
        self.parameters = {name: nn.Parameter(x, requires_grad=odd != "frozen" or name != "odd") for name, x in values.items()}
        self.targets = {name: 3 * _noise(p.shape, 100 + i) for i, (name, p) in enumerate(self.parameters.items())}
        self.curvature = {name: torch.linspace(0.5, 2, p.numel()).view(p.shape) for name, p in self.parameters.items()}
        self.t = 0
        named = [(name, p) for name, p in self.parameters.items() if name != "fused"]
        groups = [{"params": named}, {"params": [("fused", self.parameters["fused"])], "split_sizes": [6, 3]}]
        self.optimizer: Any = build(groups, **({"lr": LR, "weight_decay": 0.01} | options))

    def loss(self) -> float:
        errors = ((name, p.detach() - self.targets[name]) for name, p in self.parameters.items())
        return sum((self.curvature[name] * error.square()).sum().item() / 2 for name, error in errors)

    def step(self, spoil: Spoil | None = None, names: Sequence[str] = NAMES) -> None:
        for i, (name, p) in enumerate(self.parameters.items()):
            gradient = self.curvature[name] * (p.detach() - self.targets[name]) + 0.1 * _noise(p.shape, 1000 * self.t + i)
            if p.requires_grad:
                p.grad = spoil(gradient.to(p.dtype)) if spoil and name in names else gradient.to(p.dtype)
        self.optimizer.step()
        self.t += 1

    def snapshot(self) -> Snapshot:
        """Everything that the next steps depend on, by parameter and parameter group; and what was counted."""
        state, groups = self.optimizer.state, self.optimizer.param_groups
        owners = {name: {"value": p, **state.get(p, {})} for name, p in self.parameters.items()}
        owners |= {f"group {i}": {x: group[x] for x in group if x not in NOT_STATE} for i, group in enumerate(groups)}
        return {
            owner: {x: value.detach().clone() if isinstance(value, Tensor) else value for x, value in held.items()}
            for owner, held in owners.items()
        }

    def skipped(self) -> str:
        """The outcome, by what was counted."""
        count = self.optimizer.skipped_steps()
        need(count.ndim == 0 and not count.is_floating_point(), f"skipped_steps() is {count!r}, not an integer")
        return f"skipped {count}" if count else "trains"

    def check(self, before: Snapshot, loss: float) -> None:
        """That it has trained since then."""
        for name, held in self.snapshot().items():
            poisoned = [x for x, value in held.items() if isinstance(value, Tensor) and not value.isfinite().all()]
            need(not poisoned, f"{name}: {', '.join(poisoned)} not finite")
        for name, p in self.parameters.items():
            moved = not torch.equal(p, before[name]["value"])
            need(moved == (p.requires_grad and p.numel() > 0), f"{name} {'moved' if moved else 'did not move'}")
        need(self.loss() < loss, f"the loss rose from {loss:.4g} to {self.loss():.4g}")


def _noise(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@cache
def _started(build: Build, warm: int, odd: str) -> Regression:
    regression = Regression(build, odd)
    for _ in range(warm):
        regression.step()
    return regression


def start(build: Build, warm: int = WARM, odd: str = "") -> Regression:
    return copy.deepcopy(_started(build, warm, odd))


@cache
def undisturbed(
    build: Build, warm: int = WARM, odd: str = "", steps: int = STEPS, missing: tuple[str, ...] = (), when: tuple[int, ...] = ()
) -> Snapshot:
    """Where training ends without a fault, or without the gradients of some parameters at some times."""
    regression = start(build, warm, odd)
    for t in range(steps):
        regression.step(lambda _: None, missing if t in when else ())
    return regression.snapshot()


def same(got: Snapshot, want: Snapshot, when: str, names: Sequence[str] | None = None, counts: bool = False) -> None:
    """Bit for bit, all or some owners; what was counted only where that is asked for."""
    for owner in want | got if names is None else names:
        a, b = got.get(owner, {}), want.get(owner, {})
        different = [x for x in b | a if (counts or not x.startswith("skipped")) and not _equal(a.get(x), b.get(x))]
        need(not different, f"{when}, {owner} differs in {', '.join(different)}")


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)


# --- outcomes ---------------------------------------------------------------------------------------------------------


def trains(
    regression: Regression, spoil: Spoil | None = None, times: int = 0, like: Snapshot | None = None, falls: bool = True
) -> str:
    """It moves every parameter to its target, with these gradients in the first steps, and ends where another did. Unless it
    `falls`, the loss need only stay finite."""
    before, loss = regression.snapshot(), regression.loss()
    for t in range(max(times + 2, STEPS)):
        regression.step(spoil if t < times else None)
    regression.check(before, loss if falls else math.inf)
    if like:
        same(regression.snapshot(), like, "compared to training without the fault", counts=True)
    return regression.skipped()


def misses(
    build: Build, spoil: Spoil, names: tuple[str, ...], times: tuple[int, ...] = (0,), warm: int = WARM, odd: str = ""
) -> str:
    """These gradients are as good as none: nothing of their parameters changes, now or later, and nothing of the others."""
    regression, steps = start(build, warm, odd), max(times) + STEPS
    before, loss = regression.snapshot(), regression.loss()
    for t in range(steps):
        if t not in times:
            regression.step()
            continue
        held = regression.snapshot()
        regression.step(spoil, names)
        now = regression.snapshot()
        for name in names:
            if not held[name].keys() - {"value"}:  # its state is new; that it is as a fresh one shows in how it trains
                now[name] = {"value": now[name]["value"]}
            same(now, held, "in the faulty step", [name])
    now = regression.snapshot()
    regression.check(before, loss)
    same(now, undisturbed(build, warm, odd, steps, names, times), "compared to training without that gradient")
    others = [name for name in now if name not in names]
    same(now, undisturbed(build, warm, odd, steps), "compared to training without the fault", others, counts=True)
    return regression.skipped()


def attempt(action: Callable[[], Any], culprit: str) -> str:
    """If it fails, then in a sentence that names the culprit."""
    try:
        action()
    except Exception as error:
        need(culprit in str(error), f"{type(error).__name__} does not name {culprit}: {error}")
        return f"error: {type(error).__name__}"
    return "trains"


def fails(build: Build, action: Callable[[Regression], Any], culprit: str) -> str:
    """It fails, and training goes on as if it had not been tried."""
    regression = start(build)
    before = regression.snapshot()
    outcome = attempt(lambda: action(regression), culprit)
    if outcome == "trains":
        return trains(regression)
    same(regression.snapshot(), before, "after the error", counts=True)
    trains(regression, like=undisturbed(build))
    return outcome
