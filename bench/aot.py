"""Compile every kernel ahead of time for GPUs that need not be there, and check what the compiler made of them.

python -m spectral_ops.bench aot --targets sm_90 --operands bf16
"""

import argparse
import dataclasses
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from spectral_ops.bench import output
from spectral_ops.bench.cases import CASES, OPERANDS
from spectral_ops.kernels.launch import Launch, interpreted, recording

TYPES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16",
    torch.int64: "i64", torch.int32: "i32", torch.bool: "i1",
}  # fmt: skip
TARGETS = {"sm_80": (8, 0), "sm_90": (9, 0), "sm_100": (10, 0), "sm_120": (12, 0)}
OWN = ("sm_80", "sm_90", "sm_100")  # those with a table of their own
# Bytes a program may share. The table of sm_80 also serves 8.6, 8.9 and 12.x, which have less than 8.0 itself.
SHARED = {"sm_80": 101_376, "sm_90": 232_448, "sm_100": 232_448, "sm_120": 101_376}
WIDE = {"sm_90": "wgmma", "sm_100": "tcgen05"}  # the instruction that 16-bit tiles from 64 on must reach
SIZES = (16, 64, 1024, 4096)  # one in every class that the tables tell apart
ODD = 1001  # rows that no vector load fits
UNALIGNED_SPILLS = 16  # bytes, which are let pass where every element is loaded by itself
PROCESSES = 2


@dataclass(frozen=True)
class Row:
    """A kernel as compiled for a target."""

    kernel: str
    operands: str
    target: str
    n: int
    product: str  # "16", "split", "ieee", "bf16x3", "tf32", "-"
    block: int
    k: int
    warps: int
    stages: int
    registers: int
    spills: int  # bytes of local memory a thread
    shared: int  # bytes a program
    tensor_core: str  # instruction
    tensor_core_count: int
    vector_stores: int
    scalar_stores: int
    fp64: int

    @property
    def label(self) -> str:
        return f"{self.kernel} ({self.operands}, {self.target}, n = {self.n}, {self.block} x {self.block} x {self.k})"


# --- Compiling ----------------------------------------------------------------------------------------------------------


