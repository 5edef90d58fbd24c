"""Exported programs and their portable form, before any backend."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gka_compile.export import export_program, save_artifact
from gka_compile.export.portable import decompositions, inductor_decompositions, portable
from gka_compile.export.program import Programs
from gka_compile.model import ByteLM, ModelConfig

GKA_LAYERS = 2
TABLES = {"cuda": decompositions(), "cpu": decompositions("cpu"), "inductor": inductor_decompositions()}
OPS = {"prefill": ("gka.chunk_state.default", "gka.chunk_output.default"), "step": ("gka.step.default",)}


def make_model(dtype: torch.dtype = torch.float64, **changes: object) -> ByteLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "max_length": 512}
    return ByteLM(ModelConfig(**{"pattern": "GKA-*-GKA", **sizes, **changes})).to(dtype).eval()  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def model() -> ByteLM:
    return make_model(num_iter=4)


@pytest.fixture(scope="module")
def programs(model: ByteLM) -> Programs:
    return export_program(model)


def targets(program: torch.export.ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def test_each_op_stays_one_node_until_the_portable_form(programs: Programs) -> None:
    for name, program in programs.items():
        found = [t for t in targets(program) if t.startswith("gka.")]
        assert sorted(found) == sorted(OPS[name] * GKA_LAYERS)
        found = {form: targets(portable(program, table)) for form, table in TABLES.items()}
        assert not [t for form in found.values() for t in form if t.startswith("gka.")]
        assert found["cpu"].count("scan") == (GKA_LAYERS if name == "prefill" else 0)  # H and U in one
        assert found["inductor"].count("while_loop") == GKA_LAYERS
        assert not {"scan", "while_loop", "aten.cumsum.default"} & set(found["cuda"])  # each of them a loop in TensorRT


def test_batch_and_length_are_free(programs: Programs) -> None:
    for name, symbols in (("prefill", 2), ("step", 1)):
        ranges = getattr(programs, name).range_constraints.values()
        assert len(ranges) == symbols
        assert all(r.lower <= 1 and r.upper > 10**6 for r in ranges)


@pytest.mark.parametrize(
    ("form", "num_iter"),
    [
        *(("cuda", n) for n in (1, 3, 4, 30)),  # with and without a second group of the step's terms
        ("cpu", 30),
        *(("inductor", n) for n in (1, 2, 3, 30)),  # even and odd, with and without a turn of the loop
    ],
)
def test_portable_form_computes_the_same_in_float64(form: str, num_iter: int) -> None:
    model = make_model(pattern="GKA", num_iter=num_iter)
    programs = export_program(model)
    prefill, step = (portable(p, TABLES[form]).module(check_guards=False) for _, p in programs.items())
    for B, T in ((1, 1), (3, 63), (2, 64), (1, 65), (3, 200)):
        tokens = torch.randint(256, (B, T + 1))
        state = model.init_state(B)
        with torch.no_grad():
            expected = [model.prefill(tokens[:, :T], state)]
            expected.append(model.step(tokens[:, T], expected[0][1]))
            logits, *new = prefill(tokens[:, :T], *state.values())
            assert all(x.is_contiguous() for x in new)
            results = [(logits, new), ((last := step(tokens[:, T], *new))[0], last[1:])]
        for (logits, new), (exact, exact_state) in zip(results, expected, strict=True):
            torch.testing.assert_close(logits, exact, rtol=0, atol=1e-12)
            for x, y in zip(new, exact_state.values(), strict=True):
                torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


def test_what_cannot_be_exported_is_refused(model: ByteLM) -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got str"):
        export_program("model")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model: expected methods init_state, prefill and step, got Linear without init_state"):
        export_program(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected a model in eval mode"):
        export_program(copy.deepcopy(model).train())


class Counts(nn.Module):
    """A language model of one number, and of what a test makes of its results."""

    def __init__(self, change: Callable[..., Any]) -> None:
        super().__init__()
        self.change = change

    def init_state(self, batch_size: int) -> dict[str, torch.Tensor]:
        return {"seen": torch.zeros(batch_size, 4)}

    def prefill(self, tokens: torch.Tensor, state: dict[str, torch.Tensor]) -> Any:
        return self.step(tokens.sum(1), state)

    def step(self, tokens: torch.Tensor, state: dict[str, torch.Tensor]) -> Any:
        seen = state["seen"] + tokens[:, None]
        return self.change(seen, {"seen": seen})


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda x, new: x, TypeError, r"model.prefill: expected \(logits, state\) with a dict for a state, got a tensor"),
        (lambda x, new: (x, {"other": x}), ValueError, "model.prefill: expected the state's keys seen, got other"),
        (
            lambda x, new: (x, {"seen": x.half()}),
            ValueError,
            r"expected seen as init_state makes it, torch.float32 \[batch, 4\], got torch.float16",
        ),
        (
            lambda x, new: (x, {"seen": x[:, :3]}),
            ValueError,
            r"expected seen as init_state makes it, .* got torch.float32 \[batch, 3\]",
        ),
    ],
)
def test_results_that_cannot_go_back_in_are_refused(change: Callable[..., Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        export_program(Counts(change).eval())  # type: ignore[arg-type]


def test_a_model_without_a_config_is_refused_before_its_export(tmp_path: Path) -> None:
    model = Counts(lambda x, new: (x, new)).eval()
    assert export_program(model).state["seen"].shape == (2, 4)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model: expected a config with vocab_size, max_length and to_dict"):
        save_artifact(model, tmp_path / "artifact")  # type: ignore[arg-type]


def test_packed_sequences_and_backward_ops_have_no_portable_form() -> None:
    class Packed(nn.Module):
        def forward(self, k: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
            return torch.ops.gka.chunk_state(k, k, None, None, None, None, None, ends, 2, 64)[3]

    program = torch.export.export(Packed(), (torch.randn(1, 6, 2, 8), torch.tensor([0, 2, 6])), strict=False)
    for table in TABLES.values():
        with pytest.raises(ValueError, match="got packed ones"):
            portable(program, table)

    class InPlace(nn.Module):
        def forward(self, q: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
            return torch.ops.gka.step_(q, q, q, h.clone(), h.clone(), None, None, None, None, 1.0, 0.02, 3)

    program = torch.export.export(InPlace(), (torch.randn(2, 2, 8), torch.zeros(2, 2, 8, 8)), strict=False)
    with pytest.raises(ValueError, match=r"expected gka nodes among .*, got gka.step_"):
        portable(program, decompositions())


def test_decompositions_go_straight_into_run_decompositions(programs: Programs) -> None:
    found = targets(programs.step.run_decompositions(decompositions()))  # type: ignore[arg-type]
    assert not [t for t in found if t.startswith("gka.")]
    with pytest.raises(ValueError, match="device: expected cuda or cpu, got 'tpu'"):
        decompositions("tpu")
    with pytest.raises(ValueError, match="mixed: expected device cuda, got cpu"):
        decompositions("cpu", mixed=True)
