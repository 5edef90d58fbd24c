"""ONNX files that keep the ``gka`` nodes: what the nodes say, and that their functions run at sizes not exported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import CASES, NUM_ITER, RIDGE_RATIO, SCALE, Case, budget, check, make_inputs, relative_error, run_reference
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from gka_compile.export import export_program, to_onnx  # noqa: E402
from gka_compile.export.to_onnx import nodes  # noqa: E402
from gka_compile.model import ByteLM, ModelConfig  # noqa: E402

CHUNK = 16
CASE = {case.name: replace(case, B=2) for case in CASES}
STATES = ["h_chunks", "u_chunks", "state_scales"]
PREFILL_OUTPUTS, STEP_OUTPUTS = ["o", "h", "u"], ["o", "h_out", "u_out"]
gka = torch.ops.gka


class Prefill(nn.Module):
    """Both chunk ops on the inputs that a case gives."""

    def __init__(self, case: Case, chunk: int = CHUNK) -> None:
        super().__init__()
        self.names, self.heads, self.chunk = (
            [n for n, x in make_inputs(case, torch.float32).items() if x is not None],
            case.H,
            chunk,
        )

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        x = dict(zip(self.names, given, strict=True))
        q, k, v, g, gk, alpha, beta, h0, u0 = (x.get(n) for n in ("q", "k", "v", "g", "gk", "alpha", "beta", "h0", "u0"))
        *states, h, u = gka.chunk_state(k, v, g, gk, beta, h0, u0, None, self.heads, self.chunk)
        gates = (q, k, v, g, gk, alpha, beta, h0, u0)
        return gka.chunk_output(*gates, *states, None, SCALE, RIDGE_RATIO, NUM_ITER, self.chunk)[0], h, u


def given(case: Case, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {n: x for n, x in make_inputs(case, dtype).items() if x is not None}


def export_prefill(case: Case, dtype: torch.dtype = torch.float32, chunk: int = CHUNK) -> ExportedProgram:
    x, batch, length = given(case, dtype), Dim("batch"), Dim("length")
    sizes = tuple({0: batch} if n in ("h0", "u0") else {0: batch, 1: length} for n in x)
    return torch.export.export(Prefill(case, chunk), tuple(x.values()), dynamic_shapes=(sizes,), strict=False)


def run(path: Path, x: dict[str, Tensor]) -> list[Tensor]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(y) for y in session.run(None, {n: t.numpy() for n, t in x.items()})]


def gka_nodes(model: Any) -> list[tuple[str, list[str], dict[str, Any]]]:
    """Of every ``gka`` node its type, inputs and attributes."""
    found = [node for node in nodes(model) if node.domain == "gka"]
    return [(n.op_type, list(n.input), {a.name: onnx.helper.get_attribute_value(a) for a in n.attribute}) for n in found]


def check_prefill(path: Path, case: Case, dtype: torch.dtype = torch.float32) -> None:
    for B, T in ((1, 1), (3, 50), (1, 128)):
        sized = replace(case, B=B, T=T)
        oracle = run_reference(sized, dtype, torch.float64, CHUNK)
        allowed = budget(sized, dtype, oracle, CHUNK)
        found = run(path, given(sized, dtype))
        assert [x.dtype for x in found] == [dtype, torch.float32, torch.float32]
        check(dict(zip(PREFILL_OUTPUTS, found, strict=True)), {n: oracle[n] for n in PREFILL_OUTPUTS}, allowed)


@pytest.mark.parametrize(
    ("name", "opset", "device", "dtype"),
    [
        ("all", 17, "cuda", torch.float32),
        ("all", 23, "cpu", torch.float32),
        ("all", 23, "cuda", torch.float16),
        ("plain", 23, "cpu", torch.float32),
        ("gqa-wide-v", 23, "cuda", torch.float32),
        ("decay-h", 18, "cpu", torch.float16),
    ],
    ids=str,
)
def test_a_runtime_without_kernels_runs_the_functions(
    name: str, opset: int, device: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    case = CASE[name]
    names = list(given(case))
    path = to_onnx(
        export_prefill(case, dtype), tmp_path / "model.onnx", names, PREFILL_OUTPUTS, form="fused", opset=opset, device=device
    )
    assert list(tmp_path.iterdir()) == [path]
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert {e.domain: e.version for e in model.opset_import} == {"": opset, "gka": 1}
    assert model.ir_version == (8 if opset == 17 else 10)
    state = [n for n in ("k", "v", "g", "gk", "beta", "h0", "u0") if n in names]
    output = [n for n in ("q", "k", "v", "g", "gk", "alpha", "beta", "h0", "u0") if n in names]
    (one, one_inputs, one_attributes), (two, two_inputs, two_attributes) = gka_nodes(model)
    assert (one, two) == ("chunk_state", "chunk_output")
    assert one_attributes == {"inputs": ",".join(state).encode(), "num_heads": case.H, "chunk_size": CHUNK}
    assert two_attributes == {
        "inputs": ",".join([*output, *STATES]).encode(),
        "scale": np.float32(SCALE),
        "ridge_ratio": np.float32(RIDGE_RATIO),
        "num_iter": NUM_ITER,
        "chunk_size": CHUNK,
    }
    assert one_inputs == state  # the graph's inputs have the names of the op's
    assert two_inputs == [*output, *model.graph.node[0].output[:3]]
    assert [(f.domain, f.name, list(f.input), len(f.output)) for f in model.functions] == [
        ("gka", "chunk_state", state, 5),
        ("gka", "chunk_output", [*output, *STATES], 4),
    ]
    assert all([e.version for e in f.opset_import] == [opset] for f in model.functions)
    kinds = {node.op_type for f in model.functions for node in f.node}
    assert ("Scan" in kinds) == (device == "cpu")
    assert not any(node.metadata_props for node in nodes(model))  # Python stacks, with paths of the machine
    check_prefill(path, case, dtype)


def test_chunk_size_for_another_device(tmp_path: Path) -> None:
    """A program from the CPU has the CPU's chunks; kernels may want others."""
    case = CASE["all"]
    program = export_prefill(case, chunk=64)
    path = to_onnx(program, tmp_path / "model.onnx", list(given(case)), PREFILL_OUTPUTS, form="fused", chunk_size=CHUNK)
    assert [attributes["chunk_size"] for *_, attributes in gka_nodes(onnx.load(path))] == [CHUNK] * 2
    assert [node.args[-1] for node in program.graph.nodes if str(node.target).startswith("gka.")] == [64] * 2
    check_prefill(path, case)


