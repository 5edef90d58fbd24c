"""The ops of the ``gka`` namespace, registered when this module is imported.

Each op is one to three kernel launches, ``chunk_bwd`` up to nine for each of its pieces:

    chunk_state       (k, v, decays, initial state)      → states before every chunk, final state
    chunk_output      (q, k, v, decays, alpha, states)   → o, and the solve's by-products that the backward reuses
    chunk_bwd         (the above, cotangents)            → gradients of all of it
    step, step_       one token: functional, and in place on the states

An op is a ``torch.library.triton_op``: ``torch.export`` keeps it as one node, and Inductor and AOTInductor open it, so that its
Triton kernel ends up inside the compiled artifact.  On CPU tensors the body calls its twin ``<name>_cpu``, an opaque op that runs
:mod:`.reference` (or, under TRITON_INTERPRET=1, the Triton kernel itself): were the reference traced instead, its loop over chunks
would be unrolled at one length.  Each op reads, in this order: its outputs (shapes and dtypes: the fake implementation, and what
the kernel fills), the op, its twin.  Autograd is in :mod:`.autograd`, docs/design.md has the reasons.

Shapes: B batch, T time, H heads, Hk key/value heads (Hk divides H), K key width, V value width, C = ``chunk_size``, S chunk slots
(:func:`.reference.num_slots`), N sequences (B, or the number of packed ones).  *Stored* tensors are float16 beside 16-bit inputs,
otherwise of the compute dtype (float32, float64 beside float64); everything else that is not q, k, v, o or their gradients is
float32 (float64 beside float64).  Outputs that stand for an absent optional input are empty tensors.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op, triton_op

from . import ahead, reference
from .eager import EagerOp
from .plans import planned
from .reference import compute_dtype, storage_dtype

try:
    from .kernels import (
        launch_chunk_bwd,
        launch_chunk_output,
        launch_chunk_state,
        launch_step,
    )
except ImportError as error:  # no Triton on this machine: CPU tensors only
    if (error.name or "").split(".")[0] != "triton":
        raise

    def _no_triton(*_: Any) -> Any:
        raise RuntimeError("gka ops on a GPU, or under TRITON_INTERPRET=1, need Triton, which is not installed: pip install triton")

    launch_chunk_bwd = launch_chunk_output = launch_chunk_state = launch_step = _no_triton  # type: ignore[assignment]

__all__ = [
    "chunk_bwd",
    "chunk_output",
    "chunk_state",
    "interpreting",
    "runs_kernels",
    "step",
    "step_",
]

Tensors3 = tuple[Tensor, Tensor, Tensor]
Tensors4 = tuple[Tensor, Tensor, Tensor, Tensor]
Tensors5 = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Tensors9 = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def interpreting() -> bool:
    """Whether TRITON_INTERPRET=1 asks for the Triton kernels on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def runs_kernels(x: Tensor) -> bool:
    """Whether ops on x are kernels rather than the reference, which knows no pieces."""
    return x.device.type != "cpu" or interpreting()


def _register(
    name: str,
    body: Callable[..., Any],
    outputs: Callable[..., Any],
    specification: Callable[..., Any],
    launch: Callable[..., Any],
    mutates: Sequence[str] = (),
) -> tuple[EagerOp, EagerOp]:
    """Register ``gka::<name>`` from its typed body, and ``gka::<name>_cpu``, opaque to every compiler."""

    def run_on_cpu(*args: Any) -> Any:
        if interpreting():
            if args[0].dtype == torch.float64:
                raise TypeError("dtype float64 is computed by the reference alone: unset TRITON_INTERPRET")
            out = outputs(*args)
            launch(*args, out)
            return out
        with torch.autocast("cpu", enabled=False):  # an op's precision is a matter of its inputs' dtypes
            result = specification(*args)
        if isinstance(result, Tensor):
            return result
        held = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        distinct = []
        for r in result:  # an op returns neither an input, nor a view of one, nor one tensor twice
            r = r.clone() if r.untyped_storage().data_ptr() in held else r.contiguous()
            held.add(r.untyped_storage().data_ptr())
            distinct.append(r)
        return tuple(distinct)

    def fake(*args: Any) -> Any:
        out = outputs(*args)
        if ahead.kept_launches() is not None:
            launch(*args, out)
        return out

    op: Any = triton_op(f"gka::{name}", body, mutates_args=mutates)
    schema = str(getattr(torch.ops.gka, name).default._schema).removeprefix(f"gka::{name}")
    twin = custom_op(f"gka::{name}_cpu", run_on_cpu, mutates_args=mutates, schema=schema, device_types="cpu")
    op.register_fake(fake)
    twin.register_fake(outputs)
    if not mutates:
        names = [a.name for a in op._opoverload._schema.arguments]
        body = planned(body, names.index("scale" if "scale" in names else "num_heads"), names.index("g"))
    return EagerOp.over(op, body, mutates), EagerOp.over(twin, run_on_cpu, mutates)


