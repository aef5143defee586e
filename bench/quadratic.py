"""Minimise a badly conditioned quadratic with each optimizer at the best of equally many constant learning rates.

python -m spectral_ops.bench quadratic
"""

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from spectral_ops.bench import output
from spectral_ops.bench.training import configure
from spectral_ops.optim import IFShampoo, KrADagrad, KrADagradStar, SpectralKron

# Mei et al., 2023, Sec. 5.1: `tr(Xᵀ A X B)`. What the paper leaves open is as in experiments/quadratic_high_condition.ipynb of
# its program, github.com/jonathanmei/kradagrad: the largest eigenvalue, the steep spectrum, a normal start, 250 steps, and
# gradients that are computed in float64 and rounded to the dtype of X. Roots are computed in every step, not in every third.
SIZE, CONDITION, LARGEST, STEPS = 128, 1e10, 10.0, 250
SPECTRA = {"steep": 8, "even": 1}  # eigenvalue i of n is LARGEST · 10^(−xᵖ), x evenly spaced: in "even" they are log-spaced
RATES, DECADE = 8, 2  # learning rates for each optimizer, and in a decade
DIVERGED = 1e3  # times the loss at the start
RECORD = 10  # steps between the rows of a curve
MOMENTUM = 0.9  # of grafted updates
EPSILONS = (1e-8, 1e-4, 1e-2)  # of Shampoo: the program's, that of Gupta et al., and one that float32 sees beside `G Gᵀ`
KRADAGRAD = "KrADagrad*, tracking"

Build = Callable[[list[Parameter], float], Optimizer]  # of parameters and a learning rate


# --- The problem --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """All in float64."""

    a: Tensor
    b: Tensor
    start: Tensor

    def loss(self, x: Tensor) -> float:
        x = x.detach().double()
        return float((x * (self.a @ x @ self.b)).sum())

    def gradient(self, x: Tensor) -> Tensor:
        return (2 * self.a @ x.detach().double() @ self.b).to(x.dtype)


def problem(spectrum: str, seed: int, size: int = SIZE) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    decades = torch.linspace(0, math.log10(CONDITION) ** (1 / SPECTRA[spectrum]), size, dtype=torch.float64)
    eigenvalues = LARGEST * 10 ** -(decades ** SPECTRA[spectrum])

    def normal() -> Tensor:
        return torch.randn(size, size, dtype=torch.float64, generator=generator)

    def matrix() -> Tensor:
        q = torch.linalg.qr(normal()).Q
        x = (q * eigenvalues) @ q.T
        return 0.5 * (x + x.T)

    return Problem(matrix(), matrix(), normal().float().double())  # a start that has no rounding in float32


# --- Optimizers ---------------------------------------------------------------------------------------------------------


class Shampoo(Optimizer):
    """Gupta et al., 2018, Algorithm 1, for matrices; all in the parameter's dtype.

    `L ← L + G Gᵀ`, `R ← R + Gᵀ G` from `eps I`, `W ← W − η L^(−1/4) G R^(−1/4)`. What rounding makes of an eigenvalue below
    `eps`, which in exact arithmetic there is none of, is raised to it.
    """

    def __init__(self, params: list[Parameter], lr: float, eps: float):
        super().__init__(params, {"lr": lr, "eps": eps})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                s = self.state[p]
                if not s:
                    eyes = [torch.eye(k, dtype=p.dtype, device=p.device) for k in p.shape]
                    s["left"], s["right"] = (group["eps"] * eye for eye in eyes)
                s["left"] += p.grad @ p.grad.T
                s["right"] += p.grad.T @ p.grad
                left, right = (_inverse_root(s[side], group["eps"]) for side in ("left", "right"))
                p -= group["lr"] * left @ p.grad @ right


def _inverse_root(x: Tensor, eps: float) -> Tensor:
    d, v = torch.linalg.eigh(x)
    return (v * d.clamp(min=eps) ** -0.25) @ v.T


class Grafted(Optimizer):
    """The update of another optimizer, made as long as the gradient, and Nesterov momentum of that: what the paper's program
    does with Shampoo and KrADagrad*, also where it asks for no grafting."""

    def __init__(self, params: list[Parameter], lr: float, inner: Build):
        super().__init__(params, {"lr": lr})
        self.shadows = {p: Parameter(torch.zeros_like(p)) for p in params}
        self.inner = inner(list(self.shadows.values()), 1.0)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for p, shadow in self.shadows.items():
            shadow.zero_()
            shadow.grad = None if p.grad is None else p.grad.clone()
        self.inner.step()
        for group in self.param_groups:
            for p in group["params"]:
                update = -self.shadows[p]
                update *= p.grad.norm() / update.norm().clamp(min=torch.finfo(p.dtype).tiny)
                momentum = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                for _ in range(2):  # Nesterov's look ahead stays in the buffer
                    momentum.mul_(MOMENTUM).add_(update)
                p -= group["lr"] * momentum


