"""Time every operation against the plain PyTorch composition, the same compiled, and what the machine itself reaches.

python -m spectral_ops.bench kernels --op gram,kron_track
"""

import argparse
import math
import multiprocessing
import os
import random
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spectral_ops.bench import output
from spectral_ops.bench.aot import choices
from spectral_ops.bench.cases import CASES, OPERANDS, Arguments, Case, Work, judge
from spectral_ops.bench.training import configure


class Shape(NamedTuple):
    """The weights of a model, or another class of matrices; the batch is the layers that are stepped together."""

    model: str
    n: int
    m: int
    batch: int

    @property
    def size(self) -> tuple[int, int, int]:
        return self.n, self.m, self.batch


VIT, GPT, LLAMA, SMALL, SQUARE = "ViT-B", "GPT-2 medium", "Llama-1B", "small", "square"
# What is timed, the most telling first, as far as the time lasts.
SHAPES = {
    "cuda": (
        Shape(GPT, 1024, 1024, 24), Shape(VIT, 3072, 768, 12), Shape(SMALL, 128, 128, 48), Shape(LLAMA, 2048, 2048, 16),
        Shape(SQUARE, 1024, 1024, 1), Shape(SQUARE, 256, 256, 1), Shape(SQUARE, 4096, 4096, 1), Shape(VIT, 768, 768, 12),
        Shape(LLAMA, 512, 2048, 16), Shape(SMALL, 64, 64, 96), Shape(GPT, 4096, 1024, 24), Shape(SMALL, 256, 256, 48),
        Shape(LLAMA, 8192, 2048, 2), Shape(SQUARE, 2048, 2048, 1), Shape(SQUARE, 1024, 1024, 12),
        Shape(SQUARE, 512, 512, 12), Shape(SQUARE, 2048, 2048, 8), Shape(SQUARE, 8192, 8192, 1),
    ),
    "cpu": (Shape(VIT, 768, 768, 1), Shape(SMALL, 96, 96, 12), Shape(SQUARE, 256, 256, 2)),
}  # fmt: skip
COMPILED = {"cuda": 2, "cpu": 1}  # of the shapes, the first ones: compiling takes seconds for each
OTHER_OPERANDS = 6  # of the shapes, the first ones, with other operands than an operation's first
CACHES = 3  # inputs are this many times the cache, in rotation
CORE_CACHE = 2**21  # bytes, about what a core of a CPU has for itself
SETS = 64  # at most
ROUNDS, WARMUP = 30, 3
SECONDS = {"cuda": 0.4, "cpu": 0.5}  # for one provider and shape
# Numbers in the large copy, and sides of the square products, by operands.
ROOFS = {"cuda": (2**28, {"bf16": 8192, "fp16": 8192, "fp32": 4096, "fp32 medium": 8192}), "cpu": (2**25, {"fp32": 1024})}
WORKERS = 12  # that compile
COMPILE_SECONDS = 45  # that they have


class Job(NamedTuple):
    """What is timed in one go, with `torch.compile` or without."""

    op: str
    shape: Shape
    operands: str
    compiled: bool


@dataclass(frozen=True)
class Timing:
    """One provider of an operation at one shape. Rates count the work that the kernels do, whoever does it."""

    op: str
    provider: str
    model: str
    n: int
    m: int
    batch: int
    operands: str
    p20_us: float
    p50_us: float
    p80_us: float
    tflops: float
    gb_per_s: float
    roof: float  # share of what the machine reached in a plain product or copy
    roof_tflops: float
    roof_gb_per_s: float
    graph: bool  # whether replayed from a CUDA graph
    gate: str  # of ours: "passed" where it agreed with float64, "failed: …" or "not run"


@dataclass(frozen=True)
class Roof:
    """What the machine reaches, measured on the spot: operations a second by operands, and bytes a second of a large copy."""

    flops: Mapping[str, float]
    bytes: float

    def share(self, work: Work, operands: str, seconds: float) -> float:
        return max(work.flops / self.flops[operands], work.bytes / self.bytes) / seconds


def require_gpu() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("This needs an NVIDIA GPU, and PyTorch sees none.")