def _tie(size: int | torch.SymInt, other: int | torch.SymInt) -> None:
    """Make two sizes one symbol in what is traced; numbers have been checked, and torch._check takes its time."""
    if (equal := size == other) is not True:
        torch._check(equal)


# --- chunk_state -----------------------------------------------------------------------------------------------------------


def _chunk_state_outputs(k, v, g, gk, beta, h0, u0, cu_seqlens, num_heads, chunk_size):  # type: ignore[no-untyped-def]
    for x in (v, *(t for t in (g, gk, beta) if t is not None)):
        _tie(x.shape[0], k.shape[0])
        _tie(x.shape[1], k.shape[1])
    chunks = reference.empty_chunk_states(k, v, cu_seqlens, num_heads, chunk_size)
    return *chunks, *_empty_states(k, v, cu_seqlens, num_heads)


def _empty_states(k: Tensor, v: Tensor, cu_seqlens: Tensor | None, H: int) -> tuple[Tensor, Tensor]:
    """One of H and one of U for each sequence."""
    (B, _, _, K), V, exact = k.shape, v.shape[-1], compute_dtype(k)
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return k.new_empty(N, H, K, K, dtype=exact), k.new_empty(N, H, K, V, dtype=exact)


def _chunk_state(
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    gk: Tensor | None,
    beta: Tensor | None,
    h0: Tensor | None,
    u0: Tensor | None,
    cu_seqlens: Tensor | None,
    num_heads: int,
    chunk_size: int,
) -> Tensors5:
    """States before every chunk, and after the last.

    Args:
        k [B,T,Hk,K], v [B,T,Hk,V]: keys and values, float64 (CPU only), float32, float16 or bfloat16.
        g, gk, beta [B,T,H]: log decays of U and of H, and the factor of k and v; None: no decay, 1.
        h0 [N,H,K,K], u0 [N,H,K,V]: initial states; None: zeros.
        cu_seqlens [N+1]: bounds of packed sequences (then B = 1); None: B sequences of length T.
        num_heads, chunk_size: H and C.

    Returns:
        h_chunks [S,H,K,K], u_chunks [S,H,K,V]: stored; the states themselves are ``h_chunks * state_scales[..., 0, None, None]``
        and ``u_chunks * state_scales[..., 1, None, None]``.
        state_scales [S,H,2]: powers of two, 0 for a state of zeros.
        h_out [N,H,K,K], u_out [N,H,K,V]: final states.
    """
    args = (k, v, g, gk, beta, h0, u0, cu_seqlens, num_heads, chunk_size)
    if k.device.type == "cpu":
        return chunk_state_cpu(*args)
    out = _chunk_state_outputs(*args)
    launch_chunk_state(*args, out)
    return out


chunk_state, chunk_state_cpu = _register(
    "chunk_state", _chunk_state, _chunk_state_outputs, reference.chunk_state, launch_chunk_state
)


# --- chunk_output ----------------------------------------------------------------------------------------------------------


