"""chunk_state: the states before every chunk and after the last."""

from typing import Any

import triton
import triton.language as tl
from torch.library import wrap_triton

from .. import config
from .launch import Tensors, block, compact, on_device, operand, present, settings
from .tile import (
    largest_entry,
    last,
    load_row_block,
    load_rows,
    load_scalars,
    outer_sum,
    reciprocal,
    store_state,
    unit_rows,
    unit_scale,
)

__all__ = ["chunk_state_kernel", "launch_chunk_state"]


@triton.jit
def scan_block(
    k_ptr,
    w_ptr,  # k for columns of H, v for columns of U
    decay_ptr,  # gk or g
    beta_ptr,
    start_ptr,  # [N, H, K, E] initial state
    chunks_ptr,  # [S, H, K, E]
    scales_ptr,  # [S, H, 2]
    final_ptr,  # [N, H, K, E]
    n,
    h,
    begin,
    end,
    first_slot,
    first_column,
    H: tl.constexpr,
    Hk: tl.constexpr,
    WHICH: tl.constexpr,  # 0: H, 1: U
    K: tl.constexpr,
    E: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BW: tl.constexpr,  # block of E
    BE: tl.constexpr,
    OPERAND: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    HAS_BETA: tl.constexpr,
    HAS_START: tl.constexpr,
):
    """Columns first_column … + BE of one state over one sequence; the state stays in registers in float32.

    It is stored divided by a power of two near a bound of its entries, which grows with the tokens: no program needs to see the
    columns of the others, nor to search its own.
    """
    row = tl.arange(0, BK)[:, None]
    column = first_column + tl.arange(0, BE)[None, :]
    inside = (row < K) & (column < E)
    place = (n.to(tl.int64) * H + h) * (K * E) + row * E + column
    if HAS_START:
        state = tl.load(start_ptr + place, mask=inside, other=0.0)
        bound = largest_entry(start_ptr, n.to(tl.int64) * H + h, K, E, BK, BW)
    else:
        state = tl.zeros((BK, BE), tl.float32)
        bound = tl.full((), 0.0, tl.float32)
    head = h // (H // Hk)
    for i in range(tl.cdiv(end - begin, C)):
        first = begin + i * C
        matrix = (first_slot + i).to(tl.int64) * H + h
        store_state(chunks_ptr, scales_ptr, state, bound, matrix, WHICH, first_column, K, E, BK, BE)
        c = tl.cumsum(load_scalars(decay_ptr, first, end, H, h, 0.0, C, HAS_DECAY), 0)
        beta = load_scalars(beta_ptr, first, end, H, h, 1.0, C, HAS_BETA)
        total = last(c, C)
        k, k_unit = unit_rows(load_rows(k_ptr, first, end, Hk, head, K, C, BK))
        w = load_row_block(w_ptr, first, end, Hk, head, first_column, E, C, BE)
        w_unit = k_unit
        if WHICH == 1:
            w_unit = unit_scale(tl.max(tl.abs(load_rows(w_ptr, first, end, Hk, head, E, C, BW)), 1))
        weight = tl.exp(total - c) * beta * beta * k_unit * w_unit
        state = tl.exp(total) * state + outer_sum(k, w * reciprocal(w_unit)[:, None], weight, True, OPERAND)
        bound = tl.exp(total) * bound + 4.0 * tl.sum(weight, 0)
    tl.store(final_ptr + place, state, mask=inside)


@triton.jit
def chunk_state_kernel(
    k_ptr,  # [rows, Hk, K]
    v_ptr,  # [rows, Hk, V]
    g_ptr,  # [rows, H]
    gk_ptr,  # [rows, H]
    beta_ptr,  # [rows, H]
    h0_ptr,  # [N, H, K, K]
    u0_ptr,  # [N, H, K, V]
    cu_ptr,  # [N + 1]
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
    OPERAND: tl.constexpr,
    HAS_G: tl.constexpr,
    HAS_GK: tl.constexpr,
    HAS_BETA: tl.constexpr,
    HAS_H0: tl.constexpr,
    HAS_U0: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Grid (column blocks of H, then of U; heads; sequences)."""
    block = tl.program_id(0)
    h = tl.program_id(1)
    n = tl.program_id(2)
    if PACKED:
        begin = tl.load(cu_ptr + n).to(tl.int64)
        end = tl.load(cu_ptr + n + 1).to(tl.int64)
        first_slot = begin // C + n
    else:
        begin = n.to(tl.int64) * T
        end = begin + T
        first_slot = n * tl.cdiv(T, C)
    h_blocks: tl.constexpr = (K + BE - 1) // BE
    # fmt: off
    if block < h_blocks:
        scan_block(
            k_ptr, k_ptr, gk_ptr, beta_ptr, h0_ptr, h_chunks_ptr, scales_ptr, h_out_ptr,
            n, h, begin, end, first_slot, block * BE, H, Hk, 0, K, K, C, BK, BK, BE, OPERAND, HAS_GK, HAS_BETA, HAS_H0,
        )
    else:
        scan_block(
            k_ptr, v_ptr, g_ptr, beta_ptr, u0_ptr, u_chunks_ptr, scales_ptr, u_out_ptr,
            n, h, begin, end, first_slot, (block - h_blocks) * BE, H, Hk, 1, K, V, C, BK, BV, BE, OPERAND, HAS_G, HAS_BETA, HAS_U0,
        )
    # fmt: on


def launch_chunk_state(
    k: Any, v: Any, g: Any, gk: Any, beta: Any, h0: Any, u0: Any, cu_seqlens: Any, H: int, C: int, out: Tensors
) -> None:
    """Fill ``out`` as ``ops.chunk_state`` describes."""
    k, v, g, gk, beta, h0, u0, cu = compact(k, v, g, gk, beta, h0, u0, cu_seqlens)
    B, T, Hk, K = k.shape
    V, N = v.shape[-1], B if cu is None else cu.shape[0] - 1
    BE = min(config.STATE_COLUMNS, block(K), block(V))
    grid = (triton.cdiv(K, BE) + triton.cdiv(V, BE), H, N)
    with on_device(k):
        wrap_triton(chunk_state_kernel)[grid](
            *(k, v, *present(k, g, gk, beta, h0, u0, cu), *out, T),
            H=H,
            Hk=Hk,
            K=K,
            V=V,
            C=C,
            BK=block(K),
            BV=block(V),
            BE=BE,
            OPERAND=operand(k.dtype),
            HAS_G=g is not None,
            HAS_GK=gk is not None,
            HAS_BETA=beta is not None,
            HAS_H0=h0 is not None,
            HAS_U0=u0 is not None,
            PACKED=cu is not None,
            **settings("chunk_state", k, K, V),
        )
