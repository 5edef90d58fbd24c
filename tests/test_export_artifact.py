"""Artifacts: what is in them, what runs from them, and what is refused. One build of both backends serves all tests."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

from gka_compile.export import ArtifactError, Runner, export_program, load_manifest, save_artifact, to_aoti  # noqa: E402
from gka_compile.export import artifact as artifact_module  # noqa: E402
from gka_compile.export.backends import _runs  # noqa: E402
from gka_compile.export.sealed import digest_of  # noqa: E402
from gka_compile.export.to_onnx import nodes, present_name  # noqa: E402
from gka_compile.model import ByteLM, ModelConfig  # noqa: E402

BACKENDS = ("aoti", "onnx")
MAX_LENGTH = 384


def make_model(pattern: str = "GKA-*") -> ByteLM:
    torch.manual_seed(0)
    config = ModelConfig(
        pattern=pattern,
        hidden_size=32,
        intermediate_size=64,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        max_length=MAX_LENGTH,
        tie_word_embeddings=False,
    )
    model = ByteLM(config).eval()
    assert model.lm_head is not None
    with torch.no_grad():
        for weight in (model.embed_tokens.weight, model.lm_head.weight):
            weight.normal_()  # random text, not one byte repeated, with logits that differ by more than rounding
    return model


@pytest.fixture(scope="module")
def model() -> ByteLM:
    return make_model()


@pytest.fixture(scope="module")
def stages() -> list[str]:
    return []


@pytest.fixture(scope="module")
def artifact(model: ByteLM, stages: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "model"
    manifest = save_artifact(model, folder, progress=stages.append)
    seconds = {name: entry["seconds"] for name, entry in manifest["backends"].items()}
    print(f"built in {seconds} s, exported in {manifest['export_seconds']} s")
    return folder


@pytest.fixture(scope="module", params=BACKENDS)
def runner(artifact: Path, request: pytest.FixtureRequest) -> Runner:
    return Runner.load(artifact, request.param)


@pytest.fixture
def copied(artifact: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(artifact, tmp_path / "copy"))


# --- numbers ---------------------------------------------------------------------------------------------------------------


def error(x: Tensor, exact: Tensor) -> float:
    return ((x.double() - exact).norm() / exact.norm()).item()


def run_model(model: ByteLM, tokens: list[Tensor]) -> list[Tensor]:
    """Logits after each piece of the sequences: prefill for [B, T], step for [B]."""
    state, logits = model.init_state(tokens[0].shape[0]), []
    with torch.no_grad():
        for piece in tokens:
            out, state = (model.prefill if piece.dim() == 2 else model.step)(piece, state)
            logits.append(out)
    return logits


@pytest.mark.parametrize("lengths", [(1,), (63,), (64,), (65,), (200,), (1, 63, 0, 0), (64, 65, 0), (100, 1, 0, 30, 0)], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_as_exact_as_the_model(runner: Runner, model: ByteLM, batch: int, lengths: tuple[int, ...]) -> None:
    """Against float64, at sizes not seen in export; a length of 0 is a step. The budget is the eager model's own error, doubled."""
    tokens = [torch.randint(256, (batch, n) if n else (batch,)) for n in lengths]
    exact = run_model(copy.deepcopy(model).double(), tokens)
    eager = run_model(model, tokens)
    runner.reset()
    results = [runner.prefill(t) if t.dim() == 2 else runner.step(t) for t in tokens]
    errors = [error(x, y) for x, y in zip(results, exact, strict=True)]
    budget = [2 * error(x, y) + 2e-7 for x, y in zip(eager, exact, strict=True)]
    print(f"errors {errors}, budget {budget}")
    assert all(e < b for e, b in zip(errors, budget, strict=True))


def test_generates_what_the_model_generates(runner: Runner, model: ByteLM) -> None:
    prompt = torch.randint(256, (2, 70))
    expected = model.generate(prompt, 40)
    assert torch.equal(runner.generate(prompt, 40), expected)
    assert torch.equal(runner.generate(prompt, 40), expected)  # nothing is left of the first time
    assert len(set(expected.flatten().tolist())) > 10

    def draw(generate: Callable[..., Tensor], seed: int) -> Tensor:
        return generate(prompt, 20, temperature=1.0, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(runner.generate, 1), draw(model.generate, 1))
    assert not torch.equal(draw(runner.generate, 1), draw(runner.generate, 2))


