"""Which tile a kernel gets: a pure function of the shape, the dtype and the GPU, so that it can be tested without one.

The tables stand in `configs/sm_<capability>.json`, each with its provenance. An entry names the ops and operands it is for
and the largest `n` it serves; the first that fits is taken. `"block": null` means that the plain PyTorch composition is
faster there. `python -m spectral_ops.bench tune` writes a table from measurements.

Operands are "16" (bfloat16 or float16), "split" (float32 with 16-bit, as two products), and for float32 "ieee", "bf16x3"
and "tf32".
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "configs"
TABLES = (80, 90, 100)
INTERPRETER = (0, 0)  # the capability that stands for Triton's interpreter


@dataclass(frozen=True)
class Config:
    """Tiles of `block × block` results, products cut into pieces of `k`, `warps` a program, `stages` of the pipeline."""

    block: int
    k: int
    warps: int
    stages: int


# Of matrices whose rows begin anywhere, elements are loaded one by one, which takes registers: more threads for a tile.
UNALIGNED = Config(64, 32, 8, 2)


@cache
def choose_config(
    op: str,
    n: int,
    k: int,
    batch: int,
    dtype: torch.dtype,
    capability: tuple[int, int],
    *,
    precision: str = "ieee",
    aligned: bool = True,
) -> Config | None:
    """The tile for `batch` results of about `n × n` with inner size `k`; None: leave it to PyTorch.

    Args:
        op: name of a kernel with a product in it, such as "gram".
        n: the smaller side of the result.
        k: the inner size of the product.
        batch: number of matrices.
        dtype: of the operands.
        capability: of the GPU, such as (9, 0); (0, 0) for the interpreter.
        precision: of float32 operands, "ieee", "bf16x3" or "tf32", or "split" where the other operand has 16 bits.
        aligned: whether all sizes of the operands are multiples of 16.
    """
    if capability == INTERPRETER:
        return Config(32, 32, 4, 1)
    operand = "16" if dtype in (torch.bfloat16, torch.float16) else precision
    for entry in table(capability)["entries"]:
        fits = (
            op in entry["ops"]
            and operand in entry["operands"]
            and (entry["max_n"] is None or n <= entry["max_n"])
            and batch >= entry.get("min_batch", 1)
        )
        if fits and entry["block"] is None:
            return None
        if fits:
            config = Config(*(entry[name] for name in ("block", "k", "warps", "stages")))
            return config if aligned or config.block < UNALIGNED.block else UNALIGNED
    return None


def table(capability: tuple[int, int]) -> dict[str, Any]:
    """The table for a GPU: its own, if it was measured, or its kind's. Those with 100 KB of shared memory (8.6, 8.9, 12.x)
    share that of 8.0."""
    major, minor = capability
    number = 10 * major + minor
    if _path(number).exists():
        return load(number)
    return load(80 if number < 90 or major == 12 else max(t for t in TABLES if t <= number))


@cache
def load(number: int) -> dict[str, Any]:
    return dict(json.loads(_path(number).read_text()))


def _path(number: int) -> Path:
    return FOLDER / f"sm_{number}.json"
