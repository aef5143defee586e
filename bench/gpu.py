"""Everything that only a GPU can answer, in one command of at most nine minutes: correctness, timings, the tiles' table.

make gpu
"""

import argparse
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby, product
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spectral_ops import reference
from spectral_ops.bench import kernels, output, steps, tune
from spectral_ops.bench.aot import choices
from spectral_ops.bench.cases import CASES, OPERANDS, Arguments, Case, Results, fresh, judge, restore
from spectral_ops.bench.optimizers import OPTIMIZERS, Build
from spectral_ops.kernels import rounding, update

SHAPES = (
    (1, 1, 1), (2, 7, 3), (7, 2, 3), (16, 33, 3), (33, 16, 2), (64, 64, 3), (64, 100, 1), (100, 64, 3), (128, 250, 2),
    (250, 128, 1), (512, 512, 2), (512, 1000, 1), (1000, 512, 1), (1024, 1024, 2), (2048, 1024, 1), (4096, 4096, 1),
    (8192, 8192, 1),
)  # fmt: skip
LARGE, LARGE_OPS = 8192, ("gram", "gram_skew", "rotate")  # at this size only these, in their first operands
BITS_SHAPES = ((250, 128, 3), (1024, 768, 2))
REPEATS = 100
ROUNDED = (3, 256, 512)  # the shape of all numbers that are rounded
WORKERS = 12
CAPTURED = ((64, 48), (64, 48), (48, 64), (3, 32, 48), (33, 7), (48,), ())  # parameters of the captured steps
CHECKING = ("correctness", "rounding", "same bits", "captured steps")  # sections whose failure is a failed check
PRINTED = 12_000  # characters of the summary


Capture = Callable[[Callable[[], Any]], Callable[[], None]]  # takes what is captured, returns what replays it


@dataclass(frozen=True)
class Check:
    """One result of one operation; `verdict` says what is wrong, and is empty where nothing is."""

    kind: str
    op: str
    operands: str
    n: int
    m: int
    batch: int
    result: str
    error: float
    eager: float
    bound: float
    verdict: str


@dataclass
class Findings:
    """What the sections leave behind; the table of tiles goes to `out` itself."""

    out: Path = Path("out")
    checks: list[Check] = field(default_factory=list)
    timings: list[kernels.Timing] = field(default_factory=list)
    stepped: list[steps.Timing] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


# --- Correctness --------------------------------------------------------------------------------------------------------


def check_case(op: str, operands: str, shapes: Iterable[tuple[int, int, int]], device: str, deadline: float) -> list[Check]:
    """An operation against float64, its outputs poisoned beforehand."""
    case, kind, checks = CASES[op], OPERANDS[operands], []
    for shape in shapes:
        row = partial(Check, "float64", op, operands, *shape)
        if time.time() > deadline:
            checks.append(row("", 0, 0, 0, "not run"))
            continue
        try:
            with kind.setting(), torch.no_grad():
                checks += [row(*found) for found in judge(case, case.run, case.arguments(*shape, kind, device), kind)]
        except Exception as error:  # the other shapes still count
            checks.append(row("", float("nan"), 0, 0, f"{type(error).__name__}: {str(error)[:300]}"))
        if device == "cuda":
            torch.cuda.empty_cache()
    return checks


def shapes_of(op: str, operands: str) -> list[tuple[int, int, int]]:
    large = op in LARGE_OPS and operands == CASES[op].operands[0]
    return [shape for shape in SHAPES if max(shape) < LARGE or large]


def _check_job(job: tuple[str, str, float]) -> list[Check]:
    op, operands, deadline = job
    return check_case(op, operands, shapes_of(op, operands), "cuda", deadline)


def correctness(found: Findings, deadline: float) -> None:
    """From many processes, since most of the time goes into compiling; a process that is lost loses one job."""
    jobs = [(op, operands, deadline) for operands in OPERANDS for op in CASES if operands in CASES[op].operands]
    with multiprocessing.get_context("spawn").Pool(WORKERS, maxtasksperchild=1) as pool:
        waiting = [(job, pool.apply_async(_check_job, (job,))) for job in jobs]
        for (op, operands, _), result in waiting:
            try:
                found.checks += result.get(max(1.0, deadline + 30 - time.time()))
            except multiprocessing.TimeoutError:
                found.checks.append(Check("float64", op, operands, 0, 0, 0, "", 0, 0, 0, "no answer: hung or lost"))


