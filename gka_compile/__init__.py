"""Gated KalmaNet that compiles, exports and deploys."""

from .functional import GKAState, chunk_gka, step_gka

__all__ = ["GKAState", "chunk_gka", "step_gka"]
__version__ = "0.1.0"
