"""Time one optimizer step of every method on the same matrices, interleaved in one process, with its state and its correctness.

python -m spectral_ops.bench steps --setting "text,ViT-B block"
"""

import argparse
import copy
import math
import random
import statistics
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spectral_ops._library import without_kernels
from spectral_ops.bench import output
from spectral_ops.bench.methods import left_out, method
from spectral_ops.bench.model import LanguageModel
from spectral_ops.bench.tasks import Text, loss
from spectral_ops.bench.training import Run, configure, state_bytes

LR = 1e-3
GRADIENTS = 3  # different ones, which every candidate steps through
WARMUP = 10  # steps, also those in which an interval does not count yet
WARM_SECONDS = 4.0  # after which a warm-up of two steps is enough
TIMING_SECONDS = 0.05  # that one timing takes at least
GATE_STEPS = 3
MICROBATCH = 8  # sequences of 1024 tokens


@dataclass(frozen=True)
class Candidate:
    """An optimizer as it is timed: a method of `methods.BUILDERS` with options."""

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    period: int = 1  # steps in one timing, so that each holds as many updates of the factors as any other
    hooks: bool = False  # computes in the backward pass, which is timed with it
    compiled: bool = False
    plain: bool = False  # without the package's kernels
    low: bool = False  # computes in bfloat16, whatever its options

    def build(self, model: nn.Module, **changed: Any) -> list[torch.optim.Optimizer]:
        return method(self.method, **({"lr": LR, "rest_lr": LR} | self.options | changed)).build(model)


BF16 = {"preconditioner_dtype": torch.bfloat16}
CANDIDATES = {
    "SpectralKron": Candidate("spectral_kron"),
    "SpectralKron, interval 2": Candidate("spectral_kron", {"update_interval": 2}, period=2),
    "SpectralKron, interval 10": Candidate("spectral_kron", {"update_interval": 10}, period=10),
    "SpectralKron, bf16 factors": Candidate("spectral_kron", BF16),
    "SpectralKron, bf16 factors, interval 2": Candidate("spectral_kron", BF16 | {"update_interval": 2}, period=2),
    "SpectralKron, bf16 factors, interval 10": Candidate("spectral_kron", BF16 | {"update_interval": 10}, period=10),
    "SpectralKron, without kernels": Candidate("spectral_kron", BF16, plain=True),
    "IFShampoo": Candidate("if_shampoo"),
    "IFShampoo, bf16 factors": Candidate("if_shampoo", BF16),
    "RFShampoo": Candidate("rf_shampoo"),
    "RFRMSprop": Candidate("rf_rmsprop"),
    "KrADagrad": Candidate("kradagrad"),
    "KrADagradStar": Candidate("kradagrad_star"),
    "AdamW": Candidate("adamw"),
    "Muon": Candidate("muon"),
    "Muon, compiled": Candidate("muon", compiled=True),
    "SOAP": Candidate("soap"),
    "SOAP, interval 2": Candidate("soap", {"precondition_frequency": 2}, period=2),
    "SOAP, interval 10": Candidate("soap", {"precondition_frequency": 10}, period=10),
    "SOAP (heavyball)": Candidate("soap_heavyball"),
    "Shampoo": Candidate("shampoo"),
    "Shampoo, interval 2": Candidate("shampoo", {"preconditioning_compute_steps": 2}, period=2),
    "PSGD-Kron": Candidate("psgd_kron"),
    "PSGD-Kron (heavyball)": Candidate("psgd_kron_heavyball"),
    "SIRFShampoo": Candidate("sirfshampoo"),
    "SOAP, tracked": Candidate("soap_tracked"),
    "Muon on gram": Candidate("muon_gram", low=True),
    "KL-Shampoo": Candidate("kl_shampoo"),
    "SINGD": Candidate("singd", {"T": 1}, hooks=True),
    "SINGD, interval 10": Candidate("singd", {"T": 10}, period=10, hooks=True),
}
REFERENCES = ("SOAP", "Muon", "AdamW")  # that the printed table compares with


@dataclass(frozen=True)
class Setting:
    """Matrices to step: those of `layers` layers of these shapes, or, without shapes, the small language model on its text."""

    name: str
    candidates: Sequence[str]
    rounds: int
    width: int
    layers: int
    shapes: tuple[tuple[int, int], ...] = ()
    tokens: int = 0  # of a training step, for the time of a model of this width and depth
    preset: str = ""


def block(width: int) -> tuple[tuple[int, int], ...]:
    """The matrices of a transformer's layer."""
    return *[(width, width)] * 4, (4 * width, width), (width, 4 * width)


def llama(width: int, keys: int, hidden: int) -> tuple[tuple[int, int], ...]:
    return (width, width), *[(keys, width)] * 2, (width, width), *[(hidden, width)] * 2, (width, hidden)


