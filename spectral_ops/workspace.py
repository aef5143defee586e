"""Memory on a CPU for intermediate results, that stays: the page faults of new memory cost more than what is computed in it."""

import math
import threading

import torch
from torch import Tensor

LARGE = 2**17  # elements; smaller buffers come from memory that the process has anyway


class Workspace(threading.local):
    """Memory that a thread keeps between calls: as much as was asked for at most. Whoever asks next overwrites it."""

    def __init__(self) -> None:
        self.memory = torch.empty(0, device="cpu")

    def tensors(self, count: int, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
        size = count * math.prod(shape)
        if self.memory.dtype != dtype or len(self.memory) < size:
            self.memory = torch.empty(size, dtype=dtype, device="cpu")
        return list(self.memory[:size].view(count, *shape))


def serves(x: Tensor, least: int = LARGE) -> bool:
    """Whether a tensor like this is worth it: large, on a CPU, and no stand-in that a compiler works with."""
    return type(x) is Tensor and x.device.type == "cpu" and x.numel() > least and not torch.compiler.is_compiling()
