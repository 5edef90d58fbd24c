"""Gated KalmaNet in plain torch operations: the specification of every op, and its CPU kernel.

Two levels.  :func:`recurrent_gka` is the definition, token by token, with the paper's own iteration: slow, short, the oracle of
the tests.  The ``chunk_*`` functions and :func:`step` compute what the ops of the same names compute, in the arithmetic of their
inputs (16-bit inputs are computed in float32), batched over chunks; only :func:`scan_states` is sequential.

Notation (see docs/design.md): S chunks ("slots") of C tokens, H heads, K key width, V value width.  Inside a chunk with
start state H_c and U_c, c_t is the running sum of the log decay, γ_t = exp(c_t), D_tj = exp(c_t − c_j) for j ≤ t, and hatted
tensors carry beta.  Two states decay separately, so the names come in pairs: ``h`` (key-key, decays gk) and ``u`` (key-value, g).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .polynomial import chebyshev_coefficients

__all__ = [
    "chunk_bwd",
    "chunk_grads",
    "chunk_output",
    "chunk_output_bwd",
    "chunk_state",
    "chunk_state_bwd",
    "num_slots",
    "reciprocal",
    "recurrent_gka",
    "step",
]

LEAST_DECAY = {torch.float32: -111.0, torch.float64: -746.0}  # log decays of a token whose exp is zero
TINY = torch.finfo(torch.float32).tiny  # below this a number counts as zero: its reciprocal might overflow float32
LEAST_PHI = {torch.float32: 2.0**-100, torch.float64: TINY}  # and below this ‖H‖_F: q/(aφ) might


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 inputs, float32 for everything else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# ---------------------------------------------------------------------------------------------------------------------------
# The definition


def recurrent_gka(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    alpha: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    ridge_ratio: float = 0.02,
    num_iter: int | None = 30,
    initial_state: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """GKA token by token, straight from the paper: eq. for H_t, U_t, then Algorithm 1.

    Shapes as in :func:`gka_compile.chunk_gka`, without packing.  ``num_iter=None`` solves exactly (``torch.linalg.solve``).
    Everything is differentiable by autograd.  Returns (o [B,T,H,V], h [B,H,K,K], u [B,H,K,V]).
    """
    B, T, H, K = q.shape
    V, groups = v.shape[-1], H // k.shape[2]
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    if beta is not None:
        k, v = k * beta[..., None], v * beta[..., None]
    h, u = initial_state if initial_state is not None else (q.new_zeros(B, H, K, K), q.new_zeros(B, H, K, V))
    scale = K**-0.5 if scale is None else scale
    eye = torch.eye(K, dtype=q.dtype)
    outputs = []
    for t in range(T):
        kt, vt, qt = k[:, t], v[:, t], q[:, t]
        h = (h if gk is None else h * gk[:, t].exp()[..., None, None]) + kt[..., :, None] * kt[..., None, :]
        u = (u if g is None else u * g[:, t].exp()[..., None, None]) + kt[..., :, None] * vt[..., None, :]
        square = h.square().sum((-1, -2))[..., None]
        zero = square == 0
        phi = torch.where(zero, 1.0, square).sqrt()
        lam = ridge_ratio * phi
        if num_iter is None:
            x = torch.linalg.solve(h + lam[..., None] * eye, qt)
        else:
            rho, s, omega = 1 / (1 + 2 * ridge_ratio), 2 / (2 * lam + phi), 2.0
            x, previous = s * qt, torch.zeros_like(qt)
            for _ in range(num_iter):
                omega = 1 / (1 - rho**2 * omega / 4)
                residual = torch.einsum("bhij,bhj->bhi", h, x) + lam * x - qt
                x, previous = omega * (x - s * residual) + (1 - omega) * previous, x
        x = torch.where(zero, 0.0, x)
        m = x if alpha is None else qt + alpha[:, t, :, None] * (x - qt)
        outputs.append(scale * torch.einsum("bhkv,bhk->bhv", u, m))
    o = torch.stack(outputs, 1) if outputs else q.new_zeros(B, 0, H, V)
    return o, h, u


# ---------------------------------------------------------------------------------------------------------------------------
# Tokens to chunks and back


def num_slots(B: int, T: int, cu_seqlens: Tensor | None, chunk_size: int) -> int:
    """Number of chunk slots S.

    Dense: B·⌈T/C⌉, sequence by sequence.  Packed: ⌊T/C⌋ + N slots; sequence n starts at slot ⌊cu[n]/C⌋ + n, which leaves room
    for its ⌈T_n/C⌉ chunks without reading the lengths (a few slots stay empty).
    """
    if cu_seqlens is None:
        return B * ((T + chunk_size - 1) // chunk_size)
    return T // chunk_size + cu_seqlens.shape[0] - 1


def _token_slots(T: int, cu_seqlens: Tensor, chunk_size: int) -> Tensor:
    """Packed: the place slot·C + row of each of the T tokens."""
    token = torch.arange(T, device=cu_seqlens.device)
    n = torch.searchsorted(cu_seqlens, token, right=True) - 1
    start = cu_seqlens[n]
    return (start // chunk_size + n) * chunk_size + token - start


def split(x: Tensor, cu_seqlens: Tensor | None, chunk_size: int) -> Tensor:
    """[B, T, H, ...] to chunks [S, H, C, ...]; rows past the end of a sequence are zero."""
    B, T, *rest = x.shape
    S = num_slots(B, T, cu_seqlens, chunk_size)
    if cu_seqlens is None:
        pad = (T + chunk_size - 1) // chunk_size * chunk_size - T
        # not F.pad, which Inductor would compute anew in every kernel that reads x, with its index arithmetic
        x = torch.cat([x, x.new_zeros(B, pad, *x.shape[2:])], 1)
    else:
        place = _token_slots(T, cu_seqlens.long(), chunk_size)
        x = x.new_zeros(S * chunk_size, *rest).index_copy(0, place, x[0])
    return x.reshape(S, chunk_size, *rest).transpose(1, 2)


def join(x: Tensor, B: int, T: int, cu_seqlens: Tensor | None) -> Tensor:
    """Chunks [S, H, C, ...] to [B, T, H, ...]: the inverse of :func:`split`."""
    chunk_size = x.shape[2]
    x = x.transpose(1, 2)
    if cu_seqlens is None:
        n = (T + chunk_size - 1) // chunk_size
        return x.reshape(B, n * chunk_size, *x.shape[2:])[:, :T]
    return x.reshape(-1, *x.shape[2:])[_token_slots(T, cu_seqlens.long(), chunk_size)][None]


class _Chunks(NamedTuple):
    """Keys, values and decays of all chunks, in the compute dtype, heads expanded and beta applied."""

    k: Tensor  # [S, H, C, K]
    v: Tensor  # [S, H, C, V]
    raw_k: Tensor
    raw_v: Tensor
    beta: Tensor | None  # [S, H, C, 1]
    c_h: Tensor  # [S, H, C] running log decay of H
    c_u: Tensor  # [S, H, C] of U


def _chunks(
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    gk: Tensor | None,
    beta: Tensor | None,
    cu_seqlens: Tensor | None,
    num_heads: int,
    chunk_size: int,
) -> _Chunks:
    dtype, groups = compute_dtype(k), num_heads // k.shape[2]

    def prepare(x: Tensor, repeat: int = 1) -> Tensor:
        x = split(x.to(dtype), cu_seqlens, chunk_size)
        return x.repeat_interleave(repeat, 1) if repeat > 1 else x

    def running(decay: Tensor) -> Tensor:
        return prepare(decay).clamp(min=LEAST_DECAY[dtype]).cumsum(-1)  # less would cost the sums of what follows their digits

    kc, vc = prepare(k, groups), prepare(v, groups)
    bc = None if beta is None else prepare(beta).unsqueeze(-1)
    none = kc.new_zeros(()).expand(kc.shape[:-1])
    return _Chunks(
        kc if bc is None else kc * bc,
        vc if bc is None else vc * bc,
        kc,
        vc,
        bc,
        none if gk is None else running(gk),
        none if g is None else running(g),
    )


def decay_mask(c: Tensor) -> Tensor:
    """D_tj = exp(c_t − c_j) for j ≤ t, else 0: a masked difference of logs, since 1/γ_j alone overflows."""
    C = c.shape[-1]
    causal = torch.ones(C, C, dtype=torch.bool, device=c.device).tril()
    return (c.unsqueeze(-1) - c.unsqueeze(-2)).masked_fill(~causal, float("-inf")).exp()


# ---------------------------------------------------------------------------------------------------------------------------
# Chunk states in memory


def empty_chunk_states(
    k: Tensor, v: Tensor, cu_seqlens: Tensor | None, num_heads: int, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``store_states`` returns for inputs like these, not computed."""
    (B, T, _, K), V, H = k.shape, v.shape[-1], num_heads
    S, stored = num_slots(B, T, cu_seqlens, chunk_size), storage_dtype(k)
    h, u = k.new_empty(S, H, K, K, dtype=stored), k.new_empty(S, H, K, V, dtype=stored)
    return h, u, k.new_empty(S, H, 2, dtype=torch.float32)


