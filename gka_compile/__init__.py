"""Gated KalmaNet that compiles, exports and deploys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .functional import GKAState, chunk_gka, num_iter_for, step_gka

if TYPE_CHECKING:
    from .cache import GKACache
    from .layer import GatedKalmaNet

__all__ = ["GKACache", "GKAState", "GatedKalmaNet", "chunk_gka", "num_iter_for", "step_gka"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """The layer and its cache, imported when asked for: a process that runs an artifact has no use for them."""
    if name == "GatedKalmaNet":
        from .layer import GatedKalmaNet

        return GatedKalmaNet
    if name == "GKACache":
        from .cache import GKACache

        return GKACache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
