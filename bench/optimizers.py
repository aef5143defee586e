"""Every optimizer of the package in every kind of state it has: what the contract's tests and the fault table go through."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from spectral_ops.optim import (
    IKFAC,
    INGD,
    KFAC,
    IFShampoo,
    KrADagrad,
    KrADagradStar,
    RFAdaGrad,
    RFFullAdaGrad,
    RFRMSprop,
    RFShampoo,
    SpectralFull,
    SpectralKron,
)
from spectral_ops.optim._engine import MatrixOptimizer
from spectral_ops.optim._layerwise import LayerOptimizer

Build = Callable[..., MatrixOptimizer]  # of parameters, or groups of them, and options


def _elementwise(params: Any, **options: Any) -> MatrixOptimizer:
    """The AdamW inside the matrix optimizers, for every parameter."""
    if isinstance(params, torch.Tensor):
        return SpectralKron(params, **options)  # which is an error
    groups = list(params)
    if not isinstance(groups[0], dict):
        groups = [{"params": groups}]
    return SpectralKron([group | {"algorithm": "adamw"} for group in groups], **options)


def _with(optimizer: type[MatrixOptimizer], **fixed: Any) -> Build:
    return lambda params, **options: optimizer(params, **(fixed | options))


class _Carried(LayerOptimizer):
    """An optimizer of layers for parameters without a model: layers that are never called carry them, and their gradients are
    taken for what passes through these."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict) and isinstance(param_group.get("params"), list):
            self._carry(param_group["params"])
        super().add_param_group(param_group)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._carry(group["params"])  # which may have been replaced
        self._refresh()
        for p, layer in self._layers.items():
            if layer is not None and p.grad is not None and p.numel() and p.grad.layout == torch.strided:
                g, scale = p.grad.flatten(1), getattr(self, "grad_scale", None)
                self.observe(p, g if scale is None else g / scale, g.mT)
        LayerOptimizer.step(self)  # torch has made a class's own one run the hooks, which this one did
        return loss

    def _carry(self, params: list[Any]) -> None:
        held = {id(module.weight) for module in self.model.children()}
        for p in params:
            p = p[1] if isinstance(p, tuple) else p
            if isinstance(p, Tensor) and p.ndim in LAYERS and id(p) not in held:
                layer = LAYERS[p.ndim](*(1, 1) if p.ndim == 2 else (1, 1, 1), bias=False)
                layer._parameters["weight"] = p
                self.model.append(layer)  # type: ignore[operator]
        self._watch()


LAYERS = {2: nn.Linear, 3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


def _carried(optimizer: type[LayerOptimizer], **fixed: Any) -> Build:
    name = f"_{optimizer.__name__}"  # where pickle finds it
    kind = globals().setdefault(name, type(name, (_Carried, optimizer), {"__module__": __name__}))

    def build(params: Any, **options: Any) -> MatrixOptimizer:
        if isinstance(params, Tensor | dict | set):
            return kind(nn.ModuleList(), params, **(fixed | options))  # which is an error
        groups = list(params)
        if not groups or not isinstance(groups[0], dict):
            groups = [{"params": groups}]
        return kind(nn.ModuleList(), [{"algorithm": None} | group for group in groups], **(fixed | options))

    return build


# One matrix for each parameter: those of one matrix for a group depend on each other, see tests/test_spectral_full.py. Some
# tests have models with parameters of thousands of elements, whose cubes would take minutes.
EACH: dict[str, Any] = {"joint": False, "max_preconditioner_dim": 256}
RIEMANNIAN: dict[str, Any] = {"rotation": "riemannian", "betas": (0.9, 0.95)}
OPTIMIZERS: dict[str, Build] = {
    "SpectralKron": _with(SpectralKron),
    "SpectralKron bf16": _with(SpectralKron, preconditioner_dtype=torch.bfloat16),
    "SpectralKron interval": _with(SpectralKron, update_interval=3),
    "SpectralKron graft": _with(SpectralKron, update_scale="graft", carry_residual=False),
    "SpectralKron riemannian": _with(SpectralKron, **RIEMANNIAN, cayley_order=4),
    "SpectralKron paper": _with(SpectralKron, **RIEMANNIAN, update_scale=None),
    "AdamW inside": _elementwise,
    "IFShampoo": _with(IFShampoo),
    "IFShampoo bf16": _with(IFShampoo, preconditioner_dtype=torch.bfloat16, update_interval=2),
    "IFShampoo paper": _with(IFShampoo, update_scale=None, momentum=0.5),
    "RFShampoo": _with(RFShampoo),
    "RFFullAdaGrad": _with(RFFullAdaGrad, max_preconditioner_dim=256),
    "RFRMSprop": _with(RFRMSprop),
    "RFAdaGrad": _with(RFAdaGrad),
    "KrADagradStar": _with(KrADagradStar),
    "KrADagrad": _with(KrADagrad),
    "INGD bf16": _carried(INGD, preconditioner_dtype=torch.bfloat16, update_scale="rms", update_interval=1),
    "IKFAC": _carried(IKFAC, structures=("triltoeplitz", "rank2triu"), update_interval=1),
    "KFAC": _carried(KFAC, update_interval=1),
    "SpectralFull": _with(SpectralFull, **EACH),
    "SpectralFull paper": _with(SpectralFull, **EACH, rotation="riemannian", update_scale=None),
    "SpectralFull diagonal": _with(SpectralFull, **EACH, diagonal=True, update_scale=None),
}
