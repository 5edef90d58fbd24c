"""Calls that go past the dispatcher: the same numbers, and nothing that looks at ops or at autograd misses any."""

from __future__ import annotations

import ctypes
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import DEVICE, INTERPRETED, Case, Recorder, count_replays, make_inputs
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from gka_compile import GKAState, chunk_gka, step_gka
from gka_compile.custom_ops import ahead, config, ops, plans

GATES = ("g", "gk", "alpha", "beta")
FORWARD = ["gka.chunk_state.default", "gka.chunk_output.default"]
# autograd runs the formula of the op that was called last first; that of chunk_state has nothing to do, its states are not read
BACKWARD = ["gka.chunk_bwd.default"]


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the ops that are called through the dispatcher."""
    calls: list[str] = []
    call = CustomOpDef.__call__

    def spy(op: CustomOpDef, *args: Any, **kwargs: Any) -> Any:
        calls.append(op._qualname)
        return call(op, *args, **kwargs)

    monkeypatch.setattr(CustomOpDef, "__call__", spy)
    return calls


class Functions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Subclass(Tensor):
    pass


CASE = Case("eager", T=20, H=4, Hk=2)  # two chunks, which a plan's temporaries must hold


def inputs(T: int = 5, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return make_inputs(Case("eager", T=T, H=4, Hk=2), dtype, DEVICE)


def train(made: dict[str, Tensor]) -> list[Tensor]:
    """o and all gradients."""
    leaves = {n: x.detach().clone().requires_grad_() for n, x in made.items()}
    o, _ = chunk_gka(*(leaves[n] for n in "qkv"), **{n: leaves[n] for n in GATES}, initial_state=(leaves["h0"], leaves["u0"]))
    return [o.detach(), *torch.autograd.grad(o.square().sum(), list(leaves.values()))]


def decode(made: dict[str, Tensor], **more: Any) -> tuple[Tensor, GKAState]:
    one = {n: made[n][:, 0].contiguous() for n in ("q", "k", "v", *GATES)}
    return step_gka(one.pop("q"), one.pop("k"), one.pop("v"), (made["h0"], made["u0"]), **one, **more)


def train_step(made: dict[str, Tensor]) -> list[Tensor]:
    leaves = {n: x.detach().clone().requires_grad_() for n, x in made.items()}
    o, state = decode(leaves)
    return [o.detach(), *torch.autograd.grad(sum(x.square().sum() for x in (o, *state)), list(leaves.values()))]


def decode_inplace(made: dict[str, Tensor]) -> list[Tensor]:
    copies = {n: x.clone() for n, x in made.items()}
    o, state = decode(copies, inplace=True)
    return [o, *state]


@pytest.mark.parametrize("call", [train, train_step, decode_inplace])
def test_the_same_without_the_dispatcher(call: Callable[..., list[Tensor]], dispatched: list[str]) -> None:
    made = inputs()
    call(made)  # on a GPU the kernels are compiled first, by a call through the dispatcher
    dispatched.clear()
    found = call(made)
    assert dispatched == []
    with Recorder() as recorder:
        expected = call(made)
    assert dispatched
    assert recorder.seen
    torch.testing.assert_close(found, expected)  # a CPU's matrix product depends on where its operands lie


def test_a_mode_sees_every_op_of_forward_and_backward() -> None:
    with Recorder() as recorder:
        train(inputs())
    assert recorder.seen == FORWARD + BACKWARD
    with Recorder() as recorder:
        decode_inplace(inputs())
    assert recorder.seen == ["gka.step_.default"]
    with Functions() as functions, torch.no_grad():
        decode_inplace(inputs())
    assert "gka.step_.default" in functions.seen
    with FlopCounterMode(display=False) as counter:
        train(inputs())
    assert counter.get_total_flops() > 0


def test_tracers_and_transforms_get_the_op(dispatched: list[str]) -> None:
    made = inputs()
    q, k, v = (made[n] for n in "qkv")
    graph = make_fx(lambda q, k, v: chunk_gka(q, k, v)[0])(q, k, v).graph
    assert [str(n.target) for n in graph.nodes if str(n.target).startswith("gka")] == FORWARD
    with FakeTensorMode() as fake:
        assert chunk_gka(*(fake.from_tensor(x) for x in (q, k, v)))[0].shape == q.shape
    dispatched.clear()
    torch.jit.trace(lambda q, k, v: chunk_gka(q, k, v)[0], (q, k, v), check_trace=False)
    assert dispatched[:2] == ["gka::chunk_state", "gka::chunk_output"]
    dispatched.clear()
    rows = torch.vmap(lambda q, k, v: chunk_gka(q[None], k[None], v[None])[0][0])(q, k, v)
    assert torch.equal(rows[1], chunk_gka(q[1:], k[1:], v[1:])[0][0])
    assert dispatched[0] == "gka::chunk_state"
    dispatched.clear()
    with forward_ad.dual_level():
        chunk_gka(q, k, v)
    assert dispatched[:1] == ["gka::chunk_state"]
    dispatched.clear()
    chunk_gka(q.as_subclass(Subclass), k, v)
    assert "gka::chunk_output" in dispatched


@pytest.mark.skipif(INTERPRETED, reason="what is compiled does not depend on the kernels")
def test_compiled_and_exported_graphs_hold_the_ops() -> None:
    made = inputs()
    q, k, v = (made[n] for n in "qkv")
    targets: list[str] = []

    def backend(module: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        targets.extend(str(n.target) for n in module.graph.nodes if str(n.target).startswith("gka"))
        return module.forward

    torch.compile(lambda q, k, v: chunk_gka(q, k, v)[0], fullgraph=True, backend=backend)(q, k, v)
    assert targets == FORWARD
    targets.clear()
    with torch.no_grad():
        torch.compile(decode_inplace, fullgraph=True, backend=backend)(made)
    assert targets == ["gka.step_.default"]

    class Module(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return chunk_gka(q, k, v)[0]

    for strict in (False, True):
        nodes = torch.export.export(Module(), (q, k, v), strict=strict).graph.nodes
        assert [str(n.target) for n in nodes if str(n.target).startswith("gka")] == FORWARD


def test_what_batches_or_functionalizes_a_call_gets_the_op() -> None:
    """They show in nothing but the dispatch keys."""
    made = inputs()
    x = made["q"].requires_grad_()
    loss = chunk_gka(x, made["k"], made["v"])[0].square().sum((1, 2, 3))
    rows = torch.eye(len(x), dtype=x.dtype, device=x.device)
    (together,) = torch.autograd.grad(loss, x, rows, is_grads_batched=True, retain_graph=True)
    one_by_one = torch.stack([torch.autograd.grad(loss, x, row, retain_graph=True)[0] for row in rows])
    assert torch.allclose(together, one_by_one, rtol=1e-12, atol=0)
    q, k, v = (torch._to_functional_tensor(made[n].detach()) for n in "qkv")
    torch._enable_functionalization(reapply_views=False)
    try:
        o, _ = chunk_gka(q, k, v)
    finally:
        torch._disable_functionalization()
    torch._sync(o)
    assert torch.equal(torch._from_functional_tensor(o), chunk_gka(made["q"].detach(), made["k"], made["v"])[0])


def test_an_op_without_a_tensor_is_refused_by_its_schema() -> None:
    for wrong in ((), (1.0,)):
        with pytest.raises((TypeError, RuntimeError), match="chunk_state"):
            ops.chunk_state(*wrong)


def test_autograd_sees_what_was_changed_in_place() -> None:
    made = inputs()
    made["q"].requires_grad_()
    o, _ = decode(made)  # saves h0 and u0
    with torch.no_grad():
        decode({**made, "q": made["q"].detach()}, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.sum().backward()
    with torch.inference_mode():  # such tensors have no version to change
        o, state = decode({n: x.detach().clone() for n, x in made.items()}, inplace=True)
    assert o.is_inference()
    assert state.h_kk.is_inference()


def test_a_kernel_that_writes_states_counts_as_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    made = inputs()
    monkeypatch.setattr(ops.step_, "_body", lambda q, *_: q)  # a kernel, of which torch knows nothing
    decode(made, inplace=True)
    assert made["h0"]._version == made["u0"]._version == 1


@pytest.mark.parametrize("call", [chunk_gka, step_gka])
def test_gradients_are_first_order(call: Callable[..., Any]) -> None:
    made = inputs(1)
    q, k, v = (made[n] if call is chunk_gka else made[n][:, 0] for n in "qkv")
    q.requires_grad_()
    o, _ = call(q, k, v) if call is chunk_gka else call(q, k, v, (made["h0"], made["u0"]))
    (dq,) = torch.autograd.grad(o.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        dq.sum().backward()


# --- plans of decode steps: a stand-in for the kernel, on CPU tensors that say they are on the GPU ---

pretend = pytest.mark.skipif(INTERPRETED or DEVICE != "cpu", reason="test_cuda.py has the real ones")


class Kernel:
    """A compiled kernel, as far as plans know one; what it launches goes into a list."""

    function, packed_metadata = "function", "metadata"

    def __init__(self, name: str, made: list[tuple[Any, ...]]) -> None:
        self.name, self.made = name, made

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, stream: self.made.append((self.name, grid, stream, args))

    def run(self, x: int, y: int, z: int, stream: Any, *rest: Any) -> None:
        assert rest[:5] == (self.function, self.packed_metadata, None, None, None)
        self.made.append((self.name, (x, y, z), stream, rest[5:]))


class Launches:
    """(kernel, grid, stream, arguments) of every launch; pointers are addresses."""

    def __init__(self) -> None:
        self.ordinary: list[tuple[Any, ...]] = []
        self.planned: list[tuple[Any, ...]] = []
        self.alive: list[Any] = []  # tensors, so that no address is used twice

    def clear(self) -> None:
        for made in (self.ordinary, self.planned, self.alive):
            made.clear()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """Ops compute by the reference, and launch kernels that do nothing; a plan does that alone."""
    triton = pytest.importorskip("triton")
    from gka_compile.custom_ops import kernels

    seen = Launches()

    def launched(kernel: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> Kernel:
        values = kernel.signature.bind(*args, **{n: x for n, x in options.items() if n not in ("num_warps", "num_stages")})
        pointers = [x.data_ptr() if isinstance(x, Tensor) else x for x in values.arguments.values()]
        seen.alive.append(args)
        seen.ordinary.append((kernel.__name__, (*grid, 1, 1)[:3], None, tuple(pointers)))
        return Kernel(kernel.__name__, seen.planned)

    def launching(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def both(*args: Any) -> Any:
            out = call(*args)
            with torch._library.triton.set_wrap_triton_enabled(False):
                if name == "step_":
                    kernels.launch_step(*args, (out, args[3], args[4]))
                else:
                    getattr(kernels, f"launch_{name}")(*args, out)
            return out

        return both

    torch.overrides.get_testing_overrides()  # Dynamo's table, made once, which reads is_cuda as the property that it is
    monkeypatch.setattr(Tensor, "is_cuda", True, raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)  # what get_device() says of a CPU tensor
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)  # nothing is compiled ahead
    monkeypatch.setattr(config, "chunk_size", lambda *_: 16)
    driver = type("Driver", (), {"get_current_stream": staticmethod(lambda device: ("stream", device))})
    monkeypatch.setattr(type(triton.runtime.driver), "active", driver)
    monkeypatch.setattr(triton.JITFunction, "run", launched)
    for name in ("chunk_state", "chunk_output", "chunk_bwd", "step", "step_"):
        monkeypatch.setattr(ops, f"{name}_cpu", launching(name, getattr(ops, f"{name}_cpu")))
    monkeypatch.setattr(plans, "_plans", {})
    return seen


def step_arguments(dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    made = inputs(1, dtype)
    one = {n: made[n][:, 0].contiguous() for n in ("q", "k", "v", *GATES)}
    return {**one, "state": GKAState(made["h0"], made["u0"]), "inplace": True}


def keep_plan(**given: Any) -> None:
    """The first call of a kind is seen, the second recorded."""
    for _ in range(2):
        step_gka(**given)


def forward(made: dict[str, Tensor]) -> list[Tensor]:
    given = {n: made[n] for n in GATES}
    with torch.no_grad():
        o, state = chunk_gka(*(made[n] for n in "qkv"), **given, initial_state=(made["h0"], made["u0"]), output_final_state=True)
    return [o, *(state or ())]


def functional_step(made: dict[str, Tensor]) -> list[Tensor]:
    o, state = decode(made)
    return [o, *state]


def rows_apart(made: dict[str, Tensor]) -> dict[str, Tensor]:
    """v lies in a wider tensor, as a part of a projection does."""
    return made | {"v": torch.cat([made["v"], made["v"]], -1)[..., : made["v"].shape[-1]]}


def one_address(made: dict[str, Tensor]) -> dict[str, Tensor]:
    return made | {"gk": made["g"].view(made["g"].shape), "beta": made["alpha"].view(made["alpha"].shape)}


def one_decay(made: dict[str, Tensor]) -> dict[str, Tensor]:
    return made | {"gk": made["g"]}


@pretend
@pytest.mark.parametrize("change", [dict, rows_apart, one_address, one_decay])
@pytest.mark.parametrize("call", [forward, train, functional_step, decode_inplace])
def test_a_repeated_call_is_launched_by_its_plan(call: Callable, change: Callable, launches: Launches, dispatched: list) -> None:
    """The same launches as without a plan: kernels, grids, sizes, the tensors given; one address for another in all the rest.

    Tensors that lay at one address when the plan was made may lie at two.
    """
    made = (dict if change is one_address else change)(inputs(40, torch.bfloat16))
    for _ in range(2):
        call(change(inputs(40, torch.bfloat16)))
        assert launches.planned == []
    launches.clear()
    dispatched.clear()
    found = call(made)
    assert launches.ordinary == []
    assert dispatched == []
    with Recorder():
        expected = call(made)
    assert len(launches.planned) == len(launches.ordinary) > 0
    moved: dict[int, int] = {}
    for (name, grid, stream, args), (expected_name, expected_grid, _, expected_args) in zip(
        launches.planned, launches.ordinary, strict=True
    ):
        assert (name, grid, stream) == (expected_name, expected_grid, ("stream", -1))
        here: dict[int, int] = {}
        for x, y in zip(args, expected_args, strict=True):
            if isinstance(y, int) and y > 2**20:
                assert here.setdefault(y, x) == moved.setdefault(y, x) == x
                assert x % 16 == 0
            else:
                assert x == y
                assert type(x) is type(y)
        assert len({*here.values()}) == len(here)
    if call in (forward, functional_step):
        kept = {made[n].data_ptr() for n in made if made[n].is_contiguous()}
        assert all(moved.get(address, address) == address for address in kept)
        for x, y in zip(found, expected, strict=True):
            assert moved[y.data_ptr()] == x.data_ptr()
    for x, y in zip(found, expected, strict=True):
        assert (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype)


@pretend
def test_a_step_in_place_counts_as_a_change(launches: Launches) -> None:
    given = step_arguments()
    keep_plan(**given)
    version = given["state"].h_kv._version
    o, state = step_gka(**given)
    assert len(launches.planned) == 1
    assert (o.shape, o.dtype) == ((*given["v"].shape[:1], 4, 16), torch.bfloat16)
    assert state.h_kk is given["state"].h_kk
    assert state.h_kv._version > version
    step_gka(**given | {"state": [*given["state"]]})
    assert len(launches.planned) == 2


@pretend
def test_launch_hooks_see_planned_launches(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    keep_plan(**step_arguments())
    step_gka(**step_arguments())
    monkeypatch.setattr(triton.knobs.runtime.launch_exit_hook, "calls", [print])  # a profiler's
    monkeypatch.setattr(Kernel, "run", None)
    step_gka(**step_arguments())
    (name, grid, stream, args), hooked = launches.planned
    assert hooked[:3] == (name, grid, stream)
    assert len(hooked[3]) == len(args)


@pretend
def test_what_a_hook_of_tritons_compiles_has_no_plan(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    monkeypatch.setattr(triton.JITFunction, "run", lambda *_, **__: None)
    for _ in range(4):
        step_gka(**step_arguments())
    assert launches.planned == []


@pretend
@pytest.mark.parametrize("part", ["TensorGuards", "_plan"])
def test_a_plan_that_cannot_be_made_is_no_error(part: str, launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise AttributeError("of another version")

    monkeypatch.setattr(plans, part, broken)
    expected = decode_inplace(inputs())
    for _ in range(3):
        for x, y in zip(decode_inplace(inputs()), expected, strict=True):
            assert torch.equal(x, y)
    assert launches.planned == []


@pretend
def test_no_plan_is_made_off_the_current_gpu(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as m:
        m.setattr(torch.cuda, "current_device", lambda: 0)
        keep_plan(**step_arguments())
        assert not plans._plans
    step_gka(**step_arguments())
    assert launches.planned == []


@pretend
@pytest.mark.parametrize("truth", [[], [1], {}])
def test_options_are_taken_for_their_truth(truth: Any, launches: Launches) -> None:
    made = inputs()
    with torch.no_grad():
        for _ in range(3):
            _, state = chunk_gka(*(made[n] for n in "qkv"), output_final_state=truth)
            assert (state is None) == (not truth)


def misaligned(x: Tensor) -> Tensor:
    return torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)


def strided(x: Tensor) -> Tensor:
    return torch.stack([x, x], -1)[..., 0]


@pretend
@pytest.mark.parametrize(
    "change",
    [
        {"num_iter": 7},
        {"ridge_ratio": 0.5},
        {"scale": 0.5},
        {"beta": None},
        {"g": lambda x: x.bfloat16()},
        {"q": misaligned},
        {"k": strided},
        {"state": lambda s: GKAState(s.h_kk, misaligned(s.h_kv))},
        {"ridge_ratio": 1},
        {"inplace": False},
        {"g": "gk"},
        {"beta": "alpha"},
    ],
)
def test_another_step_is_not_launched_by_that_plan(change: dict, launches: Launches) -> None:
    keep_plan(**step_arguments())
    given = step_arguments()
    given.update({n: given[c] if isinstance(c, str) else c(given[n]) if callable(c) else c for n, c in change.items()})
    expected = step_gka(**{**given, "inplace": False})
    found = step_gka(**given)
    assert launches.planned == []
    for x, y in zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True):
        assert torch.equal(x, y)


@pretend
@pytest.mark.parametrize(
    "change",
    [
        {"q": misaligned},
        {"state": lambda s: GKAState(s.h_kk, misaligned(s.h_kv))},
        {"beta": "alpha"},
        {"g": torch._neg_view},
        {"q": lambda x: x.as_subclass(type("Subclass", (Tensor,), {}))},
        {"q": lambda x: x[:0], "k": lambda x: x[:0], "v": lambda x: x[:0], "state": lambda s: GKAState(s.h_kk[:0], s.h_kv[:0])}
        | {n: lambda x: x[:0] for n in GATES},
    ],
)
@torch.no_grad()
def test_what_may_have_no_plan_gets_none(change: dict, launches: Launches) -> None:
    for _ in range(4):
        given = step_arguments()
        given.update({n: given[c] if isinstance(c, str) else c(given[n]) for n, c in change.items()})
        step_gka(**given)
    assert launches.planned == []
    assert not any(plans._plans.values())


@pretend
def test_where_gradients_are_recorded_the_op_is_called(launches: Launches) -> None:
    """A plan of no_grad for tensors that require grad; then its ops have plans, but nothing repeats while it is recorded."""
    leaves = {n: x.requires_grad_() for n, x in inputs(5).items()}
    given = [*(leaves[n] for n in "qkv"), *(leaves[n] for n in GATES[:3])]
    for _ in range(3):
        assert chunk_gka(*given)[0].requires_grad
    assert len(launches.planned) == 4  # the ops'
    launches.clear()
    with torch.no_grad():
        chunk_gka(*given)  # by those of the ops
        assert (len(launches.ordinary), len(launches.planned)) == (0, 4)
        chunk_gka(*given)
        assert (len(launches.ordinary), len(launches.planned)) == (4, 4)
        chunk_gka(*given)
        assert (len(launches.ordinary), len(launches.planned)) == (4, 8)
        assert [name for name, *_ in launches.planned[4:]] == [name for name, *_ in launches.ordinary]
    assert chunk_gka(*given)[0].requires_grad


@pretend
def test_a_backward_in_pieces_has_no_plan(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does more to tensors than its launches do; and were these recorded, all pieces would be in memory at once."""
    made, plan, kept = inputs(40), plans._plan, []
    monkeypatch.setattr(config, "PIECE_BYTES", 1)
    monkeypatch.setattr(plans, "_plan", lambda launches, *rest: kept.append(len(launches)) or plan(launches, *rest))
    for _ in range(2):
        train(made)
    assert kept == [2, 2, 0]  # chunk_state, chunk_output, chunk_bwd
    launches.clear()
    train(made)
    assert "chunk_solve_kernel" in {name for name, *_ in launches.planned}
    assert "grads_through_u_kernel" not in {name for name, *_ in launches.planned}
    assert "grads_through_u_kernel" in {name for name, *_ in launches.ordinary}


