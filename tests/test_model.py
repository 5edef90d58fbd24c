"""ByteLM against explicit formulas, and its three entrances against each other; generation; files."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error
from safetensors.torch import load_file, save_file
from torch import Tensor

from gka_compile.model import ByteLM, ModelConfig
from gka_compile.tokens import choose

CONFIG = ModelConfig(hidden_size=32, intermediate_size=40, num_heads=4, num_kv_heads=2, head_dim=8, max_length=128)
EXACT = 1e-11


def make(dtype: torch.dtype = torch.float64, seed: int = 0, **fields: Any) -> ByteLM:
    torch.manual_seed(seed)
    model = ByteLM(dataclasses.replace(CONFIG, **fields))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.uniform_(0.5, 1.5)
            if "A_log" in name:
                p.sub_(3)
        model.embed_tokens.weight.mul_(10)
    return model.to(dtype)


def bytes_like(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed))


def formulas(model: ByteLM, tokens: Tensor) -> Tensor:
    """The model written out, softmax and rotations element by element; the GKA layer itself is tested in test_layer.py."""
    p, c = dict(model.named_parameters()), model.config

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * p[f"{name}.weight"]

    def attention(x: Tensor, name: str) -> Tensor:
        q, k, v = ((x @ p[f"{name}.{n}_proj.weight"].t()).unflatten(-1, (-1, c.head_dim)) for n in "qkv")
        q, k = norm(q, f"{name}.q_norm"), norm(k, f"{name}.k_norm")

        def turned(y: Tensor) -> Tensor:
            half = c.head_dim // 2
            z = torch.complex(y[..., :half], y[..., half:])
            t, i = torch.arange(y.shape[1]), torch.arange(half)
            angle = t[:, None].double() / c.rope_theta ** (i / half).double()
            z = z * torch.polar(torch.ones_like(angle), angle)[:, None]
            return torch.cat([z.real, z.imag], -1)

        q, k = turned(q), turned(k)
        heads = []
        for h in range(c.num_heads):
            j = h // (c.num_heads // c.num_kv_heads)
            scores = q[:, :, h] @ k[:, :, j].mT / math.sqrt(c.head_dim)
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
            heads.append(scores.softmax(-1) @ v[:, :, j])
        return torch.cat(heads, -1) @ p[f"{name}.o_proj.weight"].t()

    x = p["embed_tokens.weight"][tokens]
    for i, kind in enumerate(c.pattern.split("-")):
        name = f"layers.{i}"
        y = norm(x, f"{name}.input_layernorm")
        x = x + (attention(y, f"{name}.self_attn") if kind == "*" else model.layers[i].gka(y)[0])
        y = norm(x, f"{name}.post_attention_layernorm")
        gate, up, down = (p[f"{name}.mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
        x = x + (F.silu(y @ gate.t()) * (y @ up.t())) @ down.t()
    return norm(x, "norm") @ p.get("lm_head.weight", p["embed_tokens.weight"]).t()


@pytest.mark.parametrize(
    "fields",
    [{}, {"tie_word_embeddings": False, "num_kv_heads": 4, "pattern": "*-GKA"}, {"num_kv_heads": 1, "rope_theta": 100.0}],
    ids=["tied", "untied", "one-kv-head"],
)
def test_formulas(fields: dict[str, Any]) -> None:
    model, tokens = make(**fields), bytes_like(2, 70)
    assert relative_error(model(tokens), formulas(model, tokens)) < EXACT


def test_gradient_reaches_every_parameter() -> None:
    model, tokens = make(torch.float32, tie_word_embeddings=False), bytes_like(2, 20)
    logits = model(tokens)
    assert logits.dtype == torch.float32
    F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.norm() > 0, name


def test_it_learns() -> None:
    torch.manual_seed(0)
    model, text = ByteLM(CONFIG), torch.frombuffer(bytearray(b"the state is a ridge regression. " * 8), dtype=torch.uint8).long()
    first = None
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.0)
    for _ in range(40):
        loss = F.cross_entropy(model(text[None, :-1])[0], text[1:])
        first = loss.item() if first is None else first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert abs(first - math.log(256)) < 0.2
    assert loss < 0.3
    prompt = text[None, :66]
    assert bytes(model.generate(prompt, 33)[0].tolist()) == bytes(text[66:99].tolist())


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert relative_error(a[name], b[name]) < EXACT, name


@pytest.mark.parametrize("pieces", [(100,), (37, 63), (1, 1, 65, 1, 32), (1,) * 12], ids=str)
def test_pieces(pieces: tuple[int, ...]) -> None:
    model, tokens = make(), bytes_like(3, sum(pieces))
    logits, start = model(tokens), model.init_state(3)
    _, whole = model.prefill(tokens, start)
    for stepwise in (False, True):
        state, seen = start, 0
        for piece in tokens.split(pieces, 1):
            seen += piece.shape[1]
            advanced = model.step(piece[:, 0], state) if stepwise and piece.shape[1] == 1 else model.prefill(piece, state)
            last, state = advanced
            assert relative_error(last, logits[:, seen - 1]) < EXACT
            assert (state["position"] == seen).all()
        same(state, whole)
    same(start, model.init_state(3))  # inputs are left alone


def test_state_layout() -> None:
    state = make(torch.bfloat16, pattern="GKA-*").init_state(3)
    assert {name: (tuple(x.shape), x.dtype) for name, x in state.items()} == {
        "h_state_0": ((3, 4, 8, 8), torch.float32),
        "u_state_0": ((3, 4, 8, 8), torch.float32),
        "conv_state_0": ((3, 64, 3), torch.bfloat16),
        "key_cache_1": ((3, 2, 128, 8), torch.bfloat16),
        "value_cache_1": ((3, 2, 128, 8), torch.bfloat16),
        "position": ((3,), torch.int64),
    }
    assert list(state) == ["h_state_0", "u_state_0", "conv_state_0", "key_cache_1", "value_cache_1", "position"]


def test_rows_at_different_positions() -> None:
    model = make()
    parts = [bytes_like(1, n, seed=n) for n in (5, 70)]
    states = [model.prefill(t, model.init_state(1))[1] for t in parts]
    joined = {name: torch.cat([s[name] for s in states]) for name in states[0]}
    more = bytes_like(2, 9)
    logits, joined = model.prefill(more, joined)
    last, joined = model.step(more[:, 0], joined)
    for row, part in enumerate(parts):
        whole = model(torch.cat([part, more[row : row + 1], more[row : row + 1, :1]], 1))[0]
        assert relative_error(logits[row], whole[-2]) < EXACT
        assert relative_error(last[row], whole[-1]) < EXACT


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bits(dtype: torch.dtype) -> None:
    """Against the same weights in float64; the budget is the error that rounding those weights makes, doubled."""
    wide, tokens = make(torch.float32), bytes_like(2, 70)
    exact = wide.double()(tokens)
    narrow = wide.to(dtype)
    logits = narrow(tokens)
    last, state = narrow.prefill(tokens[:, :-1], narrow.init_state(2))
    stepped, _ = narrow.step(tokens[:, -1], state)
    assert logits.dtype == stepped.dtype == torch.float32
    allowed = 2 * relative_error(narrow.double()(tokens), exact)
    assert relative_error(logits, exact) < 2 * allowed
    assert relative_error(last, exact[:, -2]) < 2 * allowed
    assert relative_error(stepped, exact[:, -1]) < 2 * allowed


def test_generate_is_the_argmax_of_forward() -> None:
    model, prompt = make(), bytes_like(2, 7)
    text = prompt
    for _ in range(12):
        text = torch.cat([text, model(text)[:, -1:].argmax(-1)], 1)
    found = model.generate(prompt, 12)
    assert torch.equal(found, text[:, 7:])
    # in two parts, through plugged-in functions
    calls = []

    def counted(name: str) -> Callable[..., Any]:
        def call(tokens: Tensor, state: dict[str, Tensor]) -> Any:
            calls.append(name)
            return getattr(model, name)(tokens, state)

        return call

    _, state = model.prefill(prompt[:, :5], model.init_state(2))
    again = model.generate(prompt[:, 5:], 12, state=state, prefill=counted("prefill"), step=counted("step"))
    assert torch.equal(again, found)
    assert calls == ["prefill", *["step"] * 11]


def test_sampling() -> None:
    model, rows = make(pattern="GKA"), 20000
    logits = model.prefill(bytes_like(1, 3), model.init_state(1))[0]

    def prefill(tokens: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return logits.expand(rows, -1), state

    def draw(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        state = {name: x.expand(rows, *x.shape[1:]) for name, x in model.init_state(1).items()}
        prompt = torch.zeros(rows, 1, dtype=torch.int64)
        return model.generate(prompt, 1, temperature=3.0, generator=generator, state=state, prefill=prefill)[:, 0]

    drawn = draw(0)
    assert torch.equal(drawn, draw(0))
    assert not torch.equal(drawn, draw(1))
    distance = (torch.bincount(drawn, minlength=256) / rows - (logits[0] / 3).softmax(-1)).abs().sum()
    assert distance < 2 * math.sqrt(2 * 256 / (math.pi * rows))  # twice the most that is expected of fair draws
    assert (torch.bincount(drawn, minlength=256) / rows - logits[0].softmax(-1)).abs().sum() > distance * 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-40])
def test_tiny_temperatures_take_the_likeliest(temperature: float, dtype: torch.dtype) -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, -1.0, 1.0]], dtype=dtype)
    assert choose(logits, temperature, None).tolist() == [1, 0]


@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": False}], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_save_and_load(fields: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    model, tokens = make(dtype, **fields), bytes_like(2, 9)
    model.save(tmp_path / "new" / "folder")
    loaded = ByteLM.load(tmp_path / "new" / "folder")
    assert loaded.config == model.config
    assert loaded.dtype == dtype
    assert torch.equal(loaded(tokens), model(tokens))
    assert [p.requires_grad for p in loaded.parameters()] == [True] * len(list(model.parameters()))


def test_load_refuses(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"folder: expected a file .*config.json, got none"):
        ByteLM.load(tmp_path)
    make().save(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    good, fields = config.read_text(), CONFIG.to_dict()
    for text, error, message in (
        ("{", ValueError, "config.json: expected JSON"),
        ("[]", TypeError, "config.json: config: expected a dict, got list"),
        (json.dumps(fields | {"kv_proj_rank": 3}), ValueError, "config.json: config: expected fields among .*, got kv_proj_rank"),
        (json.dumps(fields | {"hidden_size": "a"}), TypeError, "config.json: hidden_size: expected an int, got str"),
        (
            json.dumps(fields | {"intermediate_size": 48}),
            ValueError,
            r"model.safetensors: .* 12 differ: .*\(48, 32\) \(got \(40, 32\)\)",
        ),
        (json.dumps(fields | {"pattern": "GKA"}), ValueError, r"model.safetensors: .* differ: .* None \(got "),
    ):
        config.write_text(text)
        with pytest.raises(error, match=message):
            ByteLM.load(tmp_path)
    config.write_text(good)
    made, kept = load_file(weights), weights.read_bytes()
    name, x = next(iter(made.items()))
    for dtype in (torch.bfloat16, torch.int8):
        save_file(made | {name: x.to(dtype)}, weights)
        with pytest.raises(ValueError, match=r"model.safetensors: expected tensors of one floating dtype, got torch.*, torch"):
            ByteLM.load(tmp_path)
    weights.write_bytes(kept[:1000])
    with pytest.raises(ValueError, match=r"model.safetensors: expected a safetensors file"):
        ByteLM.load(tmp_path)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"pattern": "GKA-GDN"}, ValueError, 'pattern: expected "GKA" and "\\*" separated by "-", got \'GKA-GDN\''),
        ({"pattern": ""}, ValueError, "pattern: expected"),
        ({"pattern": None}, TypeError, "pattern: expected a str, got NoneType"),
        ({"num_kv_heads": 3}, ValueError, "num_kv_heads: expected a divisor of num_heads = 4, got 3"),
        ({"head_dim": 136}, ValueError, "head_dim: expected a multiple of 8 from 8 to 128, got 136"),
        ({"vocab_size": 0}, ValueError, "vocab_size: expected at least 1, got 0"),
        ({"max_length": 1.5}, TypeError, "max_length: expected an int, got float"),
        ({"conv_size": 1}, ValueError, "conv_size: expected at least 2, got 1"),
        ({"rope_theta": "x"}, TypeError, "rope_theta: expected a float, got str"),
        ({"ridge_ratio": -0.1}, ValueError, "ridge_ratio: expected a positive number from .*, got -0.1"),
        ({"tie_word_embeddings": 1}, TypeError, "tie_word_embeddings: expected a bool, got int"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_bad_config(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ModelConfig(**fields)


def test_config_round_trip() -> None:
    config = dataclasses.replace(CONFIG, pattern="*-GKA", rope_theta=5e5)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert ModelConfig.from_dict({}) == ModelConfig()


def test_bad_input() -> None:
    model, tokens = make(), bytes_like(2, 5)
    state = model.init_state(2)
    cases: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: ByteLM({}), TypeError, "config: expected a ModelConfig, got dict"),
        (lambda: model([1, 2]), TypeError, "tokens: expected a Tensor, got list"),
        (lambda: model(tokens.int()), TypeError, "tokens: expected dtype int64, got torch.int32"),
        (lambda: model(tokens[0]), ValueError, r"tokens: expected shape \[B,T\] .*, got \(5,\)"),
        (lambda: model.prefill(tokens[:, :0], state), ValueError, r"tokens: .*at least one token, got \(2, 0\)"),
        (lambda: model.step(tokens, state), ValueError, r"tokens: expected shape \[B\] .*, got \(2, 5\)"),
        (lambda: model.step(tokens[:, 0], None), TypeError, "state: expected a dict .*, got NoneType"),
        (lambda: model.step(tokens[:, 0], {}), ValueError, "state: expected the keys h_state_0, .*position, got "),
        (
            lambda: model.step(tokens[:1, 0], state),
            ValueError,
            r"state\['h_state_0'\]: expected shape \(1, 4, 8, 8\), got \(2, 4, 8, 8\)",
        ),
        (
            lambda: model.step(tokens[:, 0], state | {"key_cache_2": state["key_cache_2"][:, :, :9]}),
            ValueError,
            r"state\['key_cache_2'\]: expected shape \(2, 2, 128, 8\), got \(2, 2, 9, 8\)",
        ),
        (
            lambda: model.step(tokens[:, 0], state | {"position": state["position"].int()}),
            TypeError,
            r"state\['position'\]: expected dtype int64, got torch.int32",
        ),
        (lambda: model.generate(tokens + 256, 1), ValueError, "prompt: expected tokens from 0 to 255, got "),
        (lambda: model.generate(tokens[0], 1), ValueError, r"prompt: expected shape \[B,T\]"),
        (lambda: model.generate(tokens, 0), ValueError, "max_new_tokens: expected at least 1, got 0"),
        (
            lambda: model.generate(tokens, 1, temperature=-1),
            ValueError,
            "temperature: expected a finite number that is not negative, got -1",
        ),
        (lambda: model.generate(tokens, 1, temperature=10**400), ValueError, "temperature: expected a finite number"),
        (lambda: model.generate(tokens, 1, temperature="1"), TypeError, "temperature: expected a number, got str"),
        (lambda: model.generate(tokens, 1, generator=5), TypeError, r"generator: expected a torch.Generator or None, got int"),
        (lambda: model.generate(tokens.repeat(1, 30), 1), ValueError, "prompt: .* at most max_length = 128 tokens, got 150"),
        (lambda: model.generate(tokens, 125), ValueError, "max_new_tokens: .* at most max_length = 128 tokens, got 129"),
        (lambda: model.generate(tokens, 1, state=model.init_state(1)), ValueError, r"state\['h_state_0'\]: expected shape"),
        (lambda: model.init_state(0), ValueError, "batch_size: expected at least 1, got 0"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()


def test_length_limit_is_of_attention_alone() -> None:
    prompt = bytes_like(1, 5)
    assert make(max_length=8).generate(prompt, 4).shape == (1, 4)
    assert make(max_length=8, pattern="GKA").generate(prompt, 9).shape == (1, 9)
