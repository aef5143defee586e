"""What every op means, in plain PyTorch: exact in float64, and the implementation wherever no kernel serves.

Low-precision inputs are raised to float32 first, so every product accumulates there, and the result is rounded once.
Arguments are already checked: `spectral_ops/<op>.py` does that. Scalars are 0-d tensors or one number for each matrix.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def raised(x: Tensor) -> Tensor:
    return x.to(accumulation_dtype(x.dtype))


def matched(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the wider of their dtypes: float64 factors may meet float32 gradients, and the other way round."""
    dtype = torch.promote_types(x.dtype, y.dtype)
    return x.to(dtype), y.to(dtype)


def column(s: Tensor) -> Tensor:
    """A number for each matrix, shaped to multiply a vector."""
    return s.unsqueeze(-1)


def block(s: Tensor) -> Tensor:
    """A number for each matrix, shaped to multiply a matrix."""
    return s[..., None, None]


def add_diagonal(x: Tensor, value: float | Tensor) -> Tensor:
    """`x + value · I`, in place."""
    x.diagonal(dim1=-2, dim2=-1).add_(value)
    return x


def frobenius(x: Tensor) -> Tensor:
    """Norm of each matrix, by rows first: over two dimensions at once `vector_norm` adds one number after the other on a CPU,
    and is off by 6e-4 for 3072 × 3072 numbers in float32."""
    return torch.linalg.vector_norm(torch.linalg.vector_norm(x, dim=-1), dim=-1)


def product(x: Tensor, scale: Tensor | None) -> Tensor:
    """`x Diag(scale) xᵀ`, accumulated and returned in float32 (float64)."""
    x = raised(x)
    return (x if scale is None else x * raised(scale).unsqueeze(-2)) @ x.mT


# --- gram -------------------------------------------------------------------------------------------------------------


def gram(x: Tensor, scale: Tensor | None, alpha: float, beta: float, c: Tensor | None) -> Tensor:
    wide = raised(x)
    half = wide * (alpha / 2) if scale is None else wide * (raised(scale) * (alpha / 2)).unsqueeze(-2)
    w = half @ wide.mT
    if c is not None:
        w = w.add_(raised(c), alpha=beta / 2)
    return (w + w.mT).to(x.dtype)  # each sum of two halves is the same in both places


# --- skew -------------------------------------------------------------------------------------------------------------


def skew_from_lower(x: Tensor) -> Tensor:
    """`Tril(x) − Tril(x)ᵀ`: bitwise skew-symmetric whatever `x` is."""
    lower = x.tril(-1)
    return lower - lower.mT


def skew_generator(w: Tensor, d: Tensor, tol: float) -> Tensor:
    w, d = raised(w), raised(d).to(accumulation_dtype(w.dtype))
    gap = d.unsqueeze(-1) - d.unsqueeze(-2)
    near = gap.abs() <= tol * torch.maximum(d.unsqueeze(-1), d.unsqueeze(-2))
    return skew_from_lower(torch.where(near, 0.0, -w / torch.where(near, 1.0, gap)))


def gram_skew(x: Tensor, d: Tensor, scale: Tensor | None, tol: float) -> tuple[Tensor, Tensor, Tensor]:
    w = product(x, scale)
    skew = skew_generator(w, d, tol)
    return skew.to(x.dtype), w.diagonal(dim1=-2, dim2=-1).clone(), skew.square().sum((-2, -1))


# --- tracking ---------------------------------------------------------------------------------------------------------


