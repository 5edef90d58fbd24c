"""The functional API: validate, call the ops, return a NamedTuple."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .custom_ops import ahead, config, ops, pieces, plans, polynomial
from .validation import check_chunk, check_ridge_ratio, check_step, check_tolerance

__all__ = ["GKAState", "chunk_gka", "num_iter_for", "step_gka", "under_autocast"]


class GKAState(NamedTuple):
    """The recurrent state of N sequences, float32 (float64 beside float64 inputs)."""

    h_kk: Tensor
    """H [N, H, K, K]: decayed sum of k̂k̂ᵀ, symmetric positive semi-definite."""
    h_kv: Tensor
    """U [N, H, K, V]: decayed sum of k̂v̂ᵀ."""


def under_autocast(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether tensors of ``dtype`` on ``device`` follow autocast now."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type) and dtype != torch.float64  # meta has no autocast


def _autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under autocast q, k and v follow it; decays and states keep their precision."""
    if under_autocast(q.device, q.dtype):
        dtype = torch.get_autocast_dtype(q.device.type)
        return q.to(dtype), k.to(dtype), v.to(dtype)
    return q, k, v


def _refuse_tangents(tensors: tuple[Any, ...]) -> None:
    """Forward-mode AD takes the ops for constants: what came out would be wrong without a word."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    for x in tensors:
        if not isinstance(x, Tensor):
            continue
        try:
            tangent = forward_ad.unpack_dual(x).tangent is not None
        except RuntimeError:  # of another transform's kind, which does not say
            tangent = True
        if tangent:
            raise NotImplementedError("forward-mode AD (torch.func.jvp, jacfwd) goes through no op of gka_compile: use autograd")


def _chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    gk: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    h0: Tensor | None,
    u0: Tensor | None,
    cu_seqlens: Tensor | None,
    num_heads: int,
    chunk_size: int,
    scale: float,
    ridge_ratio: float,
    num_iter: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The ops of :func:`chunk_gka`: (o, h_out, u_out)."""
    *states, h_out, u_out = ops.chunk_state(k, v, g, gk, beta, h0, u0, cu_seqlens, num_heads, chunk_size)
    o, *_ = ops.chunk_output(q, k, v, g, gk, alpha, beta, h0, u0, *states, cu_seqlens, scale, ridge_ratio, num_iter, chunk_size)
    return o, h_out, u_out


def _pair(state: Any) -> tuple[Any, Any]:
    """h and u of what may be no state at all; :mod:`.validation` says so."""
    return state if isinstance(state, (tuple, list)) and len(state) == 2 else (None, None)  # type: ignore[return-value]


def chunk_gka(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    alpha: Tensor | None = None,
    scale: float | None = None,
    ridge_ratio: float = config.RIDGE_RATIO,
    num_iter: int = config.NUM_ITER,
    initial_state: GKAState | tuple[Tensor, Tensor] | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    beta: Tensor | None = None,
) -> tuple[Tensor, GKAState | None]:
    """Gated KalmaNet over whole sequences (arXiv 2511.21016), linear in T.

        H_t = exp(gk_t) H_{t-1} + β_t² k_t k_tᵀ          U_t = exp(g_t) U_{t-1} + β_t² k_t v_tᵀ
        x_t ≈ (H_t + a‖H_t‖_F I)^{-1} q_t                 by ``num_iter`` Chebyshev iterations
        o_t = scale · U_tᵀ (q_t + α_t (x_t − q_t))

    Args:
        q: queries [B, T, H, K]; float32, float16 or bfloat16, float64 on the CPU. K is a multiple of 8, at most 128.
        k: keys [B, T, Hk, K]; Hk divides H, and key head j serves query heads j·H/Hk to (j+1)·H/Hk − 1.
        v: values [B, T, Hk, V]; V is a multiple of 8, at most 128. k and v have q's dtype.
        g: natural-log decay of U, at most 0 [B, T, H], float32 or q's dtype. None: U does not decay.
        gk: natural-log decay of H, likewise. None: H does not decay.
        alpha: how much of the solution replaces the query [B, T, H]. None: all of it (m = x).
        scale: factor of the output. None: K^{-1/2}.
        ridge_ratio: a, the ridge λ_t as a ratio of ‖H_t‖_F (not λ itself), from 1e-10 to 1e10.
        num_iter: Chebyshev iterations, at least 1.
        initial_state: (h_kk [N, H, K, K], h_kv [N, H, K, V]), h_kk symmetric positive semi-definite; N is B, or the number of
            packed sequences. float32 (float64 beside float64). None: zeros.
        output_final_state: return the state after the last token.
        cu_seqlens: bounds [N + 1] of sequences packed along T, int32 or int64, from 0 to T; then B = 1. States start anew
            (from initial_state) at each bound.
        beta: factor of both k and v [B, T, H]. None: 1.

    Returns:
        o [B, T, H, V] in q's dtype, and the final :class:`GKAState`, or None.

    Everything but cu_seqlens is differentiable, and so are both final states; the gradient is that of the exact solve. For
    initial_state's h_kk it is the symmetric part, for no other part is defined.

    A token with k = v = 0 and g = gk = 0 (padding) leaves the state as it was; where H_t = 0, x_t = 0.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        NotImplementedError: a tangent of forward-mode AD.
    """
    given = (q, k, v, g, gk, alpha, beta, *_pair(initial_state), cu_seqlens)
    options = (scale, ridge_ratio, num_iter, initial_state is None, bool(output_final_state))
    if (done := plans.repeat(chunk_gka, given, 3, options)) is not None:
        return done[0], GKAState(*done[1:]) if output_final_state else None
    _refuse_tangents(given)
    gates = {"g": g, "gk": gk, "alpha": alpha, "beta": beta}
    check_chunk(q, k, v, gates, scale, ridge_ratio, num_iter, initial_state, cu_seqlens)
    q, k, v = _autocast(q, k, v)
    (_, T, H, K), V = q.shape, v.shape[3]
    h0, u0 = (None, None) if initial_state is None else initial_state
    C = config.chunk_size(q.device, q.dtype.itemsize, K, V)
    scale = K**-0.5 if scale is None else float(scale)
    tensors = (q, k, v, g, gk, alpha, beta, h0, u0, cu_seqlens)
    constants = (H, C, scale, float(ridge_ratio), num_iter)
    if not torch.compiler.is_compiling():
        sizes = (T, *pieces.piece_lengths(k, v, H, C)) if cu_seqlens is None else (T, cu_seqlens.shape[0] - 1)
        ahead.compile_ahead(_chunk, tensors, constants, (k.shape[2], K, V), sizes)
    wanted = 3 if output_final_state else 1
    o, *state = plans.run(chunk_gka, tensors, 3, options, lambda *tensors: _chunk(*tensors, *constants)[:wanted])  # type: ignore[call-arg]
    return o, GKAState(*state) if output_final_state else None


