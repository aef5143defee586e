"""Distributed checkpoints from two processes, each with the whole model: written together, and one process's for all.

Models that processes share are in `test_distributed_checkpoint.py`.
"""

import copy
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from spectral_ops.bench.optimizers import OPTIMIZERS


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for t in steps:
        generator = torch.Generator().manual_seed(t)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


def rank(number: int, port: int, folder: Path, full: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=number, world_size=2)
    try:
        for name, build in OPTIMIZERS.items():
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(9, 6), nn.Linear(6, 6))
            optimizer = build(model.parameters(), lr=0.05)
            train(model, optimizer, range(4))
            options = StateDictOptions(full_state_dict=full, cpu_offload=full)
            saved = get_optimizer_state_dict(model, optimizer, options=options)
            other = copy.deepcopy(model)
            second = build(other.parameters(), lr=0.05)
            if full:  # the first process has it, and sends it
                assert bool(saved) == (number == 0)
                options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
                set_optimizer_state_dict(other, second, saved, options=options)
            else:
                dcp.save({"optimizer": saved}, checkpoint_id=folder / name)
                loaded = {"optimizer": get_optimizer_state_dict(other, second, options=options)}
                dcp.load(loaded, checkpoint_id=folder / name)
                set_optimizer_state_dict(other, second, loaded["optimizer"], options=options)
            train(model, optimizer, range(4, 7))
            train(other, second, range(4, 7))
            for p, q in zip(model.parameters(), other.parameters(), strict=True):
                assert torch.equal(p, q), name
                for key, value in optimizer.state[p].items():
                    assert torch.equal(value, second.state[q][key]) and value.dtype == second.state[q][key].dtype, (name, key)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("full", [False, True])
def test_two_ranks_resume_bit_for_bit(full: bool, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.start_processes(rank, (port, tmp_path, full), nprocs=2, start_method="fork")