# --- Bits ---------------------------------------------------------------------------------------------------------------


def every_bfloat16(device: str) -> Tensor:
    """Float32 numbers at, just beside and halfway between all bfloat16 ones, with infinities and NaN."""
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    high = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    return (high[:, None] | low).flatten().view(torch.float32).to(device)


def raw(x: Tensor) -> Tensor:
    return x.contiguous().flatten().view(torch.uint8)


def same(x: Tensor, y: Tensor) -> bool:
    """Bit for bit."""
    return x.dtype == y.dtype and torch.equal(raw(x), raw(y))


def same_or_nan(x: Tensor, y: Tensor) -> bool:
    """Bit for bit, but for what kind of NaN."""
    return torch.equal(x.isnan(), y.isnan()) and same(x.masked_fill(x.isnan(), 0), y.masked_fill(y.isnan(), 0))


def roundings(found: Findings, device: str) -> None:
    """Both roundings to bfloat16, to the bit, for every bfloat16 and its neighbourhood."""
    x = every_bfloat16(device)
    row = partial(Check, operands="fp32", n=1, m=x.numel(), batch=1, result="", error=0, eager=0, bound=0)
    buffer, all_finite = (
        torch.zeros((1, 1, x.numel()), dtype=torch.bfloat16, device=device),
        torch.ones(1, device=device).bool(),
    )
    update.momentum(buffer, x, all_finite, 0.0, False, False)  # 0 + (x − 0), stored
    verdict = "" if same_or_nan(buffer.flatten(), (x.cpu() + 0.0).bfloat16().to(device)) else "not to nearest even"
    found.checks.append(row("rounding", "nearest", verdict=verdict))
    matrices, seeds = x.view(ROUNDED), torch.tensor([1, 2**62 + 5, -7], device=device)
    wanted = reference.stochastic_round(matrices.cpu(), seeds.cpu()).to(device)
    verdict = "" if same_or_nan(rounding.stochastic_round(matrices, seeds), wanted) else "other bits than the reference"
    found.checks.append(row("rounding", "stochastic", verdict=verdict))


def differing(first: Results, second: Results) -> str:
    """The results that are not the same bits."""
    return ", ".join(name for name, x in first.items() if not same(x, second[name]))


