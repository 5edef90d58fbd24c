"""Eager calls on a GPU that repeat an earlier one: checks, dispatch and Triton's search for kernels are left out.

A call of little work takes the GPU some ten microseconds, so what the CPU does for it counts.  All of that follows from the
scalars and from sizes, dtypes and the like of the tensors, which one call of the guards of ``torch.compile`` compares.  The
second call of a kind is recorded as it runs: which kernels it launches, on which of its inputs, results and temporaries.  From
then on such a call allocates the latter two and launches those kernels.
"""

import importlib
import threading
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import reduce
from operator import or_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .ahead import Launch, collecting
from .eager import TENSORS, no_hidden_observer, unobserved

try:
    guards: Any = importlib.import_module("torch._C._dynamo.guards")
    TensorGuards = guards.TensorGuards
    ALLOCATORS = {"cpu": guards._empty_strided_cpu, "cuda": guards._empty_strided_cuda}  # those of Inductor's wrappers
except (ImportError, AttributeError):  # they are not public; without them there are no plans
    TensorGuards = None

__all__ = ["Recorded", "Replay", "abandon", "planned", "recorded", "repeat", "run"]

Key = tuple[Any, ...]
Results = tuple[Tensor, ...]
Work = Callable[..., Results]
Tensors = Sequence[Tensor | None]
Recorded = tuple[Any, Launch]  # a compiled kernel and its launch
Replay = Callable[[Sequence[int]], None]


class _Plan(NamedTuple):
    """Holds no tensor. Addresses are numbered: those of the inputs, the results, the temporaries."""

    check: Callable[..., bool]  # type, dtype, device, sizes, strides, requires_grad, dispatch keys of all inputs
    device: int
    differentiable: bool  # where gradients are recorded, such a call is not its launches alone
    strided: tuple[int, ...]  # inputs that are copied
    new: Callable[[Sequence[int], Sequence[int], torch.dtype], Tensor]  # of a size, strides and a dtype
    results: tuple[tuple[Sequence[int], Sequence[int], torch.dtype], ...]
    blocks: tuple[tuple[Sequence[int], Sequence[int], torch.dtype], ...]  # of bytes, for temporaries
    temporaries: tuple[tuple[int, int], ...]  # block, offset in bytes
    replay: Replay


LIMIT = 256  # of keys,
ALIKE = 8  # and of plans under each
BLOCK = 10 * 2**20  # bytes from which a temporary has a block of its own, as it has in torch's allocator
_plans: dict[Key, list[_Plan] | None] = {}  # None: cannot be repeated; the lists are replaced, never changed
_lock = threading.Lock()  # for keys: a backward runs in a thread of autograd's
_recorded: ContextVar[list[Recorded] | None] = ContextVar("gka_recorded_launches", default=None)


def recorded() -> list[Recorded] | None:
    """The list that launches of this thread go into as they are done, if any."""
    return _recorded.get()


def abandon() -> None:
    """The call that is recorded, if one is, does more to tensors than its launches: it gets no plan, nor are its tensors kept."""
    launches = _recorded.get()
    if launches is not None:
        launches.clear()
        _recorded.set(None)


def _read(what: Any, tensors: Tensors, decay: int, constants: tuple[Any, ...]) -> tuple[Key, list[Tensor]]:
    """All that is no tensor, and the tensors, each once, for the guards refuse two of the same."""
    if tensors[decay] is tensors[decay + 1]:
        tensors = (*tensors[:decay], *tensors[decay + 1 :])
    kinds = (*map(type, tensors), *map(type, constants))  # 3.0 and True equal ints
    shapes = getattr(tensors[0], "shape", None), getattr(tensors[-1], "shape", None)  # the last has the number of packed sequences
    return (what, constants, kinds, shapes), [t for t in tensors if t is not None]


def _aligned(addresses: Sequence[int]) -> bool:
    """Whether all are multiples of 16, as those that kernels are compiled for."""
    return not reduce(or_, addresses) & 15


def repeat(what: Any, tensors: Tensors, decay: int, constants: tuple[Any, ...], mutated: Sequence[Tensor] = ()) -> Results | None:
    """A call by its plan: its results; None, and nothing done, where there is no plan for such a call.

    Args:
        what, tensors, decay, constants: as in :func:`run`, unchecked.
        mutated: those of the tensors that the call changes.
    """
    if not no_hidden_observer() or _recorded.get() is not None:  # the guards see the other observers
        return None
    key, inputs = _read(what, tensors, decay, constants)
    try:
        plans = _plans.get(key)
    except TypeError:  # a list for a number
        return None
    for plan in plans or ():
        if plan.check(*inputs):
            break
    else:
        return None
    if (plan.differentiable and torch.is_grad_enabled()) or plan.device != torch.cuda.current_device():
        return None
    for i in plan.strided:
        inputs[i] = inputs[i].contiguous()
    addresses = [*map(Tensor.data_ptr, inputs)]
    if not _aligned(addresses):
        return None
    new = plan.new
    results = (*[new(*made) for made in plan.results],)
    addresses += map(Tensor.data_ptr, results)
    if plan.blocks:
        blocks = [new(*made) for made in plan.blocks]
        begins = [*map(Tensor.data_ptr, blocks)]
        addresses += [begins[i] + offset for i, offset in plan.temporaries]
    if mutated:
        torch._C._increment_version(mutated)
    plan.replay(addresses)
    return results


