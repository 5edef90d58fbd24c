"""Every number that is chosen rather than computed, in one place."""

__all__ = ["CPU_CHUNK", "RIDGE_RATIO", "NUM_ITER", "chunk_size"]

RIDGE_RATIO = 0.02  # a in λ = a‖H‖_F
NUM_ITER = 30  # Chebyshev iterations; the error shrinks by 0.754 in each at a = 0.02

CPU_CHUNK = 64


def chunk_size(device_type: str, K: int, V: int) -> int:
    """Tokens per chunk. On a GPU the solve holds three [C, K] tiles in registers: 64 rows up to a width of 64, 32 beyond."""
    if device_type == "cpu":
        return CPU_CHUNK
    return 64 if max(K, V) <= 64 else 32
