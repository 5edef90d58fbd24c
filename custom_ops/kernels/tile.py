"""Helpers that the kernels share: where a chunk lies, tiles in and out of memory, products in the operand precision.

Numbers.  With 16-bit inputs every matrix product runs on float16 operands: eleven bits, but little range.  So no tile reaches a
product as it came: rows are divided by powers of two that bring their largest entry into [1, 2) (:func:`unit_rows`), and what was
divided out comes back in float32, in the weights of :func:`decay_weights` or after the product.  With float32 inputs the same
code splits every operand in two float16 numbers (:func:`product_into`), which needs the same care for range.

Rows.  The tokens of all sequences are the rows of matrices [rows, heads, width]; a chunk is ``C`` consecutive rows from ``first``,
of which those before ``end`` exist.  Others read as zero.
"""

import triton
import triton.language as tl

__all__ = [
    "decay_exponents",
    "decay_mask",
    "decay_mask_transposed",
    "decay_weights",
    "decay_weights_transposed",
    "dense_rows",
    "frobenius",
    "inner_product",
    "largest_entry",
    "last",
    "load_block",
    "load_block_transposed",
    "load_row_block",
    "load_rows",
    "load_scalars",
    "load_state",
    "load_tile",
    "packed_rows",
    "power_of_two",
    "product",
    "product_into",
    "readout",
    "reciprocal",
    "reciprocal_of_power",
    "row_scales",
    "scalars",
    "solve",
    "split_outer_product",
    "split_product",
    "store_row_block",
    "store_rows",
    "store_scalars",
    "store_state",
    "unit_rows",
    "unit_scale",
]

TINY = tl.constexpr(1.1754943508222875e-38)  # below this a number counts as zero
LEAST_PHI = tl.constexpr(2.0**-100)  # and below this ‖H‖_F: q/(aφ) would leave float32
LEAST_SQUARE = tl.constexpr(2.0**-120)  # and in a step below this its square, for squares of smaller entries lose their digits
LOG2E = tl.constexpr(1.4426950408889634)
LEAST_EXPONENT = tl.constexpr(-160.0)  # of a token's decay: 2^-160 is zero in float32, and more would cost what follows its digits


@triton.jit
def dense_rows(slot, T, C: tl.constexpr):
    """(first row, end row) of a chunk slot of equally long sequences; see reference.num_slots.

    Each kernel chooses between this and packed_rows itself: behind one more call, Inductor's mutation analysis takes cu_seqlens for
    written.
    """
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
def rows_left(first, end, C: tl.constexpr):
    """Rows of a chunk that exist, in 32 bits: a 64-bit comparison for every element would hold two registers for each."""
    return tl.minimum(tl.maximum(end - first, 0), C).to(tl.int32)


@triton.jit
def load_tile(ptr, first, end, heads, head, first_column, D: tl.constexpr, C: tl.constexpr, BE: tl.constexpr):
    """[C, BE] in memory's dtype: columns first_column … of a [rows, heads, D] matrix."""
    row = tl.arange(0, C)[:, None]
    column = first_column + tl.arange(0, BE)[None, :]
    base = ptr + (first * heads + head) * D
    return tl.load(base + row * (heads * D) + column, mask=(row < rows_left(first, end, C)) & (column < D), other=0.0)


@triton.jit
def load_row_block(ptr, first, end, heads, head, first_column, D: tl.constexpr, C: tl.constexpr, BE: tl.constexpr):
    """load_tile in float32."""
    return load_tile(ptr, first, end, heads, head, first_column, D, C, BE).to(tl.float32)


@triton.jit
def load_rows(ptr, first, end, heads, head, D: tl.constexpr, C: tl.constexpr, BD: tl.constexpr):
    """[C, BD] float32 of a [rows, heads, D] matrix."""
    return load_row_block(ptr, first, end, heads, head, 0, D, C, BD)


