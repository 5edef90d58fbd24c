"""chunk_state_bwd and chunk_grads: cotangents of the states, backwards in time, and of all that made them.

Token t pulls G_t = −½(y_t x_tᵀ + x_t y_tᵀ) − η_t H_t out of H_t and scale · m_t do_tᵀ out of U_t.  Both kernels read a token's
x, y, m and do as unit rows and one float32 factor: σ_t for the pair (x, y), ν_t for the pair (m, do).
"""

from typing import Any

import triton
import triton.language as tl
from torch.library import wrap_triton

from .launch import Tensors, block, compact, on_device, operand, present, settings
from .tile import (
    decay_mask,
    dense_rows,
    last,
    load_columns,
    load_row_block,
    load_rows,
    load_scalars,
    load_state,
    outer_sum,
    packed_rows,
    product,
    reciprocal,
    row_norm,
    store_columns,
    store_rows,
    store_scalars,
    unit_rows,
    weighted_product,
    wide_product,
)

__all__ = ["chunk_grads_kernel", "chunk_state_bwd_kernel", "launch_chunk_grads", "launch_chunk_state_bwd"]


@triton.jit
def load_readout(
    q_ptr,
    alpha_ptr,
    x_ptr,
    phi_ptr,
    first,
    end,
    H,
    head,
    K: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    HAS_ALPHA: tl.constexpr,
):
    """(q, φx/‖q‖ as stored, its factor ‖q‖/φ [C], m = q + α(x − q)), all [C, BK] but the factor."""
    q = load_rows(q_ptr, first, end, H, head, K, C, BK)
    _, length = row_norm(q)
    x_scale = length * reciprocal(load_scalars(phi_ptr, first, end, H, head, 0.0, C, True))
    x = load_rows(x_ptr, first, end, H, head, K, C, BK)
    m = x * x_scale[:, None]
    if HAS_ALPHA:
        m = q + load_scalars(alpha_ptr, first, end, H, head, 1.0, C, HAS_ALPHA)[:, None] * (m - q)
    return q, x, x_scale, m


