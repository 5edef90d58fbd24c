"""Every number that is chosen rather than computed, in one place."""

import torch

__all__ = [
    "COTANGENT_COLUMNS",
    "CPU_CHUNK",
    "NUM_ITER",
    "PIECE_BYTES",
    "RIDGE_RATIO",
    "SEGMENTED_CHUNKS",
    "SEGMENTS",
    "STATE_COLUMNS",
    "STEP_COLUMNS",
    "TRACED_PIECES",
    "chunk_size",
    "gpu_chunk",
    "launch_settings",
    "scan_programs",
]

RIDGE_RATIO = 0.02  # a in λ = a‖H‖_F
NUM_ITER = 30  # Chebyshev iterations; the error shrinks by 0.754 in each at a = 0.02

PIECE_BYTES = 128 * 2**20  # of chunk states that the backward holds at a time, about; as much again of their cotangents
TRACED_PIECES = 4  # at most in compiled code, which holds the kernels of each; tracing them takes seconds

CPU_CHUNK = 64


def chunk_size(device: torch.device, itemsize: int, K: int, V: int) -> int:
    """Tokens per chunk on ``device``; the CPU's reference is fastest at 64."""
    if device.type in ("cpu", "meta"):
        return CPU_CHUNK
    return gpu_chunk(torch.cuda.get_device_capability(device)[0], itemsize, K, V)


def gpu_chunk(major: int, itemsize: int, K: int, V: int) -> int:
    """Tokens per chunk on a GPU of compute capability ``major``.*.

    64 where there are asynchronous products of 64 rows, on Hopper and data-centre Blackwell (on which nothing was run yet). Triton
    3.6 gets them wrong for widths of 32 and less (docs/design.md, section 5), and elsewhere 64 rows do not fit the registers: 32,
    or 16 of wide float32 tiles, whose operands take twice the room.
    """
    if itemsize == 4:
        return 16 if max(K, V) > 64 else 32
    return 64 if major in (9, 10) and min(K, V) > 32 else 32


STATE_COLUMNS = 64  # columns of a state that one program carries through time, of narrower states, too (docs/design.md, section 5)
COTANGENT_COLUMNS = 32  # … of its cotangent: smaller programs, so that long sequences of small batches fill the GPU
STEP_COLUMNS = 64  # of U that a decode step loads before its iterations; as many at most are left, so half of the widest at least
SEGMENTS = 4  # of a sequence, at most, that are scanned side by side where there is room for them (scan_programs),
SEGMENTED_CHUNKS = 16  # and chunks that a sequence must have for that


def scan_programs(chunk_size: int) -> int:
    """Programs of a scan up to which a GPU is taken to have room for more.

    Two a multiprocessor of the large GPUs whose chunks have 64 rows (:func:`gpu_chunk`). Of others a small one's: a scan in
    segments is nearly twice the work, and what is compiled for an architecture may run on its smallest GPU.
    """
    return 264 if chunk_size == 64 else 64


# (num_warps, num_stages) of each kernel up to a width of 64 and beyond; nothing is tuned at run time.
_LAUNCH = {
    "chunk_factors": ((4, 1), (4, 1)),
    "chunk_state": ((4, 2), (4, 3)),
    "chunk_solve": ((4, 1), (4, 1)),
    "chunk_read": ((4, 1), (4, 1)),
    "chunk_read_bwd": ((4, 1), (4, 1)),
    "chunk_solve_bwd": ((4, 1), (4, 1)),
    "cotangent_factors": ((4, 1), (4, 1)),
    "chunk_state_bwd": ((4, 2), (4, 2)),
    "grads_through_u": ((4, 1), (8, 1)),
    "grads_through_h": ((4, 1), (4, 1)),
    "step": ((2, 1), (4, 1)),
}


def launch_settings(kernel: str, width: int, itemsize: int) -> dict[str, int]:
    """num_warps and num_stages of a kernel; float32 operands want the registers of 8 warps, and no pipelining."""
    num_warps, num_stages = _LAUNCH[kernel][0 if width <= 64 else 1]
    if itemsize == 4 and kernel != "step":
        num_warps, num_stages = 8, 1
    return {"num_warps": num_warps, "num_stages": num_stages}
