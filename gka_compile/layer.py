"""The Gated KalmaNet layer: projections, short convolution, gates, :func:`.chunk_gka`, gated norm.

Formulas and initialisation are those of the layer released with arXiv 2511.21016, and so are the parameter names: a checkpoint of
it loads as it is, unless it has what is not here, low-rank keys and values (``kv_proj_rank``, ``kv_learnable_residual``), different
numbers of key and value heads, or more of them than query heads.

A sequence may come in any number of pieces: ``forward`` takes a piece of any length and the cache of what came before, ``step``
takes one token.  Both are functions of tensors, and neither changes its inputs.  Sequences of unequal length come padded
(``attention_mask``) or packed (``cu_seqlens``); in both cases each is computed as if it were alone.
"""

from __future__ import annotations

import math
import sys
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import validation
from .cache import GKACache
from .custom_ops.config import NUM_ITER, RIDGE_RATIO
from .functional import GKAState, chunk_gka, step_gka, under_autocast

__all__ = ["GatedKalmaNet", "RMSNorm"]

EPS = 1e-6  # beside ‖q‖, ‖k‖ and β, as in the released layer


def exact(dtype: torch.dtype) -> torch.dtype:
    """The dtype of norms, decays and states: float32, or float64 beside float64."""
    return torch.promote_types(dtype, torch.float32)


class RMSNorm(nn.Module):
    """x / √(mean(x²) + eps) · weight, over the last dimension; with a gate, times silu(gate). Computed in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """x [..., width] and gate of the same shape to [..., width] in x's dtype."""
        dtype = exact(x.dtype)
        y = x.to(dtype)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps) * self.weight.to(dtype)
        if gate is not None:
            y = y * F.silu(gate.to(dtype))
        return y.to(x.dtype)


class _Recurrence(NamedTuple):
    """Arguments of chunk_gka (with T) or step_gka (without)."""

    q: Tensor  # [B, (T,) H, K]
    k: Tensor  # [B, (T,) Hk, K]
    v: Tensor  # [B, (T,) Hk, K]
    g: Tensor | None  # [B, (T,) H], the decay of U
    gk: Tensor | None  # of H
    alpha: Tensor | None
    beta: Tensor | None