def tracked_diagonal(x: Tensor, d: Tensor, scale: Tensor, beta: Tensor, damping: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The new diagonal of `T`, divided by its geometric mean; one over that mean; its logarithm. A row reduction: known before
    the product."""
    n = (x.square() @ scale.to(x.dtype).unsqueeze(-1)).squeeze(-1) + column(damping)
    n = torch.lerp(d.to(x.dtype), n, column(beta))
    log_mean = n.log().mean(-1)
    shrink = torch.exp(-log_mean)
    return n * column(shrink), shrink, log_mean


def bounded_generator(t: Tensor, n: Tensor, epsilon: float) -> Tensor:
    """`X_ij = −½ t_ij Δ / (Δ² + ε² (n_i + n_j)²)`, `Δ = n_i − n_j`, of a symmetric `t`."""
    gap, width = -0.25 * n, epsilon * n
    gap, width = gap.unsqueeze(-1) - gap.unsqueeze(-2), width.unsqueeze(-1) + width.unsqueeze(-2)
    half = torch.addcmul(width.square_(), gap, gap, value=16, out=width)
    half = (gap * t).div_(half)  # both triangles have half of the generator: their difference is bitwise skew
    return half - half.mT


def gram_track(
    x: Tensor, d: Tensor, residual: Tensor | None, scale: Tensor, beta: Tensor, damping: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    dtype, x = x.dtype, raised(x)
    n, shrink, log_mean = tracked_diagonal(x, d, scale, beta, damping)
    weighted = x * (column(beta * shrink) * scale).to(x.dtype).unsqueeze(-2)
    t = weighted @ x.mT
    if residual is not None:
        t.addcmul_(raised(residual).to(t.dtype), block((1 - beta) * shrink).to(t.dtype))
    generator = bounded_generator(t, n, epsilon).to(dtype)
    if residual is None:
        return generator, n, None, log_mean
    t.diagonal(dim1=-2, dim2=-1).zero_()
    return generator, n, t.to(residual.dtype), log_mean


def limited_step(x2: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """The largest `s ≤ 1` with `‖s·X‖₂ ≤ limit`, and the bound on `‖s·X‖₂` that it leaves: `‖X‖₂² ≤ ‖X²‖_F / √2` for skew
    `X`, whose singular values come in pairs."""
    norm = (frobenius(x2) / math.sqrt(2)).sqrt()
    step = (limit / norm.clamp(min=torch.finfo(x2.dtype).tiny)).clamp(max=1)
    return step, step * norm


def cayley_track(
    b: Tensor, x: Tensor, d: Tensor, residual: Tensor | None, limit: float, order: int, seed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    b32, x = matched(raised(b), raised(x))
    x2 = x @ x
    step, norm = limited_step(x2, limit)
    p = correct(polynomial(x, x2, step, order, norm), b32)
    b_new = rounded(b32 @ p, b.dtype, seed)
    if residual is None:
        return b_new, d.clone(), None
    t = raised(residual).to(p.dtype, copy=True)
    t.diagonal(dim1=-2, dim2=-1).copy_(d)
    t = p.mT @ (t @ p)
    t = 0.5 * (t + t.mT)
    d_new = t.diagonal(dim1=-2, dim2=-1).clone()
    if residual.dtype == torch.bfloat16:
        d_new = torch.where(d_new > LOST * d, d_new, d.to(d_new.dtype))
    t.diagonal(dim1=-2, dim2=-1).zero_()
    return b_new, d_new, rounded_symmetric(t, residual.dtype, None if seed is None else ~seed)


# A bfloat16 residual makes `T` a little indefinite, and a turn finds that: an eigenvalue of which so little is left is error of
# rounding. It keeps its value, since its inverse would weigh on the other side for as long as the average remembers.
LOST = 1e-3
RELATIVE_FLOOR = 1e-6  # of the largest eigenvalue: below it a float32 eigenvalue is rounding error, even its sign
NEGLIGIBLE = 1e-30  # mean square of a gradient: what is divided by less, and by an eigenvalue, overflows
STREAM_STEP, STREAM_SIDE = 0x1E3779B97F4A7C15, 0x632BE59BD9B4E019  # odd, so that streams of seeds do not meet


def tracked(
    x: Tensor,
    d: Tensor,
    b: Tensor | None,
    r: Tensor | None,
    weight: Tensor,
    share: Tensor,
    damping: Tensor,
    usable: Tensor,
    seeds: Tensor | None,
    epsilon: float,
    limit: float,
    order: int,
) -> Tensor:
    """One side of the usable matrices, in place; the logarithm of what `T` was divided by."""
    if b is None:
        new, _, log_mean = tracked_diagonal(x, d, weight, share, damping)
        floor = RELATIVE_FLOOR * new.amax(-1, keepdim=True)
    else:
        generator, new, r_new, log_mean = gram_track(x, d, r, weight, share, damping, epsilon)
        floor = RELATIVE_FLOOR * new.amax(-1, keepdim=True)
        b_new, new, r_new = cayley_track(b, generator, new, r_new, limit, order, seeds)
        keep(usable, b, b_new)
        if r is not None and r_new is not None:
            keep(usable, r, r_new)
    keep(usable, d, new.clamp(min=floor))
    return log_mean


def kron_track(
    g: Tensor,
    basis_c: Tensor | None,
    basis_k: Tensor | None,
    residual_c: Tensor | None,
    residual_k: Tensor | None,
    d_c: Tensor,
    d_k: Tensor,
    scale: Tensor,
    updates: Tensor,
    seed: Tensor | None,
    beta: float,
    damping: float,
    epsilon: float,
    limit: float,
    order: int,
    track: Callable[..., Tensor] = tracked,
) -> Tensor:
    g = raised(g)
    n, m = g.shape[-2:]
    mean_square = g.square().mean((-2, -1))
    finite = mean_square.isfinite()
    usable = finite & (mean_square > NEGLIGIBLE)
    updates += usable
    # The scale starts at the first gradient's, and a warm average keeps the identity start from lingering.
    alpha = torch.where((updates <= 1) & usable, mean_square, scale)
    share = (updates + 1).reciprocal().clamp(min=beta)
    seeds = None if seed is None else seed + updates.long() * STREAM_STEP
    x = rotate(torch.where(block(usable), g, 0), basis_c, basis_k).to(g.dtype)
    inverse_c, inverse_k = d_c.reciprocal(), d_k.reciprocal()

    def side(x: Tensor, d: Tensor, b: Tensor | None, r: Tensor | None, other: Tensor, k: int, seeds: Tensor | None) -> Tensor:
        weight, damp = other / column(alpha * k), damping * other.mean(-1) / alpha
        return track(x, d, b, r, weight, share, damp, usable, seeds, epsilon, limit, order)

    log_c = side(x, d_c, basis_c, residual_c, inverse_k, m, seeds)
    log_k = side(x.mT, d_k, basis_k, residual_k, inverse_c, n, None if seeds is None else seeds + STREAM_SIDE)
    keep(usable, scale, alpha * torch.exp((log_c + log_k) / 2))
    return finite


def keep(mask: Tensor, old: Tensor, new: Tensor) -> None:
    """Write `new` over `old` for the matrices in the mask."""
    torch.where(mask.view(-1, *[1] * (old.ndim - 1)), new.to(old.dtype), old, out=old)


# --- Cayley -----------------------------------------------------------------------------------------------------------

# The quartic whose departure from orthogonality starts at X⁸: P Pᵀ = I + b² X⁸ for these two coefficients.
QUARTIC_A, QUARTIC_B = 4 - 2 * math.sqrt(2), 6 - 4 * math.sqrt(2)


def cayley(x: Tensor) -> Tensor:
    eye = torch.eye(x.shape[-1], dtype=accumulation_dtype(x.dtype), device=x.device)
    # Without a check, for which the host would wait: `I − X` has no eigenvalue under 1 in magnitude.
    return torch.linalg.solve_ex(eye - raised(x), eye + raised(x)).result.to(x.dtype).contiguous()


def polynomial(x: Tensor, x2: Tensor, step: Tensor, order: int, norm: Tensor | None = None) -> Tensor:
    """The truncated Cayley map of `step · x`, given `x2 = x @ x`, neither of them scaled yet. `norm`, one for each matrix,
    bounds `‖step · x‖₂`, and orders 2 and 3 are fitted to it; None: they are not."""
    s = block(step)
    square = torch.zeros_like(step) if norm is None else norm.square()
    x, x2 = s * x, s * s * x2
    if order == 2:
        # PPᵀ = I − (4 − 2c)X² + c²X⁴: this c keeps the length where ‖X‖₂ is `norm`, and goes to 2 as `norm` to 0.
        return add_diagonal(2 * x + x2 * block(4 / (1 + torch.sqrt(1 - 4 * square))), 1)
    if order == 3:
        # PPᵀ = I + 4 (1 − e)X⁴ − e²X⁶: this e leaves it as far above as below, by 0.15 norm⁶ at most.
        return add_diagonal(torch.addcmul(2 * x + 2 * x2, x2 @ x, block(1 + square / 4)), 1)
    if order == 4:
        return torch.matmul(x2, add_diagonal(QUARTIC_A * x + QUARTIC_B * x2, 2)).add_(add_diagonal(2 * x, 1))
    x4 = x2 @ x2
    even = add_diagonal(x2 + x4 + x2 @ x4, 1)  # (I + X²)(I + X⁴)
    return add_diagonal(2 * x + x2, 1) @ even


def cayley_truncated(x: Tensor, order: int) -> Tensor:
    x32 = raised(x)
    return polynomial(x32, x32 @ x32, torch.ones((), dtype=x32.dtype, device=x.device), order).to(x.dtype)


def correct(p: Tensor, b: Tensor) -> Tensor:
    """`p − ½ (bᵀb − I)`: half the orthogonality defect of `b`, folded into the map that multiplies it."""
    return add_diagonal(torch.sub(p, b.mT @ b, alpha=0.5), 0.5)


def cayley_update(b: Tensor, x: Tensor, step: Tensor, order: int, self_correct: bool, seed: Tensor | None) -> Tensor:
    b32, x = matched(raised(b), raised(x))
    p = polynomial(x, x @ x, step, order)
    return rounded(b32 @ (correct(p, b32) if self_correct else p), b.dtype, seed)


# --- spectrum and root ------------------------------------------------------------------------------------------------


def spectrum_update(
    d_c: Tensor,
    d_k: Tensor,
    alpha: Tensor,
    w_c: Tensor,
    w_k: Tensor,
    beta2: Tensor,
    gamma: float,
    damping: float,
    exact: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtypes = d_c.dtype, d_k.dtype, alpha.dtype
    d_c, d_k, alpha, w_c, w_k = map(raised, (d_c, d_k, alpha, w_c, w_k))
    k_c, k_k = d_k.shape[-1], d_c.shape[-1]
    if exact:
        m_c = w_c / (d_c * column(alpha * k_c)) - gamma
        m_k = w_k / (d_k * column(alpha * k_k)) - gamma
        mean_c, mean_k = m_c.mean(-1, keepdim=True), m_k.mean(-1, keepdim=True)
        new_c = d_c * torch.exp(column(beta2) * (m_c - mean_c))
        new_k = d_k * torch.exp(column(beta2) * (m_k - mean_k))
        new_alpha = alpha * torch.exp(beta2 / 2 * (mean_c + mean_k).squeeze(-1))
    else:
        damp_c = damping * k_c * d_k.reciprocal().mean(-1, keepdim=True)
        damp_k = damping * k_k * d_c.reciprocal().mean(-1, keepdim=True)
        log_c = torch.log(column(1 - gamma * beta2) * d_c + column(beta2 / (alpha * k_c)) * (w_c + damp_c))
        log_k = torch.log(column(1 - gamma * beta2) * d_k + column(beta2 / (alpha * k_k)) * (w_k + damp_k))
        mean_c, mean_k = log_c.mean(-1, keepdim=True), log_k.mean(-1, keepdim=True)
        new_c, new_k = torch.exp(log_c - mean_c), torch.exp(log_k - mean_k)
        new_alpha = alpha * torch.exp((mean_c + mean_k).squeeze(-1) / 2)
    return new_c.to(dtypes[0]), new_k.to(dtypes[1]), new_alpha.to(dtypes[2])


def rotate(g: Tensor, b_c: Tensor | None, b_k: Tensor | None) -> Tensor:
    """`B_Cᵀ g B_K` in float32 (float64): rounding what stands between the two products to bf16 would leak the strong
    directions into the weak ones, and cost the digits task 3 % of its loss."""
    g = raised(g)
    if b_c is not None:
        b, g = matched(raised(b_c), g)
        g = b.mT @ g
    if b_k is not None:
        b, g = matched(raised(b_k), g)
        g = g @ b
    return g


def apply_root(
    g: Tensor, b_c: Tensor | None, d_c: Tensor, b_k: Tensor | None, d_k: Tensor, alpha: Tensor, root: float
) -> tuple[Tensor, Tensor]:
    x = rotate(g, b_c, b_k)
    left = raised(d_c).pow(-1 / root) * column(raised(alpha).pow(-1 / root))
    x = (x * left.unsqueeze(-1)).mul_(raised(d_k).pow(-1 / root).unsqueeze(-2))
    x = x if b_c is None else raised(b_c).to(x.dtype) @ x
    x = x if b_k is None else x @ raised(b_k).to(x.dtype).mT
    return x.to(g.dtype), frobenius(x).square().unsqueeze(-1)


# --- factor and rounding ----------------------------------------------------------------------------------------------


def factor_update(k: Tensor, m: Tensor, step: Tensor, seed: Tensor | None = None) -> Tensor:
    k32, m = raised(k), raised(m)
    bounded = step / frobenius(m).clamp(min=1)
    change = (block(bounded) * (k32 @ m)).add_(0)  # of zeros this leaves the positive one, which changes no −0 of `k`
    return rounded(k32 - change, k.dtype, seed).contiguous()


def inverse_free_update(
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
    x, wide = matched(raised(x.to(k.dtype) if k.dtype == torch.bfloat16 else x), raised(k))
    w = (x * block(gain * share)).to(x.dtype) @ x.mT + (wide.mT * block(gain * damping)).to(x.dtype) @ wide
    new = add_diagonal(decay * raised(m) + 0.5 * (w + w.mT), -gain * gamma)
    keep(usable, m, new)
    k.copy_(factor_update(k, m, step * usable.to(wide.dtype), seed))


MASK = 0xFFFFFFFF


def philox(seed: Tensor, rows: Tensor, columns: Tensor) -> list[Tensor]:
    """Philox4x32-10 (Salmon et al., 2011) with counter `(column, row, 0, 0)` and key `seed`: four words of 32 bits."""
    c0, c1 = columns, rows
    c2 = c3 = torch.zeros((), dtype=torch.int64, device=seed.device)
    k0, k1 = seed & MASK, (seed >> 32) & MASK
    for _ in range(10):
        high0, low0 = (c0 * 0xD2511F53 >> 32) & MASK, c0 * 0xD2511F53 & MASK
        high1, low1 = (c2 * 0xCD9E8D57 >> 32) & MASK, c2 * 0xCD9E8D57 & MASK
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return [c0, c1, c2, c3]


def random_bits(shape: torch.Size, seed: Tensor) -> Tensor:
    """Sixteen random bits for each element of a `(…, rows, columns)` tensor, as int64. One Philox call serves eight
    neighbours of a row: element `(i, j)` takes half `j % 2` of word `j // 2 % 4` of counter `(j // 8, i)`."""
    rows, columns = shape[-2:]
    i = torch.arange(rows, device=seed.device).unsqueeze(-1)
    j = torch.arange((columns + 7) // 8, device=seed.device)
    words = torch.stack(torch.broadcast_tensors(*philox(block(seed), i, j)), -1)
    return torch.stack((words & 0xFFFF, words >> 16), -1).flatten(-3)[..., :columns]


def stochastic_round(x: Tensor, seed: Tensor) -> Tensor:
    bits = x.to(torch.float32).contiguous().view(torch.int32)
    noise = random_bits(x.shape, seed).to(torch.int32)
    finite = (bits & 0x7F800000) != 0x7F800000  # adding bits to an infinity would make a NaN
    return (torch.where(finite, bits + noise, bits) & -0x10000).view(torch.float32).to(torch.bfloat16)


def rounded(x: Tensor, dtype: torch.dtype, seed: Tensor | None) -> Tensor:
    return x.to(dtype) if seed is None or dtype != torch.bfloat16 else stochastic_round(x, seed)


def rounded_symmetric(x: Tensor, dtype: torch.dtype, seed: Tensor | None) -> Tensor:
    """For symmetric matrices with zero diagonal. Random bits would round the two halves apart: the lower one counts."""
    x = rounded(x, dtype, seed)
    return x if seed is None else x.tril(-1) + x.tril(-1).mT


# --- momentum and parameters ------------------------------------------------------------------------------------------


def momentum_update(buffer: Tensor, g: Tensor, finite: Tensor, decay: float, nesterov: bool, maximize: bool) -> Tensor:
    old = raised(buffer)
    g = g.to(old.dtype)
    g = torch.where(block(finite), -g if maximize else g, 0)
    keep(finite, buffer, old.lerp(g, 1 - decay))
    direction = raised(buffer)
    direction = g.lerp(direction, decay) if nesterov else direction
    return torch.where(block(finite), direction, 0).contiguous()


def momentum_sum(buffer: Tensor, x: Tensor, finite: Tensor, decay: float, maximize: bool) -> None:
    keep(finite, buffer, decay * raised(buffer) + (-x if maximize else x))


RMS_EPSILON = 1e-8  # guards a division by an update's norm; a preconditioned update is of order 1


def update_factor(u: Tensor, squares: Tensor, lr: Tensor, normalize: str, target: float) -> tuple[Tensor, Tensor]:
    """What each matrix's update is multiplied by, and whether there is one: a step that moves nothing is none."""
    square = squares.sum(-1)
    rms = (square / u[0].numel()).sqrt() + RMS_EPSILON if len(u) else square
    factor = {"rms": target / rms, "clip": rms.clamp(min=1).reciprocal(), "none": torch.ones_like(rms)}[normalize]
    return factor, (square > 0) | (lr.to(u.device) != 0)


def parameter_update(
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
    factor, moves = update_factor(u, squares, lr, normalize, target)
    step += finite & moves
    skipped += ~finite
    lr = lr.to(device=u.device, dtype=u.dtype)
    sizes = [len(p) for p in params]
    for p, mine, rate, mask in zip(params, *(x.split(sizes) for x in (u, factor.to(u.dtype) * -lr, finite)), strict=True):
        wide = p.to(u.dtype)
        decayed = wide - lr * weight_decay * wide if weight_decay else wide
        keep(mask, p, torch.addcmul(decayed, mine, block(rate)))


# --- elementwise optimizers -------------------------------------------------------------------------------------------


def diagonal_update(
    params: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    seconds: list[Tensor],
    steps: list[Tensor],
    skipped: list[Tensor],
    lr: Tensor,
    weight_decay: list[float],
    beta1: float,
    beta2: float,
    gamma: float,
    eps: float,
    batch_size: float,
    rule: str,
    maximize: bool,
) -> None:
    lists = (params, grads, momenta, seconds, steps, skipped, weight_decay)
    for p, g, m, s, step, skips, decay in zip(*lists, strict=True):
        old, g, rate = raised(p), -raised(g) if maximize else raised(g), lr.to(p.device)
        square = g.square().sum()
        finite = square < math.inf
        moves = finite & ((square > 0) | (rate != 0))  # a step that moves nothing is none
        step += moves
        skips += ~finite
        if rule == "adamw":
            second = beta2 * raised(s) + (1 - beta2) * g.square()
            momentum = raised(m) + (1 - beta1) * (g - raised(m))
            bias1, bias2 = 1 - beta1 ** step.double(), 1 - beta2 ** step.double()
            new = old - rate * decay * old - rate / bias1 * momentum / ((second / bias2).sqrt() + eps)
        else:
            second = (1 - (1 - beta2) * gamma) * raised(s) + (1 - beta2) * batch_size * g.square()
            momentum = beta1 * raised(m) + g / (second + eps)
            change = momentum + decay * old
            momentum = change if rule == "rf" else momentum
            new = old - rate * change
        for x, value in ((p, new), (m, momentum), (s, second)):
            torch.where(moves, value.to(x.dtype), x, out=x)
