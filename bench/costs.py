"""Count what every operation, with kernels and as a plain PyTorch composition, and every step costs, and the least time of it.

python -m spectral_ops.bench model
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from spectral_ops.bench import output
from spectral_ops.bench.cases import CASES, OPERANDS, Case, Operands, Work, full

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

# The hidden matrices of networks: rows, columns, how many.
NETWORKS = {
    "ViT-B": ((768, 768, 48), (3072, 768, 12), (768, 3072, 12)),
    "GPT-2 medium": ((1024, 1024, 96), (4096, 1024, 24), (1024, 4096, 24)),
    "Llama-1B": ((2048, 2048, 32), (512, 2048, 32), (8192, 2048, 32), (2048, 8192, 16)),
}
TOKENS = 2**19  # of a training step
TRACKING = ("rotate", "average", "gram_track_both", "cayley_track_3")
NEWTON_SCHULZ = 5
STEP_LEGEND = f"""ms: floor of one step of all hidden matrices on an H200: the sum, over the parts of a step, of
max(operations / rate, bytes / bandwidth). bf16: parameters, gradients and state; fp32: the same, products in float32 units.
Muon: 5 Newton-Schulz steps, in bf16. SOAP: refreshed every step; its QR counts 8/3 n^3 operations at the full fp32 rate, which
no QR reaches. forward and backward: 6 operations for each parameter of these matrices and each of {TOKENS:,} tokens."""

Part = tuple[Work, str]  # of a step, and the operands of its products


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


# --- Optimizer steps ----------------------------------------------------------------------------------------------------


def tracking(n: int, m: int, operands: str) -> Iterator[Part]:
    """How SpectralKron updates the factors of one matrix."""
    kind = OPERANDS[operands]
    for name in TRACKING:
        yield CASES[name].work(n, m, 1, kind), operands
    yield Work(0, 2 * kind.dtype.itemsize * (n * n + m * m)), operands  # the turned bases move to their place


def stepping(n: int, m: int, operands: str) -> Iterator[Part]:
    """The rest of SpectralKron's step of one matrix. Its direction is float32, whatever the parameters are."""
    kind, after = OPERANDS[operands], {"bf16": "split"}.get(operands, operands)
    yield Work(0, 2 * kind.gradient.itemsize * n * m), operands  # gradients are gathered
    yield CASES["momentum"].work(n, m, 1, kind), operands
    for name in ("apply_root", "parameter_update"):
        yield CASES[name].work(n, m, 1, OPERANDS[after]), after


def muon(n: int, m: int, size: int) -> Iterator[Part]:
    """Momentum, Newton–Schulz in bf16 on the smaller side, the parameter's update."""
    n, m = min(n, m), max(n, m)
    yield Work(0, (3 * size + 2) * n * m), "bf16"
    for _ in range(NEWTON_SCHULZ):
        yield Work(full(n, n, m), 2 * (n * m + n * n)), "bf16"
        yield Work(full(n, n, n), 2 * 2 * n * n), "bf16"
        yield Work(full(n, m, n), 2 * (2 * n * m + n * n)), "bf16"
    yield Work(0, (2 * size + 2) * n * m), "bf16"


def soap(n: int, m: int) -> Iterator[Part]:
    """In float32: gradient and momentum into the bases, the update back, both Gram matrices, power iterations and their QR."""
    words = n * n + m * m + 2 * n * m
    yield Work(0, 4 * 8 * n * m), "fp32"  # both moments and the parameter, read and written; the gradient, the update
    for _ in range(3):
        yield Work(full(n, m, n) + full(n, m, m), 4 * words), "fp32"
    for side, other in ((n, m), (m, n)):
        yield Work(full(side, side, other), 4 * (side * other + 2 * side * side)), "fp32"
        yield Work(full(side, side, side), 4 * 3 * side * side), "fp32"
        yield Work(8 / 3 * side**3, 4 * 2 * side * side), "fp32"


def floors(parts: Iterator[Part]) -> float:
    """Least seconds of parts that come one after the other."""
    return sum(floor(work, operands) for work, operands in parts)


def spectral_kron(n: int, m: int, operands: str, interval: int) -> float:
    return floors(tracking(n, m, operands)) / interval + floors(stepping(n, m, operands))


def adamw(n: int, m: int, size: int) -> float:
    """Fused: the parameter and both moments are read and written, the gradient is read."""
    return floor(Work(0, 7 * size * n * m), "bf16")


# Least seconds of a step of one matrix.
STEPS: dict[str, Callable[[int, int], float]] = {
    f"SpectralKron {operands}, interval {interval}": partial(spectral_kron, operands=operands, interval=interval)
    for operands in ("bf16", "fp32")
    for interval in (1, 2, 10)
} | {
    "Muon bf16": lambda n, m: floors(muon(n, m, size=2)),
    "Muon fp32": lambda n, m: floors(muon(n, m, size=4)),
    "AdamW bf16": partial(adamw, size=2),
    "AdamW fp32": partial(adamw, size=4),
    "SOAP fp32": lambda n, m: floors(soap(n, m)),
    "forward and backward, bf16": lambda n, m: 6 * n * m * TOKENS / RATES["bf16"],
}


def step_floor(name: str, network: str) -> float:
    """Least seconds on an H200 of one optimizer's step of all hidden matrices of a network."""
    return sum(count * STEPS[name](n, m) for n, m, count in NETWORKS[network])


def step_table() -> list[list[str]]:
    rows = [[name, *(f"{1e3 * step_floor(name, network):.2f}" for network in NETWORKS)] for name in STEPS]
    return [["one step, ms", *NETWORKS], *rows]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m spectral_ops.bench model", description=__doc__.splitlines()[0])
    parser.parse_args(argv)
    header = ["operation", "n = m", "batch", "GFLOP", "eager", "ratio", "MB", "eager", "ratio"]
    header += [f"{label} us" for label in LABELS.values()]
    rows = [row(case, n, batch) for case in CASES.values() for n in SIZES for batch in BATCHES]
    print(output.table([header, *rows]))
    print(LEGEND)
    print(f"\n{output.table(step_table())}")
    print(STEP_LEGEND)
