"""ONNX files of both opsets and both arrangements: what is in them, and what ONNX Runtime makes of them at sizes not exported."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import relative_error
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from gka_compile import chunk_gka, step_gka  # noqa: E402
from gka_compile.export import to_onnx  # noqa: E402
from gka_compile.export.to_onnx import nodes  # noqa: E402

H, HK, K, V, NUM_ITER = 4, 2, 16, 24, 4
NAMES = ["q", "k", "v", "g", "gk", "alpha", "beta", "h", "u"]
OUTPUTS = ["o", "present_h", "present_u"]
# One a turn of the solve; for H and U each running decays, increments, decays between chunks and states; [P; K̃] K̃ᵀ, q K̃ᵀ, two for
# φ, and the read-out.
PREFILL_PRODUCTS = NUM_ITER + 2 * 4 + 1 + 1 + 2 + 1
# Five terms are some of eight, in products of T_1, T_2 and T_4: T_1 squared, one with T_2, T_4 and T_1 each; the read-out.
STEP_PRODUCTS = 1 + 3 + 1


class Prefill(nn.Module):
    def forward(self, q, k, v, g, gk, alpha, beta, h, u):  # type: ignore[no-untyped-def]
        rest = {"num_iter": NUM_ITER, "initial_state": (h, u), "output_final_state": True, "beta": beta}
        o, state = chunk_gka(q, k, v, g, gk, alpha, **rest)
        return o, *state


class Step(nn.Module):
    def forward(self, q, k, v, g, gk, alpha, beta, h, u):  # type: ignore[no-untyped-def]
        o, state = step_gka(q, k, v, (h, u), g, gk, alpha, num_iter=NUM_ITER, beta=beta)
        return o, *state


def inputs(B: int, T: int | None, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(B)
    size = (B,) if T is None else (B, T)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    unit = nn.functional.normalize
    x = [unit(normal(*size, H, K), dim=-1), unit(normal(*size, HK, K), dim=-1), normal(*size, HK, V)]
    gates = [torch.rand(*size, H, generator=generator) for _ in range(4)]
    seen = normal(B, H, K, 2 * K)
    return [t.to(dtype) for t in x] + [-0.1 * g for g in gates[:2]] + gates[2:] + [seen @ seen.mT / K, normal(B, H, K, V)]


def export(module: nn.Module, T: int | None, dtype: torch.dtype = torch.float32) -> ExportedProgram:
    batch, length = Dim("batch"), Dim("length")
    sizes = {0: batch} if T is None else {0: batch, 1: length}
    return torch.export.export(
        module, tuple(inputs(2, T, dtype)), dynamic_shapes=(*(sizes,) * 7, {0: batch}, {0: batch}), strict=False
    )


@pytest.fixture(scope="module")
def prefill() -> ExportedProgram:
    return export(Prefill(), 130)


@pytest.fixture(scope="module")
def step() -> ExportedProgram:
    return export(Step(), None)


def run(path: Path, x: list[Tensor]) -> list[Tensor]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(y) for y in session.run(None, {n: t.numpy() for n, t in zip(NAMES, x, strict=True)})]


@pytest.mark.parametrize(("opset", "device"), [(17, "cuda"), (23, "cuda"), (23, "cpu")])
def test_runs_at_sizes_not_seen_in_export(
    prefill: ExportedProgram, step: ExportedProgram, opset: int, device: str, tmp_path: Path
) -> None:
    for module, program, sizes in ((Prefill(), prefill, ((1, 1), (3, 64), (1, 200))), (Step(), step, ((1, None), (5, None)))):
        T = sizes[0][1]
        path = to_onnx(program, tmp_path / "model.onnx", NAMES, OUTPUTS, opset=opset, device=device)
        model = onnx.load(path)
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", opset)]
        assert model.ir_version == 8 if opset == 17 else model.ir_version >= 10
        onnx.checker.check_model(model, full_check=True)
        sized = [[d.dim_param or d.dim_value for d in x.type.tensor_type.shape.dim] for x in model.graph.input]
        assert sized[0][:2] == ["batch", "length" if T else H]
        assert sized[7] == ["batch", H, K, K]
        if opset == 17:  # TensorRT 8.5 overlooks them
            assert not any(node.attribute for node in nodes(model) if node.op_type == "Shape")
        assert not any(node.metadata_props for node in nodes(model))  # Python stacks, with paths of the machine
        kinds = collections.Counter(node.op_type for node in nodes(model))
        if device == "cuda":
            assert kinds["MatMul"] == (PREFILL_PRODUCTS if T else STEP_PRODUCTS)
            assert not {"Scan", "Loop", "If", "CumSum", "Trilu", "ScatterND", "GatherND"} & set(kinds)
        else:
            assert kinds["Scan"] == (1 if T else 0)
        for B, T in sizes:
            x = inputs(B, T)
            with torch.no_grad():
                exact, eager = module(*(t.double() for t in x)), module(*x)
            for found, single, expected in zip(run(path, x), eager, exact, strict=True):
                assert found.shape == expected.shape
                assert relative_error(found, expected) <= 2 * relative_error(single, expected) + 2e-7
    assert list(tmp_path.iterdir()) == [tmp_path / "model.onnx"]


def test_mixed_products_are_float16_and_nothing_else(prefill: ExportedProgram, tmp_path: Path) -> None:
    path = to_onnx(prefill, tmp_path / "mixed.onnx", NAMES, OUTPUTS, opset=17, device="cuda", mixed=True)
    model = onnx.shape_inference.infer_shapes(onnx.load(path))
    half = {x.name for x in model.graph.value_info if x.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16}
    kinds = collections.Counter(node.op_type for node in model.graph.node if set(node.output) & half)
    assert kinds["MatMul"] == NUM_ITER
    assert set(kinds) == {"MatMul", "Cast"}
    # ONNX Runtime computes float16 products on the CPU in float32; onnx's evaluator in float16
    x = inputs(1, 70)
    feed: dict[str, Any] = {n: t.numpy() for n, t in zip(NAMES, x, strict=True)}
    found = [torch.from_numpy(np.asarray(y)) for y in onnx.reference.ReferenceEvaluator(model).run(None, feed)]
    with torch.no_grad():
        expected = Prefill()(*(t.double() for t in x))
    errors = [relative_error(a, b) for a, b in zip(found, expected, strict=True)]
    assert 1e-5 < errors[0] < 2e-3  # 16-bit operands and results lose 1e-3 (test_export_portable.py)
    assert max(errors[1:]) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_inputs_keep_their_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    path = to_onnx(export(Step(), None, dtype), tmp_path / "step.onnx", NAMES, OUTPUTS, device="cuda")
    kinds = [x.type.tensor_type.elem_type for x in (*onnx.load(path).graph.input, *onnx.load(path).graph.output)]
    wanted = onnx.TensorProto.FLOAT16 if dtype == torch.float16 else onnx.TensorProto.BFLOAT16
    assert kinds == [wanted] * 3 + [onnx.TensorProto.FLOAT] * 6 + [wanted] + [onnx.TensorProto.FLOAT] * 2


def test_bad_input(step: ExportedProgram, tmp_path: Path) -> None:
    for opset in (16, 24):
        with pytest.raises(ValueError, match=f"opset: expected one from 17 to 23, got {opset}"):
            to_onnx(step, tmp_path / "step.onnx", NAMES, OUTPUTS, opset=opset)
    with pytest.raises(ValueError, match="device: expected cuda or cpu, got 'npu'"):
        to_onnx(step, tmp_path / "step.onnx", NAMES, OUTPUTS, device="npu")

    for inputs_, outputs in ((["q"], OUTPUTS), (NAMES, [])):
        with pytest.raises(ValueError, match=r"put_names: expected the program's \d names, got"):
            to_onnx(step, tmp_path / "step.onnx", inputs_, outputs)
    for wrong in (1, ""):
        with pytest.raises(TypeError, match=f"input_names: expected names that are strings and not empty, got {wrong!r}"):
            to_onnx(step, tmp_path / "step.onnx", [wrong, *NAMES[1:]], OUTPUTS)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="path: expected a file in a folder that exists, got"):
        to_onnx(step, tmp_path / "nowhere" / "step.onnx", NAMES, OUTPUTS)

    with pytest.raises(ValueError, match="path: expected a file, got the folder"):
        to_onnx(step, tmp_path, NAMES, OUTPUTS)
    with pytest.raises(ValueError, match="input_names, output_names: expected every name once, got q more than once"):
        to_onnx(step, tmp_path / "step.onnx", NAMES, ["q", *OUTPUTS[1:]])
    with pytest.raises(TypeError, match="program: expected an ExportedProgram, got Step"):
        to_onnx(Step(), tmp_path / "step.onnx", NAMES, OUTPUTS)

    class New(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.mish(x)

    program = torch.export.export(New(), (torch.randn(2, 4),), strict=False)
    with pytest.raises(ValueError, match="opset: expected operators of opset 17, got Mish of opset 18"):
        to_onnx(program, tmp_path / "new.onnx", ["x"], ["y"], opset=17)
    assert list(tmp_path.iterdir()) == []
