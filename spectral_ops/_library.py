"""Registration of ops: a schema, the reference implementation for every device, a shape function for tracing, kernels.

The low-level `Library` interface costs 2 µs a call where `torch.library.custom_op` costs 8 to 10.
"""

import functools
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., Any]
HAS_TRITON = importlib.util.find_spec("triton") is not None
# What runs on a GPU, by the name of the op. Importing it imports Triton: each function does that in its first call.
KERNELS: dict[str, Function] = {}
_use_kernels = True

_library = torch.library.Library("spectral_ops", "DEF")


def define(schema: str, implementation: Function, fake: Function, kernel: Function | None = None) -> Any:
    """Register `schema` and return the op.

    Args:
        implementation: the op in plain PyTorch, for every device.
        fake: makes empty results, for tracing.
        kernel: the op on a GPU. It may return NotImplemented, for arguments with which the implementation is faster or
            which it does not serve; float64 always goes to the implementation.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"spectral_ops::{name}", fake, lib=_library)
    if kernel is not None and HAS_TRITON:
        KERNELS[name] = _with_fallback(kernel, implementation)
        _library.impl(name, KERNELS[name], "CUDA")
    return getattr(torch.ops.spectral_ops, name).default


@contextmanager
def without_kernels() -> Iterator[None]:
    """Every op takes its plain PyTorch implementation, also on a GPU: to measure the kernels against it."""
    global _use_kernels
    before, _use_kernels = _use_kernels, False
    try:
        yield
    finally:
        _use_kernels = before


def _with_fallback(kernel: Function, implementation: Function) -> Function:
    @functools.wraps(kernel)
    def run(*args: Any) -> Any:
        first = _first_tensor(args)
        if first.dtype == torch.float64 or not _use_kernels:
            return implementation(*args)
        with torch.cuda.device_of(first):
            result = kernel(*args)
        return implementation(*args) if result is NotImplemented else result

    return run


def _first_tensor(args: tuple[Any, ...]) -> Tensor:
    for x in args:
        if isinstance(x, Tensor):
            return x
        if isinstance(x, list | tuple) and x and isinstance(x[0], Tensor):
            return x[0]
    raise TypeError("an op without a tensor")
