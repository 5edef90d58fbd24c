"""The portable form for GPUs: the forward ops in standard ops, where launches count and arithmetic does not.

It computes what the reference computes, arranged as few, large, batched matrix products.

**Chunk states.**  S_c = Σ_{j≤c} exp(Σ_{j≤i<c} L_i) x_j, with x_0 the initial state, x_j what chunk j adds and L_i the log decay of
chunk i: one masked matrix product over the chunks.  It is quadratic in their number, with so small a factor that it costs less
than the solve up to 250 000 tokens; a loop would be one short step per chunk, each waiting for the one before.

**Chunk solve.**  Every H_t of a chunk is a sum of matrices of unit norm, H_t = w_t0 P + Σ_j w_tj k̃_j k̃_jᵀ, with P = H_c/‖H_c‖ of
the chunk's start and k̃_j its unit keys.  The weights are decays times norms, and ‖H_t‖² = w_t N w_tᵀ, N the inner products of those
matrices.  So H_t y = (w_t ∘ [y | y K̃ᵀ]) [P; K̃], and iterating on the wide ỹ = [y | y K̃ᵀ] makes that *one* product for all tokens
of all chunks, ỹ ← (w ∘ ỹ) M with M = [P; K̃] [I | K̃ᵀ], and an element-wise rest that runtimes fuse.  All operands are O(1)
whatever the size of keys and states, so float16 products are safe.  It rounds no worse: y K̃ᵀ is carried along, not formed by
cancellation.

**Step.**  There H is one matrix for one right-hand side, and T_2m = 2 T_m² − 1 turns thirty dependent products into six.  The sum
becomes one of products T_16^b4 T_8^b3 T_4^b2 T_2^b1 T_1^b0 with constant coefficients.  Its terms c q are rows of one matrix; a
product with T_2 adds those of b1 = 1 to the others, T_4, T_8, ... do the same, T_1 at last, and one row is left.  Above the rows
each product has T_m itself, which it squares.  −Z = I − Y, Y = 2H/φ, and all T_m are held as I − T_m, which keeps the digits of
small eigenvalues.  T_1 could come first, in five products, but along the keys, where x is small and U is read, its terms cancel,
and what comes after adds its rounding to a small number: o of a first token is off by 6e-5 then, and by 7e-6 as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gka_compile.custom_ops.polynomial import chebyshev_coefficients
from gka_compile.custom_ops.reference import LEAST_DECAY, compute_dtype, load_states, reciprocal, storage_dtype, store_states

__all__ = ["chunk_output", "chunk_state", "decays_between", "step"]


# --- the polynomial ----------------------------------------------------------------------------------------------------------


def _coefficients(ridge_ratio: float, num_iter: int) -> list[float]:
    """Of φx = Σ_n c_n T_n(−Z) q: without the signs that alternate in Z, all are positive."""
    return [abs(c) for c in chebyshev_coefficients(ridge_ratio, num_iter)]


def _clenshaw(product: Callable[[Tensor], Tensor], terms: Sequence[Tensor]) -> Tensor:
    """Σ_n T_n(I − Y) r_n of the terms r_0, r_1, ..., where product(x) is 2 Y x.

    Clenshaw's recurrence in differences (Reinsch): it keeps the digits of small eigenvalues of Y, and it is the shortest.
    """
    first, *rest = terms
    if not rest:
        return first
    b = d = rest.pop()
    for r in reversed(rest):
        d = d + r - product(b)
        b = b + d
    return first + d - product(b) / 2


# --- chunks ------------------------------------------------------------------------------------------------------------------


def _norm(x: Tensor, *dims: int) -> Tensor:
    return x.square().sum(dims, keepdim=True).sqrt()


def _split(x: Tensor, chunk_size: int) -> Tensor:
    """[B, T, H, ...] to chunks [B, H, n, C, ...]; rows past the end are zero."""
    T = x.shape[1]
    n = (T + chunk_size - 1) // chunk_size
    x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, n * chunk_size - T))
    return x.reshape(x.shape[0], n, chunk_size, *x.shape[2:]).movedim(3, 1)


def _join(x: Tensor, B: int, H: int, T: int) -> Tensor:
    """The inverse of :func:`_split` for flat chunks [B·H·n, C, ...]."""
    return x.unflatten(0, (B, H, -1)).movedim(1, 3).flatten(1, 2)[:, :T]


def _expand(x: Tensor, beta: Tensor | None, num_heads: int) -> Tensor:
    """k or v in chunks [B, Hk, n, C, X], times beta [B, H, n, C], for each of H heads: [B, H, n, C, X]."""
    Hk = x.shape[1]
    if Hk == num_heads:
        return x if beta is None else x * beta.unsqueeze(-1)
    if beta is None:
        return x.unsqueeze(2).expand(-1, -1, num_heads // Hk, -1, -1, -1).flatten(1, 2)
    return (x.unsqueeze(2) * beta.unflatten(1, (Hk, num_heads // Hk)).unsqueeze(-1)).flatten(1, 2)


def _running(g: Tensor | None, k: Tensor) -> Tensor:
    """The running log decay of each chunk, shaped as k [..., C, X] without X; as a product, for a cumsum may be run as a loop."""
    if g is None:
        return torch.zeros_like(k[..., 0])
    C = k.shape[-2]
    total = _split(g.to(k.dtype).clamp(min=LEAST_DECAY[k.dtype]), C) @ torch.ones(C, C, dtype=k.dtype, device=k.device).triu()
    return total.reshape(k.shape[:-1])


def decays_between(total: Tensor) -> Tensor:
    """exp(Σ_{j≤i<c} L_i) [..., n + 1, n + 1] at row c and column j ≤ c, else 0, of the chunks' log decays L [..., n].

    Every sum by itself: differences of running sums would lose digits in long sequences.
    """
    i = torch.arange(total.shape[-1] + 1, device=total.device)
    before = (i[:-1] < i.unsqueeze(-1)).to(total.dtype)
    return _masked_exp((before * total.unsqueeze(-2)) @ (i[:-1].unsqueeze(-1) >= i).to(total.dtype))


def _masked_exp(x: Tensor) -> Tensor:
    """exp(x_tj) for j ≤ t, else 0."""
    t, j = (torch.arange(n, device=x.device) for n in x.shape[-2:])
    return x.masked_fill(j > t.unsqueeze(-1), float("-inf")).exp()


def chunk_state(
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    gk: Tensor | None,
    beta: Tensor | None,
    h0: Tensor | None,
    u0: Tensor | None,
    cu_seqlens: None,
    num_heads: int,
    chunk_size: int,
) -> tuple[Tensor, ...]:
    """``ops.chunk_state``."""
    dtype = compute_dtype(k)
    bc = None if beta is None else _split(beta.to(dtype), chunk_size)
    kc, vc = (_expand(_split(x.to(dtype), chunk_size), bc, num_heads) for x in (k, v))

    def states(decay: Tensor | None, x: Tensor, initial: Tensor | None) -> tuple[Tensor, Tensor]:
        c = _running(decay, kc)
        end = c[..., -1:]
        added = (kc * (end - c).exp().unsqueeze(-1)).transpose(-1, -2) @ x
        first = torch.zeros_like(added[:, :, :1]) if initial is None else initial.to(dtype).unsqueeze(2)
        terms = torch.cat([first, added], 2)  # [B, H, n + 1, K, X]
        result = (decays_between(end.squeeze(-1)) @ terms.flatten(3)).unflatten(3, terms.shape[3:])
        return result[:, :, :-1].transpose(1, 2).flatten(0, 1), result[:, :, -1]

    (h_chunks, h_out), (u_chunks, u_out) = states(gk, kc, h0), states(g, vc, u0)
    return *store_states(h_chunks, u_chunks, storage_dtype(k)), h_out, u_out


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
    cu_seqlens: None,
    scale: float,
    ridge_ratio: float,
    num_iter: int,
    chunk_size: int,
    *,
    mixed: bool,
) -> tuple[Tensor, ...]:
    """``ops.chunk_output``."""
    (B, T, H, K), dtype = q.shape, compute_dtype(q)
    bc = None if beta is None else _split(beta.to(dtype), chunk_size)
    # from here on one batch of chunks [B·H·n, C, ...]
    kc, vc = (_expand(_split(x.to(dtype), chunk_size), bc, H).flatten(0, 2) for x in (k, v))
    qc = _split(q.to(dtype), chunk_size).flatten(0, 2)
    h, u = (x.unflatten(0, (B, -1)).transpose(1, 2).flatten(0, 2) for x in load_states(h_chunks, u_chunks, state_scales))

    size, length, q_length = _norm(h, -1, -2), _norm(kc, -1), _norm(qc, -1)
    unit = kc * reciprocal(length)
    unit_t = unit.transpose(-1, -2)
    start = h * reciprocal(size)

    def extended(y: Tensor) -> Tensor:
        return torch.cat([y, y @ unit_t], -1)

    m = extended(torch.cat([start, unit], -2))
    cross = (unit_t * m[:, :K, K:]).sum(-2).unsqueeze(-1)  # k̃_jᵀ P k̃_j
    gram = m[:, K:, K:].square()

    def decays(g: Tensor | None) -> tuple[Tensor, Tensor]:
        """γ_t [.., C, 1] and D_tj [.., C, C]."""
        c = _running(g, kc)
        return c.exp().unsqueeze(-1), _masked_exp(c.unsqueeze(-1) - c.unsqueeze(-2))

    def joined(first: Tensor, others: Tensor) -> Tensor:
        """Weights of what stands in [P; K̃] or [U; V]: [.., C, K + C]."""
        return torch.cat([first.expand(-1, -1, K), others], -1)

    gamma_h, decay_h = decays(gk)
    gamma_u, decay_u = (gamma_h, decay_h) if g is gk else decays(g)
    w0, w = gamma_h * size, decay_h * length.square().transpose(-1, -2)
    square = w0.square() + 2 * w0 * (w @ cross) + ((w @ gram) * w).sum(-1, keepdim=True)
    phi = square.clamp(min=0).sqrt()
    inverse = reciprocal(phi)
    gain, right = joined(w0, w) * (4 * inverse), m.half() if mixed else m

    def product(y: Tensor) -> Tensor:
        """[4H_t/φ_t y_t | the same K̃ᵀ] for every row t."""
        return ((gain * y).to(right.dtype) @ right).to(dtype)

    y = extended(qc * reciprocal(q_length))
    x = _clenshaw(product, [c * y for c in _coefficients(ridge_ratio, num_iter)])
    x_scale = q_length * inverse
    read = x * x_scale
    if alpha is not None:
        ac = _split(alpha.to(dtype), chunk_size).flatten(0, 2).unsqueeze(-1)
        read = ac * read + (1 - ac) * q_length * y
    o = scale * ((joined(gamma_u, decay_u) * read) @ torch.cat([u, length * vc], -2))
    return (
        _join(o, B, H, T).to(q.dtype),
        _join(x[..., :K], B, H, T).to(storage_dtype(q)),
        _join(x_scale.squeeze(-1), B, H, T),
        _join(phi.squeeze(-1), B, H, T),
    )


# --- step --------------------------------------------------------------------------------------------------------------------


def _factored(d: Sequence[float]) -> list[float]:
    """e with Σ_j d_j T_j(z) = Σ_b e_b Π_i T_{2^i}(z), i over the bits of b that are set; bits 1, 2, ..., 0 of b make the order."""
    if len(d) == 2:
        return list(d)
    m = len(d) // 2
    low, high = list(d[:m]), [d[m], *(2 * x for x in d[m + 1 :])]  # T_{m+j} = 2 T_m T_j − T_{m−j}
    for j in range(1, m):
        low[m - j] -= d[m + j]
    halves = _factored(low), _factored(high)
    return [e for i in range(0, m, 2) for half in halves for e in half[i : i + 2]]


def _solve_step(y: Tensor, q: Tensor, ridge_ratio: float, num_iter: int) -> Tensor:
    """φx of one token per head, q [B, H, 1, K], y = 2H/φ [B, H, K, K]."""
    c = _coefficients(ridge_ratio, num_iter)
    terms = _factored(c + [0.0] * ((1 << num_iter.bit_length()) - len(c)))
    # no tensor of constants, which torch.export does not take in a decomposition, but what runtimes fold to one
    x = torch.cat([q.new_full((1, 1), e) for e in terms]) * q

    def add_halves(x: Tensor, p: Tensor) -> Tensor:
        low, high = x.chunk(2, -2)
        return low + high - high @ p

    if num_iter > 1:
        p = 4 * y - 2 * (y @ y)  # I − T_m(−Z) for m = 2, 4, …
        while x.shape[-2] > 4:
            low, high = x.chunk(2, -2)
            square, product = (torch.cat([p, high], -2) @ p).split([p.shape[-2], high.shape[-2]], -2)
            x, p = low + high - product, 4 * p - 2 * square
        x = add_halves(x, p)
    return add_halves(x, y)


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
) -> tuple[Tensor, ...]:
    """``ops.step``."""
    dtype, H = compute_dtype(q), q.shape[1]
    # a chunk of one token: rows [B, H, 1, X]
    b = None if beta is None else beta.to(dtype)[..., None, None]
    kr, vr = (_expand(x.to(dtype)[:, :, None, None], b, H).squeeze(2) for x in (k, v))
    qr = q.to(dtype).unsqueeze(2)
    column = kr.transpose(-1, -2)
    h = (h if gk is None else h * gk.to(dtype).exp()[..., None, None]) + column * kr
    u = (u if g is None else u * g.to(dtype).exp()[..., None, None]) + column * vr
    inverse = reciprocal(_norm(h, -1, -2))
    x = _solve_step(2 * inverse * h, qr, ridge_ratio, num_iter) * inverse
    m = x if alpha is None else qr + alpha.to(dtype)[..., None, None] * (x - qr)
    return (scale * (m @ u)).squeeze(2).to(q.dtype), h, u
