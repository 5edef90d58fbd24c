"""Calls that go past the dispatcher: the same numbers, and nothing that looks at ops or at autograd misses any."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import DEVICE, INTERPRETED, Case, make_inputs
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from gka_compile import GKAState, chunk_gka, step_gka
from gka_compile.custom_ops import ops, plans

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


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "gka":
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Subclass(Tensor):
    pass


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


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Addresses of every launch of a plan; the stand-in launches nothing."""
    made: list[tuple[int, ...]] = []
    torch.overrides.get_testing_overrides()  # Dynamo's table, made once, which reads is_cuda as the property that it is
    monkeypatch.setattr(Tensor, "is_cuda", True, raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)  # what get_device() says of a CPU tensor
    monkeypatch.setattr(ops, "plan_step", lambda *_: lambda *addresses: made.append(addresses))
    monkeypatch.setattr(plans, "_steps", {})
    return made


def step_arguments(dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    made = inputs(1, dtype)
    one = {n: made[n][:, 0].contiguous() for n in ("q", "k", "v", *GATES)}
    return {**one, "state": GKAState(made["h0"], made["u0"]), "inplace": True}


@pretend
def test_a_repeated_step_is_launched_by_its_plan(launches: list[tuple[int, ...]], dispatched: list[str]) -> None:
    step_gka(**step_arguments())
    assert launches == []
    for gates in ((), ("beta",), GATES):  # other tensors; of an absent one any address will do
        given = step_arguments()
        given.update({n: None for n in GATES if n not in gates})
        step_gka(**given)
        launches.clear()
        version = given["state"].h_kv._version
        o, state = step_gka(**given)
        (addresses,) = launches
        tensors = (given["q"], given["k"], given["v"], *given["state"], *(given[n] for n in GATES), o)
        for address, x in zip(addresses, tensors, strict=True):
            assert x is None or address == x.data_ptr()
        assert (o.shape, o.dtype) == ((*given["v"].shape[:1], 4, 16), torch.bfloat16)
        assert state.h_kk is given["state"].h_kk
        assert state.h_kv._version > version
    given |= {"gk": given["g"]}  # one decay for both
    step_gka(**given)
    step_gka(**given)
    assert launches[1][5] == launches[1][6] == given["g"].data_ptr()
    given |= {"gk": given["g"].clone()}
    step_gka(**given)
    assert launches[2][5] != launches[2][6] == given["gk"].data_ptr()
    assert dispatched == []


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
        {"state": list},
        {"state": lambda s: GKAState(s.h_kk, misaligned(s.h_kv))},
        {"ridge_ratio": 1},
    ],
)
def test_another_step_is_not_launched_by_that_plan(change: dict, launches: list[tuple[int, ...]]) -> None:
    step_gka(**step_arguments())
    given = step_arguments()
    given.update({n: c(given[n]) if callable(c) else c for n, c in change.items()})
    expected = step_gka(**{**given, "inplace": False})
    found = step_gka(**given)
    assert launches == []
    for x, y in zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True):
        assert torch.equal(x, y)


@pretend
@pytest.mark.parametrize(
    "change",
    [
        {"q": misaligned},
        {"k": strided},
        {"state": list},
        {"state": lambda s: GKAState(s.h_kk, misaligned(s.h_kv))},
        {"ridge_ratio": 1},
        {"beta": lambda x: x.requires_grad_()},
        {"beta": "alpha"},
        {"g": torch._neg_view},
        {"q": lambda x: x.as_subclass(type("Subclass", (Tensor,), {}))},
    ],
)
@torch.no_grad()
def test_what_may_have_no_plan_gets_none(change: dict, launches: list[tuple[int, ...]]) -> None:
    for _ in range(3):
        given = step_arguments()
        given.update({n: given[c] if isinstance(c, str) else c(given[n]) if callable(c) else c for n, c in change.items()})
        step_gka(**given)
    assert launches == []
    assert not plans._steps


@pretend
def test_modes_see_steps_that_have_plans(launches: list[tuple[int, ...]]) -> None:
    step_gka(**step_arguments())
    for mode in (Recorder(), Functions()):
        for ridge_ratio in (0.02, 0.5, 0.5):
            mode.seen.clear()
            with mode:
                step_gka(**step_arguments(), ridge_ratio=ridge_ratio)
            assert mode.seen
    with forward_ad.dual_level():
        step_gka(**step_arguments())
    assert launches == []
    assert len(plans._steps) == 1


