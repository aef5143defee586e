"""Train a language model over several processes with FSDP2, or HSDP, and SpectralKron.

torchrun --nproc-per-node=2 examples/fsdp2.py                                   # GPUs where there are enough, else the CPU
torchrun --nproc-per-node=4 examples/fsdp2.py --replicas 2                      # HSDP: two replicas of two shards
torchrun --nproc-per-node=2 examples/fsdp2.py --checkpoint DIR                  # saved at the end
torchrun --nproc-per-node=4 examples/fsdp2.py --checkpoint DIR --resume --steps 300    # with any number of processes
"""

import argparse
import datetime
import os

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from spectral_ops.bench.tasks import TEXT_PRESETS, Text, loss
from spectral_ops.optim import SpectralKron, param_groups

PRINTS = 10  # losses in a run


def train(options: argparse.Namespace, device: str) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    task = Text(options.preset, device=device)
    steps = options.steps or task.preset.steps

    torch.manual_seed(0)  # every rank makes the same model, of which it then keeps its part
    model = task.model()
    mesh = init_device_mesh(device, (options.replicas, world // options.replicas), mesh_dim_names=("replicate", "shard"))
    if options.replicas == 1:
        mesh = mesh["shard"]
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    groups = param_groups(model, lr=options.lr)
    optimizer = SpectralKron(groups)  # after fully_shard, which replaces the parameters

    done = load(options.checkpoint, model, optimizer) if options.resume else 0
    if rank == 0 and not done:
        print(groups, flush=True)
    for step in range(done + 1, steps + 1):
        x, y = task.batch(torch.Generator().manual_seed(step))  # the same one on all ranks
        value = loss(model, (x[rank::world], y[rank::world]))
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step in (1, steps) or step % max(1, steps // PRINTS) == 0:
            mean = value.detach() / world
            dist.all_reduce(mean)
            if rank == 0:
                print(f"step {step}  loss {mean.item():.6f}", flush=True)
    if options.checkpoint:
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": state, "step": steps}, checkpoint_id=options.checkpoint)


def load(folder: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Returns how many steps were made."""
    weights, state = get_state_dict(model, optimizer)
    saved = {"model": weights, "optimizer": state, "step": 0}
    dcp.load(saved, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
    return saved["step"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=TEXT_PRESETS, default="default", help="size of the model; default: default")
    parser.add_argument("--steps", type=int, metavar="N", help="default: the preset's")
    parser.add_argument("--lr", type=float, default=2e-2, help="default: 0.02")
    parser.add_argument("--replicas", type=int, default=1, metavar="R", help="HSDP over R replicas; default: 1")
    parser.add_argument("--checkpoint", metavar="DIR", help="save here at the end")
    parser.add_argument("--resume", action="store_true", help="start from the checkpoint")
    parser.add_argument("--timeout", type=float, default=600, metavar="SECONDS", help="of a lost rank; default: 600")
    options = parser.parse_args()
    if int(os.environ["WORLD_SIZE"]) % options.replicas:
        parser.error(f"--replicas {options.replicas} do not divide {os.environ['WORLD_SIZE']} processes")
    device = "cuda" if torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1")) else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=datetime.timedelta(seconds=options.timeout))
    train(options, device)
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads live on, and one that frees a tensor while the interpreter ends aborts the process
