"""Device functions that the kernels share: the triangular grid, products of tiles, stores with both roundings.

Shapes stand behind the lines that make them. `i` and `j` are tile indices, `oi`, `oj`, `ok` offsets inside a tile.
Triton's interpreter computes wrongly on bfloat16 (it works on the bit patterns) and truncates where it should round, so
under it tiles are raised to float32 before a product and rounded by integers; neither happens on a GPU.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def triangle(t):
    """Row and column, `i >= j`, of entry `t` of a lower triangle that is numbered row by row."""
    i = ((tl.sqrt(8.0 * t + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > t, i - 1, i)  # the square root may be off by one either way
    i = tl.where((i + 1) * (i + 2) // 2 <= t, i + 1, i)
    return i, t - i * (i + 1) // 2


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """`acc + a @ b` in float32. A float32 operand meets a 16-bit one as two halves, so that next to nothing of it is lost."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    elif a.dtype == b.dtype:
        return tl.dot(a, b, acc, input_precision=PRECISION)
    elif a.dtype == tl.float32:
        high = a.to(b.dtype)
        acc = tl.dot((a - high.to(tl.float32)).to(b.dtype), b, acc, input_precision="ieee")
        return tl.dot(high, b, acc, input_precision="ieee")
    else:
        high = b.to(a.dtype)
        acc = tl.dot(a, (b - high.to(tl.float32)).to(a.dtype), acc, input_precision="ieee")
        return tl.dot(a, high, acc, input_precision="ieee")


@triton.jit
def product(
    a, a_row, a_col, b, b_row, b_col, i, j, n, m, k,
    BI: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr, acc=None,
):  # fmt: skip
    """Tile `(i, j)` of `A B`, for `A` of `n × k` and `B` of `k × m`, on top of `acc` where that is given. Pointers are to the
    matrices' first elements."""
    oi, oj, ok = tl.arange(0, BI), tl.arange(0, BJ), tl.arange(0, BK)
    mi, mj = oi < n - i * BI, oj < m - j * BJ
    pa = a + (i * BI).to(tl.int64) * a_row + (oi[:, None] * a_row + ok[None, :] * a_col)  # [BI, BK]
    pb = b + (j * BJ).to(tl.int64) * b_col + (ok[:, None] * b_row + oj[None, :] * b_col)  # [BK, BJ]
    if acc is None:
        acc = tl.zeros((BI, BJ), tl.float32)
    for start in range(0, k, BK):
        mk = ok < k - start
        ta = tl.load(pa, mask=mi[:, None] & mk[None, :], other=0.0)
        tb = tl.load(pb, mask=mk[:, None] & mj[None, :], other=0.0)
        acc = dot(ta, tb, acc, PRECISION)
        pa += BK * a_col
        pb += BK * b_row
    return acc


