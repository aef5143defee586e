"""The methods that are compared, each with AdamW on the parameters that are not hidden matrices."""

import runpy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spectral_ops import optim
from spectral_ops.optim import param_groups

Optimizers = list[torch.optim.Optimizer]
Params = list[nn.Parameter]
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"  # where this runs from a checkout
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
    groups = [{"params": hidden, "lr": lr}, *([{"params": rest, "lr": rest_lr}] if rest else [])]
    return [torch.optim.AdamW(groups, **(ADAMW | options))]


def _beside_adamw(make: Callable[..., torch.optim.Optimizer]) -> Callable[..., Optimizers]:
    """`make(model, parameters, lr, …)` for the hidden matrices and AdamW for the rest, if there is any."""

    def build(model: nn.Module, lr: float, rest_lr: float, **options: Any) -> Optimizers:
        hidden, rest = _split(model)
        adamw = [torch.optim.AdamW(rest, lr=rest_lr, **ADAMW)] if rest else []
        return [make(model, hidden, lr=lr, **options), *adamw]

    return build


# Of the others, each import is an optional extra's. Decay is 0 everywhere.


def _muon(model: nn.Module, params: Params, lr: float, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.Muon(params, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw", **options)


def _soap(model: nn.Module, params: Params, lr: float, **options: Any) -> torch.optim.Optimizer:
    from pytorch_optimizer import SOAP

    return SOAP(params, lr=lr, weight_decay=0.0, **({"precondition_frequency": 1} | options))


def _shampoo(model: nn.Module, params: Params, lr: float, **options: Any) -> torch.optim.Optimizer:
    from pytorch_optimizer import Shampoo

    return Shampoo(params, lr=lr, **options)


def _psgd_kron(model: nn.Module, params: Params, lr: float) -> torch.optim.Optimizer:
    from pytorch_optimizer import Kron

    return Kron(params, lr=lr, pre_conditioner_update_probability=1.0)


def _heavyball(model: nn.Module, params: Params, lr: float, name: str, **options: Any) -> torch.optim.Optimizer:
    import heavyball

    # Its compilation is for GPUs; here it would take minutes.
    heavyball.utils.compile_mode = heavyball.utils.compile_mode_recommended_to_none = None
    return getattr(heavyball, name)(params, lr=lr, weight_decay=0.0, compile_step=False, **options)


def _sirfshampoo(model: nn.Module, params: Params, lr: float) -> torch.optim.Optimizer:
    from sirfshampoo import SIRFShampoo

    return SIRFShampoo(model, params=params, lr=lr, batch_size=1)


def _singd(model: nn.Module, params: Params, lr: float, **options: Any) -> torch.optim.Optimizer:
    from singd.optim.optimizer import SINGD

    return SINGD(model, params=params, lr=lr, **options)


def _example(file: str, name: str) -> Callable[..., Optimizers]:
    """An optimizer of examples/ that is made of the package's ops."""

    def make(model: nn.Module, params: Params, lr: float, **options: Any) -> torch.optim.Optimizer:
        kind = runpy.run_path(str(EXAMPLES / file), run_name="spectral_ops.examples")[name]
        optimizer: torch.optim.Optimizer = kind(params, lr=lr, weight_decay=0.0, **options)
        return optimizer

    return _beside_adamw(make)


def _ours(name: str, **fixed: Any) -> Callable[..., Optimizers]:
    """An optimizer of this package, with AdamW inside for the rest."""

    def build(model: nn.Module, lr: float | None = None, rest_lr: float | None = None, **options: Any) -> Optimizers:
        groups = param_groups(model) if lr is None else param_groups(model, lr, rest_lr)
        return [getattr(optim, name)(groups, **(fixed | options))]

    return build


def _by_layer(name: str, **fixed: Any) -> Callable[..., Optimizers]:
    """One that watches the layers of the model: all of them are its matrices."""

    def build(model: nn.Module, lr: float = 1e-3, rest_lr: float = 1e-3, **options: Any) -> Optimizers:
        return [getattr(optim, name)(model, lr=lr, adamw_lr=rest_lr, **(fixed | options))]

    return build


# Of SINGD, IKFAC and KFAC, what the search leaves as it is.
SINGD_SETTINGS: dict[str, Any] = {"update_scale": "rms", "update_interval": 2}
HIERARCHICAL = ("hierarchical15_15", "hierarchical15_15")


def left_out(name: str, error: ModuleNotFoundError) -> str:
    """What is said of a method whose package is not there."""
    return f"{name} is left out: {error.name} is not installed (pip install 'spectral-ops[bench]')"


BUILDERS: dict[str, Callable[..., Optimizers]] = {
    "adamw": _adamw,
    "muon": _beside_adamw(_muon),
    "soap": _beside_adamw(_soap),
    "soap_heavyball": _beside_adamw(partial(_heavyball, name="SOAP", precondition_frequency=1)),
    "shampoo": _beside_adamw(_shampoo),
    "psgd_kron": _beside_adamw(_psgd_kron),
    "psgd_kron_heavyball": _beside_adamw(partial(_heavyball, name="PSGDKron", preconditioner_update_probability=1.0)),
    "sirfshampoo": _beside_adamw(_sirfshampoo),
    "singd": _beside_adamw(_singd),
    "soap_tracked": _example("soap_tracked.py", "TrackedSOAP"),
    "muon_gram": _example("muon_gram.py", "MuonGram"),
    "kl_shampoo": _example("kl_shampoo.py", "KLShampoo"),
    "spectral_kron": _ours("SpectralKron"),
    "spectral_kron_bf16": _ours("SpectralKron", preconditioner_dtype=torch.bfloat16),
    "spectral_kron_interval_2": _ours("SpectralKron", update_interval=2),
    "if_shampoo": _ours("IFShampoo"),
    "if_shampoo_bf16": _ours("IFShampoo", preconditioner_dtype=torch.bfloat16),
    "rf_shampoo": _ours("RFShampoo"),
    "rf_rmsprop": _ours("RFRMSprop", batch_size=1e4),
    "rf_adagrad": _ours("RFAdaGrad", batch_size=1e4),
    "rf_full_adagrad": _ours("RFFullAdaGrad", max_preconditioner_dim=1024),
    **{
        f"{name}{suffix}": _by_layer(algorithm, **SINGD_SETTINGS, **fixed, **dtype)
        for suffix, dtype in (("", {}), ("_bf16", {"preconditioner_dtype": torch.bfloat16}))
        for name, algorithm, fixed in (
            ("singd_dense", "SINGD", {}),
            ("singd_hierarchical", "SINGD", {"structures": HIERARCHICAL}),
            ("singd_diagonal", "SINGD", {"structures": ("diagonal", "diagonal")}),
            ("ikfac", "IKFAC", {}),
            ("kfac", "KFAC", {}),
        )
    },
    "kradagrad": _ours("KrADagrad"),
    "kradagrad_star": _ours("KrADagradStar"),
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
    "kl_shampoo": {
        "lr": [2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2],
        "betas": [(0.95, 0.9), (0.9, 0.9), (0.9, 0.7)],
        "rest_lr": [3e-3, 1e-3, 1e-2, 2e-2],
        "refine": [1.0, 0.7, 1.4],
    },
    "spectral_kron": {
        "lr": [3.75e-3, 7.5e-3, 1.5e-2, 3e-2, 6e-2],
        "betas": [(0.9, 0.5), (0.95, 0.5), (0.9, 0.75)],
        "rest_lr": [1.5e-2, 3e-3, 1e-2, 2e-2],
        "refine": [1.0, 0.7, 1.4],
    },
    "if_shampoo": {
        "lr": [5e-3, 1e-2, 2e-2, 4e-2, 8e-2],
        "damping": [1e-3, 1e-2, 1e-1],
        "rest_lr": [3e-3, 1e-3, 1e-2, 2e-2],
        "refine": [1.0, 0.7, 1.4],
    },
    "rf_rmsprop": {
        "lr": [2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2],
        "batch_size": [1e4, 1e3, 1e5],
        "rest_lr": [3e-3, 1e-3, 1e-2, 2e-2],
        "refine": [1.0, 0.7, 1.4],
    },
}
SPACE["soap_tracked"] = SPACE["soap"]
for _name in ("singd_dense_bf16", "singd_hierarchical_bf16"):
    SPACE[_name] = {
        "lr": [1.25e-3, 2.5e-3, 5e-3, 1e-2, 2e-2],
        "kfac_approx": ["reduce", "expand"],
        "preconditioner_lr": [0.6, 0.3, 1.0],
        "rest_lr": [1e-2, 3e-3, 2e-2],
        "refine": [1.0, 0.7, 1.4],
    }
LR_FACTORS = {"digits-conv": 4.0}  # of all methods' grids: a small net with no normalization takes larger steps


def space(task: str, name: str) -> dict[str, list[Any]]:
    """The search space of a method on a task."""
    return SPACE[name] | {"lr": [LR_FACTORS.get(task, 1.0) * lr for lr in SPACE[name]["lr"]]}


# What the search chose on each task. SpectralKron is not tuned: the comparison runs its defaults, the same on both.
TUNED: dict[tuple[str, str], dict[str, Any]] = {
    ("text", "adamw"): {"lr": 0.002, "betas": (0.9, 0.95), "rest_lr": 0.02, "refine": 0.7},
    ("text", "muon"): {"lr": 0.02, "momentum": 0.8, "rest_lr": 0.02, "refine": 1.4},
    ("text", "soap"): {"lr": 0.01, "betas": (0.9, 0.9), "rest_lr": 0.003},
    ("text", "soap_tracked"): {"lr": 0.01, "betas": (0.9, 0.9), "rest_lr": 0.003, "refine": 1.4},
    ("text", "kl_shampoo"): {"lr": 0.02, "betas": (0.9, 0.7), "rest_lr": 0.02},
    ("text", "if_shampoo"): {"lr": 0.04, "rest_lr": 0.003},
    ("text", "rf_rmsprop"): {"lr": 0.01, "rest_lr": 0.01, "refine": 1.4},
    ("digits", "adamw"): {"lr": 0.002, "betas": (0.9, 0.99), "rest_lr": 0.02, "refine": 0.7},
    ("digits", "muon"): {"lr": 0.02, "momentum": 0.8, "rest_lr": 0.02},
    ("digits", "soap"): {"lr": 0.01, "betas": (0.9, 0.9), "rest_lr": 0.02, "refine": 1.4},
    ("digits", "soap_tracked"): {"lr": 0.01, "betas": (0.9, 0.9), "rest_lr": 0.02},
    ("digits", "kl_shampoo"): {"lr": 0.01, "betas": (0.9, 0.7), "rest_lr": 0.01},
    ("digits", "if_shampoo"): {"lr": 0.04, "rest_lr": 0.02},
    ("digits", "rf_rmsprop"): {"lr": 0.0025, "rest_lr": 0.02, "refine": 1.4},
    ("digits", "singd_dense_bf16"): {
        "lr": 0.005,
        "kfac_approx": "reduce",
        "preconditioner_lr": 1.0,
        "rest_lr": 0.02,
        "refine": 0.7,
    },
    ("digits", "singd_hierarchical_bf16"): {
        "lr": 0.005,
        "kfac_approx": "reduce",
        "preconditioner_lr": 1.0,
        "rest_lr": 0.02,
    },
    ("digits-conv", "adamw"): {"lr": 0.032, "betas": (0.9, 0.99), "rest_lr": 0.003},
    ("digits-conv", "singd_dense_bf16"): {
        "lr": 0.02,
        "kfac_approx": "expand",
        "preconditioner_lr": 0.3,
        "rest_lr": 0.01,
    },
    ("digits-conv", "singd_hierarchical_bf16"): {
        "lr": 0.02,
        "kfac_approx": "expand",
        "preconditioner_lr": 0.3,
        "rest_lr": 0.01,
    },
}
for _task in ("text", "digits"):
    TUNED[_task, "muon_gram"] = TUNED[_task, "muon"]
# What has no search of its own takes what was chosen for SINGD in bf16; the moving average of KFAC has weights below 1.
for _task in ("digits", "digits-conv"):
    TUNED[_task, "singd_hierarchical"] = TUNED[_task, "singd_hierarchical_bf16"]
    _chosen = TUNED[_task, "singd_dense_bf16"]
    for _name in ("singd_dense", "singd_diagonal", "singd_diagonal_bf16"):
        TUNED[_task, _name] = _chosen
    for _name in ("ikfac", "ikfac_bf16", "kfac", "kfac_bf16"):
        TUNED[_task, _name] = _chosen | {"preconditioner_lr": min(_chosen["preconditioner_lr"], 0.6)}


def tuned(task: str, name: str) -> Method:
    """The method as it enters the comparison on a task."""
    return method(name, **TUNED.get((task, name), {}))