@triton.jit
def store_row_block(ptr, tile, first, end, heads, head, first_column, D: tl.constexpr, C: tl.constexpr, BE: tl.constexpr):
    """A [C, BE] tile to columns first_column … of a [rows, heads, D] matrix."""
    row = tl.arange(0, C)[:, None]
    column = first_column + tl.arange(0, BE)[None, :]
    base = ptr + (first * heads + head) * D
    inside = (row < rows_left(first, end, C)) & (column < D)
    tl.store(base + row * (heads * D) + column, tile.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def store_rows(ptr, tile, first, end, heads, head, D: tl.constexpr, C: tl.constexpr, BD: tl.constexpr):
    """A [C, BD] tile to a [rows, heads, D] matrix."""
    store_row_block(ptr, tile, first, end, heads, head, 0, D, C, BD)


@triton.jit
def load_scalars(ptr, first, end, heads, head, C: tl.constexpr, HAS: tl.constexpr, AXIS: tl.constexpr = 0):
    """What :func:`scalars` makes [C] of: scalars of a [rows, heads] matrix and, along AXIS, copies that are zero instead of loaded.

    The copies make a tile of a size that counts as worth loading once: the compiler would load a vector anew in every layout that
    it is used in, element by element with an address and a mask for each, and that costs more registers than the tiles do.

    A kernel loads all that it can before it uses any of it: uses have barriers, behind which every load would wait on its own.
    """
    if HAS:
        copy = tl.expand_dims(tl.arange(0, 256 // C), 1 - AXIS)
        row = tl.expand_dims(tl.arange(0, C), AXIS)
        inside = (row < rows_left(first, end, C)) & (copy == 0)
        return tl.load(ptr + first * heads + head + row * heads + copy * 0, mask=inside, other=0.0)
    else:
        return 0.0


@triton.jit
def scalars(loaded, absent: tl.constexpr, C: tl.constexpr, HAS: tl.constexpr, AXIS: tl.constexpr = 0):
    """[C] float32 of what load_scalars returned; the constant ``absent`` where the argument was None.

    AXIS: which of the two is the faster was timed, kernel by kernel (docs/performance.md).
    """
    if HAS:
        return tl.sum(loaded.to(tl.float32), AXIS)
    else:
        return tl.full((C,), absent, tl.float32)


@triton.jit
def store_scalars(ptr, x, first, end, heads, head, C: tl.constexpr):
    """[C] to a [rows, heads] matrix."""
    row = tl.arange(0, C)
    tl.store(ptr + first * heads + head + row * heads, x.to(ptr.dtype.element_ty), mask=row < rows_left(first, end, C))


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
def reciprocal_of_power(s):
    """1/s of a power of two between 2^-126 and 2^126, and 0 of 0: exact, and two instructions where a division takes ten."""
    return tl.where(s == 0.0, 0.0, (0x7F000000 - s.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True))


@triton.jit
def row_scales(x):
    """A power of two for each row [C] that brings its entries below 2; 0 for a row of zeros."""
    return unit_scale(tl.max(tl.abs(x.to(tl.float32)), 1))


@triton.jit
def unit_rows(x):
    """(x divided by row_scales, those)."""
    s = row_scales(x)
    return x * reciprocal_of_power(s)[:, None], s


@triton.jit
def product_into(a, b, accumulator, OPERAND: tl.constexpr, TRANSPOSED: tl.constexpr = False):
    """accumulator + a @ b, or aᵀ @ b if TRANSPOSED, for operands whose largest entries are O(1).

    OPERAND float16: one product. float32: each factor as the sum of two float16 numbers, 22 bits, and three products on the same
    tensor cores; the factor 32 keeps the second number of small entries out of the subnormals. What is transposed has its operand's
    dtype already: see docs/design.md, section 5, on tl.trans.
    """
    if OPERAND == tl.float32:
        a = a.to(tl.float32) * 32.0
        b = b.to(tl.float32) * 32.0
        a_high = a.to(tl.float16)
        b_high = b.to(tl.float16)
        a_left = tl.trans(a_high) if TRANSPOSED else a_high
        small = tl.dot(a_left, (b - b_high.to(tl.float32)).to(tl.float16))
        a_low = (a - a_high.to(tl.float32)).to(tl.float16)
        small = tl.dot(tl.trans(a_low) if TRANSPOSED else a_low, b_high, small)
        return accumulator + tl.dot(a_left, b_high, small) * (1.0 / 1024.0)
    else:
        a = a.to(OPERAND)
        if TRANSPOSED:
            a = tl.trans(a)
        return tl.dot(a, b.to(OPERAND), accumulator)


@triton.jit
def product(a, b, OPERAND: tl.constexpr):
    """a @ b; see product_into."""
    return product_into(a, b, tl.zeros((a.shape[0], b.shape[1]), tl.float32), OPERAND)


@triton.jit
def split_product(a, b, OPERAND: tl.constexpr):
    """a @ b for b with no more digits than OPERAND: a in two parts, so that its digits count where the sum cancels."""
    total = product(a, b, OPERAND)
    if OPERAND != tl.float32:
        total = product_into(a - a.to(OPERAND).to(tl.float32), b, total, OPERAND)
    return total


@triton.jit
def split_outer_product(a, b, OPERAND: tl.constexpr):
    """aᵀ @ b [BD, BE] for a [C, BD] with no more digits than OPERAND: b in two parts, so that its digits count."""
    total = product_into(a, b, tl.zeros((a.shape[1], b.shape[1]), tl.float32), OPERAND, True)
    if OPERAND != tl.float32:
        total = product_into(a, b - b.to(OPERAND).to(tl.float32), total, OPERAND, True)
    return total


@triton.jit
def decay_exponents(decay):
    """c [C] of natural-log decays [C]: their sums up to each token, in base 2, so that 2^{c_t} is the decay up to t.

    Base 2, because tl.exp2 is one instruction, and tl.exp five, in masks of C² elements.
    """
    exponent = decay * LOG2E
    return tl.cumsum(tl.where(exponent < LEAST_EXPONENT, LEAST_EXPONENT, exponent), 0)


@triton.jit
def decay_mask(c, C: tl.constexpr):
    """D_tj = 2^{c_t − c_j} for j ≤ t, else 0."""
    row = tl.arange(0, C)
    return tl.exp2(tl.where(row[:, None] >= row[None, :], c[:, None] - c[None, :], float("-inf")))


@triton.jit
def decay_mask_transposed(c, C: tl.constexpr):
    """D_tj with j along the rows, computed rather than transposed (see docs/design.md)."""
    row = tl.arange(0, C)
    return tl.exp2(tl.where(row[:, None] <= row[None, :], c[None, :] - c[:, None], float("-inf")))


@triton.jit
def larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def power_near(exponent):
    """2^⌊exponent⌋, of those that float32 has the reciprocals of."""
    return tl.exp2(tl.minimum(tl.maximum(tl.floor(exponent), -126.0), 126.0))


@triton.jit
def largest_before(c, weight):
    """log2 of the largest D_tj weight_j up to each token, less c_t [C]; for weights that are not negative."""
    return tl.associative_scan(tl.log2(weight) - c, 0, larger)


@triton.jit
def decay_weights(c, weight, C: tl.constexpr):
    """(w [C, C], s [C]) with D_tj weight_j = s_t w_tj: s_t powers of two, w_tj below 4; for weights that are not negative.

    The scales are a running maximum of C exponents: for a maximum over the tile, the compiler forms it a second time.
    """
    s = power_near(c + largest_before(c, weight))
    return decay_mask(c, C) * weight[None, :] * reciprocal_of_power(s)[:, None], s


@triton.jit
def decay_weights_transposed(c, weight, C: tl.constexpr):
    """(w [C, C], s [C]) with D_tj weight_t = s_j w_jt, j along the rows; see decay_weights."""
    s = power_near(tl.associative_scan(tl.log2(weight) + c, 0, larger, reverse=True) - c)
    return decay_mask_transposed(c, C) * weight[None, :] * reciprocal_of_power(s)[:, None], s


@triton.jit
def inner_product(a, b):
    """Σ a_ij b_ij in float32, in one sum: one over rows and then one over columns do not always compile for sm_100 (Triton 3.6)."""
    return tl.sum(a.to(tl.float32) * b.to(tl.float32))


@triton.jit
def last(x, C: tl.constexpr):
    """x[C − 1]."""
    return tl.sum(tl.where(tl.arange(0, C) == C - 1, x, 0.0), 0)


@triton.jit
def load_block(ptr, matrix, first_row, first_column, D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr):
    """Rows first_row … + BD and columns first_column … + BE of a stored state [.., D, E], in its storage dtype."""
    row = first_row + tl.arange(0, BD)[:, None]
    column = first_column + tl.arange(0, BE)[None, :]
    return tl.load(ptr + matrix * (D * E) + row * E + column, mask=(row < D) & (column < E), other=0.0)


@triton.jit
def load_block_transposed(ptr, matrix, D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr):
    """A stored state [.., D, E] as [BE, BD]; with tl.trans, one that is an operand both ways would lie in shared memory twice."""
    row = tl.arange(0, BE)[:, None]
    column = tl.arange(0, BD)[None, :]
    return tl.load(ptr + matrix * (D * E) + column * E + row, mask=(row < E) & (column < D), other=0.0)


@triton.jit
def largest_entry(ptr, matrix, D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr):
    """Of a state [.., D, E]."""
    return tl.max(tl.max(tl.abs(load_block(ptr, matrix, 0, 0, D, E, BD, BE)), 1), 0)


@triton.jit
def load_state(
    ptr, scale_ptr, matrix, WHICH: tl.constexpr, first_column, D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr
):
    """Columns first_column … + BE of a stored state as (tile [BD, BE], scale).

    WHICH: 0 for H, 1 for U, the state's place among the scales [.., 2].
    """
    return load_block(ptr, matrix, 0, first_column, D, E, BD, BE), tl.load(scale_ptr + matrix * 2 + WHICH)


@triton.jit
def store_state(
    ptr,
    scale_ptr,
    tile,
    bound,
    matrix,
    WHICH: tl.constexpr,
    first_column,
    D: tl.constexpr,
    E: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
):
    """Store a float32 tile [BD, BE] as columns of a state whose entries are at most ``bound``, divided by a power of two near that.

    The programs that hold the other columns must come with the same bound.
    """
    row = tl.arange(0, BD)[:, None]
    column = first_column + tl.arange(0, BE)[None, :]
    s = unit_scale(bound)
    target = ptr + matrix * (D * E) + row * E + column
    tl.store(target, (tile * reciprocal_of_power(s)).to(ptr.dtype.element_ty), mask=(row < D) & (column < E))
    tl.store(scale_ptr + matrix * 2 + WHICH, s, mask=first_column == 0)


@triton.jit
def readout(q, x, x_scale, alpha, C: tl.constexpr, HAS_ALPHA: tl.constexpr, AXIS: tl.constexpr = 0):
    """m = q + α(x_scale x − q) [C, BK]."""
    m = x * scalars(x_scale, 0.0, C, True, AXIS)[:, None]
    if HAS_ALPHA:
        m = q + scalars(alpha, 1.0, C, HAS_ALPHA, AXIS)[:, None] * (m - q)
    return m


@triton.jit
def frobenius(k, key_scale, c, mask, gamma, h, h_scale, OPERAND: tl.constexpr):
    """φ_t = ‖H_t‖_F [C], for keys key_scale_j k_j and a start state h_scale · h.

    What the keys of the chunk add, Σ_jl D_tj D_tl w_jl with w_jl = (k̂_j·k̂_l)², grows by B_t = w_tt + 2 Σ_{l<t} D_tl w_tl and
    decays by γ²: it is Σ_s D_ts² B_s. Each token's sum is in units of its largest term: φ² leaves float32 where φ does not.
    """
    C: tl.constexpr = k.shape[0]
    start = inner_product(h, h)
    square_scale = key_scale * key_scale
    unit = power_near(c + tl.maximum(largest_before(c, square_scale), tl.log2(h_scale)))
    inverse = reciprocal_of_power(unit)
    start_gain = gamma * h_scale * inverse
    cross = tl.sum(product(k, h, OPERAND) * k.to(tl.float32), 1)  # kᵀ h k of each key
    gram = product(k, tl.trans(k), OPERAND)
    row = tl.arange(0, C)
    twice = tl.where(row[:, None] == row[None, :], 1.0, 2.0)
    weights = mask * square_scale[None, :] * inverse[:, None]
    added = tl.sum(weights * gram * gram * twice, 1) * unit
    inner = tl.sum(weights * (2.0 * start_gain[:, None] * cross[None, :] + mask * inverse[:, None] * added[None, :]), 1)
    phi = unit * tl.sqrt(tl.maximum(start_gain * start_gain * start + inner, 0.0))
    return tl.where(phi < LEAST_PHI, 0.0, phi)


@triton.jit
def next_term(t, previous, start_gain, inner, h, k, kt, OPERAND: tl.constexpr):
    """T_{n+1}(Z) q = 2 Z t − previous, t = T_n(Z) q, 2 Z t = 4 H t/φ − 2 t."""
    z = product_into(product(t, kt, OPERAND).to(inner.dtype) * inner, k, -2.0 * t - previous, OPERAND)
    return product_into(t * start_gain, h, z, OPERAND)


@triton.jit
def solve(
    rhs,  # [C, BK] unit rows q_t in 16 bits, where OPERAND has no more: a float32 tile would go from layout to layout three times
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
    """φ_t x_t [C, BK] = Σ c_n t_n, t_n = T_n(Z_t) q_t, Z_t = 2H_t/φ_t − I.

    ‖t_n‖ ≤ ‖q‖ and φ_t ≥ γ_t ‖H_c‖, D_tj ‖k̂_j‖²: operands stay within float16 whatever the condition number.

    Two terms a turn: three float32 tiles do not fit the registers of four warps at C = 64, K = 128, and so the sum, which nothing
    waits for, is out of them (the compiler spills it) but once in two products.
    """
    gain = 4.0 * reciprocal(phi)
    start_gain = (gamma * h_scale * gain)[:, None]
    inner = mask * gain[:, None] * (key_scale * key_scale)[None, :]
    if rhs.shape[1] > 64:  # half the registers, but three instructions where float32 takes one and a half
        inner = inner.to(OPERAND)
    h = h.to(OPERAND)
    k = k.to(OPERAND)
    kt = tl.trans(k)
    even = rhs.to(tl.float32)
    odd = 0.5 * next_term(even, tl.zeros_like(even), start_gain, inner, h, k, kt, OPERAND)
    power = -TAU
    tail = -TAIL / TAU
    x = FRONT * (1.0 - TAIL) * even + 2.0 * FRONT * (power - tail) * odd
    for _ in range((NUM_ITER - 1) // 2):
        even = next_term(odd, even, start_gain, inner, h, k, kt, OPERAND)
        power *= -TAU
        tail *= -1.0 / TAU
        even_weight = 2.0 * FRONT * (power - tail)
        odd = next_term(even, odd, start_gain, inner, h, k, kt, OPERAND)
        power *= -TAU
        tail *= -1.0 / TAU
        x = x + even_weight * even + 2.0 * FRONT * (power - tail) * odd  # two multiply-adds an element, which += would not be
    if NUM_ITER % 2 == 0:
        even = next_term(odd, even, start_gain, inner, h, k, kt, OPERAND)
        x += 2.0 * FRONT * (power * -TAU + tail / TAU) * even
    return x
