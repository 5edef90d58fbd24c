"""Kernels compiled before a call are those that it launches. No GPU: the driver pretends to be one, the compiler makes keys."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels do not compile", allow_module_level=True)

from helpers import CASES, Case, make_inputs, packing  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import make_backend  # noqa: E402
from triton.runtime.cache import get_cache_key  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from gka_compile import chunk_gka, functional  # noqa: E402
from gka_compile.custom_ops import ahead, config, kernels, ops  # noqa: E402

STATES = ["chunk_factors_kernel", "chunk_state_kernel", "chunk_state_kernel"]  # the ends of segments, then all
FORWARD = [*STATES, "chunk_solve_kernel", "chunk_read_kernel"]
BACKWARD = [
    "chunk_read_bwd_kernel",
    "chunk_solve_bwd_kernel",
    "cotangent_factors_kernel",
    "chunk_state_bwd_kernel",
    "grads_through_u_kernel",
    "grads_through_h_kernel",
]
_KERNELS = [x for module in ("decode", "grads", "output", "state") for x in vars(getattr(kernels, module)).values()]
KERNELS = [x for x in dict.fromkeys(x for x in _KERNELS if isinstance(x, JITFunction)) if x.__name__.endswith("_kernel")]
_devices = itertools.count(1000)


@dataclass
class GPU:
    """What was compiled, loaded and launched, in this order; compiled: (kernel, Triton's key on disk)."""

    device: int
    compiled: list[tuple[str, str]] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)
    launched: list[tuple[str, str]] = field(default_factory=list)
    on_compile: Callable[[str], None] = lambda name: None
    target: Any = field(default_factory=lambda: GPUTarget("cuda", 90, 32))

    # the driver
    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target

    # the compiler
    def compile(self, source: Any, target: Any, options: Any, _env_vars: Any = None) -> Any:
        name, backend = source.fn.__name__, make_backend(target)
        environment = _env_vars if _env_vars is not None else triton._C.libtriton.get_cache_invalidating_env_vars()
        key = get_cache_key(source, backend, backend.parse_options(dict(options)), environment)
        self.on_compile(name)
        self.compiled.append((name, key))
        return Compiled(self, name, key)


