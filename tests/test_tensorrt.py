"""TensorRT-RTX engines, built for real (that needs no GPU), and the Runner over them, on a stand-in for the part that does.

The stand-in has the part of TensorRT's Python API that a loaded engine uses.  It keeps "device" memory on the host, and runs the
ONNX file that the engine was built from in ONNX Runtime: addresses, shapes, dtypes and numbers are real, the GPU is not.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import nn
from torch.export import Dim

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
rtx = pytest.importorskip(
    "tensorrt_rtx", reason="no TensorRT-RTX, whose wheels are for x86-64: pip install 'gka-compile[tensorrt-rtx]'"
)

from gka_compile import chunk_gka, step_gka  # noqa: E402
from gka_compile.export import (  # noqa: E402
    RTX_CAPABILITIES,
    ArtifactError,
    DeviceArray,
    Engine,
    EngineError,
    Runner,
    export_program,
    load_manifest,
    save_artifact,
    to_tensorrt,
)
from gka_compile.export import backends as backends_module  # noqa: E402
from gka_compile.export.driver import Driver, DriverError  # noqa: E402
from gka_compile.export.to_onnx import model_names, present_name  # noqa: E402
from gka_compile.model import ByteLM, ModelConfig  # noqa: E402

module = sys.modules[to_tensorrt.__module__]
MAX_LENGTH, NUM_ITER = 384, 5


def make_model() -> ByteLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16}
    config = ModelConfig(pattern="GKA-*", max_length=MAX_LENGTH, num_iter=NUM_ITER, tie_word_embeddings=False, **sizes)
    model = ByteLM(config).eval()
    assert model.lm_head is not None
    with torch.no_grad():
        for weight in (model.embed_tokens.weight, model.lm_head.weight):
            weight.normal_()
    return model


@pytest.fixture(scope="module")
def model() -> ByteLM:
    return make_model()


@pytest.fixture(scope="module")
def graphs() -> dict[str, bytes]:
    """The ONNX file of every engine that was built, by the engine's SHA-256."""
    return {}


