"""chunk_output and its adjoint, a part of chunk_bwd: all chunks at once, a solve and a read-out each.

The solve has a kernel of its own, because it wants every register; what passes between the two is an output anyway.  The adjoint
runs them backwards: dm = U do, then the same solve on α dm.
"""

from typing import Any

import triton
import triton.language as tl

from .launch import Tensors, block, compact, on_device, polynomial, present, settings, shared_options, wrap_triton
from .tile import (
    decay_exponents,
    decay_mask,
    decay_weights,
    dense_rows,
    frobenius,
    load_scalars,
    load_state,
    load_tile,
    packed_rows,
    product,
    readout,
    reciprocal,
    scalars,
    solve,
    split_product,
    store_rows,
    store_scalars,
    unit_rows,
)

__all__ = [
    "chunk_read_bwd_kernel",
    "chunk_read_kernel",
    "chunk_solve_bwd_kernel",
    "chunk_solve_kernel",
    "launch_chunk_output",
    "launch_chunk_output_bwd",
]


@triton.jit
def chunk_solve_kernel(
    q_ptr,  # [rows, H, K]
    k_ptr,  # [rows, Hk, K]
    gk_ptr,  # [rows, H]
    beta_ptr,  # [rows, H]
    h_chunks_ptr,  # [S, H, K, K]
    scales_ptr,  # [S, H, 2]
    cu_ptr,  # [N + 1]
    x_ptr,  # [rows, H, K]
    x_scale_ptr,  # [rows, H]
    phi_ptr,  # [rows, H]
    N,
    T,
    H: tl.constexpr,
    Hk: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    NUM_ITER: tl.constexpr,
    TAU: tl.constexpr,
    FRONT: tl.constexpr,
    TAIL: tl.constexpr,
    OPERAND: tl.constexpr,
    HAS_GK: tl.constexpr,
    HAS_BETA: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Grid (slots, heads). x = (H + λI)^{-1} q."""
    slot = tl.program_id(0)
    head = tl.program_id(1)
    if PACKED:
        first, end = packed_rows(slot, cu_ptr, N, C)
    else:
        first, end = dense_rows(slot, T, C)
    matrix = slot.to(tl.int64) * H + head
    h, h_scale = load_state(h_chunks_ptr, scales_ptr, matrix, 0, 0, K, K, BK, BK)
    # all loads come first: what follows has barriers, behind which each would wait on its own
    k = load_tile(k_ptr, first, end, Hk, head // (H // Hk), 0, K, C, BK)
    q = load_tile(q_ptr, first, end, H, head, 0, K, C, BK)
    gk = load_scalars(gk_ptr, first, end, H, head, C, HAS_GK, AXIS=1)
    beta = load_scalars(beta_ptr, first, end, H, head, C, HAS_BETA, AXIS=1)
    k, key_scale = unit_rows(k.to(tl.float32))
    k = k.to(OPERAND)
    key_scale *= scalars(beta, 1.0, C, HAS_BETA, AXIS=1)
    c = decay_exponents(scalars(gk, 0.0, C, HAS_GK, AXIS=1))
    mask = decay_mask(c, C)
    gamma = tl.exp2(c)
    phi = frobenius(k, key_scale, c, mask, gamma, h, h_scale, OPERAND)
    store_scalars(phi_ptr, phi, first, end, H, head, C)
    q, q_scale = unit_rows(q.to(tl.float32))
    x = solve(q.to(OPERAND), k, key_scale, mask, gamma, h, h_scale, phi, NUM_ITER, TAU, FRONT, TAIL, OPERAND)
    x, x_scale = unit_rows(x)
    store_rows(x_ptr, x, first, end, H, head, K, C, BK)
    store_scalars(x_scale_ptr, x_scale * q_scale * reciprocal(phi), first, end, H, head, C)


@triton.jit
def chunk_read_kernel(
    q_ptr,  # [rows, H, K]
    k_ptr,  # [rows, Hk, K]
    v_ptr,  # [rows, Hk, V]
    g_ptr,  # [rows, H]
    alpha_ptr,  # [rows, H]
    beta_ptr,  # [rows, H]
    u_chunks_ptr,  # [S, H, K, V]
    scales_ptr,  # [S, H, 2]
    x_ptr,  # [rows, H, K]
    x_scale_ptr,  # [rows, H]
    cu_ptr,  # [N + 1]
    o_ptr,  # [rows, H, V]
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
    PACKED: tl.constexpr,
):
    """Grid (slots, heads). o = scale · Uᵀ m, m = q + α (x − q)."""
    slot = tl.program_id(0)
    head = tl.program_id(1)
    if PACKED:
        first, end = packed_rows(slot, cu_ptr, N, C)
    else:
        first, end = dense_rows(slot, T, C)
    matrix = slot.to(tl.int64) * H + head
    x = load_tile(x_ptr, first, end, H, head, 0, K, C, BK)
    q = load_tile(q_ptr, first, end, H, head, 0, K, C, BK)
    x_scale = load_scalars(x_scale_ptr, first, end, H, head, C, True, AXIS=1)
    alpha = load_scalars(alpha_ptr, first, end, H, head, C, HAS_ALPHA, AXIS=1)
    k = load_tile(k_ptr, first, end, Hk, head // (H // Hk), 0, K, C, BK)
    v = load_tile(v_ptr, first, end, Hk, head // (H // Hk), 0, V, C, BV)
    beta = load_scalars(beta_ptr, first, end, H, head, C, HAS_BETA, AXIS=1)
    g = load_scalars(g_ptr, first, end, H, head, C, HAS_G, AXIS=1)
    u, u_scale = load_state(u_chunks_ptr, scales_ptr, matrix, 1, 0, K, V, BK, BV)
    m, m_scale = unit_rows(readout(q.to(tl.float32), x.to(tl.float32), x_scale, alpha, C, HAS_ALPHA, AXIS=1))
    k, key_scale = unit_rows(k.to(tl.float32))
    v, v_scale = unit_rows(v.to(tl.float32))
    beta = scalars(beta, 1.0, C, HAS_BETA, AXIS=1)
    key_scale *= beta
    v_scale *= beta
    c = decay_exponents(scalars(g, 0.0, C, HAS_G, AXIS=1))
    # where q lies across the keys, m is long and hardly reads U: its digits count
    o = split_product(m, u, OPERAND) * (tl.exp2(c) * u_scale)[:, None]
    weight, weight_scale = decay_weights(c, key_scale * v_scale, C)
    o += product(split_product(m, tl.trans(k), OPERAND) * weight, v, OPERAND) * weight_scale[:, None]
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
    h_chunks, u_chunks, state_scales = compact(h_chunks, u_chunks, state_scales)
    (_, T, H, K), V = q.shape, v.shape[-1]
    grid, sizes = (h_chunks.shape[0], H), (1 if cu is None else cu.shape[0] - 1, T)
    o, x, x_scale, phi = out
    common = shared_options(H, k, cu, C) | {"HAS_BETA": beta is not None}
    with on_device(q):
        wrap_triton(chunk_solve_kernel)[grid](
            *(q, k, *present(q, gk, beta), h_chunks, state_scales, *present(q, cu), x, x_scale, phi, *sizes),
            K=K,
            BK=block(K),
            **polynomial(ridge_ratio, num_iter),
            HAS_GK=gk is not None,
            **common,
            **settings("chunk_solve", q, K),
        )
        wrap_triton(chunk_read_kernel)[grid](
            *(q, k, v, *present(q, g, alpha, beta), u_chunks, state_scales, x, x_scale, *present(q, cu), o, *sizes),
            SCALE=scale,
            K=K,
            V=V,
            BK=block(K),
            BV=block(V),
            HAS_G=g is not None,
            HAS_ALPHA=alpha is not None,
            **common,
            **settings("chunk_read", q, K, V),
        )


@triton.jit
def chunk_read_bwd_kernel(
    do_ptr,  # [rows, H, V]
    q_ptr,  # [rows, H, K]
    k_ptr,  # [rows, Hk, K]
    v_ptr,  # [rows, Hk, V]
    g_ptr,  # [rows, H]
    beta_ptr,  # [rows, H]
    u_chunks_ptr,  # [S, H, K, V]
    scales_ptr,  # [S, H, 2]
    x_ptr,  # [rows, H, K]
    x_scale_ptr,  # [rows, H]
    cu_ptr,  # [N + 1]
    dm_ptr,  # [rows, H, K]
    dm_scale_ptr,  # [rows, H]
    dalpha_ptr,  # [rows, H]
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
    PACKED: tl.constexpr,
):
    """Grid (slots, heads). dm = scale · U do, dα = dm·(x − q)."""
    slot = tl.program_id(0)
    head = tl.program_id(1)
    if PACKED:
        first, end = packed_rows(slot, cu_ptr, N, C)
    else:
        first, end = dense_rows(slot, T, C)
    matrix = slot.to(tl.int64) * H + head
    do = load_tile(do_ptr, first, end, H, head, 0, V, C, BV)
    v = load_tile(v_ptr, first, end, Hk, head // (H // Hk), 0, V, C, BV)
    k = load_tile(k_ptr, first, end, Hk, head // (H // Hk), 0, K, C, BK)
    u, u_scale = load_state(u_chunks_ptr, scales_ptr, matrix, 1, 0, K, V, BK, BV)
    beta = load_scalars(beta_ptr, first, end, H, head, C, HAS_BETA, AXIS=1)
    g = load_scalars(g_ptr, first, end, H, head, C, HAS_G, AXIS=1)
    if HAS_ALPHA:
        x_scale = load_scalars(x_scale_ptr, first, end, H, head, C, True, AXIS=1)
    do, do_scale = unit_rows(do.to(tl.float32))
    v, v_scale = unit_rows(v.to(tl.float32))
    k, key_scale = unit_rows(k.to(tl.float32))
    beta = scalars(beta, 1.0, C, HAS_BETA, AXIS=1)
    key_scale *= beta
    v_scale *= beta
    c = decay_exponents(scalars(g, 0.0, C, HAS_G, AXIS=1))
    dm = product(do, tl.trans(u), OPERAND) * (tl.exp2(c) * u_scale)[:, None]
    weight, weight_scale = decay_weights(c, key_scale * v_scale, C)
    dm += product(product(do, tl.trans(v), OPERAND) * weight, k, OPERAND) * weight_scale[:, None]
    if HAS_ALPHA:  # these two as soon as registers are free
        x = load_tile(x_ptr, first, end, H, head, 0, K, C, BK)
        q = load_tile(q_ptr, first, end, H, head, 0, K, C, BK)
    dm, dm_scale = unit_rows(dm)
    dm_scale *= do_scale * SCALE
    store_rows(dm_ptr, dm, first, end, H, head, K, C, BK)
    store_scalars(dm_scale_ptr, dm_scale, first, end, H, head, C)
    if HAS_ALPHA:
        dmx = scalars(x_scale, 0.0, C, True, AXIS=1) * tl.sum(dm * x.to(tl.float32), 1)
        store_scalars(dalpha_ptr, dm_scale * (dmx - tl.sum(dm * q.to(tl.float32), 1)), first, end, H, head, C)


@triton.jit
def chunk_solve_bwd_kernel(
    k_ptr,  # [rows, Hk, K]
    gk_ptr,  # [rows, H]
    alpha_ptr,  # [rows, H]
    beta_ptr,  # [rows, H]
    h_chunks_ptr,  # [S, H, K, K]
    scales_ptr,  # [S, H, 2]
    x_ptr,  # [rows, H, K]
    x_scale_ptr,  # [rows, H]
    phi_ptr,  # [rows, H]
    cu_ptr,  # [N + 1]
    y_ptr,  # [rows, H, K]: dm on entry
    y_scale_ptr,  # [rows, H]: its factor on entry
    dq_ptr,  # [rows, H, K]
    eta_ptr,  # [rows, H]
    dgk_ptr,  # [rows, H]
    N,
    T,
    H: tl.constexpr,
    Hk: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    RIDGE_RATIO: tl.constexpr,
    NUM_ITER: tl.constexpr,
    TAU: tl.constexpr,
    FRONT: tl.constexpr,
    TAIL: tl.constexpr,
    OPERAND: tl.constexpr,
    HAS_GK: tl.constexpr,
    HAS_ALPHA: tl.constexpr,
    HAS_BETA: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Grid (slots, heads). y = (H + λI)^{-1} α dm, dq = (1 − α) dm + y, η = a (x·y)/φ.

    dgk: at each token ⟨H_t, G_t⟩ = −y·H_t x − η φ², of what it pulls out of H_t, and at each key the parts of y·H_s x that later
    tokens s read of it; grads_through_h_kernel adds the rest.
    """
    slot = tl.program_id(0)
    head = tl.program_id(1)
    if PACKED:
        first, end = packed_rows(slot, cu_ptr, N, C)
    else:
        first, end = dense_rows(slot, T, C)
    matrix = slot.to(tl.int64) * H + head
    h, h_scale = load_state(h_chunks_ptr, scales_ptr, matrix, 0, 0, K, K, BK, BK)
    k = load_tile(k_ptr, first, end, Hk, head // (H // Hk), 0, K, C, BK)
    held = load_tile(y_ptr, first, end, H, head, 0, K, C, BK)
    beta = load_scalars(beta_ptr, first, end, H, head, C, HAS_BETA, AXIS=1)
    phi = load_scalars(phi_ptr, first, end, H, head, C, True, AXIS=1)
    # before the solve: no warp may have stored y_scale yet
    dm_scale = load_scalars(y_scale_ptr, first, end, H, head, C, True, AXIS=1)
    gk = load_scalars(gk_ptr, first, end, H, head, C, HAS_GK, AXIS=1)
    alpha = load_scalars(alpha_ptr, first, end, H, head, C, HAS_ALPHA, AXIS=1)
    x_scale = load_scalars(x_scale_ptr, first, end, H, head, C, True, AXIS=1)
    k, key_scale = unit_rows(k.to(tl.float32))
    key_scale *= scalars(beta, 1.0, C, HAS_BETA, AXIS=1)
    c = decay_exponents(scalars(gk, 0.0, C, HAS_GK, AXIS=1))
    phi = scalars(phi, 0.0, C, True, AXIS=1)
    dm_scale = scalars(dm_scale, 0.0, C, True, AXIS=1)
    alpha = scalars(alpha, 1.0, C, HAS_ALPHA, AXIS=1)
    x_scale = scalars(x_scale, 0.0, C, True, AXIS=1)
    k = k.to(OPERAND)
    y = solve(held, k, key_scale, decay_mask(c, C), tl.exp2(c), h, h_scale, phi, NUM_ITER, TAU, FRONT, TAIL, OPERAND)
    y, y_scale = unit_rows(y)
    y = y.to(OPERAND)  # as it is stored
    gain = reciprocal(phi)
    y_scale *= gain * alpha * dm_scale
    store_rows(y_ptr, y, first, end, H, head, K, C, BK)
    store_scalars(y_scale_ptr, y_scale, first, end, H, head, C)
    x = load_tile(x_ptr, first, end, H, head, 0, K, C, BK)
    weight = x_scale * y_scale
    eta = RIDGE_RATIO * gain * weight * tl.sum(x.to(tl.float32) * y.to(tl.float32), 1)
    store_scalars(eta_ptr, eta, first, end, H, head, C)
    if HAS_GK:
        kt = tl.trans(k)
        pairs = product(x, kt, OPERAND) * product(y, kt, OPERAND) * decay_mask(c, C)
        pairs *= weight[:, None] * (key_scale * key_scale)[None, :]
        start = weight * tl.exp2(c) * h_scale * tl.sum(product(x, h, OPERAND) * y.to(tl.float32), 1)
        store_scalars(dgk_ptr, tl.sum(pairs, 0) - tl.sum(pairs, 1) - start - eta * phi * phi, first, end, H, head, C)
    dq = y.to(tl.float32) * y_scale[:, None]
    if HAS_ALPHA:
        dq += held.to(tl.float32) * ((1.0 - alpha) * dm_scale)[:, None]
    store_rows(dq_ptr, dq, first, end, H, head, K, C, BK)


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
    x_scale: Any,
    phi: Any,
    cu_seqlens: Any,
    scale: float,
    ridge_ratio: float,
    num_iter: int,
    C: int,
    out: Tensors,
) -> None:
    """The adjoint solve y_t = (H_t + λ_t I)^{-1} dx_t: the forward's solve again, on the cotangent.

    Fill ``out``: dq [B,T,H,K] in q's dtype, dalpha [B,T,H] (not written without alpha); for what follows y [B,T,H,K] stored,
    normalised so that y_t is ``y * y_scale``; y_scale [B,T,H]; eta [B,T,H]: η_t = a (x_t·y_t)/φ_t; dgk [B,T,H] (not
    written without gk): see chunk_solve_bwd_kernel. The inputs are as in ``ops.chunk_output`` and ``ops.chunk_bwd``.
    """
    do, q, k, v, g, gk, alpha, beta, cu = compact(do, q, k, v, g, gk, alpha, beta, cu_seqlens)
    h_chunks, u_chunks, state_scales, x, x_scale, phi = compact(h_chunks, u_chunks, state_scales, x, x_scale, phi)
    (_, T, H, K), V = q.shape, v.shape[-1]
    grid, sizes = (h_chunks.shape[0], H), (1 if cu is None else cu.shape[0] - 1, T)
    dq, dalpha, y, y_scale, eta, dgk = out
    common = shared_options(H, k, cu, C) | {"HAS_BETA": beta is not None}
    common["HAS_ALPHA"] = alpha is not None
    with on_device(q):
        wrap_triton(chunk_read_bwd_kernel)[grid](
            *(do, q, k, v, *present(q, g, beta), u_chunks, state_scales, x, x_scale, *present(q, cu)),
            *(y, y_scale, dalpha, *sizes),
            SCALE=scale,
            K=K,
            V=V,
            BK=block(K),
            BV=block(V),
            HAS_G=g is not None,
            **common,
            **settings("chunk_read_bwd", q, K, V),
        )
        wrap_triton(chunk_solve_bwd_kernel)[grid](
            *(k, *present(q, gk, alpha, beta), h_chunks, state_scales, x, x_scale, phi, *present(q, cu)),
            *(y, y_scale, dq, eta, dgk, *sizes),
            K=K,
            BK=block(K),
            RIDGE_RATIO=ridge_ratio,
            **polynomial(ridge_ratio, num_iter),
            HAS_GK=gk is not None,
            **common,
            **settings("chunk_solve_bwd", q, K),
        )