def run(what: Any, tensors: Tensors, decay: int, constants: tuple[Any, ...], work: Work, mutated: Sequence[Tensor] = ()) -> Results:
    """``work(*tensors)``, recorded where it can be and such a call was seen before.

    It cannot where more is to be done than launches on the current GPU (autograd, autocast), nor where an address is no multiple
    of 16.

    Args:
        what: the kind of the call.
        tensors: those given, checked; they may be copied on the way to ``work``.
        decay: where g is among them, which is followed by gk; these two may be one tensor.
        constants: all else that the call depends on.
        work: does the call, and returns new contiguous tensors.
        mutated: those of the tensors, contiguous, that the call changes.
    """
    if (
        not unobserved()  # first, for Dynamo stops here
        or _recorded.get() is not None
        or TensorGuards is None
        or torch.version.hip is not None  # AMD's kernels depend on the size of a tensor's storage, too
    ):
        return work(*tensors)
    key, inputs = _read(what, tensors, decay, constants)
    differentiable = torch._C._any_requires_grad(*inputs)
    if not (
        TENSORS.issuperset(map(type, inputs))
        and all(x.is_cuda for x in inputs)
        and len({*map(id, inputs)}) == len(inputs)
        and not (differentiable and torch.is_grad_enabled())
        and not torch.is_autocast_enabled("cuda")
        and not any(map(Tensor.is_neg, inputs))
        and inputs[0].get_device() == torch.cuda.current_device()
    ):
        return work(*tensors)
    with _lock:
        if new := key not in _plans:
            while len(_plans) >= LIMIT:
                del _plans[next(iter(_plans))]  # the oldest
            _plans[key] = []
    if new:
        return work(*tensors)
    known = _plans.get(key)
    if known is None:
        return work(*tensors)
    copies = [x.contiguous() for x in inputs]
    addresses = [*map(Tensor.data_ptr, copies)]
    if not (all(addresses) and _aligned(addresses) and all(addresses.count(x.data_ptr()) == 1 for x in mutated)):
        return work(*tensors)
    # an address tells which input a kernel reads, so none may be that of two
    copies = [x.clone() if addresses.index(x.data_ptr()) < i else x for i, x in enumerate(copies)]
    sizes = [[*t.shape] for t in inputs]
    strides = [[None if n == 1 else s for n, s in zip(t.shape, t.stride(), strict=True)] for t in inputs]
    try:
        check = TensorGuards(*inputs, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
    except Exception:  # of another torch
        return work(*tensors)
    given = dict(zip(map(id, inputs), copies, strict=True))
    with collecting(_recorded) as launches:
        results = work(*[None if t is None else given[id(t)] for t in tensors])
    strided = tuple([i for i, x in enumerate(inputs) if copies[i] is not x])
    try:
        plan = _plan(launches, copies, results)
    except Exception:  # of another Triton: the call is done, and states in place are changed
        plan = None
    own = check, inputs[0].get_device(), differentiable, strided, ALLOCATORS[inputs[0].device.type]
    with _lock:
        if key in _plans:
            _plans[key] = None if plan is None else [_Plan(*own, *plan), *known][:ALIKE]
    return results


def _plan(launches: Sequence[Recorded], inputs: Sequence[Tensor], results: Results) -> tuple[Any, ...] | None:
    """(results, blocks, temporaries, replay) of what was recorded; None where it cannot be repeated."""
    from .kernels.launch import replay

    if not launches or any(compiled is None for compiled, _ in launches):  # where a hook of Triton's has compiled
        return None
    places = {x.data_ptr(): i for i, x in enumerate((*inputs, *results))}
    taken = {x.untyped_storage().data_ptr() for x in (*inputs, *results)}
    blocks, temporaries = [0], list[tuple[int, int]]()  # the first block holds all small ones
    for x in (x for _, launch in launches for x in launch.args if isinstance(x, Tensor)):
        if x.data_ptr() in places:
            continue
        storage = x.untyped_storage()
        if storage.data_ptr() in taken or x.storage_offset():
            return None  # a part of something
        places[x.data_ptr()] = len(inputs) + len(results) + len(temporaries)
        size = storage.nbytes()
        if size < BLOCK:
            temporaries.append((0, blocks[0]))
            blocks[0] += (size + 255) // 256 * 256
        else:
            temporaries.append((len(blocks), 0))
            blocks.append(size)
    new = [((*x.shape,), x.stride(), x.dtype) for x in results]
    bytes_ = [((size,), (1,), torch.uint8) for size in blocks] if temporaries else []
    return tuple(new), tuple(bytes_), tuple(temporaries), replay(launches, places, inputs[0].get_device())


def planned(body: Callable[..., Any], tensors: int, decay: int) -> Callable[..., Any]:
    """An op's body with plans; its first arguments, as many as ``tensors``, are tensors or None. It changes none of them."""

    def call(*args: Any) -> Any:
        given, constants = args[:tensors], args[tensors:]
        results = repeat(body, given, decay, constants)
        return run(body, given, decay, constants, lambda *given: body(*given, *constants)) if results is None else results

    return call
