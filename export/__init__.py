"""A model exported once, in forms that run without its Python code. onnx, onnxruntime and TensorRT are imported when used."""

from .artifact import BACKENDS, DEFAULT_BACKENDS, ArtifactError, load_manifest, save_artifact
from .bundle import BundleError, Variant, build_bundle, load_bundle, variants
from .engine import DeviceArray, Engine, EngineError
from .fused import save_fused
from .ort_library import ort_library
from .portable import decompositions
from .program import Programs, export_program
from .runner import Runner
from .to_aoti import to_aoti
from .to_onnx import to_onnx
from .to_tensorrt import RTX_CAPABILITIES, to_tensorrt

__all__ = [
    "BACKENDS",
    "DEFAULT_BACKENDS",
    "RTX_CAPABILITIES",
    "ArtifactError",
    "BundleError",
    "DeviceArray",
    "Engine",
    "EngineError",
    "Programs",
    "Runner",
    "Variant",
    "build_bundle",
    "decompositions",
    "export_program",
    "load_bundle",
    "load_manifest",
    "ort_library",
    "save_artifact",
    "save_fused",
    "to_aoti",
    "to_onnx",
    "to_tensorrt",
    "variants",
]
