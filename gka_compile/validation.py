"""Argument checks of the functional API: each error names the argument, what was expected and what came."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "check_chunk",
    "check_cu_seqlens",
    "check_ridge_ratio",
    "check_shape",
    "check_state",
    "check_step",
    "check_tensor",
    "check_tolerance",
]

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
MAX_WIDTH = 128
RIDGE_RATIOS = 1e-10, 1e10  # below, the coefficients of the solve are differences of numbers that float32 cannot tell apart
_RIDGE_RATIOS = "{:g} to {:g}".format(*RIDGE_RATIOS)  # Dynamo formats no such thing


def check_tensor(name: str, x: Any) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(x).__name__}")
    return x


def check_shape(name: str, x: Tensor, expected: Sequence[Any], symbols: str) -> None:
    if x.dim() != len(expected) or any(a != b for a, b in zip(x.shape, expected, strict=True)):
        raise ValueError(f"{name}: expected shape {symbols} = {tuple(expected)}, got {tuple(x.shape)}")


def _device(name: str, x: Tensor, q: Tensor, whose: str = "q's") -> None:
    if x.device != q.device:
        raise ValueError(f"{name}: expected device {q.device} ({whose}), got {x.device}")


def _width(name: str, symbol: str, width: int) -> None:
    if not 8 <= width <= MAX_WIDTH or width % 8:
        raise ValueError(f"{name}: expected a head width {symbol} that is a multiple of 8 from 8 to {MAX_WIDTH}, got {width}")


def check_ridge_ratio(ridge_ratio: Any) -> None:
    if isinstance(ridge_ratio, bool) or not isinstance(ridge_ratio, (int, float)):
        raise TypeError(f"ridge_ratio: expected a float, got {type(ridge_ratio).__name__}")
    if not RIDGE_RATIOS[0] <= ridge_ratio <= RIDGE_RATIOS[1]:
        raise ValueError(f"ridge_ratio: expected a positive number from {_RIDGE_RATIOS}, got {ridge_ratio}")


def check_tolerance(tolerance: Any) -> None:
    if not isinstance(tolerance, float):
        raise TypeError(f"tolerance: expected a float, got {type(tolerance).__name__}")
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance: expected a number between 0 and 1, got {tolerance}")


def _parameters(scale: Any, ridge_ratio: Any, num_iter: Any) -> None:
    if scale is not None:
        if isinstance(scale, bool) or not isinstance(scale, (int, float)):
            raise TypeError(f"scale: expected a float or None, got {type(scale).__name__}")
        if not -sys.float_info.max <= scale <= sys.float_info.max:  # Dynamo has no math.isfinite of a float that it traces
            raise ValueError(f"scale: expected a finite number, got {scale}")
    check_ridge_ratio(ridge_ratio)
    if isinstance(num_iter, bool) or not isinstance(num_iter, int):
        raise TypeError(f"num_iter: expected an int, got {type(num_iter).__name__}")
    if num_iter < 1:
        raise ValueError(f"num_iter: expected at least 1, got {num_iter}")


def _heads(q: Any, k: Any, v: Any, lead: str) -> tuple[int, ...]:
    """Check q [*lead,H,K], k [*lead,Hk,K], v [*lead,Hk,V]; ``lead`` is "B,T" or "B"."""
    rank = len(lead.split(",")) + 2
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x)
        if x.dim() != rank:
            raise ValueError(f"{name}: expected {rank} dimensions [{lead},heads,width], got shape {tuple(x.shape)}")
        if x.dtype not in FLOATS:
            raise TypeError(f"{name}: expected dtype float64, float32, float16 or bfloat16, got {x.dtype}")
        _device(name, x, q)
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: expected dtype {q.dtype} (q's), got {x.dtype}")
    *batch, H, K = q.shape
    Hk, V = v.shape[-2:]
    check_shape("k", k, (*batch, Hk, K), f"[{lead},Hk,K]")
    check_shape("v", v, (*batch, Hk, V), f"[{lead},Hk,V]")
    _width("q", "K", K)
    _width("v", "V", V)
    if H < 1:
        raise ValueError(f"q: expected at least one head, got shape {tuple(q.shape)}")
    if Hk < 1 or H % Hk:
        raise ValueError(f"k: expected a number of key/value heads Hk that divides the {H} heads of q, got {Hk}")
    if q.dtype == torch.float64 and q.device.type != "cpu":
        raise TypeError(f"q: expected float32, float16 or bfloat16 on {q.device.type}, got {q.dtype} (float64 runs on the CPU)")
    return (*batch, H, K, V)


def _gates(gates: dict[str, Any], q: Tensor, lead: str) -> None:
    for name, x in gates.items():
        if x is None:
            continue
        check_tensor(name, x)
        check_shape(name, x, q.shape[:-1], f"[{lead},H]")
        _device(name, x, q)
        if x.dtype not in (torch.float32, q.dtype):
            raise TypeError(f"{name}: expected dtype float32 or {q.dtype} (q's), got {x.dtype}")


def check_state(name: str, state: Any, q: Tensor, N: int, H: int, K: int, V: int, whose: str = "q's") -> None:
    """Check the states of N sequences beside q, or beside what is named by ``whose``."""
    try:
        h, u = state
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected a GKAState or another pair (h_kk, h_kv), got {type(state).__name__}") from None
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    for part, x, shape, symbols in (("h_kk", h, (N, H, K, K), "[N,H,K,K]"), ("h_kv", u, (N, H, K, V), "[N,H,K,V]")):
        label = f"{name}.{part}"
        check_tensor(label, x)
        check_shape(label, x, shape, symbols)
        _device(label, x, q, whose)
        if x.dtype != exact:
            raise TypeError(f"{label}: expected dtype {exact}, got {x.dtype}")


def check_cu_seqlens(cu_seqlens: Any, B: int, T: int, q: Tensor) -> int:
    check_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens: expected dtype int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens: expected shape [N+1] with N >= 1, got {tuple(cu_seqlens.shape)}")
    _device("cu_seqlens", cu_seqlens, q)
    if B != 1:
        raise ValueError(f"cu_seqlens: expected packed sequences in one batch row (B = 1), got B = {B}")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere reading it would wait for the device
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != T:
            raise ValueError(f"cu_seqlens: expected to start at 0 and end at T = {T}, got {bounds[0]} and {bounds[-1]}")
        if any(a > b for a, b in zip(bounds[:-1], bounds[1:], strict=True)):
            raise ValueError(f"cu_seqlens: expected non-decreasing bounds, got {bounds}")
    return cu_seqlens.shape[0] - 1


def check_chunk(
    q: Any, k: Any, v: Any, gates: dict[str, Any], scale: Any, ridge_ratio: Any, num_iter: Any, state: Any, cu_seqlens: Any
) -> None:
    """Check the arguments of :func:`gka_compile.chunk_gka`."""
    B, T, H, K, V = _heads(q, k, v, "B,T")
    _gates(gates, q, "B,T")
    _parameters(scale, ridge_ratio, num_iter)
    N = B if cu_seqlens is None else check_cu_seqlens(cu_seqlens, B, T, q)
    if state is not None:
        check_state("initial_state", state, q, N, H, K, V)


def check_step(q: Any, k: Any, v: Any, state: Any, gates: dict[str, Any], scale: Any, ridge_ratio: Any, num_iter: Any) -> None:
    """Check the arguments of :func:`gka_compile.step_gka`."""
    B, H, K, V = _heads(q, k, v, "B")
    _gates(gates, q, "B")
    _parameters(scale, ridge_ratio, num_iter)
    check_state("state", state, q, B, H, K, V)
