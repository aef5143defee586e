"""Find the fastest tiles on this GPU, and where plain PyTorch is faster, and write the table that kernels take them from.

python -m spectral_ops.bench tune --ops gram,track
"""

import argparse
import json
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import astuple
from functools import cache, lru_cache, partial
from itertools import groupby, product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from spectral_ops.bench import kernels
from spectral_ops.bench.aot import choices
from spectral_ops.bench.cases import CASES, OPERANDS, Arguments, Results, fresh, judged, unit
from spectral_ops.kernels.config import FOLDER, Config, table
from spectral_ops.kernels.launch import Launch, recording

# What the tables have tiles for, each with the operation whose launches it is timed in.
SOURCES = {
    "gram": "gram", "gram_skew": "gram_skew", "track": "gram_track_both", "rotate": "rotate", "square": "cayley_track_3",
    "map": "cayley_track_3", "turn": "cayley_track_3", "conjugate": "cayley_track_3", "map_long": "cayley_track_8",
    "even": "cayley_track_8", "finish_map": "cayley_track_8", "cayley": "cayley_update", "root": "apply_root",
    "factor": "factor_update",
}  # fmt: skip
KERNELS = {"map_long": "map"}  # of orders 4 and 8; the other names are the kernels' own
# Whole operations, which leave it to PyTorch where the plain composition is faster than all of their kernels.
WHOLE = ("gram", "gram_skew", "track", "cayley", "root", "factor")
KINDS = {"bf16": "16", "split": "split", "fp32": "ieee", "fp32 high": "bf16x3", "fp32 medium": "tf32"}  # as tables say it
SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)  # the last one stands for all that are larger
BATCHES = (16, 1)  # the first one also for all above, the last one for all below
BATCHED = 1024  # up to this size; above, one matrix fills the GPU
# Those that pass the ahead-of-time gate in most kernels. What a spill costs in the others, the clock says.
CANDIDATES = {
    "16": (
        Config(32, 32, 4, 2), Config(64, 64, 4, 3), Config(64, 64, 4, 4), Config(64, 64, 8, 3), Config(64, 32, 4, 4),
        Config(128, 64, 8, 3), Config(128, 64, 8, 4), Config(128, 32, 8, 4),
    ),
    "split": (Config(32, 32, 4, 2), Config(64, 32, 4, 3), Config(64, 64, 4, 3), Config(128, 32, 8, 3), Config(128, 64, 8, 3)),
    "ieee": (Config(32, 32, 4, 2), Config(64, 32, 4, 3), Config(64, 16, 4, 3), Config(64, 32, 8, 3), Config(128, 16, 8, 3)),
    "bf16x3": (Config(32, 32, 4, 2), Config(64, 32, 4, 3), Config(64, 32, 8, 3), Config(128, 32, 8, 3)),
    "tf32": (Config(32, 32, 4, 2), Config(64, 32, 4, 3), Config(64, 32, 8, 3), Config(128, 32, 8, 3)),
}  # fmt: skip

Entry = dict[str, Any]
Job = tuple[str, str]  # a name of the tables and operands


class Timer(NamedTuple):
    """What the search asks. All take an operation, its operands, `n` and a batch."""

    kernels: Callable[[str, str, int, int, Config], dict[str, float] | None]
    """Seconds in each kernel with these tiles; None where they do not launch or a result is wrong."""
    plain: Callable[[str, str, int, int], float]
    """Seconds of the plain composition."""


# --- The search ---------------------------------------------------------------------------------------------------------


def jobs(ops: Iterable[str], operands: Iterable[str] = tuple(KINDS)) -> list[Job]:
    return [(op, kind) for kind, op in product(operands, ops) if kind in CASES[SOURCES[op]].operands]


def search(
    timer: Timer, wanted: Iterable[Job], deadline: float = math.inf, clock: Callable[[], float] = time.time
) -> list[Entry]:
    """Entries of a table for these jobs, for as many of them as are done by the deadline."""
    timer = Timer(cache(timer.kernels), cache(timer.plain))  # operations share launches
    found: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for op, operands in wanted:
        choice: dict[tuple[int, int], Config | None] = {}
        for batch, n in product(reversed(BATCHES), SIZES):
            if clock() > deadline:
                return entries(found)
            choice[batch, n] = choice[1, n] if n > BATCHED and batch > 1 else choose(timer, op, operands, n, batch)
        found[KINDS[operands], tuple(choice[pair] for pair in product(BATCHES, SIZES))].append(op)
    return entries(found)


