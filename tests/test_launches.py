"""What one optimizer step launches on a GPU, counted on a CPU: kernels, recorded but not run, and PyTorch's own operations."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from spectral_ops._library import KERNELS
from spectral_ops.kernels.launch import recording
from spectral_ops.optim import SpectralKron, param_groups

# These only make tensors: views, allocations. `item` is the learning rate's, which is a number on the host.
SILENT = {
    "view", "_unsafe_view", "reshape", "split", "split_with_sizes", "select", "slice", "alias", "detach", "unsqueeze",
    "squeeze", "as_strided", "transpose", "expand", "t", "permute", "narrow", "unbind", "empty", "empty_like", "empty_strided",
    "lift_fresh", "detach_", "_record_function_enter_new", "_record_function_exit",
    "flatten", "mT", "item",
}  # fmt: skip


class Counter(TorchDispatchMode):
    """PyTorch operations that launch something. Ops of this package run their kernels and are looked into."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().partition("::")[2].partition(".")[0]
        if func.namespace == "spectral_ops":
            with self:
                return KERNELS[name](*args)
        if name not in SILENT:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)


class GPT(nn.Module):
    def __init__(self, layers: int, width: int = 8):
        super().__init__()
        self.token_embedding = nn.Embedding(16, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)


def launches(layers: int, dtype: torch.dtype = torch.float32, **options) -> list[str]:
    """Of the third step: the state is there and its stacks are made."""
    model = GPT(layers).to(dtype)
    optimizer = SpectralKron(param_groups(model, lr=0.01, weight_decay=0.1), **options)
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        with Counter() as counter, recording(run=False) as kernels:
            optimizer.step()
    return [item.name for item in kernels] + counter.names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_of_a_gpt_takes_at_most_60_launches(dtype):
    assert len(launches(12, dtype)) <= 60


def test_launches_do_not_grow_with_layers():
    assert sorted(launches(1)) == sorted(launches(5))


class Reads(Counter):
    """Values that the host asks for, also inside the ops."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().partition("::")[2].partition(".")[0]
        if func.namespace != "spectral_ops" and name in ("item", "_local_scalar_dense", "nonzero", "equal"):
            self.names.append(name)
        elif func.namespace == "spectral_ops":
            with self:
                return KERNELS[name](*args)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01)])
def test_a_step_with_kernels_reads_no_value_on_the_host(lr):
    model = GPT(2)
    optimizer = SpectralKron(param_groups(model, lr=lr), capturable=True)
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        with Reads() as reads, recording(run=False):
            optimizer.step()
        assert not reads.names
    with Reads() as reads:
        torch.ones(()).item()
    assert reads.names


def test_steps_between_factor_updates_launch_less():
    model = nn.Linear(8, 6, bias=False)
    optimizer = SpectralKron(model.parameters(), update_interval=2)
    optimizer.param_groups[0]["step"] = 20  # past the first steps, in which factors are always updated
    counts = []
    for _ in range(6):
        model.weight.grad = torch.randn_like(model.weight)
        with Counter() as counter, recording(run=False) as kernels:
            optimizer.step()
        counts.append(len(kernels) + len(counter.names))
    assert counts[3] == counts[5] < counts[2] == counts[4]  # the first two make the state and the tables
