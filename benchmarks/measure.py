"""How bench_ops.py measures: interleaved calls, an emptied L2, poisoned memory, a check of the very call that is timed last."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

Call = Callable[[], Any]
QUEUEING = 1 << 22  # cycles, 2 to 3 ms, that the GPU waits while the CPU queues a call: else the time until a first launch counts


@dataclass
class Entry:
    """One contender in one case, and what was measured of it."""

    name: str
    make: Callable[[], Call]  # may compile or capture; its failure is reported, not raised
    check: Callable[[Any], dict[str, float]]  # relative errors of what a call returned
    nbytes: int = 0  # least possible traffic of one step
    flops: int | None = None
    steps: int = 1  # that one call makes
    own_memory: bool = False  # a CUDA graph: its outputs lie outside the allocator
    times: list[float] = field(default_factory=list)  # ms of one step
    errors: dict[str, float] = field(default_factory=dict)
    peak: int | None = None  # bytes allocated by a call, over its inputs and its first output
    note: str = ""
    failure: str = ""

    def variant(self, name: str, make: Callable[[], Call], own_memory: bool = False) -> Entry:
        """The same work by other means."""
        return Entry(name, make, self.check, self.nbytes, self.flops, self.steps, own_memory)


def tensors(result: Any) -> list[Tensor]:
    return [x for x in tree_leaves(result) if isinstance(x, Tensor)]


def nbytes(result: Any) -> int:
    return sum(x.numel() * x.element_size() for x in tensors(result))


def relative(found: Tensor, exact: Tensor) -> float:
    """‖found − exact‖/‖exact‖; NaN in ``found`` is an infinite error."""
    exact = exact.detach().to(found.device).double()
    difference, size = (found.detach().double() - exact).norm().item(), exact.norm().item()
    error = difference / size if size else difference
    return error if error == error else float("inf")


def error_of_part(found: Tensor, cut: Callable[[Tensor], Tensor], exact: Tensor) -> float:
    """The relative error of a part, infinite where anything of the whole is not finite."""
    return relative(cut(found), exact) if bool(found.isfinite().all()) else float("inf")


def count_flops(call: Call) -> int:
    with FlopCounterMode(display=False) as counted:
        call()
    return int(counted.get_total_flops())


def graphed(call: Call) -> Call:
    """``call`` captured in a CUDA graph; a replay returns the same output tensors every time."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()

    def replay() -> Any:
        graph.replay()
        return outputs

    return replay


def failure(error: Exception) -> str:
    """What a table says of an error."""
    lines = str(error).strip().splitlines() or [""]
    return f"failed: {type(error).__name__}: {lines[0][:120]}"


@contextmanager
def guarded(entry: Entry) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever a peer raises: it is reported, and the rest goes on
        entry.failure = failure(error)
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()


class Bench:
    """Times calls on one device; on the CPU by the wall clock, for trying the plumbing."""

    def __init__(self, device: str, repeats: int, budget: float, say: Callable[[str], None]) -> None:
        self.device, self.repeats, self.budget, self.say = device, repeats, budget, say
        self.cuda = device == "cuda"
        self.scratch = torch.empty(256 << 20 if self.cuda else 1, dtype=torch.uint8, device=device)

    def sync(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def timed(self, call: Call, latency: bool = False) -> tuple[float, Any]:
        """(ms, result). ``latency``: an idle GPU waits for the launches; otherwise it is busy until they are queued."""
        if not self.cuda:
            begin = time.perf_counter()
            result = call()
            return 1e3 * (time.perf_counter() - begin), result
        self.scratch.zero_()  # empties the L2
        if latency:
            torch.cuda.synchronize()
        else:
            torch.cuda._sleep(QUEUEING)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        result = call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end), result

    def poison(self) -> None:
        """Fill every free block of the caching allocator with NaN (0xFF…), so that an output nobody writes shows."""
        if not self.cuda:
            return
        torch.cuda.synchronize()
        here = torch.cuda.current_stream().cuda_stream
        # not the pools of graphs, nor other streams' blocks: neither is handed out to a call
        segments = [s for s in torch.cuda.memory_snapshot() if tuple(s["segment_pool_id"]) == (0, 0) and s["stream"] == here]
        free = [
            b["size"]
            for s in segments
            for b in s["blocks"]
            if b["state"] == "inactive" and (s["segment_type"] == "small" or b["size"] > 1 << 20)
        ]
        blocks = [torch.full((size,), 0xFF, dtype=torch.uint8, device=self.device) for size in sorted(free, reverse=True)]
        del blocks

    def spoil(self, call: Call) -> None:
        """A call whose outputs are overwritten with NaN, for those that stay where they are; then :meth:`poison`."""
        for x in tensors(call()):
            x.detach().fill_(float("nan"))
        del x
        self.poison()

    def release(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def peak(self, call: Call) -> int | None:
        if not self.cuda:
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before - nbytes(tensors(result)[0])

    def run(self, entries: Sequence[Entry], latency: bool = False) -> None:
        """Measure all entries in turns. The last timed call of each is the one that is checked, in poisoned memory."""
        calls: dict[str, Call] = {}
        rounds: dict[str, int] = {}
        for entry in entries:
            self.say(f"  {entry.name}")  # a first call may compile for long
            with guarded(entry):
                calls[entry.name] = call = entry.make()
                call()
                entry.peak = None if entry.own_memory else self.peak(call)
                rounds[entry.name] = max(3, min(self.repeats, int(1e3 * self.budget / self.timed(call)[0])))
        for i in range(max(rounds.values(), default=0)):
            for entry in (*entries[i % len(entries) :], *entries[: i % len(entries)]):
                if entry.failure or i >= rounds[entry.name]:
                    continue
                last = i == rounds[entry.name] - 1
                with guarded(entry):
                    if last:
                        self.spoil(calls[entry.name])
                    ms, result = self.timed(calls[entry.name], latency)
                    entry.times.append(ms / entry.steps)
                    if last:
                        entry.errors = entry.check(result)
                    del result

    def microseconds(self, call: Call) -> list[float]:
        """CPU time of one eager call, launches only: the calls of a batch are queued without waiting for the GPU."""
        found = []
        for _ in range(8):
            self.sync()
            begin = time.perf_counter()
            for _ in range(20):
                call()
            found.append(1e6 * (time.perf_counter() - begin) / 20)
        self.sync()
        return found[1:]

    def rates(self) -> dict[str, float]:
        """FLOP/s of a bf16 matrix product and bytes/s (read and written) of a copy on this card, now."""
        n, size = (8192, 1 << 30) if self.cuda else (512, 1 << 24)
        a, b = torch.randn(2, n, n, device=self.device, dtype=torch.bfloat16)
        c = torch.empty_like(a)
        source, target = torch.ones(2, size, dtype=torch.uint8, device=self.device)

        def median(call: Call) -> float:
            times = [self.timed(call)[0] for _ in range(23)][3:]
            return sorted(times)[len(times) // 2] / 1e3

        matmul = median(lambda: torch.mm(a, b, out=c))
        copy = median(lambda: target.copy_(source))
        return {"matmul": 2 * n**3 / matmul, "copy": 2 * size / copy}
