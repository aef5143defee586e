"""How results are written and where they come from: tables, CSV files, hardware, versions, the code that ran."""

import ast
import csv
import datetime
import hashlib
import importlib.metadata
import platform
import shlex
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch

import spectral_ops
from spectral_ops import kernels, optim, structures

# What every row of a result carries beside its figures.
PROVENANCE = ("hardware", "threads", "torch", "triton", "date", "code")


def provenance(device: str) -> dict[str, str]:
    return {
        "hardware": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "triton": installed("triton"),
        "date": datetime.date.today().isoformat(),
        "code": code(),
    }


def installed(package: str) -> str:
    """Its version; a dash where it is not installed, as Triton is not on every system."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def command(name: str, argv: Sequence[str] | None) -> str:
    """What was typed to run a program of this folder; where its results go does not belong to it."""
    given = list(sys.argv[2:] if argv is None else argv)
    if "--out" in given:
        at = given.index("--out")
        del given[at : at + 2]
    return shlex.join(["python", "-m", "spectral_ops.bench", name, *given])


def describe(source: dict[str, str]) -> str:
    return f"{source['hardware']}, {source['threads']} thread(s), PyTorch {source['torch']}, {source['date']}"


# --- Code ---------------------------------------------------------------------------------------------------------------


@cache
def code() -> str:
    """A digest of what the package computes: kernels and their tables, ops, structures, optimizers. Comments, docstrings and
    layout do not count, nor does the version of Python: a result is older than the code only if what ran has changed."""
    digest = hashlib.sha256()
    for module in (spectral_ops, structures, kernels, optim):
        folder = Path(module.__path__[0])
        for path in sorted(folder.glob("*.py")):
            digest.update("\n".join([path.name, *_meaning(ast.parse(path.read_text()))]).encode())
        for path in sorted(folder.glob("configs/*.json")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _meaning(node: Any) -> Iterator[str]:
    """The syntax tree in words, without docstrings and without the empty fields, which other versions of Python add."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return
    if isinstance(node, ast.AST):
        yield type(node).__name__
        for name, value in ast.iter_fields(node):
            if value not in (None, []):
                yield name
                yield from _meaning(value)
    elif isinstance(node, list):
        yield "["
        for item in node:
            yield from _meaning(item)
        yield "]"
    else:
        yield repr(node)


def percentiles(values: list[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th, which a timing is given by."""
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return fifths[0], statistics.median(values), fifths[-1]


# --- Tables and files ---------------------------------------------------------------------------------------------------


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the first one the header, as aligned text: the first column to the left, the rest to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def write_rows(path: Path, rows: Sequence[Any], source: dict[str, str]) -> None:
    """Dataclasses as CSV, each with where it comes from; nothing, where there are none."""
    if rows:
        header = [field.name for field in fields(rows[0])]
        write_csv(path, [*header, *source], [[*map(_cell, asdict(row).values()), *source.values()] for row in rows])


def _cell(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else value


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