@triton.jit
def weighted_gram(
    x, x_row, x_col, scale, i, j, n, k,
    BLOCK: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tile `(i, j)` of `X Diag(scale) Xᵀ`, for `X` of `n × k`. The scale is applied on load; None: ones."""
    oi, ok = tl.arange(0, BLOCK), tl.arange(0, BK)
    mi, mj = oi < n - i * BLOCK, oi < n - j * BLOCK
    pa = x + (i * BLOCK).to(tl.int64) * x_row + (oi[:, None] * x_row + ok[None, :] * x_col)  # [BLOCK, BK]
    pb = x + (j * BLOCK).to(tl.int64) * x_row + (ok[:, None] * x_col + oi[None, :] * x_row)  # [BK, BLOCK]
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, k, BK):
        mk = ok < k - start
        ta = tl.load(pa, mask=mi[:, None] & mk[None, :], other=0.0)
        tb = tl.load(pb, mask=mk[:, None] & mj[None, :], other=0.0)
        if scale is not None:
            s = tl.load(scale + start + ok, mask=mk, other=0.0).to(tl.float32)
            scaled = ta.to(tl.float32) * s[None, :]
            ta = scaled if INTERPRETED else scaled.to(x.dtype.element_ty)
        acc = dot(ta, tb, acc, PRECISION)
        pa += BK * x_col
        pb += BK * x_col
    return acc


@triton.jit
def random_bits(seed, i, j, BI: tl.constexpr, BJ: tl.constexpr):
    """Sixteen random bits for each element of tile `(i, j)`, [BI, BJ] int32, as `reference.random_bits` defines them: one
    Philox call serves eight neighbours of a row."""
    row = i * BI + tl.arange(0, BI)
    eighth = j * (BJ // 8) + tl.arange(0, BJ // 8)
    c0 = tl.broadcast_to(eighth[None, :], (BI, BJ // 8)).to(tl.uint32, bitcast=True)
    c1 = tl.broadcast_to(row[:, None], (BI, BJ // 8)).to(tl.uint32, bitcast=True)
    zero = tl.zeros((BI, BJ // 8), tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, zero, zero)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [BI, BJ // 8, 2, 2], in the order w0, w1, w2, w3
    return tl.join(words & 0xFFFF, words >> 16).reshape(BI, BJ).to(tl.int32, bitcast=True)


@triton.jit
def to_bfloat16(x, bits):
    """Round float32 to bfloat16: stochastically by sixteen random `bits` an element, or (None) to nearest even."""
    if bits is None:
        if not INTERPRETED:
            return x.to(tl.bfloat16)
        else:
            b = x.to(tl.int32, bitcast=True)
            b = tl.where(x == x, b + 0x7FFF + ((b >> 16) & 1), b)
            return (b >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        b = x.to(tl.int32, bitcast=True)
        finite = (b & 0x7F800000) != 0x7F800000  # adding bits to an infinity would make a NaN
        return (tl.where(finite, b + bits, b) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def rounded(x, dtype: tl.constexpr, bits):
    """A float32 tile in `dtype`."""
    if dtype == tl.bfloat16:
        return to_bfloat16(x, bits)
    else:
        return x.to(dtype)


@triton.jit
def load_tile(p, i, j, n, m, BI: tl.constexpr, BJ: tl.constexpr):
    """Tile `(i, j)` of a contiguous `n × m` matrix, in float32; zeros outside."""
    oi, oj = tl.arange(0, BI), tl.arange(0, BJ)
    inside = (oi < n - i * BI)[:, None] & (oj < m - j * BJ)[None, :]
    start = p + (i * BI).to(tl.int64) * m + j * BJ
    return tl.load(start + (oi[:, None] * m + oj[None, :]), mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_tile(p, value, i, j, n, m, BI: tl.constexpr, BJ: tl.constexpr):
    """Write tile `(i, j)` of a contiguous `n × m` matrix; `value` has its dtype already."""
    oi, oj = tl.arange(0, BI), tl.arange(0, BJ)
    inside = (oi < n - i * BI)[:, None] & (oj < m - j * BJ)[None, :]
    start = p + (i * BI).to(tl.int64) * m + j * BJ
    tl.store(start + (oi[:, None] * m + oj[None, :]), value, mask=inside)


@triton.jit
def store_both(p, value, mirrored, i, j, n, BLOCK: tl.constexpr):
    """Write float32 `value` to tile `(i, j)`, `i >= j`, of an `n × n` matrix, and the transpose of `mirrored` to tile `(j, i)`:
    one writer for each element."""
    store_tile(p, rounded(value, p.dtype.element_ty, None), i, j, n, n, BLOCK, BLOCK)
    if i != j:
        store_tile(p, rounded(tl.trans(mirrored), p.dtype.element_ty, None), j, i, n, n, BLOCK, BLOCK)


@triton.jit
def load_vector(p, i, n, BLOCK: tl.constexpr, other: tl.constexpr = 0.0):
    """Elements `i · BLOCK …` of a vector of `n`, in float32."""
    o = i * BLOCK + tl.arange(0, BLOCK)
    return tl.load(p + o, mask=o < n, other=other).to(tl.float32)


@triton.jit
def total(p, count, BLOCK: tl.constexpr):
    """The sum of `count` partial results, in a fixed order."""
    acc = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        o = start + tl.arange(0, BLOCK)
        acc += tl.load(p + o, mask=o < count, other=0.0)
    return tl.sum(acc)


@triton.jit
def mean_reciprocal(d, n, BLOCK: tl.constexpr):
    """The mean of `1 / d`, for a vector of `n`."""
    acc = tl.zeros((BLOCK,), tl.float32)
    for i in range(tl.cdiv(n, BLOCK)):
        acc += tl.where(i * BLOCK + tl.arange(0, BLOCK) < n, 1.0 / load_vector(d, i, n, BLOCK, 1.0), 0.0)
    return tl.sum(acc) / n
