"""Ops called without the dispatcher where nobody would notice.

The dispatcher and torch's Python wrappers of a custom op cost several times the CPU time of the launch itself.  They serve what
traces, intercepts or transforms a call.  Where none of that is there (:func:`unobserved`), an op's body is called as it is, and
where a gradient is to be recorded, in an ``autograd.Function`` made of the registered formula.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import _C, Tensor
from torch._library.custom_ops import CustomOpDef
from torch._library.triton import set_wrap_triton_enabled
from torch.autograd import forward_ad

__all__ = ["TENSORS", "EagerOp", "no_hidden_observer", "unobserved"]

TENSORS = frozenset({Tensor, torch.nn.Parameter})  # types that do nothing of their own in a call
_PLAIN = TENSORS | {type(None), float, int, bool}

_INFERENCE = _C.DispatchKeySet(_C.DispatchKey.BackendSelect)
_ORDINARY = _INFERENCE | _C.DispatchKeySet(_C.DispatchKey.ADInplaceOrView)
_USUAL_KEYS = frozenset({_INFERENCE.raw_repr(), _ORDINARY.raw_repr()})


def no_hidden_observer() -> bool:
    """Whether nothing would see a call that does not add dispatch keys to it: Dynamo, function modes, forward-mode AD."""
    return (
        not torch.compiler.is_compiling()  # first, for Dynamo reads this function and stops here
        and not _C._len_torch_function_stack()
        and forward_ad._current_level < 0
    )


def unobserved() -> bool:
    """Whether no mode, trace or transform would see a call, nothing but autograd that is.

    Dispatch modes, transforms of torch.func, legacy vmap, functionalization and torch.jit.trace add dispatch keys to every call.
    """
    return no_hidden_observer() and _C._dispatch_tls_local_include_set().raw_repr() in _USUAL_KEYS


class EagerOp(CustomOpDef):
    """An op that calls its body where that goes :func:`unobserved`, on plain tensors; in all else the op that it was made of."""

    _body: Callable[..., Any]
    _mutated: tuple[int, ...]
    _function: type[torch.autograd.Function] | None

    @staticmethod
    def over(op: CustomOpDef, body: Callable[..., Any], mutates: Sequence[str]) -> "EagerOp":
        """``op`` itself, which the registration keeps, as an EagerOp."""
        op.__class__ = EagerOp
        assert isinstance(op, EagerOp)
        names = [a.name for a in op._opoverload._schema.arguments]
        op._body, op._mutated, op._function = body, tuple(names.index(name) for name in mutates), None
        return op

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs or not (
            unobserved()
            and _PLAIN.issuperset(map(type, args))
            and args
            and type(args[0]) in TENSORS
            and (args[0].is_cuda or args[0].is_cpu)
        ):
            return super().__call__(*args, **kwargs)
        if not (torch.is_grad_enabled() and _C._any_requires_grad(*args)):
            return self._run(*args)
        if self._function is None:
            return super().__call__(*args)
        return self._function.apply(*args)

    def _run(self, *args: Any) -> Any:
        if self._mutated:  # autograd asks whether what it saved is still the same
            torch.autograd.graph.increment_version([args[i] for i in self._mutated])
        with set_wrap_triton_enabled(False):
            return self._body(*args)

    def register_autograd(self, backward: Callable[..., Any], /, *, setup_context: Callable[..., Any] | None = None) -> None:
        super().register_autograd(backward, setup_context=setup_context)

        def forward(ctx: Any, *args: Any) -> Any:
            output = self._run(*args)
            if setup_context is not None:
                setup_context(ctx, args, output)
            return output

        # not a setup_context of its own: torch would bind the arguments by the signature at every call
        members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self._function = type(self._name.replace("::", "_"), (torch.autograd.Function,), members)
