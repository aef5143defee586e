"""Kronecker and spectral preconditioning without eigendecomposition, QR or inverse.

The ops are thin: checked arguments, any batch, CPU and CUDA. Each is also an op of `torch.ops.spectral_ops`. The
optimizers built on them are in `spectral_ops.optim`. `SpectralFactor` and `KroneckerFactor` are curvature as an object.
"""

from spectral_ops.cayley import cayley, cayley_truncated, cayley_update
from spectral_ops.diagonal import diagonal_update
from spectral_ops.factor import factor_update
from spectral_ops.factors import KroneckerFactor, SpectralFactor
from spectral_ops.gram import gram
from spectral_ops.inverse_free import inverse_free_update
from spectral_ops.kron import kron_track
from spectral_ops.root import apply_root
from spectral_ops.rounding import stochastic_round
from spectral_ops.skew import gram_skew, skew_generator
from spectral_ops.spectrum import spectrum_update
from spectral_ops.track import cayley_track, gram_track
from spectral_ops.update import momentum_sum, momentum_update, parameter_update

__version__ = "0.1.0"

__all__ = [
    "KroneckerFactor",
    "SpectralFactor",
    "apply_root",
    "cayley",
    "cayley_track",
    "cayley_truncated",
    "cayley_update",
    "diagonal_update",
    "factor_update",
    "gram",
    "gram_skew",
    "gram_track",
    "inverse_free_update",
    "kron_track",
    "momentum_sum",
    "momentum_update",
    "parameter_update",
    "skew_generator",
    "spectrum_update",
    "stochastic_round",
]
