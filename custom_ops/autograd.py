"""Autograd of the ops, registered at import; every backward calls registered ops only.

A forward is two ops, and what comes between them, the chunk states, is as large as q, k, v and o together.  So no cotangent ever
flows *through* the chunk states.  ``chunk_output`` takes everything that they were made from as arguments, its backward returns
the full gradient for all of those, and the chunk states are rebuilt, piece by piece, instead of kept.  ``chunk_state`` answers for
its final states only.  Both gradients are linear in their cotangents, so autograd's sum of the two is the gradient of the whole,
and a training step that does not differentiate the final states pays for one.

The gradient is that of the exact solve, with the forward's polynomial for both solves (docs/design.md).
"""

from typing import Any

from torch import Tensor

from . import ops
from .pieces import piece_starts

__all__: list[str] = []


def _as_input(grad: Tensor, like: Tensor | None) -> Tensor | None:
    return None if like is None else grad.to(like.dtype)


def _starts(k: Tensor, *args: Any) -> tuple[Tensor | None, ...]:
    return piece_starts(k, *args) if ops.runs_kernels(k) else (None, None, None)


def _chunk_state_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.num_heads, ctx.chunk_size = inputs
    ctx.save_for_backward(*tensors, *_starts(tensors[0], tensors[1], tensors[-1], *inputs[-2:], output[:3]))
    ctx.mark_non_differentiable(*output[:3])
    ctx.set_materialize_grads(False)


def _chunk_state_backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    k, v, g, gk, beta, h0, u0, cu_seqlens, *starts = ctx.saved_tensors
    dh_out, du_out = cotangents[3:]
    if dh_out is None and du_out is None:
        return (None,) * 10
    _, dk, dv, dg, dgk, _, dbeta, dh0, du0 = ops.chunk_bwd(
        *(k, v, g, gk, beta, h0, u0, *(None,) * 6, dh_out, du_out, *starts, cu_seqlens),
        *(1.0, 1.0, 1, ctx.num_heads, ctx.chunk_size),  # there is nothing to solve
    )
    return (
        *(dk, dv, _as_input(dg, g), _as_input(dgk, gk), _as_input(dbeta, beta)),
        *(_as_input(dh0, h0), _as_input(du0, u0), None, None, None),
    )


ops.chunk_state.register_autograd(_chunk_state_backward, setup_context=_chunk_state_setup)


def _chunk_output_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, g, gk, alpha, beta, h0, u0, *states, cu_seqlens, _, _, _, chunk_size = inputs
    _, *solved = output
    starts = _starts(k, v, cu_seqlens, q.shape[2], chunk_size, states)
    ctx.save_for_backward(k, v, g, gk, beta, h0, u0, q, alpha, *solved, *starts, cu_seqlens)
    ctx.parameters = (*inputs[-4:-1], q.shape[2], chunk_size)
    ctx.mark_non_differentiable(*solved)
    ctx.set_materialize_grads(False)


def _chunk_output_backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    k, v, g, gk, beta, h0, u0, q, alpha, x, x_scale, phi, *starts, cu_seqlens = ctx.saved_tensors
    do = cotangents[0]
    if do is None:
        return (None,) * 17
    dq, dk, dv, dg, dgk, dalpha, dbeta, dh0, du0 = ops.chunk_bwd(
        *(k, v, g, gk, beta, h0, u0, do, q, alpha, x, x_scale, phi, None, None, *starts, cu_seqlens, *ctx.parameters)
    )
    return (
        *(dq, dk, dv, _as_input(dg, g), _as_input(dgk, gk), _as_input(dalpha, alpha), _as_input(dbeta, beta)),
        *(_as_input(dh0, h0), _as_input(du0, u0), *(None,) * 8),
    )


ops.chunk_output.register_autograd(_chunk_output_backward, setup_context=_chunk_output_setup)


STEP_CHUNK = 16  # the backward of a step is that of a sequence of one token; the smallest chunk wastes least


def _step_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.scale, ctx.ridge_ratio, ctx.num_iter = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _step_backward(ctx: Any, do: Tensor | None, dh: Tensor | None, du: Tensor | None) -> tuple[Tensor | None, ...]:
    def with_time(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.unsqueeze(1)

    (*per_token,) = ctx.saved_tensors
    h, u = per_token[3:5]
    q, k, v, g, gk, alpha, beta = (with_time(t) for t in per_token[:3] + per_token[5:])
    assert q is not None and k is not None and v is not None
    parameters, sizes = (ctx.scale, ctx.ridge_ratio, ctx.num_iter), (q.shape[2], STEP_CHUNK)
    read: tuple[Tensor | None, ...] = (None,) * 6
    if do is not None:  # chunk_bwd computes the states again: for one token that is little
        *states, _, _ = ops.chunk_state(k, v, g, gk, beta, h, u, None, *sizes)
        _, *solved = ops.chunk_output(q, k, v, g, gk, alpha, beta, h, u, *states, None, *parameters, STEP_CHUNK)
        read = (do.unsqueeze(1), q, alpha, *solved)
    dq, dk, dv, dg, dgk, dalpha, dbeta, dh0, du0 = ops.chunk_bwd(
        k, v, g, gk, beta, h, u, *read, dh, du, *(None,) * 4, *parameters, *sizes
    )

    def without_time(grad: Tensor, like: Tensor | None) -> Tensor | None:
        return None if like is None or grad.dim() == 1 else grad.squeeze(1).to(like.dtype)

    return (
        *(without_time(dq, q), without_time(dk, k), without_time(dv, v), dh0, du0),
        *(without_time(dg, g), without_time(dgk, gk), without_time(dalpha, alpha), without_time(dbeta, beta)),
        *(None, None, None),
    )


ops.step.register_autograd(_step_backward, setup_context=_step_setup)
