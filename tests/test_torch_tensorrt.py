"""Torch-TensorRT: programs with ``gka`` nodes become one engine, as far as a machine without a GPU shows it.

Torch-TensorRT asks the GPU for its properties when imported, and opens what it built. TensorRT-RTX builds without a GPU; so where
there is none, these tests answer for it, and what is built is not opened.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

INSTALLED = importlib.util.find_spec("torch_tensorrt") is not None

PROGRAM = """
import json, sys, types
import torch
from torch import nn
from torch.export import Dim

if not torch.cuda.is_available():
    told = types.SimpleNamespace(name="no GPU", major=8, minor=9, total_memory=2**34, multi_processor_count=100)
    torch.cuda.get_device_capability = lambda *_: (told.major, told.minor)
    torch.cuda.get_device_properties = lambda *_: told
    torch.cuda.current_device = lambda: 0
    torch.cuda.mem_get_info = lambda *_: (2**34, 2**34)
import torch_tensorrt
from torch_tensorrt import dynamo
from torch_tensorrt.dynamo.conversion import _TRTInterpreter as interpreter

if not torch.cuda.is_available():
    class Runtime:
        def __init__(self, *_): ...
        def deserialize_cuda_engine(self, engine):
            return types.SimpleNamespace(get_aliased_input_tensor=lambda *_: None, serialize=lambda: engine)
    interpreter.trt.Runtime = Runtime
networks = []
populate = interpreter.TRTInterpreter._populate_trt_builder_config
def recorded(self, *args, **kwargs):
    network = self.ctx.net
    tensors = [network.get_output(i) for i in range(network.num_outputs)]
    networks.append([network.num_inputs, [[t.dtype.name, list(t.shape)] for t in tensors]])
    return populate(self, *args, **kwargs)
interpreter.TRTInterpreter._populate_trt_builder_config = recorded

gka, H, K, V = torch.ops.gka, 4, 16, 24
class Prefill(nn.Module):
    def forward(self, q, k, v, g, gk, alpha, beta, h, u):
        *states, h1, u1 = gka.chunk_state(k, v, g, gk, beta, h, u, None, H, 64)
        o, *_ = gka.chunk_output(q, k, v, g, gk, alpha, beta, h, u, *states, None, 0.25, 0.02, 30, 64)
        return o, h1, u1
class Step(nn.Module):
    def forward(self, q, k, v, g, gk, alpha, beta, h, u):
        return gka.step(q, k, v, h, u, g, gk, alpha, beta, 0.25, 0.02, 30)

def shapes(B, T):
    lead = (B,) if T is None else (B, T)
    return [(*lead, H, K), (*lead, 2, K), (*lead, 2, V), *[(*lead, H)] * 4, (B, H, K, K), (B, H, K, V)]

import gka_compile
registered, prefill, half = (x == "1" for x in sys.argv[1:])
if registered:
    import gka_compile.export.torch_tensorrt
T = (1, 130, 512) if prefill else (None,) * 3
dtypes = [torch.float16 if half else torch.float32] * 3 + [torch.float32] * 6
example = tuple(torch.zeros(s, dtype=d) for s, d in zip(shapes(2, T[1]), dtypes))
batch, length = Dim("batch", min=1, max=4), Dim("length", min=1, max=512)
dynamic = [{0: batch, 1: length} if prefill and i < 7 else {0: batch} for i in range(9)]
program = torch.export.export(Prefill() if prefill else Step(), example, dynamic_shapes=dynamic, strict=False)
profiles = zip(shapes(1, T[0]), shapes(2, T[1]), shapes(4, T[2]), dtypes)
inputs = [torch_tensorrt.Input(min_shape=a, opt_shape=b, max_shape=c, dtype=d) for a, b, c, d in profiles]
engine = dynamo.convert_exported_program_to_serialized_trt_engine(
    program, arg_inputs=inputs, use_explicit_typing=True, require_full_compilation=True, min_block_size=1
)
print(json.dumps([networks, len(engine)]))
"""


def run(registered: bool, prefill: bool, half: bool) -> subprocess.CompletedProcess[str]:
    arguments = [str(int(x)) for x in (registered, prefill, half)]
    return subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True)


@pytest.mark.skipif(not INSTALLED, reason="needs torch-tensorrt or torch-tensorrt-rtx")
@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
@pytest.mark.parametrize("prefill", [False, True], ids=["step", "prefill"])
def test_program_becomes_one_engine(prefill: bool, half: bool) -> None:
    import json

    ran = run(True, prefill, half)
    assert not ran.returncode, ran.stderr[-2000:]
    ((inputs, outputs),), size = json.loads(ran.stdout.splitlines()[-1])
    assert inputs == 9
    lead = [-1, -1] if prefill else [-1]
    assert outputs == [["HALF" if half else "FLOAT", [*lead, 4, 24]], ["FLOAT", [-1, 4, 16, 16]], ["FLOAT", [-1, 4, 16, 24]]]
    assert size > 10_000


@pytest.mark.skipif(not INSTALLED, reason="needs torch-tensorrt or torch-tensorrt-rtx")
def test_without_the_import_the_op_is_not_convertible() -> None:
    ran = run(False, False, False)
    assert ran.returncode
    assert "gka.step" in ran.stderr
    assert "not currently fully supported or convertible" in ran.stderr


@pytest.mark.skipif(INSTALLED, reason="Torch-TensorRT is installed")
def test_says_what_is_missing() -> None:
    with pytest.raises(ImportError, match=r"Torch-TensorRT could not be imported .*: pip install torch-tensorrt"):
        importlib.import_module("gka_compile.export.torch_tensorrt")
