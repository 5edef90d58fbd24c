"""The two kinds of layer of the language model: pre-norm, a mixer (GKA or attention), pre-norm, a SwiGLU MLP.

A block has three entrances to the same function: ``forward`` for whole sequences in training, ``extend`` for any number of tokens
after a state, ``step`` for one token after a state.  A state is a dict of tensors, here without the number of the layer;
``state_shapes`` leaves out the batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cache import GKACache
from ..functional import GKAState
from ..layer import GatedKalmaNet, RMSNorm, exact
from .config import ModelConfig

__all__ = ["AttentionBlock", "Block", "GKABlock", "Place", "place"]

State = dict[str, Tensor]


class Place(NamedTuple):
    """What attention needs to know of where T tokens stand."""

    positions: Tensor  # [B or 1, T]
    cos: Tensor  # [B or 1, 1, T, head_dim / 2]
    sin: Tensor


def place(positions: Tensor, config: ModelConfig, dtype: torch.dtype) -> Place:
    """Rotary angles at int64 positions [B, T], computed where they are needed: a buffer of them would be rounded by ``.to()``."""
    half = torch.arange(config.head_dim // 2, device=positions.device, dtype=exact(dtype))
    frequencies = config.rope_theta ** (-half / (config.head_dim // 2))
    angles = (positions.to(exact(dtype)).unsqueeze(-1) * frequencies).unsqueeze(1)
    return Place(positions, angles.cos(), angles.sin())


def _rotate(x: Tensor, at: Place) -> Tensor:
    """Rotary embedding of x [B, heads, T, head_dim], first half against second as in Llama and Qwen."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * at.cos - b * at.sin, b * at.cos + a * at.sin], -1).to(x.dtype)


class MLP(nn.Module):
    """down(silu(gate(x)) · up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class Attention(nn.Module):
    """Causal softmax attention as in Qwen3: grouped heads, RMS norms of q and k, rotary positions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.grouped = config.num_heads != config.num_kv_heads
        query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key, bias=False)
        self.o_proj = nn.Linear(query, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def heads(self, x: Tensor, at: Place) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, H, T, D], k and v [B, Hk, T, D] of x [B, T, hidden_size]."""
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2)
        return _rotate(q, at), _rotate(k, at), v.transpose(1, 2)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
        """Causal attention, or over what is ``visible`` [B, 1, T, S]."""
        o = F.scaled_dot_product_attention(q, k, v, visible, is_causal=visible is None, enable_gqa=self.grouped)
        y: Tensor = self.o_proj(o.transpose(1, 2).flatten(-2))
        return y

    def forward(self, x: Tensor, at: Place) -> Tensor:
        return self.mix(*self.heads(x, at), None)


class Block(nn.Module):
    """What both kinds share: norms and MLP."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    def add(self, x: Tensor, mixed: Tensor) -> Tensor:
        """The residual stream after the mixer's output and the MLP."""
        x = x + mixed
        y: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return y


class GKABlock(Block):
    """A layer whose mixer is :class:`.GatedKalmaNet`. Its state: h_state, u_state, conv_state."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.gka = GatedKalmaNet(
            *(config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim),
            conv_size=config.conv_size,
            norm_eps=config.norm_eps,
            num_iter=config.num_iter,
            ridge_ratio=config.ridge_ratio,
        )

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        states = (self.gka.num_heads, self.gka.head_dim, self.gka.head_dim)
        return {"h_state": states, "u_state": states, "conv_state": (self.gka.conv_channels, self.gka.conv_size - 1)}

    def init_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        return _to_state(self.gka.init_cache(batch_size, device, dtype))

    def forward(self, x: Tensor, at: Place) -> Tensor:
        return self.add(x, self.gka(self.input_layernorm(x))[0])

    def extend(self, x: Tensor, state: State, at: Place) -> tuple[Tensor, State]:
        y, cache = self.gka(self.input_layernorm(x), cache=_to_cache(state), output_cache=True)
        return self.add(x, y), _to_state(cache)

    def step(self, x: Tensor, state: State, at: Place) -> tuple[Tensor, State]:
        y, cache = self.gka.step(self.input_layernorm(x), _to_cache(state))
        return self.add(x, y), _to_state(cache)


def _to_state(cache: GKACache) -> State:
    return {"h_state": cache.state.h_kk, "u_state": cache.state.h_kv, "conv_state": cache.conv}


def _to_cache(state: State) -> GKACache:
    return GKACache(state["conv_state"], GKAState(state["h_state"], state["u_state"]))


class AttentionBlock(Block):
    """A layer whose mixer is attention. Its state: key_cache and value_cache, max_length long whatever was seen."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.self_attn = Attention(config)

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        caches = (self.config.num_kv_heads, self.config.max_length, self.config.head_dim)
        return {"key_cache": caches, "value_cache": caches}

    def init_state(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> State:
        return {name: torch.zeros(batch_size, *shape, device=device, dtype=dtype) for name, shape in self.state_shapes().items()}

    def forward(self, x: Tensor, at: Place) -> Tensor:
        return self.add(x, self.self_attn(self.input_layernorm(x), at))

    def extend(self, x: Tensor, state: State, at: Place) -> tuple[Tensor, State]:
        q, k, v = self.self_attn.heads(self.input_layernorm(x), at)
        keys, values = state["key_cache"], state["value_cache"]
        where = at.positions[:, None, :, None].expand_as(k)
        keys, values = keys.scatter(2, where, k.to(keys.dtype)), values.scatter(2, where, v.to(values.dtype))
        visible = torch.arange(keys.shape[2], device=x.device) <= at.positions[:, None, :, None]
        mixed = self.self_attn.mix(q, keys, values, visible)
        return self.add(x, mixed), {"key_cache": keys, "value_cache": values}

    def step(self, x: Tensor, state: State, at: Place) -> tuple[Tensor, State]:
        y, state = self.extend(x.unsqueeze(1), state, at)
        return y.squeeze(1), state