@triton.jit
def chunk_state_bwd_kernel(
    k_ptr,  # [rows, Hk, K]
    g_ptr,  # [rows, H]
    gk_ptr,  # [rows, H]
    beta_ptr,  # [rows, H]
    h_chunks_ptr,  # [S, H, K, K]
    scales_ptr,  # [S, H, K + V]
    do_ptr,  # [rows, H, V]
    q_ptr,  # [rows, H, K]
    alpha_ptr,  # [rows, H]
    x_ptr,  # [rows, H, K]
    phi_ptr,  # [rows, H]
    y_ptr,  # [rows, H, K]
    y_scale_ptr,  # [rows, H]
    eta_ptr,  # [rows, H]
    dh_out_ptr,  # [N, H, K, K]
    du_out_ptr,  # [N, H, K, V]
    cu_ptr,  # [N + 1]
    dh_chunks_ptr,  # [S, H, K, K]
    du_chunks_ptr,  # [S, H, K, V]
    dscales_ptr,  # [S, H, K + V]
    dh0_ptr,  # [N, H, K, K]
    du0_ptr,  # [N, H, K, V]
    T,
    H,
    Hk,
    SCALE: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BE: tl.constexpr,
    OPERAND: tl.constexpr,
    HAS_G: tl.constexpr,
    HAS_GK: tl.constexpr,
    HAS_ALPHA: tl.constexpr,
    HAS_BETA: tl.constexpr,
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

    if block_id < h_blocks:
        first_column = block_id * BE
        column = first_column + tl.arange(0, BE)[None, :]
        inside = (row < K) & (column < K)
        corner = (n.to(tl.int64) * H + head) * (K * K)
        if HAS_DH:
            d = tl.load(dh_out_ptr + corner + row * K + column, mask=inside, other=0.0)
            d = 0.5 * (d + tl.load(dh_out_ptr + corner + column * K + row, mask=inside, other=0.0))
        else:
            d = tl.zeros((BK, BE), tl.float32)
        for back in range(chunks):
            i = chunks - 1 - back
            first = begin + i * C
            matrix = (first_slot + i).to(tl.int64) * H + head
            store_columns(dh_chunks_ptr, dscales_ptr + matrix * (K + V), d, matrix, first_column, K, K, BK, BE)
            c = tl.cumsum(load_scalars(gk_ptr, first, end, H, head, 0.0, C, HAS_GK), 0)
            d *= tl.exp(last(c, C))
            if HAS_OUTPUT:
                gamma = tl.exp(c)
                eta = load_scalars(eta_ptr, first, end, H, head, 0.0, C, True)
                e = tl.sum(decay_mask(c, C) * (gamma * eta)[:, None], 0)
                h, h_scales = load_columns(h_chunks_ptr, scales_ptr + matrix * (K + V), matrix, first_column, K, K, BK, BE)
                d -= tl.sum(gamma * gamma * eta, 0) * h.to(tl.float32) * h_scales[None, :]
                k, k_unit = unit_rows(load_rows(k_ptr, first, end, Hk, kv_head, K, C, BK))
                key_scale = k_unit * load_scalars(beta_ptr, first, end, H, head, 1.0, C, HAS_BETA)
                k_block = load_row_block(k_ptr, first, end, Hk, kv_head, first_column, K, C, BE) * reciprocal(k_unit)[:, None]
                d -= outer_sum(k, e * key_scale * key_scale, k_block, False, OPERAND)
                _, length = row_norm(load_rows(q_ptr, first, end, H, head, K, C, BK))
                x_scale = length * reciprocal(load_scalars(phi_ptr, first, end, H, head, 0.0, C, True))
                sigma = 0.5 * gamma * x_scale * load_scalars(y_scale_ptr, first, end, H, head, 0.0, C, True)
                x = load_rows(x_ptr, first, end, H, head, K, C, BK)
                d -= outer_sum(x, sigma, load_row_block(y_ptr, first, end, H, head, first_column, K, C, BE), False, OPERAND)
                y = load_rows(y_ptr, first, end, H, head, K, C, BK)
                d -= outer_sum(y, sigma, load_row_block(x_ptr, first, end, H, head, first_column, K, C, BE), False, OPERAND)
        tl.store(dh0_ptr + corner + row * K + column, d, mask=inside)
    else:
        first_column = (block_id - h_blocks) * BE
        column = first_column + tl.arange(0, BE)[None, :]
        inside = (row < K) & (column < V)
        corner = (n.to(tl.int64) * H + head) * (K * V)
        if HAS_DU:
            d = tl.load(du_out_ptr + corner + row * V + column, mask=inside, other=0.0)
        else:
            d = tl.zeros((BK, BE), tl.float32)
        for back in range(chunks):
            i = chunks - 1 - back
            first = begin + i * C
            matrix = (first_slot + i).to(tl.int64) * H + head
            store_columns(du_chunks_ptr, dscales_ptr + matrix * (K + V) + K, d, matrix, first_column, K, V, BK, BE)
            c = tl.cumsum(load_scalars(g_ptr, first, end, H, head, 0.0, C, HAS_G), 0)
            d *= tl.exp(last(c, C))
            if HAS_OUTPUT:
                _, _, _, m = load_readout(q_ptr, alpha_ptr, x_ptr, phi_ptr, first, end, H, head, K, C, BK, HAS_ALPHA)
                m, m_scale = unit_rows(m)
                do, do_scale = unit_rows(load_row_block(do_ptr, first, end, H, head, first_column, V, C, BE))
                d += outer_sum(m, SCALE * tl.exp(c) * m_scale * do_scale, do, False, OPERAND)
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
    phi: Any,
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
    """Fill ``out`` as ``ops.chunk_state_bwd`` describes."""
    k, g, gk, beta, do, q, alpha, dh_out, du_out, cu = compact(k, g, gk, beta, do, q, alpha, dh_out, du_out, cu_seqlens)
    B, T, Hk, K = k.shape
    V, N = v.shape[-1], B if cu is None else cu.shape[0] - 1
    BE = min(64, block(K), block(V))
    grid = (triton.cdiv(K, BE) + triton.cdiv(V, BE), H, N)
    with on_device(k):
        wrap_triton(chunk_state_bwd_kernel)[grid](
            *(k, *present(k, g, gk, beta), *compact(h_chunks, state_scales)),
            *present(k, do, q, alpha, *compact(x, phi, y, y_scale, eta), dh_out, du_out, cu),
            *(*out, T, H, Hk),
            SCALE=scale,
            K=K,
            V=V,
            C=C,
            BK=block(K),
            BE=BE,
            OPERAND=operand(k.dtype),
            HAS_G=g is not None,
            HAS_GK=gk is not None,
            HAS_ALPHA=alpha is not None,
            HAS_BETA=beta is not None,
            HAS_OUTPUT=do is not None,
            HAS_DH=dh_out is not None,
            HAS_DU=du_out is not None,
            PACKED=cu is not None,
            **settings("chunk_state_bwd", k, K, V),
        )


@triton.jit
def reverse_sum(dc, C: tl.constexpr):
    """Σ_{s≥t} dc_s [C]."""
    return tl.cumsum(dc, 0, reverse=True)


@triton.jit
def chunk_grads_kernel(
    k_ptr,  # [rows, Hk, K]
    v_ptr,  # [rows, Hk, V]
    g_ptr,  # [rows, H]
    gk_ptr,  # [rows, H]
    beta_ptr,  # [rows, H]
    h_chunks_ptr,  # [S, H, K, K]
    u_chunks_ptr,  # [S, H, K, V]
    scales_ptr,  # [S, H, K + V]
    dh_chunks_ptr,  # [S, H, K, K]
    du_chunks_ptr,  # [S, H, K, V]
    dscales_ptr,  # [S, H, K + V]
    do_ptr,  # [rows, H, V]
    q_ptr,  # [rows, H, K]
    alpha_ptr,  # [rows, H]
    x_ptr,  # [rows, H, K]
    phi_ptr,  # [rows, H]
    y_ptr,  # [rows, H, K]
    y_scale_ptr,  # [rows, H]
    eta_ptr,  # [rows, H]
    mdm_ptr,  # [rows, H]
    cu_ptr,  # [N + 1]
    dk_ptr,  # [rows, Hk, K]
    dv_ptr,  # [rows, Hk, V]
    dg_ptr,  # [rows, H]
    dgk_ptr,  # [rows, H]
    dbeta_ptr,  # [rows, H]
    N,
    T,
    H,
    Hk,
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
    """Grid (slots, key/value heads): one program adds up the heads that share a key."""
    slot = tl.program_id(0)
    kv_head = tl.program_id(1)
    if PACKED:
        first, end = packed_rows(slot, cu_ptr, N, C)
    else:
        first, end = dense_rows(slot, T, C)
    groups = H // Hk
    dk_sum = tl.zeros((C, BK), tl.float32)
    dv_sum = tl.zeros((C, BV), tl.float32)
    for group in range(groups):
        head = kv_head * groups + group
        matrix = slot.to(tl.int64) * H + head
        scales = scales_ptr + matrix * (K + V)
        dscales = dscales_ptr + matrix * (K + V)
        k, k_unit = unit_rows(load_rows(k_ptr, first, end, Hk, kv_head, K, C, BK))
        beta = load_scalars(beta_ptr, first, end, H, head, 1.0, C, HAS_BETA)
        key_scale = k_unit * beta

        # through H: k̂ = key_scale k
        c = tl.cumsum(load_scalars(gk_ptr, first, end, H, head, 0.0, C, HAS_GK), 0)
        total = last(c, C)
        d, d_scales = load_columns(dh_chunks_ptr, dscales, matrix, 0, K, K, BK, BK)
        part = product(k, d, OPERAND) * (2.0 * key_scale * tl.exp(total - c))[:, None] * d_scales[None, :]
        end_product = 0.5 * tl.sum(tl.sum(part * k, 1) * key_scale, 0)
        h, h_scales = load_columns(h_chunks_ptr, scales, matrix, 0, K, K, BK, BK)
        if HAS_GK:
            inner = tl.sum(d.to(tl.float32) * h.to(tl.float32), 0) * d_scales * h_scales
            end_product += tl.exp(total) * tl.sum(inner, 0)
        if HAS_OUTPUT:
            q, x, x_scale, m = load_readout(q_ptr, alpha_ptr, x_ptr, phi_ptr, first, end, H, head, K, C, BK, HAS_ALPHA)
            y = load_rows(y_ptr, first, end, H, head, K, C, BK)
            y_scale = load_scalars(y_scale_ptr, first, end, H, head, 0.0, C, True)
            eta = load_scalars(eta_ptr, first, end, H, head, 0.0, C, True)
            mask = decay_mask(c, C)
            mask_t = tl.trans(mask)
            ridge = wide_product(mask_t, mask * eta[:, None], OPERAND) * (key_scale * key_scale)[None, :]
            part -= weighted_product(product(k, tl.trans(k), OPERAND), 2.0 * ridge * key_scale[:, None], k, OPERAND)
            e = tl.sum(mask * (tl.exp(c) * eta)[:, None], 0)
            part -= product(k, h, OPERAND) * (2.0 * e * key_scale)[:, None] * h_scales[None, :]
            sigma = mask_t * (x_scale * y_scale)[None, :] * key_scale[:, None]
            part -= weighted_product(product(k, tl.trans(x), OPERAND), sigma, y, OPERAND)
            part -= weighted_product(product(k, tl.trans(y), OPERAND), sigma, x, OPERAND)
        if HAS_GK:
            dc = -0.5 * tl.sum(part * k, 1) * key_scale
            if HAS_OUTPUT:
                dc -= tl.sum(y * q, 1) * y_scale
            store_scalars(dgk_ptr, reverse_sum(dc, C) + end_product, first, end, H, head, C)
        dk = part

        # through U
        v, v_unit = unit_rows(load_rows(v_ptr, first, end, Hk, kv_head, V, C, BV))
        value_scale = v_unit * beta
        c = tl.cumsum(load_scalars(g_ptr, first, end, H, head, 0.0, C, HAS_G), 0)
        total = last(c, C)
        d, d_scale = load_state(du_chunks_ptr, dscales + K, matrix, K, V, BK, BV)
        tail = d_scale * tl.exp(total - c)
        part = product(v, tl.trans(d), OPERAND) * (tail * value_scale)[:, None]
        end_product = tl.sum(tl.sum(part * k, 1) * key_scale, 0)
        if HAS_G:
            u, u_scale = load_state(u_chunks_ptr, scales + K, matrix, K, V, BK, BV)
            inner = tl.sum(tl.sum(d.to(tl.float32) * u.to(tl.float32), 1), 0)
            end_product += tl.exp(total) * d_scale * u_scale * inner
        dv = product(k, d, OPERAND) * (tail * key_scale)[:, None]
        if HAS_OUTPUT:
            m, m_scale = unit_rows(m)
            do, do_scale = unit_rows(load_rows(do_ptr, first, end, H, head, V, C, BV))
            nu = tl.trans(decay_mask(c, C)) * (SCALE * m_scale * do_scale)[None, :]
            part += weighted_product(product(v, tl.trans(do), OPERAND), nu * value_scale[:, None], m, OPERAND)
            dv += weighted_product(product(k, tl.trans(m), OPERAND), nu * key_scale[:, None], do, OPERAND)
        if HAS_G:
            dc = -tl.sum(part * k, 1) * key_scale
            if HAS_OUTPUT:
                dc += load_scalars(mdm_ptr, first, end, H, head, 0.0, C, True)
            store_scalars(dg_ptr, reverse_sum(dc, C) + end_product, first, end, H, head, C)
        dk += part
        if HAS_BETA:
            dbeta = tl.sum(dk * k, 1) * k_unit + tl.sum(dv * v, 1) * v_unit
            store_scalars(dbeta_ptr, dbeta, first, end, H, head, C)
            dk *= beta[:, None]
            dv *= beta[:, None]
        dk_sum += dk
        dv_sum += dv
    store_rows(dk_ptr, dk_sum, first, end, Hk, kv_head, K, C, BK)
    store_rows(dv_ptr, dv_sum, first, end, Hk, kv_head, V, C, BV)


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
    phi: Any,
    y: Any,
    y_scale: Any,
    eta: Any,
    mdm: Any,
    cu_seqlens: Any,
    scale: float,
    H: int,
    C: int,
    out: Tensors,
) -> None:
    """Fill ``out`` as ``ops.chunk_grads`` describes."""
    k, v, g, gk, beta, do, q, alpha, cu = compact(k, v, g, gk, beta, do, q, alpha, cu_seqlens)
    _, T, Hk, K = k.shape
    V, N = v.shape[-1], 1 if cu is None else cu.shape[0] - 1
    with on_device(k):
        wrap_triton(chunk_grads_kernel)[(h_chunks.shape[0], Hk)](
            *(k, v, *present(k, g, gk, beta)),
            *compact(h_chunks, u_chunks, state_scales, dh_chunks, du_chunks, dstate_scales),
            *present(k, do, q, alpha, *compact(x, phi, y, y_scale, eta, mdm), cu),
            *(*out, N, T, H, Hk),
            SCALE=scale,
            K=K,
            V=V,
            C=C,
            BK=block(K),
            BV=block(V),
            OPERAND=operand(k.dtype),
            HAS_G=g is not None,
            HAS_GK=gk is not None,
            HAS_ALPHA=alpha is not None,
            HAS_BETA=beta is not None,
            HAS_OUTPUT=do is not None,
            PACKED=cu is not None,
            **settings("chunk_grads", k, K, V),
        )