def step_gka(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: GKAState | tuple[Tensor, Tensor],
    g: Tensor | None = None,
    gk: Tensor | None = None,
    alpha: Tensor | None = None,
    scale: float | None = None,
    ridge_ratio: float = config.RIDGE_RATIO,
    num_iter: int = config.NUM_ITER,
    *,
    beta: Tensor | None = None,
    inplace: bool = False,
) -> tuple[Tensor, GKAState]:
    """One token of :func:`chunk_gka` for each of B sequences: the same function, the same polynomial.

    Args:
        q [B, H, K], k [B, Hk, K], v [B, Hk, V]; g, gk, alpha, beta [B, H] or None: as in :func:`chunk_gka`, without T.
        state: (h_kk [B, H, K, K], h_kv [B, H, K, V]), float32 (float64 beside float64).
        inplace: update the tensors of ``state`` instead of allocating new ones; not differentiable.

    Returns:
        o [B, H, V] in q's dtype, and the new :class:`GKAState` (the given tensors where ``inplace``).

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        NotImplementedError: a tangent of forward-mode AD.
    """
    before = _pair(state)
    options = (scale, ridge_ratio, num_iter, bool(inplace))
    given = (q, k, v, *before, g, gk, alpha, beta)
    done = plans.repeat(step_gka, given, 5, options, before if inplace else ())
    if done is not None:
        return done[0], GKAState(*(before if inplace else done[1:]))
    _refuse_tangents(given)
    gates = {"g": g, "gk": gk, "alpha": alpha, "beta": beta}
    check_step(q, k, v, state, gates, scale, ridge_ratio, num_iter)
    q, k, v = _autocast(q, k, v)
    h, u = state
    constants = (q.shape[-1] ** -0.5 if scale is None else float(scale), float(ridge_ratio), num_iter)
    tensors = (q, k, v, h, u, g, gk, alpha, beta)
    if not inplace:
        o, h, u = plans.run(step_gka, tensors, 5, options, lambda *tensors: ops.step(*tensors, *constants))
        return o, GKAState(h, u)
    if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in tensors):
        raise ValueError(
            "inplace: expected no argument that requires grad, got one that does: use torch.no_grad() or inplace=False"
        )
    if h is u:
        raise ValueError("state: expected two tensors to update in place, got one for both")
    for name, x in (("state.h_kk", h), ("state.h_kv", u)):
        if not x.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor to update in place, got strides {x.stride()}")
    (o,) = plans.run(step_gka, tensors, 5, options, lambda *tensors: (ops.step_(*tensors, *constants),), (h, u))
    return o, GKAState(h, u)


def num_iter_for(tolerance: float, ridge_ratio: float = config.RIDGE_RATIO) -> int:
    """The fewest Chebyshev iterations that solve to a relative error of ``tolerance``, whatever H_t and q_t are.

    After N of them every component of the error x − x* along an eigenvector of H_t, as of the residual, is at most

        1/T_{N+1}(1 + 2a) = 2 τ^{N+1} / (1 + τ^{2(N+1)}),   τ = exp(−arccosh(1 + 2a)),

    times the solution's (the query's). All that this needs is 0 ≤ H_t ≤ ‖H_t‖_F, which holds for every H_t, and fewer would not
    do: an H_t of rank one attains the bound. It is a bound of the truncation alone; the rounding of the dtypes comes on top.
    The backward's solve, of dq, has the same.

    Args:
        tolerance: between 0 and 1, without them.
        ridge_ratio: as given to :func:`chunk_gka` or :func:`step_gka`.

    Returns:
        ``num_iter`` for them: 18 for 1e-2, 26 for 1e-3 at the default ridge ratio, where 30 keep 3.21e-4.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    check_tolerance(tolerance)
    check_ridge_ratio(ridge_ratio)
    decline = math.log1p(math.sqrt((1 - tolerance) * (1 + tolerance))) - math.log(tolerance)  # arccosh(1/tolerance)
    return max(1, math.ceil(decline / polynomial.chebyshev_rate(ridge_ratio)) - 1)
