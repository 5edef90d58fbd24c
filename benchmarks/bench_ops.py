"""Speed, memory, error and cold start of the GKA ops, beside the authors', flash-linear-attention's and SDPA, in one process.

    python benchmarks/bench_ops.py [--hmf CHECKOUT] [--quick] [--only REGEX] [--out FOLDER]
    python benchmarks/bench_ops.py --plot-from benchmarks/results/CARD.json

CHECKOUT is one of awslabs/hybrid-model-factory. Peers: einops and fla-core 0.4 (peers.py says why not 0.5), both pure Python.
Writes CARD.md and CARD.json anew after every case and, where matplotlib is installed, CARD.png at the end. ``--device cpu`` tries
the plumbing on tiny sizes; under TRITON_INTERPRET=1 and with ``--peer-configs 1``, also how the peers are called.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import report
import torch
from cases import CASES, SMALL, Case, Oracle, make_inputs, shrink
from measure import Bench, Call, Entry, count_flops, error_of_part, failure, graphed, nbytes, relative, tensors
from peers import GKA, Contender, Definition, Inputs, Peers, load, ours, result_names
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from torch.utils._python_dispatch import TorchDispatchMode

from gka_compile import chunk_gka, step_gka
from gka_compile.custom_ops import recurrent_gka
from gka_compile.custom_ops.config import NUM_ITER, RIDGE_RATIO

BEGIN = time.perf_counter()  # after the imports: where a cold start begins
ADVANCE = 3  # decode is checked after so many steps, so that states which do not move show


# --- whole sequences ---


def sequence_call(function: Callable[[Inputs], Tensor], inputs: tuple[str, ...], x: Inputs, backward: bool) -> Call:
    """A call that returns [o, gradients of the inputs...]."""
    if not backward:
        return torch.no_grad()(lambda: [function(x)])
    leaves = {name: x[name].detach().requires_grad_() for name in inputs}

    def run() -> list[Tensor]:
        o = function(x | leaves)
        return [o.detach(), *torch.autograd.grad(o, list(leaves.values()), x["do"])]

    return run


def compile_ours(x: Inputs, backward: bool) -> Call:
    torch._dynamo.reset()
    return sequence_call(torch.compile(ours, fullgraph=True, dynamic=False), GKA.inputs, x, backward)


def capture(make: Callable[[], Call]) -> Call:
    return graphed(make())


def takes_part(c: Contender, case: Case) -> bool:
    wanted = {"others": case.others, "beta": case.beta}.get(c.side, True)
    return wanted and (c.packed or not case.lengths) and (c.backward or not case.backward)


def run_sequences(case: Case, peers: Peers, bench: Bench, seed: int) -> list[Entry]:
    x = make_inputs(case, bench.device, seed)
    flops = count_flops(sequence_call(ours, GKA.inputs, x, case.backward))
    oracles: dict[Definition, Oracle] = {}
    entries = []
    for c in (c for c in peers.contenders if takes_part(c, case)):
        if c.definition not in oracles:
            oracles[c.definition] = Oracle(c.definition, x, case.backward)
        read, written = nbytes([x[name] for name in c.definition.inputs]), nbytes(x["do"])
        traffic = read + written + (2 * read + written if case.backward else 0)  # each once in each direction
        work = c.flops(case) if c.flops else flops if "alpha" in c.definition.inputs else None
        own = x | {name: x[name].clone() for name in ("q", "k")} if c.mutates else x
        make = partial(sequence_call, c.call, c.definition.inputs, own, case.backward)
        entry = Entry(c.name, make, oracles[c.definition].errors, traffic, work)
        entries.append(entry)
        if c.name == "ours" and case.compiled:
            entries.append(entry.variant("ours, compiled", partial(compile_ours, x, case.backward)))
        if c.name in ("ours", "authors") and bench.cuda and case.latency and not case.backward:
            entries.append(entry.variant(f"{c.name}, CUDA graph", partial(capture, make), own_memory=True))
    bench.run(entries, case.latency)
    return entries


# --- our ops one by one ---


class Recorder(TorchDispatchMode):
    """Keeps the arguments and results of every gka op that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple[Any, Any, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "gka":
            self.calls[func._opname] = (func, args, result)
        return result


def run_ops(case: Case, _: Peers, bench: Bench, seed: int) -> list[Entry]:
    """Each op on what it is called with in a forward and backward, checked against what it returned there."""
    x = make_inputs(case, bench.device, seed)
    with Recorder() as recorder:
        sequence_call(ours, GKA.inputs, x, True)()
    entries = []
    for name, (op, args, result) in recorder.calls.items():
        make = partial(torch.no_grad(), partial(op, *args))

        def check(found: Any, expected: Any = result) -> dict[str, float]:
            pairs = zip(tensors(found), tensors(expected), strict=True)
            return {"to the whole": max(relative(a, b) for a, b in pairs if b.numel())}

        entries.append(Entry(name, make, check, nbytes([args, result]), count_flops(make())))
    bench.run(entries)
    return entries


# --- decode ---


class Decoder(torch.nn.Module):
    """One token through several layers, each with its own states, as in a model: they do not stay in the L2."""

    def __init__(self, step: Callable[[Tensor, Tensor], Tensor], states: tuple[Tensor, Tensor], layers: int) -> None:
        super().__init__()
        self.step, self.initial, self.layers = step, states, layers
        for i in range(layers):
            for name, state in zip("hu", states, strict=True):
                self.register_buffer(f"{name}{i}", state.clone())

    def forward(self) -> list[Tensor]:
        return [self.step(getattr(self, f"h{i}"), getattr(self, f"u{i}")) for i in range(self.layers)]

    def restart(self) -> None:
        for name, state in self.named_buffers():
            state.copy_(self.initial["hu".index(name[0])])


def run_decode(case: Case, peers: Peers, bench: Bench, seed: int) -> list[Entry]:
    """In-place steps; a time is that of one layer's step."""
    x = make_inputs(case, bench.device, seed)
    q, k, v, g, alpha, beta = (x[name][:, 0] for name in ("q", "k", "v", "g", "alpha", "beta"))
    generator = torch.Generator(bench.device).manual_seed(seed + 1)
    a, u = torch.randn(2, case.B, case.H, case.K, case.K, generator=generator, device=bench.device)
    states = (a @ a.mT / case.K, u)

    def cut(t: Tensor) -> Tensor:
        return t[-1:, -2:].double().cpu()

    tokens = [cut(t)[:, None].repeat_interleave(ADVANCE, 1) for t in (q, k, v, g, g, alpha, beta)]
    started = (cut(states[0]), cut(states[1]))
    o, *after = recurrent_gka(*tokens, num_iter=None, initial_state=started)  # type: ignore[arg-type, misc]
    exact = {"o": o[:, -1], "h": after[0], "u": after[1]}

    def our_step(h: Tensor, u: Tensor) -> Tensor:
        return step_gka(q, k, v, (h, u), g, g, alpha, beta=beta, inplace=True)[0]

    def their_step(h: Tensor, u: Tensor) -> Tensor:
        given = {name: x[name] for name in ("q", "k", "v", "alpha", "beta")}
        given |= {"gk": x["g"], "num_iter": NUM_ITER, "ridge_ratio": RIDGE_RATIO}
        return peers.decode(**given, initial_state_kk=h, initial_state_kv=u)[0][:, 0]

    traffic = 2 * nbytes(states) + nbytes([q, k, v, q])
    flops = count_flops(lambda: step_gka(q, k, v, states, g, g, alpha, beta=beta))

    def entry(name: str, step: Callable[[Tensor, Tensor], Tensor], wrap: Callable[[Call], Call], own_memory: bool) -> Entry:
        decoder = Decoder(step, states, max(4, 32 // case.B) if bench.cuda else 2)
        call = torch.no_grad()(wrap(decoder.forward))

        def check(_: Any) -> dict[str, float]:
            decoder.restart()
            for _ in range(ADVANCE - 2):
                call()
            bench.spoil(call)
            last = call()[-1]
            h, u = (getattr(decoder, f"{name}{decoder.layers - 1}") for name in "hu")
            return {name: error_of_part(t, cut, exact[name]) for name, t in (("o", last), ("h", h), ("u", u))}

        return Entry(name, lambda: call, check, traffic, flops, decoder.layers, own_memory)

    def capture_later(forward: Call) -> Call:
        graph: list[Call] = []  # made in the first call, where a failure is that of the entry

        def run() -> Any:
            if not graph:
                graph.append(graphed(forward))
            return graph[0]()

        return run

    def reduce_overhead(forward: Call) -> Call:
        torch._dynamo.reset()
        compiled = torch.compile(forward, fullgraph=True, mode="reduce-overhead")

        def run() -> Any:
            torch.compiler.cudagraph_mark_step_begin()
            return compiled()

        return run

    entries: list[Entry] = []
    for side, step in (("ours", our_step), ("authors", their_step))[: 1 if peers.decode is None else 2]:
        entries.append(entry(side, step, lambda forward: forward, False))
        entries += [entry(f"{side}, CUDA graph", step, capture_later, True)] if bench.cuda else []
    skips = counters["inductor"]["cudagraph_skips"]
    entries += [entry("ours, reduce-overhead", our_step, reduce_overhead, True)] if case.compiled else []
    bench.run(entries, latency=True)
    if bench.cuda and counters["inductor"]["cudagraph_skips"] > skips:
        entries[-1].note = "Inductor refused the CUDA graph"
    return entries


# --- error, CPU cost, cold start ---


def run_errors(case: Case, peers: Peers, bench: Bench, seed: int) -> list[dict[str, Any]]:
    """Relative error of o and of every gradient to the exact float64 solve and autograd through it, all heads and tokens."""
    x = make_inputs(case, bench.device, seed)
    x["gk"] = x["g"].clone()  # a leaf of its own
    scale, do = case.K**-0.5, x["do"]

    def train(q: Tensor, k: Tensor, v: Tensor, g: Tensor, gk: Tensor, alpha: Tensor, beta: Tensor | None = None) -> Tensor:
        if beta is not None:  # as their layer does
            k, v = ((t * beta[..., None]).to(t.dtype) for t in (k, v))
        return peers.train(q, k, v, alpha, g, gk, scale)[0]

    rows = []
    for names in (("q", "kb", "vb", "g", "gk", "alpha"), ("q", "k", "v", "g", "gk", "alpha", "beta")):
        exact = [x[name].double().cpu().requires_grad_() for name in names]
        o, *_ = recurrent_gka(*exact, num_iter=None)  # type: ignore[arg-type, misc]
        expected = [o, *torch.autograd.grad(o, exact, do.double().cpu())]
        shown = result_names(names)
        sides: dict[str, Callable[..., Tensor]] = {
            "ours": lambda *args: chunk_gka(*args[:6], beta=args[6] if args[6:] else None)[0]
        }
        if peers.train is not None:
            sides["authors"] = train
        for side, function in sides.items():
            leaves = [x[name].detach().clone().requires_grad_() for name in names]
            row: dict[str, Any] = {"side": side + (", beta given" if "beta" in names else ""), "failure": ""}
            try:
                o = function(*leaves)
                found = [o, *torch.autograd.grad(o, leaves, do)]
                row |= {n: relative(a, b) for n, a, b in zip(shown, found, expected, strict=True)}
            except Exception as error:
                row["failure"] = failure(error)
            rows.append(row)
    return rows


def run_cpu(case: Case, peers: Peers, bench: Bench, seed: int) -> list[dict[str, Any]]:
    """Microseconds of the CPU in one eager call of little work."""
    x = make_inputs(case, bench.device, seed)
    one = {name: x[name][:, :1].contiguous() for name in ("q", "k", "v", "alpha", "beta")}
    g = x["g"][:, :1].contiguous()
    h, u = (torch.zeros(case.B, case.H, case.K, case.K, device=bench.device) for _ in "hu")
    q, k, v, alpha, beta = (t[:, 0] for t in one.values())
    calls: dict[str, Call] = {
        "ours, forward": sequence_call(ours, GKA.inputs, x, False),
        "ours, forward+backward": sequence_call(ours, GKA.inputs, x, True),
        "ours, decode step in place": lambda: step_gka(q, k, v, (h, u), g[:, 0], g[:, 0], alpha, beta=beta, inplace=True),
    }
    for c in (c for c in peers.contenders if c.name == "authors"):
        calls["authors, forward"] = sequence_call(c.call, c.definition.inputs, x, False)
        calls["authors, forward+backward"] = sequence_call(c.call, c.definition.inputs, x, True)
    if peers.decode is not None:
        calls["authors, decode step in place"] = lambda: peers.decode(**one, gk=g, initial_state_kk=h, initial_state_kv=u)
    rows: list[dict[str, Any]] = []
    for name, call in calls.items():
        try:
            with torch.set_grad_enabled("backward" in name):
                rows.append({"call": name, "us": bench.microseconds(call), "failure": ""})
        except Exception as error:
            rows.append({"call": name, "us": [], "failure": failure(error)})
    return rows


def cold_child(which: str, case: Case, options: argparse.Namespace) -> None:
    """In a fresh process with empty caches: print the seconds from the imports to the end of a first forward and backward."""
    begin, function = BEGIN, cast("Callable[[Inputs], Tensor]", ours)
    if which == "authors":  # their autotuners' full lists: what their users wait for
        contenders = load(options.hmf, 1 << 20, options.device).contenders
        function, begin = next(c.call for c in contenders if c.name == "authors"), time.perf_counter()
    elif which == "compiled":
        function = torch.compile(ours, fullgraph=True)
    call = sequence_call(function, GKA.inputs, make_inputs(case, options.device, 0), True)
    float(call()[-1].float().sum())  # waits
    print(time.perf_counter() - begin)


def run_cold(options: argparse.Namespace, quick: bool) -> list[dict[str, Any]]:
    whiches = ["eager"] if quick else ["eager", "compiled"]
    whiches += ["authors"] if options.cold_peers and options.hmf else []
    rows: list[dict[str, Any]] = []
    for which in whiches:
        command = [sys.executable, __file__, "--cold-child", which, "--device", options.device]
        command += ["--hmf", str(options.hmf)] if options.hmf else []
        with tempfile.TemporaryDirectory() as caches:
            places = {name: f"{caches}/{name}" for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
            row: dict[str, Any] = {"side": which if which == "authors" else f"ours, {which}", "seconds": None, "failure": ""}
            try:
                done = subprocess.run(command, env=os.environ | places, capture_output=True, text=True, timeout=options.cold_limit)
                row["seconds"] = float(done.stdout.split()[-1]) if done.returncode == 0 else None
                row["failure"] = "" if done.returncode == 0 else f"failed: {(done.stderr.splitlines() or [''])[-1][:120]}"
            except subprocess.TimeoutExpired:
                row["failure"] = f"more than {options.cold_limit:.0f} s, stopped"
        rows.append(row)
    return rows


# --- the run ---


def rows_of(entries: list[Entry], rates: dict[str, float]) -> list[dict[str, Any]]:
    rows = []
    for e in entries:
        floor = 1e3 * max((e.flops or 0) / rates["matmul"], e.nbytes / rates["copy"])
        rows.append(
            {
                **{"name": e.name, "times": e.times, "peak": e.peak, "note": e.note, "failure": e.failure},
                "errors": {n: x if math.isfinite(x) else None for n, x in e.errors.items()},  # JSON knows no infinity
                **{"flops": e.flops, "nbytes": e.nbytes, "floor": floor if e.flops else None},
            }
        )
    return rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hmf", type=Path, help="checkout of awslabs/hybrid-model-factory")
    parser.add_argument("--quick", action="store_true", help="the main cases alone, fewer repeats: two minutes of a GPU")
    parser.add_argument("--only", default="", metavar="REGEX", help="cases (by their names), errors, cpu, cold")
    parser.add_argument("--list", action="store_true", help="print the names that --only chooses from")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder")
    parser.add_argument("--plot-from", type=Path, metavar="JSON", help="only draw the plot of an earlier run, beside it")
    parser.add_argument("--repeats", type=int, help="timed calls of each, at most (20; 8 with --quick)")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds of one contender's timed calls, about, in one case")
    parser.add_argument("--seed", type=int, help="of the inputs; fresh ones by default")
    parser.add_argument("--peer-configs", type=int, default=2, help="configurations left to a peer's autotuner")
    parser.add_argument("--cold-peers", action="store_true", help="the authors' cold start too, with all their configurations")
    parser.add_argument("--cold-limit", type=float, default=120, help="seconds until a cold start is given up")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny sizes, to try the plumbing")
    parser.add_argument("--cold-child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cuda" and not (torch.cuda.is_available() or options.list or options.plot_from):
        parser.error("PyTorch finds no GPU; --device cpu tries the plumbing")
    options.hmf = options.hmf and options.hmf.resolve()
    return options


def main() -> None:
    options = parse()

    def fit(case: Case) -> Case:
        case = replace(case, others=False, compiled=False) if options.quick else case
        return shrink(case) if options.device == "cpu" else case

    if options.plot_from:
        return report.plot(json.loads(options.plot_from.read_text()), options.plot_from.with_suffix(".png"))
    if options.cold_child:
        return cold_child(options.cold_child, fit(CASES[1]), options)
    work = ["errors", *map(str, CASES), "cpu", "cold"]
    if options.list:
        return print("\n".join(work))
    seed = options.seed if options.seed is not None else int.from_bytes(os.urandom(3), "big")
    inductor.force_disable_caches = True  # they do not see a kernel's source: docs/design.md, section 7

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - BEGIN:6.1f} s] {text}", flush=True)

    bench = Bench(options.device, options.repeats or (8 if options.quick else 20), options.budget, say)
    peers = load(options.hmf, options.peer_configs, options.device)
    result: dict[str, Any] = report.environment(options.device) | {"seed": seed, "peer_configs": options.peer_configs}
    result |= {"rates": bench.rates(), "repeats": bench.repeats, "cases": [], "errors": [], "cpu": [], "cold": []}
    say(f"{result['device']}, seed {seed}; " + report.rates_text(result))
    for name in work:
        case = next((c for c in CASES if str(c) == name), None)
        if not re.search(options.only, name) or (options.quick and case is not None and not case.quick):
            continue
        say(name)
        try:
            if name == "errors":
                result["errors"] = run_errors(fit(SMALL), peers, bench, seed)
            elif name == "cpu":
                result["cpu"] = run_cpu(fit(replace(CASES[-1], work="forward+backward")), peers, bench, seed)
            elif name == "cold":
                result["cold"] = run_cold(options, options.quick)
            elif case is not None:
                runs = {"ops": run_ops, "decode": run_decode}
                rows = rows_of(runs.get(case.work, run_sequences)(fit(case), peers, bench, seed), result["rates"])
                result["cases"].append({"name": str(fit(case)), "rows": rows})
        except Exception as error:  # nothing of this case was measured; the others go on
            row = {"name": "all", "times": [], "errors": {}, "note": "", "failure": failure(error)}
            result["cases"].append({"name": name, "rows": [row]})
        for line in report.lines(result, name if case is None else None):
            say(line)
        report.write(result, options.out)
        bench.release()
    report.plot(result, (options.out / report.slug(result)).with_suffix(".png"))


if __name__ == "__main__":
    main()