BASIC = ("SpectralKron", "SOAP", "Muon", "AdamW")
ON_CPU = (
    "SpectralKron", "SpectralKron, interval 2", "SpectralKron, interval 10", "SpectralKron, bf16 factors", "IFShampoo",
    "RFShampoo", "RFRMSprop", "KrADagrad", "KrADagradStar", "AdamW", "Muon",
    "SOAP", "SOAP, interval 10", "SOAP (heavyball)", "Shampoo", "PSGD-Kron", "PSGD-Kron (heavyball)", "SIRFShampoo",
    "SINGD", "SINGD, interval 10",
)  # fmt: skip
REUSE = ("SOAP, tracked", "SOAP", "SOAP, interval 10", "Muon on gram", "Muon", "KL-Shampoo", "Shampoo", "SpectralKron", "AdamW")
ON_GPU = (
    "SpectralKron", "SpectralKron, bf16 factors", "SpectralKron, bf16 factors, interval 2",
    "SpectralKron, bf16 factors, interval 10", "SpectralKron, without kernels", "IFShampoo", "IFShampoo, bf16 factors",
    "RFRMSprop", "AdamW", "Muon",
)  # fmt: skip
PEERS_ON_GPU = ("Muon, compiled", "SOAP, interval 2", "SOAP", "PSGD-Kron", "Shampoo, interval 2")
SETTINGS = {
    "cpu": [
        Setting("text", ON_CPU, rounds=20, width=96, layers=3, preset="default"),
        Setting("reuse", REUSE, rounds=20, width=96, layers=3, preset="default"),
        Setting("ViT-B block", BASIC, rounds=5, width=768, layers=1, shapes=block(768)),
        *(Setting("width", BASIC, rounds=8, width=w, layers=1, shapes=block(w)) for w in (64, 128, 256, 384)),
        *(Setting("depth", BASIC, rounds=8, width=96, layers=n, shapes=block(96)) for n in (1, 3, 6, 12)),
    ],
    "cuda": [
        Setting("GPT-2 medium", ON_GPU, rounds=8, width=1024, layers=24, shapes=block(1024), tokens=2**19),
        Setting("ViT-B, 2 of 12 layers", (*ON_GPU, *PEERS_ON_GPU), rounds=6, width=768, layers=2, shapes=block(768)),
        Setting("Llama-1B, 4 of 16 layers", ON_GPU, rounds=6, width=2048, layers=4, shapes=llama(2048, 512, 8192)),
        *(Setting("width", ON_GPU, rounds=6, width=w, layers=4, shapes=block(w)) for w in (256, 512, 2048)),
        *(Setting("depth", ON_GPU, rounds=6, width=768, layers=n, shapes=block(768)) for n in (4, 12, 24)),
    ],
}  # fmt: skip


@dataclass(frozen=True)
class Timing:
    """A row of the results: milliseconds of a step, and of the model's forward and backward pass, where that was timed."""

    setting: str
    optimizer: str
    package: str
    p20_ms: float
    p50_ms: float
    p80_ms: float
    rounds: int
    model_ms: float | None
    state_bytes: int
    parameters: int
    width: int
    layers: int
    gate: str


# --- What is stepped ----------------------------------------------------------------------------------------------------


class Matrices(nn.Module):
    """Linear layers by name, of some shapes, so often."""

    def __init__(self, shapes: Iterable[tuple[int, int]], layers: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList(nn.Linear(m, n, bias=False) for n, m in shapes) for _ in range(layers))


def problem(setting: Setting, task: Text | None, device: str) -> tuple[nn.Module, list[list[Tensor]]]:
    """A model and gradients of it: real ones of a task, random ones of mere matrices."""
    torch.manual_seed(0)
    if task is None:
        with torch.device(device):
            model = Matrices(setting.shapes, setting.layers)
        return model, [[torch.randn_like(p) for p in model.parameters()] for _ in range(GRADIENTS)]
    gradients: list[list[Tensor]] = []

    def keep(optimizer: torch.optim.Optimizer, *_: object) -> None:
        gradients.append([p.grad.clone() for p in run.model.parameters() if p.grad is not None])

    run = Run(task, method("adamw", lr=LR, rest_lr=LR), steps=GRADIENTS, evaluations=1)
    run.optimizers[0].register_step_pre_hook(keep)
    for _ in run:
        pass
    return run.model, gradients


