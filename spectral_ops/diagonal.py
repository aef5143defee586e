"""Elementwise optimizers for what is no matrix: with and without the square root."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spectral_ops import _checks as check
from spectral_ops import host
from spectral_ops._library import define

RULES = ("adamw", "rf", "rfw")


def _fake(*_: object) -> None:
    return None


def _kernel(
    params: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    seconds: list[Tensor],
    steps: list[Tensor],
    skipped: list[Tensor],
    lr: Tensor,
    weight_decay: list[float],
    *options: Any,
) -> None:
    from spectral_ops.kernels import diagonal

    lists = (params, [g.contiguous() for g in grads], momenta, seconds)
    dtypes = [{x.dtype for x in tensors} for tensors in lists]
    contiguous = all(x.is_contiguous() for tensors in lists for x in tensors)
    if not contiguous or any(len(kinds) != 1 or torch.float64 in kinds for kinds in dtypes):
        return NotImplemented
    torch.autograd.graph.increment_version(params)
    diagonal.diagonal_step(*lists, steps, skipped, lr, weight_decay, *options)


_diagonal_update = define(
    "diagonal_update(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momenta, Tensor(c!)[] seconds, Tensor(d!)[] steps,"
    " Tensor(e!)[] skipped, Tensor lr, float[] weight_decay, float beta1, float beta2, float gamma, float eps,"
    " float batch_size, str rule, bool maximize) -> ()",
    host.diagonal_update,
    _fake,
    _kernel,
)


def diagonal_update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    seconds: Sequence[Tensor],
    steps: Sequence[Tensor],
    skipped: Sequence[Tensor],
    lr: float | Tensor,
    *,
    rule: str,
    betas: tuple[float, float],
    gamma: float = 1.0,
    eps: float,
    weight_decay: float | Sequence[float] = 0.0,
    batch_size: float = 1.0,
    maximize: bool = False,
) -> None:
    """One step of an elementwise optimizer for any number of tensors, in place.

    `rule="rf"`, root-free (Lin et al., 2024, "Can We Remove the Square-Root in Adaptive Gradient Methods?", Fig. 4 and 6):

        s ← (1 − (1 − β₂) γ) s + (1 − β₂) · batch_size · g²        s starts at 1; the paper's β₂ is 1 − β₂ here
        m ← β₁ m + g / (s + eps) + weight_decay · p
        p ← p − lr · m

    which is RF-RMSProp for `γ = 1` and RF-AdaGrad for `γ = 0`. `rule="rfw"` has the weight decay in `p` alone, decoupled as
    AdamW's is: `m ← β₁ m + g / (s + eps)`, `p ← p − lr · (m + weight_decay · p)`. `rule="adamw"` is `torch.optim.AdamW`.
    A tensor whose gradient has a NaN or an infinity, or whose sum of squares overflows, stays as it is with its moments: that
    counts as skipped. A step with a gradient of zeros and a learning rate of zero changes nothing and does not count at all.
    Not differentiable: parameters that require a gradient are changed under `torch.no_grad()`.

    Args:
        params: parameters. This list and the next five have one length, and `params`, `grads`, `momenta` and `seconds` of a
            parameter one shape, any dtypes. Changed.
        grads: gradients.
        momenta: `m`. Changed.
        seconds: `s`. Changed.
        steps: tensors of one element, float32: how many steps each tensor has made. Changed; only "adamw" reads them.
        skipped: tensors of one element, int64: how many steps each tensor has skipped. Changed.
        lr: a number, or a tensor of one element on the CPU or where the parameters are: there it is read without a
            synchronisation.
        rule: "rf", "rfw" or "adamw".
        betas: decay of `m`, decay of `s`.
        gamma: `γ`, only of "rf" and "rfw".
        eps: beside `s` ("rf", "rfw") or its root ("adamw").
        weight_decay: as above, one for all or one for each; in "rfw" and "adamw" decoupled.
        batch_size: over which the loss is a mean, only of "rf" and "rfw".
        maximize: ascend.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape, device or value, in a sentence that names the argument.

    Computed in float32 (float64 for float64); each result is rounded once.
    """
    op = "diagonal_update"
    params, grads, momenta, seconds = list(params), list(grads), list(momenta), list(seconds)
    steps, skipped = list(steps), list(skipped)
    decays = [weight_decay] * len(params) if isinstance(weight_decay, int | float) else list(weight_decay)
    moments = (("grads", grads), ("momenta", momenta), ("seconds", seconds))
    for name, tensors in (*moments, ("steps", steps), ("skipped", skipped), ("weight_decay", decays)):
        if len(tensors) != len(params):
            raise ValueError(f"{op}: `{name}` must be as long as `params`, {len(params)}, got {len(tensors)}")
    for i, p in enumerate(params):
        check.shaped(p, f"params[{i}]", op, p.shape, params[0])
        for name, tensors in moments:
            check.shaped(tensors[i], f"{name}[{i}]", op, p.shape, p)
        check.counter(steps[i], f"steps[{i}]", op, p, torch.float32, 1)
        check.counter(skipped[i], f"skipped[{i}]", op, p, torch.int64, 1)
        check.not_negative(decays[i], "weight_decay", op)
    check.choice(rule, "rule", op, RULES)
    for name, value in (("betas[0]", betas[0]), ("betas[1]", betas[1])):
        if not 0 <= value < 1:
            raise ValueError(f"{op}: `{name}` must be in [0, 1), got {value}")
    check.not_negative(eps, "eps", op)
    if rule == "adamw" and (gamma != 1 or batch_size != 1):
        raise ValueError(f'{op}: `gamma` and `batch_size` are of "rf" and "rfw", got {gamma} and {batch_size} with "adamw"')
    if not params:
        return
    lr = torch.tensor(lr, dtype=torch.float64) if isinstance(lr, int | float) else check.tensor(lr, "lr", op)
    if lr.numel() != 1 or lr.device not in (params[0].device, torch.device("cpu")):
        raise ValueError(f"{op}: `lr` must have one element, got shape {tuple(lr.shape)} on {lr.device}")
    _diagonal_update(
        params, grads, momenta, seconds, steps, skipped, lr.reshape(()), [float(decay) for decay in decays],
        float(betas[0]), float(betas[1]), float(gamma), float(eps), float(batch_size), rule, maximize,
    )  # fmt: skip
