"""The Triton source itself, without a GPU: tests that run kernels once more under TRITON_INTERPRET=1."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="already interpreting")
@pytest.mark.parametrize("file", ["test_ops.py", "test_functional.py", "test_eager.py::test_a_plan_computes_what_the_call_does"])
def test_interpreted(file: str) -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment = {**kept, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:xdist", "--import-mode=importlib", f"{HERE}/{file}"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parent)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    print(run.stdout.strip().splitlines()[-1])
