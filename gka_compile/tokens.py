"""Tokens in and out of a language model, for the model itself and for :class:`gka_compile.export.Runner`, which has no model."""

from __future__ import annotations

import sys
from numbers import Real
from typing import Any

import torch
from torch import Tensor

__all__ = ["check_sampling", "check_tokens", "choose"]


def check_tokens(name: str, tokens: Any, symbols: str) -> Tensor:
    """``tokens``, if they are int64 of the shape ``symbols`` ("[B,T]" or "[B]") and not empty.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    if not isinstance(tokens, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(tokens).__name__}")
    if tokens.dtype != torch.int64:
        raise TypeError(f"{name}: expected dtype int64, got {tokens.dtype}")
    if tokens.dim() != len(symbols.split(",")) or any(size == 0 for size in tokens.shape):
        raise ValueError(f"{name}: expected shape {symbols} with at least one token, got {tuple(tokens.shape)}")
    return tokens


def check_sampling(temperature: Any, generator: Any) -> None:
    if isinstance(temperature, bool) or not isinstance(temperature, Real):
        raise TypeError(f"temperature: expected a number, got {type(temperature).__name__}")
    if not 0 <= temperature <= sys.float_info.max:  # type: ignore[operator]
        raise ValueError(f"temperature: expected a finite number that is not negative, got {temperature}")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator or None, got {type(generator).__name__}")


def choose(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """Next tokens [B] from logits [B, vocab_size]: the likeliest at temperature 0, else from softmax(logits / temperature)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits - logits.amax(-1, keepdim=True)  # so that no temperature makes them infinite
    least = torch.finfo(torch.float32).tiny  # what is less may be zero in the logits' arithmetic
    return torch.multinomial((logits / max(float(temperature), least)).softmax(-1), 1, generator=generator).squeeze(-1)
