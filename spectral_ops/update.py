"""The elementwise ends of an optimizer step: momentum before the preconditioner, the parameters after it. In place."""

from collections.abc import Sequence

import torch
from torch import Tensor

from spectral_ops import _checks as check
from spectral_ops import host, reference
from spectral_ops._library import define

NORMALIZE = ("rms", "clip", "none")
TARGET_RMS = 0.2  # of an update before the learning rate: about AdamW's own, so that its learning rates carry over


def _momentum_fake(buffer: Tensor, g: Tensor, finite: Tensor, decay: float, nesterov: bool, maximize: bool) -> Tensor:
    return g.new_empty(g.shape, dtype=reference.accumulation_dtype(buffer.dtype))


def _momentum_kernel(buffer: Tensor, g: Tensor, finite: Tensor, decay: float, nesterov: bool, maximize: bool) -> Tensor:
    from spectral_ops.kernels import update

    if not buffer.is_contiguous() or g.dtype == torch.float64:
        return NotImplemented
    return update.momentum(buffer, g.contiguous(), finite.contiguous(), decay, nesterov, maximize)


def _sum_fake(*_: object) -> None:
    return None


def _sum_kernel(buffer: Tensor, x: Tensor, finite: Tensor, decay: float, maximize: bool) -> None:
    # A mean of `x / (1 - decay)` is the sum.
    if _momentum_kernel(buffer, reference.raised(x) / (1 - decay), finite, decay, False, maximize) is NotImplemented:
        return NotImplemented
    return None


def _parameter_fake(params: list[Tensor], *_: object) -> None:
    return None


def _parameter_kernel(
    params: list[Tensor],
    u: Tensor,
    squares: Tensor,
    finite: Tensor,
    step: Tensor,
    skipped: Tensor,
    lr: Tensor,
    weight_decay: float,
    normalize: str,
    target: float,
) -> None:
    from spectral_ops.kernels import update

    one_layout = len({p.dtype for p in params}) == 1 and all(p.is_contiguous() for p in params)
    counters = step.is_contiguous() and skipped.is_contiguous()
    if not (one_layout and counters) or u.numel() == 0 or u.dtype == torch.float64 or squares.dtype != torch.float32:
        return NotImplemented
    torch.autograd.graph.increment_version(params)  # which PyTorch does for its own operations
    update.parameter_update(
        params, u.contiguous(), squares.contiguous(), finite.contiguous(), step, skipped, lr, weight_decay, normalize, target
    )


_momentum_update = define(
    "momentum_update(Tensor(a!) buffer, Tensor g, Tensor finite, float decay, bool nesterov, bool maximize) -> Tensor",
    host.momentum_update,
    _momentum_fake,
    _momentum_kernel,
)
_momentum_sum = define(
    "momentum_sum(Tensor(a!) buffer, Tensor x, Tensor finite, float decay, bool maximize) -> ()",
    host.momentum_sum,
    _sum_fake,
    _sum_kernel,
)
_parameter_update = define(
    "parameter_update(Tensor(a!)[] params, Tensor u, Tensor squares, Tensor finite, Tensor(b!) step, Tensor(c!) skipped,"
    " Tensor lr, float weight_decay, str normalize, float target) -> ()",
    host.parameter_update,
    _parameter_fake,
    _parameter_kernel,
)


def momentum_update(
    buffer: Tensor, g: Tensor, finite: Tensor, decay: float, *, nesterov: bool = True, maximize: bool = False
) -> Tensor:
    """`buffer ← decay · buffer + (1 − decay) · g`, and the direction to precondition: the buffer, or the same mean of it and
    `g` once more (Nesterov). A matrix that is not `finite` keeps its buffer and gets direction 0.

    Args:
        buffer: `(b, n, m)`, changed.
        g: `(b, n, m)`, gradients.
        finite: `(b,)` bool.
        decay: of the momentum, in [0, 1].
        nesterov: look one step ahead.
        maximize: take the gradients with the other sign.

    Returns:
        `(b, n, m)`, float32 (float64 for a float64 buffer).

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape or device, in a sentence that names the argument.
    """
    op = "momentum_update"
    buffer = check.stack(buffer, "buffer", op)
    check.shaped(g, "g", op, tuple(buffer.shape), buffer)
    check.mask(finite, "finite", op, buffer)
    direction: Tensor = _momentum_update(buffer, g, finite, float(decay), nesterov, maximize)
    return direction


