"""Inverse-free update of a factor: its Riemannian momentum and itself, in place."""

import torch
from torch import Tensor

from spectral_ops import _checks as check
from spectral_ops import host, reference
from spectral_ops._library import define


def _fake(*_: object) -> None:
    return None


def _kernel(
    k: Tensor,
    m: Tensor,
    x: Tensor,
    share: Tensor,
    damping: Tensor,
    usable: Tensor,
    seed: Tensor | None,
    step: float,
    decay: float,
    gain: float,
    gamma: float,
) -> None:
    from spectral_ops.kernels import factor, gram, launch

    # One product for both terms, and the old momentum apart: with weights and `c` gram's kernel spills in some of its tiles.
    root = torch.cat([x * reference.block(share.sqrt()), k.mT * reference.block(damping.sqrt())], -1).to(k.dtype)
    batch, n, columns = root.shape
    served = m.dtype == k.dtype and k.dtype in (torch.float32, torch.bfloat16) and x.numel() > 0
    wide, tile = launch.pick("gram", n, columns, batch, root), launch.pick("factor", n, n, batch, k)
    if not served or wide is None or tile is None:
        return NotImplemented
    new = gram.gram(root, None, gain, 0.0, None, wide).add_(m, alpha=decay)
    reference.keep(usable, m, reference.add_diagonal(new, -gain * gamma))
    k.copy_(factor.factor_update(k, m, step * usable.float(), tile, seed))


_inverse_free_update = define(
    "inverse_free_update(Tensor(a!) k, Tensor(b!) m, Tensor x, Tensor share, Tensor damping, Tensor usable, Tensor? seed,"
    " float step, float decay, float gain, float gamma) -> ()",
    host.inverse_free_update,
    _fake,
    _kernel,
)


def inverse_free_update(
    k: Tensor,
    m: Tensor,
    x: Tensor,
    share: Tensor,
    damping: Tensor,
    usable: Tensor,
    *,
    step: float,
    decay: float,
    gain: float,
    gamma: float = 1.0,
    seed: Tensor | None = None,
) -> None:
    """Learn a factor of an inverse, `S⁻¹ = k kᵀ`, from a curvature by products of matrices alone; in place.

        m ← decay · m + gain · (share · x xᵀ + damping · kᵀ k − gamma · I)
        k ← k (I − step · m / max(1, ‖m‖_F))

    Lin et al., 2024, "Can We Remove the Square-Root in Adaptive Gradient Methods?", Fig. 5 and 7: IF-Shampoo's update of `K`
    with `x = Kᵀ Gᵀ C`, `gain = (1 − α₂) / 2`, `share = b / p` and `damping = λ Tr(Cᵀ C) / p`.

    Args:
        k: `(b, n, n)`, factors. Changed.
        m: `(b, n, n)`, their Riemannian momenta, symmetric up to rounding. Changed.
        x: `(b, n, c)`, the curvature's root in the coordinates of `k`.
        share: `(b,)`, as above.
        damping: `(b,)`, as above.
        usable: `(b,)` bool; the other matrices stay as they are. What is new must be finite, and so must its squares.
        step: of the factor, in [0, 1).
        decay: of the momentum.
        gain: of what is new in it.
        gamma: 1 for a moving average, 0 for a sum.
        seed: `(b,)` int64; bfloat16 factors are rounded stochastically by it; None: to nearest.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape or device, in a sentence that names the argument.

    Computed in float32 (float64 for float64); each result is rounded once. bfloat16 factors take `x` in bfloat16.
    """
    op = "inverse_free_update"
    k = check.stack(check.square(k, "k", op), "k", op)
    check.shaped(m, "m", op, tuple(k.shape), k)
    x = check.stack(x, "x", op)
    check.shaped(x, "x", op, (*k.shape[:2], x.shape[-1]), k)
    for name, value in (("share", share), ("damping", damping)):
        check.shaped(value, name, op, tuple(k.shape[:1]), k)
    check.mask(usable, "usable", op, k)
    seeds = None if seed is None else check.seeds(seed, op, k, k.shape[:1])
    _inverse_free_update(k, m, x, share, damping, usable, seeds, float(step), float(decay), float(gain), float(gamma))
