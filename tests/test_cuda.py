"""What only a GPU can show: compiled and packaged kernels, tensors past 2³¹ elements, the device of the inputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import DEVICE, Recorder, count_replays, relative_error
from torch import Tensor, nn

from gka_compile import chunk_gka, step_gka
from gka_compile.custom_ops import config, pieces, plans, recurrent_gka

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


def inputs(B: int, T: int | None, H: int = 4, Hk: int = 2, K: int = 64, V: int | None = None) -> tuple[Tensor, ...]:
    V = V or K
    generator = torch.Generator("cuda").manual_seed(B + (T or 0))
    lead = (B,) if T is None else (B, T)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    unit = torch.nn.functional.normalize
    q, k, v = unit(normal(*lead, H, K), dim=-1), unit(normal(*lead, Hk, K), dim=-1), normal(*lead, Hk, V)
    gates = (-0.1 * normal(*lead, H).abs(), normal(*lead, H).sigmoid(), normal(*lead, H).sigmoid())
    square = normal(B, H, K, K)
    return q.bfloat16(), k.bfloat16(), v.bfloat16(), *gates, square @ square.mT / K, normal(B, H, K, V)


def with_gradients(function: object, given: tuple[Tensor, ...]) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in given]
    outputs = function(*leaves)  # type: ignore[operator]
    return [*outputs, *torch.autograd.grad([x.float().square().sum() for x in outputs], leaves)]


def test_a_single_token_trains() -> None:
    """T = 1 is a constant to Triton, which compiles other code for it."""

    def exact(q: Tensor, k: Tensor, v: Tensor, g: Tensor, alpha: Tensor, beta: Tensor, h: Tensor, u: Tensor) -> tuple[Tensor, ...]:
        return tuple(recurrent_gka(q, k, v, g, g, alpha, beta, num_iter=None, initial_state=(h, u)))  # type: ignore[arg-type]

    for K, V in ((64, 64), (128, 128), (64, 32), (128, 16), (32, 32)):
        given = inputs(2, 1, K=K, V=V)
        found = with_gradients(Prefill(), given)
        expected = with_gradients(exact, tuple(x.double().cpu() for x in given))
        expected[-2] = (expected[-2] + expected[-2].mT) / 2  # of h only this is defined
        for x, y in zip(found, expected, strict=True):
            assert relative_error(x.cpu(), y) < 0.02


def test_compiled_training_is_eager() -> None:
    module = Prefill()
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for B, T in ((2, 100), (3, 150), (2, 700)):
        given = inputs(B, T)
        for x, y in zip(with_gradients(compiled, given), with_gradients(module, given), strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize(
    ("B", "most", "cut"), [(4, 24, (3, 8)), (4, 8, (1, 8)), (2, 5, (1, 4))], ids=["sequences", "sequence", "parts"]
)
def test_compiled_training_in_pieces_is_eager(B: int, most: int, cut: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs(B, 500)  # 8 chunks a sequence
    monkeypatch.setattr(config, "PIECE_BYTES", most * 4 * 64 * 128 * 2)
    assert pieces.piece_sizes(*given[1:3], None, 4, 64) == cut
    torch._dynamo.reset()
    compiled = torch.compile(Prefill(), fullgraph=True, dynamic=False)
    with torch._inductor.config.patch(force_disable_caches=True):  # they would not see the number changed
        for x, y in zip(with_gradients(compiled, given), with_gradients(Prefill(), given), strict=True):
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


def steps(
    form: str, num_iters: tuple[int, ...], gates: tuple[str, ...] = ("g", "gk", "alpha", "beta"), move: int = 0
) -> list[Tensor]:
    """o of every step and the last states; ``move`` puts the states that many numbers behind a multiple of 16 bytes."""
    outputs, state = [], None
    for i, num_iter in enumerate(num_iters):
        q, k, v, g, alpha, beta, h, u = inputs(2, None)
        given = {"g": g, "gk": g, "alpha": alpha, "beta": beta}
        given = {n: x for n, x in given.items() if n in gates}
        if state is None:
            state = tuple(torch.cat([x.new_zeros(move), x.flatten()])[move:].view(x.shape) for x in (h, u))
        q = q.roll(i, 0)
        if form == "op":
            o = torch.ops.gka.step_(
                *(q, k, v, *state, *(given.get(n) for n in ("g", "gk", "alpha", "beta"))), 64**-0.5, 0.02, num_iter
            )
        else:
            o, state = step_gka(q, k, v, state, **given, num_iter=num_iter, inplace=form == "inplace")
        outputs.append(o)
    return [*outputs, *state]


@pytest.mark.parametrize("move", [0, 1])
@pytest.mark.parametrize("gates", [(), ("gk", "beta"), ("g", "gk", "alpha", "beta")], ids=str)
def test_repeated_steps_are_the_ops(gates: tuple[str, ...], move: int) -> None:
    """Plans, the op and the functional step: the same bits, whatever num_iter was before and on whatever stream."""
    plans._plans.clear()
    num_iters = (30, 30, 7, 30, 7, 1, 30, 7)
    found = steps("inplace", num_iters, gates, move)
    assert sum(map(bool, plans._plans.values())) == (0 if move else 2)  # of 30 and of 7, each seen more than once
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        again = steps("inplace", num_iters, gates, move)
    stream.synchronize()
    others = [steps("op", num_iters, gates, move), again]
    if not move:  # else its kernels are others, for only the first states that it reads lie there
        others.append(steps("functional", num_iters, gates))
    for other in others:
        for x, y in zip(found, other, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("sizes", [(1, 128, 4, 4, 128), (2, 300, 4, 2, 64), (1, 1, 2, 1, 24), (1, 2048, 4, 4, 64)], ids=str)
def test_repeated_sequences_are_the_ops(sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and training by plans, on another stream and in a CUDA graph, and without: the same bits."""
    plans._plans.clear()
    replays = count_replays(monkeypatch)
    other = inputs(*sizes)
    given = tuple(x.roll(1, 0).flip(1) if x.dim() < 4 or x.shape[1] == sizes[1] else x + 0 for x in other)

    def prefill(given: tuple[Tensor, ...]) -> list[Tensor]:
        with torch.no_grad():
            return [*Prefill()(*given)]

    def train(given: tuple[Tensor, ...]) -> list[Tensor]:
        return with_gradients(Prefill(), given)

    for call, planned in ((prefill, 1), (train, 4)):  # of a whole call; of two ops and their gradients
        for _ in range(2):
            call(other)
        before = len(replays)
        found = [call(given)]
        assert len(replays) == before + planned
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found.append(call(given))
        stream.synchronize()
        if call is prefill:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                found.append(call(given))
            assert len(replays) == before + 3
            graph.replay()
        with Recorder():
            expected = call(given)
        for results in found:
            for x, y in zip(results, expected, strict=True):
                assert torch.equal(x, y)


