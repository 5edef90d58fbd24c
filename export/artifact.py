"""An artifact: a folder that holds a model in executable form, and a manifest that says what it is.

    manifest.json     what to feed the programs, what made them, size and SHA-256 of every file
    prefill.pt2       backend "aoti": compiled for one kind of processor or GPU
    step.pt2
    prefill.onnx      backend "onnx": standard operators, any machine
    step.onnx         (with weights past 2 GB in .onnx.data files beside them)
    prefill.engine    backend "tensorrt": for the GPUs and the version of the library in prefill.engine.json
    step.engine

Weights are inside the programs; the folder runs without the model's Python code (:mod:`.runner`).
"""

from __future__ import annotations

import importlib.metadata
import inspect
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from .program import BATCH, LENGTH, LanguageModel, Programs, check_config, export_program, max_length, prefill_lengths
from .sealed import Manifest, Sealed
from .to_aoti import to_aoti
from .to_onnx import model_names, present_name, to_onnx
from .to_tensorrt import LIBRARIES, check_options, to_tensorrt

__all__ = ["BACKENDS", "DEFAULT_BACKENDS", "ArtifactError", "load_manifest", "save_artifact"]

SUFFIXES = {"aoti": ".pt2", "onnx": ".onnx", "tensorrt": ".engine"}
BACKENDS = tuple(SUFFIXES)
DEFAULT_BACKENDS = ("aoti", "onnx")
PACKAGES = {"aoti": ("torch",), "onnx": ("torch", "onnx", "onnxscript"), "tensorrt": ("torch", "onnx", "onnxscript")}


class ArtifactError(ValueError):
    """A folder that is not an artifact, not a whole one, or not one for this version or machine."""


SEALED = Sealed("an artifact", "gka-compile artifact", 1, "export the model again", ArtifactError)


# --- writing ---------------------------------------------------------------------------------------------------------------


def save_artifact(
    model: LanguageModel,
    folder: str | Path,
    backends: Sequence[str] = DEFAULT_BACKENDS,
    progress: Callable[[str], None] | None = None,
    tensorrt: Mapping[str, Any] | None = None,
) -> Manifest:
    """Export ``model`` for each backend and write the artifact to ``folder``, which appears when it is whole or not at all.

    Args:
        model: in eval mode, on the device that the artifact is for.
        folder: new, or an artifact, which is replaced.
        backends: among "aoti", "onnx" and "tensorrt".
        progress: called with a short text before each stage ("export", "aoti prefill", …).
        tensorrt: for backend "tensorrt", keyword arguments of :func:`.to_tensorrt`: flavour, compute_capabilities, lengths (of
            prefill), batches, workspace, mixed. Without them engines are of TensorRT-RTX for its usual GPUs, for batches up to 8
            and for prompts up to the model's max_length, where it has one, else 4096.

    Returns:
        The manifest; ``manifest["backends"][name]["seconds"]`` is what building a backend took, beside
        ``manifest["export_seconds"]`` for the export that they share.

    Raises:
        ArtifactError: ``folder`` exists and is not an artifact.
        ImportError: a package that a backend needs is absent; the message says which.
        TypeError, ValueError, RuntimeError: as :func:`.export_program`, :func:`.to_aoti`, :func:`.to_onnx`, :func:`.to_tensorrt`.
    """
    if isinstance(backends, str) or not backends or set(backends) - set(BACKENDS) or len(set(backends)) != len(backends):
        raise ValueError(f"backends: expected some of {', '.join(BACKENDS)}, each once, got {backends!r}")
    if tensorrt is not None and "tensorrt" not in backends:
        raise ValueError(f"tensorrt: expected None without backend tensorrt, got {dict(tensorrt)}")
    check_config(model)
    folder = Path(folder)
    SEALED.check_replaceable(folder)
    if "tensorrt" in backends:
        known = list(inspect.signature(check_options).parameters)
        if unknown := sorted(set(tensorrt or {}) - set(known), key=str):
            raise TypeError(f"tensorrt: expected options among {', '.join(known)}, got {', '.join(map(str, unknown))}")
        check_options(**(tensorrt or {}))
    say = progress if progress is not None else lambda _: None
    say("export")
    start = time.perf_counter()
    programs = export_program(model)
    export_seconds = time.perf_counter() - start

    def fill(built: Path) -> Manifest:
        engines = _engine_options(model, programs, tensorrt or {}) if "tensorrt" in backends else {}
        entries = {backend: _build(backend, programs, built, say, engines) for backend in backends}
        return _manifest(model, programs, entries) | {"export_seconds": round(export_seconds, 3)}

    return SEALED.write(folder, fill)


