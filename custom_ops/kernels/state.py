"""chunk_state: the states before every chunk and after the last."""

from typing import Any

import torch
import triton
import triton.language as tl

from .. import ahead, config
from ..eager import TENSORS
from .launch import Tensors, block, compact, on_device, present, settings, shared_options, wrap_triton
from .tile import (
    decay_exponents,
    dense_rows,
    largest_entry,
    last,
    load_row_block,
    load_rows,
    load_scalars,
    load_tile,
    packed_rows,
    power_of_two,
    reciprocal_of_power,
    row_scales,
    scalars,
    split_outer_product,
    store_state,
)

__all__ = ["chunk_factors_kernel", "chunk_state_kernel", "launch_chunk_state"]


@triton.jit
def chunk_factors_kernel(
    k_ptr,  # [rows, Hk, K]
    v_ptr,  # [rows, Hk, V]
    g_ptr,  # [rows, H]
    gk_ptr,  # [rows, H]
    beta_ptr,  # [rows, H]
    cu_ptr,  # [N + 1]
    factors_ptr,  # [S, H, 3, C]
    sums_ptr,  # [S, H, 2, 3]
    N,
    T,
    H: tl.constexpr,
    Hk: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    OPERAND: tl.constexpr,
    HAS_G: tl.constexpr,
    HAS_GK: tl.constexpr,
    HAS_BETA: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Grid (slots, heads). All that the scan needs beside tiles: sums over threads would hold up each of its steps.

    factors: what k is multiplied with to be unit rows, k and v to be the other operand of what a chunk adds to H and U.
    sums, of H and of U: the decay of the state over the chunk, a power of two divided out of those operands, and what the chunk
    adds to the bound of the state's entries.
    """
    slot = tl.program_id(0)
    h = tl.program_id(1)
    if PACKED:
        first, end = packed_rows(slot, cu_ptr, N, C)
    else:
        first, end = dense_rows(slot, T, C)
    matrix = slot.to(tl.int64) * H + h
    k = load_tile(k_ptr, first, end, Hk, h // (H // Hk), 0, K, C, BK)
    v = load_tile(v_ptr, first, end, Hk, h // (H // Hk), 0, V, C, BV)
    g = load_scalars(g_ptr, first, end, H, h, C, HAS_G)
    gk = load_scalars(gk_ptr, first, end, H, h, C, HAS_GK)
    beta = load_scalars(beta_ptr, first, end, H, h, C, HAS_BETA)
    g = scalars(g, 0.0, C, HAS_G)
    gk = scalars(gk, 0.0, C, HAS_GK)
    beta = scalars(beta, 1.0, C, HAS_BETA)
    k_unit = row_scales(k)
    v_unit = row_scales(v)
    row = tl.arange(0, C)
    tl.store(factors_ptr + matrix * (3 * C) + row, reciprocal_of_power(k_unit))
    store_factor(factors_ptr, sums_ptr, matrix, 0, gk, beta * beta * k_unit, k_unit, C)
    store_factor(factors_ptr, sums_ptr, matrix, 1, g, beta * beta * k_unit, v_unit, C)


@triton.jit
def store_factor(factors_ptr, sums_ptr, matrix, WHICH: tl.constexpr, decay, left, unit, C: tl.constexpr):
    """Factors of the second operand, rows of size ``unit`` with weights left · unit · decay until the chunk's end."""
    c = decay_exponents(decay)
    total = last(c, C)
    weight = tl.exp2(total - c) * left * unit
    s = power_of_two(tl.max(weight, 0))
    place = matrix * (3 * C) + (1 + WHICH) * C + tl.arange(0, C)
    tl.store(factors_ptr + place, weight * reciprocal_of_power(s) * reciprocal_of_power(unit))
    tl.store(sums_ptr + matrix * 6 + WHICH * 3, tl.exp2(total))
    tl.store(sums_ptr + matrix * 6 + WHICH * 3 + 1, s)
    tl.store(sums_ptr + matrix * 6 + WHICH * 3 + 2, 4.0 * tl.sum(weight, 0))


@triton.jit
def segments_of(room, chunks, SEGMENTS: tl.constexpr, CHUNKS: tl.constexpr):
    """Parts of a sequence that are scanned side by side; two would take as long as one, for all but the last are scanned twice."""
    return tl.where((room > 2) & (chunks >= CHUNKS), tl.minimum(room, SEGMENTS), 1)


@triton.jit
def advance(
    state,
    bound,
    k_ptr,
    w_ptr,  # k for columns of H, v for columns of U
    factors_ptr,
    sums_ptr,
    first,
    end,
    matrix,
    head,
    first_column,
    Hk: tl.constexpr,
    WHICH: tl.constexpr,  # 0: H, 1: U
    K: tl.constexpr,
    E: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BE: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """(columns of a state after a chunk, bound of its entries, decay of a chunk)"""
    factors = factors_ptr + matrix * (3 * C) + tl.arange(0, C)
    k = load_rows(k_ptr, first, end, Hk, head, K, C, BK) * tl.load(factors)[:, None]
    w = load_row_block(w_ptr, first, end, Hk, head, first_column, E, C, BE) * tl.load(factors + (1 + WHICH) * C)[:, None]
    sums = sums_ptr + matrix * 6 + WHICH * 3
    decay = tl.load(sums)
    state = decay * state + split_outer_product(k, w, OPERAND) * tl.load(sums + 1)
    return state, decay * bound + tl.load(sums + 2), decay


@triton.jit
def scan_block(
    k_ptr,
    w_ptr,
    factors_ptr,
    sums_ptr,
    start_ptr,  # [N, H, K, E] initial state
    ends_ptr,  # [PROGRAMS, BK, BE]: what each segment adds, and
    totals_ptr,  # [PROGRAMS, 2]: its decay, its bound
    chunks_ptr,  # [S, H, K, E]
    scales_ptr,  # [S, H, 2]
    final_ptr,  # [N, H, K, E]
    n,
    h,
    chunks,
    segment,
    segments,
    program,  # of the first segment
    begin,
    end,
    first_slot,
    first_column,
    H: tl.constexpr,
    Hk: tl.constexpr,
    WHICH: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BW: tl.constexpr,  # block of E
    BE: tl.constexpr,
    BLOCKS: tl.constexpr,
    OPERAND: tl.constexpr,
    HAS_START: tl.constexpr,
    ENDS: tl.constexpr,
):
    """Columns first_column … + BE of one state over one segment of a sequence; the state stays in registers in float32.

    It is stored divided by a power of two near a bound of its entries, which grows with the tokens: no program needs to see the
    columns of the others, nor to search its own. With ENDS the segment is scanned from zero, and only its end is stored.
    """
    row = tl.arange(0, BK)[:, None]
    column = first_column + tl.arange(0, BE)[None, :]
    inside = (row < K) & (column < E)
    tile = row * BE + tl.arange(0, BE)[None, :]
    place = (n.to(tl.int64) * H + h) * (K * E) + row * E + column
    share = tl.cdiv(chunks, segments)
    from_chunk = tl.minimum(segment * share, chunks)
    to_chunk = tl.minimum(from_chunk + share, chunks)
    head = h // (H // Hk)
    state = tl.zeros((BK, BE), tl.float32)
    bound = tl.full((), 0.0, tl.float32)
    if ENDS:
        total = tl.full((), 1.0, tl.float32)
        for i in range(from_chunk, to_chunk):
            matrix = (first_slot + i).to(tl.int64) * H + h
            # fmt: off
            state, bound, decay = advance(
                state, bound, k_ptr, w_ptr, factors_ptr, sums_ptr, begin + i * C, end, matrix, head, first_column,
                Hk, WHICH, K, E, C, BK, BE, OPERAND,
            )
            # fmt: on
            total *= decay
        mine = program + segment * BLOCKS
        tl.store(ends_ptr + mine * (BK * BE) + tile, state)
        tl.store(totals_ptr + mine * 2, total)
        tl.store(totals_ptr + mine * 2 + 1, bound)
    else:
        if HAS_START:
            state = tl.load(start_ptr + place, mask=inside, other=0.0)
            bound = largest_entry(start_ptr, n.to(tl.int64) * H + h, K, E, BK, BW)
        for earlier in range(segment):
            other = program + earlier * BLOCKS
            decay = tl.load(totals_ptr + other * 2)
            state = decay * state + tl.load(ends_ptr + other * (BK * BE) + tile)
            bound = decay * bound + tl.load(totals_ptr + other * 2 + 1)
        for i in range(from_chunk, to_chunk):
            matrix = (first_slot + i).to(tl.int64) * H + h
            store_state(chunks_ptr, scales_ptr, state, bound, matrix, WHICH, first_column, K, E, BK, BE)
            # fmt: off
            state, bound, decay = advance(
                state, bound, k_ptr, w_ptr, factors_ptr, sums_ptr, begin + i * C, end, matrix, head, first_column,
                Hk, WHICH, K, E, C, BK, BE, OPERAND,
            )
            # fmt: on
        is_last = row * 0 + segment == segments - 1  # not of a scalar alone, of which Triton's interpreter makes no mask
        tl.store(final_ptr + place, state, mask=inside & is_last)


@triton.jit
def chunk_state_kernel(
    k_ptr,  # [rows, Hk, K]
    v_ptr,  # [rows, Hk, V]
    factors_ptr,  # [S, H, 3, C]
    sums_ptr,  # [S, H, 2, 3]
    h0_ptr,  # [N, H, K, K]
    u0_ptr,  # [N, H, K, V]
    cu_ptr,  # [N + 1]
    ends_ptr,  # [PROGRAMS, BK, BE]
    totals_ptr,  # [PROGRAMS, 2]
    h_chunks_ptr,  # [S, H, K, K]
    u_chunks_ptr,  # [S, H, K, V]
    scales_ptr,  # [S, H, 2]
    h_out_ptr,  # [N, H, K, K]
    u_out_ptr,  # [N, H, K, V]
    T,
    H: tl.constexpr,
    Hk: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BE: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    CHUNKS: tl.constexpr,
    OPERAND: tl.constexpr,
    HAS_H0: tl.constexpr,
    HAS_U0: tl.constexpr,
    PACKED: tl.constexpr,
    ENDS: tl.constexpr,
):
    """Grid (column blocks of H, then of U, times segments; heads; sequences), twice: with ENDS, then without.

    A scan is a chain of chunks. Where few long ones leave room on the GPU, each is cut in segments: first what every segment but
    the last adds, all at once; then all at once again, each from what those before it added up to.
    """
    h_blocks: tl.constexpr = (K + BE - 1) // BE
    blocks: tl.constexpr = h_blocks + (V + BE - 1) // BE
    block = tl.program_id(0) % blocks
    segment = tl.program_id(0) // blocks
    h = tl.program_id(1)
    n = tl.program_id(2)
    room = PROGRAMS // (tl.num_programs(2) * H * blocks)
    program = (n * H + h) * tl.minimum(room, SEGMENTS) * blocks + block
    if PACKED:
        begin = tl.load(cu_ptr + n).to(tl.int64)
        end = tl.load(cu_ptr + n + 1).to(tl.int64)
        first_slot = begin // C + n
    else:
        begin = n.to(tl.int64) * T
        end = begin + T
        first_slot = n * tl.cdiv(T, C)
    chunks = tl.cdiv(end - begin, C)
    segments = segments_of(room, chunks, SEGMENTS, CHUNKS)
    # fmt: off
    if segment < segments - ENDS:
        if block < h_blocks:
            scan_block(
                k_ptr, k_ptr, factors_ptr, sums_ptr, h0_ptr, ends_ptr, totals_ptr, h_chunks_ptr, scales_ptr, h_out_ptr,
                n, h, chunks, segment, segments, program, begin, end, first_slot, block * BE,
                H, Hk, 0, K, K, C, BK, BK, BE, blocks, OPERAND, HAS_H0, ENDS,
            )
        else:
            scan_block(
                k_ptr, v_ptr, factors_ptr, sums_ptr, u0_ptr, ends_ptr, totals_ptr, u_chunks_ptr, scales_ptr, u_out_ptr,
                n, h, chunks, segment, segments, program, begin, end, first_slot, (block - h_blocks) * BE,
                H, Hk, 1, K, V, C, BK, BV, BE, blocks, OPERAND, HAS_U0, ENDS,
            )
    # fmt: on


def launch_chunk_state(
    k: Any, v: Any, g: Any, gk: Any, beta: Any, h0: Any, u0: Any, cu_seqlens: Any, H: int, C: int, out: Tensors
) -> None:
    """Fill ``out`` as ``ops.chunk_state`` describes."""
    k, v, g, gk, beta, h0, u0, cu = compact(k, v, g, gk, beta, h0, u0, cu_seqlens)
    B, T, _, K = k.shape
    V, N = v.shape[-1], B if cu is None else cu.shape[0] - 1
    BE, SEGMENTS, CHUNKS, PROGRAMS = config.STATE_COLUMNS, config.SEGMENTS, config.SEGMENTED_CHUNKS, config.scan_programs(C)
    blocks = (K + BE - 1) // BE + (V + BE - 1) // BE
    S = out[0].shape[0]
    factors = k.new_empty(S, H, 3, C, dtype=torch.float32)
    sums = k.new_empty(S, H, 2, 3, dtype=torch.float32)
    # what is traced, or compiled ahead, is for all sizes; an eager call knows, as segments_of does, where no sequence will be cut
    for_all = type(k) not in TENSORS or ahead.kept_launches() is not None
    cut = for_all or (PROGRAMS >= 3 * N * H * blocks and T > (CHUNKS - 1) * C)
    ends = k.new_empty(PROGRAMS, block(K), BE, dtype=torch.float32) if cut else factors
    totals = k.new_empty(PROGRAMS, 2, dtype=torch.float32) if cut else sums
    common = shared_options(H, k, cu, C) | {"K": K, "V": V, "BK": block(K), "BV": block(V)}
    with on_device(k):
        wrap_triton(chunk_factors_kernel)[(S, H)](
            *(k, v, *present(k, g, gk, beta, cu), factors, sums, 1 if cu is None else N, T),
            HAS_G=g is not None,
            HAS_GK=gk is not None,
            HAS_BETA=beta is not None,
            **common,
            **settings("chunk_factors", k, K, V),
        )
        for ends_alone in (True, False) if cut else (False,):
            before = (None, None) if ends_alone else (h0, u0)
            wrap_triton(chunk_state_kernel)[(SEGMENTS * blocks, H, N)](
                *(k, v, factors, sums, *present(k, *before, cu), ends, totals, *out, T),
                BE=BE,
                SEGMENTS=SEGMENTS,
                PROGRAMS=PROGRAMS,
                CHUNKS=CHUNKS,
                HAS_H0=before[0] is not None,
                HAS_U0=before[1] is not None,
                ENDS=ends_alone,
                **common,
                **settings("chunk_state", k, K, V),
            )
