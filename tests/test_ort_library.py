"""The custom-op library for ONNX Runtime: what a CPU shows of it.

Compiled for the CPU provider over a driver that only prints (plugin_driver.c), everything runs but the kernels.  It needs the
header of ONNX Runtime's C interface: GKA_ONNXRUNTIME_INCLUDE names its folder.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import Case, make_inputs
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels do not compile", allow_module_level=True)

from gka_compile.export import to_onnx  # noqa: E402
from gka_compile.export.bundle import BundleError, build_bundle, evaluate, load_bundle, variants  # noqa: E402
from gka_compile.export.ort_library import SOURCES, ort_library  # noqa: E402

HERE = Path(__file__).parent
INCLUDE = os.environ.get("GKA_ONNXRUNTIME_INCLUDE")
needs_header = pytest.mark.skipif(
    INCLUDE is None or shutil.which("c++") is None,
    reason="needs c++ and GKA_ONNXRUNTIME_INCLUDE, the folder of onnxruntime_c_api.h",
)
CAPABILITY = "8.9"
CASE = Case("gqa", H=4, Hk=2, K=16, V=24, T=37)
OUTPUTS = ["o", "h", "u", "o_1"]
gka = torch.ops.gka
PROGRAM = """
import json, sys
import onnxruntime as ort, numpy as np
library, model, path = sys.argv[1:]
options = ort.SessionOptions()
options.register_custom_ops_library(library)
session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
found = session.run(None, dict(np.load(path)))
told = [[x.name, x.type, x.shape] for x in session.get_outputs()]
print(json.dumps({"declared": told, "found": [[str(y.dtype), list(y.shape)] for y in found]}), file=sys.stderr)
"""


class Both(nn.Module):
    """A sequence in both chunk ops, and then two steps that differ in an attribute."""

    def forward(self, q, k, v, g, gk, alpha, beta, h0, u0):  # type: ignore[no-untyped-def]
        *states, h, u = gka.chunk_state(k, v, g, None, beta, h0, u0, None, CASE.H, 16)
        o, *_ = gka.chunk_output(q, k, v, g, None, alpha, beta, h0, u0, *states, None, 0.5, 0.02, 30, 16)
        q, k, v, g, alpha = (x[:, 0].contiguous() for x in (q, k, o[:, :, : CASE.Hk], g, alpha))
        first, h, u = gka.step(q, k, v, h, u, g, None, alpha, None, 0.5, 0.02, 30)
        last, h, u = gka.step(q, k, v, h, u, g, None, alpha, None, 0.5, 0.02, 7)
        return o, h, u, first + last


def inputs(B: int, T: int) -> dict[str, Tensor]:
    case = Case("gqa", B=B, T=T, H=CASE.H, Hk=CASE.Hk, K=CASE.K, V=CASE.V)
    return {n: x for n, x in make_inputs(case, torch.float16).items() if x is not None}


@pytest.fixture(scope="module")
def program() -> ExportedProgram:
    batch, length = Dim("batch"), Dim("length")
    x = inputs(2, 37)
    sizes = tuple({0: batch} if n in ("h0", "u0") else {0: batch, 1: length} for n in x)
    return torch.export.export(Both(), tuple(x.values()), dynamic_shapes=sizes, strict=False)


@pytest.fixture(scope="module")
def model(program: ExportedProgram, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return to_onnx(program, tmp_path_factory.mktemp("onnx") / "model.onnx", list(inputs(1, 1)), OUTPUTS, form="fused")


@pytest.fixture(scope="module")
def folder(program: ExportedProgram, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle") / "bundle"
    build_bundle(folder, variants(program), [CAPABILITY])
    return folder


@pytest.fixture(scope="module")
def on_cpu(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library for the CPU provider."""
    library = tmp_path_factory.mktemp("library") / "libgka_ort_cpu.so"
    sources = [HERE.parent / "export" / name for name in SOURCES[:2]]
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", '-DGKA_ORT_PROVIDER="CPUExecutionProvider"']
    command = ["c++", *flags, "-isystem", INCLUDE, f"-I{folder}", *sources, "-o", library, "-ldl"]
    ran = subprocess.run([str(x) for x in command], capture_output=True, text=True)
    assert not ran.returncode, ran.stderr
    return library


