"""Optimizers. Each is one file, readable beside the paper it implements."""

from spectral_ops.optim._routing import ParamGroups, param_groups
from spectral_ops.optim.spectral_kron import SpectralKron

__all__ = ["ParamGroups", "SpectralKron", "param_groups"]