@dataclass(frozen=True)
class Candidate:
    """An optimizer as it is compared. `update` tells how its updates are made: plain (the paper's Algorithm 1, that is without
    momentum, scale or schedule), grafted, or its own default."""

    name: str
    dtype: torch.dtype
    update: str
    build: Build
    first: float  # decades of the smallest learning rate

    @property
    def dtype_name(self) -> str:
        return f"fp{torch.finfo(self.dtype).bits}"

    def rates(self) -> list[float]:
        return [10 ** (self.first + i / DECADE) for i in range(RATES)]


def shampoo(eps: float) -> str:
    return f"Shampoo, eps {eps:.0e}"


def _option(optimizer: Callable[..., Optimizer], **options: Any) -> Build:
    return lambda params, lr: optimizer(params, lr=lr, **options)


def _both(
    name: str, dtype: torch.dtype, plain: float, optimizer: Callable[..., Optimizer], **options: Any
) -> Iterator[Candidate]:
    build = _option(optimizer, **options)
    yield Candidate(name, dtype, "plain", build, plain)
    yield Candidate(name, dtype, "grafted", lambda params, lr: Grafted(params, lr, build), -4)


def candidates() -> Iterator[Candidate]:
    double, single = torch.float64, torch.float32
    paper: dict[str, Any] = {"update_scale": None, "momentum": 0.0}
    for eps in EPSILONS:
        for dtype in (double, single):
            yield from _both(shampoo(eps), dtype, -0.5, Shampoo, eps=eps)
    yield from _both("KrADagrad*, eigh", double, -4, KrADagradStar, roots="eigh", **paper)
    yield from _both("KrADagrad*, eigh", single, -4, KrADagradStar, roots="eigh", **paper)
    yield from _both(KRADAGRAD, single, -4, KrADagradStar, **paper)
    yield from _both("KrADagrad", single, -4, KrADagrad, **paper)
    yield from _both("IFShampoo", single, -5, IFShampoo, **paper)
    yield from _both("SpectralKron", single, -3, SpectralKron, update_scale=None, betas=(0.0, 0.5))
    yield Candidate(KRADAGRAD, single, "own", _option(KrADagradStar), -3)
    yield Candidate("IFShampoo", single, "own", _option(IFShampoo), -2.5)
    yield Candidate("SpectralKron", single, "own", _option(SpectralKron), -3)
    yield Candidate("Adam", single, "own", _option(torch.optim.Adam), -2)
    yield Candidate("SGD", single, "own", _option(torch.optim.SGD), -5)


# --- Runs ---------------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    spectrum: str
    candidate: Candidate
    lr: float
    loss: list[float] = field(default_factory=list)  # after so many steps; ends early where it diverges, with an infinity

    @property
    def name(self) -> tuple[str, str, str, str]:
        return self.spectrum, self.candidate.name, self.candidate.dtype_name, self.candidate.update


def descend(task: Problem, candidate: Candidate, lr: float, steps: int) -> list[float]:
    """The loss before each step, and at the end."""
    x = Parameter(task.start.to(candidate.dtype, copy=True))
    optimizer, loss = candidate.build([x], lr), [task.loss(x)]
    for _ in range(steps):
        x.grad = task.gradient(x)
        optimizer.step()
        loss.append(task.loss(x))
        if not loss[-1] <= DIVERGED * loss[0]:
            return [*loss[:-1], math.inf]
    return loss


def sweep(seed: int, steps: int) -> Iterator[list[Run]]:
    """The runs of each candidate on each spectrum, the best first."""
    for spectrum in SPECTRA:
        task = problem(spectrum, seed, SIZE)
        for candidate in candidates():
            runs = [Run(spectrum, candidate, lr, descend(task, candidate, lr, steps)) for lr in candidate.rates()]
            yield sorted(runs, key=lambda run: run.loss[-1])