def run(library: Path, model: Path, x: dict[str, Tensor], folder: Path, driver: Path) -> subprocess.CompletedProcess[str]:
    import numpy as np

    np.savez(driver / "inputs.npz", **{n: t.numpy() for n, t in x.items()})
    kernels = []
    for variant in load_bundle(folder)["variants"]:
        for launch in variant["targets"][CAPABILITY]["launches"]:
            kinds = "".join({"i32": "i", "i64": "l"}.get(a.get("type", ""), "p") for a in launch["arguments"])
            kernels.append(f"{launch['kernel']}:{(folder / launch['cubin']).stat().st_size}:{kinds}")
    known = {"LD_LIBRARY_PATH": str(driver), "FAKE_CAPABILITY": CAPABILITY, "FAKE_KERNELS": ",".join(kernels)}
    command = [sys.executable, "-c", PROGRAM, str(library), str(model), str(driver / "inputs.npz")]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **known})


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a libcuda.so.1 that prints."""
    folder = tmp_path_factory.mktemp("driver")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", folder / "libcuda.so.1", HERE / "plugin_driver.c"], check=True)
    return folder


@needs_header
@pytest.mark.parametrize(("B", "T"), [(1, 1), (3, 100)])
def test_nodes_launch_what_the_bundle_says(B: int, T: int, on_cpu: Path, model: Path, folder: Path, driver: Path) -> None:
    ran = run(on_cpu, model, inputs(B, T), folder, driver)
    assert not ran.returncode, ran.stderr
    told = json.loads(ran.stderr.splitlines()[-1])
    H, K, V = CASE.H, CASE.K, CASE.V
    assert told["found"] == [
        ["float16", [B, T, H, V]],
        ["float32", [B, H, K, K]],
        ["float32", [B, H, K, V]],
        ["float16", [B, H, V]],
    ]
    assert told["declared"] == [
        ["o", "tensor(float16)", ["batch", "length", H, V]],
        ["h", "tensor(float)", ["batch", H, K, K]],
        ["u", "tensor(float)", ["batch", H, K, V]],
        ["o_1", "tensor(float16)", ["batch", H, V]],
    ]
    names = [node.op_type for node in onnx.load(model).graph.node if node.domain == "gka"]
    assert names == ["chunk_state", "chunk_output", "step", "step_1"]
    launched = [line.split()[1:] for line in ran.stdout.splitlines() if line.startswith("launch ")]
    by_op = [v for op in ("chunk_state", "chunk_output", "step") for v in load_bundle(folder)["variants"] if v["op"] == op]
    assert [v["attributes"].get("num_iter") for v in by_op] == [None, 30, 30, 7]
    pointers: list[dict[str, int]] = []
    for variant in by_op:
        seen: dict[str, int] = {}
        for launch in variant["targets"][CAPABILITY]["launches"]:
            name, *numbers = launched.pop(0)
            *geometry, shared, stream, plain = map(int, numbers[:9])
            assert name == launch["kernel"]
            assert geometry == [*(evaluate(n, B, T) for n in launch["grid"]), launch["threads"], 1, 1]
            assert (shared, stream, plain) == (launch["shared_bytes"], 0, 1)  # the CPU provider has no stream
            for argument, value in zip(launch["arguments"], map(int, numbers[9:]), strict=True):
                if "integer" in argument:
                    assert value == evaluate(argument["integer"], B, T)
                elif argument["pointer"] is not None:
                    base = value - evaluate(argument["offset"], B, T)
                    assert seen.setdefault(argument["pointer"], base) == base != 0
        assert len(set(seen.values())) == len(seen)
        pointers.append(seen)
    assert not launched
    states, output, one, two = pointers
    assert [states[n] for n in ("k", "v", "h_chunks", "u_chunks", "state_scales")] == [
        output[n] for n in ("k", "v", "h_chunks", "u_chunks", "state_scales")
    ]
    assert (states["h_out"], states["u_out"]) == (one["h"], one["u"])
    assert (one["h_out"], one["u_out"]) == (two["h"], two["u"])


@needs_header
def test_bundle_without_the_node(on_cpu: Path, model: Path, folder: Path, driver: Path, tmp_path: Path) -> None:
    changed = onnx.load(model)
    for node in changed.graph.node:
        for attribute in node.attribute:
            if attribute.name == "ridge_ratio":
                attribute.f = 0.03
    onnx.save(changed, tmp_path / "changed.onnx")
    ran = run(on_cpu, tmp_path / "changed.onnx", inputs(1, 5), folder, driver)
    assert "gka chunk_output: expected a node that the kernel bundle was built for" in ran.stderr
    ran = run(on_cpu, model, {**inputs(1, 5), "h0": inputs(2, 5)["h0"]}, folder, driver)
    assert "gka chunk_state: expected h0 to have size 1 in dimension 0, got 2" in ran.stderr


@needs_header
def test_library_is_for_the_cuda_provider_and_goes_before_functions(model: Path, folder: Path) -> None:
    assert INCLUDE is not None
    library = ort_library(folder, INCLUDE)
    assert library.parent == folder
    before = library.stat()
    assert ort_library(folder) == library  # found
    assert library.stat() == before
    load_bundle(folder)  # still whole
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library))
    with pytest.raises(Exception, match=r"NOT_IMPLEMENTED.*chunk_state"):
        onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])


def test_bad_input(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "bundle", ignore=shutil.ignore_patterns("*.so")))
    files = sorted(copy.iterdir())
    with pytest.raises(BundleError, match="expected a kernel bundle"):
        ort_library(tmp_path)
    with pytest.raises(ValueError, match=r"include: expected the folder of onnxruntime_c_api\.h, for .* got None"):
        ort_library(copy)
    with pytest.raises(ValueError, match=r"include: expected a folder with onnxruntime_c_api\.h, .* got .*"):
        ort_library(copy, tmp_path)
    (tmp_path / "onnxruntime_c_api.h").write_text("#error not it\n")
    with pytest.raises(RuntimeError, match=r"(?s)needs to compile, got from .*#error not it"):
        ort_library(copy, tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RuntimeError, match=r"needs a C\+\+ compiler, got none named no-such-compiler: set CXX"):
        ort_library(copy, tmp_path)
    assert sorted(copy.iterdir()) == files
    (copy / "manifest.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(BundleError, match="got JSON of another kind"):
        ort_library(copy)
