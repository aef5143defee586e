"""Time one optimizer step of each method on the text model, all interleaved in one process.

python -m spectral_ops.bench steps --preset wide --rounds 100
"""

import argparse
import copy
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from spectral_ops.bench import output
from spectral_ops.bench.methods import Method, method
from spectral_ops.bench.tasks import TEXT_PRESETS, Text
from spectral_ops.bench.training import Run, configure

LR = 1e-3
CANDIDATES = {
    "spectral_kron": method("spectral_kron", lr=LR, rest_lr=LR),
    "spectral_kron, bf16 factors": method("spectral_kron", lr=LR, rest_lr=LR, preconditioner_dtype=torch.bfloat16),
    "spectral_kron, interval 2": method("spectral_kron", lr=LR, rest_lr=LR, update_interval=2),
    "soap": method("soap", lr=LR, rest_lr=LR),
    "muon": method("muon", lr=LR, rest_lr=LR),
    "adamw": method("adamw", lr=LR, rest_lr=LR),
}
REFERENCE = "soap"
STATES = 6  # of the model, from which gradients are taken
WARMUP = 10  # also the steps in which an interval does not count yet
STEPS = 2  # in one timing: the longest interval, so that each timing holds a whole period


class Candidate:
    """A method on a model of its own, stepping through gradients that all candidates share."""

    def __init__(self, candidate: Method, model: nn.Module, gradients: list[list[Tensor]]):
        self.parameters = list(model.parameters())
        self.optimizers = candidate.build(model)
        self.gradients = gradients
        self.steps = 0
        self.milliseconds: list[float] = []

    def step(self) -> float:
        """Seconds of one optimizer step. A copy of the gradient is what it gets, so that it cannot change them."""
        for p, gradient in zip(self.parameters, self.gradients[self.steps % len(self.gradients)], strict=True):
            p.grad = gradient.clone()
        self.steps += 1
        start = _clock(self.parameters[0].device)
        for optimizer in self.optimizers:
            optimizer.step()
        return _clock(self.parameters[0].device) - start

    def time(self) -> None:
        self.milliseconds.append(1e3 * sum(self.step() for _ in range(STEPS)) / STEPS)


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def real_gradients(task: Text) -> tuple[nn.Module, list[list[Tensor]]]:
    """A model after some steps of training, and its gradients at that state and the ones before it."""
    gradients: list[list[Tensor]] = []

    def keep(optimizer: torch.optim.Optimizer, *_: object) -> None:
        gradients.append([p.grad.clone() for p in run.model.parameters() if p.grad is not None])

    run = Run(task, CANDIDATES["adamw"], steps=STATES, evaluations=1)
    run.optimizers[0].register_step_pre_hook(keep)
    for _ in run:
        pass
    return run.model, gradients


def prepare(task: Text) -> Iterator[tuple[str, Candidate]]:
    """The candidates that are installed, after their warm-up."""
    model, gradients = real_gradients(task)
    for name, candidate in CANDIDATES.items():
        try:
            ready = Candidate(candidate, copy.deepcopy(model), gradients)
        except ModuleNotFoundError as error:
            print(f"{name} is left out: {error.name} is not installed (pip install 'spectral-ops[bench]')")
            continue
        for _ in range(WARMUP):
            ready.step()
        yield name, ready


def measure(task: Text, rounds: int) -> dict[str, list[float]]:
    """Milliseconds per step. Each round times each candidate once, in an order of its own, so that load hits all alike."""
    candidates = dict(prepare(task))
    order = list(candidates.values())
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for candidate in order:
            candidate.time()
    return {name: candidate.milliseconds for name, candidate in candidates.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m spectral_ops.bench steps", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=TEXT_PRESETS, default="default", help="size of the model; default: default")
    parser.add_argument("--rounds", type=int, default=50, metavar="N", help="default: 50")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu")
    parser.add_argument("--threads", type=int, metavar="N", help="default on a CPU: 1")
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="for the CSV; default: out")
    options = parser.parse_args(argv)
    if options.rounds < 2:
        parser.error(f"--rounds must be at least 2, got {options.rounds}")
    try:
        configure(options.device, options.threads)
    except ValueError as error:
        parser.error(str(error))

    results = measure(Text(options.preset, device=options.device), options.rounds)
    rows = summarize(results)
    print(output.table([[f"one step, {options.preset} model", "median ms", "p20", "p80", f"vs {REFERENCE}"], *rows]))
    source = output.provenance(options.device) | {"preset": options.preset, "rounds": str(options.rounds)}
    print(f"\n{output.describe(source)}")
    path = options.out / f"steps-{options.preset}-{options.device}.csv"
    header = ["candidate", "median_ms", "p20_ms", "p80_ms", f"ratio_to_{REFERENCE}", *source]
    output.write_csv(path, header, [[*row, *source.values()] for row in rows])
    print(path)


def summarize(results: dict[str, list[float]]) -> list[list[str]]:
    """Cells for each candidate: median, 20th and 80th percentile, ratio of medians."""
    reference = statistics.median(results[REFERENCE]) if REFERENCE in results else None
    rows = []
    for name, times in results.items():
        median, fifths = statistics.median(times), statistics.quantiles(times, n=5, method="inclusive")
        ratio = f"{median / reference:.3f}" if reference else "-"
        rows.append([name, f"{median:.3f}", f"{fifths[0]:.3f}", f"{fifths[-1]:.3f}", ratio])
    return rows