@pretend
def test_modes_see_calls_that_have_plans(launches: Launches) -> None:
    keep_plan(**step_arguments())
    known = len(plans._plans)
    for mode in (Recorder(), Functions()):
        for ridge_ratio in (0.02, 0.5, 0.5, 0.5):
            mode.seen.clear()
            with mode:
                step_gka(**step_arguments(), ridge_ratio=ridge_ratio)
            assert mode.seen
    with forward_ad.dual_level():
        step_gka(**step_arguments())
    assert launches.planned == []
    assert len(plans._plans) == known


@pretend
def test_calls_that_have_plans_are_compiled(launches: Launches) -> None:
    targets: list[str] = []

    def backend(module: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        targets.extend(str(n.target) for n in module.graph.nodes if str(n.target).startswith("gka"))
        return module.forward

    keep_plan(**step_arguments())
    torch.compile(lambda given: step_gka(**given), fullgraph=True, backend=backend)(step_arguments())
    assert targets == ["gka.step_.default"]
    targets.clear()
    made = inputs()
    for _ in range(2):
        forward(made)
    torch.compile(forward, fullgraph=True, backend=backend)(made)
    assert targets == FORWARD
    assert launches.planned == []


@pretend
def test_autocast_has_no_plans(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_plan(**step_arguments())
    known = len(plans._plans)
    with torch.autocast("cpu", torch.bfloat16):  # the device of the tensors, of which guards know
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: True)
        for ridge_ratio in (0.02, 0.02, 0.5, 0.5, 0.5):
            step_gka(**step_arguments(), ridge_ratio=ridge_ratio)
    assert launches.planned == []
    assert len(plans._plans) == known


@pretend
def test_a_plan_is_for_one_device_and_any_stride_of_a_size_of_one(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {n: x[:1] if isinstance(x, Tensor) else x for n, x in step_arguments().items()}
    given["state"] = GKAState(*(x[:1] for x in given["state"]))
    keep_plan(**given)
    step_gka(**given | {"g": given["g"].as_strided((1, 4), (96, 1))})
    assert len(launches.planned) == 1
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for _ in range(3):
        step_gka(**given)
    assert len(launches.planned) == 1


@pretend
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_iter": 1.0}, TypeError, "num_iter: expected an int, got float"),
        ({"num_iter": True}, TypeError, "num_iter: expected an int, got bool"),
        ({"scale": [0.5]}, TypeError, "scale: expected a float or None, got list"),
        ({"q": None}, TypeError, "q: expected a Tensor, got NoneType"),
        ({"q": 0.5}, TypeError, "q: expected a Tensor, got float"),
        ({"k": None}, TypeError, "k: expected a Tensor, got NoneType"),
        ({"g": 0}, TypeError, "g: expected a Tensor, got int"),
        ({"state": (None, None)}, TypeError, "state.h_kk: expected a Tensor, got NoneType"),
        ({"state": None}, TypeError, "state: expected a GKAState"),
        ({"state": lambda s: (*s, s[0])}, TypeError, "state: expected a GKAState"),
        ({"k": lambda x: x.half()}, TypeError, r"k: expected dtype torch.bfloat16"),
        ({"g": lambda x: x.double()}, TypeError, "g: expected dtype float32"),
        ({"alpha": lambda x: x[:, :2].contiguous()}, ValueError, "alpha: expected shape"),
        ({"state": lambda s: GKAState(s.h_kk, strided(s.h_kv))}, ValueError, "state.h_kv: expected a contiguous tensor"),
        ({"v": lambda x: x.requires_grad_()}, ValueError, "inplace: expected no argument that requires grad"),
    ],
)
def test_bad_input_beside_a_plan_is_named(change: dict, error: type, message: str, launches: Launches) -> None:
    keep_plan(**step_arguments(), num_iter=1)
    for _ in range(3):  # what failed once leaves no plan
        given = step_arguments() | {"num_iter": 1}
        given.update({n: c(given[n]) if callable(c) else c for n, c in change.items()})
        with pytest.raises(error, match=message):
            step_gka(**given)
    assert launches.planned == []


