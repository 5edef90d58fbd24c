"""Compile a launcher's kernel for a GPU that is not here, and read what the assembler says of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from gka_compile.custom_ops import ahead

SHARED_MEMORY = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB a block may use, by compute capability
_TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int64: "*i64", torch.int32: "*i32"}


@dataclass
class Launch:
    """One recorded launch."""

    kernel: Any
    args: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, int]


def record(launcher: Any, *args: Any) -> list[Launch]:
    """The launches that ``launcher`` would do."""
    with ahead.keeping_launches() as kept:
        launcher(*args)
    launches = []
    for made in kept:
        options = {name: made.named[name] for name in ("num_warps", "num_stages")}
        launches.append(Launch(made.kernel, made.args, {n: x for n, x in made.named.items() if n not in options}, options))
    return launches


def compile_for(launch: Launch, capability: int, ones: bool = False) -> Any:
    """Compile a recorded launch for sm_``capability``; ``ones``: as if its integers were 1, which Triton takes for constants."""
    signature: dict[str, str] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    names = launch.kernel.arg_names
    for i, name in enumerate(names):
        if name in launch.constants:
            signature[name], constants[(i,)] = "constexpr", launch.constants[name]
            continue
        value = launch.args[i]
        if isinstance(value, torch.Tensor):
            signature[name] = _TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif ones and isinstance(value, int):
            signature[name], constants[(i,)] = "constexpr", 1
        else:
            signature[name] = "i32" if isinstance(value, int) else "fp32"
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)


def registers(compiled: Any, capability: int) -> tuple[int, int]:
    """(registers a thread, bytes spilled) as ptxas reports them."""
    ptxas = get_ptxas(capability).path
    arch = f"sm_{capability}{'a' if capability in (90, 100, 120) else ''}"
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernel.ptx"
        ptx.write_text(compiled.asm["ptx"])
        command = [ptxas, "-v", f"--gpu-name={arch}", ptx, "-o", Path(folder) / "kernel.cubin"]
        ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"ptxas for {arch}: {ran.stderr or ran.stdout}")
    told = ran.stderr + ran.stdout
    used = max(int(n) for n in re.findall(r"Used (\d+) registers", told))
    return used, sum(int(n) for n in re.findall(r"(\d+) bytes spill", told))