@pytest.fixture(scope="module")
def artifact(model: ByteLM, graphs: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model as engines for every usual GPU."""
    folder = tmp_path_factory.mktemp("tensorrt") / "model"
    build = module._build

    def kept(library: Any, strong: bool, path: Path, *rest: Any) -> Any:
        plan, described = build(library, strong, path, *rest)
        graphs[hashlib.sha256(plan).hexdigest()] = path.read_bytes()
        return plan, described

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_build", kept)
        save_artifact(model, folder, ["tensorrt"], tensorrt={"lengths": (1, 64, 200), "batches": (1, 1, 3)})
    return folder


# --- engines ---------------------------------------------------------------------------------------------------------------


def test_engines_of_a_whole_model(artifact: Path, model: ByteLM) -> None:
    manifest = load_manifest(artifact)
    entry = manifest["backends"]["tensorrt"]
    assert entry["library"] == f"tensorrt_rtx {rtx.__version__}"
    assert entry["compute_capabilities"] == list(RTX_CAPABILITIES) == ["8.6", "8.9", "12.0", "12.1"]
    assert set(manifest["files"]) == {f"{name}.engine{suffix}" for name in ("prefill", "step") for suffix in ("", ".json")}
    state = model.init_state(1)
    for name in ("prefill", "step"):
        plan = (artifact / f"{name}.engine").read_bytes()
        told = json.loads((artifact / f"{name}.engine.json").read_text())
        assert (told["bytes"], told["sha256"]) == (len(plan), hashlib.sha256(plan).hexdigest())
        assert told["flavour"] == "rtx"
        assert [x["name"] for x in told["inputs"]] == ["tokens", *state]
        assert [x["name"] for x in told["outputs"]] == ["logits", *map(present_name, state)]
        assert [x["dtype"] for x in told["inputs"]] == ["int64", *(str(x.dtype).removeprefix("torch.") for x in state.values())]
        assert told["outputs"][0] == {"name": "logits", "dtype": "float32", "shape": ["batch", 256]}
        tokens = (
            {"least": [1, 1], "usual": [1, 64], "most": [3, 200]}
            if name == "prefill"
            else {"least": [1], "usual": [1], "most": [3]}
        )
        assert told["inputs"][0]["profile"] == tokens
        assert told["inputs"][1]["profile"]["most"] == [3, *next(iter(state.values())).shape[1:]]
        assert 0 < told["engine_layers"] < told["network_layers"]
        assert told["activation_bytes"] > 0


class Prefill(nn.Module):
    def forward(self, q, k, v, g, h, u):  # type: ignore[no-untyped-def]
        o, state = chunk_gka(q, k, v, g, g, num_iter=NUM_ITER, initial_state=(h, u), output_final_state=True)
        return o, *state


class Step(nn.Module):
    def forward(self, q, k, v, g, h, u):  # type: ignore[no-untyped-def]
        o, state = step_gka(q, k, v, (h, u), g, g)
        return o, *state


NAMES, OUTPUTS = ["q", "k", "v", "g", "h", "u"], ["o", "present_h", "present_u"]


def program(length: int | None) -> torch.export.ExportedProgram:
    batch = {0: Dim("batch")}
    size = (2,) if length is None else (2, length)
    sizes = batch if length is None else batch | {1: Dim("length")}
    args = (*(torch.randn(*size, 2, 64) for _ in "qkv"), -torch.rand(*size, 2), *(torch.zeros(2, 2, 64, 64) for _ in "hu"))
    shapes = (*(sizes,) * 4, batch, batch)
    return torch.export.export(Step() if length is None else Prefill(), args, dynamic_shapes=shapes, strict=False)


def test_a_turn_of_the_solve_is_two_kernels(tmp_path: Path) -> None:
    """One product and one element-wise kernel; what is left is a constant number. A step is six such pairs, not thirty."""
    options: dict[str, Any] = {"compute_capabilities": ["8.9"], "batches": (1, 1, 4)}
    exported, layers = program(130), {}
    for mixed in (False, True):
        path = tmp_path / f"{mixed}.engine"
        told = to_tensorrt(exported, path, NAMES, OUTPUTS, lengths=(1, 512, 4096), mixed=mixed, **options)
        assert told["compute_capabilities"] == ["8.9"]
        assert {x["dtype"] for x in (*told["inputs"], *told["outputs"])} == {"float32"}
        assert path.with_name(path.name + ".json").exists()
        layers[mixed] = told["engine_layers"]
    told = to_tensorrt(program(None), tmp_path / "step.engine", NAMES, OUTPUTS, **options)
    print(layers, told["engine_layers"])
    assert max(layers.values()) <= 2 * NUM_ITER + 45
    assert told["engine_layers"] <= 2 * 6 + 7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_models_in_16_bits_build(dtype: torch.dtype, tmp_path: Path) -> None:
    programs = export_program(make_model().to(dtype))
    options = {"compute_capabilities": ["8.9"], "batches": (1, 1, 2)}
    told = to_tensorrt(programs.step, tmp_path / "step.engine", *model_names(programs), **options)
    assert {x["dtype"] for x in told["inputs"]} == {"int64", "float32", str(dtype).removeprefix("torch.")}


def test_float32_products_are_float32() -> None:
    """Builders allow TF32 unless told otherwise. An engine does not tell, its kernels are compiled where it is loaded."""
    builder = rtx.Builder(module.logger(rtx))
    assert builder.create_builder_config().get_flag(rtx.BuilderFlag.TF32)
    assert not module._configuration(rtx, builder, True, ["8.9"], None).get_flag(rtx.BuilderFlag.TF32)


def test_before_tensorrt_10_cublas_is_left_out() -> None:
    config = Mock(**{"get_tactic_sources.return_value": 0b1111})
    builder = Mock(**{"create_builder_config.return_value": config})
    module._configuration(Mock(TacticSource=Mock(CUBLAS=0)), builder, False, (), None)
    config.set_tactic_sources.assert_called_once_with(0b1110)


# --- bad input -------------------------------------------------------------------------------------------------------------


def graph(path: Path, opset: int = 20, dtype: int = 1, size: str = "batch", operator: str = "Neg") -> Path:
    x, y = (onnx.helper.make_tensor_value_info(n, dtype, [size, 4]) for n in "xy")
    domain = "" if operator == "Neg" else "elsewhere"
    opsets = [onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid("elsewhere", 1)]
    node = onnx.helper.make_node(operator, ["x"], ["y"], domain=domain)
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "g", [x], [y]), opset_imports=opsets, ir_version=10), path)
    return path


GOOD: dict[str, Any] = {"batches": (1, 2, 4)}


@pytest.mark.parametrize(
    ("made", "options", "kind", "message"),
    [
        ({}, {"flavour": "lite"}, ValueError, "flavour: expected one of rtx, tensorrt, got 'lite'"),
        (
            {},
            {"compute_capabilities": ["9.0"]},
            ValueError,
            r"compute_capabilities: expected some of 7.5, .*, 12.1 .*, got \['9.0'\]",
        ),
        ({}, {"compute_capabilities": []}, ValueError, r"compute_capabilities: expected some of .*, got \[\]"),
        ({}, {"compute_capabilities": "8.9"}, ValueError, "compute_capabilities: expected some of .*, got '8.9'"),
        ({}, {"batches": None}, ValueError, "batches: expected .* of the model's dynamic batch, got None"),
        ({}, {"batches": (2, 1, 4)}, ValueError, r"batches: expected 1 ≤ least ≤ usual ≤ most < 2\^31, got \(2, 1, 4\)"),
        ({}, {"batches": (1, 4)}, TypeError, r"batches: expected three integers \(least, usual, most\), got \(1, 4\)"),
        ({}, {"lengths": (1, 2, 3)}, ValueError, "lengths: expected None for a model whose length is not dynamic"),
        ({}, {"workspace": 0}, ValueError, "workspace: expected a positive number of bytes or None, got 0"),
        ({}, {"mixed": True}, ValueError, "source: expected no names and no mixed beside an ONNX file"),
        ({"opset": 28}, {}, ValueError, "source: expected ONNX opset 17 to 23, got 28: export it with opset=23"),
        ({"dtype": 11}, {}, ValueError, "source: expected dtypes among float32, .*, which TensorRT has, got double x"),
        ({"size": "tokens"}, {}, ValueError, "source: expected dynamic sizes named batch and length, got tokens"),
        ({"operator": "Gibberish"}, {}, ValueError, "source: expected operators that TensorRT .* reads, got Gibberish: "),
    ],
)
def test_what_cannot_be_built_is_refused(
    made: dict[str, Any], options: dict[str, Any], kind: type[Exception], message: str, tmp_path: Path
) -> None:
    source = graph(tmp_path / "model.onnx", **made)
    with pytest.raises(kind, match=message):
        to_tensorrt(source, tmp_path / "model.engine", **GOOD | options)
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compute_capabilities": ["9.0"]}, "compute_capabilities: expected some of"),
        ({"flavour": "rxt"}, "flavour: expected one of"),
        ({"lengths": (4, 2, 8)}, "lengths: expected 1 ≤ least"),
        ({"lengths": 512}, r"lengths: expected three integers \(least, usual, most\), got 512"),
        ({"compute_capabilities": 8.9}, "compute_capabilities: expected some of .*, got 8.9"),
        ({"length": (1, 2, 3)}, "tensorrt: expected options among flavour, .*, got length"),
    ],
)
def test_options_are_checked_before_any_backend_is_built(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        save_artifact(make_model(), tmp_path / "model", ["onnx", "tensorrt"], progress=pytest.fail, tensorrt=options)
    assert list(tmp_path.iterdir()) == []


def test_no_engine_is_longer_than_the_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"lengths: expected at most the model's max_length = {MAX_LENGTH}, got 5000"):
        save_artifact(make_model(), tmp_path / "model", ["tensorrt"], tensorrt={"lengths": (1, 128, 5000)})
    assert list(tmp_path.iterdir()) == []


def test_a_build_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, path = graph(tmp_path / "model.onnx"), tmp_path / "model.engine"
    to_tensorrt(source, path, **GOOD)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="source: expected an ONNX file, got"):
        to_tensorrt(path, path, **GOOD)
    step = program(None)
    with pytest.raises(RuntimeError, match=r"TensorRT: expected an engine, got none: .*workspace"):
        to_tensorrt(step, path, NAMES, OUTPUTS, workspace=1, **GOOD)
    monkeypatch.setattr(module.json, "dumps", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        to_tensorrt(source, path, **GOOD)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_missing_libraries_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = graph(tmp_path / "model.onnx")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(
        ImportError, match=r"flavour 'tensorrt' needs tensorrt .*; tensorrt-rtx is installed, which is the flavour 'rtx'"
    ):
        to_tensorrt(source, tmp_path / "model.engine", flavour="tensorrt", **GOOD)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(ImportError, match=r'needs tensorrt-rtx \(pip install "gka-compile\[tensorrt-rtx\]"\); neither of the two'):
        to_tensorrt(source, tmp_path / "model.engine", **GOOD)


def test_full_tensorrt_builds_for_the_gpu_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = types.SimpleNamespace(__version__="8.5.3.1")
    monkeypatch.setitem(sys.modules, "tensorrt", old)
    source, path = graph(tmp_path / "model.onnx", opset=18), tmp_path / "model.engine"
    with pytest.raises(ValueError, match=r"compute_capabilities: expected None for flavour 'tensorrt', .*, got \['8.7'\]"):
        to_tensorrt(source, path, flavour="tensorrt", compute_capabilities=["8.7"], **GOOD)
    with pytest.raises(ValueError, match="source: expected ONNX opset 17 to 17, got 18: export it with opset=17"):
        to_tensorrt(source, path, flavour="tensorrt", **GOOD)
    with pytest.raises(ValueError, match=r"mixed: expected TensorRT 10 or later, .*, got 8.5.3.1"):
        to_tensorrt(program(None), path, NAMES, OUTPUTS, flavour="tensorrt", mixed=True, **GOOD)
    with pytest.raises(ValueError, match="tensorrt: expected None without backend tensorrt"):
        save_artifact(make_model(), tmp_path / "model", ["onnx"], tensorrt={"flavour": "rtx"})


# --- the stand-in ----------------------------------------------------------------------------------------------------------


class FakeDriver(Driver):
    """Device memory that is the host's."""

    capability = "8.9"  # type: ignore[assignment]

    def __init__(self) -> None:
        self.stream = 7
        self.held: dict[int, Any] = {}
        self.copies: list[tuple[str, int]] = []

    def allocate(self, nbytes: int) -> int:
        block = (ctypes.c_char * max(nbytes, 1))()
        ctypes.memset(block, 0xFF, max(nbytes, 1))
        self.held[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    def free(self, pointer: int) -> None:
        del self.held[pointer]

    def clear(self, pointer: int, nbytes: int) -> None:
        ctypes.memset(pointer, 0, nbytes)

    def upload(self, pointer: int, host: int, nbytes: int) -> None:
        self.copies.append(("up", nbytes))
        ctypes.memmove(pointer, host, nbytes)

    def download(self, host: int, pointer: int, nbytes: int) -> None:
        self.copies.append(("down", nbytes))
        ctypes.memmove(host, pointer, nbytes)

    def synchronize(self) -> None:
        pass


class FakeContext:
    def __init__(self, session: Any, runs: list[dict[str, int]]) -> None:
        self.session, self.runs = session, runs
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        (x,) = (x for x in self.session.get_outputs() if x.name == name)
        batch = self.shapes[self.session.get_inputs()[0].name][0]
        return tuple(batch if isinstance(size, str) else size for size in x.shape)

    def execute_async_v3(self, stream: int) -> bool:
        if stream != 7:
            return False
        inputs = {x.name: self._at(x, self.shapes[x.name]).copy() for x in self.session.get_inputs()}
        for x, result in zip(self.session.get_outputs(), self.session.run(None, inputs), strict=True):
            assert result.shape == self.get_tensor_shape(x.name)
            self._at(x, result.shape)[...] = result
        self.runs.append(dict(self.addresses))
        return True

    def _at(self, x: Any, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        dtype = np.dtype({"tensor(float)": np.float32, "tensor(int64)": np.int64}[x.type])
        block = (ctypes.c_char * (int(np.prod(shape)) * dtype.itemsize)).from_address(self.addresses[x.name])
        return np.frombuffer(block, dtype).reshape(shape)


class FakeTensorRT(types.SimpleNamespace):
    """``tensorrt_rtx``, as much of it as a loaded engine uses."""

    def __init__(self, graphs: dict[str, bytes]) -> None:
        runs: list[dict[str, int]] = []

        class Runtime:
            def __init__(self, log: Any) -> None:
                assert isinstance(log, rtx.ILogger)

            def deserialize_cuda_engine(self, plan: bytes) -> Any:
                session = onnxruntime.InferenceSession(graphs[hashlib.sha256(plan).hexdigest()])
                return types.SimpleNamespace(create_execution_context=lambda: FakeContext(session, runs))

        super().__init__(__version__=rtx.__version__, Runtime=Runtime, ILogger=rtx.ILogger, runs=runs)

    def __hash__(self) -> int:
        return id(self)


@pytest.fixture
def driver() -> FakeDriver:
    return FakeDriver()


@pytest.fixture
def fake(graphs: dict[str, bytes], artifact: Path, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    library = FakeTensorRT(graphs)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", library)
    monkeypatch.setattr(backends_module, "Driver", lambda: driver)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return library


# --- the Runner ------------------------------------------------------------------------------------------------------------


def test_generates_what_the_model_generates(artifact: Path, fake: FakeTensorRT, model: ByteLM) -> None:
    runner = Runner.load(artifact, "tensorrt")
    prompt = torch.randint(256, (3, 70), generator=torch.Generator().manual_seed(0))
    expected = model.generate(prompt, 20)
    assert torch.equal(runner.generate(prompt, 20), expected)
    assert torch.equal(runner.generate(prompt, 20), expected)  # nothing is left of the first time
    assert torch.equal(runner.generate(prompt[:1, :5], 20), model.generate(prompt[:1, :5], 20))
    assert len(set(expected.flatten().tolist())) > 10


def test_states_stay_where_they_are(artifact: Path, fake: FakeTensorRT, driver: FakeDriver, model: ByteLM) -> None:
    """A run writes what the next one reads, in two sets of buffers by turns; tokens and logits alone are copied."""
    runner = Runner.load(artifact, "tensorrt")
    runner.prefill(torch.zeros(2, 9, dtype=torch.int64))
    logits = [runner.step(torch.tensor([i, i])).clone() for i in range(4)]
    assert [kind for kind, _ in driver.copies] == ["up", "down"] * 5
    assert {size for kind, size in driver.copies if kind == "down"} == {2 * 256 * 4}
    state = list(model.init_state(1))
    for before, after in zip(fake.runs[:-1], fake.runs[1:], strict=True):
        assert [before[present_name(name)] for name in state] == [after[name] for name in state]
    sets = [tuple(run[name] for name in state) for run in fake.runs]
    assert sets[0] == sets[2] == sets[4] != sets[1] == sets[3]
    assert len(driver.held) == 2 * len(state)
    assert not torch.equal(logits[0], logits[1])
    runner.reset()
    runner.prefill(torch.zeros(1, 9, dtype=torch.int64))
    assert len(driver.held) == 2 * len(state)  # those of the other batch are freed


def test_sizes_outside_the_profile_are_refused(artifact: Path, fake: FakeTensorRT, model: ByteLM) -> None:
    runner = Runner.load(artifact, "tensorrt")
    tokens = torch.randint(256, (2, 201))
    expected = model.step(tokens[:, 10], model.prefill(tokens[:, :10], model.init_state(2))[1])[0]
    runner.prefill(tokens[:, :10])
    with pytest.raises(ValueError, match=r"tokens: expected a shape \[1 to 3, 1 to 200\], the engine's profile, got \[2, 201\]"):
        runner.prefill(tokens)
    torch.testing.assert_close(runner.step(tokens[:, 10]), expected, rtol=1e-5, atol=1e-4)  # the state was left alone
    runner.reset()
    with pytest.raises(ValueError, match=r"tokens: expected a shape \[1 to 3\], the engine's profile, got \[4\]"):
        runner.step(torch.zeros(4, dtype=torch.int64))
    runner.prefill(tokens[:, :10])  # of two sequences: those four have left nothing
    torch.testing.assert_close(runner.step(tokens[:, 10]), expected, rtol=1e-5, atol=1e-4)


def test_engines_for_other_machines_are_refused(
    artifact: Path, fake: FakeTensorRT, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver.capability = "9.0"  # type: ignore[assignment]
    with pytest.raises(ArtifactError, match=r"for compute capability 9.0, this GPU's, got one for 8.6, 8.9, 12.0, 12.1: build it"):
        Runner.load(artifact, "tensorrt")
    driver.capability = "8.9"  # type: ignore[assignment]
    fake.__version__ = "9.9.9"
    with pytest.raises(
        ArtifactError, match=f"of tensorrt-rtx 9.9.9, which is installed, got one of {rtx.__version__}: build it again"
    ):
        Runner.load(artifact, "tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    monkeypatch.setitem(sys.modules, "tensorrt", types.SimpleNamespace(__version__="10.0"))
    with pytest.raises(ImportError, match=r"needs tensorrt-rtx .*; tensorrt is installed, which is the flavour 'tensorrt'"):
        Runner.load(artifact, "tensorrt")
    with pytest.raises(ValueError, match="device: expected cuda or None for backend tensorrt, got cpu"):
        Runner.load(artifact, "tensorrt", device="cpu")

    def absent() -> Driver:
        raise DriverError("no driver")

    monkeypatch.setattr(backends_module, "Driver", absent)
    with pytest.raises(ValueError, match="device: expected a GPU for backend tensorrt, got a machine without one: no driver"):
        Runner.load(artifact, "tensorrt")


# --- one engine ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def engine(artifact: Path, fake: FakeTensorRT, driver: FakeDriver) -> Engine:
    return Engine(artifact / "step.engine", driver)


def buffers(entries: list[dict[str, Any]], make: Callable[[tuple[int, ...], str], Any]) -> dict[str, Any]:
    return {x["name"]: make(tuple(2 if size == "batch" else size for size in x["shape"]), x["dtype"]) for x in entries}


def test_engine_takes_numpy_torch_and_device_arrays(engine: Engine, driver: FakeDriver, model: ByteLM) -> None:
    tokens, described = torch.tensor([3, 4]), engine.manifest
    expected = model.step(tokens, model.init_state(2))[0]
    made: list[Callable[[tuple[int, ...], str], Any]] = [
        lambda shape, dtype: np.zeros(shape, dtype),
        lambda shape, dtype: torch.zeros(shape, dtype=getattr(torch, dtype)),
        lambda shape, dtype: DeviceArray(driver, shape, dtype),
    ]
    for make in made:
        inputs, outputs = buffers(described["inputs"], make), buffers(described["outputs"], make)
        inputs["tokens"] = tokens
        logits = outputs["logits"] = np.zeros((2, 256), np.float32)
        engine(inputs, outputs)
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-5, atol=1e-4)
    del inputs, outputs
    assert not driver.held


def test_engine_refuses_wrong_buffers(engine: Engine) -> None:
    def run(name: str | None = None, buffer: Any = None, drop: str | None = None) -> None:
        inputs, outputs = (buffers(engine.manifest[x], lambda shape, dtype: np.zeros(shape, dtype)) for x in ("inputs", "outputs"))
        for given in (inputs, outputs):
            if name in given:
                given[name] = buffer
            given.pop(drop or "", None)
        engine(inputs, outputs)

    run()
    for arguments, kind, message in (
        ({"drop": "h_state_0"}, ValueError, "buffers: expected tokens, h_state_0, .*, got tokens, u_state_0"),
        ({"name": "tokens", "buffer": [1]}, TypeError, "tokens: expected a Tensor, an ndarray or a DeviceArray, got list"),
        ({"name": "tokens", "buffer": np.zeros(2, np.int32)}, TypeError, "tokens: expected dtype int64, got int32"),
        (
            {"name": "logits", "buffer": torch.zeros(2, 255)},
            ValueError,
            r"logits: expected a buffer of shape \[2, 256\], got \[2, 255\]",
        ),
        ({"name": "logits", "buffer": torch.zeros(256, 2).mT}, ValueError, "logits: expected a contiguous buffer, got strides"),
        (
            {"name": "tokens", "buffer": np.zeros(9, np.int64)},
            ValueError,
            r"tokens: expected a shape \[1 to 3\], the engine's profile",
        ),
    ):
        with pytest.raises(kind, match=message):
            run(**arguments)  # type: ignore[arg-type]


def test_damaged_engines_are_refused(artifact: Path, fake: FakeTensorRT, driver: FakeDriver, tmp_path: Path) -> None:
    path = Path(shutil.copy(artifact / "step.engine", tmp_path))
    with pytest.raises(EngineError, match=r"expected an engine and its manifest step.engine.json, got no step.engine.json"):
        Engine(path, driver)
    beside = Path(shutil.copy(artifact / "step.engine.json", tmp_path))
    Engine(path, driver)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(EngineError, match=r"expected the SHA-256 that step.engine.json lists, got another: truncated"):
        Engine(path, driver)
    beside.write_text("{")
    with pytest.raises(EngineError, match="expected an engine's manifest, got no JSON"):
        Engine(path, driver)
    beside.write_text('{"format": "another"}')
    with pytest.raises(EngineError, match="expected a gka-compile engine of version 1, got JSON of another kind: build it again"):
        Engine(path, driver)


def test_without_a_driver() -> None:
    if torch.cuda.is_available():
        assert Driver().capability == "{}.{}".format(*torch.cuda.get_device_capability())
    else:
        with pytest.raises(
            DriverError, match=r"expected a machine with an NVIDIA GPU and its driver, got one without libcuda.so.1"
        ):
            Driver()
