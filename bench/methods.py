"""The methods that are compared, each with AdamW on the parameters that are not hidden matrices."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from spectral_ops.optim import SpectralKron, param_groups

Optimizers = list[torch.optim.Optimizer]
ADAMW: dict[str, Any] = {"betas": (0.9, 0.95), "weight_decay": 0.0, "fused": True}


@dataclass(frozen=True)
class Method:
    name: str
    build: Callable[[nn.Module], Optimizers]


def _split(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    groups = param_groups(model, lr=0.0)
    hidden = [p for g in groups if g["algorithm"] == "matrix" for p in g["params"]]
    rest = [p for g in groups if g["algorithm"] != "matrix" for p in g["params"]]
    return hidden, rest


def _adamw(model: nn.Module, lr: float, rest_lr: float, **options: Any) -> Optimizers:
    hidden, rest = _split(model)
    groups = [{"params": hidden, "lr": lr}, {"params": rest, "lr": rest_lr}]
    return [torch.optim.AdamW(groups, **(ADAMW | options))]


def _muon(model: nn.Module, lr: float, rest_lr: float, **options: Any) -> Optimizers:
    hidden, rest = _split(model)
    muon = torch.optim.Muon(hidden, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw", **options)
    return [muon, torch.optim.AdamW(rest, lr=rest_lr, **ADAMW)]


def _soap(model: nn.Module, lr: float, rest_lr: float, **options: Any) -> Optimizers:
    from pytorch_optimizer import SOAP  # an optional extra

    hidden, rest = _split(model)
    soap = SOAP(hidden, lr=lr, weight_decay=0.0, precondition_frequency=1, **options)
    return [soap, torch.optim.AdamW(rest, lr=rest_lr, **ADAMW)]


def _spectral_kron(model: nn.Module, lr: float | None = None, rest_lr: float | None = None, **options: Any) -> Optimizers:
    groups = param_groups(model) if lr is None else param_groups(model, lr, rest_lr)
    return [SpectralKron(groups, **options)]


BUILDERS: dict[str, Callable[..., Optimizers]] = {
    "adamw": _adamw,
    "muon": _muon,
    "soap": _soap,
    "spectral_kron": _spectral_kron,
    "spectral_kron_bf16": partial(_spectral_kron, preconditioner_dtype=torch.bfloat16),
}


def method(name: str, refine: float = 1.0, **options: Any) -> Method:
    """A method by its name, its options, and a factor on `lr`."""
    if refine != 1.0:
        options["lr"] *= refine
    return Method(name, lambda model: BUILDERS[name](model, **options))


# The search space, one coordinate after the other in this order. The first value of a coordinate is the start; of `lr`,
# all values are tried. `refine` multiplies the chosen `lr`. Every method has 12 trials on each task.
SPACE: dict[str, dict[str, list[Any]]] = {
    "adamw": {
        "lr": [5e-4, 1e-3, 2e-3, 4e-3, 8e-3],
        "betas": [(0.9, 0.95), (0.9, 0.99), (0.95, 0.95)],
        "rest_lr": [3e-3, 1e-3, 1e-2, 2e-2],
        "refine": [1.0, 0.7, 1.4],
    },
    "muon": {
        "lr": [5e-3, 1e-2, 2e-2, 4e-2, 8e-2],
        "momentum": [0.95, 0.9, 0.8],
        "rest_lr": [3e-3, 1e-3, 1e-2, 2e-2],
        "refine": [1.0, 0.7, 1.4],
    },
    "soap": {
        "lr": [2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2],
        "betas": [(0.95, 0.95), (0.9, 0.95), (0.9, 0.9)],
        "rest_lr": [3e-3, 1e-3, 1e-2, 2e-2],
        "refine": [1.0, 0.7, 1.4],
    },
    "spectral_kron": {
        "lr": [3.75e-3, 7.5e-3, 1.5e-2, 3e-2, 6e-2],
        "betas": [(0.9, 0.5), (0.95, 0.5), (0.9, 0.75)],
        "rest_lr": [1.5e-2, 3e-3, 1e-2, 2e-2],
        "refine": [1.0, 0.7, 1.4],
    },
}

# What the search chose on each task. SpectralKron is not tuned: the comparison runs its defaults, the same on both.
TUNED: dict[tuple[str, str], dict[str, Any]] = {
    ("text", "adamw"): {"lr": 0.002, "betas": (0.9, 0.95), "rest_lr": 0.02, "refine": 0.7},
    ("text", "muon"): {"lr": 0.02, "momentum": 0.8, "rest_lr": 0.02, "refine": 1.4},
    ("text", "soap"): {"lr": 0.01, "betas": (0.9, 0.9), "rest_lr": 0.003},
    ("digits", "adamw"): {"lr": 0.002, "betas": (0.9, 0.99), "rest_lr": 0.02, "refine": 0.7},
    ("digits", "muon"): {"lr": 0.02, "momentum": 0.8, "rest_lr": 0.02},
    ("digits", "soap"): {"lr": 0.01, "betas": (0.9, 0.9), "rest_lr": 0.02, "refine": 1.4},
}


def tuned(task: str, name: str) -> Method:
    """The method as it enters the comparison on a task."""
    return method(name, **TUNED.get((task, name), {}))
