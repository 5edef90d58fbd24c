"""In-place decode steps on a GPU that repeat an earlier one: checks, dispatch and Triton's search for the kernel are left out.

Such a step takes the GPU a few microseconds, so what the CPU does for it counts.  All of that follows from a few properties of the
arguments, the key: a call with the key of one that passed all checks differs from it in contents and addresses alone.
"""

from collections.abc import Callable
from functools import reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor

from .eager import TENSORS, unobserved

__all__ = ["Key", "keep_step", "repeat_step"]

Key = tuple[Any, ...]
Launch = Callable[..., None]

LIMIT = 64
_steps: dict[Key, tuple[tuple[int, ...], Launch]] = {}  # the shape of o, and the launch; no tensors
_dtype = Tensor.dtype.__get__  # type: ignore[attr-defined]


def repeat_step(
    q: Any, k: Any, v: Any, state: Any, g: Any, gk: Any, alpha: Any, beta: Any, scale: Any, ridge_ratio: Any, num_iter: Any
) -> tuple[Tensor | None, Key | None]:
    """``step_gka`` in place, arguments unchecked: (o, key) if its plan is known, else (None, key), the states as they were.

    The key is None where the call has to go the ordinary way: where more is to be done than a step on the current GPU (autograd,
    autocast, copies of strided inputs), where an address is not the multiple of 16 that the kernel is compiled for, and where
    equal keys would not mean equal arguments (``num_iter=3.0``).
    """
    if not (isinstance(state, tuple) and len(state) == 2):
        return None, None
    h, u = state
    # in place of an absent gate stands q, which passes every check that the others pass
    tensors = (
        *(q, k, v, h, u, q if g is None else g, q if gk is None else gk),
        *(q if alpha is None else alpha, q if beta is None else beta),
    )
    if not (
        unobserved()
        and TENSORS.issuperset(map(type, tensors))
        and q.is_cuda
        and type(num_iter) is int
        and type(ridge_ratio) is float
        and (scale is None or type(scale) is float)
        and not torch.is_autocast_enabled("cuda")
        and not (torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors))
        and all(map(Tensor.is_contiguous, tensors))
    ):
        return None, None
    device, addresses = torch.cuda.current_device(), list(map(Tensor.data_ptr, tensors))
    if reduce(or_, addresses) & 15 or {*map(Tensor.get_device, tensors)} != {device}:
        return None, None
    absent = (g is None, gk is None, alpha is None, beta is None)
    key = (scale, ridge_ratio, num_iter, device, absent, *map(Tensor.size, tensors), *map(_dtype, tensors))
    plan = _steps.get(key)
    if plan is None:
        return None, key
    shape, launch = plan
    o = q.new_empty(shape)
    torch.autograd.graph.increment_version((h, u))
    launch(*addresses, o.data_ptr())
    return o, key


def keep_step(key: Key, o: Tensor, launch: Launch | None) -> None:
    """File what :func:`repeat_step` needs, once the call behind ``key`` has passed all checks; None: nothing to launch."""
    if launch is None or torch.version.hip is not None:  # AMD's kernels depend on the size of a tensor's storage, too
        return
    if len(_steps) >= LIMIT:
        _steps.clear()
    _steps[key] = tuple(o.shape), launch
