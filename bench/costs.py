"""Count what every operation costs with kernels and as a plain PyTorch composition, and the least time that takes.

python -m spectral_ops.bench model
"""

import argparse
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from spectral_ops.bench import output
from spectral_ops.bench.cases import CASES, OPERANDS, Case, Operands, Work

SIZES, BATCHES = (256, 1024, 4096), (1, 16)
BANDWIDTH = 4.3e12  # bytes a second
RATES = {"bf16": 790e12, "fp32 medium": 395e12, "fp32 high": 263e12, "fp32": 67e12}  # operations a second
RATES |= {"fp16": RATES["bf16"], "split": RATES["bf16"] / 2}
LABELS = {"bf16": "bf16", "fp32 medium": "tf32", "fp32 high": "bf16x3", "fp32": "fp32"}
LEGEND = """GFLOP, MB: matrix products, and memory read and written, of one call in bfloat16 (average: float32). Of the kernels,
each input of a launch counts once and each result once; of the composition, what each of its operations reads and writes.
ratio: kernels to composition. us: floor on an H200, max(operations / rate, bytes / bandwidth), by the operands of the products.
Measured on an H200: copy 4.3 TB/s, 8192^3 bf16 product 790 TFLOP/s, 2026-10/11; the other rates are scaled from the data sheet:
tf32 half of bf16, bf16x3 a third, fp32 67 TFLOP/s."""


class Traffic(TorchDispatchMode):
    """Counts the bytes that every operation reads and writes, were each of them a kernel of its own."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        result = func(*args, **(kwargs or {}))
        written = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        held = {_storage(x) for x in read}
        if func._schema.is_mutable or not all(_storage(x) in held for x in written):  # not a view
            self.bytes += sum(map(_bytes, read + written))
        return result


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _bytes(x: Tensor) -> int:
    """Of the elements there are in memory: an expanded dimension is one."""
    count = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        count *= size if stride else 1
    return count * x.element_size()


def eager_work(case: Case, n: int, m: int, batch: int, operands: Operands) -> Work:
    """Of the plain PyTorch composition, counted as it runs on tensors without memory."""
    arguments = case.arguments(n, m, batch, operands, "meta")
    with FlopCounterMode(display=False) as flops, Traffic() as traffic:
        case.eager(arguments)
    return Work(flops.get_total_flops(), traffic.bytes)


def floor(work: Work, operands: str) -> float:
    """Least seconds on an H200."""
    return max(work.flops / RATES[operands], work.bytes / BANDWIDTH)


def row(case: Case, n: int, batch: int) -> list[str]:
    kind = OPERANDS["bf16" if "bf16" in case.operands else "fp32"]
    work, eager = case.work(n, n, batch, kind), eager_work(case, n, n, batch, kind)
    cells = [case.name, str(n), str(batch), f"{work.flops / 1e9:.2f}", f"{eager.flops / 1e9:.2f}"]
    cells += [f"{work.flops / eager.flops:.2f}" if eager.flops else "-"]
    cells += [f"{work.bytes / 1e6:.1f}", f"{eager.bytes / 1e6:.1f}", f"{work.bytes / eager.bytes:.2f}"]
    for operands in LABELS:
        known = operands in case.operands
        cells.append(f"{1e6 * floor(case.work(n, n, batch, OPERANDS[operands]), operands):.1f}" if known else "-")
    return cells


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m spectral_ops.bench model", description=__doc__.splitlines()[0])
    parser.parse_args(argv)
    header = ["operation", "n = m", "batch", "GFLOP", "eager", "ratio", "MB", "eager", "ratio"]
    header += [f"{label} us" for label in LABELS.values()]
    rows = [row(case, n, batch) for case in CASES.values() for n in SIZES for batch in BATCHES]
    print(output.table([header, *rows]))
    print(LEGEND)