def source(item: Launch) -> ASTSource:
    """The kernel with the types, constants and alignments that this launch gives it."""
    signature, constants, attributes = {}, {}, {}
    for position, (param, name) in enumerate(zip(item.kernel.params, item.kernel.arg_names, strict=True)):
        value, special = item.arguments[name], not param.do_not_specialize
        if param.is_constexpr or value is None or (special and type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if special and value % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    return ASTSource(item.kernel, signature, constants, attributes)


def operand_kind(item: Launch) -> str:
    """How the product of a kernel takes its operands, in the words of the tables; "-" for a kernel without one."""
    if "PRECISION" not in item.arguments:
        return "-"
    # A kernel's first two matrices are the operands of its product.
    matrices = [x.dtype for x in item.arguments.values() if isinstance(x, Tensor) and x.ndim == 3][:2]
    if len(set(matrices)) > 1:
        return "split"
    return str(item.arguments["PRECISION"]) if matrices[0] == torch.float32 else "16"


def compiled(item: Launch, operands: str, target: str, n: int) -> Row:
    major, minor = TARGETS[target]
    options = {"num_warps": item.config.warps, "num_stages": item.config.stages}
    kernel: Any = triton.compile(source(item), target=GPUTarget("cuda", 10 * major + minor, 32), options=options)
    ptx = kernel.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        dump = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", dump)}
    kinds = {"wgmma": r"wgmma\.mma_async", "tcgen05": r"tcgen05\.mma", "mma": r"\bmma\.sync"}
    counts = {kind: len(re.findall(pattern, ptx)) for kind, pattern in kinds.items()}
    best = max(counts, key=lambda kind: counts[kind])
    stores = re.findall(r"st\.global(\S*)", ptx)
    wide = sum(".v" in s for s in stores)
    config = item.config
    return Row(
        item.name, operands, target, n, operand_kind(item), config.block, config.k, config.warps, config.stages,
        usage["REG"], usage["STACK"] + usage["LOCAL"], kernel.metadata.shared, best if counts[best] else "-", counts[best],
        wide, len(stores) - wide, len(re.findall(r"\.f64", ptx)),
    )  # fmt: skip


def launches(operands: str, target: str, n: int) -> Iterator[Launch]:
    """What the operations launch on `n × n` matrices: nothing runs, and there is no memory behind the tensors."""
    kind = OPERANDS[operands]
    with kind.setting(), recording(run=False, assume=TARGETS[target]) as items:
        for case in CASES.values():
            if operands in case.operands:
                case.run(case.arguments(n, n, 4, kind, "meta"))
    yield from items


def key(item: Launch, target: str) -> tuple[Any, ...]:
    """What makes it another kernel."""
    made = source(item)
    return item.name, target, item.config, str((made.signature, made.constants, made.attrs))


def rows_of(operands: str, target: str, sizes: Iterable[int]) -> list[tuple[tuple[Any, ...], Row]]:
    """Each different kernel once."""
    found: dict[tuple[Any, ...], Row] = {}
    for n in sizes:
        for item in launches(operands, target, n):
            if (name := key(item, target)) not in found:
                found[name] = compiled(item, operands, target, n)
    return list(found.items())


def table(
    operands: Iterable[str] = tuple(OPERANDS), targets: Iterable[str] = OWN, sizes: Iterable[int] = (*SIZES, ODD)
) -> list[Row]:
    """All kernels, from two processes, since a compiler run takes a second."""
    jobs = [(kind, target, tuple(sizes)) for kind, target in product(operands, targets)]
    with ProcessPoolExecutor(PROCESSES, mp_context=get_context("spawn")) as pool:
        parts = pool.map(rows_of, *zip(*jobs, strict=True))
        found = dict(pair for part in parts for pair in part)
    return list(found.values())


# --- The gate -----------------------------------------------------------------------------------------------------------


def gate(rows: Iterable[Row]) -> list[str]:
    """What is wrong with the kernels, a sentence each."""
    return [f"{row.label} {text}." for row in rows for text in _violations(row)]


def _violations(row: Row) -> Iterator[str]:
    aligned = row.n % 16 == 0
    if row.spills > (0 if aligned else UNALIGNED_SPILLS):
        yield f"spills {row.spills} bytes"
    if row.shared > SHARED[row.target]:
        yield f"shares {row.shared} bytes, over the {SHARED[row.target]} of {row.target}"
    if row.product not in ("-", "ieee"):
        if row.tensor_core == "-":
            yield "has no tensor-core instruction"
        elif row.product in ("16", "split") and row.block >= 64 and row.tensor_core != WIDE.get(row.target, row.tensor_core):
            yield f"has {row.tensor_core} where {WIDE[row.target]} would do"
    if aligned and not row.vector_stores and row.scalar_stores > 4:  # fewer: it writes no matrix
        yield "has no vector store"
    if row.fp64:
        yield f"has {row.fp64} fp64 instructions"


# --- The command --------------------------------------------------------------------------------------------------------

HEADER = [field.name for field in dataclasses.fields(Row)]


def worst(rows: Iterable[Row]) -> list[Row]:
    """Of the variants of a kernel that differ in less than their label, the one that takes most."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        name = row.label, row.product, row.warps, row.stages
        if name not in found or (row.spills, row.registers) > (found[name].spills, found[name].registers):
            found[name] = row
    return list(found.values())


def cells(rows: Iterable[Row]) -> list[list[str]]:
    return [[str(value) for value in dataclasses.astuple(row)] for row in rows]


def choices(text: str, known: Sequence[str]) -> list[str]:
    """A comma-separated list of known names."""
    names = text.split(",")
    if unknown := set(names) - set(known):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: not among {', '.join(known)}")
    return names


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m spectral_ops.bench aot", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--operands", type=lambda text: choices(text, list(OPERANDS)), default=list(OPERANDS), metavar="LIST",
        help=f"of {','.join(OPERANDS)}; default: all",
    )  # fmt: skip
    parser.add_argument(
        "--targets", type=lambda text: choices(text, list(TARGETS)), default=list(OWN), metavar="LIST",
        help=f"of {','.join(TARGETS)}; default: {','.join(OWN)}",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="for the CSV; default: out")
    options = parser.parse_args(argv)
    if interpreted():
        parser.error("TRITON_INTERPRET is set: kernels would be interpreted, not compiled")

    rows = table(options.operands, options.targets)
    print(output.table([HEADER, *cells(worst(rows))]))
    path = options.out / "aot.csv"
    output.write_csv(path, HEADER, cells(rows))
    print(f"\n{len(rows)} kernels, Triton {triton.__version__}\n{path}")
    if violations := gate(rows):
        raise SystemExit("\n".join(violations))