@pretend
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"initial_state": (None, None)}, TypeError, "initial_state.h_kk: expected a Tensor, got NoneType"),
        ({"initial_state": 3}, TypeError, "initial_state: expected a GKAState"),
        ({"cu_seqlens": [0, 5]}, TypeError, "cu_seqlens: expected a Tensor, got list"),
        ({"q": [1.0]}, TypeError, "q: expected a Tensor, got list"),
        ({"ridge_ratio": {}}, TypeError, "ridge_ratio: expected a float, got dict"),
    ],
)
@torch.no_grad()
def test_bad_sequences_beside_a_plan_are_named(change: dict, error: type, message: str, launches: Launches) -> None:
    made = inputs()
    given = {n: made[n] for n in ("q", "k", "v", *GATES)}
    for _ in range(3):
        chunk_gka(**given)
    assert launches.planned
    launches.planned.clear()
    for _ in range(3):
        with pytest.raises(error, match=message):
            chunk_gka(**given | change)
    assert launches.planned == []


@pretend
def test_a_tensor_that_stands_for_an_absent_gate_is_no_gate(launches: Launches) -> None:
    given = step_arguments() | {"beta": None}
    keep_plan(**given)
    with pytest.raises(ValueError, match="beta: expected shape"):
        step_gka(**given | {"beta": given["q"]})
    assert launches.planned == []