def test_runs_in_a_process_that_never_sees_the_model(artifact: Path, model: ByteLM) -> None:
    code = """
import json, sys, torch
from gka_compile.export import Runner
prompt = torch.arange(40).view(1, 40)
out = {b: Runner.load(sys.argv[1], b).generate(prompt, 8).tolist() for b in ("aoti", "onnx")}
out["imported"] = [name for name in sys.modules if name.startswith(("gka_compile.model", "gka_compile.layer", "onnxscript"))]
print(json.dumps(out))
"""
    run = subprocess.run([sys.executable, "-c", code, str(artifact)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    out = json.loads(run.stdout.splitlines()[-1])
    assert out["imported"] == []
    expected = model.generate(torch.arange(40).view(1, 40), 8).tolist()
    assert out["aoti"] == out["onnx"] == expected


# --- what is in it ---------------------------------------------------------------------------------------------------------


def test_manifest(artifact: Path, model: ByteLM, stages: list[str]) -> None:
    manifest = load_manifest(artifact)
    assert stages == ["export", "aoti prefill", "aoti step", "onnx prefill", "onnx step"]
    files = sorted(path.name for path in artifact.iterdir())
    assert files == ["manifest.json", "prefill.onnx", "prefill.pt2", "step.onnx", "step.pt2"]
    assert sorted(manifest["files"]) == files[1:]
    assert manifest["model"] == {"config": model.config.to_dict(), "vocab_size": 256, "max_length": MAX_LENGTH}
    assert manifest["state"][0] == {"name": "h_state_0", "dtype": "float32", "shape": ["batch", 2, 16, 16]}
    assert [entry["name"] for entry in manifest["state"]] == list(model.init_state(1))
    prefill = manifest["programs"]["prefill"]
    assert prefill["inputs"][0] == {"name": "tokens", "dtype": "int64", "shape": ["batch", "length"]}
    assert prefill["outputs"][0] == {"name": "logits", "dtype": "float32", "shape": ["batch", 256]}
    assert list(artifact.parent.iterdir()) == [artifact]  # no temporary folder is left


def test_onnx_is_standard_and_loops_over_chunk_states_alone(artifact: Path, model: ByteLM) -> None:
    layers = model.config.layer_types.count("GKA")
    for name in ("prefill", "step"):
        graph = onnx.load(artifact / f"{name}.onnx")
        assert {entry.domain for entry in graph.opset_import} == {""}
        assert {node.domain for node in nodes(graph)} == {""}
        scans = [node for node in nodes(graph) if node.op_type == "Scan"]
        assert len(scans) == (layers if name == "prefill" else 0)
        bodies = [a.g for node in scans for a in node.attribute if a.HasField("g")]
        assert {node.op_type for body in bodies for node in body.node} <= {"Mul", "Add", "Identity"}
        assert not [node for node in nodes(graph) if node.op_type in ("Loop", "If")]
        sizes = [[d.dim_param or d.dim_value for d in x.type.tensor_type.shape.dim] for x in graph.graph.input]
        assert sizes[0] == (["batch", "length"] if name == "prefill" else ["batch"])
        assert all(size[0] == "batch" for size in sizes)
        state = list(model.init_state(1))
        assert [x.name for x in graph.graph.input] == ["tokens", *state]
        assert [x.name for x in graph.graph.output] == ["logits", *map(present_name, state)]
    assert present_name("h_state_0") == "present_h_0"
    assert present_name("conv_state_12") == "present_conv_12"
    assert present_name("value_cache_3") == "present_value_3"
    assert present_name("position") == "present_position"


def test_float16_models_run(tmp_path: Path) -> None:
    model = make_model().half()
    save_artifact(model, tmp_path / "half", ["onnx"])
    tokens = [torch.randint(256, (2, 70)), torch.randint(256, (2,))]
    runner, exact = Runner.load(tmp_path / "half", "onnx"), run_model(copy.deepcopy(model).double(), tokens)
    found = runner.prefill(tokens[0]), runner.step(tokens[1])
    for x, eager, expected in zip(found, run_model(model, tokens), exact, strict=True):
        assert (x - expected).norm() <= 2 * (eager - expected).norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_dtypes_that_onnxruntime_lacks_are_named(dtype: torch.dtype, tmp_path: Path) -> None:
    save_artifact(make_model("GKA").to(dtype), tmp_path / "model", ["onnx"])
    with pytest.raises(RuntimeError, match=r"prefill.onnx: expected a program that CPUExecutionProvider runs here, got .*impl"):
        Runner.load(tmp_path / "model", "onnx")


# --- bad input -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda r: r.prefill([1, 2]), TypeError, "tokens: expected a Tensor, got list"),
        (lambda r: r.prefill(torch.zeros(1, 3)), TypeError, "tokens: expected dtype int64, got torch.float32"),
        (lambda r: r.prefill(torch.tensor([1])), ValueError, r"tokens: expected shape \[B,T\] with at least one token"),
        (lambda r: r.prefill(torch.zeros(1, 0, dtype=torch.int64)), ValueError, "at least one token"),
        (lambda r: r.prefill(torch.tensor([[1, 256]])), ValueError, "tokens: expected tokens from 0 to 255, got 1 to 256"),
        (lambda r: r.step(torch.tensor([-1])), ValueError, "tokens: expected tokens from 0 to 255, got -1"),
        (lambda r: r.step(torch.tensor([[1]])), ValueError, r"tokens: expected shape \[B\]"),
        (
            lambda r: r.prefill(torch.zeros(1, MAX_LENGTH + 1, dtype=torch.int64)),
            ValueError,
            "at most max_length = 384 tokens, got 385",
        ),
        (lambda r: r.generate(torch.tensor([[300]]), 2), ValueError, "prompt: expected tokens from 0 to 255, got 300"),
        (lambda r: r.generate(torch.tensor([[1]]), 0), ValueError, "max_new_tokens: expected at least 1, got 0"),
        (lambda r: r.generate(torch.tensor([[1]]), 2.0), TypeError, "max_new_tokens: expected an int, got float"),
        (lambda r: r.generate(torch.ones(1, 400, dtype=torch.int64), 1), ValueError, "prompt: .* max_length = 384 tokens, got 400"),
        (lambda r: r.generate(torch.tensor([[1]]), 385), ValueError, "max_new_tokens: .* at most max_length = 384 tokens, got 385"),
        (lambda r: r.generate(torch.tensor([[1]]), 2, temperature=-1.0), ValueError, "temperature: expected a finite number"),
        (lambda r: r.generate(torch.tensor([[1]]), 2, generator=5), TypeError, r"generator: expected a torch.Generator or None"),
    ],
)
def test_bad_arguments(artifact: Path, runner: Runner, call: Callable[[Runner], Any], kind: type[Exception], message: str) -> None:
    runner.reset()
    with pytest.raises(kind, match=message):
        call(runner)