def storage_dtype(x: Tensor) -> torch.dtype:
    """What chunk states and normalised solutions are stored as: float16 beside 16-bit inputs, else the compute dtype."""
    return torch.float16 if x.dtype.itemsize == 2 else compute_dtype(x)


def store_states(h: Tensor, u: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """States to their stored form: (h_chunks, u_chunks, state_scales [S, H, 2]).

    float16 has the digits but not the range, so each state is divided by a power of two that brings its largest entry
    into [1, 2).  Wider dtypes are stored as they are, with scales of one.
    """
    if dtype != torch.float16:
        return h.to(dtype), u.to(dtype), h.new_ones(h.shape[0], h.shape[1], 2, dtype=torch.float32)
    largest = torch.stack([h.abs().amax((-1, -2)), u.abs().amax((-1, -2))], -1)
    scales = torch.where(largest < TINY, 0.0, largest.clamp(min=TINY).log2().floor().clamp(-126, 126).exp2())
    inverse_h, inverse_u = reciprocal(scales)[..., None, None].unbind(2)
    return (h * inverse_h).to(dtype), (u * inverse_u).to(dtype), scales


def load_state(chunks: Tensor, scales: Tensor) -> Tensor:
    """One state from its stored form and ``state_scales[..., i]``, in the compute dtype."""
    return chunks * scales[..., None, None] if chunks.dtype == torch.float16 else chunks


def load_states(h_chunks: Tensor, u_chunks: Tensor, state_scales: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`store_states`, in the compute dtype."""
    return load_state(h_chunks, state_scales[..., 0]), load_state(u_chunks, state_scales[..., 1])


# ---------------------------------------------------------------------------------------------------------------------------
# chunk_state


class Recurrence(NamedTuple):
    """S_{c+1} = e^{total_c} S_c + increment_c over the chunks c of each sequence."""

    increment: Tensor  # [N, n, H, X, Y]
    total: Tensor  # [N, n, H] log decay of a whole chunk
    initial: Tensor  # [N, H, X, Y]


# the states before each chunk [N, n, H, X, Y] and the last ones [N, H, X, Y], of several recurrences of one length
Scan = Callable[[Sequence[Recurrence]], list[tuple[Tensor, Tensor]]]


def scan_states(recurrences: Sequence[Recurrence]) -> list[tuple[Tensor, Tensor]]:
    """The one sequential part: a :data:`Scan` as a plain loop."""
    results = []
    for r in recurrences:
        decay = r.total.exp()[..., None, None]
        before, state = torch.empty_like(r.increment), r.initial
        for i in range(r.increment.shape[1]):
            before[:, i] = state
            state = decay[:, i] * state + r.increment[:, i]
        results.append((before, state))
    return results


def _scan_slots(
    recurrences: Sequence[Recurrence], cu_seqlens: Tensor | None, chunk_size: int, scan: Scan
) -> list[tuple[Tensor, Tensor]]:
    """:data:`Scan` over slots [S, H, X, Y], sequence by sequence where they are packed."""
    if cu_seqlens is None:
        N = recurrences[0].initial.shape[0]
        if N == 0:
            return [(r.increment, r.initial) for r in recurrences]
        n = recurrences[0].increment.shape[0] // N
        chunks = [Recurrence(r.increment.unflatten(0, (N, n)), r.total.unflatten(0, (N, n)), r.initial) for r in recurrences]
        return [(before.flatten(0, 1), last) for before, last in scan(chunks)]
    results = [(torch.zeros_like(r.increment), torch.empty_like(r.initial)) for r in recurrences]
    for s, (first, slots) in enumerate(_sequence_slots(cu_seqlens, chunk_size)):
        where = slice(first, first + slots)
        sequence = [Recurrence(r.increment[None, where], r.total[None, where], r.initial[s : s + 1]) for r in recurrences]
        for (before, last), (before_s, last_s) in zip(results, scan(sequence), strict=True):
            before[where], last[s] = before_s[0], last_s[0]
    return results


def _sequence_slots(cu_seqlens: Tensor, chunk_size: int) -> list[tuple[int, int]]:
    """Packed: (first slot, number of slots) of each sequence."""
    ends = cu_seqlens.tolist()
    return [
        (start // chunk_size + n, (end - start + chunk_size - 1) // chunk_size)
        for n, (start, end) in enumerate(zip(ends[:-1], ends[1:], strict=True))
    ]


def chunk_state(
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
    scan: Scan = scan_states,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """States before each chunk and after the last: (h_chunks, u_chunks, state_scales, h_out, u_out); see ``ops.chunk_state``."""
    x = _chunks(k, v, g, gk, beta, cu_seqlens, num_heads, chunk_size)
    N = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    K, V = k.shape[-1], v.shape[-1]
    h0 = x.k.new_zeros(N, num_heads, K, K) if h0 is None else h0.to(x.k.dtype)
    u0 = x.k.new_zeros(N, num_heads, K, V) if u0 is None else u0.to(x.k.dtype)
    end_h, end_u = x.c_h[..., -1], x.c_u[..., -1]
    add_h = (x.k * (end_h.unsqueeze(-1) - x.c_h).exp().unsqueeze(-1)).transpose(-1, -2) @ x.k
    add_u = (x.k * (end_u.unsqueeze(-1) - x.c_u).exp().unsqueeze(-1)).transpose(-1, -2) @ x.v
    recurrences = (Recurrence(add_h, end_h, h0), Recurrence(add_u, end_u, u0))
    (h_chunks, h_out), (u_chunks, u_out) = _scan_slots(recurrences, cu_seqlens, chunk_size, scan)
    return *store_states(h_chunks, u_chunks, storage_dtype(k)), h_out, u_out


# ---------------------------------------------------------------------------------------------------------------------------
# chunk_output


def _norm(x: Tensor) -> Tensor:
    return x.square().sum(-1, keepdim=True).sqrt()


def reciprocal(x: Tensor) -> Tensor:
    """1/x, and 0 where x is (as good as) zero. The clamp keeps TensorRT 8.5 from a fusion that is wrong (docs/deploy.md)."""
    return torch.where(x < TINY, 0.0, 1.0 / x.clamp(min=TINY))


def _phi(k: Tensor, mask: Tensor, gamma: Tensor, h: Tensor) -> Tensor:
    """‖H_t‖_F of every token [S, H, C, 1], without forming H_t.

    Everything is divided by its size first, and each token's sum by that of its largest term: φ² leaves float32 where φ does not.
    """
    length = _norm(k)
    k = k * reciprocal(length)
    size = h.abs().amax((-1, -2))[..., None, None]
    h = h * reciprocal(size)
    start, weights = gamma * size, mask * length.square().transpose(-1, -2)
    unit = torch.maximum(start, weights.amax(-1, keepdim=True))
    start, weights = start * reciprocal(unit), weights * reciprocal(unit)
    cross = ((k @ h) * k).sum(-1, keepdim=True)
    gram = (k @ k.transpose(-1, -2)).square()
    square = start.square() * h.square().sum((-1, -2))[..., None, None] + 2 * start * (weights @ cross)
    square = square + ((weights @ gram) * weights).sum(-1, keepdim=True)
    phi = unit * square.clamp(min=0).sqrt()
    return torch.where(phi < LEAST_PHI[phi.dtype], 0.0, phi)


# (z, what z reads, rhs, ridge_ratio, num_iter) to Σ c_n T_n(Z) rhs, where z(t, *what z reads) is Z t
Series = Callable[[Callable[..., Tensor], tuple[Tensor, ...], Tensor, float, int], Tensor]


def chebyshev_series(
    z: Callable[..., Tensor], operands: tuple[Tensor, ...], rhs: Tensor, ridge_ratio: float, num_iter: int
) -> Tensor:
    """The polynomial of :mod:`.polynomial` applied to rhs: a :data:`Series` as a plain loop."""
    c = chebyshev_coefficients(ridge_ratio, num_iter)
    previous, t = rhs, z(rhs, *operands)
    x = c[0] * previous + c[1] * t
    for n in range(2, num_iter + 1):
        previous, t = t, 2 * z(t, *operands) - previous
        x = x + c[n] * t
    return x


def _h_chunk(t: Tensor, gamma: Tensor, mask: Tensor, k: Tensor, h: Tensor) -> Tensor:
    """H_t t for every row t of a chunk."""
    return gamma * (t @ h) + (mask * (t @ k.transpose(-1, -2))) @ k


def _z_chunk(t: Tensor, start_gain: Tensor, inner: Tensor, k: Tensor, h: Tensor) -> Tensor:
    """Z_t t = 2 H_t t/φ_t − t for every row t of a chunk."""
    return _h_chunk(t, start_gain, inner, k, h) - t


def _z_step(t: Tensor, gain: Tensor, h: Tensor) -> Tensor:
    """Z t = 2 H t/φ − t for one vector."""
    return gain * (h @ t.unsqueeze(-1)).squeeze(-1) - t


def _solve(
    rhs: Tensor,
    k: Tensor,
    mask: Tensor,
    gamma: Tensor,
    h: Tensor,
    phi: Tensor,
    ridge_ratio: float,
    num_iter: int,
    series: Series = chebyshev_series,
) -> Tensor:
    """φ_t x_t for every row: the Chebyshev series of :mod:`.polynomial`, all chunks at once."""
    gain = 2 * reciprocal(phi)
    return series(_z_chunk, (gain * gamma, gain * mask, k, h), rhs, ridge_ratio, num_iter)


class _Readout(NamedTuple):
    """What forward and backward of the read-out share, per chunk."""

    q: Tensor
    alpha: Tensor | None
    x: Tensor  # the solution itself
    m: Tensor


def _readout(q: Tensor, alpha: Tensor | None, x: Tensor) -> _Readout:
    return _Readout(q, alpha, x, x if alpha is None else q + alpha * (x - q))


def chunk_output(
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
    series: Series = chebyshev_series,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Solve and read-out: (o, x, x_scale, phi); see ``ops.chunk_output``."""
    B, T, H, _ = q.shape
    y = _chunks(k, v, g, gk, beta, cu_seqlens, H, chunk_size)
    qc = split(q.to(y.k.dtype), cu_seqlens, chunk_size)
    ac = None if alpha is None else split(alpha.to(y.k.dtype), cu_seqlens, chunk_size).unsqueeze(-1)
    h, u = load_states(h_chunks, u_chunks, state_scales)
    mask, gamma = decay_mask(y.c_h), y.c_h.exp().unsqueeze(-1)
    phi = _phi(y.k, mask, gamma, h)
    length = _norm(qc)
    unit_x = _solve(qc * reciprocal(length), y.k, mask, gamma, h, phi, ridge_ratio, num_iter, series)
    x_scale = length * reciprocal(phi)
    r = _readout(qc, ac, unit_x * x_scale)
    inner = decay_mask(y.c_u) * (r.m @ y.k.transpose(-1, -2))
    o = scale * (y.c_u.exp().unsqueeze(-1) * (r.m @ u) + inner @ y.v)
    return (
        join(o, B, T, cu_seqlens).to(q.dtype),
        join(unit_x, B, T, cu_seqlens).to(storage_dtype(q)),
        join(x_scale.squeeze(-1), B, T, cu_seqlens),
        join(phi.squeeze(-1), B, T, cu_seqlens),
    )


# ---------------------------------------------------------------------------------------------------------------------------
# The adjoint


def chunk_output_bwd(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    gk: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    h_chunks: Tensor,
    u_chunks: Tensor,
    state_scales: Tensor,
    x: Tensor,
    x_scale: Tensor,
    phi: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    ridge_ratio: float,
    num_iter: int,
    chunk_size: int,
) -> tuple[Tensor, ...]:
    """The adjoint solve: (dq, dalpha, y, y_scale, eta, hg).

    As ``kernels.output`` has them, but for hg = ⟨H_t, G_t⟩, G_t what token t pulls out of H_t: empty without gk.
    """
    B, T, H, _ = q.shape
    c = _chunks(k, v, g, gk, beta, cu_seqlens, H, chunk_size)
    dtype = c.k.dtype
    qc, xc, doc = (split(t.to(dtype), cu_seqlens, chunk_size) for t in (q, x, do))
    phic, x_scale = (split(t.to(dtype), cu_seqlens, chunk_size).unsqueeze(-1) for t in (phi, x_scale))
    ac = None if alpha is None else split(alpha.to(dtype), cu_seqlens, chunk_size).unsqueeze(-1)
    r = _readout(qc, ac, xc * x_scale)
    h, u = load_states(h_chunks, u_chunks, state_scales)
    mask, gamma = decay_mask(c.c_h), c.c_h.exp().unsqueeze(-1)
    inner = decay_mask(c.c_u) * (doc @ c.v.transpose(-1, -2))
    dm = scale * (c.c_u.exp().unsqueeze(-1) * (doc @ u.transpose(-1, -2)) + inner @ c.k)
    dx = dm if ac is None else ac * dm
    length = _norm(dx)
    y = _solve(dx * reciprocal(length), c.k, mask, gamma, h, phic, ridge_ratio, num_iter)
    y = y.to(storage_dtype(q)).to(dtype)  # what is read of H and what of the keys must be of one y, as of one x
    y_scale = length * reciprocal(phic)
    dq = y * y_scale if ac is None else dm - dx + y * y_scale
    eta = ridge_ratio * (r.x * y * y_scale).sum(-1) * reciprocal(phic.squeeze(-1))
    dalpha = hg = q.new_empty(0, dtype=dtype)
    if gk is not None:  # of an exact solve −y·q, but not of x as it is stored
        ridge = eta * phic.squeeze(-1) * phic.squeeze(-1)  # φ² alone may leave float32
        hg = join(-(y * y_scale * _h_chunk(r.x, gamma, mask, c.k, h)).sum(-1) - ridge, B, T, cu_seqlens)
    if alpha is not None:
        dalpha = join((dm * (r.x - r.q)).sum(-1), B, T, cu_seqlens)
    out = [join(t, B, T, cu_seqlens) for t in (dq, y, y_scale.squeeze(-1), eta)]
    return out[0].to(q.dtype), dalpha, out[1].to(storage_dtype(q)), out[2], out[3], hg


class _Cotangents(NamedTuple):
    """Per chunk: what one token's output pulls out of H_t and U_t, G_t = −½(yxᵀ + xyᵀ) − η H and scale·m doᵀ."""

    x: Tensor
    y: Tensor
    eta: Tensor  # [S, H, C]
    m: Tensor
    do: Tensor  # times scale


def _cotangents(
    do: Tensor | None,
    q: Tensor | None,
    alpha: Tensor | None,
    x: Tensor | None,
    x_scale: Tensor | None,
    y: Tensor | None,
    y_scale: Tensor | None,
    eta: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk_size: int,
    dtype: torch.dtype,
) -> _Cotangents | None:
    if do is None:
        return None
    assert q is not None and x is not None and x_scale is not None and y is not None and y_scale is not None
    assert eta is not None

    def prepare(t: Tensor) -> Tensor:
        return split(t.to(dtype), cu_seqlens, chunk_size)

    solution = prepare(x) * prepare(x_scale).unsqueeze(-1)
    r = _readout(prepare(q), None if alpha is None else prepare(alpha).unsqueeze(-1), solution)
    return _Cotangents(r.x, prepare(y) * prepare(y_scale).unsqueeze(-1), prepare(eta), r.m, scale * prepare(do))


def _ridge_path(eta: Tensor, mask: Tensor, gamma: Tensor) -> Tensor:
    """e_j = Σ_{s≥j} D_sj γ_s η_s [S, H, C, 1]: how much of H_c k̂_j the ridges of later tokens pull out."""
    return mask.transpose(-1, -2) @ (gamma * eta.unsqueeze(-1))


def chunk_state_bwd(
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    gk: Tensor | None,
    beta: Tensor | None,
    h_chunks: Tensor,
    state_scales: Tensor,
    do: Tensor | None,
    q: Tensor | None,
    alpha: Tensor | None,
    x: Tensor | None,
    x_scale: Tensor | None,
    y: Tensor | None,
    y_scale: Tensor | None,
    eta: Tensor | None,
    dh_out: Tensor | None,
    du_out: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    num_heads: int,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Cotangents of the states after each chunk and of the first: (dh_chunks, du_chunks, dstate_scales, dh0, du0)."""
    c = _chunks(k, v, g, gk, beta, cu_seqlens, num_heads, chunk_size)
    dtype, (S, H, _, K), V = c.k.dtype, c.k.shape, v.shape[-1]
    N = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    h = load_state(h_chunks, state_scales[..., 0])
    d = _cotangents(do, q, alpha, x, x_scale, y, y_scale, eta, cu_seqlens, scale, chunk_size, dtype)
    gamma = c.c_h.exp().unsqueeze(-1)
    if d is None:
        add_h, add_u = c.k.new_zeros(S, H, K, K), c.k.new_zeros(S, H, K, V)
    else:
        yx = (gamma * d.y).transpose(-1, -2) @ d.x
        e = _ridge_path(d.eta, decay_mask(c.c_h), gamma)
        start = (gamma.squeeze(-1).square() * d.eta).sum(-1)[..., None, None]
        add_h = -0.5 * (yx + yx.transpose(-1, -2)) - start * h - (e * c.k).transpose(-1, -2) @ c.k
        add_u = (c.c_u.exp().unsqueeze(-1) * d.m).transpose(-1, -2) @ d.do
    dh_out = c.k.new_zeros(N, H, K, K) if dh_out is None else dh_out.to(dtype)
    du_out = c.k.new_zeros(N, H, K, V) if du_out is None else du_out.to(dtype)
    dh_out = 0.5 * (dh_out + dh_out.transpose(-1, -2))

    def scan(recurrences: Sequence[Recurrence]) -> list[tuple[Tensor, Tensor]]:
        flipped = [Recurrence(r.increment.flip(1), r.total.flip(1), r.initial) for r in recurrences]
        return [(after.flip(1), first) for after, first in scan_states(flipped)]

    recurrences = (Recurrence(add_h, c.c_h[..., -1], dh_out), Recurrence(add_u, c.c_u[..., -1], du_out))
    (dh_chunks, dh0), (du_chunks, du0) = _scan_slots(recurrences, cu_seqlens, chunk_size, scan)
    return *store_states(dh_chunks, du_chunks, storage_dtype(k)), dh0, du0


def chunk_grads(
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    gk: Tensor | None,
    beta: Tensor | None,
    h_chunks: Tensor,
    u_chunks: Tensor,
    state_scales: Tensor,
    dh_chunks: Tensor,
    du_chunks: Tensor,
    dstate_scales: Tensor,
    do: Tensor | None,
    q: Tensor | None,
    alpha: Tensor | None,
    x: Tensor | None,
    x_scale: Tensor | None,
    y: Tensor | None,
    y_scale: Tensor | None,
    eta: Tensor | None,
    hg: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    num_heads: int,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of what made the states: (dk, dv, dg, dgk, dbeta); empty where the input is absent.

    dk̂_t = 2 Γ_t k̂_t + W_t v̂_t with Γ_t expanded over the chunk.  For the decays, ⟨Γ_t, H_t⟩ is carried backwards through the
    chunk from ⟨Γ_e, H_e⟩ at its end, with k̂ᵀΓk̂ = ½ k̂·dk̂; likewise for U.
    """
    c = _chunks(k, v, g, gk, beta, cu_seqlens, num_heads, chunk_size)
    dtype = c.k.dtype
    B, T, Hk, _ = k.shape
    groups = num_heads // Hk
    d = _cotangents(do, q, alpha, x, x_scale, y, y_scale, eta, cu_seqlens, scale, chunk_size, dtype)
    h, u = load_states(h_chunks, u_chunks, state_scales)
    dh, du = load_states(dh_chunks, du_chunks, dstate_scales)
    gamma = c.c_h.exp().unsqueeze(-1)
    tail_h = (c.c_h[..., -1:] - c.c_h).exp().unsqueeze(-1)
    tail_u = (c.c_u[..., -1:] - c.c_u).exp().unsqueeze(-1)
    k_end = tail_h * (c.k @ dh)  # the part of Γ_t k̂_t that comes from later chunks
    dk_h = 2 * k_end
    dk_u = k_w = tail_u * (c.v @ du.transpose(-1, -2))
    dv = tail_u * (c.k @ du)
    dc_h = dc_u = None  # what each token reads less what is read of each key
    if d is not None:
        mask_h, mask_u = decay_mask(c.c_h), decay_mask(c.c_u)
        mask_ht, mask_ut = mask_h.transpose(-1, -2), mask_u.transpose(-1, -2)
        e = _ridge_path(d.eta, mask_h, gamma)
        ridge = mask_ht @ (d.eta.unsqueeze(-1) * mask_h)
        inside = (
            -(mask_ht * (c.k @ d.x.transpose(-1, -2))) @ d.y
            - (mask_ht * (c.k @ d.y.transpose(-1, -2))) @ d.x
            - 2 * e * (c.k @ h)
            - 2 * (ridge * (c.k @ c.k.transpose(-1, -2))) @ c.k
        )
        dk_h = dk_h + inside
        if gk is not None:
            assert hg is not None
            dc_h = split(hg, cu_seqlens, chunk_size) - 0.5 * (c.k * inside).sum(-1)
        km, vdo = c.k @ d.m.transpose(-1, -2), mask_ut * (c.v @ d.do.transpose(-1, -2))
        dk_u = dk_u + vdo @ d.m
        dv = dv + (mask_ut * km) @ d.do
        if g is not None:
            pairs = (km * vdo).triu(1)  # of a token's own key nothing is left
            dc_u = c.c_u.exp() * ((d.m @ u) * d.do).sum(-1) + pairs.sum(-2) - pairs.sum(-1)
    dk = dk_h + dk_u
    dbeta = k.new_empty(0, dtype=dtype)
    if c.beta is not None:
        dbeta = join((dk * c.raw_k).sum(-1) + (dv * c.raw_v).sum(-1), B, T, cu_seqlens)
        dk, dv = dk * c.beta, dv * c.beta

    def decay(start: Tensor, key_end: Tensor, dc: Tensor | None) -> Tensor:
        """What later chunks pull out of the start state and of the keys before each token, and what this one does."""
        total = start.unsqueeze(-1) + key_end.cumsum(-1) - key_end
        return join(total if dc is None else total + dc.flip(-1).cumsum(-1).flip(-1), B, T, cu_seqlens)

    dg = dgk = k.new_empty(0, dtype=dtype)
    if gk is not None:
        dgk = decay(gamma[..., -1, 0] * (dh * h).sum((-1, -2)), (c.k * k_end).sum(-1), dc_h)
    if g is not None:
        dg = decay(c.c_u[..., -1].exp() * (du * u).sum((-1, -2)), (c.k * k_w).sum(-1), dc_u)

    def reduce(t: Tensor, like: Tensor) -> Tensor:
        t = join(t, B, T, cu_seqlens)
        return t.unflatten(2, (Hk, groups)).sum(3).to(like.dtype)

    return reduce(dk, k), reduce(dv, v), dg, dgk, dbeta


def chunk_bwd(
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
) -> tuple[Tensor, ...]:
    """All at once, not in pieces: (dq, dk, dv, dg, dgk, dalpha, dbeta, dh0, du0); see ``ops.chunk_bwd``."""
    h_chunks, u_chunks, scales, _, _ = chunk_state(k, v, g, gk, beta, h0, u0, cu_seqlens, num_heads, chunk_size)
    dq = k.new_empty(0)
    dalpha = dq.to(compute_dtype(k))
    y = y_scale = eta = hg = None
    if do is not None:
        assert q is not None and x is not None and x_scale is not None and phi is not None
        dq, dalpha, y, y_scale, eta, hg = chunk_output_bwd(
            *(do, q, k, v, g, gk, alpha, beta, h_chunks, u_chunks, scales, x, x_scale, phi),
            *(cu_seqlens, scale, ridge_ratio, num_iter, chunk_size),
        )
    dh_chunks, du_chunks, dscales, dh0, du0 = chunk_state_bwd(
        *(k, v, g, gk, beta, h_chunks, scales, do, q, alpha, x, x_scale, y, y_scale, eta),
        *(dh_out, du_out, cu_seqlens, scale, num_heads, chunk_size),
    )
    cotangents = (dh_chunks, du_chunks, dscales, do, q, alpha, x, x_scale, y, y_scale, eta, hg)
    dk, dv, dg, dgk, dbeta = chunk_grads(
        k, v, g, gk, beta, h_chunks, u_chunks, scales, *cotangents, cu_seqlens, scale, num_heads, chunk_size
    )
    return dq, dk, dv, dg, dgk, dalpha, dbeta, dh0, du0


# ---------------------------------------------------------------------------------------------------------------------------
# step


def step(
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
    series: Series = chebyshev_series,
) -> tuple[Tensor, Tensor, Tensor]:
    """One token: (o, new h, new u); see ``ops.step``."""
    dtype, groups = compute_dtype(q), q.shape[1] // k.shape[1]
    qs, ks, vs = q.to(dtype), k.to(dtype), v.to(dtype)
    if groups > 1:
        ks, vs = ks.repeat_interleave(groups, 1), vs.repeat_interleave(groups, 1)
    if beta is not None:
        b = beta.to(dtype).unsqueeze(-1)
        ks, vs = ks * b, vs * b
    h = h if gk is None else h * gk.to(dtype).exp()[..., None, None]
    u = u if g is None else u * g.to(dtype).exp()[..., None, None]
    h = h + ks.unsqueeze(-1) * ks.unsqueeze(-2)
    u = u + ks.unsqueeze(-1) * vs.unsqueeze(-2)
    square = h.square().sum((-1, -2))[..., None]
    phi = torch.where(square < 64 * torch.finfo(dtype).tiny, 0.0, square).sqrt()  # squares of smaller entries lose their digits
    x = series(_z_step, (2 * reciprocal(phi), h), qs, ridge_ratio, num_iter) * reciprocal(phi)
    r = _readout(qs, None if alpha is None else alpha.to(dtype).unsqueeze(-1), x)
    o = scale * (r.m.unsqueeze(-2) @ u).squeeze(-2)
    return o.to(q.dtype), h, u
