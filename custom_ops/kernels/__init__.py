"""Triton kernels, one per op, and their launchers. Nothing here imports the reference."""

from .decode import launch_step, plan_step
from .grads import launch_chunk_grads, launch_chunk_state_bwd
from .output import launch_chunk_output, launch_chunk_output_bwd
from .state import launch_chunk_state

__all__ = [
    "launch_chunk_grads",
    "launch_chunk_output",
    "launch_chunk_output_bwd",
    "launch_chunk_state",
    "launch_chunk_state_bwd",
    "launch_step",
    "plan_step",
]