def test_refused_input_leaves_the_state_alone(runner: Runner, model: ByteLM) -> None:
    tokens = [torch.randint(256, (2, 9)), torch.randint(256, (2,))]
    runner.reset()
    runner.prefill(tokens[0])
    with pytest.raises(ValueError, match=r"tokens: expected the 2 sequences of the state, got 3; reset\(\) starts anew"):
        runner.step(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="got 0 to 256"):
        runner.step(torch.tensor([0, 256]))
    with pytest.raises(ValueError, match="max_length"):
        runner.prefill(torch.zeros(2, MAX_LENGTH - 8, dtype=torch.int64))
    torch.testing.assert_close(runner.step(tokens[1]), run_model(model, tokens)[1], rtol=1e-5, atol=1e-4)


def test_load_refuses_what_is_not_there(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="backend: expected one of aoti, onnx, tensorrt, got 'openvino'"):
        Runner.load(artifact, "openvino")
    with pytest.raises(ArtifactError, match="expected the backend tensorrt, got an artifact with aoti, onnx"):
        Runner.load(artifact, "tensorrt")
    with pytest.raises(
        ValueError, match=r"provider: expected None, or for backend onnx one of CPUExecutionProvider, .*, got 'CPU'"
    ):
        Runner.load(artifact, "onnx", provider="CPU")
    with pytest.raises(ValueError, match=r"provider: expected None, or for backend onnx .*, got 'CPUExecutionProvider'"):
        Runner.load(artifact, "aoti", provider="CPUExecutionProvider")
    with pytest.raises(ValueError, match="provider: expected one for device cpu, got CUDAExecutionProvider"):
        Runner.load(artifact, "onnx", device="cpu", provider="CUDAExecutionProvider")
    with pytest.raises(ValueError, match="device: expected cpu, cuda or None, got 'tpu'"):
        Runner.load(artifact, "onnx", device="tpu")
    with pytest.raises(ValueError, match=r"device: expected cpu, which .* was compiled for, got cuda"):
        Runner.load(artifact, "aoti", device="cuda")
    with pytest.raises(ArtifactError, match="expected an artifact, got no manifest"):
        Runner.load(tmp_path / "absent")