def provenance() -> dict[str, str]:
    return output.provenance("cuda") | {"driver": _driver()}


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


# --- Timing -------------------------------------------------------------------------------------------------------------


def captured(function: Callable[[], Any]) -> Callable[[], Any] | None:
    """The function as a CUDA graph, after a first call outside; None where it cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            function()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay


def seconds(function: Callable[[], Any]) -> float:
    """Between two events around a call."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return 1e-3 * start.elapsed_time(end)


def host_seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


CLOCKS = {"cuda": seconds, "cpu": host_seconds}


def interleaved(
    functions: Mapping[str, Callable[[], Any]],
    clock: Callable[[Callable[[], Any]], float] = seconds,
    limit: float = SECONDS["cuda"],
    rounds: int = ROUNDS,
) -> dict[str, list[float]]:
    """Times of each function. Every round has an order of its own, so that what else slows the machine hits all alike; there
    are fewer rounds if they would take longer than `limit` for each function."""
    warm = {name: min(clock(function) for _ in range(WARMUP)) for name, function in functions.items()}
    count = max(5, min(rounds, int(limit * len(functions) / max(sum(warm.values()), 1e-9))))
    times: dict[str, list[float]] = {name: [] for name in functions}
    order, shuffle = list(functions), random.Random(0).shuffle
    for _ in range(count):
        shuffle(order)
        for name in order:
            times[name].append(clock(functions[name]))
    return times


def input_sets(job: Job, device: str) -> list[Arguments]:
    """As many different inputs as it takes to leave the cache behind."""
    make = partial(CASES[job.op].arguments, *job.shape.size, OPERANDS[job.operands], device)
    first = make()
    cache = torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else CORE_CACHE
    count = min(SETS, math.ceil(CACHES * cache / max(1, size(first))))
    return [first, *(make(seed) for seed in range(1, count))]


