"""What only a GPU can show: compiled and packaged kernels, tensors past 2³¹ elements, the device of the inputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import DEVICE, relative_error
from torch import Tensor, nn

from gka_compile import chunk_gka, step_gka

pytestmark = pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
Dim = torch.export.Dim


class Prefill(nn.Module):
    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, alpha: Tensor, beta: Tensor, h: Tensor, u: Tensor
    ) -> tuple[Tensor, ...]:
        o, state = chunk_gka(q, k, v, g, g, alpha, initial_state=(h, u), output_final_state=True, beta=beta)
        assert state is not None
        return o, *state


class Step(nn.Module):
    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, alpha: Tensor, beta: Tensor, h: Tensor, u: Tensor
    ) -> tuple[Tensor, ...]:
        o, state = step_gka(q, k, v, (h, u), g, g, alpha, beta=beta)
        return o, *state


def inputs(B: int, T: int | None, H: int = 4, Hk: int = 2, K: int = 64) -> tuple[Tensor, ...]:
    generator = torch.Generator("cuda").manual_seed(B + (T or 0))
    lead = (B,) if T is None else (B, T)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    unit = torch.nn.functional.normalize
    q, k, v = unit(normal(*lead, H, K), dim=-1), unit(normal(*lead, Hk, K), dim=-1), normal(*lead, Hk, K)
    gates = (-0.1 * normal(*lead, H).abs(), normal(*lead, H).sigmoid(), normal(*lead, H).sigmoid())
    square = normal(B, H, K, K)
    return q.bfloat16(), k.bfloat16(), v.bfloat16(), *gates, square @ square.mT / K, normal(B, H, K, K)


def with_gradients(function: object, given: tuple[Tensor, ...]) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in given]
    outputs = function(*leaves)  # type: ignore[operator]
    return [*outputs, *torch.autograd.grad([x.float().square().sum() for x in outputs], leaves)]


def test_compiled_training_is_eager() -> None:
    module = Prefill()
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for B, T in ((2, 100), (3, 150), (2, 700)):
        given = inputs(B, T)
        for x, y in zip(with_gradients(compiled, given), with_gradients(module, given), strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize(("module", "length", "nodes"), [(Prefill(), 100, 2), (Step(), None, 1)], ids=["prefill", "step"])
def test_package_holds_the_kernels(module: nn.Module, length: int | None, nodes: int, tmp_path: Path) -> None:
    """One node an op in the export, none of ours in the package: only compiled kernels, which equal eager ones."""
    from gka_compile.export import to_aoti

    sizes = {0: Dim("batch")} if length is None else {0: Dim("batch"), 1: Dim("length")}
    with torch.no_grad():
        program = torch.export.export(
            module, inputs(2, length), dynamic_shapes=((sizes,) * 6 + ({0: Dim("batch")},) * 2), strict=False
        )
        assert sum(str(node.target).startswith("gka.") for node in program.graph.nodes) == nodes
        package = to_aoti(program, tmp_path / "package.pt2")
        assert b"_kernel" in package.read_bytes()
        loaded = torch._inductor.aoti_load_package(str(package))
        for B, T in ((2, length), (3, length and 150), (1, length and 700)):
            given = inputs(B, T)
            for x, y in zip(loaded(*given), module(*given), strict=True):
                assert torch.equal(x, y)


def test_more_than_two_to_the_31_elements() -> None:
    H, K, tail = 4096, 8, 512
    T = 2**31 // (H * K) + 64
    if torch.cuda.get_device_properties(0).total_memory < 60 * 2**30:
        pytest.skip("needs 60 GiB")
    q = torch.nn.functional.normalize(torch.randn(1, T, H, K, device="cuda", dtype=torch.bfloat16), dim=-1)
    g = torch.full((1, T, H), -0.3, device="cuda")
    assert q.numel() > 2**31
    with torch.no_grad():
        o, _ = chunk_gka(q, q, q, g, g)
        # what lies 448 tokens back has decayed to nothing: the end is that of the last 512 tokens alone
        end, _ = chunk_gka(*(q[:, -tail:].contiguous(),) * 3, g[:, -tail:], g[:, -tail:])
    assert relative_error(o[:, -64:], end[:, -64:].cpu()) < 4e-3


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_op_runs_on_its_inputs_device() -> None:
    assert torch.cuda.current_device() == 0
    given = inputs(2, 100)
    found = Prefill()(*(x.to("cuda:1") for x in given))
    for x, y in zip(found, Prefill()(*given), strict=True):
        assert x.device.index == 1
        assert torch.equal(x.cpu(), y.cpu())
