"""The command line: what it says, how it exits. Its parts are tested elsewhere; CI runs the demo itself."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from gka_compile import demo
from gka_compile.cli import app, main
from gka_compile.model import ByteLM, ModelConfig

TINY = ModelConfig(hidden_size=16, intermediate_size=16, pattern="GKA-*", num_heads=2, num_kv_heads=1, head_dim=8, max_length=64)


@dataclass
class Told:
    code: int
    out: str
    err: str


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Told]:
    """The entry point in this process."""

    def run(*arguments: str) -> Told:
        monkeypatch.setattr(sys, "argv", ["gka-compile", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        return Told(int(stop.value.code or 0), *capsys.readouterr())

    return run


def test_help_teaches() -> None:
    told = CliRunner().invoke(app, ["--help"]).output
    assert all(name in told for name in ("demo", "export", "fused", "run", "info"))
    assert "exits 1 if any of them disagrees" in " ".join(CliRunner().invoke(app, ["demo", "--help"]).output.split())


def test_info_names_versions() -> None:
    told = CliRunner().invoke(app, ["info"])
    assert told.exit_code == 0
    assert torch.__version__ in told.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nowhere"], "nowhere: expected an artifact, got no manifest.json there"),
        (["run", "nowhere", "--backend", "openvino"], "backend: expected one of aoti, onnx, tensorrt, got 'openvino'"),
        (["run", "nowhere", "--prompt", ""], "--prompt: expected at least one byte, got none"),
        (["export", "nowhere", "out"], "folder: expected a file nowhere/config.json, got none"),
        (["export", "no[where]", "out"], "folder: expected a file no[where]/config.json, got none"),  # no markup
        (["demo", "--device", "tpu"], "--device: expected auto, cpu or cuda, got 'tpu'"),
        (
            [*("fused", "nowhere", "out", "--compute-capability", "8.7", "--form", "fused", "--longest-prompt", "3")],
            "--longest-prompt: expected none without --form plugin, got 3",
        ),
        (["info", "nowhere"], "nowhere: expected an artifact, got no manifest.json there"),
    ],
)
def test_errors_of_use_are_one_line_and_exit_2(arguments: list[str], message: str, command: Callable[..., Told]) -> None:
    told = command(*arguments)
    assert told.code == 2
    assert " ".join(told.err.split()) == f"error: {message}"


def test_any_bytes_are_a_prompt_and_any_temperature_is_one(command: Callable[..., Told], tmp_path: Path) -> None:
    ByteLM(TINY).eval().save(tmp_path / "checkpoint")
    artifact = str(tmp_path / "artifact")
    assert command("export", str(tmp_path / "checkpoint"), artifact, "--backend", "onnx").code == 0
    run = ("run", artifact, "--backend", "onnx", "--max-new-tokens", "1", "--temperature", "1e-300")
    told = command(*run, "--prompt", os.fsdecode(b"a\xff"))
    assert told.code == 0, told.err
    assert told.out.startswith("a\ufffd")


def test_a_demo_that_cannot_be_written_is_not_trained(
    command: Callable[..., Told], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "train", lambda *_: pytest.fail("trained"))
    (tmp_path / "file").write_text("")
    told = command("demo", "--out", str(tmp_path / "file"))
    assert told.code == 2
    assert "file/artifact: expected a place in a folder, got" in " ".join(told.err.split())
    (tmp_path / "checkpoint").mkdir()  # somebody's own
    (tmp_path / "checkpoint" / "config.json").write_text("{}")
    told = command("demo", "--out", str(tmp_path))
    assert told.code == 2
    assert "or one that an earlier demo left, got another" in " ".join(told.err.split())
    ByteLM(demo.CONFIG).save(tmp_path / "checkpoint")
    assert demo.is_of_demo(tmp_path / "checkpoint")


def test_export_and_run(command: Callable[..., Told], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ByteLM(TINY).eval()
    model.save(tmp_path / "checkpoint")
    made_from = ("export", str(tmp_path / "checkpoint"), str(tmp_path / "artifact"), "--device", "cpu")
    made = command(*made_from, "--backend", "onnx")
    assert made.code == 0, made.err
    assert "onnx: prefill.onnx" in made.out
    arguments = ("run", str(tmp_path / "artifact"), "--backend", "onnx", "--prompt", "ab", "--max-new-tokens", "5")
    told = command(*arguments)
    assert told.code == 0, told.err
    new = model.generate(torch.tensor([list(b"ab")]), 5)
    assert told.out == "ab" + bytes(new[0].tolist()).decode(errors="replace") + "\n"
    about = command("info", str(tmp_path / "artifact"))
    assert "h_state_0" in about.out
    told = command(*made_from, "--backend", "onnx", "--flavour", "tensorrt", "--compute-capability", "8.9", "--longest-prompt", "9")
    assert told.code == 2
    assert (
        "--mixed: expected none without --backend tensorrt, got {'flavour': 'tensorrt', 'compute_capabilities': ['8.9'], "
        in told.err
    )
    assert "'lengths': (1, 9, 9)}" in told.err


def row(name: str, logits: torch.Tensor, tokens: torch.Tensor) -> demo.Row:
    return demo.Row(name, tokens, logits, 1.0, None, None)


@pytest.mark.parametrize(("shift", "token", "code"), [(0.0, 7, 0), (2 * demo.TOLERANCE, 7, 1), (0.0, 8, 1), (float("nan"), 7, 1)])
def test_demo_exits_1_where_a_form_disagrees(
    shift: float, token: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, tokens = torch.zeros(2, 256), torch.tensor([[104, 7]])
    rows = [row("eager", logits, tokens), row("other", logits + shift, torch.tensor([[104, token]])), demo.Built("third", 1, 1.0)]
    monkeypatch.setattr(demo, "train", lambda *_: (ByteLM(TINY), 1.0))
    monkeypatch.setattr(demo, "compare", lambda *_: (rows[0], rows[1:]))
    told = CliRunner().invoke(app, ["demo", "--out", str(tmp_path), "--device", "cpu"])
    assert told.exit_code == code
    assert "not run" in next(line for line in told.output.splitlines() if "third" in line)


def test_corpus_is_the_standard_library() -> None:
    text = demo.corpus(1_000_000)
    assert len(text) == 1_000_000
    assert b"import " in bytes(text.tolist())
    assert torch.equal(text, demo.corpus(1_000_000))
