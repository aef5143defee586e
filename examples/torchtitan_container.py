"""Train a small language model of two pipeline parts with SpectralKron in a container of optimizers as torchtitan has it.

python examples/torchtitan_container.py
python examples/torchtitan_container.py --output DIR --resume     # from the checkpoint in DIR

In torchtitan itself (0.3) the class is given a name, which a `ParamGroupConfig` then uses as `optimizer_name`:

    class Container(OptimizersContainer):
        @staticmethod
        def _resolve_optimizer_factory(name):
            return SpectralKron if name == "SpectralKron" else OptimizersContainer._resolve_optimizer_factory(name)
"""

import argparse
import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.stateful import Stateful
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from spectral_ops.bench.tasks import Text, loss
from spectral_ops.bench.training import cosine
from spectral_ops.optim import SpectralKron

# --8<-- [start:groups]
# Patterns of parameters' names, the first that fits counts, and options.
GROUPS = [
    (r"embedding|head|norm", {"algorithm": "adamw", "lr": 2e-2}),
    (r".*", {"algorithm": "matrix", "lr": 2e-2, "weight_decay": 0.1}),
]
# --8<-- [end:groups]
MEMBERS = ("params", "param_names")  # of a group; all else are options


class Container(Optimizer, Stateful):
    """One SpectralKron for each part of a model. Its state is flat, by names of parameters: parts may be cut otherwise."""

    def __init__(self, parts: Sequence[nn.Module], fused: bool = True):
        self.optimizers = [SpectralKron(self._groups(part, fused)) for part in parts]
        super().__init__([p for part in parts for p in part.parameters()], {})  # for hooks of steps

    @staticmethod
    def _groups(part: nn.Module, fused: bool) -> list[dict[str, Any]]:
        """Every group carries names, and how torch's own optimizers are to be implemented, which ours ignores."""
        groups: list[dict[str, Any]] = [
            {"params": [], "param_names": [], "fused": fused, "foreach": not fused} | options for _, options in GROUPS
        ]
        for name, parameter in part.named_parameters():
            group = next(group for group, (pattern, _) in zip(groups, GROUPS, strict=True) if re.search(pattern, name))
            group["params"].append(parameter)
            group["param_names"].append(name)
        return [group for group in groups if group["params"]]

    def step(self, closure: None = None) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        flat = {}
        for optimizer in self.optimizers:
            make_state(optimizer)
            state = optimizer.state_dict()
            for group in state["param_groups"]:
                for number, name in zip(group["params"], group["param_names"], strict=True):
                    flat |= {f"state.{name}.{key}": x for key, x in state["state"][number].items()}
                    flat |= {f"param_groups.{name}.{key}": x for key, x in group.items() if key not in MEMBERS}
        return flat

    def load_state_dict(self, flat: dict[str, Any]) -> None:
        for optimizer in self.optimizers:
            make_state(optimizer)
            state = optimizer.state_dict()
            for group in state["param_groups"]:
                for number, name in zip(group["params"], group["param_names"], strict=True):
                    state["state"][number] = {key: flat[f"state.{name}.{key}"] for key in state["state"][number]}
                name = group["param_names"][0]
                group |= {key: flat[f"param_groups.{name}.{key}"] for key in group if key not in MEMBERS}
            optimizer.load_state_dict(state)


def make_state(optimizer: Optimizer) -> None:
    """A step of zero gradients with a learning rate of zero, which changes no parameter."""
    if optimizer.state:
        return
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def main(argv: Sequence[str] | None = None) -> nn.Module:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, metavar="N", help="default: 100")
    parser.add_argument("--output", default="out/torchtitan", metavar="DIR", help="default: out/torchtitan")
    parser.add_argument("--save-at", type=int, metavar="N", help="after so many steps; default: at the end")
    parser.add_argument("--resume", action="store_true", help="from the checkpoint in the output folder")
    options = parser.parse_args(argv)
    options.save_at = options.save_at or options.steps

    torch.manual_seed(0)
    task = Text("tiny")
    model = task.model()
    parts = [nn.Module(), nn.Module()]
    for name, module in model.named_children():
        parts["embedding" not in name].add_module(name, module)
    container = Container(parts)

    schedulers = [LambdaLR(optimizer, lambda step: cosine(step, options.steps)) for optimizer in container.optimizers]

    saved: dict[str, Any] = {"model": model.state_dict(), "optimizer": container, "step": 0}
    if options.resume:
        dcp.load(saved, checkpoint_id=options.output)
        model.load_state_dict(saved["model"])
        for scheduler in schedulers:
            scheduler.last_epoch = saved["step"]  # whose learning rates are in the groups
    for step in range(schedulers[0].last_epoch, options.steps):
        value = loss(model, task.batch(torch.Generator().manual_seed(step)))
        value.backward()
        container.step()
        container.zero_grad()
        for scheduler in schedulers:
            scheduler.step()
        print(f"step {step + 1}  loss {value.item():.6f}")
        if step + 1 == options.save_at:
            dcp.save(saved | {"step": step + 1}, checkpoint_id=options.output)
    return model


if __name__ == "__main__":
    main()
