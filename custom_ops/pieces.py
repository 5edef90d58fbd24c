"""Where the backward is cut, so that the states and cotangents of one piece at a time are in memory rather than of all."""

import torch
from torch import Tensor

from . import config
from .eager import TENSORS
from .reference import storage_dtype

__all__ = ["piece_lengths", "piece_sizes", "piece_starts"]

Starts = tuple[Tensor | None, Tensor | None, Tensor | None]


def piece_sizes(k: Tensor, v: Tensor, cu_seqlens: Tensor | None, num_heads: int, chunk_size: int) -> tuple[int, int] | None:
    """(sequences, chunks) of a piece with at most ``config.PIECE_BYTES`` of chunk states, if it can be; None: all is one piece.

    A piece is some whole sequences, or part of one; packed sequences are one piece, and so is all while B or T is not a number.
    What is traced has ``config.TRACED_PIECES`` at most.
    """
    (B, T, _, K), V = k.shape, v.shape[-1]
    if cu_seqlens is not None or not (isinstance(B, int) and isinstance(T, int)):
        return None
    chunks = (T + chunk_size - 1) // chunk_size
    most = max(1, config.PIECE_BYTES // (num_heads * K * (K + V) * storage_dtype(k).itemsize))
    if B * chunks <= most:
        return None
    sequences = most // chunks
    parts = 1 if sequences else (chunks + most - 1) // most
    if type(k) not in TENSORS:
        parts = max(1, min(parts, config.TRACED_PIECES // B))
        sequences = max(sequences, (B + config.TRACED_PIECES - 1) // config.TRACED_PIECES)
    return (1, (chunks + parts - 1) // parts) if parts > 1 else (max(1, sequences), chunks)


def piece_lengths(k: Tensor, v: Tensor, num_heads: int, chunk_size: int) -> tuple[int, ...]:
    """Tokens in a part of a sequence and in its last part; empty where sequences are not cut."""
    cut, T = piece_sizes(k, v, None, num_heads, chunk_size), k.shape[1]
    if cut is None or (tokens := cut[1] * chunk_size) >= T:
        return ()
    return tokens, (T - 1) % tokens + 1


def piece_starts(k: Tensor, v: Tensor, cu_seqlens: Tensor | None, num_heads: int, chunk_size: int, states: list[Tensor]) -> Starts:
    """Chunk states (h_chunks, u_chunks, state_scales) where parts of a sequence begin, but its first [B, parts − 1, H, …].

    All parts but the last have ⌈chunks/parts⌉ chunks.
    """
    cut = piece_sizes(k, v, cu_seqlens, num_heads, chunk_size)
    all_chunks = (k.shape[1] + chunk_size - 1) // chunk_size
    if cut is None or cut[1] == all_chunks:
        return None, None, None
    some = [x.unflatten(0, (k.shape[0], all_chunks))[:, cut[1] :: cut[1]] for x in states]
    h, u, scales = (x.clone(memory_format=torch.contiguous_format) for x in some)  # a view would keep all of the states
    return h, u, scales
