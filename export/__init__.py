"""A model exported once, in forms that run without its Python code. onnx and onnxruntime are imported when they are used."""

from .artifact import BACKENDS, ArtifactError, load_manifest, save_artifact
from .program import Programs, export_program
from .runner import Runner
from .to_aoti import to_aoti
from .to_onnx import to_onnx

__all__ = [
    "BACKENDS",
    "ArtifactError",
    "Programs",
    "Runner",
    "export_program",
    "load_manifest",
    "save_artifact",
    "to_aoti",
    "to_onnx",
]
