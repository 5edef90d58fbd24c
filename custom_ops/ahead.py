"""All kernels of a first call compiled side by side, before the call, rather than one after the other on the way.

Which kernels those are is not written down here. The call runs once on meta tensors, its backward too, with every launch kept
instead of done, so what is compiled is what will be launched. Where the kernels are compiled already, nothing but that happens.
"""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from .eager import unobserved

__all__ = ["Launch", "collecting", "compile_ahead", "keeping_launches", "kept_launches"]


@dataclass(frozen=True)
class Launch:
    """``kernel[grid](*args, **named)``, not done."""

    kernel: Any
    grid: Any
    args: tuple[Any, ...]
    named: dict[str, Any]


T = TypeVar("T")
_kept: ContextVar[list[Launch] | None] = ContextVar("gka_kept_launches", default=None)


@contextmanager
def collecting(variable: ContextVar[list[T] | None]) -> Iterator[list[T]]:
    """A new list, which is the variable's value in this thread."""
    collected: list[T] = []
    token = variable.set(collected)
    try:
        yield collected
    finally:
        variable.reset(token)


def keeping_launches() -> AbstractContextManager[list[Launch]]:
    """Launches of this thread go into the list; an op on meta tensors, which would only shape its outputs, runs its launcher."""
    return collecting(_kept)


def kept_launches() -> list[Launch] | None:
    """The list that launches go into, None where they are done."""
    return _kept.get()


def compile_ahead(
    function: Callable[..., tuple[Tensor, ...]],
    tensors: Sequence[Tensor | None],
    constants: Sequence[Any],
    widths: Sequence[int],
    sizes: Sequence[int],
) -> None:
    """The first time that an eager call ``function(*tensors, *constants)`` on a GPU needs them, compile its kernels, side by side.

    With gradients to be recorded, the kernels of the backward of its first result are compiled as well.

    Args:
        tensors: the first is not None.
        constants, widths: what kernels are compiled for, together with the dtypes.
        sizes: what kernels take as an argument; Triton compiles apart 1, multiples of 16 and the rest.

    Where this fails, nothing is raised: the launch of a kernel compiles what is missing and says itself what is wrong, and the
    kernels of the backward may never be needed.
    """
    x = tensors[0]
    assert x is not None
    if not _is_eager(x):
        return
    backward = torch.is_grad_enabled() and any(t.requires_grad for t in tensors if t is not None)
    dtypes = [None if t is None else t.dtype for t in tensors]
    key = (function, x.get_device(), backward, *constants, *widths, *dtypes, *[(n != 1) + (n % 16 == 0) for n in sizes])
    if key in _done:
        return
    with _lock:
        if key not in _done:
            # anomaly mode looks for NaN in every backward of the process, so in that of meta tensors, too
            if torch.cuda.is_current_stream_capturing() or (backward and torch.is_anomaly_enabled()):
                return
            # a thread of its own has none of the caller's modes, hooks for saved tensors, transforms and contexts
            with suppress(Exception), ThreadPoolExecutor(1) as thread:
                thread.submit(_compile, function, tensors, constants, backward).result()
            _done.add(key)


_done: set[tuple[Any, ...]] = set()
_lock = threading.Lock()


def _is_eager(x: Any) -> bool:
    """Whether ops on x launch kernels now, rather than being traced or counted."""
    return unobserved() and type(x) is Tensor and x.is_cuda


def _compile(
    function: Callable[..., tuple[Tensor, ...]], tensors: Sequence[Tensor | None], constants: Sequence[Any], backward: bool
) -> None:
    def meta(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        return torch.empty(x.shape, dtype=x.dtype, device="meta", requires_grad=backward and x.is_floating_point())

    with keeping_launches() as launches:
        o, *_ = function(*map(meta, tensors), *constants)
        if backward:
            o.backward(torch.empty_like(o))
    assert tensors[0] is not None
    _compile_together(launches, tensors[0])


def _compile_together(launches: Sequence[Launch], x: Tensor) -> None:
    """Compile and load the kernels of ``launches`` for x's device.

    Triton's keys of what is compiled are made in this thread, in the order of the launches: in Triton 3.6 they depend on it.
    """
    import triton

    from .kernels.launch import on_device

    def load(kernel: Any) -> None:
        with on_device(x):
            kernel.run  # noqa: B018 - a property: builds Triton 3.6's launcher with the C compiler, and loads the kernel

    with on_device(x), ThreadPoolExecutor(min(len(launches), os.cpu_count() or 1)) as pool:
        with triton.AsyncCompileMode(pool):
            made = [a.kernel.warmup(*a.args, grid=a.grid, **a.named) for a in launches]
        kernels = {k.result() if isinstance(k, triton.FutureKernel) else k for k in made}
        list(pool.map(load, kernels - {None}))  # None where a hook of Triton's has compiled