class Steps(nn.Module):
    """Three steps of the same shapes and dtypes: the first two differ in an attribute, the third in what is given."""

    def forward(self, q, k, v, h, u, g, alpha):  # type: ignore[no-untyped-def]
        first = (g, None, alpha, None, 0.5, RIDGE_RATIO)
        o, h, u = gka.step(q, k, v, h, u, *first, 4)
        o, h, u = gka.step(q, k, o, h, u, *first, 9)
        o, h, u = gka.step(q, k, o, h, u, *first, 4)
        return gka.step(q, k, o, h, u, None, g, alpha, None, 0.5, RIDGE_RATIO, 4)


def steps(B: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(B)
    q, k, v = (torch.randn(B, 2, 16, generator=generator) for _ in range(3))
    h, u = (torch.randn(B, 2, 16, 16, generator=generator) for _ in range(2))
    gates = [-torch.rand(B, 2, generator=generator), torch.rand(B, 2, generator=generator)]
    return dict(zip(("q", "k", "v", "h", "u", "g", "alpha"), (q, k, v, h @ h.mT, u, *gates), strict=True))


@pytest.fixture(scope="module")
def three() -> ExportedProgram:
    x = steps(2)
    return torch.export.export(Steps(), tuple(x.values()), dynamic_shapes=({0: Dim("batch")},) * len(x), strict=False)


@pytest.mark.parametrize("opset", [17, 23])
def test_nodes_that_differ_have_functions_of_their_own(three: ExportedProgram, opset: int, tmp_path: Path) -> None:
    names = list(steps(1))
    path = to_onnx(three, tmp_path / "steps.onnx", names, STEP_OUTPUTS, form="fused", opset=opset)
    model = onnx.load(path)
    found = [(kind, attributes["inputs"], attributes["num_iter"]) for kind, _, attributes in gka_nodes(model)]
    some, other = b"q,k,v,h,u,g,alpha", b"q,k,v,h,u,gk,alpha"
    assert found == [("step", some, 4), ("step_1", some, 9), ("step", some, 4), ("step_2", other, 4)]
    assert [f.name for f in model.functions] == ["step", "step_1", "step_2"]
    x = steps(5)
    with torch.no_grad():
        oracle, eager = Steps()(*(t.double() for t in x.values())), Steps()(*x.values())
    for y, single, exact in zip(run(path, x), eager, oracle, strict=True):
        assert relative_error(y, exact) <= 2 * relative_error(single, exact) + 2e-7


def test_plugin_form_has_no_functions(three: ExportedProgram, tmp_path: Path) -> None:
    path = to_onnx(three, tmp_path / "steps.onnx", list(steps(1)), STEP_OUTPUTS, form="plugin", opset=17)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert not model.functions
    assert model.ir_version == 8
    assert [node.op_type for node in model.graph.node] == ["step"] * 4
    scalars = {"scale": np.float32(0.5), "ridge_ratio": np.float32(RIDGE_RATIO)}
    kind, inputs, attributes = gka_nodes(model)[-1]
    assert (kind, attributes) == ("step", {"inputs": b"q,k,v,h,u,gk,alpha", "num_iter": 4, **scalars})
    assert [inputs[i] for i in (0, 1, 5, 6)] == ["q", "k", "g", "alpha"]
    assert [len(node.output) for node in model.graph.node] == [3] * 4


def test_model_of_two_layers_shares_functions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = ModelConfig(
        pattern="GKA-GKA", hidden_size=32, intermediate_size=64, num_heads=2, num_kv_heads=1, head_dim=16, max_length=256
    )
    model = ByteLM(config).eval()
    programs = export_program(model)
    names = ["tokens", *programs.state]
    path = to_onnx(
        programs.prefill, tmp_path / "prefill.onnx", names, ["logits", *(f"new_{n}" for n in programs.state)], form="fused"
    )
    kinds = [kind for kind, *_ in gka_nodes(onnx.load(path))]
    assert kinds == ["chunk_state", "chunk_output"] * 2
    assert len(onnx.load(path).functions) == 2
    tokens, state = torch.randint(256, (3, 70), generator=torch.Generator().manual_seed(0)), model.init_state(3)
    logits, *_ = run(path, {"tokens": tokens, **state})
    with torch.no_grad():
        expected, _ = model.prefill(tokens, state)
        oracle, _ = model.double().prefill(tokens, {n: x.double() if x.is_floating_point() else x for n, x in state.items()})
    assert relative_error(logits, oracle) <= 2 * relative_error(expected, oracle) + 2e-7


def test_tensorrt_rtx_builds_the_functions(three: ExportedProgram, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", exc_type=ImportError)
    from gka_compile.export import to_tensorrt

    case = CASE["decay-h"]
    options: dict[str, Any] = {"form": "fused", "device": "cuda"}
    prefill = to_onnx(export_prefill(case), tmp_path / "prefill.onnx", list(given(case)), PREFILL_OUTPUTS, **options)
    several = to_onnx(three, tmp_path / "steps.onnx", list(steps(1)), STEP_OUTPUTS, **options)
    built: dict[str, Any] = {"compute_capabilities": ["8.9"], "batches": (1, 2, 4)}
    manifest = to_tensorrt(prefill, tmp_path / "prefill.engine", lengths=(1, 64, 512), **built)
    assert [x["name"] for x in manifest["outputs"]] == PREFILL_OUTPUTS
    layers = to_tensorrt(several, tmp_path / "steps.engine", **built)["network_layers"]
    portable = to_onnx(three, tmp_path / "portable.onnx", list(steps(1)), STEP_OUTPUTS, device="cuda")
    at_least = to_tensorrt(portable, tmp_path / "portable.engine", **built)["network_layers"]
    constants = sum(node.op_type == "Constant" for node in nodes(onnx.load(several)))
    assert at_least <= layers <= at_least + 4 * constants  # every call has its own


def test_bad_input(three: ExportedProgram, tmp_path: Path) -> None:
    def convert(program: ExportedProgram = three, **options: Any) -> None:
        inputs, outputs = program.graph_signature.user_inputs, program.graph_signature.user_outputs
        to_onnx(program, tmp_path / "model.onnx", inputs, outputs, **options)

    with pytest.raises(ValueError, match="form: expected one of portable, fused, plugin, got 'functions'"):
        convert(form="functions")
    with pytest.raises(ValueError, match=r"device, mixed: expected neither for form 'plugin', .* got 'cuda', False"):
        convert(form="plugin", device="cuda")
    with pytest.raises(ValueError, match="chunk_size: expected None for form 'portable', got 32"):
        convert(chunk_size=32)
    prefill = export_prefill(CASE["plain"])
    for size, error, got in ((0, ValueError, "power of two of at least 16, got 0"), (32.0, TypeError, "integer or None, got 32.0")):
        with pytest.raises(error, match=f"chunk_size: expected .*{got}"):
            convert(prefill, form="plugin", chunk_size=size)
    with pytest.raises(TypeError, match=r"dtype: expected float32, float16 or bfloat16, got torch\.float64"):
        convert(export_prefill(CASE["plain"], torch.float64), form="fused")
    with pytest.raises(ValueError, match="key_width: expected a head width that is a multiple of 8 from 8 to 128, got 20"):
        convert(export_prefill(replace(CASE["plain"], K=20)), form="plugin")

    class Packed(nn.Module):
        def forward(self, k: Tensor, cu_seqlens: Tensor) -> Tensor:
            return gka.chunk_state(k, k, None, None, None, None, None, cu_seqlens, 2, CHUNK)[3]

    packed = torch.export.export(Packed(), (torch.randn(1, 9, 2, 16), torch.tensor([0, 4, 9])), strict=False)
    with pytest.raises(ValueError, match="expected sequences of one length, got packed ones"):
        convert(packed, form="fused")

    class InPlace(nn.Module):
        def forward(self, q: Tensor, h: Tensor, u: Tensor) -> Tensor:
            return gka.step_(q, q, q, h, u, None, None, None, None, 1.0, RIDGE_RATIO, 4)

    x = steps(2)
    inplace = torch.export.export(InPlace(), (x["q"], x["h"], x["u"]), strict=False)
    with pytest.raises(ValueError, match=r"program: expected gka nodes among chunk_state, chunk_output, step, got gka\.step_"):
        convert(inplace, form="plugin")
    assert list(tmp_path.iterdir()) == []
