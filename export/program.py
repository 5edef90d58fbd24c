"""A model as two exported programs, prefill and step: the one caller of ``torch.export``.

Both are functions of flat tensors, (tokens, *state) → (logits, *new state), with dynamic batch and length.  Every op of the ``gka``
namespace is one node in them, so that one program serves every backend: Inductor opens the nodes where there are kernels (CUDA),
:mod:`.portable` replaces them where there are none (ONNX, AOTInductor on the CPU).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

__all__ = [
    "BATCH",
    "LENGTH",
    "LanguageModel",
    "Programs",
    "check_config",
    "export_program",
    "lengths_up_to",
    "max_length",
    "prefill_lengths",
]

BATCH, LENGTH = "batch", "length"  # names of the dynamic dimensions

USUAL_PREFILL, LONGEST_PREFILL = 128, 4096  # tokens of one prefill, for engines, unless the model or the caller says otherwise

# Neither size may be 0 or 1, nor the number of chunks (of 64 tokens) 1, or torch.export takes them for constants
EXAMPLE_BATCH, EXAMPLE_LENGTH = 2, 130


class LanguageModel(Protocol):
    """What a model needs in order to be exported; :class:`gka_compile.model.ByteLM` has it.

    A state is an ordered dict of tensors whose dimension 0 is the batch; it starts as zeros.
    """

    config: Any  # has vocab_size, max_length and to_dict()

    def init_state(self, batch_size: int) -> dict[str, Tensor]: ...
    def prefill(self, tokens: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]: ...
    def step(self, tokens: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]: ...


@dataclass(frozen=True)
class Programs:
    """What :func:`export_program` returns."""

    prefill: ExportedProgram
    """(tokens [batch, length] int64, *state) → (logits [batch, vocab], *new state)"""
    step: ExportedProgram
    """(tokens [batch] int64, *state) → (logits [batch, vocab], *new state)"""
    state: dict[str, Tensor]
    """An example state, of batch EXAMPLE_BATCH: names, order, shapes, dtypes and device of the state's tensors."""

    def items(self) -> tuple[tuple[str, ExportedProgram], ...]:
        """Both programs with their names."""
        return ("prefill", self.prefill), ("step", self.step)


class _Entry(nn.Module):
    """One entry of the model as a function of flat tensors."""

    def __init__(self, model: nn.Module, name: str, keys: list[str]) -> None:
        super().__init__()
        self.model, self.name, self.keys = model, name, keys

    def forward(self, tokens: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        result = getattr(self.model, self.name)(tokens, dict(zip(self.keys, state, strict=True)))
        if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)):
            kind = "a tensor" if isinstance(result, Tensor) else type(result).__name__
            raise TypeError(f"model.{self.name}: expected (logits, state) with a dict for a state, got {kind}")
        logits, new = result
        if set(new) != set(self.keys):
            raise ValueError(f"model.{self.name}: expected the state's keys {', '.join(self.keys)}, got {', '.join(map(str, new))}")
        for key, given in zip(self.keys, state, strict=True):
            expected, got = (f"{x.dtype} [batch, {', '.join(map(str, x.shape[1:]))}]" for x in (given, new[key]))
            if got != expected:
                raise ValueError(f"model.{self.name}: expected {key} as init_state makes it, {expected}, got {got}")
        # AOTInductor reads its inputs with the example's strides and does not look: what comes out must be fit to go back in
        return logits, *(new[key].contiguous() for key in self.keys)


def export_program(model: LanguageModel) -> Programs:
    """Export ``model.prefill`` and ``model.step`` on the model's device, without gradients.

    Raises:
        TypeError: the model is not a module, or its state is not a dict of tensors.
        ValueError: the model is in training mode, or its state does not start as zeros with the batch in dimension 0.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    for name in ("init_state", "prefill", "step"):
        if not callable(getattr(model, name, None)):
            raise TypeError(f"model: expected methods init_state, prefill and step, got {type(model).__name__} without {name}")
    if model.training:
        raise ValueError("model: expected a model in eval mode, got one in training mode: call model.eval()")
    state = _example_state(model)
    device = next(iter(state.values())).device
    tokens = torch.zeros(EXAMPLE_BATCH, EXAMPLE_LENGTH, dtype=torch.int64, device=device)

    def export(name: str, tokens: Tensor, sizes: dict[int, Any]) -> ExportedProgram:
        states = ({0: Dim(BATCH)},) * len(state)
        entry = _Entry(model, name, list(state))
        with torch.no_grad():
            return torch.export.export(entry, (tokens, *state.values()), dynamic_shapes=(sizes, states), strict=False)

    return Programs(
        prefill=export("prefill", tokens, {0: Dim(BATCH), 1: Dim(LENGTH)}),
        step=export("step", tokens[:, 0].clone(), {0: Dim(BATCH)}),
        state=state,
    )


def check_config(model: LanguageModel) -> None:
    """What a manifest says of a model.

    Raises:
        TypeError: model.config has no vocab_size, max_length or to_dict().
    """
    absent = [name for name in ("vocab_size", "max_length", "to_dict") if not hasattr(getattr(model, "config", None), name)]
    if isinstance(model, nn.Module) and absent:
        raise TypeError(f"model: expected a config with vocab_size, max_length and to_dict(), got one without {', '.join(absent)}")


def max_length(model: LanguageModel, programs: Programs) -> int | None:
    """Tokens that a sequence may have: a static cache of keys and values is the one part of a state that fills up."""
    return model.config.max_length if any(name.startswith("key_cache") for name in programs.state) else None


def lengths_up_to(most: int) -> tuple[int, int, int]:
    """(least, usual, most) tokens of a prefill."""
    return 1, min(USUAL_PREFILL, most), most


def prefill_lengths(given: Sequence[int] | None, limit: int | None) -> tuple[int, int, int]:
    """(least, usual, most) tokens of a prefill in engines for a model of that :func:`max_length`."""
    if given is None:
        return lengths_up_to(LONGEST_PREFILL if limit is None else limit)
    least, usual, most = given
    if limit is not None and most > limit:
        raise ValueError(f"lengths: expected at most the model's max_length = {limit}, got {most}")
    return least, usual, most


def _example_state(model: LanguageModel) -> dict[str, Tensor]:
    state = model.init_state(EXAMPLE_BATCH)
    if not isinstance(state, dict) or not state or not all(isinstance(x, Tensor) for x in state.values()):
        raise TypeError(f"model.init_state: expected a dict of tensors, got {type(state).__name__}")
    for name, x in state.items():
        if x.dim() == 0 or x.shape[0] != EXAMPLE_BATCH:
            raise ValueError(f"model.init_state: expected the batch {EXAMPLE_BATCH} in dimension 0 of {name}, got {tuple(x.shape)}")
        if x.any():
            raise ValueError(f"model.init_state: expected {name} to start as zeros, got others")
    return state