class Compiled:
    function = packed_metadata = None

    def __init__(self, gpu: GPU, name: str, key: str) -> None:
        self.gpu, self.name, self.key, self.is_loaded = gpu, name, key, False

    @property
    def run(self) -> Any:
        if not self.is_loaded:
            self.gpu.loaded.append(self.name)
            self.is_loaded = True
        return lambda *_: self.gpu.launched.append((self.name, self.key))

    def launch_metadata(self, *_: Any) -> None:
        return None


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[GPU]:
    """A Hopper of its own for each test; ops on CPU tensors launch their kernels on it."""
    pretended = GPU(next(_devices))
    monkeypatch.setattr(type(triton.runtime.driver), "active", pretended)
    monkeypatch.setattr(ahead, "_is_eager", lambda x: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(ahead, "_done", set())
    monkeypatch.setattr(config, "SEGMENTED_CHUNKS", 0)  # every scan in two launches
    monkeypatch.setattr(config, "scan_programs", lambda chunk_size: 1 << 10)
    for kernel in KERNELS:
        kernel.device_caches[pretended.device]  # sets kernel.compile, to Triton's
        monkeypatch.setattr(kernel, "compile", pretended.compile)
    with Launching():
        yield pretended
    for kernel in KERNELS:
        del kernel.device_caches[pretended.device]


class Launching(TorchDispatchMode):
    """Ops on CPU tensors do what they do on a GPU's."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "gka":
            return func(*args, **(kwargs or {}))
        out = getattr(ops, f"_{func._opname}_outputs")(*args)
        with torch._library.triton.set_wrap_triton_enabled(False):
            getattr(kernels, f"launch_{func._opname}")(*args, out)
        return out


def names(pairs: list[tuple[str, str]]) -> list[str]:
    return [name for name, _ in pairs]


def run(case: Case, dtype: torch.dtype, gradients: bool, **options: Any) -> None:
    q, k, v, g, gk, alpha, beta, h0, u0 = (
        x if x is None else x.requires_grad_(gradients) for x in make_inputs(case, dtype).values()
    )
    state = None if h0 is None else (h0, u0)
    o, _ = chunk_gka(q, k, v, g, gk, alpha, beta=beta, initial_state=state, cu_seqlens=packing(case), **options)
    if gradients:
        o.backward(torch.ones_like(o))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("case", [*CASES, Case("wide", T=64, K=128, V=128)], ids=str)
def test_a_call_launches_what_was_compiled_before_it(gpu: GPU, case: Case, gradients: bool, dtype: torch.dtype) -> None:
    """The very keys, in the process and on disk, and nothing else, each once."""
    before: list[tuple[str, str]] = []
    chunk = functional._chunk

    def first(*args: Any) -> Any:  # the real call; the other one has meta tensors
        if args[0].device.type == "cpu" and not before:
            assert not gpu.launched
            before.extend(gpu.compiled)
            assert sorted(gpu.loaded) == sorted(names(before))
        return chunk(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "_chunk", first)
        run(case, dtype, gradients)
    assert sorted(names(before)) == sorted(FORWARD + BACKWARD * gradients)
    assert gpu.compiled == before
    assert set(gpu.launched) == set(before)


def test_parts_of_a_sequence_are_compiled_ahead_of_the_first_call_that_has_them(gpu: GPU, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their lengths, and that all have a state before and a cotangent after them, ask for kernels of their own."""
    monkeypatch.setattr(ops, "runs_kernels", lambda x: True)
    monkeypatch.setattr(config, "PIECE_BYTES", 2 * 2 * 2 * 16 * 32)  # two chunks
    run(Case("", T=37, state=False), torch.bfloat16, True)
    assert sorted(names(gpu.compiled)) == sorted(FORWARD + BACKWARD)
    gpu.compiled.clear()
    gpu.launched.clear()
    on_the_way: list[str] = []
    gpu.on_compile = lambda name: on_the_way.append(name) if gpu.launched else None
    run(Case("", B=1, T=301, state=False), torch.bfloat16, True)  # in the class of 37; 128, 128 and 45 tokens
    assert sorted(names(gpu.compiled)) == sorted([*STATES, "chunk_state_kernel", *BACKWARD, "chunk_state_bwd_kernel"])
    assert not on_the_way


def test_the_keys_on_disk_are_those_of_a_process_that_compiles_as_it_launches(gpu: GPU, monkeypatch: pytest.MonkeyPatch) -> None:
    run(CASES[0], torch.bfloat16, True)
    ahead_of_it = set(gpu.compiled)
    monkeypatch.setattr(ahead, "_is_eager", lambda x: False)
    for kernel in KERNELS:
        kernel.device_caches[gpu.device][0].clear()
    gpu.compiled.clear()
    run(CASES[0], torch.bfloat16, True)
    assert names(gpu.compiled) == FORWARD + BACKWARD  # one after the other, on the way
    assert set(gpu.compiled) == ahead_of_it


def test_a_call_that_cuts_no_sequence_prepares_for_one_that_does(gpu: GPU, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "SEGMENTED_CHUNKS", 4)
    run(Case(""), torch.bfloat16, False)
    assert sorted(names(gpu.compiled)) == sorted(FORWARD)
    assert sorted(names(gpu.launched)) == sorted({*FORWARD})
    gpu.compiled.clear()
    gpu.launched.clear()
    run(Case("", T=217), torch.bfloat16, False)
    assert not gpu.compiled
    assert sorted(names(gpu.launched)) == sorted(FORWARD)


def test_compiles_side_by_side(gpu: GPU, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    everybody = threading.Barrier(len(FORWARD + BACKWARD))
    gpu.on_compile = lambda name: everybody.wait(60) and None
    run(CASES[0], torch.bfloat16, True)
    assert len(gpu.compiled) == len(FORWARD + BACKWARD)


def test_no_more_threads_than_processors(gpu: GPU, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    workers = set()
    gpu.on_compile = lambda name: workers.add(threading.get_ident())
    run(CASES[0], torch.bfloat16, True)
    assert 1 <= len(workers) <= 2


def test_prepares_once_for_what_triton_compiles_once(gpu: GPU, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths, scales and dtypes that ask for kernels of their own, and those that do not."""
    prepared: list[Any] = []
    compile_call = ahead._compile
    monkeypatch.setattr(ahead, "_compile", lambda *args: (prepared.append(args), compile_call(*args)))

    def count(case: Case, dtype: torch.dtype = torch.bfloat16, gradients: bool = False, **options: Any) -> tuple[int, int]:
        """(calls prepared, kernels compiled in them)"""
        prepared.clear()
        gpu.compiled.clear()
        run(case, dtype, gradients, **options)
        return len(prepared), len(gpu.compiled)

    assert count(Case("")) == (1, 5)
    assert count(Case("")) == (0, 0)
    assert count(Case("", T=50, B=5)) == (0, 0)
    assert count(Case("", T=32)) == (1, 5)
    assert count(Case("", T=64)) == (0, 0)
    assert count(Case("", T=1)) == (1, 5)
    assert count(Case(""), gradients=True) == (1, 6)
    with torch.no_grad():
        chunk_gka(*(torch.zeros(1, 37, 2, 16, dtype=torch.bfloat16, requires_grad=True) for _ in "qkv"))  # one that only forwards
    assert count(Case("", given=(), state=False)) == (0, 0)  # the kernels of that
    assert count(Case(""), torch.float16) == (1, 5)
    assert count(Case(""), scale=0.5) == (1, 1)  # of the read-out
    assert count(Case(""), num_iter=7) == (1, 1)  # of the solve
    assert count(Case("", H=4, Hk=2)) == (1, 5)
    packed = Case("", B=1, T=40, lengths=(8, 32))
    assert count(packed) == (1, 5)
    assert count(Case("", B=1, T=40, lengths=(1, 9, 30))) == (0, 0)
    assert count(Case("", B=1, T=40, lengths=(40,))) == (1, 3)  # N = 1, which the scan does not take
    assert count(Case("", B=1, T=40, lengths=(2,) * 8 + (3,) * 8)) == (1, 3)


def test_what_a_compilation_raises_is_raised_where_the_kernel_is_launched(gpu: GPU) -> None:
    def fail(name: str) -> None:
        if name == "grads_through_h_kernel":
            raise RuntimeError("no such instruction")

    gpu.on_compile = fail
    for _ in range(2):
        gpu.launched.clear()
        with pytest.raises(RuntimeError, match="no such instruction"):
            run(CASES[0], torch.bfloat16, True)
        assert set(names(gpu.launched)) == {*FORWARD, *BACKWARD[:-1]}
    q = torch.ones(1, 5, 2, 16, dtype=torch.bfloat16, requires_grad=True)
    chunk_gka(q, q, q)  # never differentiated
    assert gpu.launched[-1][0] == "chunk_read_kernel"


def test_where_nothing_can_be_compiled_ahead_the_call_goes_on(gpu: GPU, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:  # as after the end of the main thread
        raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    with torch.autograd.detect_anomaly(check_nan=False):  # what was not computed may be NaN
        run(CASES[0], torch.bfloat16, True)
    assert not ahead._done
    monkeypatch.setattr(ahead.ThreadPoolExecutor, "submit", refuse)
    run(CASES[0], torch.float16, True)
    assert len(ahead._done) == 1
    assert names(gpu.compiled) == 2 * (FORWARD + BACKWARD)


def test_leaves_the_caller_alone(gpu: GPU) -> None:
    """No hook for saved tensors runs (checkpoints count them), whatever the grad mode, and under inference_mode."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.device.type) or x, lambda x: x):
        run(CASES[0], torch.bfloat16, True)
    assert set(saved) == {"cpu"}
    with torch.inference_mode():
        run(Case("", T=1), torch.bfloat16, False)
    assert ahead.kept_launches() is None


def test_not_while_a_graph_is_captured(gpu: GPU, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    run(CASES[0], torch.bfloat16, False)
    assert names(gpu.compiled) == FORWARD  # on the way
    assert not ahead._done


def test_only_eager_calls_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "_compile", lambda *_: pytest.fail("compiled ahead"))
    run(CASES[0], torch.bfloat16, True)
    compiled = torch.compile(chunk_gka, fullgraph=True, backend="eager")
    monkeypatch.setattr(ahead, "_is_eager", lambda x: True)
    monkeypatch.setattr(ahead, "_done", set())
    q = torch.zeros(1, 5, 2, 16)
    compiled(q, q, q)


@pytest.mark.parametrize(
    ("op", "launched"),
    [
        ("chunk_state", STATES[:2]),
        ("chunk_output", FORWARD[3:]),
        ("chunk_bwd", [*STATES[:2], *BACKWARD]),
        ("step", ["step_kernel"]),
    ],
)
def test_torch_finds_the_kernels_of_an_op(op: str, launched: list[str]) -> None:
    """By reading the launchers' source, for its cache of compiled code: an edited kernel must not be taken for the old one."""
    assert [kernel.__name__ for kernel in torch._library.triton.get_triton_kernels_for_op(f"gka::{op}")] == launched