@pretend
def test_steps_that_have_plans_are_compiled(launches: list[tuple[int, ...]]) -> None:
    targets: list[str] = []

    def backend(module: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        targets.extend(str(n.target) for n in module.graph.nodes if str(n.target).startswith("gka"))
        return module.forward

    step_gka(**step_arguments())
    torch.compile(lambda given: step_gka(**given), fullgraph=True, backend=backend)(step_arguments())
    assert targets == ["gka.step_.default"]
    assert launches == []


@pretend
def test_autocast_has_no_plans(launches: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    step_gka(**step_arguments())
    with torch.autocast("cpu", torch.bfloat16):  # the device of the tensors, of which guards know
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: True)
        for ridge_ratio in (0.02, 0.02, 0.5, 0.5):
            step_gka(**step_arguments(), ridge_ratio=ridge_ratio)
    assert launches == []
    assert sum(map(len, plans._steps.values())) == 1


@pretend
def test_a_plan_is_for_one_device_and_any_stride_of_a_size_of_one(
    launches: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {n: x[:1] if isinstance(x, Tensor) else x for n, x in step_arguments().items()}
    given["state"] = GKAState(*(x[:1] for x in given["state"]))
    step_gka(**given)
    step_gka(**given | {"g": given["g"].as_strided((1, 4), (96, 1))})
    assert len(launches) == 1
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    step_gka(**given)
    assert len(launches) == 1
    assert sum(map(len, plans._steps.values())) == 1


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
def test_bad_input_beside_a_plan_is_named(change: dict, error: type, message: str, launches: list[tuple[int, ...]]) -> None:
    step_gka(**step_arguments(), num_iter=1)
    for _ in range(2):  # what failed once leaves no plan
        given = step_arguments() | {"num_iter": 1}
        given.update({n: c(given[n]) if callable(c) else c for n, c in change.items()})
        with pytest.raises(error, match=message):
            step_gka(**given)
    assert launches == []


@pretend
def test_a_tensor_that_stands_for_an_absent_gate_is_no_gate(launches: list[tuple[int, ...]]) -> None:
    given = step_arguments() | {"beta": None}
    step_gka(**given)
    with pytest.raises(ValueError, match="beta: expected shape"):
        step_gka(**given | {"beta": given["q"]})
    assert launches == []


@pretend
def test_batches_of_many_sizes_have_a_plan_each(launches: list[tuple[int, ...]]) -> None:
    whole = step_arguments()

    def step(B: int) -> Any:
        given = {n: x.repeat(B, *[1] * (x.dim() - 1))[:B] for n, x in whole.items() if isinstance(x, Tensor)}
        return step_gka(**given, state=GKAState(*(x[:1].repeat(B, 1, 1, 1) for x in whole["state"])), inplace=True)[0]

    for B in range(1, plans.LIMIT + 3):
        step(B)
    assert launches == []
    for B in (plans.LIMIT + 2, 3, 40, 3, 40):
        assert len(step(B)) == B
    assert len(launches) == 5
    (found,) = plans._steps.values()
    assert len(found) == plans.LIMIT
    assert [plan.shape[0] for plan in found[:3]] == [40, 3, plans.LIMIT + 2]


@pretend
def test_plans_are_bounded_and_hold_no_tensors(launches: list[tuple[int, ...]]) -> None:
    given = step_arguments()
    for n in range(plans.LIMIT + 3):
        step_gka(**given, num_iter=1, ridge_ratio=1.0 + n)
    assert len(plans._steps) == plans.LIMIT
    for n in (plans.LIMIT + 2, 3):  # the latest, and the oldest that is left
        step_gka(**given, num_iter=1, ridge_ratio=1.0 + n)
    assert len(launches) == 2
    q = weakref.ref(given["q"])
    del given
    gc.collect()
    assert q() is None


@pytest.mark.skipif(INTERPRETED, reason="nothing is launched in the interpreter")
@pytest.mark.parametrize("gates", [(), ("gk", "beta"), GATES], ids=str)
def test_a_plan_passes_what_a_launch_passes(gates: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The arguments of the kernel in their order, by Triton's own binding of those that ``launch_step`` gives."""
    triton = pytest.importorskip("triton")
    from gka_compile.custom_ops.kernels import decode as module

    calls: list[tuple[Any, ...]] = []

    class Compiled:
        function, packed_metadata = "function", "metadata"

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *args, stream: calls.append((grid, args, stream))

        def run(self, *args: Any) -> None:
            assert args[4:9] == ("function", "metadata", None, None, None)
            calls.append((args[:3], args[9:], args[3]))

    def run(kernel: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> Compiled:
        settings = {n: options.pop(n) for n in ("num_warps", "num_stages")}
        bound = kernel.signature.bind(*args, **options)
        calls.append((warmup, (*grid, 1, 1)[:3], tuple(bound.arguments.values()), settings))
        return Compiled()

    driver = type("Driver", (), {"get_current_stream": staticmethod(lambda device: ("stream", device))})
    monkeypatch.setattr(type(triton.runtime.driver), "active", driver)
    monkeypatch.setattr(triton.JITFunction, "run", run)
    one = step_arguments()
    q, k, v, h, u = one["q"], one["k"], one["v"], *one["state"]
    tensors = [q, k, v, h, u, *(one[n] if n in gates else None for n in GATES)]
    o = torch.empty_like(q)
    with torch._library.triton.set_wrap_triton_enabled(False):
        module.launch_step(*tensors, 0.25, 0.02, 30, (o, h, u))
    launch = module.plan_step(*tensors, 0.25, 0.02, 30)
    assert launch is not None
    addresses = [*((q if t is None else t).data_ptr() for t in tensors), o.data_ptr()]
    launch(*addresses)
    with monkeypatch.context() as m:  # a profiler's
        m.setattr(triton.knobs.runtime.launch_exit_hook, "calls", [print])
        m.setattr(Compiled, "run", None)
        launch(*addresses)
    (_, grid, launched, settings), (warmup, _, _, planned), *replays = calls
    assert warmup
    assert settings == planned
    assert len(replays) == 2
    for at, replayed, stream in replays:
        assert at == grid
        assert stream == ("stream", q.get_device())
        assert replayed == tuple(x.data_ptr() if isinstance(x, Tensor) else x for x in launched)
