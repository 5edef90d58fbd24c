"""GatedKalmaNet against its formulas in float64, token by token, and its properties: pieces, padding and packing change nothing."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import CASES, DEVICE, budget, relative_error, run_reference
from torch import Tensor

from gka_compile import GKAState
from gka_compile import layer as layer_module
from gka_compile.cache import GKACache
from gka_compile.custom_ops import recurrent_gka
from gka_compile.layer import GatedKalmaNet

FLAGS: tuple[dict[str, Any], ...] = (
    {},
    {"use_beta_gate": False},
    {"use_alpha_connection": False},
    {"use_v_conv": False},
    {"use_forgetting_gate": False},
    {"use_forgetting_gate_kk": False},
    {"gla_rescale": False},
    {"use_gate": False},
    {"conv_size": 2, "ridge_ratio": 0.1, "norm_eps": 1e-2},
    {"num_kv_heads": 4},
    {"num_kv_heads": 1},
)
EXACT = 1e-11  # float64, relative


def make(dtype: torch.dtype = torch.float64, seed: int = 0, **options: Any) -> GatedKalmaNet:
    torch.manual_seed(seed)
    options = {"num_kv_heads": 2, "head_dim": 8} | options
    layer = GatedKalmaNet(24, 4, **options)
    with torch.no_grad():  # no parameter at a value that hides a mistake
        layer.o_norm.weight.uniform_(0.5, 1.5)
        layer.A_log.sub_(3)  # decays slow enough for the past to matter
    return layer.to(dtype)


def inputs(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def formulas(layer: GatedKalmaNet, x: Tensor, rounded: Callable[[Tensor], Tensor] = lambda t: t) -> Tensor:
    """The layer as its docstring has it, in the arithmetic of x; gradients reach the parameters.

    ``rounded`` stands where a layer of 16 bits hands a tensor from one operation to the next.
    """
    p = {name: w.to(x.dtype) for name, w in layer.named_parameters()}
    B, T, _ = x.shape
    D, flags = layer.head_dim, {name.split(".")[0] for name in p}

    def project(name: str) -> Tensor:
        return rounded(F.linear(x, p[f"{name}_proj.weight"], p.get(f"{name}_proj.bias")))

    def convolved(name: str) -> Tensor:
        y = project(name)
        if f"{name}_conv1d" in flags:
            w = p[f"{name}_conv1d.weight"][:, 0]  # [C, W]: the last tap is the present token's
            W = w.shape[1]
            past = torch.cat([y.new_zeros(B, W - 1, y.shape[2]), y], 1)
            y = rounded(F.silu(torch.stack([(past[:, t : t + W] * w.t()).sum(1) for t in range(T)], 1)))
        return y.unflatten(-1, (-1, D))

    q, k, v = (convolved(name) for name in "qkv")
    q, k = (rounded(y / (y.square().sum(-1, keepdim=True).sqrt() + 1e-6)) for y in (q, k))
    g = beta = alpha = None
    if layer.use_forgetting_gate:
        g = -p["A_log"].exp() * F.softplus(project("a") + p["dt_bias"])
    if "b_proj" in flags:
        beta = project("b").sigmoid() + 1e-6
    if "alpha_proj" in flags:
        alpha = project("alpha").sigmoid()
    gk = g if layer.use_forgetting_gate_kk else None
    o, _, _ = recurrent_gka(q, k, v, g, gk, alpha, beta, layer.scale, layer.ridge_ratio, layer.num_iter)
    o = rounded(o)
    o = o / (o.square().mean(-1, keepdim=True) + layer.o_norm.eps).sqrt() * p["o_norm.weight"]
    if "g_proj" in flags:
        o = o * F.silu(project("g").unflatten(-1, (-1, D)))
    return rounded(F.linear(rounded(o.flatten(-2)), p["o_proj.weight"]))


@pytest.mark.parametrize("options", FLAGS, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()) or "released")
def test_formulas_forward_and_gradients(options: dict[str, Any]) -> None:
    # 110 iterations: the gradient is that of the exact solve, the oracle's is that of its iteration
    layer = make(num_iter=110, **options)
    x = inputs(2, 70, 24).requires_grad_()  # more than one chunk, the last one not full
    leaves = {"x": x, **dict(layer.named_parameters())}
    cotangent = inputs(2, 70, 24, seed=2)
    expected, (found, cache) = formulas(layer, x), layer(x)
    assert cache is None
    assert relative_error(found, expected) < 1e-10
    wanted = torch.autograd.grad(expected, list(leaves.values()), cotangent, allow_unused=True)
    got = torch.autograd.grad(found, list(leaves.values()), cotangent, allow_unused=True)
    unused = set() if layer.use_forgetting_gate else {"a_proj.weight", "A_log", "dt_bias"}
    assert {name for name, d in zip(leaves, got, strict=True) if d is None} == unused
    for name, a, b in zip(leaves, got, wanted, strict=True):
        if name not in unused:
            assert b.norm() > 0, name
            assert relative_error(a, b) < 1e-8, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["weights", "autocast"])
def test_low_precision(dtype: torch.dtype, autocast: bool) -> None:
    if autocast and dtype == torch.float32:
        pytest.skip("autocast to float32 is float32")
    layer = make(torch.float32 if autocast else dtype).to(DEVICE)
    x = inputs(2, 70, 24, dtype=torch.float32 if autocast else dtype)
    exact = formulas(layer.cpu(), x.double())
    low = formulas(layer, x) if dtype == torch.float32 else formulas(layer, x.double(), lambda t: t.to(dtype).double())
    layer.to(DEVICE)
    with torch.autocast(DEVICE, dtype, enabled=autocast):
        found, cache = layer(x.to(DEVICE), output_cache=True)
        first, rest = layer(x[:, :40].to(DEVICE), output_cache=True)
        steps = []
        for t in range(40, 70):
            y, rest = layer.step(x[:, t].to(DEVICE), rest)
            steps.append(y)
    assert found.dtype == dtype
    assert cache.state.h_kk.dtype == cache.state.h_kv.dtype == torch.float32
    assert cache.conv.dtype == rest.conv.dtype == layer.dtype
    allowed = 2 * relative_error(low, exact)
    if DEVICE == "cuda" and dtype != torch.float32:  # where the products inside the op round as well
        oracle = run_reference(CASES[0], dtype, torch.float64)
        allowed += budget(CASES[0], dtype, oracle)["o"]
    assert relative_error(found, exact) <= allowed
    assert relative_error(torch.cat([first, torch.stack(steps, 1)], 1), exact) <= allowed
    found.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.dtype == p.dtype for p in layer.parameters())


def close(a: GKACache, b: GKACache, rows: slice = slice(None)) -> None:
    for x, y in ((a.conv, b.conv), (a.state.h_kk, b.state.h_kk), (a.state.h_kv, b.state.h_kv)):
        assert relative_error(x[rows], y[rows]) < EXACT


def some_cache(layer: GatedKalmaNet, sequences: int) -> GKACache:
    """What 9 tokens leave."""
    cache = layer(inputs(sequences, 9, 24, seed=3), output_cache=True)[1]
    assert cache is not None
    return cache


@pytest.mark.parametrize("options", [{}, {"use_v_conv": False, "conv_size": 3}], ids=["released", "no-v-conv"])
@pytest.mark.parametrize("pieces", [(150,), (1,) * 20, (64, 0, 86), (1, 2, 3, 65, 79), (149, 1)], ids=str)
def test_pieces(options: dict[str, Any], pieces: tuple[int, ...]) -> None:
    layer, x = make(**options), inputs(3, sum(pieces), 24)
    whole, expected = layer(x, output_cache=True)
    for stepwise in (False, True):
        cache, outputs = layer.init_cache(3), []
        for piece in x.split(pieces, 1):
            if stepwise and piece.shape[1] == 1:
                y, cache = layer.step(piece[:, 0], cache)
                y = y[:, None]
            else:
                y, cache = layer(piece, cache=cache, output_cache=True)
            outputs.append(y)
        assert relative_error(torch.cat(outputs, 1), whole) < EXACT
        close(cache, expected)


LENGTHS = (70, 1, 0, 13)


def padded_batch(x: Tensor, side: str) -> tuple[Tensor, Tensor]:
    """Rows of x cut to LENGTHS, padded to 70 with NaN, and the mask."""
    mask = torch.zeros(len(LENGTHS), 70, dtype=torch.int64)
    for row, n in enumerate(LENGTHS):
        where = {"left": slice(70 - n, 70), "right": slice(0, n), "inside": torch.randperm(70)[:n]}[side]
        mask[row, where] = 1
    padded = torch.full((len(LENGTHS), 70, 24), float("nan"), dtype=x.dtype)
    padded[mask.bool()] = torch.cat([x[row, :n] for row, n in enumerate(LENGTHS)])
    return padded, mask


@pytest.mark.parametrize("side", ["left", "right", "inside"])
@pytest.mark.parametrize("cached", [False, True], ids=["start", "cached"])
def test_padding_changes_nothing(side: str, cached: bool) -> None:
    layer, x = make(use_gate=cached), inputs(4, 70, 24)  # without a gate nothing else sets outputs at padding to zero
    padded, mask = padded_batch(x, side)
    before = some_cache(layer, 4) if cached else layer.init_cache(4)
    y, after = layer(padded, mask, cache=before if cached else None, output_cache=True)
    assert (y[mask == 0] == 0).all()
    for row, n in enumerate(LENGTHS):
        own = slice(row, row + 1)
        alone = GKACache(before.conv[own], GKAState(*(s[own] for s in before.state)))
        expected, cache = layer(x[own, :n], cache=alone, output_cache=True)
        assert relative_error(y[row][mask[row] == 1], expected[0]) < EXACT
        close(GKACache(after.conv[own], GKAState(*(s[own] for s in after.state))), cache)
    for a, b in ((before.conv, after.conv), (before.state.h_kk, after.state.h_kk), (before.state.h_kv, after.state.h_kv)):
        assert torch.equal(a[2], b[2])  # a row of padding leaves its cache bit for bit


def test_padding_gets_no_gradient() -> None:
    layer = make()
    padded, mask = padded_batch(inputs(4, 70, 24), "left")
    padded = padded.nan_to_num(3.0).requires_grad_()
    dx, *gradients = torch.autograd.grad(layer(padded, mask.bool())[0].square().sum(), [padded, *layer.parameters()])
    assert (dx[mask == 0] == 0).all()
    alone = torch.zeros_like(dx)
    total = [torch.zeros_like(p) for p in layer.parameters()]
    for row in range(4):
        x = padded[row : row + 1, mask[row] == 1].detach().requires_grad_()
        d, *rest = torch.autograd.grad(layer(x)[0].square().sum(), [x, *layer.parameters()])
        alone[row, mask[row] == 1] = d[0]
        total = [a + b for a, b in zip(total, rest, strict=True)]
    assert relative_error(dx, alone) < 1e-9
    for a, b in zip(gradients, total, strict=True):
        assert relative_error(a, b) < 1e-9


@pytest.mark.parametrize("cached", [False, True], ids=["start", "cached"])
def test_packed_is_separate(cached: bool) -> None:
    layer, lengths = make(), (5, 0, 66, 1, 2)
    x = inputs(1, sum(lengths), 24).requires_grad_()
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    before = some_cache(layer, 5) if cached else layer.init_cache(5)
    y, after = layer(x, cu_seqlens=cu_seqlens.int(), cache=before if cached else None, output_cache=True)
    outputs = []
    for n, piece in enumerate(x.split(lengths, 1)):
        own = slice(n, n + 1)
        alone = GKACache(before.conv[own], GKAState(*(s[own] for s in before.state)))
        expected, cache = layer(piece, cache=alone, output_cache=True)
        outputs.append(expected)
        close(GKACache(after.conv[own], GKAState(*(s[own] for s in after.state))), cache)
    assert relative_error(y, torch.cat(outputs, 1)) < EXACT
    weights = inputs(*y.shape, seed=5)
    packed, separate = (torch.autograd.grad((o * weights).sum(), x, retain_graph=True)[0] for o in (y, torch.cat(outputs, 1)))
    assert relative_error(packed, separate) < 1e-9


def test_inputs_are_left_alone() -> None:
    layer, x = make(), inputs(2, 5, 24)
    cache = some_cache(layer, 2)
    copies = [t.clone() for t in (x, cache.conv, *cache.state)]
    layer(x, torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 0, 0]]), cache=cache, output_cache=True)
    layer.step(x[:, 0], cache)
    for a, b in zip(copies, (x, cache.conv, *cache.state), strict=True):
        assert torch.equal(a, b)


def test_key_heads_are_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    heads = []

    def spy(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        heads.append((q.shape[2], k.shape[2], v.shape[2]))
        return layer_module.__dict__["original"](q, k, v, *args, **kwargs)

    monkeypatch.setattr(layer_module, "original", layer_module.chunk_gka, raising=False)
    monkeypatch.setattr(layer_module, "chunk_gka", spy)
    make()(inputs(1, 3, 24))
    assert heads == [(4, 2, 2)]


def test_checkpoint_layout() -> None:
    """Names and shapes of the released 8B hybrid (docs: math.md)."""
    with torch.device("meta"):
        layer = GatedKalmaNet(4096, 32, 8)
    shapes = {name: tuple(x.shape) for name, x in layer.state_dict().items()}
    assert shapes == {
        "q_proj.weight": (4096, 4096),
        "k_proj.weight": (1024, 4096),
        "v_proj.weight": (1024, 4096),
        "a_proj.weight": (32, 4096),
        "g_proj.weight": (4096, 4096),
        "o_proj.weight": (4096, 4096),
        "b_proj.weight": (32, 4096),
        "b_proj.bias": (32,),
        "alpha_proj.weight": (32, 4096),
        "alpha_proj.bias": (32,),
        "q_conv1d.weight": (4096, 1, 4),
        "k_conv1d.weight": (1024, 1, 4),
        "v_conv1d.weight": (1024, 1, 4),
        "A_log": (32,),
        "dt_bias": (32,),
        "o_norm.weight": (128,),
    }


def test_initial_decays() -> None:
    torch.manual_seed(0)
    layer = GatedKalmaNet(8, 4096, 1, 8)
    A, dt = layer.A_log.exp(), F.softplus(layer.dt_bias)
    assert 0 <= A.min() < 0.1
    assert 15.9 < A.max() <= 16
    assert abs(A.mean() - 8) < 0.3  # uniform: deviation 0.07
    assert 0.999e-3 < dt.min() < 1.1e-3
    assert 0.9e-1 < dt.max() < 1.001e-1
    assert abs(dt.log10().mean() + 2) < 0.05  # uniform in the logarithm: deviation 0.009


def _bad_calls() -> dict[str, tuple[Callable[[GatedKalmaNet], Any], type[Exception], str]]:
    x, one = inputs(2, 3, 24), inputs(2, 24)
    mask = torch.ones(2, 3, dtype=torch.bool)

    def cache(layer: GatedKalmaNet, batch: int = 2, **parts: Any) -> GKACache:
        return layer.init_cache(batch)._replace(**parts)

    return {
        "hidden type": (lambda m: m([1.0]), TypeError, "hidden_states: expected a Tensor, got list"),
        "hidden rank": (lambda m: m(one), ValueError, r"hidden_states: expected shape \[B,T,hidden_size\].*24, got \(2, 24\)"),
        "hidden width": (lambda m: m(x[..., :8]), ValueError, r"hidden_states: .* got \(2, 3, 8\)"),
        "hidden dtype": (lambda m: m(x.float()), TypeError, "hidden_states: expected dtype torch.float64 .*, got torch.float32"),
        "step rank": (lambda m: m.step(x, cache(m)), ValueError, r"hidden_states: expected shape \[B,hidden_size\]"),
        "mask shape": (lambda m: m(x, mask[:, :2]), ValueError, r"attention_mask: expected shape \[B,T\] = \(2, 3\), got \(2, 2\)"),
        "mask 4d": (lambda m: m(x, mask[:, None, None]), ValueError, r"attention_mask: expected shape \[B,T\]"),
        "mask dtype": (
            lambda m: m(x, mask.float()),
            TypeError,
            "attention_mask: expected a bool or integer dtype, got torch.float32",
        ),
        "mask and packed": (
            lambda m: m(x, mask, torch.tensor([0, 3])),
            ValueError,
            "attention_mask: expected None beside cu_seqlens",
        ),
        "packed batch": (lambda m: m(x, cu_seqlens=torch.tensor([0, 3])), ValueError, "cu_seqlens: .*B = 1.*got B = 2"),
        "packed bounds": (
            lambda m: m(x[:1], cu_seqlens=torch.tensor([0, 2])),
            ValueError,
            "cu_seqlens: .*end at T = 3, got 0 and 2",
        ),
        "packed order": (
            lambda m: m(x[:1], cu_seqlens=torch.tensor([0, 2, 1, 3])),
            ValueError,
            "cu_seqlens: expected non-decreasing",
        ),
        "cache type": (lambda m: m(x, cache=(1, 2)), TypeError, "cache: expected a GKACache, got tuple"),
        "cache batch": (
            lambda m: m(x, cache=cache(m, 1)),
            ValueError,
            r"cache.conv: expected shape .*\(2, 64, 3\), got \(1, 64, 3\)",
        ),
        "cache dtype": (
            lambda m: m.step(one, cache(m, conv=cache(m).conv.float())),
            TypeError,
            "cache.conv: expected dtype torch.float64 .*, got torch.float32",
        ),
        "cache state": (
            lambda m: m(x, cache=cache(m, state=m.init_cache(1).state)),
            ValueError,
            r"cache.state.h_kk: expected shape \[N,H,K,K\] = \(2, 4, 8, 8\), got \(1, 4, 8, 8\)",
        ),
        "no cache conv": (lambda m: m.step(one, cache(m, conv=None)), TypeError, "cache.conv: expected a Tensor, got NoneType"),
        "no cache state": (
            lambda m: m.step(one, cache(m, state=None)),
            TypeError,
            "cache.state: expected a GKAState .*, got NoneType",
        ),
        "no conv": (lambda m: GatedKalmaNet(24, 4, head_dim=8, conv_size=1), ValueError, "conv_size: expected at least 2, got 1"),
        "heads": (lambda m: GatedKalmaNet(24, 4, 3, 8), ValueError, "num_kv_heads: expected a divisor of num_heads = 4, got 3"),
        "width": (lambda m: GatedKalmaNet(24, 4, head_dim=12), ValueError, "head_dim: expected a multiple of 8 .*, got 12"),
        "size type": (lambda m: GatedKalmaNet(24.0, 4), TypeError, "hidden_size: expected an int, got float"),
        "iterations": (lambda m: GatedKalmaNet(24, 4, num_iter=0), ValueError, "num_iter: expected at least 1, got 0"),
        "ridge": (
            lambda m: GatedKalmaNet(24, 4, ridge_ratio=0),
            ValueError,
            "ridge_ratio: expected a positive number from .*, got 0",
        ),
        "batch": (lambda m: m.init_cache(0), ValueError, "batch_size: expected at least 1, got 0"),
    }


@pytest.mark.parametrize("name", _bad_calls())
def test_bad_input(name: str) -> None:
    call, error, message = _bad_calls()[name]
    with pytest.raises(error, match=message):
        call(make())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_head_decays_at_first(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        layers = [GatedKalmaNet(8, 512, head_dim=8) for _ in range(4)]
    finally:
        torch.set_default_dtype(torch.float32)
    for layer in layers:
        assert layer.A_log.dtype == layer.dt_bias.dtype == dtype
        assert layer.A_log.min() > -10
        assert F.softplus(layer.dt_bias.float()).log10().min() > -3.1


def test_shapes_on_the_meta_device() -> None:
    layer = GatedKalmaNet(24, 4, head_dim=8).to("meta")
    y, cache = layer(torch.empty(2, 3, 24, device="meta"), output_cache=True)
    assert y.shape == (2, 3, 24)
    assert layer.step(y[:, 0], cache)[0].shape == (2, 24)


def test_caches_load_as_weights(tmp_path: Path) -> None:
    before = some_cache(make(), 2)
    torch.save(before, tmp_path / "cache.pt")
    after = torch.load(tmp_path / "cache.pt", weights_only=True)
    assert isinstance(after, GKACache)
    assert isinstance(after.state, GKAState)
    assert torch.equal(after.conv, before.conv)
    assert torch.equal(after.state.h_kk, before.state.h_kk)


@pytest.mark.parametrize("name", [n for n in inspect.signature(GatedKalmaNet).parameters if n.startswith(("use_", "gla_"))])
def test_flags_are_bools(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name}: expected a bool, got str"):
        GatedKalmaNet(24, 4, **{name: "no"})
