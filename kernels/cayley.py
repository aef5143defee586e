"""The truncated Cayley chain: `B ← B (I + F)`, `F = P(s·X) − I − ½ (BᵀB − I)`, and `T ← (I + F)ᵀ T (I + F)`.

Even powers of a skew matrix and `BᵀB` are symmetric: their lower tiles are computed and mirrored. `F` is written by the
epilogue of `BᵀB`, `B` once, in the epilogue of `B F`. The scale `s` is found on the device, from the partial sums of
squares of `X²`. Both sides of a Kronecker pair go in one launch each.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from spectral_ops.kernels import tiles
from spectral_ops.kernels.config import Config
from spectral_ops.kernels.launch import Sides, cdiv, launch, lower_tiles, pick, precision, sides

QUARTIC_A, QUARTIC_B = tl.constexpr(4 - 2 * math.sqrt(2)), tl.constexpr(6 - 4 * math.sqrt(2))
LOST = tl.constexpr(1e-3)  # as in `reference.LOST`
ROOT_HALF, TINY = tl.constexpr(math.sqrt(0.5)), tl.constexpr(1.1754943508222875e-38)


@triton.jit
def _side(count0, count1, n, m):
    """Of this program: the matrix, whether it is of the right side, its number within the side, the side's size."""
    matrix = (tl.program_id(0) // (count0 + count1)).to(tl.int64)
    t = tl.program_id(0) % (count0 + count1)
    right = t >= count0
    return matrix, right, tl.where(right, t - count0, t), tl.where(right, m, n)


@triton.jit
def _limited(squares, parts0, parts1, matrix, right, limit):
    """`s = min(1, limit / σ)` and `s σ`, where `σ² = ‖X²‖_F / √2` bounds `‖X‖₂²`, from the sums of squares of its tiles."""
    first = squares + matrix * (parts0 + parts1) + tl.where(right, parts0, 0)
    sigma = tl.sqrt(tl.sqrt(tiles.total(first, tl.where(right, parts1, parts0), 1024)) * ROOT_HALF)
    step = tl.minimum(limit / tl.maximum(sigma, TINY), 1.0)
    return step, step * sigma


@triton.jit(do_not_specialize=["count0", "count1"])
def _square(
    a0, a1, b0, b1, out0, out1, squares, n, m, count0, count1, SIGN: tl.constexpr,
    BLOCK: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`SIGN · A Bᵀ` where that is symmetric, and the sums of squares of its tiles and their mirror images."""
    matrix, right, t, size = _side(count0, count1, n, m)
    i, j = tiles.triangle(t)
    start = matrix * size * size
    a, b = tl.where(right, a1, a0) + start, tl.where(right, b1, b0) + start
    out = tl.where(right, out1, out0) + start
    w = SIGN * tiles.product(a, size, 1, b, 1, size, i, j, size, size, size, BLOCK, BLOCK, BK, PRECISION)  # [BLOCK, BLOCK]
    if squares is not None:
        tl.store(squares + tl.program_id(0), tl.where(i == j, 1.0, 2.0) * tl.sum(w * w))
    tiles.store_both(out, w, w, i, j, size, BLOCK)


@triton.jit(do_not_specialize=["count0", "count1", "parts0", "parts1"])
def _even(
    x2_0, x2_1, x4_0, x4_1, out0, out1, squares, parts0, parts1, step, limit, n, m, count0, count1,
    BLOCK: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`E = Y² + Y⁴ + Y⁶`, `Y = s·X`, so that `(I + Y²)(I + Y⁴) = I + E`."""
    matrix, right, t, size = _side(count0, count1, n, m)
    i, j = tiles.triangle(t)
    start = matrix * size * size
    x2, x4 = tl.where(right, x2_1, x2_0) + start, tl.where(right, x4_1, x4_0) + start
    out = tl.where(right, out1, out0) + start
    x6 = tiles.product(x2, size, 1, x4, size, 1, i, j, size, size, size, BLOCK, BLOCK, BK, PRECISION)  # [BLOCK, BLOCK]
    if step is None:
        s, _ = _limited(squares, parts0, parts1, matrix, right, limit)
    else:
        s = tl.load(step + matrix)
    s2 = s * s
    e = s2 * (tiles.load_tile(x2, i, j, size, size, BLOCK, BLOCK) + s2 * (
        tiles.load_tile(x4, i, j, size, size, BLOCK, BLOCK) + s2 * x6))  # fmt: skip
    tiles.store_both(out, e, e, i, j, size, BLOCK)


@triton.jit(do_not_specialize=["count0", "count1", "parts0", "parts1"])
def _map(
    b0, b1, x0, x1, x2_0, x2_1, e0, e1, f0, f1, h0, h1, squares, parts0, parts1, step, usable, limit,
    n, m, count0, count1,
    ORDER: tl.constexpr, CORRECT: tl.constexpr, BLOCK: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`F = P(Y) − I − ½ (BᵀB − I)`, `Y = s·X`. Order 8 lacks a product yet: `F + H E`."""
    matrix, right, t, size = _side(count0, count1, n, m)
    i, j = tiles.triangle(t)
    start = matrix * size * size
    px, px2 = tl.where(right, x1, x0) + start, tl.where(right, x2_1, x2_0) + start
    if step is None:
        s, turn = _limited(squares, parts0, parts1, matrix, right, limit)
    else:
        s, turn = tl.load(step + matrix), 0.0
    # Symmetric products are added up in one accumulator and skew ones in another, [BLOCK, BLOCK]: registers are short.
    symmetric = tl.zeros((BLOCK, BLOCK), tl.float32)
    if ORDER == 3 or ORDER == 4:
        x3 = tiles.product(px2, size, 1, px, size, 1, i, j, size, size, size, BLOCK, BLOCK, BK, PRECISION)
    if ORDER == 4:
        x4 = tiles.product(px2, size, 1, px2, size, 1, i, j, size, size, size, BLOCK, BLOCK, BK, PRECISION)
        symmetric = (-2.0 * QUARTIC_B) * (s * s) * (s * s) * x4
    if CORRECT:
        b = tl.where(right, b1, b0) + start
        symmetric = tiles.product(b, 1, size, b, size, 1, i, j, size, size, size, BLOCK, BLOCK, BK, PRECISION, symmetric)
    x2 = s * s * tiles.load_tile(px2, i, j, size, size, BLOCK, BLOCK)
    if ORDER == 2:
        even = 4.0 / (1.0 + tl.sqrt(tl.maximum(1.0 - 4.0 * turn * turn, 0.0))) * x2
    elif ORDER == 8:
        even = x2 + tiles.load_tile(tl.where(right, e1, e0) + start, i, j, size, size, BLOCK, BLOCK)
    else:
        even = 2.0 * x2
    if CORRECT:
        o = tl.arange(0, BLOCK)
        identity = ((o[:, None] == o[None, :]) & (i == j)).to(tl.float32)
        symmetric -= identity
    even -= 0.5 * symmetric
    odd = 2.0 * s * tiles.load_tile(px, i, j, size, size, BLOCK, BLOCK)
    if ORDER == 3 or ORDER == 4:
        odd += (1.0 + 0.25 * turn * turn if ORDER == 3 else QUARTIC_A) * s * s * s * x3
    if usable is not None:
        ok = tl.load(usable + matrix) != 0
        even, odd = tl.where(ok, even, 0.0), tl.where(ok, odd, 0.0)
    tiles.store_both(tl.where(right, f1, f0) + start, even + odd, even - odd, i, j, size, BLOCK)
    if ORDER == 8:
        if usable is not None:
            x2 = tl.where(ok, x2, 0.0)
        tiles.store_both(tl.where(right, h1, h0) + start, x2 + odd, x2 - odd, i, j, size, BLOCK)


@triton.jit(do_not_specialize=["count0", "count1"])
def _finish_map(
    a0, a1, b0, b1, f0, f1, out0, out1, n, m, count0, count1,
    BLOCK: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`F + A B`."""
    matrix, right, t, size = _side(count0, count1, n, m)
    across = tl.cdiv(size, BLOCK)
    i, j = t // across, t % across
    start = matrix * size * size
    a, b = tl.where(right, a1, a0) + start, tl.where(right, b1, b0) + start
    w = tiles.product(a, size, 1, b, size, 1, i, j, size, size, size, BLOCK, BLOCK, BK, PRECISION)  # [BLOCK, BLOCK]
    w += tiles.load_tile(tl.where(right, f1, f0) + start, i, j, size, size, BLOCK, BLOCK)
    out = tl.where(right, out1, out0) + start
    tiles.store_tile(out, tiles.rounded(w, out.dtype.element_ty, None), i, j, size, size, BLOCK, BLOCK)


@triton.jit(do_not_specialize=["count0", "count1"])
def _turn(
    b0, b1, r0, r1, f0, f1, diag0, diag1, out0, out1, v0, v1, seed0, seed1, n, m, count0, count1,
    BLOCK: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`B + B F`, rounded stochastically if there are seeds, and `V = R + Diag(d) F + R F`: `T (I + F) = Diag(d) + V`."""
    if r0 is None:
        matrix, right, t, size = _side(count0, count1, n, m)
        carried = False
    else:
        matrix, right, t, size = _side(2 * count0, 2 * count1, n, m)
        half = tl.where(right, count1, count0)
        carried = t >= half
        t = tl.where(carried, t - half, t)
    across = tl.cdiv(size, BLOCK)
    i, j = t // across, t % across
    start = matrix * size * size
    b, f = tl.where(right, b1, b0) + start, tl.where(right, f1, f0) + start
    out = tl.where(right, out1, out0) + start
    if r0 is not None:
        b = tl.where(carried, tl.where(right, r1, r0) + start, b)
        out = tl.where(carried, tl.where(right, v1, v0) + start, out)
    w = tiles.product(b, size, 1, f, size, 1, i, j, size, size, size, BLOCK, BLOCK, BK, PRECISION)  # [BLOCK, BLOCK]
    w += tiles.load_tile(b, i, j, size, size, BLOCK, BLOCK)
    if r0 is not None:  # noqa: SIM102 (decided when the kernel is compiled, the inner one when it runs)
        if carried:
            diag = tl.where(right, diag1, diag0) + matrix * size
            w += tiles.load_vector(diag, i, size, BLOCK)[:, None] * tiles.load_tile(f, i, j, size, size, BLOCK, BLOCK)
    if seed0 is None or out.dtype.element_ty != tl.bfloat16:
        tiles.store_tile(out, tiles.rounded(w, out.dtype.element_ty, None), i, j, size, size, BLOCK, BLOCK)
    elif carried:
        tiles.store_tile(out, tiles.to_bfloat16(w, None), i, j, size, size, BLOCK, BLOCK)
    else:
        bits = tiles.random_bits(tl.load(tl.where(right, seed1, seed0) + matrix), i, j, BLOCK, BLOCK)
        tiles.store_tile(out, tiles.to_bfloat16(w, bits), i, j, size, size, BLOCK, BLOCK)


@triton.jit(do_not_specialize=["count0", "count1"])
def _conjugate(
    f0, f1, v0, v1, diag0, diag1, floor, d0, d1, r0, r1, b0, b1, turned0, turned1, seed0, seed1, n, m, count0, count1,
    BLOCK: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`T = (I + F)ᵀ (Diag(d) + V)` as its diagonal and the rest. Also moves the turned basis to its place."""
    matrix, right, t, size = _side(count0, count1, n, m)
    i, j = tiles.triangle(t)
    start = matrix * size * size
    f, v = tl.where(right, f1, f0) + start, tl.where(right, v1, v0) + start
    diag = tl.where(right, diag1, diag0) + matrix * size
    w = tiles.product(f, 1, size, v, size, 1, i, j, size, size, size, BLOCK, BLOCK, BK, PRECISION)  # [BLOCK, BLOCK]
    w += tiles.load_tile(v, i, j, size, size, BLOCK, BLOCK)
    dj = tiles.load_vector(diag, j, size, BLOCK)
    w += tl.trans(tiles.load_tile(f, j, i, size, size, BLOCK, BLOCK)) * dj[None, :]
    o = tl.arange(0, BLOCK)
    r = tl.where(right, r1, r0) + start
    if i == j:
        new = dj + tl.sum(tl.where(o[:, None] == o[None, :], w, 0.0), 1)
        if r.dtype.element_ty == tl.bfloat16:
            new = tl.where(new > dj * LOST, new, dj)
        if floor is not None:
            new = tl.maximum(new, tl.load(floor + 2 * matrix + right.to(tl.int32)))
        tl.store(tl.where(right, d1, d0) + matrix * size + i * BLOCK + o, new, mask=o < size - i * BLOCK)
        w = tl.where(o[:, None] > o[None, :], w, 0.0)  # as zeros, so that stochastic rounding keeps them
    if seed0 is None or r.dtype.element_ty != tl.bfloat16:
        w = tiles.rounded(w, r.dtype.element_ty, None)
    else:
        bits = tiles.random_bits(~tl.load(tl.where(right, seed1, seed0) + matrix), i, j, BLOCK, BLOCK)
        w = tiles.to_bfloat16(w, bits)
    if i == j:
        w = tl.where(o[:, None] > o[None, :], w, tl.trans(w))
    tiles.store_tile(r, w, i, j, size, size, BLOCK, BLOCK)
    if i != j:
        tiles.store_tile(r, tl.trans(w), j, i, size, size, BLOCK, BLOCK)
    if b0 is not None:
        b, turned = tl.where(right, b1, b0) + start, tl.where(right, turned1, turned0) + start
        _move(b, turned, i, j, size, BLOCK)
        if i != j:
            _move(b, turned, j, i, size, BLOCK)


@triton.jit
def _move(to, source, i, j, n, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    inside = (o < n - i * BLOCK)[:, None] & (o < n - j * BLOCK)[None, :]
    at = (i * BLOCK).to(tl.int64) * n + j * BLOCK + (o[:, None] * n + o[None, :])
    tl.store(to + at, tl.load(source + at, mask=inside), mask=inside)


class Grid:
    """The launches over a pair of square matrices: which programs, which tiles.

    Counts of programs are not specialised by Triton (`do_not_specialize`): every new shape would compile the kernels again.
    """

    def __init__(self, x: Sides, config: Config | None):
        left, right = x
        self.n, self.m = 0 if left is None else left.shape[-1], 0 if right is None else right.shape[-1]
        like = right if left is None else left
        assert like is not None, "a pair has at least one side"
        self.like = like
        self.batch = self.like.shape[0]
        self.config = config

    def lower(self, op: str) -> dict[str, Any]:
        """Arguments of a launch with one program for each lower tile."""
        config = self._config(op)
        return self._arguments(config, lower_tiles(self.n, config.block), lower_tiles(self.m, config.block))

    def full(self, op: str, times: int = 1) -> dict[str, Any]:
        """Arguments of a launch with one program for each tile, or so many `times` that."""
        config = self._config(op)
        return self._arguments(config, cdiv(self.n, config.block) ** 2, cdiv(self.m, config.block) ** 2, times)

    def empty(self) -> Sides:
        left, right = (
            torch.empty((self.batch, size, size), dtype=self.like.dtype, device=self.like.device) if size else None
            for size in (self.n, self.m)
        )
        return left, right

    def numbers(self, count: int) -> Tensor:
        return torch.empty((self.batch, count), dtype=torch.float32, device=self.like.device)

    def _config(self, op: str) -> Config:
        size = max(self.n, self.m)
        config = self.config or pick(op, size, size, self.batch, self.like, other=min(self.n, self.m))
        assert config is not None, f"the table has no tile for {op}"
        return config

    def _arguments(self, config: Config, count0: int, count1: int, times: int = 1) -> dict[str, Any]:
        return {
            "programs": self.batch * (count0 + count1) * times, "config": config, "n": self.n, "m": self.m,
            "count0": count0, "count1": count1, "BLOCK": config.block, "BK": config.k, "PRECISION": precision(self.like.dtype),
        }  # fmt: skip


def generator_map(
    b: Sides, x: Sides, order: int, *, step: Tensor | None = None, limit: float = 1.0, correct: bool = True,
    usable: Tensor | None = None, config: Config | None = None,
) -> Sides:  # fmt: skip
    """`F` for each side, so that the basis becomes `B (I + F)`. Bases `b` and generators `x` are `(batch, n, n)`, contiguous.

    `step` `(batch,)` scales the generators; None: they are limited, `‖s·X‖₂ ≤ limit`. Where not `usable`, `F` is 0.
    """
    grid = Grid(x, config)
    square = grid.lower("square")
    squares = grid.numbers(square["count0"] + square["count1"])
    scale = {"step": step, "limit": limit, "squares": squares, "parts0": square["count0"], "parts1": square["count1"]}
    x2 = grid.empty()
    launch(_square, **square, **sides("a", x), **sides("b", x), **sides("out", x2), squares=squares, SIGN=-1)
    e: Sides = x2  # not looked at, but in order 8
    if order == 8:
        x4, e = grid.empty(), grid.empty()
        launch(_square, **square, **sides("a", x2), **sides("b", x2), **sides("out", x4), squares=None, SIGN=1)
        launch(_even, **grid.lower("even"), **sides("x2_", x2), **sides("x4_", x4), **sides("out", e), **scale)
    f = grid.empty()
    h = grid.empty() if order == 8 else f
    launch(
        _map, **grid.lower("map" if order < 4 else "map_long"), **sides("b", b), **sides("x", x), **sides("x2_", x2),
        **sides("e", e), **sides("f", f), **sides("h", h), **scale, usable=usable, ORDER=order, CORRECT=correct,
    )  # fmt: skip
    if order != 8:
        return f
    out = grid.empty()
    launch(
        _finish_map, **grid.full("finish_map"), **sides("a", h), **sides("b", e), **sides("f", f), **sides("out", out)
    )  # fmt: skip
    return out


def turn(
    b: Sides, f: Sides, *, residual: Sides = (None, None), diag: Sides = (None, None), seed: Sides = (None, None),
    config: Config | None = None,
) -> tuple[Sides, Sides]:  # fmt: skip
    """`B (I + F)`, and where residuals are given `V`, so that `T (I + F) = Diag(diag) + V`."""
    grid = Grid(f, config)
    carry = any(r is not None for r in residual)
    out, v = grid.empty(), grid.empty() if carry else (None, None)
    launch(
        _turn, **grid.full("turn", times=2 if carry else 1), **sides("b", b), **sides("r", residual), **sides("f", f),
        **sides("diag", diag), **sides("out", out), **sides("v", v), **sides("seed", seed),
    )  # fmt: skip
    return out, v


def conjugate(
    f: Sides, v: Sides, diag: Sides, d: Sides, residual: Sides, *, floor: Tensor | None = None,
    b: Sides = (None, None), turned: Sides = (None, None), seed: Sides = (None, None), config: Config | None = None,
) -> None:  # fmt: skip
    """Write `(I + F)ᵀ (Diag(diag) + V)` into `d`, not under `floor` `(batch, 2)`, and `residual`; move `turned` into `b`."""
    launch(
        _conjugate, **Grid(f, config).lower("conjugate"), **sides("f", f), **sides("v", v), **sides("diag", diag),
        floor=floor, **sides("d", d), **sides("r", residual), **sides("b", b), **sides("turned", turned), **sides("seed", seed),
    )  # fmt: skip