def test_missing_packages_are_named(artifact: Path) -> None:
    code = """
import sys
sys.modules.update(onnx=None, onnxruntime=None, onnxscript=None)
import gka_compile.export as export, torch
for call in (lambda: export.Runner.load(sys.argv[1], "onnx"), lambda: export.to_onnx(None, "x.onnx", [], [])):
    try:
        call()
    except ImportError as error:
        print(error)
export.Runner.load(sys.argv[1], "aoti").prefill(torch.tensor([[1]]))
"""
    run = subprocess.run([sys.executable, "-c", code, str(artifact)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    runtime, exporter = run.stdout.splitlines()[-2:]
    assert "needs onnxruntime, which is not installed: pip install" in runtime
    assert "needs onnx, which is not installed: pip install" in exporter


# --- damage ----------------------------------------------------------------------------------------------------------------


def rewrite(folder: Path, **changes: Any) -> None:
    """A manifest that is consistent, but says something else."""
    manifest = json.loads((folder / "manifest.json").read_text()) | changes
    manifest["sha256"] = digest_of(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["prefill.pt2", "step.onnx"])
def test_tampered_truncated_and_missing_files_are_refused(copied: Path, name: str) -> None:
    path = copied / name
    data = path.read_bytes()
    path.write_bytes(data[:1000] + bytes([data[1000] ^ 1]) + data[1001:])
    with pytest.raises(ArtifactError, match=f"{name}: expected the SHA-256 that manifest.json lists, got another"):
        Runner.load(copied, "onnx")
    path.write_bytes(data[:-1])
    with pytest.raises(ArtifactError, match=f"{name}: expected {len(data)} bytes, got {len(data) - 1}: truncated"):
        Runner.load(copied, "onnx")
    path.unlink()
    with pytest.raises(ArtifactError, match=f"expected the file {name} that manifest.json lists, got none"):
        Runner.load(copied, "onnx")
    path.write_bytes(data)
    Runner.load(copied, "onnx")


def test_damaged_manifests_are_refused(copied: Path) -> None:
    path = copied / "manifest.json"
    text = path.read_text()
    path.write_text(text.replace('"max_length": 384', '"max_length": 999'))
    with pytest.raises(ArtifactError, match="the manifest was changed"):
        load_manifest(copied)
    path.write_text(text[:100])
    with pytest.raises(ArtifactError, match="got no JSON"):
        load_manifest(copied)
    path.write_text('{"format": "another"}')
    with pytest.raises(ArtifactError, match="got JSON of another kind"):
        load_manifest(copied)
    path.write_text(text)
    rewrite(copied, version=2)
    with pytest.raises(ArtifactError, match=r"expected format version 1 .*, got 2 .*: export the model again"):
        load_manifest(copied)
    path.write_text(text)
    rewrite(copied, files={"../outside": {"bytes": 1, "sha256": ""}})
    with pytest.raises(ArtifactError, match=r"expected the names of files in the folder, got '\.\./outside'"):
        load_manifest(copied)


def test_other_hardware_and_absent_backends_are_refused(copied: Path) -> None:
    rewrite(copied, target="cpu other AVX2")
    with pytest.raises(ArtifactError, match="got code for cpu other AVX2: export it here"):
        Runner.load(copied, "aoti")
    Runner.load(copied, "onnx")
    rewrite(copied, backends={"onnx": load_manifest(copied)["backends"]["onnx"]})
    with pytest.raises(ArtifactError, match="expected the backend aoti, got an artifact with onnx"):
        Runner.load(copied, "aoti")
    assert _runs("cpu x86_64 AVX2", "cpu x86_64 AVX512")
    assert not _runs("cpu x86_64 AVX512", "cpu x86_64 AVX2")
    assert not _runs("cuda 9.0", "cuda 8.6")


# --- builds that fail ------------------------------------------------------------------------------------------------------


def test_a_failed_build_leaves_what_was_there(model: ByteLM, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(program: Any, path: Path, *_: Any) -> None:
        path.write_bytes(b"half")
        raise RuntimeError("disk full")

    monkeypatch.setattr(artifact_module, "to_onnx", fail)
    before = {path.name: path.read_bytes() for path in copied.iterdir()}
    for folder in (tmp_path / "new", copied):
        with pytest.raises(RuntimeError, match="disk full"):
            save_artifact(model, folder, ["onnx"])
    assert list(tmp_path.iterdir()) == [copied]
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == before


def test_an_artifact_is_replaced_and_nothing_else(
    model: ByteLM, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifact_module, "to_onnx", lambda program, path, *_: path.write_bytes(b"graph"))
    manifest = save_artifact(model, copied, ["onnx"])
    assert load_manifest(copied) == json.loads(json.dumps(manifest))
    assert sorted(path.name for path in copied.iterdir()) == ["manifest.json", "prefill.onnx", "step.onnx"]
    other = tmp_path / "thesis"
    other.mkdir()
    save_artifact(model, other, ["onnx"])  # empty: nothing to lose
    (other / "manifest.json").write_text("{}")
    file = tmp_path / "file"
    file.write_text("")
    for path in (other, file):
        with pytest.raises(ArtifactError, match="expected a new folder or an artifact to replace"):
            save_artifact(model, path, ["onnx"])
    assert (other / "step.onnx").exists()
    for backends in ([], ["onnx", "onnx"], ["openvino"], "onnx"):
        with pytest.raises(ValueError, match="backends: expected some of aoti, onnx, tensorrt, each once"):
            save_artifact(model, tmp_path / "new", backends)


def test_a_compiler_with_its_own_runtime_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(program: Any, package_path: str, **_: Any) -> str:
        with zipfile.ZipFile(package_path, "w") as archive:
            archive.writestr("model/data/wrapper.so", b"\x7fELF libm.so.6")
        return package_path

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", build)
    monkeypatch.setenv("CXX", "/opt/gcc/bin/g++")
    program = export_program(make_model("GKA")).step
    with pytest.raises(RuntimeError, match=r"'/opt/gcc/bin/g\+\+' links it statically; use another one, say CXX=/usr/bin/g\+\+"):
        to_aoti(program, tmp_path / "step.pt2")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match=r"path: expected a name that ends in .pt2, got 'step.so'"):
        to_aoti(program, tmp_path / "step.so")


def test_places_that_cannot_be_written_are_found_before_the_work(
    model: ByteLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file/a/b: expected a place in a folder, got .*file, which is none"):
        save_artifact(model, tmp_path / "file" / "a" / "b", ["onnx"], progress=pytest.fail)
    with pytest.raises(ValueError, match=r"path: expected a file in a folder that exists, got .*nowhere/a\.pt2"):
        to_aoti(export_program(model).step, tmp_path / "nowhere" / "a.pt2")
    (tmp_path / "empty" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "empty" / "here")
    for folder in (".", "..", tmp_path / "empty" / "here"):
        with pytest.raises(ValueError, match=r": expected a folder that does not hold the current one, .* got one that does"):
            save_artifact(model, folder, ["onnx"], progress=pytest.fail)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ArtifactError, match="got something else of that name"):
        save_artifact(model, tmp_path / "loop", ["onnx"], progress=pytest.fail)
    (tmp_path / "empty" / "here").rmdir()  # no current folder any more
    with pytest.raises(ValueError, match="stage"):
        save_artifact(model, tmp_path / "empty", ["onnx"], progress=lambda _: (_ for _ in ()).throw(ValueError("stage")))


def test_folders_made_for_an_artifact_that_fails_are_removed(
    model: ByteLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr(artifact_module, "to_onnx", fail)
    (tmp_path / "a").mkdir()
    with pytest.raises(RuntimeError, match="no room"):
        save_artifact(model, tmp_path / "a" / "b" / "c", ["onnx"])
    assert list(tmp_path.rglob("*")) == [tmp_path / "a"]
