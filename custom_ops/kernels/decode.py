"""step and step_: one token of every sequence, states updated on the way through."""

from typing import Any

import triton
import triton.language as tl

from .. import config
from .launch import Tensors, block, compact, on_device, polynomial, present, settings, wrap_triton
from .tile import LEAST_SQUARE, reciprocal

__all__ = ["launch_step", "step_kernel"]


@triton.jit
def scalar(ptr, place, absent: tl.constexpr, HAS: tl.constexpr):
    if HAS:
        return tl.load(ptr + place).to(tl.float32)
    else:
        return absent


@triton.jit
def product(z, t, BK: tl.constexpr, PARTS: tl.constexpr):
    """z t [BK] for z [BK, PARTS, BK/PARTS]: a thread adds up its row in as many sums side by side."""
    return tl.sum(tl.sum(z * tl.reshape(t, (1, PARTS, BK // PARTS)), 2), 1)


@triton.jit
def finish_columns(u, g, k, v, m, u_out_ptr, o_ptr, inside, place, column, E, SCALE: tl.constexpr, HAS_G: tl.constexpr):
    """Store columns of the new U, where ``inside``, and the E of them that there are of what is read from it."""
    if HAS_G:
        u *= tl.exp(g)
    u += k[:, None] * v[None, :]
    tl.store(u_out_ptr + place, u, mask=inside)
    o = SCALE * tl.sum(u * m[:, None], 0)
    tl.store(o_ptr + column, o.to(o_ptr.dtype.element_ty), mask=column < E)


@triton.jit
def step_kernel(
    q_ptr,  # [B, H, K]
    k_ptr,  # [B, Hk, K]
    v_ptr,  # [B, Hk, V]
    h_ptr,  # [B, H, K, K]
    u_ptr,  # [B, H, K, V]
    g_ptr,  # [B, H]
    gk_ptr,  # [B, H]
    alpha_ptr,  # [B, H]
    beta_ptr,  # [B, H]
    o_ptr,  # [B, H, V]
    h_out_ptr,  # [B, H, K, K], may be h_ptr
    u_out_ptr,  # [B, H, K, V], may be u_ptr
    H: tl.constexpr,
    Hk: tl.constexpr,
    SCALE: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BU: tl.constexpr,
    PARTS: tl.constexpr,
    NUM_ITER: tl.constexpr,
    TAU: tl.constexpr,
    FRONT: tl.constexpr,
    TAIL: tl.constexpr,
    HAS_G: tl.constexpr,
    HAS_GK: tl.constexpr,
    HAS_ALPHA: tl.constexpr,
    HAS_BETA: tl.constexpr,
):
    """Grid (B · H). H stays in registers through all iterations: a thread holds a row, and shares t with the others.

    The first BU columns of U come in while the iterations run; the rest, when H's registers are free.

    With as many threads as rows, loads and stores of 4 bytes give it that row alone, and H, being symmetric, is read by columns,
    so that a warp's addresses follow one another. That is what max_contiguous is for: with the 16 bytes that are there to be had,
    a row would lie across a warp. (As a product, tl.dot, each iteration reads all of H from shared memory.)
    """
    pid = tl.program_id(0).to(tl.int64)
    b = pid // H
    head = pid % H
    kv_place = b * Hk + head // (H // Hk)
    row = tl.arange(0, BK)
    k = tl.load(k_ptr + kv_place * K + row, mask=row < K, other=0.0)
    q = tl.load(q_ptr + pid * K + row, mask=row < K, other=0.0)

    place = tl.max_contiguous(row[None, :] * K + row[:, None], [1, 1])
    inside = (row[:, None] < K) & (row[None, :] < K)
    h = tl.load(h_ptr + pid * (K * K) + place, mask=inside, other=0.0)
    column = tl.arange(0, BU)
    u_place = pid * (K * V) + row[:, None] * V + column[None, :]  # of later columns: behind it, at no other addresses to be held
    u_inside = (row[:, None] < K) & (column[None, :] < V)
    u = tl.load(u_ptr + u_place, mask=u_inside, other=0.0)
    v = tl.load(v_ptr + kv_place * V + column, mask=column < V, other=0.0)
    if BU < BV:
        later_inside = (row[:, None] < K) & (column[None, :] < V - BU)
        later_v = tl.load(v_ptr + BU + kv_place * V + column, mask=column < V - BU, other=0.0)
    g = scalar(g_ptr, pid, 0.0, HAS_G)
    alpha = scalar(alpha_ptr, pid, 1.0, HAS_ALPHA)
    # only now is any of it used: a vector takes another layout by way of shared memory and barriers, behind which loads would wait
    q = q.to(tl.float32)
    beta = scalar(beta_ptr, pid, 1.0, HAS_BETA)
    k = k.to(tl.float32) * beta
    v = v.to(tl.float32) * beta
    if BU < BV:
        later_v = later_v.to(tl.float32) * beta
    if HAS_GK:
        h *= tl.exp(scalar(gk_ptr, pid, 0.0, HAS_GK))
    h += k[:, None] * k[None, :]
    tl.store(h_out_ptr + pid * (K * K) + place, h, mask=inside)
    square = tl.sum(tl.sum(h * h, 1), 0)
    phi = tl.sqrt(tl.where(square < LEAST_SQUARE, 0.0, square))
    gain = reciprocal(phi)
    z2 = h * (4.0 * gain) - tl.where(row[:, None] == row[None, :], 2.0, 0.0)  # 2 Z
    z2 = tl.reshape(z2, (BK, PARTS, BK // PARTS))

    previous = q
    t = 0.5 * product(z2, previous, BK, PARTS)
    power = -TAU
    tail = -TAIL / TAU
    x = FRONT * (1.0 - TAIL) * previous + 2.0 * FRONT * (power - tail) * t
    for _ in range(NUM_ITER - 1):
        new = product(z2, t, BK, PARTS) - previous
        previous = t
        t = new
        power *= -TAU
        tail *= -1.0 / TAU
        x += 2.0 * FRONT * (power - tail) * t
    if BU < BV:
        later_u = tl.load(u_ptr + BU + u_place, mask=later_inside, other=0.0)
    x *= gain
    m = x
    if HAS_ALPHA:
        m = q + alpha * (x - q)
    o_ptr += pid * V
    finish_columns(u, g, k, v, m, u_out_ptr, o_ptr, u_inside, u_place, column, V, SCALE, HAS_G)
    if BU < BV:
        finish_columns(later_u, g, k, later_v, m, u_out_ptr + BU, o_ptr + BU, later_inside, u_place, column, V - BU, SCALE, HAS_G)


def constants(q: Any, v: Any, g: Any, gk: Any, alpha: Any, beta: Any, scale: float, ridge: float, num_iter: int) -> dict[str, Any]:
    (_, H, K), (Hk, V) = q.shape, v.shape[1:]
    return {
        "H": H,
        "Hk": Hk,
        "SCALE": scale,
        "K": K,
        "V": V,
        "BK": block(K),
        "BV": block(V),
        "BU": min(config.STEP_COLUMNS, block(V)),
        "PARTS": max(1, block(K) // 32),
        **polynomial(ridge, num_iter),
        "HAS_G": g is not None,
        "HAS_GK": gk is not None,
        "HAS_ALPHA": alpha is not None,
        "HAS_BETA": beta is not None,
    }


def launch_step(
    q: Any,
    k: Any,
    v: Any,
    h: Any,
    u: Any,
    g: Any,
    gk: Any,
    alpha: Any,
    beta: Any,
    scale: float,
    ridge_ratio: float,
    num_iter: int,
    out: Tensors,
) -> None:
    """Fill ``out`` = (o, h, u) as ``ops.step`` describes; the last two may be the inputs."""
    q, k, v, h, u, g, gk, alpha, beta = compact(q, k, v, h, u, g, gk, alpha, beta)
    B, H, K = q.shape
    with on_device(q):
        wrap_triton(step_kernel)[(B * H,)](
            *(q, k, v, h, u, *present(q, g, gk, alpha, beta), *out),
            **constants(q, v, g, gk, alpha, beta, scale, ridge_ratio, num_iter),
            **settings("step", h, K),
        )
