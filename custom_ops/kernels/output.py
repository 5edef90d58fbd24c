"""chunk_output: solve and read-out of every token, all chunks at once; and the adjoint solve, which has the same shape."""

from typing import Any

import triton
import triton.language as tl
from torch.library import wrap_triton

from .launch import Tensors, block, compact, on_device, operand, polynomial, present, settings
from .tile import (
    decay_mask,
    dense_rows,
    frobenius,
    load_rows,
    load_scalars,
    load_state,
    packed_rows,
    product,
    reciprocal,
    row_norm,
    solve,
    store_rows,
    store_scalars,
    unit_rows,
    weighted_product,
)

__all__ = ["chunk_output_bwd_kernel", "chunk_output_kernel", "launch_chunk_output", "launch_chunk_output_bwd"]


@triton.jit
def chunk_output_kernel(
    q_ptr,  # [rows, H, K]
    k_ptr,  # [rows, Hk, K]
    v_ptr,  # [rows, Hk, V]
    g_ptr,  # [rows, H]
    gk_ptr,  # [rows, H]
    alpha_ptr,  # [rows, H]
    beta_ptr,  # [rows, H]
    h_chunks_ptr,  # [S, H, K, K]
    u_chunks_ptr,  # [S, H, K, V]
    scales_ptr,  # [S, H, K + V]
    cu_ptr,  # [N + 1]
    o_ptr,  # [rows, H, V]
    x_ptr,  # [rows, H, K]
    phi_ptr,  # [rows, H]
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
    NUM_ITER: tl.constexpr,
    TAU: tl.constexpr,
    FRONT: tl.constexpr,
    TAIL: tl.constexpr,
    OPERAND: tl.constexpr,
    HAS_G: tl.constexpr,
    HAS_GK: tl.constexpr,
    HAS_ALPHA: tl.constexpr,
    HAS_BETA: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Grid (slots, heads)."""
    slot = tl.program_id(0)
    head = tl.program_id(1)
    if PACKED:
        first, end = packed_rows(slot, cu_ptr, N, C)
    else:
        first, end = dense_rows(slot, T, C)
    kv_head = head // (H // Hk)
    matrix = slot.to(tl.int64) * H + head
    scales_ptr += matrix * (K + V)

    k, key_scale = unit_rows(load_rows(k_ptr, first, end, Hk, kv_head, K, C, BK))
    key_scale *= load_scalars(beta_ptr, first, end, H, head, 1.0, C, HAS_BETA)
    c = tl.cumsum(load_scalars(gk_ptr, first, end, H, head, 0.0, C, HAS_GK), 0)
    mask = decay_mask(c, C)
    gamma = tl.exp(c)
    h, h_scale = load_state(h_chunks_ptr, scales_ptr, matrix, K, K, BK, BK)
    phi = frobenius(k, key_scale, mask, gamma, h, h_scale, OPERAND)
    store_scalars(phi_ptr, phi, first, end, H, head, C)
    q, length = row_norm(load_rows(q_ptr, first, end, H, head, K, C, BK))
    x = solve(q, k, key_scale, mask, gamma, h, h_scale, phi, NUM_ITER, TAU, FRONT, TAIL, OPERAND)
    store_rows(x_ptr, x, first, end, H, head, K, C, BK)

    x *= (length * reciprocal(phi))[:, None]
    if HAS_ALPHA:
        q = load_rows(q_ptr, first, end, H, head, K, C, BK)
        x = q + load_scalars(alpha_ptr, first, end, H, head, 1.0, C, HAS_ALPHA)[:, None] * (x - q)
    m, m_scale = unit_rows(x)
    v, v_scale = unit_rows(load_rows(v_ptr, first, end, Hk, kv_head, V, C, BV))
    v_scale *= load_scalars(beta_ptr, first, end, H, head, 1.0, C, HAS_BETA)
    c = tl.cumsum(load_scalars(g_ptr, first, end, H, head, 0.0, C, HAS_G), 0)
    u, u_scale = load_state(u_chunks_ptr, scales_ptr + K, matrix, K, V, BK, BV)
    weight = decay_mask(c, C) * (key_scale * v_scale)[None, :]
    o = weighted_product(product(m, tl.trans(k), OPERAND), weight, v, OPERAND)
    o += product(m, u, OPERAND) * (tl.exp(c) * u_scale)[:, None]
    store_rows(o_ptr, o * (m_scale * SCALE)[:, None], first, end, H, head, V, C, BV)


def launch_chunk_output(
    q: Any,
    k: Any,
    v: Any,
    g: Any,
    gk: Any,
    alpha: Any,
    beta: Any,
    h0: Any,
    u0: Any,
    h_chunks: Any,
    u_chunks: Any,
    state_scales: Any,
    cu_seqlens: Any,
    scale: float,
    ridge_ratio: float,
    num_iter: int,
    C: int,
    out: Tensors,
) -> None:
    """Fill ``out`` as ``ops.chunk_output`` describes."""
    q, k, v, g, gk, alpha, beta, cu = compact(q, k, v, g, gk, alpha, beta, cu_seqlens)
    (_, T, H, K), (Hk, V) = q.shape, v.shape[2:]
    N = 1 if cu is None else cu.shape[0] - 1
    with on_device(q):
        wrap_triton(chunk_output_kernel)[(h_chunks.shape[0], H)](
            *(q, k, v, *present(q, g, gk, alpha, beta), *compact(h_chunks, u_chunks, state_scales), *present(q, cu), *out),
            *(N, T, H, Hk),
            SCALE=scale,
            K=K,
            V=V,
            C=C,
            BK=block(K),
            BV=block(V),
            **polynomial(ridge_ratio, num_iter),
            OPERAND=operand(q.dtype),
            HAS_G=g is not None,
            HAS_GK=gk is not None,
            HAS_ALPHA=alpha is not None,
            HAS_BETA=beta is not None,
            PACKED=cu is not None,
            **settings("chunk_output", q, K, V),
        )


@triton.jit
def chunk_output_bwd_kernel(
    do_ptr,  # [rows, H, V]
    q_ptr,  # [rows, H, K]
    k_ptr,  # [rows, Hk, K]
    v_ptr,  # [rows, Hk, V]
    g_ptr,  # [rows, H]
    gk_ptr,  # [rows, H]
    alpha_ptr,  # [rows, H]
    beta_ptr,  # [rows, H]
    h_chunks_ptr,  # [S, H, K, K]
    u_chunks_ptr,  # [S, H, K, V]
    scales_ptr,  # [S, H, K + V]
    x_ptr,  # [rows, H, K]
    phi_ptr,  # [rows, H]
    cu_ptr,  # [N + 1]
    dq_ptr,  # [rows, H, K]
    dalpha_ptr,  # [rows, H]
    y_ptr,  # [rows, H, K]
    y_scale_ptr,  # [rows, H]
    eta_ptr,  # [rows, H]
    mdm_ptr,  # [rows, H]
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
    RIDGE_RATIO: tl.constexpr,
    NUM_ITER: tl.constexpr,
    TAU: tl.constexpr,
    FRONT: tl.constexpr,
    TAIL: tl.constexpr,
    OPERAND: tl.constexpr,
    HAS_G: tl.constexpr,
    HAS_GK: tl.constexpr,
    HAS_ALPHA: tl.constexpr,
    HAS_BETA: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Grid (slots, heads)."""
    slot = tl.program_id(0)
    head = tl.program_id(1)
    if PACKED:
        first, end = packed_rows(slot, cu_ptr, N, C)
    else:
        first, end = dense_rows(slot, T, C)
    kv_head = head // (H // Hk)
    matrix = slot.to(tl.int64) * H + head
    scales_ptr += matrix * (K + V)

    k, key_scale = unit_rows(load_rows(k_ptr, first, end, Hk, kv_head, K, C, BK))
    key_scale *= load_scalars(beta_ptr, first, end, H, head, 1.0, C, HAS_BETA)

    # dm_t = scale · U_t do_t
    v, v_scale = unit_rows(load_rows(v_ptr, first, end, Hk, kv_head, V, C, BV))
    v_scale *= load_scalars(beta_ptr, first, end, H, head, 1.0, C, HAS_BETA)
    do, do_scale = unit_rows(load_rows(do_ptr, first, end, H, head, V, C, BV))
    c = tl.cumsum(load_scalars(g_ptr, first, end, H, head, 0.0, C, HAS_G), 0)
    u, u_scale = load_state(u_chunks_ptr, scales_ptr + K, matrix, K, V, BK, BV)
    weight = decay_mask(c, C) * (key_scale * v_scale)[None, :]
    dm = weighted_product(product(do, tl.trans(v), OPERAND), weight, k, OPERAND)
    dm += product(do, tl.trans(u), OPERAND) * (tl.exp(c) * u_scale)[:, None]
    dm *= (do_scale * SCALE)[:, None]

    phi = load_scalars(phi_ptr, first, end, H, head, 0.0, C, True)
    gain = reciprocal(phi)
    q = load_rows(q_ptr, first, end, H, head, K, C, BK)
    _, length = row_norm(q)
    x_scale = length * gain
    x = load_rows(x_ptr, first, end, H, head, K, C, BK) * x_scale[:, None]
    if HAS_ALPHA:
        alpha = load_scalars(alpha_ptr, first, end, H, head, 1.0, C, HAS_ALPHA)
        dalpha = tl.sum(dm * (x - q), 1)
        store_scalars(dalpha_ptr, dalpha, first, end, H, head, C)
        store_scalars(mdm_ptr, tl.sum(dm * q, 1) + alpha * dalpha, first, end, H, head, C)
        rhs, length = row_norm(dm * alpha[:, None])
        dq = dm * (1.0 - alpha)[:, None]
    else:
        store_scalars(mdm_ptr, tl.sum(dm * x, 1), first, end, H, head, C)
        rhs, length = row_norm(dm)

    c = tl.cumsum(load_scalars(gk_ptr, first, end, H, head, 0.0, C, HAS_GK), 0)
    h, h_scale = load_state(h_chunks_ptr, scales_ptr, matrix, K, K, BK, BK)
    y = solve(rhs, k, key_scale, decay_mask(c, C), tl.exp(c), h, h_scale, phi, NUM_ITER, TAU, FRONT, TAIL, OPERAND)
    store_rows(y_ptr, y, first, end, H, head, K, C, BK)
    y_scale = length * gain
    store_scalars(y_scale_ptr, y_scale, first, end, H, head, C)
    y *= y_scale[:, None]
    x = load_rows(x_ptr, first, end, H, head, K, C, BK)
    store_scalars(eta_ptr, RIDGE_RATIO * gain * x_scale * tl.sum(x * y, 1), first, end, H, head, C)
    if HAS_ALPHA:
        y += dq
    store_rows(dq_ptr, y, first, end, H, head, K, C, BK)


def launch_chunk_output_bwd(
    do: Any,
    q: Any,
    k: Any,
    v: Any,
    g: Any,
    gk: Any,
    alpha: Any,
    beta: Any,
    h_chunks: Any,
    u_chunks: Any,
    state_scales: Any,
    x: Any,
    phi: Any,
    cu_seqlens: Any,
    scale: float,
    ridge_ratio: float,
    num_iter: int,
    C: int,
    out: Tensors,
) -> None:
    """Fill ``out`` as ``ops.chunk_output_bwd`` describes."""
    do, q, k, v, g, gk, alpha, beta, x, phi, cu = compact(do, q, k, v, g, gk, alpha, beta, x, phi, cu_seqlens)
    (_, T, H, K), (Hk, V) = q.shape, v.shape[2:]
    N = 1 if cu is None else cu.shape[0] - 1
    with on_device(q):
        wrap_triton(chunk_output_bwd_kernel)[(h_chunks.shape[0], H)](
            *(do, q, k, v, *present(q, g, gk, alpha, beta), *compact(h_chunks, u_chunks, state_scales), x, phi, *present(q, cu)),
            *(*out, N, T, H, Hk),
            SCALE=scale,
            RIDGE_RATIO=ridge_ratio,
            K=K,
            V=V,
            C=C,
            BK=block(K),
            BV=block(V),
            **polynomial(ridge_ratio, num_iter),
            OPERAND=operand(q.dtype),
            HAS_G=g is not None,
            HAS_GK=gk is not None,
            HAS_ALPHA=alpha is not None,
            HAS_BETA=beta is not None,
            PACKED=cu is not None,
            **settings("chunk_output_bwd", q, K, V),
        )