def momentum_sum(buffer: Tensor, x: Tensor, finite: Tensor, decay: float, *, maximize: bool = False) -> None:
    """`buffer ← decay · buffer + x`, the momentum of torch.optim.SGD. A matrix that is not `finite` keeps its buffer.

    Args:
        buffer: `(b, n, m)`, changed.
        x: `(b, n, m)`, preconditioned gradients.
        finite: `(b,)` bool.
        decay: of the momentum, in [0, 1).
        maximize: take `x` with the other sign.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape or device, in a sentence that names the argument.
    """
    op = "momentum_sum"
    buffer = check.stack(buffer, "buffer", op)
    check.shaped(x, "x", op, tuple(buffer.shape), buffer)
    check.mask(finite, "finite", op, buffer)
    _momentum_sum(buffer, x, finite, float(decay), maximize)


def parameter_update(
    params: Sequence[Tensor],
    u: Tensor,
    squares: Tensor,
    finite: Tensor,
    step: Tensor,
    skipped: Tensor,
    lr: float | Tensor,
    *,
    weight_decay: float = 0.0,
    normalize: str = "rms",
    target: float = TARGET_RMS,
) -> None:
    """`p ← p − lr · (factor · u + weight_decay · p)` for every matrix that is `finite`, rounded once.

    With `r` the root mean square of a matrix's update, `factor` is `target / r` ("rms"), `1 / max(r, 1)` ("clip") or 1
    ("none"). `step` counts the updates; one of zero with a learning rate of zero is none. `skipped` counts the others.

    Args:
        params: tensors of shape `(count, n, m)`, all of one dtype, `b` matrices in all; changed.
        u: `(b, n, m)`, the update.
        squares: `(b, parts)`, sums of squares of `u`, as `apply_root` returns them.
        finite: `(b,)` bool; the other matrices stay as they are.
        step: `(b,)`, float32, counter of updates; changed.
        skipped: `(b,)`, int64, counter of steps without one; changed.
        lr: learning rate, a number or a tensor of one element, read on its device.
        weight_decay: decoupled.
        normalize: "rms", "clip" or "none".
        target: root mean square of an update before the learning rate, for "rms".

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape or device, in a sentence that names the argument.
    """
    op = "parameter_update"
    u = check.stack(u, "u", op)
    params = list(params)
    rest, device = u.shape[1:], u.device
    for i, p in enumerate(params):
        if p.shape[1:] != rest or p.device != device:  # which `shaped` puts in words, at several times the cost
            check.shaped(p, f"params[{i}]", op, (len(p), *rest), u)
    if sum(map(len, params)) != len(u):
        raise ValueError(f"{op}: `params` must hold {len(u)} matrices as `u` does, got {sum(map(len, params))}")
    if squares.ndim != 2 or len(squares) != len(u):
        raise ValueError(f"{op}: `squares` must have shape ({len(u)}, parts), got {tuple(squares.shape)}")
    check.mask(finite, "finite", op, u)
    for name, counter, dtype in (("step", step, torch.float32), ("skipped", skipped, torch.int64)):
        check.counter(counter, name, op, u, dtype)
    check.choice(normalize, "normalize", op, NORMALIZE)
    if not isinstance(lr, Tensor):
        lr = torch.tensor(lr, dtype=torch.float64)
    _parameter_update(
        params, u, squares, finite, step, skipped, lr.reshape(()), float(weight_decay), normalize, float(target)
    )  # fmt: skip