def size(value: Any) -> int:
    """Bytes of all tensors in a value."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(map(size, value.values()))
    return sum(map(size, value)) if isinstance(value, tuple) else 0


def full_product(arguments: Arguments) -> Tensor:
    """What cuBLAS takes for a Gram matrix of which it computes both halves."""
    return arguments["x"] @ arguments["x"].mT


def compiled(case: Case) -> Callable[[Arguments], Any]:
    """The composition by `torch.compile`, for one shape."""
    torch.compiler.reset()  # what was compiled for other shapes counts towards a limit
    return torch.compile(case.eager, dynamic=False)


def ours(case: Case, device: str) -> Callable[[Arguments], Any]:
    """On a GPU the launches alone, elsewhere the public op."""
    return case.run if device == "cuda" else case.op


def providers(job: Job, device: str) -> dict[str, Callable[[Arguments], Any]]:
    case = CASES[job.op]
    found = {"ours": ours(case, device), "eager": case.eager}
    if job.compiled:
        found["compiled"] = compiled(case)
    if job.op == "gram" and device == "cuda":
        found["cublas"] = full_product
    return found


def measure(job: Job, device: str) -> tuple[dict[str, list[float]], set[str]]:
    """Seconds of a call of each provider, and which of them were replayed from a CUDA graph."""
    sets = input_sets(job, device)

    def rotation(provider: Callable[[Arguments], Any]) -> None:
        for arguments in sets:
            provider(arguments)

    functions: dict[str, Callable[[], Any]] = {name: partial(rotation, f) for name, f in providers(job, device).items()}
    graphs = {}
    if device == "cuda":
        graphs = {name: graph for name, function in functions.items() if (graph := captured(function))}
    times = interleaved(functions | graphs, CLOCKS[device], SECONDS[device])
    return {name: [value / len(sets) for value in values] for name, values in times.items()}, set(graphs)


def gate(job: Job, device: str, deadline: float = math.inf) -> str:
    """Whether ours agrees with float64 at this shape, on the first of the inputs that are timed."""
    if time.time() > deadline:
        return "not run"
    case, kind = CASES[job.op], OPERANDS[job.operands]
    try:
        found = judge(case, ours(case, device), case.arguments(*job.shape.size, kind, device), kind)
    except Exception as error:  # the timing still tells something
        return f"failed: {type(error).__name__}: {str(error)[:200]}"
    faults = "; ".join(f"{one.result}: {one.verdict}" for one in found if one.verdict)
    return f"failed: {faults}" if faults else "passed"


def timings(job: Job, roof: Roof, device: str, deadline: float = math.inf) -> list[Timing]:
    """All providers of an operation at one shape."""
    kind = OPERANDS[job.operands]
    with kind.setting(), torch.no_grad():
        times, graphs = measure(job, device)
        passed = gate(job, device, deadline)
    work = CASES[job.op].work(*job.shape.size, kind)
    rows = []
    for name, values in times.items():
        p20, p50, p80 = output.percentiles(values)
        rows.append(Timing(
            job.op, name, *job.shape, job.operands, 1e6 * p20, 1e6 * p50, 1e6 * p80,
            work.flops / p50 / 1e12, work.bytes / p50 / 1e9, roof.share(work, job.operands, p50),
            roof.flops[job.operands] / 1e12, roof.bytes / 1e9, name in graphs, passed if name == "ours" else "",
        ))  # fmt: skip
    return rows


def measure_roof(device: str) -> Roof:
    """A large copy, and square products of random matrices with every kind of operands."""

    def median(function: Callable[[], Any]) -> float:
        return statistics.median(interleaved({"": function}, CLOCKS[device], rounds=15)[""])

    numbers, sides = ROOFS[device]
    source = torch.randn(numbers, device=device)
    copy = torch.empty_like(source)
    bandwidth = 2 * size(source) / median(partial(copy.copy_, source))
    flops = {}
    for name, n in sides.items():
        a, b = (torch.randn(n, n, device=device).to(OPERANDS[name].dtype) for _ in range(2))
        with OPERANDS[name].setting():
            flops[name] = 2 * n**3 / median(partial(torch.matmul, a, b))
    if "bf16" in flops:
        flops |= {"split": flops["bf16"] / 2, "fp32 high": flops["bf16"] / 3}
    return Roof(flops, bandwidth)


# --- What is timed ------------------------------------------------------------------------------------------------------


def default_ops(device: str) -> list[str]:
    """On a CPU the public ops, and of the Cayley maps the default alone: the others would take as long again to compile."""
    if device == "cuda":
        return list(CASES)
    maps = [f"cayley_track_{order}" for order in (2, 4, 8)]
    return [name for name, case in CASES.items() if case.has_op and name not in maps]


def plan(ops: Iterable[str], device: str) -> Iterator[Job]:
    """What to time, the most telling first. On a CPU in float32 alone: most have no units for less."""
    ops, shapes = list(ops), SHAPES[device]
    for i, shape in enumerate(shapes):
        for op in ops:
            yield Job(op, shape, CASES[op].operands[0] if device == "cuda" else "fp32", i < COMPILED[device])
    if device == "cuda":
        for operands in OPERANDS:
            for shape in shapes[:OTHER_OPERANDS]:
                yield from (Job(op, shape, operands, False) for op in ops if operands in CASES[op].operands[1:])


def compile_job(job: Job, device: str) -> None:
    """Leave what `torch.compile` makes of a composition in Inductor's cache on disk."""
    case, kind = CASES[job.op], OPERANDS[job.operands]
    with kind.setting(), torch.no_grad():
        compiled(case)(case.arguments(*job.shape.size, kind, device))


def precompiled(jobs: Iterable[Job], device: str, until: float) -> list[Job]:
    """Those of the jobs that many processes compiled in time: what this one compiles of them comes from their cache."""
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # Inductor would start a pool in each process
    done = []
    threads = (torch.get_num_threads(),)  # which the keys of the cache contain
    with multiprocessing.get_context("spawn").Pool(WORKERS, torch.set_num_threads, threads) as pool:
        waiting = [(job, pool.apply_async(compile_job, (job, device))) for job in jobs]
        for job, result in waiting:
            try:
                result.get(max(0.0, until - time.time()))
                done.append(job)
            except Exception:  # too late, or a composition that does not compile: it is timed without
                continue
    return done


