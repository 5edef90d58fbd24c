"""FLOP formulas of the ops for ``torch.utils.flop_counter``: multiply-adds of the matrix products count as two."""

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

__all__: list[str] = []

gka = torch.ops.gka


def _tokens(shape: Any) -> int:
    return int(shape[0] * shape[1])


def _solve(tokens: int, H: int, K: int, C: int, num_iter: int) -> int:
    """N applications of H_t: one product with H_c, two with the keys of the chunk."""
    return 2 * tokens * H * num_iter * (K * K + 2 * C * K)


def _read(tokens: int, H: int, K: int, V: int, C: int) -> int:
    """U_tᵀ m_t, or U_t do_t."""
    return 2 * tokens * H * (K * V + C * (K + V))


@register_flop_formula([gka.chunk_state, gka.chunk_state_cpu])
def _chunk_state(k: Any, v: Any, g: Any, gk: Any, beta: Any, h0: Any, u0: Any, cu: Any, H: int, C: int, **_: Any) -> int:
    return 2 * _tokens(k) * H * k[-1] * (k[-1] + v[-1])


@register_flop_formula([gka.chunk_output, gka.chunk_output_cpu])
def _chunk_output(q: Any, k: Any, v: Any, *args: Any, **_: Any) -> int:
    num_iter, C = args[-2:]
    (H, K), V, tokens = q[2:], v[-1], _tokens(q)
    phi = 2 * tokens * H * (K * K + C * K + C * C)
    return phi + _solve(tokens, H, K, C, num_iter) + _read(tokens, H, K, V, C)


@register_flop_formula([gka.chunk_bwd, gka.chunk_bwd_cpu])
def _chunk_bwd(k: Any, v: Any, *args: Any, **_: Any) -> int:
    g, gk, do, (num_iter, H, C) = *args[:2], args[5], args[-3:]
    K, V, tokens = k[-1], v[-1], _tokens(k)
    if do is None:  # cotangents of the final states alone
        return 2 * tokens * H * (K * (K + V) + K * K + 2 * K * V)
    states = tokens * H * (K * (K + V) + K * (2 * K + V))
    gradients = tokens * H * (2 * K * K + 2 * K * V + C * (6 * K + 2 * (K + V) + C))
    if g is not None:  # Uᵀm of the states
        gradients += tokens * H * K * V
    if gk is not None:  # y_tᵀ H_t x_t
        gradients += tokens * H * (K * K + 2 * C * K)
    return _solve(tokens, H, K, C, num_iter) + _read(tokens, H, K, V, C) + 2 * (states + gradients)


@register_flop_formula([gka.step, gka.step_cpu, gka.step_, gka.step__cpu])
def _step(q: Any, k: Any, v: Any, *args: Any, **_: Any) -> int:
    num_iter = args[-1]
    (B, H, K), V = q, v[-1]
    return 2 * B * H * (num_iter * K * K + K * V)