def _chunk_output_outputs(  # type: ignore[no-untyped-def]
    q, k, v, g, gk, alpha, beta, h0, u0, h_chunks, u_chunks, state_scales, cu_seqlens, scale, ridge_ratio, num_iter, chunk_size
):
    (B, T, H, K), V = q.shape, v.shape[-1]
    for x in (k, v, *(t for t in (g, gk, alpha, beta) if t is not None)):
        _tie(x.shape[0], B)
        _tie(x.shape[1], T)
    return (
        q.new_empty(B, T, H, V),
        q.new_empty(B, T, H, K, dtype=storage_dtype(q)),
        q.new_empty(B, T, H, dtype=compute_dtype(q)),
        q.new_empty(B, T, H, dtype=compute_dtype(q)),
    )


def _chunk_output(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    gk: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    h0: Tensor | None,
    u0: Tensor | None,
    h_chunks: Tensor,
    u_chunks: Tensor,
    state_scales: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    ridge_ratio: float,
    num_iter: int,
    chunk_size: int,
) -> Tensors4:
    """Solve (H_t + a‖H_t‖_F I) x_t = q_t for every token and read out o_t = scale · U_tᵀ (q_t + α_t (x_t − q_t)).

    Args:
        q [B,T,H,K], alpha [B,T,H] (None: 1); k, v, g, gk, beta, h0, u0, cu_seqlens, chunk_size as given to ``chunk_state``,
        h_chunks, u_chunks, state_scales as returned by it. h0 and u0 are not read: the chunk states hold them. They are
        arguments because gradients flow to what the states were made from, never to the chunk states themselves.
        ridge_ratio, num_iter: a and N.

    Returns:
        o [B,T,H,V] in q's dtype; x [B,T,H,K] stored, x_scale [B,T,H]: the solution x_t is ``x * x_scale``;
        phi [B,T,H]: φ_t = ‖H_t‖_F. The last three are for the backward and carry no gradient.
    """
    args = (
        *(q, k, v, g, gk, alpha, beta, h0, u0, h_chunks, u_chunks, state_scales, cu_seqlens),
        *(scale, ridge_ratio, num_iter, chunk_size),
    )
    if q.device.type == "cpu":
        return chunk_output_cpu(*args)
    out = _chunk_output_outputs(*args)
    launch_chunk_output(*args, out)
    return out


chunk_output, chunk_output_cpu = _register(
    "chunk_output", _chunk_output, _chunk_output_outputs, reference.chunk_output, launch_chunk_output
)


# --- chunk_bwd -------------------------------------------------------------------------------------------------------------


