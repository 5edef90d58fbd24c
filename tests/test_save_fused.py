"""A whole model for our kernels: files, kernels and script belong together; nothing is half written."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from gka_compile.cli import app
from gka_compile.export import load_bundle, save_fused
from gka_compile.export.to_onnx import DOMAIN
from gka_compile.model import ByteLM, ModelConfig

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels do not compile")
CONFIG = ModelConfig(hidden_size=32, intermediate_size=32, pattern="GKA-*", num_heads=2, num_kv_heads=1, head_dim=16, max_length=64)


def make() -> ByteLM:
    torch.manual_seed(0)
    return ByteLM(CONFIG).eval()


def nodes(path: Path) -> list[onnx.NodeProto]:
    return [node for node in onnx.load(path).graph.node if node.domain == DOMAIN]


def test_plugin_files_belong_together(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    make().save(tmp_path / "checkpoint")
    out = tmp_path / "out"
    arguments = ["fused", str(tmp_path / "checkpoint"), str(out), "--longest-prompt", "64"]
    told = CliRunner().invoke(app, [*arguments, "--compute-capability", "8.7", "--compute-capability", "8.6"])
    assert told.exit_code == 0, told.output
    bundle = load_bundle(out / "bundle")
    assert [node.op_type for node in nodes(out / "prefill.onnx")] == ["chunk_state", "chunk_output"]
    assert [node.op_type for node in nodes(out / "step.onnx")] == ["step"]
    assert sorted(v["op"] for v in bundle["variants"]) == ["chunk_output", "chunk_state", "step"]
    assert all(set(v["targets"]) == {"8.7", "8.6"} for v in bundle["variants"])
    for node in nodes(out / "prefill.onnx"):  # 32 tokens are these GPUs' chunk, 64 the CPU's, on which the model was exported
        assert [a.i for a in node.attribute if a.name == "chunk_size"] == [32]
    assert (out / "plugin" / "CMakeLists.txt").is_file()


def test_script_calls_what_is_there(tmp_path: Path) -> None:
    """build.sh with stand-ins for cmake and trtexec, which write down how they were called and where."""
    model = make()
    save_fused(model, tmp_path / "out", ["8.7"], lengths=(1, 8, 32), batches=(1, 2, 3))
    for name in ("cmake", "trtexec"):
        tool = tmp_path / "bin" / name
        tool.parent.mkdir(exist_ok=True)
        tool.write_text(f'#!/bin/sh\nfor x in {name} "$PWD" "$@"; do echo "$x" >> "$CALLS"; done\n')
        tool.chmod(0o755)
    environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls"), "PLUGINS": "--plugins",
                   "FLAGS": "--fp16 --verbose"}  # fmt: skip
    subprocess.run(["sh", str(tmp_path / "out" / "build.sh")], env=environment, check=True)
    calls = (tmp_path / "calls").read_text().splitlines()
    starts = [i for i, x in enumerate(calls) if x in ("cmake", "trtexec")]
    configure, build, prefill, step = (calls[a:b] for a, b in zip(starts, [*starts[1:], None], strict=True))
    here = str(tmp_path / "out")
    assert configure == ["cmake", here, "-S", "plugin", "-B", "build", f"-DGKA_BUNDLE={here}/bundle",
                         "-DTENSORRT_INCLUDE_DIR=/usr/include/aarch64-linux-gnu"]  # fmt: skip
    assert build == ["cmake", here, "--build", "build"]
    for name, call, sizes in (("prefill", prefill, ("1x1", "2x8", "3x32")), ("step", step, ("1", "2", "3"))):
        assert call[:5] == ["trtexec", here, f"--onnx={name}.onnx", f"--saveEngine={name}.engine", "--plugins=build/libgka_trt.so"]
        assert call[5:8] == ["--noTF32", "--fp16", "--verbose"]
        inputs = onnx.load(tmp_path / "out" / f"{name}.onnx").graph.input
        for batch, kind, size, given in zip((1, 2, 3), ("min", "opt", "max"), sizes, call[8:], strict=True):
            option, shapes = given.split("=")
            assert option == f"--{kind}Shapes"
            found = dict(x.split(":") for x in shapes.split(","))
            assert list(found) == [x.name for x in inputs]
            assert found.pop("tokens") == size
            for x in inputs[1:]:
                dims = [batch if d.dim_param else d.dim_value for d in x.type.tensor_type.shape.dim]
                assert found[x.name] == "x".join(map(str, dims))


def test_fused_files_run_without_the_kernels(tmp_path: Path) -> None:
    model = make()
    save_fused(model, tmp_path / "out", ["9.0"], form="fused", opset=23)
    assert (tmp_path / "out" / "ort" / "CMakeLists.txt").is_file()
    assert not (tmp_path / "out" / "build.sh").exists()
    tokens = torch.randint(256, (2, 40), generator=torch.Generator().manual_seed(1))
    session = onnxruntime.InferenceSession(tmp_path / "out" / "prefill.onnx", providers=["CPUExecutionProvider"])
    state = model.init_state(2)
    given = {x.name: (tokens if x.name == "tokens" else state[x.name]).numpy() for x in session.get_inputs()}
    logits = session.run(["logits"], given)[0]
    exact = make().double()
    with torch.no_grad():
        expected = exact.prefill(tokens, exact.init_state(2))[0].numpy()
    assert np.linalg.norm(logits - expected) < 1e-5 * np.linalg.norm(expected)


def test_bad_input_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    out = tmp_path / "out"
    wide = ByteLM(ModelConfig(hidden_size=128, intermediate_size=32, pattern="GKA", num_heads=2, num_kv_heads=1)).eval().half()
    with pytest.raises(ValueError, match=r"chunks have one length.*8\.7 \(32\), 9\.0 \(64\)"):
        save_fused(wide, out, ["8.7", "9.0"])
    with pytest.raises(ValueError, match="form: expected one of plugin, fused, got 'portable'"):
        save_fused(model, out, ["8.7"], form="portable")
    with pytest.raises(ValueError, match=r"lengths: expected 1 ≤ least ≤ usual ≤ most < 2\^31, got \(4, 2, 8\)"):
        save_fused(model, out, ["8.7"], lengths=(4, 2, 8))
    for sizes in (512, (1, 2), (1, 2.5, 4)):
        with pytest.raises(TypeError, match=r"batches: expected three integers \(least, usual, most\), got"):
            save_fused(model, out, ["8.7"], batches=sizes)
    with pytest.raises(ValueError, match=r"lengths: expected None for form 'fused', .*, got"):
        save_fused(model, out, ["8.7"], form="fused", lengths=(1, 2, 3))
    for wrong in (["7.5"], ["foo"], ["10.0.0"], "8.7", 8.7):
        with pytest.raises(ValueError, match="compute_capabilities: expected some of"):
            save_fused(model, out, wrong, progress=pytest.fail)
    attention = ByteLM(ModelConfig(hidden_size=32, intermediate_size=32, pattern="*", num_heads=2, max_length=64)).eval()
    with pytest.raises(ValueError, match="lengths: expected at most the model's max_length = 64, got 65"):
        save_fused(attention, out, ["8.7"], lengths=(1, 2, 65))
    with pytest.raises(ValueError, match=r"model: expected layers of Gated KalmaNet, .*, got a model without"):
        save_fused(attention, out, ["8.7"])
    assert not list(tmp_path.iterdir())
    out.mkdir()
    (out / "mine").write_text("kept")
    with pytest.raises(ValueError, match="out: expected a new or empty folder, got one that is not empty"):
        save_fused(model, out, ["8.7"])
    assert [x.name for x in tmp_path.iterdir()] == ["out"]
    assert (out / "mine").read_text() == "kept"
    (out / "here").mkdir()
    monkeypatch.chdir(out / "here")
    with pytest.raises(ValueError, match="expected a folder that does not hold the current one"):
        save_fused(model, ".", ["8.7"])