def summary(best: list[Run]) -> str:
    rows = [["optimizer", "dtype", "update"]]
    for spectrum in SPECTRA:
        rows[0] += [f"{spectrum}: loss", "lr"]
    for candidate in dict.fromkeys(run.name[1:] for run in best):
        cells = [(f"{run.loss[-1]:.3g}", f"{run.lr:.1e}") for run in best if run.name[1:] == candidate]
        rows.append([*candidate, *(cell for pair in cells for cell in pair)])
    starts = ", ".join(f"{spectrum}: {next(r.loss[0] for r in best if r.spectrum == spectrum):.3g}" for spectrum in SPECTRA)
    return "\n".join([output.table(rows), f"loss at the start: {starts}", "", *claims(best)])


def claims(best: list[Run]) -> Iterator[str]:
    """The paper's claim: in single precision KrADagrad* ends below Shampoo."""
    final = {run.name: run.loss[-1] for run in best}
    for spectrum in SPECTRA:
        for update in ("plain", "grafted"):
            ours = final[spectrum, KRADAGRAD, "fp32", update]
            for eps in EPSILONS:
                single, double = (final[spectrum, shampoo(eps), dtype, update] for dtype in ("fp32", "fp64"))
                word = "below" if ours < single else "NOT below"
                yield (
                    f"{spectrum}, {update}: KrADagrad* fp32 ends at {ours:.3g}, {word} Shampoo fp32 of eps {eps:.0e} "
                    f"at {single:.3g} (fp64: {double:.3g})"
                )


def write_rows(path: Path, results: list[list[Run]], source: dict[str, str]) -> None:
    """The curve of each candidate's best run, and the ends of the others."""
    rows = []
    for best, *others in results:
        last = len(best.loss) - 1
        kept = [(best, step) for step in range(len(best.loss)) if step % RECORD == 0 or step == last]
        kept += [(run, len(run.loss) - 1) for run in others]
        rows += [
            [*run.name, f"{run.lr:.3g}", run is best, step, f"{run.loss[step]:.4g}", *source.values()] for run, step in kept
        ]
    header = ["spectrum", "optimizer", "dtype", "update", "learning_rate", "best", "step", "loss", *source]
    output.write_csv(path, header, rows)


def plot(path: Path, best: list[Run], title: str) -> None:
    """Loss against steps, a row of panels for each spectrum; a colour for each optimizer, dashed in float64."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    updates, names = (list(dict.fromkeys(run.name[i] for run in best)) for i in (3, 1))
    figure = Figure(figsize=(5 * len(updates), 4.2 * len(SPECTRA)), layout="constrained")
    panels = figure.subplots(len(SPECTRA), len(updates), sharex=True, sharey="row", squeeze=False)
    handles: dict[str, Any] = {}
    for run in best:
        spectrum, name, dtype, update = run.name
        panel = panels[list(SPECTRA).index(spectrum)][updates.index(update)]
        style: dict[str, Any] = {"color": colormaps["tab20"](names.index(name)), "linestyle": "-" if dtype == "fp32" else "--"}
        (handles[f"{name}, {dtype}"],) = panel.plot(run.loss, linewidth=1.4, **style)
        panel.set(yscale="log", title=f"{spectrum} spectrum, {update}")
        panel.grid(alpha=0.3)
    for row in panels:
        row[0].set_ylabel("loss")
    for panel in panels[-1]:
        panel.set_xlabel("steps")
    figure.legend(list(handles.values()), list(handles), loc="outside right center", frameon=False, fontsize=8)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m spectral_ops.bench quadratic", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help=f"default: {STEPS}")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    parser.add_argument("--threads", type=int, metavar="N", help="default: 1")
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="for the CSV and the PNG; default: out")
    options = parser.parse_args(argv)
    if options.steps < 1:
        parser.error(f"--steps must be at least 1, got {options.steps}")
    configure("cpu", options.threads)
    results = []
    for runs in sweep(options.seed, options.steps):
        spectrum, *name = runs[0].name
        print(f"{spectrum}, {' '.join(name)}: {', '.join(f'{r.loss[-1]:.3g} at {r.lr:.1e}' for r in runs[:3])}", flush=True)
        results.append(runs)
    best = [runs[0] for runs in results]
    source = output.provenance("cpu") | {"seed": str(options.seed), "command": output.command("quadratic", argv)}
    print(f"\n{summary(best)}\n\n{output.describe(source)}")
    write_rows(options.out / "quadratic.csv", results, source)
    print(options.out / "quadratic.csv")
    try:
        plot(
            options.out / "quadratic.png",
            best,
            f"tr(XᵀAXB), {SIZE} × {SIZE}, condition {CONDITION:.0e}; {output.describe(source)}",
        )
        print(options.out / "quadratic.png")
    except ModuleNotFoundError as error:
        print(f"no PNG: {error.name} is not installed (pip install 'spectral-ops[bench]')")
