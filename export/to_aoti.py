"""AOTInductor: a program compiled to a ``.pt2`` package that runs without Python code of the model."""

from __future__ import annotations

import os
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from .portable import inductor_decompositions, portable
from .sealed import check_file

__all__ = ["to_aoti"]

# The wrapper that calls the kernels is most of the C++ code and none of the work: unoptimised, it compiles in half the time
CPU_OPTIONS = {"aot_inductor.compile_wrapper_opt_level": "O0"}
CUDA_OPTIONS = {"aot_inductor.embed_kernel_binary": True}


def to_aoti(program: ExportedProgram, path: str | Path) -> Path:
    """Compile ``program`` for the device and the processor that it was exported on, and write the package to ``path``.

    On CUDA Inductor opens the ``gka`` nodes and the package holds their Triton kernels.  On the CPU they are opaque to it, so the
    program takes its portable form first.  Weights are inside the package; it is loaded by ``torch._inductor.aoti_load_package``.

    Raises:
        ValueError: ``path`` does not end in .pt2.
        RuntimeError: the C++ compiler makes libraries that cannot be loaded; nothing is left at ``path``.
    """
    path = check_file(path)
    if path.suffix != ".pt2":
        raise ValueError(f"path: expected a name that ends in .pt2, got {path.name!r}")
    on_cpu = _device(program).type == "cpu"
    if on_cpu:
        program = portable(program, inductor_decompositions())
    options: dict[str, Any] = CPU_OPTIONS if on_cpu else CUDA_OPTIONS
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        built = Path(folder) / path.name
        torch._inductor.aoti_compile_and_package(program, package_path=str(built), inductor_configs=options)
        _check_runtime(built)
        built.replace(path)
    return path


def _device(program: ExportedProgram) -> torch.device:
    args, _ = program.example_inputs
    return args[0].device  # type: ignore[no-any-return]


def _check_runtime(package: Path) -> None:
    """Refuse a package whose library carries its own copy of the C++ runtime: loading it crashes the process."""
    if sys.platform != "linux":
        return
    with zipfile.ZipFile(package) as archive:
        for name in archive.namelist():
            if name.endswith(".so") and b"libstdc++.so" not in archive.read(name):
                compiler = os.environ.get("CXX", "g++")
                raise RuntimeError(
                    f"AOTInductor: expected a library that needs libstdc++.so, got one with the C++ runtime linked in ({name}): "
                    f"loading it would crash. The compiler {compiler!r} links it statically; use another one, say CXX=/usr/bin/g++"
                )
