"""torch.compile of training step, prefill and step: whole graphs, one compilation for all sizes, the numbers of eager mode.

"All sizes" has two exceptions, neither of them ours: torch compiles sizes 0 and 1 apart, and Inductor's C++ backend sums more than
4096 float32 numbers by another algorithm, so that crossing 4096 summands costs one compilation more.  The sizes compiled with
Inductor stay below that; the graphs themselves have no such limit, which the tests with ``aot_eager`` show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from helpers import relative_error
from torch import Tensor, nn
from torch._dynamo.utils import counters

from gka_compile import chunk_gka
from gka_compile.layer import GatedKalmaNet
from gka_compile.model import ByteLM, ModelConfig

CONFIG = ModelConfig(hidden_size=32, intermediate_size=40, pattern="GKA-*", num_heads=2, num_kv_heads=1, head_dim=8, max_length=256)
SIZES = ((2, 37), (3, 100), (2, 200), (5, 64), (4, 131))  # batch, length
State = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def each_size(name: str, call: Callable[[int, int], None], sizes: tuple[tuple[int, int], ...] = SIZES) -> None:
    """Call at the first size, which is compiled as it is, at a second, compiled for all, and at others, where nothing may be."""
    for i, size in enumerate(sizes):
        with torch._dynamo.config.patch(error_on_recompile=i > 1):
            call(*size)
    found, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    print(f"{name}: {len(sizes)} sizes, {found} graphs, {breaks} graph breaks")
    assert breaks == 0
    assert found == 2


def make(dtype: torch.dtype = torch.float32) -> ByteLM:
    torch.manual_seed(0)
    return ByteLM(CONFIG).to(dtype)


def tokens(B: int, T: int) -> Tensor:
    return torch.randint(0, 256, (B, T), generator=torch.Generator().manual_seed(1000 * B + T))


def gradients(loss: Tensor, model: nn.Module) -> Tensor:
    return torch.cat([d.flatten() for d in torch.autograd.grad(loss, list(model.parameters()))])


def test_training_step() -> None:
    """Loss and all gradients no further from float64 than twice what eager float32 is."""
    model, exact = make(), make(torch.float64)

    def loss_of(model: nn.Module, text: Tensor) -> Tensor:
        return F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())

    compiled = torch.compile(loss_of, fullgraph=True)

    def call(B: int, T: int) -> None:
        text = tokens(B, T + 1)
        oracle, loss = gradients(loss_of(exact, text), exact), compiled(model, text)
        assert abs(loss.item() - loss_of(exact, text).item()) < 1e-5
        allowed = 2 * relative_error(gradients(loss_of(model, text), model), oracle)
        assert relative_error(gradients(loss, model), oracle) < allowed

    each_size("training step", call)


def near(found: tuple[Tensor, State], expected: tuple[Tensor, State]) -> None:
    assert relative_error(found[0], expected[0]) < 1e-11
    assert list(found[1]) == list(expected[1])
    for name, x in expected[1].items():
        assert relative_error(found[1][name], x) < 1e-11, name


@torch.no_grad()
def test_prefill() -> None:
    """Twice in a row: an empty state, then one that a compiled prefill has left."""
    model = make(torch.float64)
    prefill = torch.compile(model.prefill, fullgraph=True)

    def call(B: int, T: int) -> None:
        text, state = tokens(B, T), model.init_state(B)
        found = prefill(text, state)
        near(found, model.prefill(text, state))
        near(prefill(text, found[1]), model.prefill(text, found[1]))

    each_size("prefill", call, ((2, 37), (3, 100), (2, 128), (17, 64), (4, 2)))


@torch.no_grad()
def test_step() -> None:
    model = make(torch.float64)
    step = torch.compile(model.step, fullgraph=True)

    def call(B: int, T: int) -> None:
        text, state = tokens(B, 3), model.prefill(tokens(B, T), model.init_state(B))[1]
        for t in range(3):
            found = step(text[:, t], state)
            near(found, model.step(text[:, t], state))
            state = found[1]

    each_size("step", call, ((2, 37), (3, 100), (2, 200), (17, 64), (64, 1)))


def test_generate_compiled() -> None:
    model = make(torch.float64)
    prefill, step = (torch.compile(f, fullgraph=True, backend="aot_eager") for f in (model.prefill, model.step))
    prompt = tokens(2, 21)
    assert torch.equal(model.generate(prompt, 9, prefill=prefill, step=step), model.generate(prompt, 9))
    assert not counters["graph_break"]


def test_chunk_gka_any_length() -> None:
    """One chunk, several, thousands of tokens: no guard on the number of chunks."""

    def loss_of(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        return chunk_gka(q, k, v, g, g)[0].square().mean()

    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")

    def call(B: int, T: int) -> None:
        generator = torch.Generator().manual_seed(T)
        q, k, v = (torch.randn(B, T, h, 8, generator=generator).double().requires_grad_() for h in (2, 1, 1))
        leaves = (q, k, v, (-torch.rand(B, T, 2, generator=generator)).double().requires_grad_())
        found = torch.autograd.grad(compiled(*leaves), leaves)
        for a, b in zip(found, torch.autograd.grad(loss_of(*leaves), leaves), strict=True):
            assert relative_error(a, b) < 1e-11

    each_size("chunk_gka", call, ((2, 37), (3, 100), (5, 64), (2, 5000), (20, 2)))


@pytest.mark.parametrize("layout", ["plain", "padded", "packed", "autocast"])
def test_layer_any_length(layout: str) -> None:
    """The layer's own options, with a cache, forward and backward."""
    torch.manual_seed(0)
    layer = GatedKalmaNet(16, 2, 1, 8).to(torch.float32 if layout == "autocast" else torch.float64)

    def run(x: Tensor, mask: Tensor | None, bounds: Tensor | None, cache: Any) -> tuple[Tensor, Any]:
        with torch.autocast("cpu", torch.bfloat16, enabled=layout == "autocast"):
            return layer(x, mask, bounds, cache=cache, output_cache=True)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")

    def call(B: int, T: int) -> None:
        bounds = torch.tensor([0, *([T] * B)]).cumsum(0) if layout == "packed" else None
        x = torch.randn(1, B * T, 16) if layout == "packed" else torch.randn(B, T, 16)
        x = x.to(layer.dtype).requires_grad_()
        mask = torch.arange(T) >= torch.arange(B)[:, None] if layout == "padded" else None
        cache = layer.init_cache(B)
        allowed = 1e-2 if layout == "autocast" else 1e-11
        grads = []
        outputs = []
        for f in (run, compiled):
            y, after = f(x, mask, bounds, cache)
            outputs.append(torch.cat([t.flatten().double() for t in (y, after.conv, *after.state)]))
            grads.append(gradients(y.float().square().sum() if layout == "autocast" else y.square().sum(), layer))
        assert relative_error(outputs[1], outputs[0]) < allowed
        assert relative_error(grads[1], grads[0]) < allowed

    each_size(f"layer, {layout}", call, ((2, 37), (3, 100), (5, 64), (2, 3000), (20, 2)))


def test_floats_that_change_are_checked_in_the_graph() -> None:
    """The second value of a float argument makes Dynamo trace it, checks included."""
    compiled = torch.compile(lambda q, scale, ridge: chunk_gka(q, q, q, scale=scale, ridge_ratio=ridge)[0], fullgraph=True)
    q = torch.randn(1, 9, 2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for scale, ridge in ((0.5, 0.02), (0.25, 0.03), (0.125, 0.05)):
        expected, _ = chunk_gka(q, q, q, scale=scale, ridge_ratio=ridge)
        assert relative_error(compiled(q, scale, ridge), expected) < 1e-14
