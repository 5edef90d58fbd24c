"""A small byte-level language model made of Gated KalmaNet and attention layers."""

from .config import ModelConfig
from .lm import ByteLM

__all__ = ["ByteLM", "ModelConfig"]
