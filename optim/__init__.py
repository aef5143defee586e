"""Optimizers. Each is one file, readable beside the paper it implements."""

from spectral_ops.optim._routing import ParamGroups, param_groups
from spectral_ops.optim.if_shampoo import IFShampoo
from spectral_ops.optim.kfac import KFAC
from spectral_ops.optim.kradagrad import KrADagrad, KrADagradStar
from spectral_ops.optim.rf_full_adagrad import RFFullAdaGrad
from spectral_ops.optim.rf_rmsprop import RFAdaGrad, RFRMSprop
from spectral_ops.optim.rf_shampoo import RFShampoo
from spectral_ops.optim.singd import IKFAC, INGD, SINGD
from spectral_ops.optim.spd import SPDResult, minimize_spd
from spectral_ops.optim.spectral_full import SpectralFull
from spectral_ops.optim.spectral_kron import SpectralKron
from spectral_ops.optim.spectral_nes import SpectralNES

__all__ = [
    "IKFAC",
    "INGD",
    "KFAC",
    "SINGD",
    "IFShampoo",
    "KrADagrad",
    "KrADagradStar",
    "ParamGroups",
    "RFAdaGrad",
    "RFFullAdaGrad",
    "RFRMSprop",
    "RFShampoo",
    "SPDResult",
    "SpectralFull",
    "SpectralKron",
    "SpectralNES",
    "minimize_spd",
    "param_groups",
]
