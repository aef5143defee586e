"""One door to the GPU: every kernel of this package is launched here, so that launches can be counted and recorded."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from spectral_ops.kernels.config import INTERPRETER, Config, choose_config

Sides = tuple[Tensor | None, Tensor | None]  # of a Kronecker pair: left and right, None where a side has no matrix


@dataclass(frozen=True)
class Launch:
    """A kernel with its arguments: `programs` of them, each run by `config.warps` warps."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    config: Config

    @property
    def name(self) -> str:
        return str(self.kernel.__name__).strip("_")

    def run(self) -> None:
        self.kernel[(self.programs,)](**self.arguments, num_warps=self.config.warps, num_stages=self.config.stages)


_recorder: Callable[[Launch], None] | None = None
_assumed: tuple[int, int] | None = None


def launch(kernel: Any, programs: int, config: Config, **arguments: Any) -> None:
    """Run `programs` instances of a kernel: the grid is one-dimensional, since its other axes end at 65,535."""
    if programs:
        (_recorder or Launch.run)(Launch(kernel, programs, arguments, config))


@contextmanager
def recording(*, run: bool = True, assume: tuple[int, int] | None = None) -> Iterator[list[Launch]]:
    """Collect the launches made inside.

    With `run=False` nothing is launched and tensors may be on the meta device; `assume` is the capability that tiles are
    chosen for, whatever GPU there is.
    """
    global _recorder, _assumed
    before, launches = (_recorder, _assumed), []

    def record(item: Launch) -> None:
        launches.append(item)
        if run:
            (before[0] or Launch.run)(item)

    _recorder, _assumed = record, assume or _assumed
    try:
        yield launches
    finally:
        _recorder, _assumed = before


def sides(name: str, pair: Sides) -> dict[str, Any]:
    """The two arguments `name0`, `name1`. A kernel never looks at a side that is left out, but its pointer has a type."""
    left, right = pair
    return {f"{name}0": right if left is None else left, f"{name}1": left if right is None else right}


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def lower_tiles(n: int, block: int) -> int:
    """Tiles on and below the diagonal of an `n × n` matrix."""
    size = cdiv(n, block)
    return size * (size + 1) // 2


def precision(dtype: torch.dtype) -> str:
    """How float32 operands enter the tensor cores, as PyTorch's own setting asks: `torch.set_float32_matmul_precision`.

    "highest": not at all, float32 units. "high": as three products of bfloat16 halves, 16 bits. "medium": tf32, 11 bits.
    """
    if dtype != torch.float32:
        return "ieee"
    return {"highest": "ieee", "high": "bf16x3", "medium": "tf32"}[torch.get_float32_matmul_precision()]


def pick(op: str, n: int, k: int, batch: int, x: Tensor, *, split: bool = False, other: int = 0) -> Config | None:
    """`choose_config` for a product whose first operand is `x`; `split` if the second has 16 bits and `x` has not. `other` is a
    size of the operands beside `n` and `k`."""
    mixed = split and x.dtype == torch.float32
    return choose_config(
        op, n, k, batch, x.dtype, capability(x.device), precision="split" if mixed else precision(x.dtype),
        aligned=not any(size % 16 for size in (n, k, other)),
    )  # fmt: skip


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU (`TRITON_INTERPRET=1`)."""
    return bool(triton.knobs.runtime.interpret)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def capability(device: torch.device) -> tuple[int, int]:
    """Of the GPU that a tensor is on; what the interpreter counts as, elsewhere."""
    if _assumed is not None:
        return _assumed
    return _capability(device) if device.type == "cuda" else INTERPRETER
