"""A decoder-only language model over bytes, with GKA and attention layers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..layer import RMSNorm, check_integers, exact
from ..tokens import check_sampling, check_tokens, choose
from .blocks import AttentionBlock, GKABlock, State, place
from .config import ATTENTION, ModelConfig

__all__ = ["ByteLM"]

Advance = Callable[[Tensor, State], tuple[Tensor, State]]
CONFIG, WEIGHTS = "config.json", "model.safetensors"


class ByteLM(nn.Module):
    """Bytes in, logits of the next byte out.

    Training goes through :meth:`forward`.  Generation goes through :meth:`prefill` and :meth:`step`, functions of (tokens, state)
    that change neither, compile and export with dynamic batch and length, and compute the same numbers as ``forward``.

    A state is a dict of tensors, in this order: for each GKA layer i ``h_state_i`` [B, H, K, K] and ``u_state_i`` [B, H, K, K] in
    float32 and ``conv_state_i`` [B, channels, conv_size − 1]; for each attention layer i ``key_cache_i`` and ``value_cache_i``
    [B, Hk, max_length, K]; and ``position`` [B] int64, the number of tokens consumed.  Only attention layers limit that, to
    max_length: :meth:`generate` checks it, callers of ``prefill`` and ``step`` must (to read ``position`` is to wait for the
    device); what happens past it is undefined, an index error at best.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if not isinstance(config, ModelConfig):
            raise TypeError(f"config: expected a ModelConfig, got {type(config).__name__}")
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            AttentionBlock(config) if kind == ATTENTION else GKABlock(config) for kind in config.layer_types
        )
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = None if config.tie_word_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        nn.init.normal_(
            self.embed_tokens.weight, std=0.02
        )  # as the head it gives nearly even odds: training starts at log(vocab_size)

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the weights."""
        return self.embed_tokens.weight.dtype

    # --- training ---

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, T, vocab_size] in float32 after every token of [B, T] int64, T ≥ 1.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        check_tokens("tokens", tokens, "[B,T]")
        at = place(torch.arange(tokens.shape[1], device=tokens.device)[None], self.config, self.dtype)
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, at)
        return self._logits(x)

    def _logits(self, x: Tensor) -> Tensor:
        head = self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        return F.linear(self.norm(x), head).to(exact(self.dtype))

    # --- generation ---

    def init_state(self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> State:
        """The state before the first token. device and dtype default to the weights'; h_state and u_state keep float32 or wider.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        check_integers({"batch_size": batch_size})
        device = self.embed_tokens.weight.device if device is None else torch.device(device)
        dtype = self.dtype if dtype is None else dtype
        state: State = {}
        for i, layer in enumerate(self._blocks()):
            state |= {f"{name}_{i}": x for name, x in layer.init_state(batch_size, device, dtype).items()}
        return state | {"position": torch.zeros(batch_size, device=device, dtype=torch.int64)}

    def prefill(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """Consume [B, T] tokens, T ≥ 1, after any state: the logits [B, vocab_size] after the last one, and the new state.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        check_tokens("tokens", tokens, "[B,T]")
        self._check_state(state, tokens)
        positions = state["position"].unsqueeze(-1) + torch.arange(tokens.shape[1], device=tokens.device)
        x = self.embed_tokens(tokens)
        new: State = {}
        at = place(positions, self.config, self.dtype)
        for i, layer in enumerate(self._blocks()):
            x, part = layer.extend(x, _of_layer(state, i), at)
            new |= {f"{name}_{i}": t for name, t in part.items()}
        return self._logits(x[:, -1]), new | {"position": state["position"] + tokens.shape[1]}

    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """Consume one token of each sequence, [B]: the logits [B, vocab_size] after it, and the new state.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        check_tokens("tokens", tokens, "[B]")
        self._check_state(state, tokens)
        x = self.embed_tokens(tokens)
        new: State = {}
        at = place(state["position"].unsqueeze(-1), self.config, self.dtype)
        for i, layer in enumerate(self._blocks()):
            x, part = layer.step(x, _of_layer(state, i), at)
            new |= {f"{name}_{i}": t for name, t in part.items()}
        return self._logits(x), new | {"position": state["position"] + 1}

    @torch.no_grad()
    def generate(
        self,
        prompt: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
        state: State | None = None,
        prefill: Advance | None = None,
        step: Advance | None = None,
    ) -> Tensor:
        """Continue [B, T] int64 tokens (T ≥ 1) by max_new_tokens.

        Args:
            temperature: 0 takes the likeliest token; above, tokens are drawn from softmax(logits / temperature).
            generator: source of the draws; None: torch's global one.
            state: what came before the prompt; None: nothing.
            prefill, step: stand-ins for the methods of these names, say compiled ones.

        Returns:
            The new tokens [B, max_new_tokens].

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        check_tokens("prompt", prompt, "[B,T]")
        check_integers({"max_new_tokens": max_new_tokens})
        check_sampling(temperature, generator)
        if prompt.numel() and not 0 <= int(prompt.min()) <= int(prompt.max()) < self.config.vocab_size:
            raise ValueError(
                f"prompt: expected tokens from 0 to {self.config.vocab_size - 1}, got {prompt.min()} to {prompt.max()}"
            )
        state = self.init_state(prompt.shape[0]) if state is None else state
        self._check_state(state, prompt)
        read = int(state["position"].max()) + prompt.shape[1]
        for argument, consumed in (("prompt", read), ("max_new_tokens", read + max_new_tokens - 1)):
            if ATTENTION in self.config.layer_types and consumed > self.config.max_length:
                raise ValueError(
                    f"{argument}: expected to consume at most max_length = {self.config.max_length} tokens, got {consumed}"
                )
        prefill = self.prefill if prefill is None else prefill
        step = self.step if step is None else step
        logits, state = prefill(prompt, state)
        tokens = [choose(logits, temperature, generator)]
        while len(tokens) < max_new_tokens:
            logits, state = step(tokens[-1], state)
            tokens.append(choose(logits, temperature, generator))
        return torch.stack(tokens, 1)

    # --- on disk ---

    def save(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors into ``folder``, which is made if absent."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(json.dumps(self.config.to_dict(), indent=2) + "\n")
        save_file({name: x.contiguous() for name, x in self.state_dict().items()}, folder / WEIGHTS)

    @classmethod
    def load(cls, folder: str | Path, device: torch.device | str = "cpu") -> ByteLM:
        """The model that :meth:`save` wrote, in its dtype.

        Raises:
            FileNotFoundError: a file is absent.
            TypeError, ValueError: a file is not what ``save`` writes; the message names the file and what is wrong.
        """
        paths = {name: Path(folder) / name for name in (CONFIG, WEIGHTS)}
        for path in paths.values():
            if not path.is_file():
                raise FileNotFoundError(f"folder: expected a file {path}, got none")
        try:
            config = ModelConfig.from_dict(json.loads(paths[CONFIG].read_text()))
        except (UnicodeDecodeError, json.JSONDecodeError) as e:
            raise ValueError(f"{paths[CONFIG]}: expected JSON, got {e}") from None
        except (TypeError, ValueError) as e:
            raise type(e)(f"{paths[CONFIG]}: {e}") from None
        try:
            weights = load_file(paths[WEIGHTS], device=str(device))
        except SafetensorError as e:
            raise ValueError(f"{paths[WEIGHTS]}: expected a safetensors file, got {e}") from None
        with torch.device("meta"):
            model = cls(config)
        expected = {name: tuple(x.shape) for name, x in model.state_dict().items()}
        got = {name: tuple(x.shape) for name, x in weights.items()}
        if expected != got:
            wrong = sorted(name for name in expected | got if expected.get(name) != got.get(name))
            said = ", ".join(f"{name} {expected.get(name)} (got {got.get(name)})" for name in wrong[:5])
            raise ValueError(f"{paths[WEIGHTS]}: expected the tensors of {CONFIG}, but {len(wrong)} differ: {said}")
        dtypes = {x.dtype for x in weights.values()}
        if len(dtypes) > 1 or not all(d.is_floating_point for d in dtypes):
            raise ValueError(f"{paths[WEIGHTS]}: expected tensors of one floating dtype, got {', '.join(sorted(map(str, dtypes)))}")
        model.load_state_dict(weights, assign=True)
        return model

    # --- checks ---

    def _blocks(self) -> list[GKABlock | AttentionBlock]:
        return list(self.layers)  # type: ignore[arg-type]

    def _check_state(self, state: Any, tokens: Tensor) -> None:
        """Names and shapes; the dtypes of GKA states are checked where they are used."""
        if not isinstance(state, dict):
            raise TypeError(f"state: expected a dict of tensors as from init_state, got {type(state).__name__}")
        shapes = {f"{name}_{i}": shape for i, layer in enumerate(self._blocks()) for name, shape in layer.state_shapes().items()}
        shapes["position"] = ()
        if list(state) != list(shapes):
            raise ValueError(f"state: expected the keys {', '.join(shapes)}, got {', '.join(map(str, state))}")
        for name, shape in shapes.items():
            label, x, expected = f"state[{name!r}]", state[name], (tokens.shape[0], *shape)
            if not isinstance(x, Tensor):
                raise TypeError(f"{label}: expected a Tensor, got {type(x).__name__}")
            if x.dim() != len(expected) or any(a != b for a, b in zip(x.shape, expected, strict=True)):
                raise ValueError(f"{label}: expected shape {expected}, got {tuple(x.shape)}")
            if x.device != tokens.device:
                raise ValueError(f"{label}: expected device {tokens.device} (that of tokens), got {x.device}")
        if state["position"].dtype != torch.int64:
            raise TypeError(f"state['position']: expected dtype int64, got {state['position'].dtype}")


def _of_layer(state: State, i: int) -> State:
    end = f"_{i}"
    return {name.removesuffix(end): x for name, x in state.items() if name.endswith(end)}
