"""Compile kernels ahead of time for GPUs that need not be there, and read what the compiler made of them."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from spectral_ops.kernels.launch import Launch

TYPES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16",
    torch.int64: "i64", torch.int32: "i32", torch.bool: "i1",
}  # fmt: skip


@dataclass(frozen=True)
class Resources:
    registers: int
    spills: int  # bytes of local memory a thread
    shared: int  # bytes a program
    tensor_core: str  # instruction
    tensor_core_count: int
    vector_stores: int
    scalar_stores: int
    fp64: int


def compiled(item: Launch, capability: int) -> Any:
    signature, constants, attributes = {}, {}, {}
    for position, name in enumerate(item.kernel.arg_names):
        value = item.arguments[name]
        if item.kernel.params[position].is_constexpr or value is None or (type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    source = ASTSource(item.kernel, signature, constants, attributes)
    options = {"num_warps": item.config.warps, "num_stages": item.config.stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(item: Launch, capability: int) -> Resources:
    kernel = compiled(item, capability)
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
    return Resources(
        usage["REG"], usage["STACK"] + usage["LOCAL"], kernel.metadata.shared, best if counts[best] else "-", counts[best],
        wide, len(stores) - wide, len(re.findall(r"\.f64", ptx)),
    )  # fmt: skip