def choose(timer: Timer, op: str, operands: str, n: int, batch: int) -> Config | None:
    """The fastest tiles of a kernel; None where plain PyTorch is faster than the whole operation with its fastest tiles."""
    case = SOURCES[op]
    # Larger tiles than this are mostly padding.
    candidates = [config for config in CANDIDATES[KINDS[operands]] if config.block <= max(32, 2 * n)]
    times = {config: timer.kernels(case, operands, n, batch, config) for config in candidates}
    valid = {config: seconds for config, seconds in times.items() if seconds}
    if not valid:
        raise RuntimeError(f"no tiles launch and give right results for {op}, {operands}, n = {n}, batch {batch}")
    if op in WHOLE:
        names = next(iter(valid.values()))
        if timer.plain(case, operands, n, batch) < sum(min(seconds[name] for seconds in valid.values()) for name in names):
            return None
    return min(valid, key=lambda config: valid[config].get(KERNELS.get(op, op), sum(valid[config].values())))


def entries(found: dict[tuple[Any, ...], list[str]]) -> list[Entry]:
    """Kernels of equal choices share entries, and so do neighbouring sizes."""
    result = []
    for (kind, choice), ops in found.items():
        for start, batch in zip(range(0, len(choice), len(SIZES)), BATCHES, strict=True):
            for config, group in groupby(zip(SIZES, choice[start : start + len(SIZES)], strict=True), lambda pair: pair[1]):
                largest = max(n for n, _ in group)
                tile = (None,) * 4 if config is None else astuple(config)
                result.append({
                    "ops": ops, "operands": [kind], "max_n": None if largest == SIZES[-1] else largest,
                    **({"min_batch": batch} if batch > 1 else {}),
                    **dict(zip(("block", "k", "warps", "stages"), tile, strict=True)),
                })  # fmt: skip
    return result


# --- The GPU ------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def problem(op: str, operands: str, n: int, batch: int) -> tuple[Arguments, Results, Results]:
    """Inputs, the composition's results and those of float64."""
    case = CASES[op]
    arguments = case.arguments(n, n, batch, OPERANDS[operands], "cuda")
    return arguments, case.eager(fresh(arguments)), case.reference(arguments)


def kernel_seconds(op: str, operands: str, n: int, batch: int, config: Config) -> dict[str, float] | None:
    case, kind = CASES[op], OPERANDS[operands]
    with kind.setting(), torch.no_grad():
        arguments, eager, wanted = problem(op, operands, n, batch)
        try:
            with recording() as launches:
                results = case.run(fresh(arguments), config)
            if any(found.verdict for found in judged(case, results, eager, wanted, unit(kind))):
                return None
        except Exception:  # tiles that need more than the GPU has
            return None
        by_name: dict[str, list[Launch]] = defaultdict(list)
        for item in launches:
            by_name[item.name].append(item)
        return {name: replay_seconds(partial(run_all, items)) for name, items in by_name.items()}


def run_all(launches: list[Launch]) -> None:
    for item in launches:
        item.run()


def plain_seconds(op: str, operands: str, n: int, batch: int) -> float:
    with OPERANDS[operands].setting(), torch.no_grad():
        arguments, _, _ = problem(op, operands, n, batch)
        return replay_seconds(partial(CASES[op].eager, fresh(arguments)))


def replay_seconds(function: Callable[[], Any]) -> float:
    """From a CUDA graph, so that the host does not count. Inputs that fit there come from the L2, as in an optimizer, whose
    kernels hand their results to one another."""
    function()
    repeats = max(1, min(20, int(1e-3 / kernels.seconds(function))))

    def repeated() -> None:
        for _ in range(repeats):
            function()

    run = kernels.captured(repeated) or repeated
    return statistics.median(kernels.interleaved({"": run}, limit=0.03, rounds=9)[""]) / repeats


# --- The table ----------------------------------------------------------------------------------------------------------


def write(folder: Path, measured: list[Entry], source: dict[str, str], command: str, capability: tuple[int, int]) -> Path:
    """Write the table of a GPU: what was measured, and behind it the present table, for what was not."""
    present = table(capability)
    provenance = {
        "source": "measured", "gpu": source["hardware"],
        **{name: source[name] for name in ("torch", "triton", "driver", "date")},
        "command": command, "measured_entries": len(measured), "other_entries": present["provenance"],
    }  # fmt: skip
    path = folder / f"sm_{10 * capability[0] + capability[1]}.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(formatted(provenance, [*measured, *present["entries"]]))
    return path


def formatted(provenance: Entry, entries: list[Entry]) -> str:
    """A table as JSON, an entry a line."""
    lines = ",\n".join(f"  {json.dumps(entry)}" for entry in entries)
    return f'{{\n "provenance": {json.dumps(provenance)},\n "entries": [\n{lines}\n ]\n}}\n'


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m spectral_ops.bench tune", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--ops", type=lambda text: choices(text, list(SOURCES)), default=list(SOURCES), metavar="LIST",
        help=f"of {','.join(SOURCES)}; default: all",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="DIR", help="for the table; default: that of the package")
    options = parser.parse_args(argv)
    kernels.require_gpu()

    measured = search(Timer(kernel_seconds, plain_seconds), jobs(options.ops))
    command = f"python -m spectral_ops.bench tune --ops {','.join(options.ops)}"
    print(write(options.out, measured, kernels.provenance(), command, torch.cuda.get_device_capability()))