def _chunk_bwd_outputs(k, v, g, gk, beta, h0, u0, do, q, alpha, *args):  # type: ignore[no-untyped-def]
    cu_seqlens, _, _, _, H, _ = args[-6:]
    per_token = (*k.shape[:2], H)
    return (
        k.new_empty(0 if q is None else q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        *(k.new_empty(0 if t is None else per_token, dtype=compute_dtype(k)) for t in (g, gk, alpha, beta)),
        *_empty_states(k, v, cu_seqlens, H),
    )


def _chunk_bwd(
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    gk: Tensor | None,
    beta: Tensor | None,
    h0: Tensor | None,
    u0: Tensor | None,
    do: Tensor | None,
    q: Tensor | None,
    alpha: Tensor | None,
    x: Tensor | None,
    x_scale: Tensor | None,
    phi: Tensor | None,
    dh_out: Tensor | None,
    du_out: Tensor | None,
    h_starts: Tensor | None,
    u_starts: Tensor | None,
    start_scales: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    ridge_ratio: float,
    num_iter: int,
    num_heads: int,
    chunk_size: int,
) -> Tensors9:
    """Gradients of ``chunk_state`` and ``chunk_output`` together, piece by piece (:mod:`.pieces`), last to first.

    Of each piece the states are computed again, then the adjoint solve y_t = (H_t + λ_t I)^{-1} dx_t by the forward's polynomial,
    the cotangents of the states backwards in time, and the gradients of what made the states.

    Args:
        k … u0, cu_seqlens, num_heads, chunk_size as given to ``chunk_state``.
        do [B,T,H,V]: cotangent of o; q, alpha, scale, ridge_ratio, num_iter as given to ``chunk_output``, x, x_scale, phi its
        results. do, q, alpha, x, x_scale and phi are all None where only the final states have a cotangent.
        dh_out [N,H,K,K], du_out [N,H,K,V]: cotangents of the final states, None: zero.
        h_starts [B,P−1,H,K,K], u_starts [B,P−1,H,K,V], start_scales [B,P−1,H,2]: chunk states where the P parts of a sequence
        begin, all but its first (:func:`.pieces.piece_starts`); None: sequences are not cut.

    Returns:
        dq [B,T,H,K], dk [B,T,Hk,K], dv [B,T,Hk,V] in k's dtype, dk and dv summed over the heads that share a key; dg, dgk, dalpha,
        dbeta [B,T,H], dq and these empty where the input is absent; dh0 [N,H,K,K] (its symmetric part, which is what is defined),
        du0 [N,H,K,V].
    """
    args = (
        *(k, v, g, gk, beta, h0, u0, do, q, alpha, x, x_scale, phi, dh_out, du_out, h_starts, u_starts, start_scales, cu_seqlens),
        *(scale, ridge_ratio, num_iter, num_heads, chunk_size),
    )
    if k.device.type == "cpu":
        return chunk_bwd_cpu(*args)
    out = _chunk_bwd_outputs(*args)
    launch_chunk_bwd(*args, out)
    return out


chunk_bwd, chunk_bwd_cpu = _register("chunk_bwd", _chunk_bwd, _chunk_bwd_outputs, reference.chunk_bwd, launch_chunk_bwd)


# --- step and step_ --------------------------------------------------------------------------------------------------------


def _step__outputs(q, k, v, h, u, g, gk, alpha, beta, scale, ridge_ratio, num_iter):  # type: ignore[no-untyped-def]
    for x in (k, v, h, u, *(t for t in (g, gk, alpha, beta) if t is not None)):
        _tie(x.shape[0], q.shape[0])
    return q.new_empty(*q.shape[:2], v.shape[-1])


def _step_outputs(q, k, v, h, u, g, gk, alpha, beta, scale, ridge_ratio, num_iter):  # type: ignore[no-untyped-def]
    o = _step__outputs(q, k, v, h, u, g, gk, alpha, beta, scale, ridge_ratio, num_iter)
    return o, h.new_empty(h.shape), u.new_empty(u.shape)


def _launch_step_(*args: Any) -> None:
    *inputs, o = args
    launch_step(*inputs, (o, inputs[3], inputs[4]))  # type: ignore[call-arg]


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    h: Tensor,
    u: Tensor,
    g: Tensor | None,
    gk: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    scale: float,
    ridge_ratio: float,
    num_iter: int,
) -> Tensors3:
    """One token per sequence.

    Args:
        q [B,H,K], k [B,Hk,K], v [B,Hk,V]; h [B,H,K,K], u [B,H,K,V]: states; g, gk, alpha, beta [B,H] or None.

    Returns:
        o [B,H,V] in q's dtype, and the new h and u.
    """
    args = (q, k, v, h, u, g, gk, alpha, beta, scale, ridge_ratio, num_iter)
    if q.device.type == "cpu":
        return step_cpu(*args)
    out = _step_outputs(*args)
    launch_step(*args, out)
    return out


def _step_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    h: Tensor,
    u: Tensor,
    g: Tensor | None,
    gk: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    scale: float,
    ridge_ratio: float,
    num_iter: int,
) -> Tensor:
    """``step`` with the states h and u updated in place; returns o. No autograd."""
    args = (q, k, v, h, u, g, gk, alpha, beta, scale, ridge_ratio, num_iter)
    if q.device.type == "cpu":
        return step__cpu(*args)
    o = _step__outputs(*args)
    launch_step(*args, (o, h, u))
    return o


def _step_reference(*args: Any) -> Tensor:
    o, h, u = reference.step(*args)
    args[3].copy_(h)
    args[4].copy_(u)
    return o


step, step_cpu = _register("step", _step, _step_outputs, reference.step, launch_step)
step_, step__cpu = _register("step_", _step_, _step__outputs, _step_reference, _launch_step_, ("h", "u"))
