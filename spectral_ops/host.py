"""Ops on a CPU, where a value can be looked at: what only a flawed gradient needs is left out if there is none.

`reference.py` has the same formulas, with masks and for any dtype; it serves whatever is not plain here.
"""

from itertools import compress
from typing import Any

import torch
from torch import Tensor

from spectral_ops import reference
from spectral_ops.blocked import SMALLEST, lower_blocks, workspace
from spectral_ops.reference import add_diagonal, block, frobenius


def wide(*tensors: Tensor) -> bool:
    """Whether all are on a CPU and of one dtype that is computed in."""
    dtypes = {x.dtype for x in tensors}
    return len(dtypes) == 1 and dtypes <= {torch.float32, torch.float64} and all(x.device.type == "cpu" for x in tensors)


def plain(*tensors: Tensor) -> bool:
    """And contiguous."""
    return wide(*tensors) and all(x.is_contiguous() for x in tensors)


# --- Momentum and parameters ------------------------------------------------------------------------------------------


def momentum_update(buffer: Tensor, g: Tensor, finite: Tensor, decay: float, nesterov: bool, maximize: bool) -> Tensor:
    if not plain(buffer, g) or not finite.all():
        return reference.momentum_update(buffer, g, finite, decay, nesterov, maximize)
    g = -g if maximize else g
    buffer.lerp_(g, 1 - decay)
    return g.lerp(buffer, decay) if nesterov else buffer.clone()


def momentum_sum(buffer: Tensor, x: Tensor, finite: Tensor, decay: float, maximize: bool) -> None:
    if not wide(buffer, x) or not finite.all():
        return reference.momentum_sum(buffer, x, finite, decay, maximize)
    torch.add(x, buffer, alpha=-decay if maximize else decay, out=buffer)
    if maximize:
        buffer.neg_()  # so that it is, bit for bit, what the negative of `x` gives
    return None


def parameter_update(
    params: list[Tensor], u: Tensor, squares: Tensor, finite: Tensor, step: Tensor, skipped: Tensor, lr: Tensor,
    weight_decay: float, normalize: str, target: float,
) -> None:  # fmt: skip
    if not params or not plain(*params) or not wide(*params, u) or not finite.all():
        return reference.parameter_update(
            params, u, squares, finite, step, skipped, lr, weight_decay, normalize, target
        )  # fmt: skip
    sizes, rate = [len(p) for p in params], lr.item()
    if normalize == "none" and not weight_decay and rate:
        step += 1
        torch._foreach_add_(params, u.split(sizes), alpha=-rate)
        return None
    factor, moves = reference.update_factor(u, squares, lr, normalize, target)
    step += moves
    lr = lr.to(u.dtype)
    for p, mine, rate in zip(params, u.split(sizes), (factor.to(u.dtype) * -lr).split(sizes), strict=True):
        if weight_decay:
            p.sub_(lr * weight_decay * p)
        p.addcmul_(mine, block(rate))


# --- Elementwise optimizers -------------------------------------------------------------------------------------------


def diagonal_update(
    params: list[Tensor], grads: list[Tensor], momenta: list[Tensor], seconds: list[Tensor], steps: list[Tensor],
    skipped: list[Tensor], lr: Tensor, weight_decay: list[float], beta1: float, beta2: float, gamma: float, eps: float,
    batch_size: float, rule: str, maximize: bool,
) -> None:  # fmt: skip
    options: list[Any] = [beta1, beta2, gamma, eps, batch_size, rule, maximize]
    lists: list[Any] = [params, grads, momenta, seconds, steps, skipped, lr, weight_decay]
    if not params or not wide(*params, *grads, *momenta, *seconds):
        return reference.diagonal_update(*lists, *options)
    squares = torch.stack(torch._foreach_norm(grads)).square()
    moves = (squares.isfinite() & ((squares > 0) | (lr != 0))).tolist()
    if not all(moves):
        for mask, update in ((True, diagonal_update), (False, reference.diagonal_update)):
            own: list[Any] = [list(compress(x, (its == mask for its in moves))) if isinstance(x, list) else x for x in lists]
            update(*own, *options)
        return None
    torch._foreach_add_(steps, 1)
    if rule == "adamw":
        for decay in dict.fromkeys(weight_decay):
            mine = [value == decay for value in weight_decay]
            p, g, m, s, counts = (list(compress(x, mine)) for x in (params, grads, momenta, seconds, steps))
            p2, g2, m2, s2 = ([x.contiguous() for x in tensors] for tensors in (p, g, m, s))
            torch._fused_adamw_(
                p2, g2, m2, s2, [], counts, lr=float(lr), beta1=beta1, beta2=beta2, weight_decay=decay, eps=eps, amsgrad=False,
                maximize=maximize,
            )  # fmt: skip
            for x, y in zip((*p, *m, *s), (*p2, *m2, *s2), strict=True):
                if x is not y:
                    x.copy_(y)
        return None
    signed = list(torch._foreach_neg(grads)) if maximize else grads
    torch._foreach_mul_(seconds, 1 - (1 - beta2) * gamma)
    torch._foreach_addcmul_(seconds, signed, signed, (1 - beta2) * batch_size)
    torch._foreach_mul_(momenta, beta1)
    torch._foreach_addcdiv_(momenta, signed, torch._foreach_add(seconds, eps))
    decayed = momenta
    if any(weight_decay):
        terms = torch._foreach_mul(params, weight_decay)
        if rule == "rf":
            torch._foreach_add_(momenta, terms)
        else:
            decayed = list(torch._foreach_add(momenta, terms))
    torch._foreach_add_(params, decayed, alpha=-lr.item())
    return None


# --- Inverse-free factors ---------------------------------------------------------------------------------------------


def inverse_free_update(
    k: Tensor, m: Tensor, x: Tensor, share: Tensor, damping: Tensor, usable: Tensor, seed: Tensor | None,
    step: float, decay: float, gain: float, gamma: float,
) -> None:  # fmt: skip
    if not plain(k, m) or x.dtype != k.dtype:
        return reference.inverse_free_update(k, m, x, share, damping, usable, seed, step, decay, gain, gamma)
    if not usable.all():
        some = usable.nonzero().flatten()
        k2, m2, x2, s2, d2, u2 = (value[some] for value in (k, m, x, share, damping, usable))
        inverse_free_update(k2, m2, x2, s2, d2, u2, None, step, decay, gain, gamma)
        k[some], m[some] = k2, m2
        return None
    if k.shape[-1] < SMALLEST:
        m.baddbmm_(x * block(gain * share), x.mT, beta=decay)
        if damping.any():
            m.baddbmm_(k.mT * block(gain * damping), k)
        add_diagonal(m, -gain * gamma)
        k.baddbmm_(k * block(step / frobenius(m).clamp(min=1)), m, alpha=-1)
        return None
    space, blocks = workspace.tensors(3, k.shape[1:], k.dtype)[0], list(lower_blocks(k.shape[-1]))
    for i, (s, damp) in enumerate(zip((gain * share).tolist(), (gain * damping).tolist(), strict=True)):
        for part in blocks:
            rows, columns = part
            m[i][part].addmm_(x[i][rows], x[i][columns].mT, beta=decay, alpha=s)
            if damp:
                m[i][part].addmm_(k[i].mT[rows], k[i][:, columns], alpha=damp)
            if rows != columns:
                m[i][columns, rows] = m[i][part].mT
        add_diagonal(m[i], -gain * gamma)
        bounded = step / max(1.0, frobenius(m[i]).item())
        k[i].copy_(torch.addmm(k[i], k[i], m[i], alpha=-bounded, out=space))
    return None
