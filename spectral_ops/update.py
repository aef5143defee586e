"""Momentum, and the step that a batch of matrices makes its parameters take."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from spectral_ops import _checks as check
from spectral_ops import reference
from spectral_ops._batches import matrices
from spectral_ops._library import define

NORMALIZATIONS = ("rms", "clip", "none")


def _momentum_fake(buffer: Tensor, *_: object) -> Tensor:
    return buffer.new_empty(buffer.shape, dtype=reference.accumulation_dtype(buffer.dtype))


def _momentum_kernel(
    buffer: Tensor, g: Tensor, finite: Tensor, decay: float, nesterov: bool, maximize: bool
) -> Tensor:
    from spectral_ops.kernels import update

    if g.dtype == torch.float64 or not buffer.is_contiguous():
        return NotImplemented
    finite = finite.reshape(-1).contiguous()
    direction = update.momentum(matrices(buffer), matrices(g).contiguous(), finite, decay, nesterov, maximize)
    return direction.view(buffer.shape)


def _parameter_fake(*_: object) -> None:
    return None


def _parameter_kernel(
    params: list[Tensor],
    u: Tensor,
    squares: Tensor,
    finite: Tensor,
    lr: Tensor,
    weight_decay: float,
    normalize: str,
    target: float,
) -> None:
    from spectral_ops.kernels import update

    contiguous = all(p.is_contiguous() for p in params)
    if u.numel() == 0 or not contiguous or torch.float64 in (u.dtype, squares.dtype):
        return NotImplemented
    torch.autograd.graph.increment_version(params)
    update.parameter_update(
        params, u.contiguous(), squares.float().contiguous(), finite.contiguous(), on_device(lr, u), weight_decay, normalize, target
    )


def on_device(lr: Tensor, like: Tensor) -> Tensor | float:
    """What a kernel takes as the learning rate: a tensor on its device, or a number."""
    return lr if lr.device == like.device else lr.item()


_momentum_update = define(
    "momentum_update(Tensor(a!) buffer, Tensor g, Tensor finite, float decay, bool nesterov, bool maximize) -> Tensor",
    reference.momentum_update,
    _momentum_fake,
    _momentum_kernel,
)
_parameter_update = define(
    "parameter_update(Tensor(a!)[] params, Tensor u, Tensor squares, Tensor finite, Tensor lr, float weight_decay,"
    " str normalize, float target) -> ()",
    reference.parameter_update,
    _parameter_fake,
    _parameter_kernel,
)


def momentum_update(
    buffer: Tensor, g: Tensor, finite: Tensor, decay: float, *, nesterov: bool = True, maximize: bool = False
) -> Tensor:
    """`buffer ← decay · buffer + (1 − decay) · g`, in place, and the direction: the new buffer `m` as it is stored, or with
    Nesterov's momentum `decay · m + (1 − decay) · g`.

    Args:
        buffer: `(..., n, m)`. Changed.
        g: `(..., n, m)`, gradients.
        finite: `(...)` bool; where it is false, the buffer is left as it is and the direction is zero.
        decay: a number in [0, 1].
        nesterov: Nesterov's momentum.
        maximize: take `−g`.

    Returns:
        `(..., n, m)`, float32 (float64 for a float64 buffer), computed in it.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape, device or value, in a sentence that names the argument.
    """
    op = "momentum_update"
    buffer = check.matrix(buffer, "buffer", op)
    check.shaped(g, "g", op, buffer.shape, buffer)
    _flags(finite, op, buffer.shape[:-2], buffer)
    if not 0 <= decay <= 1:
        raise ValueError(f"{op}: `decay` must be in [0, 1], got {decay}")
    direction: Tensor = _momentum_update(buffer, g, finite, float(decay), nesterov, maximize)
    return direction


def parameter_update(
    params: Sequence[Tensor],
    u: Tensor,
    squares: Tensor,
    finite: Tensor,
    lr: Tensor,
    *,
    weight_decay: float = 0.0,
    normalize: str = "rms",
    target: float = 0.2,
) -> None:
    """`p ← p − lr · (factor · u + weight_decay · p)` for every parameter of one shape, in place.

    Args:
        params: each `(n, m)` or `(count, n, m)`, all of one dtype, `b` matrices together. Changed.
        u: `(b, n, m)`, their updates, in order.
        squares: `(b, parts)`; the sum over the parts is `‖u‖_F²`, see `apply_root`.
        finite: `(b,)` bool; where it is false, the matrix is left as it is.
        lr: a tensor of one element, on the CPU or where the parameters are; there it is read without a synchronisation.
        weight_decay: decoupled, multiplied by `lr`.
        normalize: with `r` the root mean square of a matrix's update, `"rms"`: `factor = target / r`, so that all updates are
            of one size; `"clip"`: `1 / max(1, r)`; `"none"`: 1.
        target: root mean square of an update, only of `"rms"`.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape, device or value, in a sentence that names the argument.

    Computed in float32 (float64 for float64) and rounded once.
    """
    op = "parameter_update"
    u = check.matrix(u, "u", op)
    if u.ndim != 3:
        raise ValueError(f"{op}: `u` must have shape (b, n, m), got {tuple(u.shape)}")
    params = list(params)
    for i, p in enumerate(params):
        check.matrix(p, f"params[{i}]", op)
        if p.ndim > 3 or p.shape[-2:] != u.shape[-2:]:
            raise ValueError(f"{op}: `params[{i}]` must have shape (count, {u.shape[1]}, {u.shape[2]}), got {tuple(p.shape)}")
        if p.dtype != params[0].dtype or p.device != u.device:
            raise ValueError(f"{op}: `params[{i}]` must be {params[0].dtype} on {u.device}, got {p.dtype} on {p.device}")
    if (count := sum(math.prod(p.shape[:-2]) for p in params)) != len(u):
        raise ValueError(f"{op}: `params` must hold as many matrices as `u`, {len(u)}, got {count}")
    check.tensor(squares, "squares", op)
    check.shaped(squares, "squares", op, (len(u), squares.shape[-1]) if squares.ndim else (len(u), 1), u)
    _flags(finite, op, u.shape[:1], u)
    learning_rate(lr, op, u)
    check.not_negative(weight_decay, "weight_decay", op)
    check.choice(normalize, "normalize", op, NORMALIZATIONS)
    _parameter_update(params, u, squares, finite, lr.reshape(()), float(weight_decay), normalize, float(target))


def learning_rate(lr: object, op: str, like: Tensor) -> None:
    """Check it: one element, readable where the parameters are."""
    x = check.tensor(lr, "lr", op)
    if x.numel() != 1 or x.device not in (like.device, torch.device("cpu")):
        raise ValueError(
            f"{op}: `lr` must have one element, on the CPU or on {like.device}, got shape {tuple(x.shape)} on {x.device}"
        )


def _flags(value: object, op: str, batch: torch.Size, like: Tensor) -> None:
    if not isinstance(value, Tensor) or value.dtype != torch.bool:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{op}: `finite` must be a bool tensor, got {got}")
    if value.shape != batch or value.device != like.device:
        raise ValueError(
            f"{op}: `finite` must have shape {tuple(batch)} on {like.device}, got {tuple(value.shape)} on {value.device}"
        )