class Stepping:
    """A candidate on a model of its own, stepping through gradients that all candidates share."""

    def __init__(self, candidate: Candidate, model: nn.Module, gradients: list[list[Tensor]], task: Text | None):
        self.candidate, self.model, self.gradients, self.task = candidate, model, gradients, task
        self.passing = Passing(copy.deepcopy(model), task) if task and candidate.hooks else None
        self.count = candidate.period
        self.parameters = list(model.parameters())
        self.optimizers = candidate.build(model)
        self.calls = [torch.compile(o.step) if candidate.compiled else o.step for o in self.optimizers]
        self.generator = torch.Generator().manual_seed(0)
        self.steps = 0
        self.seconds: list[float] = []

    def step(self) -> float:
        """Seconds of an optimizer step; of one that computes in the backward pass: with the forward and the backward pass."""
        start = 0.0
        if self.candidate.hooks:
            assert self.task is not None
            start = clock(self.parameters[0].device)
            model_pass(self.model, self.task, self.generator)
        else:
            # A copy, so that the optimizer cannot change them.
            for p, gradient in zip(self.parameters, self.gradients[self.steps % len(self.gradients)], strict=True):
                p.grad = gradient.clone()
            start = clock(self.parameters[0].device)
        with without_kernels() if self.candidate.plain else nullcontext():
            for call in self.calls:
                call()
        self.steps += 1
        return clock(self.parameters[0].device) - start

    def warm_up(self) -> None:
        """Also finds how many steps a timing takes: whole periods, and more of fast ones."""
        seconds: list[float] = []
        for done in range(WARMUP):
            if done < 2 or sum(seconds) < WARM_SECONDS:
                seconds.append(self.step())
        period = self.candidate.period
        self.count = period * max(1, math.ceil(TIMING_SECONDS / (period * min(seconds))))

    def time(self) -> None:
        beside = 0.0
        if self.candidate.hooks:  # without its hooks, right before it: what is left is a small difference
            assert self.passing is not None
            beside = self.passing.passes(self.count)
        self.seconds.append((sum(self.step() for _ in range(self.count)) - beside) / self.count)

    @property
    def package(self) -> str:
        name = type(self.optimizers[0]).__module__.partition(".")[0]
        return name if name == "spectral_ops" else f"{name} {output.installed(name)}"


class Passing:
    """The forward and backward pass, timed among the optimizers."""

    def __init__(self, model: nn.Module, task: Text):
        self.model, self.task = model, task
        self.generator = torch.Generator().manual_seed(0)
        self.seconds: list[float] = []

    def passes(self, count: int) -> float:
        """Seconds of so many."""
        device = next(self.model.parameters()).device
        start = clock(device)
        for _ in range(count):
            model_pass(self.model, self.task, self.generator)
        return clock(device) - start

    def time(self) -> None:
        self.seconds.append(self.passes(1))


def model_pass(model: nn.Module, task: Text, generator: torch.Generator) -> None:
    model.zero_grad()
    loss(model, task.batch(generator)).backward()


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# --- Correctness --------------------------------------------------------------------------------------------------------


def gate(candidate: Candidate, shape: tuple[int, int], device: str) -> str:
    """Whether the first steps on a matrix of this shape are those of float64, in plain PyTorch: "passed", or why not."""
    generator = torch.Generator().manual_seed(1)
    start = 0.02 * torch.randn(shape, generator=generator, dtype=torch.float64)
    gradients = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(GATE_STEPS)]
    moves = []
    exact = {"preconditioner_dtype": None} if "preconditioner_dtype" in candidate.options else {}
    for dtype, changed in ((torch.float32, {}), (torch.float64, exact)):
        model = Matrices([shape], 1).to(device, dtype)
        (p,) = model.parameters()
        with torch.no_grad():
            p.copy_(start)
        optimizers = candidate.build(model, **changed)
        with without_kernels() if candidate.plain else nullcontext():
            for gradient in gradients:
                p.grad = gradient.to(device, dtype)
                for optimizer in optimizers:
                    optimizer.step()
        moves.append(p.detach().double().cpu() - start.to(dtype).double())
    error = float(torch.linalg.vector_norm(moves[0] - moves[1]) / torch.linalg.vector_norm(moves[1]))
    bound = BOUNDS[torch.bfloat16 if candidate.low else candidate.options.get("preconditioner_dtype", torch.float32)]
    return "passed" if error <= bound else f"failed: error {error:.1e} over {bound:.0e}"


BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 0.03}  # of the relative error of three steps together, by the factors' dtype


# --- Measuring ----------------------------------------------------------------------------------------------------------


