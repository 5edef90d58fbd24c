"""Every number that is chosen rather than computed, in one place."""

__all__ = ["CPU_CHUNK", "NUM_ITER", "RIDGE_RATIO", "chunk_size", "launch_settings"]

RIDGE_RATIO = 0.02  # a in λ = a‖H‖_F
NUM_ITER = 30  # Chebyshev iterations; the error shrinks by 0.754 in each at a = 0.02

CPU_CHUNK = 64


def chunk_size(device_type: str, itemsize: int, K: int, V: int) -> int:
    """Tokens per chunk.

    On a GPU the solve holds four [C, width] tiles in registers: 32 rows, or 16 of wide float32 ones, whose operands take twice
    the room. (64 rows bring in Hopper's asynchronous products, which Triton 3.6 gets wrong in places: docs/design.md.) The CPU's
    reference is fastest at 64.
    """
    if device_type == "cpu":
        return CPU_CHUNK
    return 16 if itemsize == 4 and max(K, V) > 64 else 32


# (num_warps, num_stages) of each kernel up to a width of 64 and beyond; nothing is tuned at run time.
_LAUNCH = {
    "chunk_state": ((4, 2), (8, 2)),
    "chunk_output": ((4, 1), (4, 1)),
    "chunk_output_bwd": ((4, 1), (8, 1)),
    "chunk_state_bwd": ((4, 1), (8, 1)),
    "chunk_grads": ((8, 1), (8, 1)),
    "step": ((4, 1), (8, 1)),
}


def launch_settings(kernel: str, width: int, itemsize: int) -> dict[str, int]:
    """num_warps and num_stages of a kernel; float32 operands want the registers of 8 warps, and no pipelining."""
    num_warps, num_stages = _LAUNCH[kernel][0 if width <= 64 else 1]
    if itemsize == 4 and kernel != "step":
        num_warps, num_stages = 8, 1
    return {"num_warps": num_warps, "num_stages": num_stages}
