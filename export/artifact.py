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

import hashlib
import importlib.metadata
import json
import platform
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from gka_compile import __version__

from .program import BATCH, LENGTH, LanguageModel, Programs, export_program
from .to_aoti import to_aoti
from .to_onnx import present_name, to_onnx
from .to_tensorrt import LIBRARIES, Range, to_tensorrt

__all__ = ["BACKENDS", "DEFAULT_BACKENDS", "ArtifactError", "load_manifest", "save_artifact"]

FORMAT, VERSION = "gka-compile artifact", 1
MANIFEST = "manifest.json"
SUFFIXES = {"aoti": ".pt2", "onnx": ".onnx", "tensorrt": ".engine"}
BACKENDS = tuple(SUFFIXES)
DEFAULT_BACKENDS = ("aoti", "onnx")
PACKAGES = {"aoti": ("torch",), "onnx": ("torch", "onnx", "onnxscript"), "tensorrt": ("torch", "onnx", "onnxscript")}
LONGEST_PREFILL = 4096  # of engines, unless the model or the caller says otherwise
USUAL_PREFILL = 128

Manifest = dict[str, Any]


class ArtifactError(ValueError):
    """A folder that is not an artifact, not a whole one, or not one for this version or machine."""


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
            and for prompts up to the model's max_length or LONGEST_PREFILL.

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
    folder = Path(folder)
    _check_replaceable(folder)
    say = progress if progress is not None else lambda _: None
    say("export")
    start = time.perf_counter()
    programs = export_program(model)
    export_seconds = time.perf_counter() - start
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        built = Path(temporary) / folder.name
        built.mkdir()
        engines = _engine_options(model, programs, tensorrt or {}) if "tensorrt" in backends else {}
        entries = {backend: _build(backend, programs, built, say, engines) for backend in backends}
        manifest = _manifest(model, programs, entries, built) | {"export_seconds": round(export_seconds, 3)}
        manifest["sha256"] = _digest_of(manifest)
        (built / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        if folder.exists():
            _check_replaceable(folder)  # again: building took a while
            folder.replace(Path(temporary) / "old")
        built.replace(folder)
    return manifest


def _check_replaceable(folder: Path) -> None:
    if not folder.exists() and not folder.is_symlink():
        return
    if folder.is_symlink() or not folder.is_dir():
        raise ArtifactError(f"{folder}: expected a new folder or an artifact to replace, got something else of that name")
    if any(folder.iterdir()):
        _read(folder, "expected a new folder or an artifact to replace")


def _engine_options(model: LanguageModel, programs: Programs, given: Mapping[str, Any]) -> dict[str, Any]:
    most = model.config.max_length if _is_limited(programs) else LONGEST_PREFILL
    lengths: Range = (1, min(USUAL_PREFILL, most), most)
    return {"lengths": lengths, "batches": (1, 1, 8), **given}


def _is_limited(programs: Programs) -> bool:
    """A static cache of keys and values is the one part of a state that fills up."""
    return any(name.startswith("key_cache") for name in programs.state)


def _build(
    backend: str, programs: Programs, folder: Path, say: Callable[[str], None], engine_options: dict[str, Any]
) -> dict[str, Any]:
    start = time.perf_counter()
    files, entry = {}, {}
    for name, program in programs.items():
        say(f"{backend} {name}")
        path = folder / (name + SUFFIXES[backend])
        inputs, outputs = ["tokens", *programs.state], ["logits", *map(present_name, programs.state)]
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


def _manifest(model: LanguageModel, programs: Programs, entries: dict[str, dict[str, Any]], folder: Path) -> Manifest:
    config = model.config.to_dict()
    state = [_describe(name, x.dtype, (BATCH, *x.shape[1:])) for name, x in programs.state.items()]
    device = next(iter(programs.state.values())).device.type
    return {
        "format": FORMAT,
        "version": VERSION,
        "gka_compile": __version__,
        "device": device,
        "target": target(device),
        "model": {
            "config": config,
            "vocab_size": model.config.vocab_size,
            "max_length": model.config.max_length if _is_limited(programs) else None,
        },
        "state": state,
        "programs": {name: _signature(name, program, state, model.config.vocab_size) for name, program in programs.items()},
        "backends": entries,
        "files": {
            path.name: {"bytes": path.stat().st_size, "sha256": _digest(path)}
            for path in sorted(folder.iterdir(), key=lambda p: p.name)
        },
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
    folder = Path(folder)
    manifest = _read(folder, "expected an artifact")
    for name, entry in manifest["files"].items():
        path = folder / name
        if Path(name).name != name:
            raise ArtifactError(f"{folder}: expected the names of files in the folder, got {name!r} in {MANIFEST}")
        if not path.is_file():
            raise ArtifactError(f"{folder}: expected the file {name} that {MANIFEST} lists, got none")
        if path.stat().st_size != entry["bytes"]:
            raise ArtifactError(f"{path}: expected {entry['bytes']} bytes, got {path.stat().st_size}: truncated or replaced")
        if _digest(path) != entry["sha256"]:
            raise ArtifactError(f"{path}: expected the SHA-256 that {MANIFEST} lists, got another: the file was changed")
    return manifest


def _read(folder: Path, expected: str) -> Manifest:
    """The manifest, itself checked, but not the files."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ArtifactError(f"{folder}: {expected}, got no {MANIFEST} there")
    try:
        manifest = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ArtifactError(f"{path}: {expected}, got no JSON: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ArtifactError(f"{path}: {expected}, got JSON of another kind")
    if manifest.get("version") != VERSION:
        raise ArtifactError(
            f"{path}: expected format version {VERSION} (gka-compile {__version__}), got {manifest.get('version')} "
            f"(gka-compile {manifest.get('gka_compile')}): export the model again"
        )
    if manifest.get("sha256") != _digest_of(manifest):
        raise ArtifactError(f"{path}: expected contents of the SHA-256 that it names, got others: the manifest was changed")
    return manifest


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _digest_of(manifest: Manifest) -> str:
    """SHA-256 of all but the field that holds it."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