def measure(setting: Setting, device: str, rounds: int | None = None, deadline: float = math.inf) -> list[Timing]:
    """Each round times each candidate once, in an order of its own, so that load hits all alike."""
    task = None if setting.shapes else Text(setting.preset, device=device)
    model, gradients = problem(setting, task, device)
    entries: dict[str, Stepping] = {}
    for name in setting.candidates:
        try:
            entry = Stepping(CANDIDATES[name], copy.deepcopy(model), gradients, task)
        except ModuleNotFoundError as error:
            print(left_out(name, error))
            continue
        entry.warm_up()
        entries[name] = entry
    passing = Passing(copy.deepcopy(model), task) if task else None
    order: list[Stepping | Passing] = [*entries.values(), *([passing] if passing else [])]
    shuffle = random.Random(0).shuffle
    for done in range(rounds or setting.rounds):
        if time.time() > deadline and done >= 2:
            break
        shuffle(order)
        for item in order:
            item.time()
    model_seconds = statistics.median(passing.seconds) if passing else training_step_seconds(setting, device)
    parameters = sum(p.numel() for p in model.parameters())
    largest = max(setting.shapes, key=math.prod, default=(4 * setting.width, setting.width))
    return [_timing(setting, name, entry, model_seconds, parameters, largest, device) for name, entry in entries.items()]


def _timing(
    setting: Setting, name: str, entry: Stepping, model: float | None, parameters: int, shape: tuple[int, int], device: str
) -> Timing:
    p20, p50, p80 = (1e3 * x for x in output.percentiles(entry.seconds))
    ours = entry.package == "spectral_ops"
    return Timing(
        setting.name, name, entry.package, p20, p50, p80, len(entry.seconds), None if model is None else 1e3 * model,
        sum(map(state_bytes, entry.optimizers)), parameters, setting.width, setting.layers,
        gate(entry.candidate, shape, device) if ours else "",
    )  # fmt: skip


def training_step_seconds(setting: Setting, device: str) -> float | None:
    """Forward and backward of a language model of the setting's size, by microbatches in bf16; None where it has no size."""
    if not setting.tokens:
        return None
    with torch.device(device):
        model = LanguageModel(setting.width, setting.layers, setting.width // 64, 1024, 50257)
    tokens = torch.randint(50257, (MICROBATCH, 1025), device=device)
    seconds = []
    for _ in range(6):
        start = clock(tokens.device)
        with torch.autocast(device, torch.bfloat16):
            logits = model(tokens[:, :-1])
            value = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        value.backward()
        seconds.append(clock(tokens.device) - start)
    return statistics.median(seconds[1:]) * setting.tokens / (MICROBATCH * 1024)


# --- What is written ----------------------------------------------------------------------------------------------------


def table(rows: Sequence[Timing]) -> str:
    """The rows of one setting against the references."""
    found = {row.optimizer: row.p50_ms for row in rows}
    known = [name for name in REFERENCES if name in found]
    first = rows[0]
    lines = [[f"{first.setting}: {first.layers} of width {first.width}", "median ms", "p20", "p80"]]
    lines[0] += [*(f"vs {name}" for name in known), "bytes/param", "of a training step", "gate"]
    for r in rows:
        refused = r.gate not in ("", "passed")
        ratios = ["refused" if refused else f"{r.p50_ms / found[name]:.2f}" for name in known]
        share = "-" if r.model_ms is None else f"{r.p50_ms / (r.p50_ms + r.model_ms):.1%}"
        figures = [f"{x:.2f}" for x in (r.p50_ms, r.p20_ms, r.p80_ms)]
        lines.append([r.optimizer, *figures, *ratios, f"{r.state_bytes / r.parameters:.1f}", share, r.gate or "-"])
    return output.table(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m spectral_ops.bench steps", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=SETTINGS, default="cpu", help="default: cpu")
    names = {device: list(dict.fromkeys(s.name for s in settings)) for device, settings in SETTINGS.items()}
    parser.add_argument(
        "--setting", type=lambda text: text.split(","), metavar="LIST",
        help="default: all. " + "; ".join(f"{device}: {', '.join(found)}" for device, found in names.items()),
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, metavar="N", help="default: the setting's")
    parser.add_argument("--threads", type=int, metavar="N", help="default on a CPU: 1")
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="for the CSV; default: out")
    options = parser.parse_args(argv)
    if options.rounds is not None and options.rounds < 2:
        parser.error(f"--rounds must be at least 2, got {options.rounds}")
    wanted = options.setting or names[options.device]
    if unknown := [name for name in wanted if name not in names[options.device]]:
        parser.error(f"no setting is called {unknown[0]!r}; there are {', '.join(names[options.device])}")
    try:
        configure(options.device, options.threads)
    except ValueError as error:
        parser.error(str(error))

    source = output.provenance(options.device) | {"command": output.command("steps", argv)}
    timings: list[Timing] = []
    for setting in SETTINGS[options.device]:
        if setting.name in wanted:
            measured = measure(setting, options.device, options.rounds)
            timings += measured
            print(f"{table(measured)}\n", flush=True)
    path = options.out / f"steps-{options.device}.csv"
    output.write_rows(path, timings, source)
    print(f"{output.describe(source)}\n{path}")
