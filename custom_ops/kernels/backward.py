"""chunk_bwd: the backward of whole sequences, piece by piece, last to first.

States, their cotangents and y of all chunks would be the most of what a training step holds.
"""

from typing import Any

import torch
from torch import Tensor

from .. import plans
from ..eager import TENSORS
from ..pieces import piece_sizes
from ..reference import empty_chunk_states
from .grads import launch_chunk_grads, launch_chunk_state_bwd
from .launch import Tensors
from .output import launch_chunk_output_bwd
from .state import launch_chunk_state

__all__ = ["launch_chunk_bwd"]


def launch_chunk_bwd(
    k: Any,
    v: Any,
    g: Any,
    gk: Any,
    beta: Any,
    h0: Any,
    u0: Any,
    do: Any,
    q: Any,
    alpha: Any,
    x: Any,
    x_scale: Any,
    phi: Any,
    dh_out: Any,
    du_out: Any,
    h_starts: Any,
    u_starts: Any,
    start_scales: Any,
    cu_seqlens: Any,
    scale: float,
    ridge_ratio: float,
    num_iter: int,
    H: int,
    C: int,
    out: Tensors,
) -> None:
    """Fill ``out`` as ``ops.chunk_bwd`` describes."""
    *gradients, dh0, du0 = out
    rows = (k, v, g, gk, beta, do, q, alpha, x, x_scale, phi)
    constants = (cu_seqlens, scale, ridge_ratio, num_iter, H, C)
    B, T = k.shape[:2]
    if h_starts is not None:  # they say how many parts there are: what made them may have been traced, and this not
        parts = h_starts.shape[1] + 1
        sequences, tokens = 1, ((T + C - 1) // C + parts - 1) // parts * C
    elif cut := piece_sizes(k, v, cu_seqlens, H, C):
        sequences, tokens = cut[0], T
    else:
        return _launch_piece(rows, (h0, u0), (dh_out, du_out), constants, gradients, (dh0, du0))
    plans.abandon()
    # what kernels write into views is lost in compiled code (torch 2.11), so there each piece gets tensors of its own
    traced = type(dh0) not in TENSORS
    filled_parts: list[list[Tensor]] = []  # of the gradients, in the order of the tokens
    begins: list[list[Tensor]] = []  # of dh0 and du0
    for first in range(0, B, sequences):
        here = slice(first, min(first + sequences, B))
        before, after, into = ([_part(x, here) for x in pair] for pair in ((h0, u0), (dh_out, du_out), (dh0, du0)))
        if tokens < T:  # a kernel compiled for pieces between others suits the first and the last, too
            zeros = [torch.zeros_like(x) for x in into]
            before, after = ([z if x is None else x for x, z in zip(given, zeros, strict=True)] for given in (before, after))
        backwards = []
        for i in reversed(range((T + tokens - 1) // tokens)):
            span = slice(i * tokens, min((i + 1) * tokens, T))
            inputs, filled = ([_part(x, here, span) for x in whole] for whole in (rows, gradients))
            start, end = before, into
            if i:
                scales = start_scales[first, i - 1].to(dh0.dtype).unflatten(-1, (2, 1, 1))
                start = [(x[first, i - 1] * scales[:, which])[None] for which, x in enumerate((h_starts, u_starts))]
            if i or traced:
                end = [torch.empty_like(x) for x in into]
            if traced:
                filled = [torch.empty_like(x) for x in filled]
            _launch_piece(inputs, start, after, constants, filled, end)
            backwards.append(filled)
            after = end
        filled_parts += reversed(backwards)
        begins.append(after)
    if traced:
        for whole, *pieces in zip(gradients, *filled_parts, strict=True):
            if whole.dim() > 1:
                whole.copy_(torch.cat([x.flatten(0, 1) for x in pieces]).view_as(whole))
        for whole, *pieces in zip((dh0, du0), *begins, strict=True):
            whole.copy_(torch.cat(pieces))


def _part(x: Any, *where: slice) -> Any:
    """Of a tensor [B, …]; None or an empty one stands for what is absent."""
    return x if x is None or x.dim() == 1 else x[where]


def _launch_piece(rows: Any, start: Any, after: Any, constants: Any, gradients: Any, end: Any) -> None:
    """``launch_chunk_bwd`` of one piece."""
    k, v, g, gk, beta, do, q, alpha, x, x_scale, phi = rows
    (h0, u0), (dh_out, du_out), (dh0, du0) = start, after, end
    cu_seqlens, scale, ridge_ratio, num_iter, H, C = constants
    dq, dk, dv, dg, dgk, dalpha, dbeta = gradients
    h_chunks, u_chunks, scales = empty_chunk_states(k, v, cu_seqlens, H, C)
    final = (torch.empty_like(dh0), torch.empty_like(du0))
    launch_chunk_state(k, v, g, gk, beta, h0, u0, cu_seqlens, H, C, (h_chunks, u_chunks, scales, *final))
    y = y_scale = eta = None
    if do is not None:
        y, y_scale, eta = (torch.empty_like(t) for t in (x, x_scale, x_scale))
        launch_chunk_output_bwd(
            *(do, q, k, v, g, gk, alpha, beta, h_chunks, u_chunks, scales, x, x_scale, phi),
            *(cu_seqlens, scale, ridge_ratio, num_iter, C, (dq, dalpha, y, y_scale, eta, dgk)),
        )
    dh_chunks, du_chunks, dscales = empty_chunk_states(k, v, cu_seqlens, H, C)
    launch_chunk_state_bwd(
        *(k, v, g, gk, beta, h_chunks, scales, do, q, alpha, x, x_scale, y, y_scale, eta),
        *(dh_out, du_out, cu_seqlens, scale, H, C, (dh_chunks, du_chunks, dscales, dh0, du0)),
    )
    cotangents = (dh_chunks, du_chunks, dscales, do, q, alpha, x, x_scale, y, y_scale, eta)
    out = (dk, dv, dg, dgk, dbeta)
    launch_chunk_grads(k, v, g, gk, beta, h_chunks, u_chunks, scales, *cotangents, cu_seqlens, scale, H, C, out)
