"""In-place decode steps on a GPU that repeat an earlier one: checks, dispatch and Triton's search for the kernel are left out.

Such a step takes the GPU a few microseconds, so what the CPU does for it counts.  All of that follows from the scalars and from
sizes, dtypes and the like of the tensors, which one call of the guards of ``torch.compile`` compares.
"""

from collections.abc import Callable
from functools import reduce
from operator import or_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .eager import TENSORS, no_hidden_observer, unobserved

try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # it is not public; without it there are no plans
    TensorGuards = None  # type: ignore[assignment, misc]

__all__ = ["keep_step", "repeat_step"]

Key = tuple[Any, ...]
Launch = Callable[..., None]


class _Plan(NamedTuple):
    """Holds no tensor."""

    check: Callable[..., bool]  # type, dtype, device, sizes, strides, requires_grad, dispatch keys of all tensors
    device: int
    shape: tuple[int, ...]  # of o
    launch: Launch


LIMIT = 64  # of keys, and of plans under each
_steps: dict[Key, list[_Plan]] = {}  # the lists are replaced, never changed, and the last plan used comes first


def _key(state: Any, g: Any, gk: Any, alpha: Any, beta: Any, scale: Any, ridge_ratio: Any, num_iter: Any) -> Key | None:
    """What is no tensor; None where equal keys would not mean equal calls, for 3.0 and True equal ints."""
    if (
        type(num_iter) is int
        and type(ridge_ratio) is float
        and (scale is None or type(scale) is float)
        and isinstance(state, tuple)
        and len(state) == 2
    ):
        return scale, ridge_ratio, num_iter, g is None, gk is None, gk is g, alpha is None, beta is None
    return None


def _distinct(q: Any, k: Any, v: Any, state: Any, g: Any, gk: Any, alpha: Any, beta: Any) -> list[Any]:
    """The tensors; one decay for both once, for the guards refuse two of the same."""
    return [q, k, v, *state, *(t for t in (g, None if gk is g else gk, alpha, beta) if t is not None)]


def _addresses(q: Any, k: Any, v: Any, state: Any, g: Any, gk: Any, alpha: Any, beta: Any) -> list[int]:
    """Of q, k, v, h, u, g, gk, alpha and beta; of an absent gate q's."""
    gates = (q if g is None else g, q if gk is None else gk, q if alpha is None else alpha, q if beta is None else beta)
    return list(map(Tensor.data_ptr, (q, k, v, *state, *gates)))


def _aligned(addresses: list[int]) -> bool:
    """Whether all are multiples of 16, as those that the kernel is compiled for."""
    return not reduce(or_, addresses) & 15


def repeat_step(*call: Any) -> Tensor | None:
    """A step in place by its plan: o; None, and the states as they were, where there is no plan for such a call.

    Args:
        call: q, k, v, state, g, gk, alpha, beta, scale, ridge_ratio, num_iter of ``step_gka``, unchecked.
    """
    if not no_hidden_observer():  # the guards see the others
        return None
    key = _key(*call[3:])
    if key is None:
        return None
    plans, tensors = _steps.get(key, []), _distinct(*call[:8])
    for plan in plans:
        if plan.check(*tensors):
            break
    else:
        return None
    if plan is not plans[0]:
        _steps[key] = [plan, *(p for p in plans if p is not plan)]
    addresses = _addresses(*call[:8])
    if not _aligned(addresses) or plan.device != torch.cuda.current_device():
        return None
    o: Tensor = call[0].new_empty(plan.shape)
    torch._C._increment_version(call[3])
    plan.launch(*addresses, o.data_ptr())
    return o


def keep_step(call: tuple[Any, ...], o: Tensor, plan: Callable[[], Launch | None]) -> None:
    """After a step in place that gave o: keep a plan for its like, if it may have one.

    It may not where more was to be done than a step on the current GPU (autograd, autocast, copies of strided inputs), nor where an
    address is no multiple of 16.

    Args:
        call: as in :func:`repeat_step`; it has passed all checks.
        plan: gives the launch, None where nothing is launched.
    """
    # AMD's kernels depend on the size of a tensor's storage, too
    if not unobserved() or TensorGuards is None or torch.version.hip is not None:
        return
    q, key, tensors = call[0], _key(*call[3:]), _distinct(*call[:8])
    if not (
        q.is_cuda
        and key is not None
        and not torch.is_autocast_enabled("cuda")
        and TENSORS.issuperset(map(type, tensors))
        and not torch._C._any_requires_grad(*tensors)  # in any grad mode, for which the guards do not ask
        and all(map(Tensor.is_contiguous, tensors))
        and not any(map(Tensor.is_neg, tensors))
        and len({*map(id, tensors)}) == len(tensors)
        and _aligned(_addresses(*call[:8]))
        and q.get_device() == torch.cuda.current_device()
    ):
        return
    launch = plan()
    if launch is None:
        return
    sizes = [[*t.shape] for t in tensors]
    strides = [[None if n == 1 else s for n, s in zip(t.shape, t.stride(), strict=True)] for t in tensors]
    guards: Any = TensorGuards
    check = guards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
    if key not in _steps and len(_steps) >= LIMIT:
        _steps.pop(next(iter(_steps)), None)  # the oldest
    plans = [_Plan(check, q.get_device(), tuple(o.shape), launch), *_steps.get(key, ())]
    _steps[key] = plans[:LIMIT]
