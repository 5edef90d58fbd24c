"""Helpers that the kernels share: where a chunk lies, tiles in and out of memory, products in the operand precision.

Numbers.  With 16-bit inputs every matrix product runs on float16 operands: eleven bits, but little range.  So no tile reaches a
product as it came: rows are divided by powers of two that bring their largest entry into [1, 2) (:func:`unit_rows`), and what was
divided out comes back in float32, in the weights of :func:`weighted_product` or after the product.  With float32 inputs the same
code splits every operand in two float16 numbers (:func:`product_into`), which needs the same care for range.

Rows.  The tokens of all sequences are the rows of matrices [rows, heads, width]; a chunk is ``C`` consecutive rows from ``first``,
of which those before ``end`` exist.  Others read as zero.
"""

import triton
import triton.language as tl

__all__ = [
    "decay_mask",
    "dense_rows",
    "frobenius",
    "last",
    "load_columns",
    "load_row_block",
    "load_rows",
    "load_scalars",
    "load_state",
    "outer_sum",
    "packed_rows",
    "product",
    "product_into",
    "reciprocal",
    "row_norm",
    "solve",
    "store_columns",
    "store_rows",
    "store_scalars",
    "unit_rows",
    "weighted_product",
    "wide_product",
]

TINY = tl.constexpr(1.1754943508222875e-38)  # below this ‖H‖_F counts as zero


