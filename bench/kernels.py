"""Time every operation on a GPU: its kernels against the plain PyTorch composition and against the card's own limits.

python -m spectral_ops.bench kernels --op gram,rotate
"""

import argparse
import math
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectral_ops.bench import output
from spectral_ops.bench.aot import choices
from spectral_ops.bench.cases import CASES, OPERANDS, Arguments, Case, Operands, Work

# What is timed, the most telling first, as far as the time lasts. The shapes are those of a 12-layer transformer of width 768
# and of squares; a batch is the layers that are stepped together.
SHAPES = (
    (1024, 1024, 1), (1024, 1024, 12), (768, 3072, 12), (4096, 4096, 1), (256, 256, 1), (256, 256, 48), (2048, 2048, 1),
    (768, 768, 12), (64, 64, 96), (512, 512, 12), (128, 128, 48), (2048, 2048, 8), (8192, 8192, 1),
)  # fmt: skip
CACHES = 3  # inputs are this many times the L2, in rotation
SETS = 64  # at most
ROUNDS, WARMUP = 30, 3
SECONDS = 0.4  # for one provider and shape


@dataclass(frozen=True)
class Timing:
    """One provider of an operation at one shape. Rates count the work that the kernels do, whoever does it."""

    op: str
    provider: str
    n: int
    m: int
    batch: int
    operands: str
    p20_us: float
    p50_us: float
    p80_us: float
    tflops: float
    gb_per_s: float
    roof: float  # share of what the card reached in a plain product or copy
    graph: bool  # whether replayed from a CUDA graph


@dataclass(frozen=True)
class Roof:
    """What the card reaches, measured on the spot: operations a second by operands, and bytes a second of a large copy."""

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


def interleaved(
    functions: Mapping[str, Callable[[], Any]],
    clock: Callable[[Callable[[], Any]], float] = seconds,
    limit: float = SECONDS,
    rounds: int = ROUNDS,
) -> dict[str, list[float]]:
    """Times of each function. Every round has an order of its own, so that what else slows the card hits all alike; there are
    fewer rounds if they would take longer than `limit` for each function."""
    warm = {name: min(clock(function) for _ in range(WARMUP)) for name, function in functions.items()}
    count = max(5, min(rounds, int(limit * len(functions) / max(sum(warm.values()), 1e-9))))
    times: dict[str, list[float]] = {name: [] for name in functions}
    order, shuffle = list(functions), random.Random(0).shuffle
    for _ in range(count):
        shuffle(order)
        for name in order:
            times[name].append(clock(functions[name]))
    return times


def input_sets(case: Case, n: int, m: int, batch: int, operands: Operands) -> list[Arguments]:
    """As many different inputs as it takes to leave the L2 behind."""
    first = case.arguments(n, m, batch, operands, "cuda")
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    count = min(SETS, math.ceil(CACHES * cache / max(1, size(first))))
    return [first, *(case.arguments(n, m, batch, operands, "cuda", seed) for seed in range(1, count))]


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


def providers(case: Case) -> dict[str, Callable[[Arguments], Any]]:
    found: dict[str, Callable[[Arguments], Any]] = {"kernel": case.run, "eager": case.eager}
    return found | {"cublas": full_product} if case.name == "gram" else found


def timings(case: Case, shape: tuple[int, int, int], operands: str, roof: Roof) -> list[Timing]:
    """All providers of an operation at one shape."""
    kind = OPERANDS[operands]
    with kind.setting(), torch.no_grad():
        sets = input_sets(case, *shape, kind)
        work = case.work(*shape, kind)

        def rotation(provider: Callable[[Arguments], Any]) -> None:
            for arguments in sets:
                provider(arguments)

        functions = {name: partial(rotation, provider) for name, provider in providers(case).items()}
        graphs = {name: captured(function) for name, function in functions.items()}
        times = interleaved({name: graphs[name] or function for name, function in functions.items()})
    rows = []
    for name, values in times.items():
        p20, p50, p80 = (value / len(sets) for value in percentiles(values))
        rates = work.flops / p50 / 1e12, work.bytes / p50 / 1e9, roof.share(work, operands, p50)
        known = graphs[name] is not None
        rows.append(Timing(case.name, name, *shape, operands, 1e6 * p20, 1e6 * p50, 1e6 * p80, *rates, known))
    return rows