class GatedKalmaNet(nn.Module):
    """Gated KalmaNet, the layer of arXiv 2511.21016 as released (awslabs/hybrid-model-factory, there ``GatedKalmaNet`` too).

        q, k, v = silu(conv(W_q x)), silu(conv(W_k x)), silu(conv(W_v x));   q, k ← q/(‖q‖ + ε), k/(‖k‖ + ε) per head
        g = −exp(A_log) · softplus(W_a x + dt_bias)        the log decay of H and of U
        β = σ(W_b x + b) + ε,  α = σ(W_α x + b)
        o = chunk_gka(q, k, v, g, gk=g, α, β)
        y = W_o (RMSNorm(o) · silu(W_g x))

    Args:
        hidden_size: width of x and y.
        num_heads: heads of q, of the gates and of the states.
        num_kv_heads: heads of k and v, a divisor of num_heads; None: num_heads. They are shared, never repeated in memory.
        head_dim: width of every head, a multiple of 8 up to 128.
        conv_size: taps of the causal depthwise convolution, at least 2.
        norm_eps: eps of the output norm.
        num_iter: Chebyshev iterations of the solve, at least 1.
        ridge_ratio: the ridge as a ratio of ‖H‖_F, from 1e-10 to 1e10; named ``ridge_strength`` in released configurations.
        use_beta_gate: False: β = 1.
        use_alpha_connection: False: the solution replaces the query entirely (α = 1).
        use_v_conv: False: v is W_v x, without convolution and silu.
        use_forgetting_gate: False: nothing decays (a_proj, A_log and dt_bias then get no gradient).
        use_forgetting_gate_kk: False: H does not decay.
        gla_rescale: scale of the read-out: head_dim^{-1/2}, or 1 if False.
        use_gate: False: no silu(W_g x) after the norm.

    Parameters, by their names in a checkpoint: q_proj, k_proj, v_proj, a_proj, g_proj, o_proj (weight); b_proj, alpha_proj (weight,
    bias); q_conv1d, k_conv1d, v_conv1d (weight [channels, 1, conv_size]); A_log, dt_bias [num_heads]; o_norm.weight [head_dim].
    Exclude A_log and dt_bias from weight decay. The convolutions' modules hold weights and are never called: parametrizations of
    them work, hooks on them do not run.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int = 128,
        *,
        conv_size: int = 4,
        norm_eps: float = 1e-6,
        num_iter: int = NUM_ITER,
        ridge_ratio: float = RIDGE_RATIO,
        use_beta_gate: bool = True,
        use_alpha_connection: bool = True,
        use_v_conv: bool = True,
        use_forgetting_gate: bool = True,
        use_forgetting_gate_kk: bool = True,
        gla_rescale: bool = True,
        use_gate: bool = True,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        sizes = {"hidden_size": hidden_size, "num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
        check_integers(sizes | {"num_iter": num_iter})
        check_integers({"conv_size": conv_size}, least=2)
        check_heads(num_heads, num_kv_heads, head_dim)
        check_positive({"norm_eps": norm_eps})
        validation.check_ridge_ratio(ridge_ratio)
        flags = {"use_beta_gate": use_beta_gate, "use_alpha_connection": use_alpha_connection, "use_v_conv": use_v_conv}
        flags |= {"use_forgetting_gate": use_forgetting_gate, "use_forgetting_gate_kk": use_forgetting_gate_kk}
        check_flags(flags | {"gla_rescale": gla_rescale, "use_gate": use_gate})
        self.hidden_size, self.num_heads, self.num_kv_heads, self.head_dim = hidden_size, num_heads, num_kv_heads, head_dim
        self.conv_size, self.num_iter, self.ridge_ratio = conv_size, num_iter, float(ridge_ratio)
        self.scale = head_dim**-0.5 if gla_rescale else 1.0
        self.use_forgetting_gate, self.use_forgetting_gate_kk = use_forgetting_gate, use_forgetting_gate_kk

        query, key = num_heads * head_dim, num_kv_heads * head_dim
        self.q_proj = nn.Linear(hidden_size, query, bias=False)
        self.k_proj = nn.Linear(hidden_size, key, bias=False)
        self.v_proj = nn.Linear(hidden_size, key, bias=False)
        self.a_proj = nn.Linear(hidden_size, num_heads, bias=False)
        self.b_proj = nn.Linear(hidden_size, num_heads) if use_beta_gate else None
        self.alpha_proj = nn.Linear(hidden_size, num_heads) if use_alpha_connection else None
        # The three convolutions run as one, so these modules are only where the checkpoint keeps the weights.
        self.q_conv1d = nn.Conv1d(query, query, conv_size, groups=query, bias=False)
        self.k_conv1d = nn.Conv1d(key, key, conv_size, groups=key, bias=False)
        self.v_conv1d = nn.Conv1d(key, key, conv_size, groups=key, bias=False) if use_v_conv else None
        self.conv_channels = query + key + (key if use_v_conv else 0)
        # in float32 whatever the default dtype: 16 bits draw zeros now and then, and such a head would never decay
        A, dt = (torch.empty(num_heads, dtype=torch.float32) for _ in range(2))
        A.uniform_(0, 16).clamp_(min=1e-4)
        dt.uniform_(math.log(1e-3), math.log(1e-1)).exp_()
        default = torch.get_default_dtype()
        self.A_log = nn.Parameter(A.log().to(default))
        self.dt_bias = nn.Parameter((dt + (-torch.expm1(-dt)).log()).to(default))  # softplus(dt_bias) = dt
        self.g_proj = nn.Linear(hidden_size, query, bias=False) if use_gate else None
        self.o_norm = RMSNorm(head_dim, norm_eps)
        self.o_proj = nn.Linear(query, hidden_size, bias=False)

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the weights, and so of inputs (autocast aside) and of ``cache.conv``."""
        return self.q_proj.weight.dtype

    def init_cache(self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> GKACache:
        """The cache before the first token of ``batch_size`` sequences: zeros. device and dtype default to those of the weights."""
        check_integers({"batch_size": batch_size})
        device = self.q_proj.weight.device if device is None else device
        dtype = self.dtype if dtype is None else dtype
        shape = (batch_size, self.num_heads, self.head_dim, self.head_dim)
        h, u = (torch.zeros(shape, device=device, dtype=exact(dtype)) for _ in range(2))
        conv = torch.zeros(batch_size, self.conv_channels, self.conv_size - 1, device=device, dtype=dtype)
        return GKACache(conv, GKAState(h, u))

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        cache: GKACache | None = None,
        output_cache: bool = False,
    ) -> tuple[Tensor, GKACache | None]:
        """All tokens of a piece of each sequence.

        Args:
            hidden_states: x [B, T, hidden_size] in the dtype of the weights, or any floating dtype under autocast; T ≥ 0.
            attention_mask: [B, T] bool or integer, nonzero at tokens and zero at padding, which may stand anywhere in a row.
                Padding changes neither outputs of tokens nor the cache; its own outputs are zero. None: tokens only.
            cu_seqlens: bounds [N + 1] of sequences packed along T, int32 or int64, from 0 to T; then B = 1 and no mask.
            cache: what came before, for B (packed: N) sequences. None: nothing.
            output_cache: return the cache after this piece.

        Returns:
            y [B, T, hidden_size], and the new :class:`GKACache`, or None.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        self._check_hidden(hidden_states, 3, "[B,T,hidden_size]")
        N = _check_layout(hidden_states, attention_mask, cu_seqlens)
        if cache is not None:
            self._check_cache(cache, hidden_states, N)
        x, lengths, place, valid = hidden_states, None, None, None
        if attention_mask is not None:
            place, lengths = _compaction(attention_mask)
            place = place.unsqueeze(-1).expand_as(x)
            valid = (torch.arange(x.shape[1], device=x.device) < lengths.unsqueeze(-1)).unsqueeze(-1)
            x = torch.zeros_like(x).scatter(1, place, x).masked_fill(~valid, 0)
        mixed, conv = self._convolve(self._projected(x), None if cache is None else cache.conv, lengths, cu_seqlens)
        r = self._recurrence(x, mixed, valid)
        o, state = chunk_gka(
            *(r.q, r.k, r.v, r.g, r.gk, r.alpha, self.scale, self.ridge_ratio, self.num_iter),
            *(None if cache is None else cache.state, output_cache, cu_seqlens),
            beta=r.beta,
        )
        y = self._read_out(o, x)
        if place is not None and valid is not None:
            y = y.masked_fill(~valid, 0).gather(1, place)
        if state is None:
            return y, None
        return y, GKACache(conv.to(self.dtype if cache is None else cache.conv.dtype), state)

    def step(self, hidden_states: Tensor, cache: GKACache) -> tuple[Tensor, GKACache]:
        """One token of each of B sequences: x [B, hidden_size] and the cache to y [B, hidden_size] and the new cache.

        The same function as ``forward`` at T = 1, by :func:`.step_gka`.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        self._check_hidden(hidden_states, 2, "[B,hidden_size]")
        self._check_cache(cache, hidden_states, hidden_states.shape[0])
        x = self._projected(hidden_states).unsqueeze(1)
        mixed, conv = self._convolve(x, cache.conv, None, None)
        r = self._recurrence(hidden_states, mixed.squeeze(1))
        o, state = step_gka(
            *(r.q, r.k, r.v, cache.state, r.g, r.gk, r.alpha, self.scale, self.ridge_ratio, self.num_iter), beta=r.beta
        )
        return self._read_out(o, hidden_states), GKACache(conv.to(cache.conv.dtype), state)

    # --- from x to the arguments of the recurrence, and back ---

    def _projected(self, x: Tensor) -> Tensor:
        """What is convolved: [..., channels] of q, k and (where it is convolved) v."""
        parts = [self.q_proj(x), self.k_proj(x)]
        if self.v_conv1d is not None:
            parts.append(self.v_proj(x))
        return torch.cat(parts, -1)

    def _filter(self, x: Tensor) -> Tensor:
        """silu of the causal convolution of [B, L + conv_size − 1, channels]: [B, L, channels].

        A sum over taps: F.conv1d picks its backend by the sizes, and so makes ``torch.compile`` specialise to one length.
        """
        convolutions = [self.q_conv1d, self.k_conv1d, *([] if self.v_conv1d is None else [self.v_conv1d])]
        dtype, length = exact(x.dtype), x.shape[1] - self.conv_size + 1
        taps = torch.cat([c.weight for c in convolutions]).squeeze(1).to(dtype)
        wide = x.to(dtype)
        y = wide[:, :length] * taps[:, 0]
        for i in range(1, self.conv_size):
            y = y + wide[:, i : i + length] * taps[:, i]
        return F.silu(y).to(x.dtype)

    def _convolve(
        self, x: Tensor, history: Tensor | None, lengths: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Convolve [B, T, channels] after ``history``: the result, likewise, and the last conv_size − 1 inputs of each sequence."""
        B, T, C = x.shape
        N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
        recent = torch.arange(self.conv_size - 1, device=x.device)
        past = x.new_zeros(N, self.conv_size - 1, C) if history is None else history.transpose(1, 2).to(x.dtype)
        if cu_seqlens is None:
            padded = torch.cat([past, x], 1)
            if lengths is None:
                last = padded[:, T:]
            else:
                last = padded.gather(1, (lengths.unsqueeze(-1) + recent).unsqueeze(-1).expand(-1, -1, C))
            return self._filter(padded), last.transpose(1, 2).contiguous()
        # Every sequence moves conv_size − 1 rows further than the one before it, which leaves room for its past.
        bounds, token = cu_seqlens.long(), torch.arange(T, device=x.device)
        shift = torch.arange(N, device=x.device) * (self.conv_size - 1)
        first = token + shift[torch.searchsorted(bounds, token, right=True) - 1]  # the oldest row that a token sees
        before = (bounds[:-1] + shift).unsqueeze(-1) + recent
        padded = x.new_zeros(T + N * (self.conv_size - 1), C).index_copy(0, first + self.conv_size - 1, x[0])
        padded = padded.index_copy(0, before.flatten(), past.flatten(0, 1))
        last = padded[(bounds[1:] + shift).unsqueeze(-1) + recent]
        return self._filter(padded[None])[:, first], last.transpose(1, 2).contiguous()

    def _recurrence(self, x: Tensor, mixed: Tensor, valid: Tensor | None = None) -> _Recurrence:
        """Heads, norms and gates of x [..., hidden_size] and its convolution; nothing enters or decays where not ``valid``."""
        query, key = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        if self.v_conv1d is None:
            (q, k), v = mixed.split([query, key], -1), self.v_proj(x)
        else:
            q, k, v = mixed.split([query, key, key], -1)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))
        q, k = _unit(q), _unit(k)
        dtype = exact(q.dtype)
        g = alpha = beta = None
        if self.use_forgetting_gate:
            g = -self.A_log.to(dtype).exp() * F.softplus(self.a_proj(x).to(dtype) + self.dt_bias.to(dtype))
        if self.b_proj is not None:
            beta = self.b_proj(x).to(dtype).sigmoid() + EPS
        if self.alpha_proj is not None:
            alpha = self.alpha_proj(x).to(dtype).sigmoid()
        if valid is not None:
            k, v = (t.masked_fill(~valid.unsqueeze(-1), 0) for t in (k, v))
            g = None if g is None else g.masked_fill(~valid, 0)
        return _Recurrence(q, k, v.to(q.dtype), g, g if self.use_forgetting_gate_kk else None, alpha, beta)

    def _read_out(self, o: Tensor, x: Tensor) -> Tensor:
        gate = None if self.g_proj is None else self.g_proj(x).unflatten(-1, (-1, self.head_dim))
        return self.o_proj(self.o_norm(o, gate).flatten(-2))

    # --- checks ---

    def _check_hidden(self, x: Any, rank: int, symbols: str) -> None:
        validation.check_tensor("hidden_states", x)
        if x.dim() != rank or x.shape[-1] != self.hidden_size:
            raise ValueError(f"hidden_states: expected shape {symbols} with hidden_size = {self.hidden_size}, got {tuple(x.shape)}")
        if x.device != self.q_proj.weight.device:
            raise ValueError(f"hidden_states: expected device {self.q_proj.weight.device} (the weights'), got {x.device}")
        if under_autocast(x.device, self.dtype):
            if not x.is_floating_point():
                raise TypeError(f"hidden_states: expected a floating dtype, got {x.dtype}")
        elif x.dtype != self.dtype:
            raise TypeError(f"hidden_states: expected dtype {self.dtype} (the weights'), got {x.dtype}")

    def _check_cache(self, cache: Any, x: Tensor, N: int) -> None:
        if not isinstance(cache, GKACache):
            raise TypeError(f"cache: expected a GKACache, got {type(cache).__name__}")
        validation.check_tensor("cache.conv", cache.conv)
        validation.check_shape("cache.conv", cache.conv, (N, self.conv_channels, self.conv_size - 1), "[N,channels,conv_size-1]")
        if cache.conv.dtype != self.dtype:
            raise TypeError(f"cache.conv: expected dtype {self.dtype} (the weights'), got {cache.conv.dtype}")
        if cache.conv.device != x.device:
            raise ValueError(f"cache.conv: expected device {x.device} (hidden_states'), got {cache.conv.device}")
        sizes = (N, self.num_heads, self.head_dim, self.head_dim)
        validation.check_state("cache.state", cache.state, self.q_proj.weight, *sizes, "the weights'")


def _unit(x: Tensor) -> Tensor:
    y = x.to(exact(x.dtype))
    return (y / (torch.linalg.vector_norm(y, dim=-1, keepdim=True) + EPS)).to(x.dtype)


def _compaction(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Where every column goes [B, T] so that a row's tokens come first, in order, and its padding after; and the counts [B]."""
    token = mask != 0
    before = token.cumsum(1)
    lengths = before[:, -1] if mask.shape[1] else before.sum(1)
    padding_before = (~token).cumsum(1)
    return torch.where(token, before, lengths.unsqueeze(-1) + padding_before) - 1, lengths


def _check_layout(x: Tensor, attention_mask: Any, cu_seqlens: Any) -> int:
    """Check the mask and the bounds; the number of sequences."""
    B, T, _ = x.shape
    if attention_mask is not None:
        if cu_seqlens is not None:
            raise ValueError("attention_mask: expected None beside cu_seqlens (packed sequences have no padding), got both")
        validation.check_tensor("attention_mask", attention_mask)
        if attention_mask.is_floating_point() or attention_mask.is_complex():
            raise TypeError(f"attention_mask: expected a bool or integer dtype, got {attention_mask.dtype}")
        validation.check_shape("attention_mask", attention_mask, (B, T), "[B,T]")
        if attention_mask.device != x.device:
            raise ValueError(f"attention_mask: expected device {x.device} (hidden_states'), got {attention_mask.device}")
    return B if cu_seqlens is None else validation.check_cu_seqlens(cu_seqlens, B, T, x)


def check_integers(values: dict[str, Any], least: int = 1) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
            raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")


def check_flags(values: dict[str, Any]) -> None:
    for name, value in values.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")


def check_positive(values: dict[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}: expected a float, got {type(value).__name__}")
        if not 0 < value <= sys.float_info.max:
            raise ValueError(f"{name}: expected a positive number, got {value}")


def check_heads(num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    if num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads: expected a divisor of num_heads = {num_heads}, got {num_kv_heads}")
    if head_dim % 8 or head_dim > 128:
        raise ValueError(f"head_dim: expected a multiple of 8 from 8 to 128, got {head_dim}")