@pretend
def test_one_gate_for_another_has_a_plan_of_its_own(launches: Launches) -> None:
    given = step_arguments()
    keep_plan(**given | {"gk": None})
    step_gka(**given | {"g": None})
    assert launches.planned == []


@pretend
def test_plans_are_bounded_and_hold_no_tensors(launches: Launches) -> None:
    given = step_arguments()
    for n in range(plans.LIMIT + 3):
        keep_plan(**given, num_iter=1, ridge_ratio=1.0 + n)
    assert len(plans._plans) == plans.LIMIT
    for n in (plans.LIMIT + 2, 3):  # the latest, and the oldest that is left
        step_gka(**given, num_iter=1, ridge_ratio=1.0 + n)
    assert len(launches.planned) == 2
    for n in range(plans.ALIKE + 2):  # strides are not in the key
        step_gka(**given | {"k": torch.stack([given["k"]] * (n + 2), -1)[..., 0]}, num_iter=1, ridge_ratio=6.0)
    assert max(map(len, filter(None, plans._plans.values()))) == plans.ALIKE
    q = weakref.ref(given["q"])
    del given
    launches.clear()
    gc.collect()
    assert q() is None


class Interpreted(Kernel):
    """A kernel that the interpreter runs, on the addresses that it is given."""

    def __init__(self, launch: ahead.Launch) -> None:
        super().__init__("interpreted", [])
        self.launch = launch

    def run(self, x: int, y: int, z: int, stream: Any, *rest: Any) -> None:
        given, values = self.launch, rest[5:]
        args: list[Any] = list(values)
        for i, old in enumerate(given.args):
            if isinstance(old, Tensor):  # the interpreter asks for the address and the dtype
                one = (ctypes.c_byte * max(1, old.itemsize)).from_address(values[i])
                args[i] = torch.frombuffer(one, dtype=old.dtype, count=1)
        names = given.kernel.arg_names[len(given.args) :]
        given.kernel[(x, y, z)](*args[: len(given.args)], **dict(zip(names, args[len(given.args) :], strict=True)))