def benchmark(ops: Iterable[str], device: str, deadline: float) -> tuple[list[Timing], list[str]]:
    """Timings until the deadline, and what went wrong or was left out."""
    jobs, rows, notes = list(plan(ops, device)), [], []
    if device == "cuda":  # where minutes are few and cores are many
        wanted = [job for job in jobs if job.compiled]
        done = precompiled(wanted, device, min(deadline, time.time() + COMPILE_SECONDS))
        jobs = [job._replace(compiled=job in done) for job in jobs]
        notes.append(f"compiled in time: {len(done)} of {len(wanted)} compositions")
    roof = measure_roof(device)
    rates = ", ".join(f"{name} {rate / 1e12:.3g}" for name, rate in roof.flops.items())
    notes.append(f"roof: copy {roof.bytes / 1e9:.3g} GB/s; TFLOP/s: {rates}")
    for i, job in enumerate(jobs):
        if time.time() > deadline:
            notes.append(f"no time was left for {len(jobs) - i} of {len(jobs)} timings")
            break
        try:
            rows += timings(job, roof, device, deadline)
        except Exception as error:  # the other timings still count
            notes.append(f"{job.op} {job.shape.size} {job.operands}: {type(error).__name__}: {str(error)[:200]}")
            if device == "cuda":
                torch.cuda.empty_cache()
    return rows, notes


# --- What is written ----------------------------------------------------------------------------------------------------


def by_shape(rows: Iterable[Timing]) -> dict[tuple[Any, ...], dict[str, Timing]]:
    found: dict[tuple[Any, ...], dict[str, Timing]] = {}
    for row in rows:
        found.setdefault((row.op, row.operands, row.n, row.m, row.batch), {})[row.provider] = row
    return found


def ratios(rows: Iterable[Timing]) -> str:
    """Ours and the others: microseconds, how many times as fast ours is, where it agreed with float64, share of the roof."""
    rows = list(rows)
    others = [name for name in ("eager", "compiled", "cublas") if any(row.provider == name for row in rows)]
    header = [column for other in others for column in (f"{other} us", "times")]
    lines = [["operation", "operands", "model", "n x m x batch", "ours us", *header, "TFLOP/s", "GB/s", "roof"]]
    for (op, operands, n, m, batch), group in by_shape(rows).items():
        ours = group.get("ours")
        if ours is None:
            continue
        cells = []
        for other in others:
            if other in group:
                times = f"{group[other].p50_us / ours.p50_us:.2f}" if ours.gate == "passed" else "refused"
                cells += [f"{group[other].p50_us:.1f}", times]
            else:
                cells += ["-", "-"]
        lines.append([
            op, operands, ours.model, f"{n} x {m} x {batch}", f"{ours.p50_us:.1f}", *cells,
            f"{ours.tflops:.3g}", f"{ours.gb_per_s:.3g}", f"{ours.roof:.2f}",
        ])  # fmt: skip
    return output.table(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m spectral_ops.bench kernels", description=__doc__.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=list(SHAPES), default=default, help="default: cuda if there is one, else cpu")
    parser.add_argument(
        "--op", type=lambda text: choices(text, list(CASES)), metavar="LIST",
        help=f"of {','.join(CASES)}; default: all, on a CPU {','.join(default_ops('cpu'))}",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="for the CSV; default: out")
    options = parser.parse_args(argv)
    device, ops = options.device, options.op or default_ops(options.device)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch._inductor")  # between parts of PyTorch
    try:
        configure(device, None)
    except ValueError as error:
        parser.error(str(error))
    if device == "cpu" and (parts := [name for name in ops if not CASES[name].has_op]):
        parser.error(f"--op {','.join(parts)}: only on a GPU, since no public op does this alone")

    rows, notes = benchmark(ops, device, deadline=math.inf)
    source = provenance() if device == "cuda" else output.provenance(device)
    path = options.out / f"kernels-{device}.csv"
    output.write_rows(path, rows, source | {"command": output.command("kernels", argv)})
    print(*notes, output.describe(source), path, sep="\n")
    print(f"\n{ratios(rows)}")