def test_steps_are_captured_in_a_cuda_graph() -> None:
    q, k, v, g, alpha, beta, h, u = inputs(2, None)
    expected, new = step_gka(q, k, v, (h, u), g, g, alpha, beta=beta)
    state = (h.clone(), u.clone())
    for _ in range(2):
        step_gka(q, k, v, (h.clone(), u.clone()), g, g, alpha, beta=beta, inplace=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, _ = step_gka(q, k, v, state, g, g, alpha, beta=beta, inplace=True)
    graph.replay()
    for x, y in zip((o, *state), (expected, *new), strict=True):
        assert torch.equal(x, y)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_step_on_another_than_the_current_gpu() -> None:
    q, k, v, g, alpha, beta, h, u = inputs(2, None)
    expected = step_gka(q, k, v, (h, u), g, g, alpha, beta=beta)
    q, k, v, g, alpha, beta, h, u = (x.to("cuda:1") for x in (q, k, v, g, alpha, beta, h, u))
    plans._plans.clear()
    for current in (0, 1, 1, 1):
        with torch.cuda.device(current):
            o, state = step_gka(q, k, v, (h.clone(), u.clone()), g, g, alpha, beta=beta, inplace=True)
        for x, y in zip((o, *state), (expected[0], *expected[1]), strict=True):
            assert torch.equal(x.cpu(), y.cpu())
    assert sum(map(bool, plans._plans.values())) == 1
