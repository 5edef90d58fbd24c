"""Every kernel compiles ahead of time for every chip we name, within its shared memory; and compilers see what it writes."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels do not compile", allow_module_level=True)

from compiling import SHARED_MEMORY, compile_for, record, registers  # noqa: E402
from torch._higher_order_ops import triton_kernel_wrap  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from gka_compile.custom_ops import config, kernels, ops  # noqa: E402


def launches(
    K: int, V: int, dtype: torch.dtype, capability: int, T: int = 64
) -> Iterator[tuple[str, Callable[..., None], tuple[Any, ...]]]:
    """(op, launcher, arguments) of every op with every option on."""
    B, H, chunk = 1, 2, config.gpu_chunk(capability // 10, dtype.itemsize, K, V)
    q, v, gate = torch.zeros(B, T, H, K, dtype=dtype), torch.zeros(B, T, H, V, dtype=dtype), torch.zeros(B, T, H)
    h, u = torch.zeros(B, H, K, K), torch.zeros(B, H, K, V)
    args: tuple[Any, ...] = (q, v, gate, gate, gate, h, u, None, H, chunk)
    state = ops._chunk_state_outputs(*args)
    yield "chunk_state", kernels.launch_chunk_state, (*args, state)
    read = (None, 0.1, 0.02, 30, chunk)
    args = (q, q, v, gate, gate, gate, gate, h, u, *state[:3], *read)
    o, x, x_scale, phi = ops._chunk_output_outputs(*args)
    yield "chunk_output", kernels.launch_chunk_output, (*args, (o, x, x_scale, phi))
    args = (q, v, gate, gate, gate, h, u, o, q, gate, x, x_scale, phi, h, u, None, None, None, *read[:-1], H, chunk)
    yield "chunk_bwd", kernels.launch_chunk_bwd, (*args, ops._chunk_bwd_outputs(*args))
    one = (q[:, 0], q[:, 0], v[:, 0], h, u, *(gate[:, 0],) * 4, 0.1, 0.02, 30)
    yield "step", kernels.launch_step, (*one, ops._step_outputs(*one))


OPS = ("chunk_state", "chunk_output", "chunk_bwd", "step")
# the widest heads on every chip in both precisions' worst places: 16-bit everywhere, float32 where shared memory is smallest
TARGETS = [(capability, torch.bfloat16, 128) for capability in SHARED_MEMORY]
TARGETS += [(86, torch.float32, 128), (86, torch.float16, 64)]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("capability", "dtype", "width"), TARGETS, ids=lambda x: str(x).removeprefix("torch."))
def test_compiles_within_shared_memory(capability: int, dtype: torch.dtype, width: int, op: str) -> None:
    launcher, args = next((launcher, args) for name, launcher, args in launches(width, width, dtype, capability) if name == op)
    for launch in record(launcher, *args):
        compiled = compile_for(launch, capability)
        shared = compiled.metadata.shared / 1024
        used, spilled = registers(compiled, capability)
        name = launch.kernel.__name__
        print(f"sm_{capability} {name} {dtype} {width}: {shared:.0f} KiB shared, {used} registers, {spilled} bytes spilled")
        assert shared <= SHARED_MEMORY[capability], name
        assert b"ELF" in compiled.asm["cubin"][:16]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("K", "V"), [(64, 64), (64, 32), (128, 16)])
def test_compiles_for_sizes_of_one(K: int, V: int, op: str) -> None:
    """Integer arguments are then Python's, as they are always in the analysis of torch 2.11, and have no methods of tensors.

    The loops over one chunk are gone, and outside of a pipelined loop products of fewer than 64 columns are wrong on Hopper.
    """
    launcher, args = next((launcher, args) for name, launcher, args in launches(K, V, torch.bfloat16, 90, T=1) if name == op)
    for launch in record(launcher, *args):
        compiled = compile_for(launch, 90, ones=True)
        assert b"ELF" in compiled.asm["cubin"][:16]
        columns = {int(n) for n in re.findall(r"wgmma\.mma_async\S*\.m64n(\d+)k", compiled.asm["ptx"])}
        assert all(n >= 64 for n in columns), (launch.kernel.__name__, columns)


OUTPUTS = {
    "chunk_factors_kernel": {"factors_ptr", "sums_ptr"},
    "chunk_state_kernel": {"h_chunks_ptr", "u_chunks_ptr", "scales_ptr", "h_out_ptr", "u_out_ptr"},
    "chunk_solve_kernel": {"x_ptr", "x_scale_ptr", "phi_ptr"},
    "chunk_read_kernel": {"o_ptr"},
    "chunk_read_bwd_kernel": {"dm_ptr", "dm_scale_ptr", "dalpha_ptr"},
    "chunk_solve_bwd_kernel": {"y_ptr", "y_scale_ptr", "dq_ptr", "eta_ptr", "dgk_ptr"},
    "cotangent_factors_kernel": {"factors_ptr", "sums_ptr"},
    "chunk_state_bwd_kernel": {"dh_chunks_ptr", "du_chunks_ptr", "dscales_ptr", "dh0_ptr", "du0_ptr"},
    "grads_through_u_kernel": {"dk_ptr", "dk_scale_ptr", "dv_ptr", "dg_ptr", "dbeta_ptr"},
    "grads_through_h_kernel": {"dk_ptr", "dgk_ptr", "dbeta_ptr"},
    "step_kernel": {"o_ptr", "h_out_ptr", "u_out_ptr"},
}


@pytest.mark.parametrize("op", OPS)
def test_inductor_sees_that_outputs_alone_are_written(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its analysis fails, Inductor takes every input for written: copies at best, an error in training at worst."""

    class Hopper:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    monkeypatch.setattr(type(triton.runtime.driver), "active", Hopper())
    launcher, args = next((launcher, args) for name, launcher, args in launches(64, 64, torch.bfloat16, 90) if name == op)
    for launch in record(launcher, *args):
        given = {**dict(zip(launch.kernel.arg_names, launch.args, strict=False)), **launch.constants}
        if hasattr(triton_kernel_wrap, "identify_accessed_tensors"):
            accesses = triton_kernel_wrap.identify_accessed_tensors(launch.kernel, given, {})
            written = {write.name for write in accesses.read_writes.writes}
        else:  # torch 2.11
            written = set(triton_kernel_wrap.identify_mutated_tensors(launch.kernel, given, {}))
        ends_alone = launch.constants.get("ENDS", False)
        assert written == ({"ends_ptr", "totals_ptr"} if ends_alone else OUTPUTS[launch.kernel.__name__])