def percentiles(values: list[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th."""
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return fifths[0], statistics.median(values), fifths[-1]


def measure_roof() -> Roof:
    """A copy of a gigabyte, and square products of random matrices with every kind of operands."""

    def median(function: Callable[[], Any]) -> float:
        return statistics.median(interleaved({"": function}, rounds=15)[""])

    source = torch.randn(2**28, device="cuda")
    copy = torch.empty_like(source)
    bandwidth = 2 * size(source) / median(partial(copy.copy_, source))
    flops = {}
    for name, n in (("bf16", 8192), ("fp16", 8192), ("fp32", 4096), ("fp32 medium", 8192)):
        a, b = (torch.randn(n, n, device="cuda").to(OPERANDS[name].dtype) for _ in range(2))
        with OPERANDS[name].setting():
            flops[name] = 2 * n**3 / median(partial(torch.matmul, a, b))
    return Roof(flops | {"split": flops["bf16"] / 2, "fp32 high": flops["bf16"] / 3}, bandwidth)


def plan(ops: Iterable[str]) -> Iterator[tuple[Case, tuple[int, int, int], str]]:
    """What to time, the most telling first."""
    cases = [CASES[name] for name in ops]
    yield from ((case, shape, case.operands[0]) for shape in SHAPES for case in cases)
    for operands in OPERANDS:
        yield from ((case, shape, operands) for shape in SHAPES[:6] for case in cases if operands in case.operands[1:])


def benchmark(ops: Iterable[str], deadline: float) -> tuple[list[Timing], list[str]]:
    """Timings until the deadline, and what went wrong or was left out."""
    roof, rows, notes = measure_roof(), [], []
    notes.append(f"roof: copy {roof.bytes / 1e12:.2f} TB/s, " + ", ".join(f"{k} {v / 1e12:.0f}" for k, v in roof.flops.items()))
    jobs = list(plan(ops))
    for done, (case, shape, operands) in enumerate(jobs):
        if time.time() > deadline:
            notes.append(f"no time was left for {len(jobs) - done} of {len(jobs)} timings")
            break
        try:
            rows += timings(case, shape, operands, roof)
        except Exception as error:  # the other timings still count
            notes.append(f"{case.name} {shape} {operands}: {type(error).__name__}: {str(error)[:200]}")
            torch.cuda.empty_cache()
    return rows, notes


# --- What is written ----------------------------------------------------------------------------------------------------


def write(path: Path, rows: list[Any], source: dict[str, str]) -> None:
    """Dataclasses as CSV, each with where it comes from."""
    if rows:
        header = [field.name for field in fields(rows[0])]
        output.write_csv(path, [*header, *source], [[*map(cell, asdict(row).values()), *source.values()] for row in rows])


def cell(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value


def by_shape(rows: Iterable[Timing]) -> dict[tuple[Any, ...], dict[str, Timing]]:
    found: dict[tuple[Any, ...], dict[str, Timing]] = {}
    for row in rows:
        found.setdefault((row.op, row.operands, row.n, row.m, row.batch), {})[row.provider] = row
    return found


def ratios(rows: Iterable[Timing]) -> str:
    """The kernels against the others: microseconds, how many times as fast, share of the roof."""
    header = "operation,operands,n x m x batch,kernel us,eager us,times,cublas us,TFLOP/s,GB/s,roof"
    lines = [header.split(",")]
    for (op, operands, n, m, batch), group in by_shape(rows).items():
        kernel, eager, cublas = (group.get(name) for name in ("kernel", "eager", "cublas"))
        if kernel is None:
            continue
        lines.append([
            op, operands, f"{n} x {m} x {batch}", f"{kernel.p50_us:.1f}", f"{eager.p50_us:.1f}" if eager else "-",
            f"{eager.p50_us / kernel.p50_us:.2f}" if eager else "-", f"{cublas.p50_us:.1f}" if cublas else "-",
            f"{kernel.tflops:.0f}", f"{kernel.gb_per_s:.0f}", f"{kernel.roof:.2f}",
        ])  # fmt: skip
    return output.table(lines)


def plot(path: Path, rows: Iterable[Timing], title: str) -> None:
    """How many times as fast as the composition, and the share of the roof, for each operation with its first operands."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return
    figure = Figure(figsize=(12, 5), layout="constrained")
    panels = figure.subplots(1, 2)
    points: dict[str, list[tuple[int, float, float]]] = {}
    for (op, operands, n, m, batch), group in by_shape(rows).items():
        if operands == CASES[op].operands[0] and n == m and {"kernel", "eager"} <= set(group):
            times = group["eager"].p50_us / group["kernel"].p50_us
            points.setdefault(f"{op}, batch" if batch > 1 else op, []).append((n, times, group["kernel"].roof))
    for name, values in points.items():
        sizes, *heights = zip(*sorted(values), strict=True)
        style = "o--" if name.endswith("batch") else "o-"
        for panel, y in zip(panels, heights, strict=True):
            panel.plot(sizes, y, style, label=name, linewidth=1.2, markersize=3)
    for panel, label in zip(panels, ("times as fast as eager PyTorch", "share of the roof"), strict=True):
        panel.set_xscale("log", base=2)
        panel.set_xlabel("n")
        panel.set_title(label)
        panel.grid(alpha=0.3)
    panels[0].axhline(1, color="black", linewidth=0.8)
    panels[0].set_yscale("log", base=2)
    panels[1].legend(fontsize=6, ncols=2, frameon=False)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(path)


def save(out: Path, rows: list[Timing], source: dict[str, str]) -> None:
    write(out / "kernels.csv", rows, source)
    plot(out / "kernels.png", rows, f"{source['hardware']}, PyTorch {source['torch']}, {source['date']}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m spectral_ops.bench kernels", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--op", type=lambda text: choices(text, list(CASES)), default=list(CASES), metavar="LIST",
        help=f"of {','.join(CASES)}; default: all",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="for CSV and plot; default: out")
    options = parser.parse_args(argv)
    require_gpu()

    rows, notes = benchmark(options.op, deadline=math.inf)
    source = provenance()
    save(options.out, rows, source)
    print(*notes, output.describe(source), options.out / "kernels.csv", sep="\n")
    print(f"\n{ratios(rows)}")
