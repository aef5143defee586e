"""Every optimizer of the package in every kind of state it has: what the contract's tests and the fault table go through."""

from collections.abc import Callable
from typing import Any

import torch

from spectral_ops.optim import (
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
    "IFShampoo bf16": _with(IFShampoo, preconditioner_dtype=torch.bfloat16, update_interval=3),
    "IFShampoo paper": _with(IFShampoo, update_scale=None, momentum=0.5),
    "RFShampoo": _with(RFShampoo),
    "RFFullAdaGrad": _with(RFFullAdaGrad),
    "RFRMSprop": _with(RFRMSprop),
    "RFAdaGrad": _with(RFAdaGrad),
    "KrADagradStar": _with(KrADagradStar),
    "KrADagrad": _with(KrADagrad),
    "SpectralFull": _with(SpectralFull, **EACH),
    "SpectralFull paper": _with(SpectralFull, **EACH, rotation="riemannian", update_scale=None),
    "SpectralFull diagonal": _with(SpectralFull, **EACH, diagonal=True, update_scale=None),
}
