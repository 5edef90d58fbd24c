"""A whole model for the package's own kernels: ONNX files with ``gka`` nodes, the kernels, and the sources that run them.

prefill.onnx     nodes of the domain gka; with form "fused", functions beside them
step.onnx
bundle/          the kernels (:mod:`.bundle`)
plugin/, ort/    C++ sources of the TensorRT plugin library, of the custom-op library of ONNX Runtime
build.sh         form "plugin": the commands for the device, without Python
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from .bundle import build_bundle, check_capabilities, variants
from .program import LanguageModel, Programs, export_program, max_length, prefill_lengths
from .sealed import Manifest, holds_something, whole
from .to_onnx import OLDEST_OPSET, model_names, to_onnx
from .to_tensorrt import check_range

__all__ = ["save_fused"]

SOURCES = {"plugin": ("plugin",), "fused": ("plugin", "ort")}

_SCRIPT = """\
#!/bin/sh
# On the device, with CMake, a C++17 compiler and TensorRT's headers and trtexec: builds libgka_trt.so and both engines here.
#   TENSORRT_INCLUDE_DIR   folder of NvInfer.h
#   PLUGINS                --plugins for TensorRT 8.5
#   FLAGS                  for trtexec: in TensorRT 8 --tacticSources=-CUBLAS, and for float16 models --fp16, in TensorRT >= 10
#                          --stronglyTyped
set -eu
cd "$(dirname "$0")"
cmake -S plugin -B build -DGKA_BUNDLE="$PWD/bundle" -DTENSORRT_INCLUDE_DIR="${TENSORRT_INCLUDE_DIR:-/usr/include/aarch64-linux-gnu}"
cmake --build build
"""


def save_fused(
    model: LanguageModel,
    folder: str | Path,
    compute_capabilities: Sequence[str],
    form: str = "plugin",
    opset: int = OLDEST_OPSET,
    lengths: tuple[int, int, int] | None = None,
    batches: tuple[int, int, int] = (1, 1, 1),
    progress: Callable[[str], None] | None = None,
) -> Manifest:
    """Export ``model`` for our kernels and write all that a device needs to ``folder``, which appears whole or not at all.

    Args:
        model: in eval mode.
        folder: new or empty.
        compute_capabilities: as in :func:`.build_bundle`; of GPUs whose kernels take chunks of one length.
        form: "plugin" for TensorRT, "fused" for ONNX Runtime; see :func:`.to_onnx`.
        opset: as in :func:`.to_onnx`; the default is what TensorRT 8.5 reads.
        lengths, batches: (least, usual, most) of the engines that build.sh builds, tokens of a prefill and sequences. lengths None:
            up to the model's max_length, where it has one, else 4096.
        progress: called with a short text before each stage.

    Returns:
        The bundle's manifest.

    Raises:
        ImportError: onnx, onnxscript or Triton is absent.
        TypeError, ValueError, RuntimeError: ``folder`` holds something; lengths or batches that do not rise;
            ``compute_capabilities`` of several chunk lengths; as :func:`.export_program`, :func:`.to_onnx`, :func:`.build_bundle`.
    """
    folder = Path(folder)
    _check_new(folder)
    if form not in SOURCES:
        raise ValueError(f"form: expected one of {', '.join(SOURCES)}, got {form!r}")
    if form != "plugin" and lengths is not None:
        raise ValueError(f"lengths: expected None for form {form!r}, which no engine is built of, got {lengths}")
    check_range("lengths", lengths)
    check_range("batches", batches)
    compute_capabilities = check_capabilities(compute_capabilities)
    say = progress if progress is not None else lambda _: None
    say("export")
    programs = export_program(model)
    lengths = prefill_lengths(lengths, max_length(model, programs))
    needed = [replace(variant, chunk_size=None) for _, program in programs.items() for variant in variants(program)]
    if not needed:
        raise ValueError("model: expected layers of Gated KalmaNet, which the kernels are for, got a model without")
    chunks = {c: {v.chunk(c) for v in needed if v.op != "step"} for c in compute_capabilities}
    found = set().union(*chunks.values())
    if len(found) > 1:
        told = ", ".join(f"{c} ({' and '.join(map(str, sorted(n)))})" for c, n in chunks.items())
        raise ValueError(
            f"compute_capabilities: expected GPUs whose chunks have one length, for it is part of the files, got {told}"
        )
    chunk = next(iter(found), None)
    with whole(folder, _check_new) as built:
        for name, program in programs.items():
            say(f"onnx {name}")
            device = None if form == "plugin" else "cuda"
            to_onnx(
                program, built / f"{name}.onnx", *model_names(programs), form=form, opset=opset, device=device, chunk_size=chunk
            )
        manifest = build_bundle(built / "bundle", [replace(v, chunk_size=chunk) for v in needed], compute_capabilities, say)
        for name in SOURCES[form]:
            shutil.copytree(Path(__file__).parent / name, built / name)
        if form == "plugin":
            (built / "build.sh").write_text(_SCRIPT + _trtexec(programs, lengths, batches))
    return manifest


def _check_new(folder: Path) -> None:
    expected = "expected a new or empty folder"
    if holds_something(folder, expected):
        raise ValueError(f"{folder}: {expected}, got one that is not empty")


def _trtexec(programs: Programs, lengths: Sequence[int], batches: Sequence[int]) -> str:
    """Commands that build the engines."""

    def shapes(tokens: tuple[int, ...]) -> str:
        sizes = {"tokens": tokens} | {name: (tokens[0], *x.shape[1:]) for name, x in programs.state.items()}
        return ",".join(f"{name}:{'x'.join(map(str, size))}" for name, size in sizes.items())

    lines = []
    for name, _ in programs.items():
        asked = [(b, n) if name == "prefill" else (b,) for b, n in zip(batches, lengths, strict=True)]
        lines.append(
            f'trtexec --onnx={name}.onnx --saveEngine={name}.engine "${{PLUGINS:---dynamicPlugins}}=build/libgka_trt.so" \\'
        )
        options = (f"--{kind}Shapes={shapes(tokens)}" for kind, tokens in zip(("min", "opt", "max"), asked, strict=True))
        lines.append(f"    --noTF32 ${{FLAGS-}} {' '.join(options)}")
    return "\n".join(lines) + "\n"
