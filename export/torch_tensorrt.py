"""Torch-TensorRT: ``import gka_compile.export.torch_tensorrt`` keeps the layer inside its engines.

Torch-TensorRT has no converters for ``gka`` ops, so that each would be a break in the engine.  This registers their portable form
for GPUs (:func:`.decompositions`) as decompositions of ``torch_tensorrt.compile``, which exports the model: what is left is
operators that it converts, with dynamic batch and length.  Packed sequences have no portable form and raise ValueError.  Ask for
``disable_tf32=True`` where float32 shall mean float32.

``torch.compile(backend="torch_tensorrt")`` does not see the ops: torch opens them into their Triton kernels first, outside engines.

Raises, when imported:
    ImportError: neither torch-tensorrt nor torch-tensorrt-rtx is installed.
"""

import torch

from .portable import decompositions

try:
    from torch_tensorrt.dynamo.lowering import TORCH_TRT_DECOMPOSITIONS  # type: ignore[import-not-found]
except ImportError as error:
    raise ImportError(
        f"Torch-TensorRT could not be imported ({error}): pip install torch-tensorrt, or torch-tensorrt-rtx"
    ) from error

TORCH_TRT_DECOMPOSITIONS.update(decompositions())
TORCH_TRT_DECOMPOSITIONS.setdefault(torch.ops.aten.exp2.default, lambda x: torch.pow(2.0, x))  # has no converter either