def cuda_graph(run: Callable[[], Any]) -> Callable[[], None]:
    """Capture what `run` launches, without doing it; the result does it."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def repeated(case: Case, arguments: Arguments) -> str:
    first = case.run(fresh(arguments))
    moved = {differing(first, case.run(fresh(arguments))) for _ in range(REPEATS)} - {""}
    return f"moves: {'; '.join(sorted(moved))}" if moved else ""


def replayed(case: Case, arguments: Arguments) -> str:
    first, static = case.run(fresh(arguments)), fresh(arguments)
    case.run(static)  # finds the tensors; what it changed of them is put back
    restore(static, arguments)
    results: Results = {}
    replay = cuda_graph(lambda: results.update(case.run(static)))
    replay()
    torch.cuda.synchronize()
    other = differing(first, results)
    return f"differs in a graph: {other}" if other else ""


def bits(found: Findings, deadline: float, device: str = "cuda", shapes: Sequence[tuple[int, int, int]] = BITS_SHAPES) -> None:
    """A CUDA graph gives the same bits as a launch, and a launch the same ones every time: a moving error is a race."""
    for shape, (op, case) in product(shapes, CASES.items()):
        for operands in case.operands[:2]:
            if time.time() > deadline:
                found.notes.append(f"bits: no time was left from {op} {operands} {shape} on")
                return
            row = partial(Check, op=op, operands=operands, n=shape[0], m=shape[1], batch=shape[2])
            row = partial(row, result="", error=0, eager=0, bound=0)
            kind = OPERANDS[operands]
            with kind.setting(), torch.no_grad():
                arguments = case.arguments(*shape, kind, device)
                found.checks.append(row("repeat", verdict=guarded(repeated, case, arguments)))
                if device == "cuda":
                    found.checks.append(row("graph", verdict=guarded(replayed, case, arguments)))


def guarded(check: Callable[..., str], *arguments: Any) -> str:
    """What is wrong, also where that is an exception."""
    try:
        return check(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:300]}"


# --- Captured steps -----------------------------------------------------------------------------------------------------


def captured_steps(found: Findings, deadline: float, device: str = "cuda", capture: Capture = cuda_graph) -> None:
    """Steps that a CUDA graph replays against steps that Python makes, bit for bit."""
    for (name, build), dtype in product(OPTIMIZERS.items(), (torch.float32, torch.bfloat16)):
        row = partial(Check, "graph", f"step of {name}", str(dtype).removeprefix("torch."), 0, 0, 0, "", 0, 0, 0)
        if time.time() > deadline:
            found.checks.append(row("not run"))
            continue
        found.checks.append(row(guarded(replayed_steps, build, dtype, device, capture)))


def replayed_steps(build: Build, dtype: torch.dtype, device: str, capture: Capture) -> str:
    """What of an optimizer's parameters and state differs. The gradients of the capture are others than before it; one of them
    has a NaN in one of the steps."""
    generator = torch.Generator().manual_seed(0)

    def numbers() -> list[Tensor]:
        return [torch.randn(shape, generator=generator).to(device, dtype) for shape in CAPTURED]

    values = numbers()
    replaying, plain = ([nn.Parameter(x.clone()) for x in values] for _ in range(2))
    options = {"capturable": True, "update_interval": 1, "weight_decay": 0.1}
    optimizers = [build(params, lr=torch.tensor(0.01, device=device), **options) for params in (replaying, plain)]

    def step_plain(gradients: list[Tensor]) -> None:
        for p, g in zip(plain, gradients, strict=True):
            p.grad = g.clone()
        optimizers[1].step()

    for _ in range(2):
        gradients = numbers()
        for p, g in zip(replaying, gradients, strict=True):
            p.grad = g.clone()
        optimizers[0].step()
        step_plain(gradients)
    for p in replaying:
        p.grad = torch.zeros_like(p)
    replay = capture(optimizers[0].step)
    for step in range(5):
        gradients = numbers()
        if step == 2:
            gradients[0].view(-1)[3] = float("nan")
        for p, g in zip(replaying, gradients, strict=True):
            p.grad.copy_(g)  # type: ignore[union-attr]
        replay()
        step_plain(gradients)
    first, second = ({f"{i}.{name}": x for i, p in enumerate(params) for name, x in {"value": p.detach(), **o.state[p]}.items()}
                     for params, o in zip((replaying, plain), optimizers, strict=True))  # fmt: skip
    if optimizers[0].skipped_steps() != 1:
        return f"skipped {optimizers[0].skipped_steps().item()} steps, not 1"
    other = differing(first, second)
    return f"differs in a graph: {other}" if other else ""


# --- The command --------------------------------------------------------------------------------------------------------


def benchmarks(found: Findings, deadline: float) -> None:
    rows, notes = kernels.benchmark(CASES, "cuda", deadline)
    found.timings += rows
    found.notes += notes


def optimizer_steps(found: Findings, deadline: float, settings: Sequence[steps.Setting] = (), device: str = "cuda") -> None:
    """Setting by setting, as far as the time lasts."""
    for setting in settings or steps.SETTINGS[device]:
        if time.time() > deadline:
            found.notes.append(f"no time was left for the steps of {setting.name}, {setting.layers} of {setting.width}")
            continue
        found.stepped += steps.measure(setting, device, deadline=deadline)
        torch.cuda.empty_cache()


def tuning(found: Findings, deadline: float) -> None:
    """As many of the tiles as there is time for; `tune` alone does them all."""
    measured = tune.search(tune.Timer(tune.kernel_seconds, tune.plain_seconds), tune.jobs(tune.SOURCES), deadline)
    if measured:
        path = tune.write(found.out, measured, kernels.provenance(), "make gpu", torch.cuda.get_device_capability())
        found.notes.append(f"{path}: {len(measured)} measured entries")


Section = tuple[str, float, Callable[[Findings, float], None]]
SECTIONS: list[Section] = [  # and their seconds
    ("correctness", 170, correctness),
    ("rounding", 10, lambda found, deadline: roundings(found, "cuda")),
    ("same bits", 40, bits),
    ("captured steps", 30, captured_steps),
    ("kernels", 120, benchmarks),
    ("optimizer steps", 100, optimizer_steps),
    ("tiles", 50, tuning),
]


def planned(names: Sequence[str]) -> list[Section]:
    """The sections of these names; fewer of them have more time each."""
    chosen = [section for section in SECTIONS if section[0] in names]
    more = sum(seconds for _, seconds, _ in SECTIONS) / sum(seconds for _, seconds, _ in chosen)
    return [(name, more * seconds, function) for name, seconds, function in chosen]


def run_sections(
    sections: Iterable[Section],
    found: Findings,
    keep: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.time,
) -> list[str]:
    """Run each section with its seconds and what the ones before it left over; one that fails does not stop the others. After
    each, `keep` what was found so far: the machine may not last. Returns a line about each."""
    end, lines = clock(), []
    for name, budget, function in sections:
        start, end = clock(), end + budget
        try:
            function(found, end)
            lines.append(f"{name}: {clock() - start:.0f} s")
        except Exception as error:
            traceback.print_exc()
            lines.append(f"{name}: {type(error).__name__}: {str(error)[:300]}, after {clock() - start:.0f} s")
            if name in CHECKING:
                found.checks.append(Check("section", name, "", 0, 0, 0, "", 0, 0, 0, f"{type(error).__name__}"))
        keep()
    return lines


def failures(checks: Iterable[Check]) -> list[Check]:
    return [check for check in checks if check.verdict not in ("", "not run")]


def summary(found: Findings, lines: list[str], source: dict[str, str]) -> str:
    """What matters of it all, in at most `PRINTED` characters: where there are more, timings give way, which are in a file."""
    failed = failures(found.checks)
    missing = sum(check.verdict == "not run" for check in found.checks)
    texts = [f"{c.kind} {c.op} {c.operands} {c.n} x {c.m} x {c.batch} {c.result}: {c.verdict}" for c in failed[:30]]
    key = attrgetter("setting", "width", "layers")
    timed = [f"\n{steps.table(list(rows))}" for _, rows in groupby(found.stepped, key)]
    versions = f"{output.describe(source)}, Triton {source['triton']}, driver {source['driver']}"
    count = f"{len(found.checks) - missing} checks, {len(failed)} failed, {missing} not run"
    end = "\n".join([*timed, "", *found.notes[:20], *lines, *texts, versions, count])
    head = kernels.ratios(found.timings).splitlines()
    room = max(0, PRINTED - len(end) - 2)
    kept = [line for i, line in enumerate(head) if sum(len(text) + 1 for text in head[: i + 1]) <= room]
    return "\n".join([*kept, "", end])[-PRINTED:]


def save(found: Findings, source: dict[str, str]) -> None:
    source = source | {"command": "make gpu"}
    output.write_rows(found.out / "checks.csv", found.checks, source)
    output.write_rows(found.out / "kernels-cuda.csv", found.timings, source)
    output.write_rows(found.out / "steps-cuda.csv", found.stepped, source)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m spectral_ops.bench gpu", description=__doc__.splitlines()[0])
    default, names = Path(os.environ.get("OUT") or "out"), [name for name, _, _ in SECTIONS]
    parser.add_argument("--out", type=Path, default=default, metavar="DIR", help=f"for CSV and table; default: {default}")
    parser.add_argument(
        "--sections", type=lambda text: choices(text, names), default=names, metavar="LIST",
        help=f"of {','.join(names)}, which share nine minutes; default: all",
    )  # fmt: skip
    options = parser.parse_args(argv)
    kernels.require_gpu()

    source, found = kernels.provenance(), Findings(options.out)
    lines = run_sections(planned(options.sections), found, lambda: save(found, source))
    print(summary(found, lines, source))
    if failures(found.checks):
        raise SystemExit(1)
