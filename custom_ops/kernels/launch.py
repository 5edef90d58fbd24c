"""What every launcher needs: contiguous inputs, stand-ins, block sizes, pinned launch settings, the device, the launch itself."""

import contextlib
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from .. import ahead, config, plans
from ..polynomial import chebyshev_tau

__all__ = [
    "Tensors",
    "block",
    "compact",
    "on_device",
    "operand",
    "polynomial",
    "present",
    "replay",
    "settings",
    "shared_options",
    "wrap_triton",
]

Tensors = Sequence[Tensor]


def compact(*tensors: Any) -> list[Any]:
    """Inputs as contiguous tensors that are what lies in memory (not lazily negated); None stays."""
    return [None if t is None else t.contiguous().resolve_neg() for t in tensors]


def present(stand_in: Tensor, *tensors: Any) -> list[Tensor]:
    """Absent inputs replaced by a tensor that the kernel is told not to read."""
    return [stand_in if t is None else t for t in tensors]


def block(width: int) -> int:
    """A head width rounded up to what tl.dot takes."""
    return max(16, 1 << (width - 1).bit_length())  # triton.next_power_of_2 takes microseconds


def operand(dtype: torch.dtype) -> Any:
    """Operand precision of the matrix products beside inputs of ``dtype``; see tile.py."""
    return tl.float16 if dtype.itemsize == 2 else tl.float32


def shared_options(H: int, k: Tensor, cu: Any, C: int) -> dict[str, Any]:
    """Constexprs of every kernel that runs over chunk slots.

    The heads are among them for their strides: a token's address is then that of the tile plus a constant, for which no register
    is held.
    """
    return {
        "H": H,
        "Hk": k.shape[2],
        "C": C,
        "OPERAND": operand(k.dtype),
        "PACKED": cu is not None,
    }


def polynomial(ridge_ratio: float, num_iter: int) -> dict[str, Any]:
    """The solve's constexprs; see polynomial.py."""
    tau = chebyshev_tau(ridge_ratio)
    tail = tau ** (2 * (num_iter + 1))
    front = 4.0 * tau / ((1.0 - tau * tau) * (1.0 + tail))  # 2 / (sinh θ (1 + τ^{2(N+1)}))
    return {"NUM_ITER": num_iter, "TAU": tau, "FRONT": front, "TAIL": tail}


def settings(kernel: str, x: Tensor, *widths: int) -> dict[str, int]:
    """Pinned num_warps and num_stages."""
    return config.launch_settings(kernel, max(widths), x.dtype.itemsize)


def on_device(x: Tensor) -> Any:
    """Make x's GPU the current one for a launch."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


def wrap_triton(kernel: Any) -> Any:
    """torch.library.wrap_triton, but where launches are kept (ahead.py) or recorded (plans.py) something that does that.

    It has torch's name because torch reads the launchers' source: the kernels of ``wrap_triton(kernel)`` are part of the key under
    which AOTAutograd caches compiled code.
    """
    kept, recorded = ahead.kept_launches(), plans.recorded()
    if kept is not None:
        return _Kept(kernel, kept)
    return torch.library.wrap_triton(kernel) if recorded is None else _Recorded(kernel, recorded)


class _Kept:
    def __init__(self, kernel: Any, launches: list[ahead.Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **named: self.launches.append(ahead.Launch(self.kernel, grid, args, named))


class _Recorded:
    def __init__(self, kernel: Any, launches: list[plans.Recorded]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **named: Any) -> None:
            compiled = self.kernel[grid](*args, **named)
            self.launches.append((compiled, ahead.Launch(self.kernel, grid, args, named)))

        return launch


def replay(launches: Sequence[plans.Recorded], places: Mapping[int, int], device: int) -> plans.Replay:
    """Recorded launches again, on the stream of ``device`` that is current then.

    Args:
        launches: tensors come first among a kernel's arguments, and there are two or more.
        places: numbers of the addresses of those tensors.

    Returns:
        A function of the addresses, by their numbers, all multiples of 16.
    """
    made = []
    for compiled, launch in launches:
        tensors = [places[x.data_ptr()] for x in launch.args if isinstance(x, Tensor)]
        rest = *launch.args[len(tensors) :], *(launch.named[n] for n in launch.kernel.arg_names[len(launch.args) :])
        grid = (*launch.grid, 1, 1)[:3]
        start = *grid, compiled.function, compiled.packed_metadata, None, None, None  # no metadata for hooks, no hooks
        made.append((compiled.run, start, itemgetter(*tensors), rest, compiled[grid]))
    current_stream, hooks = driver.active.get_current_stream, knobs.runtime

    def launch_all(addresses: Sequence[int]) -> None:
        stream = current_stream(device)
        hooked = _any(hooks.launch_enter_hook) or _any(hooks.launch_exit_hook)
        for run, (x, y, z, *kernel), tensors, rest, run_with_hooks in made:
            if hooked:
                run_with_hooks(*tensors(addresses), *rest, stream=stream)
            else:
                run(x, y, z, stream, *kernel, *tensors(addresses), *rest)

    return launch_all


def _any(hook: Any) -> Any:
    """Whether a launch hook of Triton, a chain of functions or one function, does anything."""
    return getattr(hook, "calls", hook)
