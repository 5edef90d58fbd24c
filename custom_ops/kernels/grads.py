"""Cotangents of the states, backwards in time, and of all that made them: parts of chunk_bwd.

Token t pulls G_t = −½(y_t x_tᵀ + x_t y_tᵀ) − η_t H_t out of H_t and scale · m_t do_tᵀ out of U_t.  The kernels read a
token's x, y, m, q and do as unit rows and a float32 factor.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .. import config
from .launch import Tensors, block, compact, on_device, present, settings, shared_options, wrap_triton
from .tile import (
    decay_exponents,
    decay_mask,
    decay_mask_transposed,
    decay_weights_transposed,
    dense_rows,
    inner_product,
    largest_entry,
    last,
    load_block,
    load_block_transposed,
    load_row_block,
    load_rows,
    load_scalars,
    load_state,
    load_tile,
    packed_rows,
    power_of_two,
    product,
    product_into,
    readout,
    reciprocal_of_power,
    row_scales,
    scalars,
    store_rows,
    store_scalars,
    store_state,
    unit_rows,
)

__all__ = [
    "chunk_state_bwd_kernel",
    "cotangent_factors_kernel",
    "grads_through_h_kernel",
    "grads_through_u_kernel",
    "launch_chunk_grads",
    "launch_chunk_state_bwd",
]


@triton.jit
def cotangent_factors_kernel(
    k_ptr,  # [rows, Hk, K]
    g_ptr,  # [rows, H]
    gk_ptr,  # [rows, H]
    beta_ptr,  # [rows, H]
    do_ptr,  # [rows, H, V]
    q_ptr,  # [rows, H, K]
    alpha_ptr,  # [rows, H]
    x_scale_ptr,  # [rows, H]
    y_scale_ptr,  # [rows, H]
    eta_ptr,  # [rows, H]
    cu_ptr,  # [N + 1]
    factors_ptr,  # [S, H, 6, C]
    sums_ptr,  # [S, H, 7]
    N,
    T,
    H: tl.constexpr,
    Hk: tl.constexpr,
    SCALE: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    OPERAND: tl.constexpr,
    HAS_G: tl.constexpr,
    HAS_GK: tl.constexpr,
    HAS_ALPHA: tl.constexpr,
    HAS_BETA: tl.constexpr,
    HAS_OUTPUT: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Grid (slots, heads). All that chunk_state_bwd_kernel needs beside tiles, as chunk_factors_kernel does for chunk_state_kernel.

    factors: what rows are multiplied with to be operands; 0: k, unit rows; 1 and 2: k and, against each other, x and y, with the
    weights of H; 3: q, unit rows; 4 and 5: do, with the weights of q doᵀ and x doᵀ.
    sums: of H the decay over the chunk, the power of two divided out of factors 1 and 2, what they add to the bound of the entries,
    and Σ_t γ_t² η_t; of U the first three.
    """
    slot = tl.program_id(0)
    head = tl.program_id(1)
    if PACKED:
        first, end = packed_rows(slot, cu_ptr, N, C)
    else:
        first, end = dense_rows(slot, T, C)
    matrix = slot.to(tl.int64) * H + head
    factors = factors_ptr + matrix * (6 * C) + tl.arange(0, C)
    sums = sums_ptr + matrix * 7
    gk = load_scalars(gk_ptr, first, end, H, head, C, HAS_GK)
    g = load_scalars(g_ptr, first, end, H, head, C, HAS_G)
    if HAS_OUTPUT:
        k = load_tile(k_ptr, first, end, Hk, head // (H // Hk), 0, K, C, BK)
        do = load_tile(do_ptr, first, end, H, head, 0, V, C, BV)
        if HAS_ALPHA:
            q = load_tile(q_ptr, first, end, H, head, 0, K, C, BK)
        eta = load_scalars(eta_ptr, first, end, H, head, C, True)
        beta = load_scalars(beta_ptr, first, end, H, head, C, HAS_BETA)
        x_scale = load_scalars(x_scale_ptr, first, end, H, head, C, True)
        y_scale = load_scalars(y_scale_ptr, first, end, H, head, C, True)
        alpha = load_scalars(alpha_ptr, first, end, H, head, C, HAS_ALPHA)
    c = decay_exponents(scalars(gk, 0.0, C, HAS_GK))
    tl.store(sums, tl.exp2(last(c, C)))
    c_u = decay_exponents(scalars(g, 0.0, C, HAS_G))
    tl.store(sums + 4, tl.exp2(last(c_u, C)))
    if HAS_OUTPUT:
        gamma = tl.exp2(c)
        eta = gamma * scalars(eta, 0.0, C, True)
        k_unit = row_scales(k)
        k_scale = k_unit * scalars(beta, 1.0, C, HAS_BETA)
        k_weight = tl.sum(decay_mask(c, C) * eta[:, None], 0) * k_scale * k_scale
        x_scale = scalars(x_scale, 0.0, C, True)
        xy_weight = 0.5 * gamma * x_scale * scalars(y_scale, 0.0, C, True)
        s = power_of_two(tl.max(tl.maximum(tl.abs(k_weight), tl.abs(xy_weight)), 0))
        tl.store(factors, reciprocal_of_power(k_unit))
        inverse = reciprocal_of_power(s)
        tl.store(factors + C, k_weight * reciprocal_of_power(k_unit) * inverse)
        tl.store(factors + 2 * C, xy_weight * inverse)
        tl.store(sums + 1, s)
        tl.store(sums + 2, 4.0 * tl.sum(tl.abs(k_weight) + 2.0 * tl.abs(xy_weight), 0))
        tl.store(sums + 3, tl.sum(gamma * eta, 0))

        do_unit = row_scales(do)
        weight = SCALE * tl.exp2(c_u) * do_unit
        x_weight = weight * x_scale
        q_weight = tl.zeros_like(weight)
        if HAS_ALPHA:  # m = (1 − α) q + α x
            alpha = scalars(alpha, 1.0, C, HAS_ALPHA)
            q_unit = row_scales(q)
            x_weight *= alpha
            q_weight = weight * (1.0 - alpha) * q_unit
            tl.store(factors + 3 * C, reciprocal_of_power(q_unit))
        s = power_of_two(tl.max(tl.maximum(tl.abs(q_weight), tl.abs(x_weight)), 0))
        inverse = reciprocal_of_power(do_unit) * reciprocal_of_power(s)
        tl.store(factors + 4 * C, q_weight * inverse)
        tl.store(factors + 5 * C, x_weight * inverse)
        tl.store(sums + 5, s)
        tl.store(sums + 6, 4.0 * tl.sum(tl.abs(q_weight) + tl.abs(x_weight), 0))


@triton.jit
def chunk_state_bwd_kernel(
    k_ptr,  # [rows, Hk, K]
    factors_ptr,  # [S, H, 6, C]
    sums_ptr,  # [S, H, 7]
    h_chunks_ptr,  # [S, H, K, K]
    scales_ptr,  # [S, H, 2]
    do_ptr,  # [rows, H, V]
    q_ptr,  # [rows, H, K]
    x_ptr,  # [rows, H, K]
    y_ptr,  # [rows, H, K]
    dh_out_ptr,  # [N, H, K, K]
    du_out_ptr,  # [N, H, K, V]
    cu_ptr,  # [N + 1]
    dh_chunks_ptr,  # [S, H, K, K]
    du_chunks_ptr,  # [S, H, K, V]
    dscales_ptr,  # [S, H, 2]
    dh0_ptr,  # [N, H, K, K]
    du0_ptr,  # [N, H, K, V]
    T,
    H: tl.constexpr,
    Hk: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BE: tl.constexpr,
    OPERAND: tl.constexpr,
    HAS_ALPHA: tl.constexpr,
    HAS_OUTPUT: tl.constexpr,  # o has a cotangent
    HAS_DH: tl.constexpr,
    HAS_DU: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Grid (column blocks of H, then of U; heads; sequences). The cotangent stays in registers in float32."""
    block_id = tl.program_id(0)
    head = tl.program_id(1)
    n = tl.program_id(2)
    if PACKED:
        begin = tl.load(cu_ptr + n).to(tl.int64)
        end = tl.load(cu_ptr + n + 1).to(tl.int64)
        first_slot = begin // C + n
    else:
        begin = n.to(tl.int64) * T
        end = begin + T
        first_slot = n * tl.cdiv(T, C)
    chunks = tl.cdiv(end - begin, C)
    kv_head = head // (H // Hk)
    h_blocks: tl.constexpr = (K + BE - 1) // BE
    row = tl.arange(0, BK)[:, None]
    token = tl.arange(0, C)

    bound = tl.full((), 0.0, tl.float32)  # of the entries, all columns included

    if block_id < h_blocks:
        first_column = block_id * BE
        column = first_column + tl.arange(0, BE)[None, :]
        inside = (row < K) & (column < K)
        corner = (n.to(tl.int64) * H + head) * (K * K)
        d = tl.zeros((BK, BE), tl.float32)
        if HAS_DH:
            d = tl.load(dh_out_ptr + corner + row * K + column, mask=inside, other=0.0)
            d = 0.5 * (d + tl.load(dh_out_ptr + corner + column * K + row, mask=inside, other=0.0))
            bound = largest_entry(dh_out_ptr, n.to(tl.int64) * H + head, K, K, BK, BK)
        for back in range(chunks):
            i = chunks - 1 - back
            first = begin + i * C
            matrix = (first_slot + i).to(tl.int64) * H + head
            store_state(dh_chunks_ptr, dscales_ptr, d, bound, matrix, 0, first_column, K, K, BK, BE)
            factors = factors_ptr + matrix * (6 * C) + token
            sums = sums_ptr + matrix * 7
            decay = tl.load(sums)
            d *= decay
            bound *= decay
            if HAS_OUTPUT:
                h, h_scale = load_state(h_chunks_ptr, scales_ptr, matrix, 0, first_column, K, K, BK, BE)
                ridge = tl.load(sums + 3) * h_scale
                d -= ridge * h.to(tl.float32)
                k = load_rows(k_ptr, first, end, Hk, kv_head, K, C, BK) * tl.load(factors)[:, None]
                x = load_rows(x_ptr, first, end, H, head, K, C, BK)
                y = load_rows(y_ptr, first, end, H, head, K, C, BK)
                k_block = load_row_block(k_ptr, first, end, Hk, kv_head, first_column, K, C, BE)
                x_block = load_row_block(x_ptr, first, end, H, head, first_column, K, C, BE)
                y_block = load_row_block(y_ptr, first, end, H, head, first_column, K, C, BE)
                xy = tl.load(factors + 2 * C)[:, None]
                total = tl.zeros((BK, BE), tl.float32)
                total = product_into(k, k_block * tl.load(factors + C)[:, None], total, OPERAND, True)
                total = product_into(x, y_block * xy, total, OPERAND, True)
                total = product_into(y, x_block * xy, total, OPERAND, True)
                d -= total * tl.load(sums + 1)
                bound += 2.0 * tl.abs(ridge) + tl.load(sums + 2)
        tl.store(dh0_ptr + corner + row * K + column, d, mask=inside)
    else:
        first_column = (block_id - h_blocks) * BE
        column = first_column + tl.arange(0, BE)[None, :]
        inside = (row < K) & (column < V)
        corner = (n.to(tl.int64) * H + head) * (K * V)
        d = tl.zeros((BK, BE), tl.float32)
        if HAS_DU:
            d = tl.load(du_out_ptr + corner + row * V + column, mask=inside, other=0.0)
            bound = largest_entry(du_out_ptr, n.to(tl.int64) * H + head, K, V, BK, BV)
        for back in range(chunks):
            i = chunks - 1 - back
            first = begin + i * C
            matrix = (first_slot + i).to(tl.int64) * H + head
            store_state(du_chunks_ptr, dscales_ptr, d, bound, matrix, 1, first_column, K, V, BK, BE)
            factors = factors_ptr + matrix * (6 * C) + token
            sums = sums_ptr + matrix * 7 + 4
            decay = tl.load(sums)
            d *= decay
            bound *= decay
            if HAS_OUTPUT:
                x = load_rows(x_ptr, first, end, H, head, K, C, BK)
                do = load_row_block(do_ptr, first, end, H, head, first_column, V, C, BE)
                total = tl.zeros((BK, BE), tl.float32)
                total = product_into(x, do * tl.load(factors + 5 * C)[:, None], total, OPERAND, True)
                if HAS_ALPHA:
                    q = load_rows(q_ptr, first, end, H, head, K, C, BK) * tl.load(factors + 3 * C)[:, None]
                    total = product_into(q, do * tl.load(factors + 4 * C)[:, None], total, OPERAND, True)
                d += total * tl.load(sums + 1)
                bound += tl.load(sums + 2)
        tl.store(du0_ptr + corner + row * V + column, d, mask=inside)


def launch_chunk_state_bwd(
    k: Any,
    v: Any,
    g: Any,
    gk: Any,
    beta: Any,
    h_chunks: Any,
    state_scales: Any,
    do: Any,
    q: Any,
    alpha: Any,
    x: Any,
    x_scale: Any,
    y: Any,
    y_scale: Any,
    eta: Any,
    dh_out: Any,
    du_out: Any,
    cu_seqlens: Any,
    scale: float,
    H: int,
    C: int,
    out: Tensors,
) -> None:
    """Cotangents of the states, backwards in time.

    The inputs are as in ``ops.chunk_bwd``, and what ``launch_chunk_output_bwd`` left: y, y_scale, eta; do … eta are all None where
    only the final states have a cotangent. Fill ``out``: dh_chunks [S,H,K,K], du_chunks [S,H,K,V], dstate_scales [S,H,2]: cotangent
    of the state *after* each chunk, from all that follows it, stored as in ``ops.chunk_state``; dh0 [N,H,K,K], du0 [N,H,K,V].
    """
    k, g, gk, beta, do, q, alpha, dh_out, du_out, cu = compact(k, g, gk, beta, do, q, alpha, dh_out, du_out, cu_seqlens)
    B, T, _, K = k.shape
    V, N = v.shape[-1], B if cu is None else cu.shape[0] - 1
    # a T of 1 is a constant to Triton, which then has no loop to pipeline: products of 32 columns are wrong there (docs/design.md)
    BE = config.STATE_COLUMNS if T == 1 else config.COTANGENT_COLUMNS
    grid = ((K + BE - 1) // BE + (V + BE - 1) // BE, H, N)
    h_chunks, state_scales, x, x_scale, y, y_scale, eta = compact(h_chunks, state_scales, x, x_scale, y, y_scale, eta)
    S = h_chunks.shape[0]
    factors = k.new_empty(S, H, 6, C, dtype=torch.float32)
    sums = k.new_empty(S, H, 7, dtype=torch.float32)
    common = shared_options(H, k, cu, C)
    common |= {"K": K, "V": V, "BK": block(K), "BV": block(V), "HAS_ALPHA": alpha is not None, "HAS_OUTPUT": do is not None}
    with on_device(k):
        wrap_triton(cotangent_factors_kernel)[(S, H)](
            *(k, *present(k, g, gk, beta, do, q, alpha, x_scale, y_scale, eta, cu)),
            *(factors, sums, 1 if cu is None else N, T),
            SCALE=scale,
            HAS_G=g is not None,
            HAS_GK=gk is not None,
            HAS_BETA=beta is not None,
            **common,
            **settings("cotangent_factors", k, K, V),
        )
        wrap_triton(chunk_state_bwd_kernel)[grid](
            *(k, factors, sums, h_chunks, state_scales),
            *present(k, do, q, x, y, dh_out, du_out, cu),
            *(*out, T),
            BE=BE,
            HAS_DH=dh_out is not None,
            HAS_DU=du_out is not None,
            **common,
            **settings("chunk_state_bwd", k, K, V),
        )


@triton.jit
def reverse_sum(dc, C: tl.constexpr):
    """Σ_{s≥t} dc_s [C]."""
    return tl.cumsum(dc, 0, reverse=True)


@triton.jit
def store_part(
    ptr, scale_ptr, part, first, end, heads, head, D: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, OPERAND: tl.constexpr
):
    """A float32 tile [C, BD] to a 16-bit matrix, as the bits of float16 unit rows and their scales [rows, heads].

    The part of dk through U and that through H cancel to some degree: as bfloat16 the first would lose digits that count.
    """
    if OPERAND == tl.float32:
        store_rows(ptr, part, first, end, heads, head, D, C, BD)
    else:
        part, s = unit_rows(part)
        store_rows(ptr, part.to(tl.float16).to(ptr.dtype.element_ty, bitcast=True), first, end, heads, head, D, C, BD)
        store_scalars(scale_ptr, s, first, end, heads, head, C)


@triton.jit
def load_part(ptr, scale_ptr, first, end, heads, head, D: tl.constexpr, C: tl.constexpr, BD: tl.constexpr, OPERAND: tl.constexpr):
    """What store_part stored, [C, BD] in float32. Where it is to be overwritten: no thread goes on before all have read."""
    part = load_tile(ptr, first, end, heads, head, 0, D, C, BD)
    if OPERAND != tl.float32:
        part = part.to(tl.float16, bitcast=True).to(tl.float32)
        part *= scalars(load_scalars(scale_ptr, first, end, heads, head, C, True), 0.0, C, True)[:, None]
    tl.debug_barrier()
    return part


@triton.jit
def grads_through_u_kernel(
    k_ptr,  # [rows, Hk, K]
    v_ptr,  # [rows, Hk, V]
    g_ptr,  # [rows, H]
    beta_ptr,  # [rows, H]
    u_chunks_ptr,  # [S, H, K, V]
    scales_ptr,  # [S, H, 2]
    du_chunks_ptr,  # [S, H, K, V]
    dscales_ptr,  # [S, H, 2]
    do_ptr,  # [rows, H, V]
    q_ptr,  # [rows, H, K]
    alpha_ptr,  # [rows, H]
    x_ptr,  # [rows, H, K]
    x_scale_ptr,  # [rows, H]
    cu_ptr,  # [N + 1]
    dk_ptr,  # [rows, Hk, K]: see store_part
    dk_scale_ptr,  # [rows, Hk]
    dv_ptr,  # [rows, Hk, V]
    dg_ptr,  # [rows, H]
    dbeta_ptr,  # [rows, H]
    N,
    T,
    H: tl.constexpr,
    Hk: tl.constexpr,
    SCALE: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    OPERAND: tl.constexpr,
    HAS_G: tl.constexpr,
    HAS_ALPHA: tl.constexpr,
    HAS_BETA: tl.constexpr,
    HAS_OUTPUT: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Grid (slots, key/value heads): dv, dg, and what dk and dbeta get through U; one program adds up the heads that share a key.

    What is of size [C, C], here and below, has a row for each key and a column for each token that reads it.
    """
    slot = tl.program_id(0)
    kv_head = tl.program_id(1)
    if PACKED:
        first, end = packed_rows(slot, cu_ptr, N, C)
    else:
        first, end = dense_rows(slot, T, C)
    groups: tl.constexpr = H // Hk
    dk_sum = tl.zeros((C, BK), tl.float32)
    dv_sum = tl.zeros((C, BV), tl.float32)
    for group in range(groups):
        head = kv_head * groups + group
        matrix = slot.to(tl.int64) * H + head
        k = load_tile(k_ptr, first, end, Hk, kv_head, 0, K, C, BK)
        v = load_tile(v_ptr, first, end, Hk, kv_head, 0, V, C, BV)
        d = load_block(du_chunks_ptr, matrix, 0, 0, K, V, BK, BV)
        beta = load_scalars(beta_ptr, first, end, H, head, C, HAS_BETA)
        g = load_scalars(g_ptr, first, end, H, head, C, HAS_G)
        d_scale = tl.load(dscales_ptr + matrix * 2 + 1)
        if HAS_G:
            u_scale = tl.load(scales_ptr + matrix * 2 + 1)
            u = load_block(u_chunks_ptr, matrix, 0, 0, K, V, BK, BV)
        if HAS_OUTPUT:
            do = load_tile(do_ptr, first, end, H, head, 0, V, C, BV)
            q = load_tile(q_ptr, first, end, H, head, 0, K, C, BK)
            x = load_tile(x_ptr, first, end, H, head, 0, K, C, BK)
            x_scale = load_scalars(x_scale_ptr, first, end, H, head, C, True)
            alpha = load_scalars(alpha_ptr, first, end, H, head, C, HAS_ALPHA)
        beta = scalars(beta, 1.0, C, HAS_BETA)
        c = decay_exponents(scalars(g, 0.0, C, HAS_G))
        total = last(c, C)
        to_end = d_scale * tl.exp2(total - c)
        k, k_unit = unit_rows(k.to(tl.float32))
        v, v_unit = unit_rows(v.to(tl.float32))
        k = k.to(OPERAND)
        v = v.to(OPERAND)
        key_scale = k_unit * beta
        value_scale = v_unit * beta
        if HAS_G:
            end_product = tl.exp2(total) * d_scale * u_scale * inner_product(d, u)
        dv = product(k, d, OPERAND) * (to_end * key_scale)[:, None]
        d = load_block_transposed(du_chunks_ptr, matrix, K, V, BK, BV)
        dk = product(v, d, OPERAND) * (to_end * value_scale)[:, None]
        if HAS_G:
            key_end = key_scale * tl.sum(dk * k.to(tl.float32), 1)
            dg = end_product + tl.cumsum(key_end, 0) - key_end
        if HAS_OUTPUT:
            do, do_scale = unit_rows(do.to(tl.float32))
            do = do.to(OPERAND)
            m, m_scale = unit_rows(readout(q.to(tl.float32), x.to(tl.float32), x_scale, alpha, C, HAS_ALPHA))
            m = m.to(OPERAND)
            nu, s = decay_weights_transposed(c, m_scale * do_scale, C)
            s *= SCALE
            km = product(k, tl.trans(m), OPERAND)
            vdo = product(v, tl.trans(do), OPERAND) * nu
            if HAS_G:  # what each token reads less what is read of each key, of the same products: what is common cancels
                pairs = km * vdo * (s * key_scale * value_scale)[:, None]
                start = tl.exp2(c) * (SCALE * u_scale) * m_scale * do_scale
                start *= tl.sum(product(m, u, OPERAND) * do.to(tl.float32), 1)
                dg += reverse_sum(start + tl.sum(pairs, 0) - tl.sum(pairs, 1), C)
            dv += product(km * nu, do, OPERAND) * (s * key_scale)[:, None]
            dk += product(vdo, m, OPERAND) * (s * value_scale)[:, None]
        if HAS_G:
            store_scalars(dg_ptr, dg, first, end, H, head, C)
        if HAS_BETA:
            dk_k = tl.sum(dk * k.to(tl.float32), 1)
            store_scalars(dbeta_ptr, dk_k * k_unit + tl.sum(dv * v.to(tl.float32), 1) * v_unit, first, end, H, head, C)
        dk_sum += dk * beta[:, None]
        dv_sum += dv * beta[:, None]
    store_part(dk_ptr, dk_scale_ptr, dk_sum, first, end, Hk, kv_head, K, C, BK, OPERAND)
    store_rows(dv_ptr, dv_sum, first, end, Hk, kv_head, V, C, BV)


@triton.jit
def grads_through_h_kernel(
    k_ptr,  # [rows, Hk, K]
    gk_ptr,  # [rows, H]
    beta_ptr,  # [rows, H]
    h_chunks_ptr,  # [S, H, K, K]
    scales_ptr,  # [S, H, 2]
    dh_chunks_ptr,  # [S, H, K, K]
    dscales_ptr,  # [S, H, 2]
    x_ptr,  # [rows, H, K]
    x_scale_ptr,  # [rows, H]
    y_ptr,  # [rows, H, K]
    y_scale_ptr,  # [rows, H]
    eta_ptr,  # [rows, H]
    cu_ptr,  # [N + 1]
    dk_ptr,  # [rows, Hk, K]: the part through U on entry, see store_part
    dk_scale_ptr,  # [rows, Hk]
    dgk_ptr,  # [rows, H]: chunk_solve_bwd_kernel's part on entry, if HAS_OUTPUT
    dbeta_ptr,  # [rows, H]: the part through U on entry
    N,
    T,
    H: tl.constexpr,
    Hk: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    OPERAND: tl.constexpr,
    HAS_GK: tl.constexpr,
    HAS_BETA: tl.constexpr,
    HAS_OUTPUT: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Grid (slots, key/value heads): dgk, and what dk and dbeta get through H."""
    slot = tl.program_id(0)
    kv_head = tl.program_id(1)
    if PACKED:
        first, end = packed_rows(slot, cu_ptr, N, C)
    else:
        first, end = dense_rows(slot, T, C)
    groups: tl.constexpr = H // Hk
    row = tl.arange(0, C)
    dk_sum = tl.zeros((C, BK), tl.float32)
    for group in range(groups):
        head = kv_head * groups + group
        matrix = slot.to(tl.int64) * H + head
        k = load_tile(k_ptr, first, end, Hk, kv_head, 0, K, C, BK)
        d = load_block(dh_chunks_ptr, matrix, 0, 0, K, K, BK, BK)
        beta = load_scalars(beta_ptr, first, end, H, head, C, HAS_BETA)
        gk = load_scalars(gk_ptr, first, end, H, head, C, HAS_GK)
        d_scale = tl.load(dscales_ptr + matrix * 2)
        h_scale = tl.load(scales_ptr + matrix * 2)
        if HAS_OUTPUT:
            x_scale = load_scalars(x_scale_ptr, first, end, H, head, C, True)
            y_scale = load_scalars(y_scale_ptr, first, end, H, head, C, True)
            eta = load_scalars(eta_ptr, first, end, H, head, C, True)
            if HAS_GK:
                dc = load_scalars(dgk_ptr, first, end, H, head, C, True)
        beta = scalars(beta, 1.0, C, HAS_BETA)
        c = decay_exponents(scalars(gk, 0.0, C, HAS_GK))
        total = last(c, C)
        k, k_unit = unit_rows(k.to(tl.float32))
        k = k.to(OPERAND)
        key_scale = k_unit * beta
        if HAS_GK or HAS_OUTPUT:
            h = load_block(h_chunks_ptr, matrix, 0, 0, K, K, BK, BK)
        if HAS_GK:
            end_product = tl.exp2(total) * d_scale * h_scale * inner_product(d, h)
        dk = product(k, d, OPERAND) * (2.0 * d_scale * key_scale * tl.exp2(total - c))[:, None]
        if HAS_GK:
            key_end = 0.5 * key_scale * tl.sum(dk * k.to(tl.float32), 1)
            dgk = end_product + tl.cumsum(key_end, 0) - key_end
        if HAS_OUTPUT:
            x_scale = scalars(x_scale, 0.0, C, True)
            y_scale = scalars(y_scale, 0.0, C, True)
            eta = scalars(eta, 0.0, C, True)
            mask = decay_mask_transposed(c, C)
            e = 2.0 * h_scale * key_scale * tl.sum(mask * (tl.exp2(c) * eta)[None, :], 1)
            kh = product(k, h, OPERAND)
            dk -= kh * e[:, None]
            if HAS_GK:
                dc = scalars(dc, 0.0, C, True) + 0.5 * e * key_scale * tl.sum(kh * k.to(tl.float32), 1)
            # Σ_t D_tj η_t D_tl: what is common to j and l begins at the later of them
            later = tl.sum(mask * mask * eta[None, :], 1)
            ridge = tl.where(row[:, None] <= row[None, :], mask * later[None, :], decay_mask(c, C) * later[:, None])
            ridge *= 2.0 * key_scale[:, None] * (key_scale * key_scale)[None, :]
            sigma = mask * (x_scale * y_scale)[None, :] * key_scale[:, None]
            s = power_of_two(tl.max(tl.maximum(tl.abs(ridge), tl.abs(sigma)), 1))
            inverse = reciprocal_of_power(s)[:, None]
            sigma *= inverse
            gram = product(k, tl.trans(k), OPERAND)
            if HAS_GK:
                dc += 0.5 * key_scale * tl.sum(ridge * gram * gram, 1)
                store_scalars(dgk_ptr, dgk + reverse_sum(dc, C), first, end, H, head, C)
            inside = product(gram * (ridge * inverse), k, OPERAND)
            x = load_tile(x_ptr, first, end, H, head, 0, K, C, BK)
            y = load_tile(y_ptr, first, end, H, head, 0, K, C, BK)
            inside = product_into(product(k, tl.trans(x), OPERAND) * sigma, y, inside, OPERAND)
            inside = product_into(product(k, tl.trans(y), OPERAND) * sigma, x, inside, OPERAND)
            dk -= inside * s[:, None]
        elif HAS_GK:
            store_scalars(dgk_ptr, dgk, first, end, H, head, C)
        if HAS_BETA:
            dk_k = tl.sum(dk * k.to(tl.float32), 1)
            dbeta = scalars(load_scalars(dbeta_ptr, first, end, H, head, C, True), 0.0, C, True)
            store_scalars(dbeta_ptr, dbeta + dk_k * k_unit, first, end, H, head, C)
        dk_sum += dk * beta[:, None]
    dk_sum += load_part(dk_ptr, dk_scale_ptr, first, end, Hk, kv_head, K, C, BK, OPERAND)
    store_rows(dk_ptr, dk_sum, first, end, Hk, kv_head, K, C, BK)


def launch_chunk_grads(
    k: Any,
    v: Any,
    g: Any,
    gk: Any,
    beta: Any,
    h_chunks: Any,
    u_chunks: Any,
    state_scales: Any,
    dh_chunks: Any,
    du_chunks: Any,
    dstate_scales: Any,
    do: Any,
    q: Any,
    alpha: Any,
    x: Any,
    x_scale: Any,
    y: Any,
    y_scale: Any,
    eta: Any,
    cu_seqlens: Any,
    scale: float,
    H: int,
    C: int,
    out: Tensors,
) -> None:
    """Gradients of what made the states, all chunks at once.

    The inputs are those and the results of ``launch_chunk_state_bwd``. Fill ``out``: dk [B,T,Hk,K], dv [B,T,Hk,V] in k's dtype,
    summed over the heads that share a key; dg, dgk (which holds what ``launch_chunk_output_bwd`` left), dbeta [B,T,H], not written
    where the input is absent.
    """
    k, v, g, gk, beta, do, q, alpha, cu = compact(k, v, g, gk, beta, do, q, alpha, cu_seqlens)
    h_chunks, u_chunks, state_scales = compact(h_chunks, u_chunks, state_scales)
    dh_chunks, du_chunks, dstate_scales = compact(dh_chunks, du_chunks, dstate_scales)
    x, x_scale, y, y_scale, eta = compact(x, x_scale, y, y_scale, eta)
    _, T, Hk, K = k.shape
    V, N = v.shape[-1], 1 if cu is None else cu.shape[0] - 1
    dk, dv, dg, dgk, dbeta = out
    dk_scale = k.new_empty(k.shape[:3], dtype=torch.float32)
    grid, sizes = (h_chunks.shape[0], Hk), (N, T)
    common = shared_options(H, k, cu, C) | {"K": K, "BK": block(K), "HAS_BETA": beta is not None, "HAS_OUTPUT": do is not None}
    with on_device(k):
        wrap_triton(grads_through_u_kernel)[grid](
            *(k, v, *present(k, g, beta), u_chunks, state_scales, du_chunks, dstate_scales),
            *(*present(k, do, q, alpha, x, x_scale, cu), dk, dk_scale, dv, dg, dbeta, *sizes),
            SCALE=scale,
            V=V,
            BV=block(V),
            HAS_G=g is not None,
            HAS_ALPHA=alpha is not None,
            **common,
            **settings("grads_through_u", k, K, V),
        )
        wrap_triton(grads_through_h_kernel)[grid](
            *(k, *present(k, gk, beta), h_chunks, state_scales, dh_chunks, dstate_scales),
            *(*present(k, x, x_scale, y, y_scale, eta, cu), dk, dk_scale, dgk, dbeta, *sizes),
            HAS_GK=gk is not None,
            **common,
            **settings("grads_through_h", k, K),
        )
