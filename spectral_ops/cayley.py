"""Cayley maps: exact, truncated, and the update of an orthogonal basis."""

import torch
from torch import Tensor

from spectral_ops import _checks as check
from spectral_ops import reference
from spectral_ops._batches import matrices, numbers
from spectral_ops._library import define

ORDERS = (2, 3, 4, 8)
# Largest generator of each order where the map corrects itself: a turn of 57° to 59°. An update multiplies the basis by
# `P − ½ (BᵀB − I)`, and where P turns a plane by θ that multiplies the plane's anisotropic defect by `2 sin(θ/2)`: from 60° on
# the correction feeds it.
LIMITS = {2: 0.42, 3: 0.48, 4: 0.5, 8: 0.55}
ROUNDINGS = ("nearest", "stochastic")


def _like_x(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


def _update_kernel(b: Tensor, x: Tensor, step: Tensor, order: int, correct: bool, seed: Tensor | None) -> Tensor:
    from spectral_ops.kernels import cayley, launch

    batch, n = b.shape[:-2], b.shape[-1]
    if b.dtype == torch.float16:  # powers of an unscaled generator may leave its range
        return _update_kernel(b.float(), x.float(), step, order, correct, seed).to(b.dtype)
    b3, x3 = matrices(b).contiguous(), matrices(x).to(b.dtype).contiguous()
    if launch.pick("cayley", n, n, len(b3), b) is None:
        return NotImplemented
    none: launch.Sides = (None, None)
    seeds = none if seed is None or b.dtype != torch.bfloat16 else (numbers(seed, batch), None)
    f = cayley.generator_map((b3, None), (x3, None), order, step=numbers(step, batch), correct=correct)
    (out, _), _ = cayley.turn((b3, None), f, seed=seeds)
    assert out is not None
    return out.view(b.shape)


_cayley = define("cayley(Tensor x) -> Tensor", reference.cayley, _like_x)
_cayley_truncated = define("cayley_truncated(Tensor x, int order) -> Tensor", reference.cayley_truncated, _like_x)
_cayley_update = define(
    "cayley_update(Tensor b, Tensor x, Tensor step, int order, bool correct, Tensor? seed) -> Tensor",
    reference.cayley_update,
    _like_x,
    _update_kernel,
)


def cayley(x: Tensor) -> Tensor:
    """`(I + x)(I − x)⁻¹`, orthogonal for skew-symmetric `x` (Lin et al., 2025, Claim 9).

    Exact, by a linear solve: for reference and for small problems. `cayley_truncated` needs products only.

    Args:
        x: `(..., n, n)`, skew-symmetric.

    Returns:
        `(..., n, n)` in the dtype of `x`, computed in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: a wrong type, dtype or shape.
    """
    result: Tensor = _cayley(check.square(x, "x", "cayley"))
    return result


def cayley_truncated(x: Tensor, *, order: int = 8) -> Tensor:
    """A polynomial in place of the Cayley map, for skew-symmetric `x` with `‖x‖₂ < 1` (Lin et al., 2025, Sec. 3.4).

    | order | `P(x)` | products | `P Pᵀ` |
    |---|---|---|---|
    | 8 | `(I + x)² (I + x²) (I + x⁴)`, the paper's (its factors are printed with inverses by mistake) | 4 | `(I − x⁸)²` |
    | 4 | `I + 2x + 2x² + a x³ + b x⁴`, `a = 4 − 2√2`, `b = 6 − 4√2` | 2 | `I + b² x⁸`, `b² = 0.118` |
    | 3 | `I + 2x + 2x² + x³` | 2 | `I − x⁶` |
    | 2 | `I + 2x + 2x²` | 1 | `I + 4x⁴` |

    The product of order 3 and the second ones of order 4 are skew or symmetric, which kernels compute by halves. All agree with
    the Cayley map up to `2x²`. Order 4 gives up the map's third-order term for orthogonality: at
    `‖x‖₂ = 0.7` it loses 0.7 % of it, order 8 11 % and the paper's product cut at order 4 42 %.

    Args:
        x: `(..., n, n)`, skew-symmetric.
        order: 2, 3, 4 or 8.

    Returns:
        `(..., n, n)` in the dtype of `x`, computed in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape or order.
    """
    x = check.square(x, "x", "cayley_truncated")
    check.choice(order, "order", "cayley_truncated", ORDERS)
    result: Tensor = _cayley_truncated(x, order)
    return result


def cayley_update(
    b: Tensor,
    x: Tensor,
    step: float | Tensor = 1.0,
    *,
    order: int = 8,
    correct: bool = False,
    rounding: str = "nearest",
    seed: int | Tensor = 0,
) -> Tensor:
    """`b · P(step · x)`: turn an orthogonal basis by a truncated Cayley map (Lin et al., 2025, Fig. 1 and Sec. 3.4).

    Args:
        b: `(..., n, n)`, orthogonal up to rounding.
        x: `(..., n, n)`, skew-symmetric, `‖step · x‖₂ < 1`.
        step: a number or one for each matrix; a tensor is read on its device, without a synchronisation.
        order: 2, 3, 4 or 8, see `cayley_truncated`.
        correct: subtract `½ b (bᵀb − I)`: half the orthogonality defect, so that rounding errors do not build up.
        rounding: `"nearest"`, or `"stochastic"` where `b` is bfloat16 (elsewhere it rounds to nearest).
        seed: of the stochastic rounding, see `stochastic_round`.

    Returns:
        `(..., n, n)` in the dtype of `b`, computed in float32 (float64 for float64) and rounded once.

    Raises:
        TypeError, ValueError: a wrong type, dtype, shape, device or option, in a sentence that names the argument.
    """
    op = "cayley_update"
    b = check.square(b, "b", op)
    check.shaped(x, "x", op, b.shape, b)
    check.choice(order, "order", op, ORDERS)
    check.choice(rounding, "rounding", op, ROUNDINGS)
    step = check.scalars(step, "step", op, b, b.shape[:-2])
    seeds = check.seeds(seed, op, b, b.shape[:-2]) if rounding == "stochastic" else None
    result: Tensor = _cayley_update(b, x, step, order, correct, seeds)
    return result
