"""The GKA ops for ONNX Runtime's CUDA provider: a custom-op library over the kernels of one bundle.

    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(ort_library(bundle, include)))
    session = onnxruntime.InferenceSession("model.onnx", options, providers=["CUDAExecutionProvider"])

The model is one of ``to_onnx(form="fused")`` whose nodes are among the bundle's variants; the library takes the nodes before their
functions do.  ONNX Runtime does not go back to the functions where it cannot: a session without the CUDA provider, or whose nodes
the bundle lacks, does not load while the library is registered.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from .bundle import load_bundle

__all__ = ["ort_library"]

ERROR_LENGTH = 2000  # of what the compiler says: the first error brings many
HEADER = "onnxruntime_c_api.h"
SOURCES = ("ort/gka_ort.cpp", "plugin/gka_core.cpp", "plugin/gka_core.h")
FLAGS = ("-std=c++17", "-O2", "-shared", "-fPIC", "-fvisibility=hidden", "-static-libstdc++", "-static-libgcc")


def ort_library(bundle: str | Path, include: str | Path | None = None) -> Path:
    """The custom-op library in a kernel bundle's folder; it is compiled if it is not there yet.

    Args:
        bundle: folder of :func:`.build_bundle`.
        include: folder of onnxruntime_c_api.h of ONNX Runtime 1.17 or later, which comes with its release archives (the wheels
            have none); needed only to compile. The library runs in every later version.

    Raises:
        BundleError: not a whole bundle.
        ValueError: the library is not there, and ``include`` is None or lacks the header.
        RuntimeError: there is no C++ compiler (CXX, or c++), or it fails; nothing is left behind then.
    """
    folder = Path(bundle)
    manifest = load_bundle(folder)
    sources = [Path(__file__).parent / name for name in SOURCES]
    contents = manifest["sha256"].encode() + b"".join(source.read_bytes() for source in sources)
    library = folder / f"libgka_ort.{hashlib.sha256(contents).hexdigest()[:16]}.so"
    if library.exists():
        return library
    if include is None:
        raise ValueError(f"include: expected the folder of {HEADER}, for {folder} has no such library yet, got None")
    if not (Path(include) / HEADER).is_file():
        raise ValueError(f"include: expected a folder with {HEADER}, from a release archive of ONNX Runtime, got {include}")
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise RuntimeError(f"a custom-op library needs a C++ compiler, got none named {compiler}: set CXX")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".ort.") as temporary:
        built = Path(temporary) / library.name
        paths = ["-isystem", str(include), "-I", str(folder)]
        command = [compiler, *FLAGS, *paths, *map(str, sources[:2]), "-o", str(built), "-ldl"]
        ran = subprocess.run(command, capture_output=True, text=True)
        if ran.returncode:
            raise RuntimeError(f"a custom-op library needs to compile, got from {compiler}:\n{ran.stderr.strip()[:ERROR_LENGTH]}")
        built.replace(library)
    return library
