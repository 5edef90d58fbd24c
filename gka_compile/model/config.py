"""The configuration of the byte-level language model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ..custom_ops.config import NUM_ITER, RIDGE_RATIO
from ..layer import check_flags, check_heads, check_integers, check_positive
from ..validation import check_ridge_ratio

__all__ = ["ModelConfig"]

GKA, ATTENTION = "GKA", "*"


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a :class:`.ByteLM`; checked when made.

    Raises:
        TypeError, ValueError: naming the field, what was expected and what came.
    """

    vocab_size: int = 256
    hidden_size: int = 256
    intermediate_size: int = 512
    """Width inside the SwiGLU MLP."""
    pattern: str = "GKA-GKA-*-GKA"
    """One mixer per layer, "GKA" or "*" (attention), separated by "-"."""
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    conv_size: int = 4
    num_iter: int = NUM_ITER
    ridge_ratio: float = RIDGE_RATIO
    """The ridge of GKA layers as a ratio of ‖H‖_F."""
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_length: int = 2048
    """Tokens that the static cache of attention layers holds; GKA layers have no limit."""
    tie_word_embeddings: bool = True
    """The output head shares the embedding's weight."""

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str):
            raise TypeError(f"pattern: expected a str, got {type(self.pattern).__name__}")
        unknown = sorted(set(self.layer_types) - {GKA, ATTENTION})
        if unknown:
            raise ValueError(f'pattern: expected "{GKA}" and "{ATTENTION}" separated by "-", got {self.pattern!r}')
        names = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "num_iter",
            "max_length",
        )
        check_integers({name: getattr(self, name) for name in names})
        check_integers({"conv_size": self.conv_size}, least=2)
        check_heads(self.num_heads, self.num_kv_heads, self.head_dim)
        check_positive({name: getattr(self, name) for name in ("norm_eps", "rope_theta")})
        check_ridge_ratio(self.ridge_ratio)
        check_flags({"tie_word_embeddings": self.tie_word_embeddings})

    @property
    def layer_types(self) -> list[str]:
        """The mixer of each layer."""
        return self.pattern.split("-")

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """The inverse of :meth:`to_dict`; absent fields take their defaults, unknown ones raise ValueError."""
        if not isinstance(values, dict):
            raise TypeError(f"config: expected a dict, got {type(values).__name__}")
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"config: expected fields among {', '.join(known)}, got {', '.join(unknown)}")
        return cls(**values)
