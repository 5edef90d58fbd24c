"""Triton kernels and the launchers of the ops."""

from .backward import launch_chunk_bwd
from .decode import launch_step
from .output import launch_chunk_output
from .state import launch_chunk_state

__all__ = [
    "launch_chunk_bwd",
    "launch_chunk_output",
    "launch_chunk_state",
    "launch_step",
]
