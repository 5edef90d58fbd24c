"""ONNX: a program as a portable graph of standard operators, one ``Scan`` per GKA layer."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from .portable import ONNX, portable
from .program import BATCH, LENGTH

__all__ = ["present_name", "to_onnx"]

STANDARD_DOMAINS = ("", "ai.onnx")


def present_name(name: str) -> str:
    """The output that continues a state: h_state_0 → present_h_0, key_cache_2 → present_key_2, position → present_position.

    The spelling is that of TensorRT-Edge-LLM.
    """
    return "present_" + name.replace("_state_", "_").replace("_cache_", "_")


def to_onnx(program: ExportedProgram, path: str | Path, input_names: Sequence[str], output_names: Sequence[str]) -> Path:
    """Write ``program``, one of :class:`.Programs`, to ``path`` as ONNX in standard operators, dynamic in "batch" and "length".

    Weights past the 2 GB of a protobuf go to a second file beside ``path``, named after it with ``.data`` added.

    Raises:
        ImportError: onnx or onnxscript is absent.
        RuntimeError: an operator is not a standard one; nothing is left at ``path``.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401  torch.onnx needs it
    except ImportError as error:
        raise ImportError(f'ONNX export needs {error.name}, which is not installed: pip install "gka-compile[onnx]"') from error
    path = Path(path)
    (tokens, *states), _ = program.example_inputs
    converted = torch.onnx.export(
        portable(program, ONNX),
        dynamo=True,
        input_names=list(input_names),
        output_names=list(output_names),
        dynamic_shapes=(dict(enumerate((BATCH, LENGTH)[: tokens.dim()])), ({},) * len(states)),  # names: the states share them
        verbose=False,
    )
    assert converted is not None
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        built = Path(folder) / path.name
        converted.save(built)
        onnx.checker.check_model(str(built), full_check=True)
        model = onnx.load(str(built), load_external_data=False)
        foreign = sorted({f"{node.domain}::{node.op_type}" for node in nodes(model) if node.domain not in STANDARD_DOMAINS})
        if foreign:
            raise RuntimeError(f"ONNX: expected standard operators alone, got {', '.join(foreign)}")
        for file in sorted(Path(folder).iterdir(), reverse=True):  # the data first
            file.replace(path.parent / file.name)
    return path


def nodes(model: Any) -> Iterator[Any]:
    """All nodes of an ``onnx.ModelProto``, those of subgraphs and functions among them."""
    stack = [model.graph, *model.functions]
    while stack:
        for node in stack.pop().node:
            yield node
            for attribute in node.attribute:
                stack += [attribute.g] if attribute.HasField("g") else list(attribute.graphs)