@pytest.mark.skipif(not INTERPRETED, reason="runs the kernels of a plan in the interpreter")
@pytest.mark.parametrize("call", [forward, train, functional_step, decode_inplace])
def test_a_plan_computes_what_the_call_does(call: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    from gka_compile.custom_ops.kernels import launch as module

    plan, replays = plans._plan, count_replays(monkeypatch)

    def interpreting(launches: Any, *rest: Any) -> Any:
        return plan([(Interpreted(done), done) for _, done in launches], *rest)

    driver = type("Driver", (), {"active": type("Active", (), {"get_current_stream": staticmethod(lambda device: device)})})
    monkeypatch.setattr(module, "driver", driver)
    monkeypatch.setattr(plans, "_plan", interpreting)
    monkeypatch.setattr(Tensor, "is_cuda", True, raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(config, "CPU_CHUNK", 16)
    monkeypatch.setattr(plans, "BLOCK", 2048)  # some temporaries in blocks of their own
    monkeypatch.setattr(plans, "_plans", {})
    for seed in (0, 1):
        call(rows_apart(make_inputs(CASE, torch.bfloat16, seed=seed)))
    assert replays == []
    made = rows_apart(make_inputs(CASE, torch.bfloat16, seed=2))
    found = call(made)
    assert len(replays) == (3 if call is train else 1)  # of whole calls, or of their ops
    with Recorder():
        expected = call(made)
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)