@triton.jit
def dense_rows(slot, T, C: tl.constexpr):
    """(first row, end row) of a chunk slot of equally long sequences; see reference.num_slots."""
    chunks = tl.cdiv(T, C)
    begin = (slot // chunks).to(tl.int64) * T
    return begin + (slot % chunks) * C, begin + T


@triton.jit
def packed_rows(slot, cu_ptr, N, C: tl.constexpr):
    """(first row, end row) of a chunk slot of packed sequences. An empty slot has first >= end: nothing is loaded or stored."""
    low = 0
    high = N
    while high - low > 1:  # the last sequence whose first slot, cu[n] // C + n, is not past this one
        middle = (low + high) // 2
        before = tl.load(cu_ptr + middle) // C + middle <= slot
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    begin = tl.load(cu_ptr + low).to(tl.int64)
    return begin + (slot - (begin // C + low)) * C, tl.load(cu_ptr + low + 1).to(tl.int64)


@triton.jit
def load_row_block(ptr, first, end, heads, head, first_column, D: tl.constexpr, C: tl.constexpr, BE: tl.constexpr):
    """[C, BE] float32: columns first_column … of a [rows, heads, D] matrix."""
    row = tl.arange(0, C)[:, None]
    column = first_column + tl.arange(0, BE)[None, :]
    base = ptr + (first * heads + head) * D
    return tl.load(base + row * (heads * D) + column, mask=(row < end - first) & (column < D), other=0.0).to(tl.float32)


@triton.jit
def load_rows(ptr, first, end, heads, head, D: tl.constexpr, C: tl.constexpr, BD: tl.constexpr):
    """[C, BD] float32 of a [rows, heads, D] matrix."""
    return load_row_block(ptr, first, end, heads, head, 0, D, C, BD)


@triton.jit
def store_rows(ptr, tile, first, end, heads, head, D: tl.constexpr, C: tl.constexpr, BD: tl.constexpr):
    """A [C, BD] tile to a [rows, heads, D] matrix."""
    row = tl.arange(0, C)[:, None]
    column = tl.arange(0, BD)[None, :]
    base = ptr + (first * heads + head) * D
    inside = (row < end - first) & (column < D)
    tl.store(base + row * (heads * D) + column, tile.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def load_scalars(ptr, first, end, heads, head, absent: tl.constexpr, C: tl.constexpr, HAS: tl.constexpr):
    """[C] float32 of a [rows, heads] matrix; the constant ``absent`` where the argument was None."""
    row = tl.arange(0, C)
    if HAS:
        return tl.load(ptr + first * heads + head + row * heads, mask=row < end - first, other=0.0).to(tl.float32)
    else:
        return tl.full((C,), absent, tl.float32)


@triton.jit
def store_scalars(ptr, x, first, end, heads, head, C: tl.constexpr):
    """[C] to a [rows, heads] matrix."""
    row = tl.arange(0, C)
    tl.store(ptr + first * heads + head + row * heads, x.to(ptr.dtype.element_ty), mask=row < end - first)


@triton.jit
def power_of_two(x):
    """The largest power of two that is not above x > 0; 1 for x = 0."""
    p = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where(x < TINY, 1.0, tl.minimum(p, 8.507059173023462e37))


@triton.jit
def unit_scale(largest):
    """power_of_two(largest), but 0 for 0: what is zero has no scale, and asks for none of those that it is compared with."""
    return tl.where(largest < TINY, 0.0, power_of_two(largest))


@triton.jit
def reciprocal(x):
    """1/x, and 0 where x is as good as zero."""
    return tl.where(x < TINY, 0.0, 1.0 / tl.where(x < TINY, 1.0, x))


@triton.jit
def unit_rows(x):
    """(x divided by a power of two per row so that entries are below 2, those powers [C]: 0 for a row of zeros)."""
    s = unit_scale(tl.max(tl.abs(x), 1))
    return x * reciprocal(s)[:, None], s


@triton.jit
def row_norm(x):
    """(x / ‖x‖ by rows, ‖x‖ [C]); safe for any magnitude."""
    x, s = unit_rows(x)
    length = tl.sqrt(tl.sum(x * x, 1))
    return x * reciprocal(length)[:, None], length * s


@triton.jit
def product_into(a, b, accumulator, OPERAND: tl.constexpr):
    """accumulator + a @ b, for operands whose largest entries are O(1).

    OPERAND float16: one product. float32: each factor as the sum of two float16 numbers, 22 bits, and three products on the same
    tensor cores; the factor 32 keeps the second number of small entries out of the subnormals.
    """
    if OPERAND == tl.float32:
        a = a.to(tl.float32) * 32.0
        b = b.to(tl.float32) * 32.0
        a_high = a.to(tl.float16)
        b_high = b.to(tl.float16)
        small = tl.dot(a_high, (b - b_high.to(tl.float32)).to(tl.float16))
        small = tl.dot((a - a_high.to(tl.float32)).to(tl.float16), b_high, small)
        return accumulator + tl.dot(a_high, b_high, small) * (1.0 / 1024.0)
    else:
        return tl.dot(a.to(OPERAND), b.to(OPERAND), accumulator)


@triton.jit
def product(a, b, OPERAND: tl.constexpr):
    """a @ b; see product_into."""
    return product_into(a, b, tl.zeros((a.shape[0], b.shape[1]), tl.float32), OPERAND)


@triton.jit
def wide_product(a, b, OPERAND: tl.constexpr):
    """a @ b for operands of any range: tf32 beside 16-bit inputs, three of them beside float32."""
    if OPERAND == tl.float32:
        return tl.dot(a, b, input_precision="tf32x3")
    else:
        return tl.dot(a, b, input_precision="tf32")


@triton.jit
def weighted_product(p, weight, b, OPERAND: tl.constexpr):
    """(p ∘ weight) @ b, the weights normalised row by row so that they fit the operand precision."""
    s = power_of_two(tl.max(tl.abs(weight), 1))
    return product(p * (weight * (1.0 / s)[:, None]), b, OPERAND) * s[:, None]


@triton.jit
def outer_sum(a, weight, b, EXACT: tl.constexpr, OPERAND: tl.constexpr):
    """Σ_t weight_t a_t b_tᵀ [BD, BE] of unit rows a [C, BD], b [C, BE].

    EXACT: b has no more digits than OPERAND, and a's are kept by splitting it in two.
    """
    s = power_of_two(tl.max(tl.abs(weight), 0))
    weighted = tl.trans(a * (weight * (1.0 / s))[:, None])
    total = product(weighted, b, OPERAND)
    if EXACT and OPERAND != tl.float32:
        total += product(weighted - weighted.to(OPERAND).to(tl.float32), b, OPERAND)
    return total * s


@triton.jit
def decay_mask(c, C: tl.constexpr):
    """D_tj = exp(c_t − c_j) for j ≤ t, else 0."""
    row = tl.arange(0, C)
    causal = row[:, None] >= row[None, :]
    return tl.where(causal, tl.exp(tl.where(causal, c[:, None] - c[None, :], 0.0)), 0.0)


@triton.jit
def last(x, C: tl.constexpr):
    """x[C − 1]."""
    return tl.sum(tl.where(tl.arange(0, C) == C - 1, x, 0.0), 0)


@triton.jit
def load_columns(ptr, scale_ptr, matrix, first_column, D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr):
    """Columns first_column … + BE of a stored state [.., D, E] as (tile [BD, BE], column scales [BE])."""
    row = tl.arange(0, BD)[:, None]
    column = first_column + tl.arange(0, BE)
    inside = column < E
    tile = tl.load(ptr + matrix * (D * E) + row * E + column[None, :], mask=(row < D) & inside[None, :], other=0.0)
    if ptr.dtype.element_ty == tl.float16:
        return tile, tl.load(scale_ptr + column, mask=inside, other=0.0)
    else:  # stored as it is: scaled on the way in
        s = unit_scale(tl.max(tl.abs(tile), 0))
        return tile * reciprocal(s)[None, :], s


@triton.jit
def store_columns(ptr, scale_ptr, tile, matrix, first_column, D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr):
    """Store a float32 tile [BD, BE] as columns of a state; float16 storage takes a power of two out of every column."""
    row = tl.arange(0, BD)[:, None]
    column = first_column + tl.arange(0, BE)
    inside = column < E
    if ptr.dtype.element_ty == tl.float16:
        s = unit_scale(tl.max(tl.abs(tile), 0))
        tile = tile * reciprocal(s)[None, :]
    else:
        s = tl.full((BE,), 1.0, tl.float32)
    target = ptr + matrix * (D * E) + row * E + column[None, :]
    tl.store(target, tile.to(ptr.dtype.element_ty), mask=(row < D) & inside[None, :])
    tl.store(scale_ptr + column, s, mask=inside)


@triton.jit
def load_state(ptr, scale_ptr, matrix, D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr):
    """A whole stored state as (tile [BD, BE] in its storage dtype, one scale): the state is tile · scale."""
    tile, scales = load_columns(ptr, scale_ptr, matrix, 0, D, E, BD, BE)
    s = tl.max(scales, 0)
    return (tile * (scales * reciprocal(s))[None, :]).to(ptr.dtype.element_ty), s


@triton.jit
def frobenius(k, key_scale, mask, gamma, h, h_scale, OPERAND: tl.constexpr):
    """φ_t = ‖H_t‖_F [C], for keys key_scale_j k_j and a start state h_scale · h."""
    h32 = h.to(tl.float32)
    square_scale = key_scale * key_scale
    unit = power_of_two(tl.maximum(h_scale, tl.max(square_scale, 0)))  # φ² would leave float32 where φ does not
    start = tl.sum(tl.sum(h32 * h32, 1), 0)
    start_gain = gamma * (h_scale / unit)
    cross = tl.sum(product(k, h, OPERAND) * k, 1)  # kᵀ h k of each key
    gram = product(k, tl.trans(k), OPERAND)
    weight = mask * (square_scale / unit)[None, :]
    inner = tl.sum(weight * (2.0 * start_gain[:, None] * cross[None, :] + wide_product(weight, gram * gram, OPERAND)), 1)
    return unit * tl.sqrt(tl.maximum(start_gain * start_gain * start + inner, 0.0))


@triton.jit
def solve(
    rhs,  # [C, BK] unit rows q_t/‖q_t‖, float32
    k,  # [C, BK] keys divided by key_scale
    key_scale,  # [C]
    mask,  # [C, C] D
    gamma,  # [C]
    h,  # [BK, BK] start state divided by h_scale
    h_scale,
    phi,  # [C]
    NUM_ITER: tl.constexpr,
    TAU: tl.constexpr,  # polynomial.chebyshev_tau
    FRONT: tl.constexpr,  # c_n = (−1)^n (2 − δ_n0) FRONT (τ^n − τ^{2(N+1)−n})
    TAIL: tl.constexpr,  # τ^{2(N+1)}
    OPERAND: tl.constexpr,
):
    """φ_t x_t/‖q_t‖ [C, BK]: Σ c_n T_n(Z) q with t_{n+1} = 2 Z t_n − t_{n−1}, Z t = 2 H t/φ − t.

    ‖t_n‖ ≤ 1 and φ_t ≥ γ_t ‖H_c‖, D_tj ‖k̂_j‖²: every operand below is O(1) whatever the condition number.
    """
    gain = reciprocal(phi)
    start_gain = (4.0 * gamma * h_scale * gain)[:, None]
    inner = 4.0 * mask * gain[:, None] * (key_scale * key_scale)[None, :]
    kt = tl.trans(k)
    h = h.to(OPERAND)
    k = k.to(OPERAND)
    kt = kt.to(OPERAND)
    previous = rhs
    z = product(rhs * start_gain, h, OPERAND)
    z = product_into(product(rhs, kt, OPERAND) * inner, k, z, OPERAND)
    t = 0.5 * z - rhs
    power = -TAU
    tail = -TAIL / TAU
    x = FRONT * (1.0 - TAIL) * rhs + 2.0 * FRONT * (power - tail) * t
    for _ in range(NUM_ITER - 1):
        inside = product(t, kt, OPERAND) * inner
        z = product_into(t * start_gain, h, -2.0 * t - previous, OPERAND)
        previous = t
        t = product_into(inside, k, z, OPERAND)
        power *= -TAU
        tail *= -1.0 / TAU
        x += 2.0 * FRONT * (power - tail) * t
    return x