def _engine_options(model: LanguageModel, programs: Programs, given: Mapping[str, Any]) -> dict[str, Any]:
    lengths = prefill_lengths(given.get("lengths"), max_length(model, programs))
    return {"batches": (1, 1, 8), **given, "lengths": lengths}


def _build(
    backend: str, programs: Programs, folder: Path, say: Callable[[str], None], engine_options: dict[str, Any]
) -> dict[str, Any]:
    start = time.perf_counter()
    files, entry = {}, {}
    for name, program in programs.items():
        say(f"{backend} {name}")
        path = folder / (name + SUFFIXES[backend])
        inputs, outputs = model_names(programs)
        if backend == "aoti":
            to_aoti(program, path)
        elif backend == "onnx":
            to_onnx(program, path, inputs, outputs)
        else:
            options = engine_options if name == "prefill" else {k: x for k, x in engine_options.items() if k != "lengths"}
            made = to_tensorrt(program, path, inputs, outputs, **options)
            entry = {key: made[key] for key in ("flavour", "compute_capabilities")}
            entry["library"] = f"{LIBRARIES[made['flavour']]} {made['library_version']}"
        files[name] = path.name
    entry |= {"programs": files, "seconds": round(time.perf_counter() - start, 3)}
    return entry | {"versions": {name: importlib.metadata.version(name) for name in PACKAGES[backend]}}


def _manifest(model: LanguageModel, programs: Programs, entries: dict[str, dict[str, Any]]) -> Manifest:
    config = model.config.to_dict()
    state = [_describe(name, x.dtype, (BATCH, *x.shape[1:])) for name, x in programs.state.items()]
    device = next(iter(programs.state.values())).device.type
    return {
        "device": device,
        "target": target(device),
        "model": {
            "config": config,
            "vocab_size": model.config.vocab_size,
            "max_length": max_length(model, programs),
        },
        "state": state,
        "programs": {name: _signature(name, program, state, model.config.vocab_size) for name, program in programs.items()},
        "backends": entries,
    }


def _describe(name: str, dtype: torch.dtype, shape: Sequence[int | str]) -> dict[str, Any]:
    return {"name": name, "dtype": str(dtype).removeprefix("torch."), "shape": list(shape)}


def _signature(name: str, program: ExportedProgram, state: list[dict[str, Any]], vocab_size: int) -> dict[str, Any]:
    tokens = _describe("tokens", torch.int64, (BATCH, LENGTH) if name == "prefill" else (BATCH,))
    logits: Tensor = next(node for node in program.graph.nodes if node.op == "output").args[0][0].meta["val"]
    return {
        "inputs": [tokens, *state],
        "outputs": [
            _describe("logits", logits.dtype, (BATCH, vocab_size)),
            *({**x, "name": present_name(x["name"])} for x in state),
        ],
    }


def target(device: str) -> str:
    """What compiled code is for: "cpu x86_64 AVX512", "cuda 9.0"."""
    if device == "cuda":
        return "cuda {}.{}".format(*torch.cuda.get_device_capability())
    return f"cpu {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


# --- reading ---------------------------------------------------------------------------------------------------------------


def load_manifest(folder: str | Path) -> Manifest:
    """The manifest of the artifact in ``folder``, every file checked against it.

    Raises:
        ArtifactError: the folder or a file is absent, truncated or changed, or the format is another version's.
    """
    return SEALED.load(folder)
