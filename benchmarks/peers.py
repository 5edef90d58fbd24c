"""Who is measured by bench_ops.py, each as a function of one dict of inputs, and the float64 definition that each is checked with.

Inputs: q [B,T,H,K], k [B,T,Hk,K] of unit length and v [B,T,Hk,V]; g [B,T,H] the log decay, of both states where there are two;
alpha, beta [B,T,H]; kb and vb [B,T,Hk,·]: k and v times beta; cu: bounds of packed sequences, or None. H/Hk heads share a key.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gka_compile import chunk_gka
from gka_compile.custom_ops import recurrent_gka

Inputs = dict[str, Any]
TRAINING = "training/src/hmf/model/hybrid_zoo/layers/gated_kalmanet/ops"
SERVING = "vllm-inference/src/primed_vllm/gka"
TOKEN_BY_TOKEN = 512  # up to this length GKA is checked with the exact solve, beyond it with its chunked float64 form


# --- definitions, in float64 on the CPU ---


def _gka(x: Inputs, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor | None = None) -> Tensor:
    q, g, cu = x["q"], x["g"], x["cu"]
    if q.shape[1] > TOKEN_BY_TOKEN:
        return chunk_gka(q, k, v, g, g, alpha, cu_seqlens=cu, beta=beta)[0]
    ends = [0, q.shape[1]] if cu is None else cu.tolist()
    parts = []
    for start, end in zip(ends[:-1], ends[1:], strict=True):
        given = (None if t is None else t[:, start:end] for t in (q, k, v, g, g, alpha, beta))
        parts.append(recurrent_gka(*given, num_iter=None)[0])  # type: ignore[arg-type, misc]
    return torch.cat(parts, 1)


def _delta_rule(x: Inputs) -> Tensor:
    q, k, v, g, beta = (x[n].transpose(0, 1) for n in ("q", "k", "v", "g", "beta"))
    state, out = q.new_zeros(*q.shape[1:], v.shape[-1]), []
    for t in range(q.shape[0]):
        state = state * g[t].exp()[..., None, None]
        step = beta[t][..., None] * (v[t] - torch.einsum("bhkv,bhk->bhv", state, k[t]))
        state = state + k[t][..., None] * step[..., None, :]
        out.append(torch.einsum("bhkv,bhk->bhv", state, q[t]) * q.shape[-1] ** -0.5)
    return torch.stack(out, 1)


def _mesa(x: Inputs) -> Tensor:
    q, k, v, g, beta = (x[n].transpose(0, 1) for n in ("q", "k", "v", "g", "beta"))
    eye = torch.eye(q.shape[-1], dtype=q.dtype)
    h, u, out = q.new_zeros(*q.shape[1:], q.shape[-1]), q.new_zeros(*q.shape[1:], v.shape[-1]), []
    for t in range(q.shape[0]):
        decay, kb = g[t].exp()[..., None, None], (k[t] * beta[t][..., None])[..., None]
        h, u = decay * h + kb * k[t][..., None, :], decay * u + kb * v[t][..., None, :]
        out.append(torch.einsum("bhkv,bhk->bhv", u, torch.linalg.solve(h + eye, q[t])))
    return torch.stack(out, 1)


def _attention(x: Inputs) -> Tensor:
    q, k, v = (x[n].transpose(1, 2) for n in ("q", "k", "v"))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def _attention_flops(case: Any) -> int:
    """Half of all pairs, two products forwards and five backwards."""
    return int((7 if case.backward else 2) * case.B * case.H * case.T**2 * case.K)


@dataclass(frozen=True)
class Definition:
    """What a contender computes. ``inputs`` are differentiated; not ``whole``: o is checked on its first tokens alone."""

    inputs: tuple[str, ...]
    exact: Callable[[Inputs], Tensor]
    whole: bool = False


def result_names(inputs: tuple[str, ...]) -> list[str]:
    """[o, gradients of the inputs...]; kb and vb are what carries k's and v's."""
    return ["o", *(f"d{name[0] if name in ('kb', 'vb') else name}" for name in inputs)]


FOLDED = ("q", "kb", "vb", "g", "alpha")
INSIDE = ("q", "k", "v", "g", "alpha", "beta")
GKA = Definition(FOLDED, lambda x: _gka(x, x["kb"], x["vb"], x["alpha"]), whole=True)
GKA_BETA = Definition(INSIDE, lambda x: _gka(x, x["k"], x["v"], x["alpha"], x["beta"]), whole=True)
GLA = Definition(("q", "kb", "vb", "g"), lambda x: _gka(x, x["kb"], x["vb"], torch.zeros_like(x["g"])), whole=True)
DELTA_RULE = Definition(("q", "k", "v", "g", "beta"), _delta_rule)
MESA = Definition(("q", "k", "v", "g", "beta"), _mesa)
ATTENTION = Definition(("q", "k", "v"), _attention)


# --- contenders ---


@dataclass(frozen=True)
class Contender:
    """``o = call(inputs)``; ``side``, by which a case chooses: ours, beta (ours, in the op), authors or others."""

    name: str
    side: str
    definition: Definition
    call: Callable[[Inputs], Tensor]
    backward: bool = True
    packed: bool = False
    mutates: bool = False  # its inputs: it gets its own
    flops: Callable[[Any], int] | None = None  # of a case; None: those of our op, where it solves what our op solves


def ours(x: Inputs) -> Tensor:
    return chunk_gka(x["q"], x["kb"], x["vb"], x["g"], x["g"], x["alpha"], cu_seqlens=x["cu"])[0]


def ours_beta(x: Inputs) -> Tensor:
    return chunk_gka(x["q"], x["k"], x["v"], x["g"], x["g"], x["alpha"], cu_seqlens=x["cu"], beta=x["beta"])[0]


def heads(t: Tensor, x: Inputs) -> Tensor:
    """Keys or values for peers that want one per query head: their layers repeat them as well."""
    groups = x["q"].shape[2] // t.shape[2]
    return t.repeat_interleave(groups, 2) if groups > 1 else t


def _missing(error: BaseException) -> Callable[..., Any]:
    def call(*_: Any, **__: Any) -> Any:
        raise RuntimeError(f"not loaded: {type(error).__name__}: {error}") from error

    return call


def _load(module: str, name: str) -> Callable[..., Any]:
    """``module.name``, or a function that says why not."""
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # a peer that does not import is one row of the table
        return _missing(error)


def trim_autotuners(keep: int) -> None:
    """Leave the peers' autotuners ``keep`` configurations of 4 or 8 warps and 2 or 3 stages, spread over their lists.

    With their full lists the authors' first call takes minutes; ``--cold-peers`` measures that.
    """
    from triton.runtime.autotuner import Autotuner

    for name, module in list(sys.modules.items()):
        if name.split(".")[0] not in ("fla", "chebyshev", "authors_vllm"):
            continue
        for kernel in list(vars(module).values()):
            while kernel is not None and type(kernel).__module__.startswith("triton."):
                if isinstance(kernel, Autotuner) and len(kernel.configs) > keep:
                    fit = [c for c in kernel.configs if c.num_warps in (4, 8) and c.num_stages in (2, 3)] or kernel.configs
                    last = len(fit) - 1
                    kernel.configs = [fit[i] for i in sorted({round(j * last / max(keep - 1, 1)) for j in range(keep)})]
                kernel = getattr(kernel, "fn", None)  # Autotuner and Heuristics wrap each other


def _stand_in_for_vllm() -> None:
    """What the authors' serving kernels import from vLLM, which took it from fla; the real one, if installed, goes first."""
    if importlib.util.find_spec("vllm") is not None:
        return
    import triton
    import triton.language as tl
    from fla.ops.utils import cumsum, index, op  # type: ignore[import-not-found]
    from fla.utils import input_guard  # type: ignore[import-not-found]
    from triton.language.extra import libdevice

    ops = "vllm.model_executor.layers.fla.ops"
    contents: dict[str, dict[str, Any]] = {
        "vllm.triton_utils": {"triton": triton, "tl": tl, "tldevice": libdevice},
        f"{ops}.cumsum": {"chunk_local_cumsum": cumsum.chunk_local_cumsum},
        f"{ops}.index": {n: getattr(index, n) for n in ("prepare_chunk_indices", "prepare_chunk_offsets")},
        f"{ops}.op": {"exp": op.exp},
        f"{ops}.utils": {"input_guard": input_guard},
    }
    for name, attributes in contents.items():
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            sys.modules.setdefault(".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
        vars(sys.modules[name]).update(attributes)


def load_authors(checkout: Path) -> dict[str, Callable[..., Any]]:
    """Their training op, and their serving prefill and decode, from a checkout of awslabs/hybrid-model-factory.

    They need einops and fla-core 0.4: from 0.5 on fla takes decays in base 2 while they pass natural logs, and refuses its
    backward on Hopper with Triton 3.4 to 3.7.0.
    """
    sys.path.insert(0, str(checkout / TRAINING))
    loaded = {"train": _load("chebyshev.gka_chebyshev_solve", "gka_chebyshev_gla")}
    try:
        _stand_in_for_vllm()
        package = types.ModuleType("authors_vllm")  # their __init__ files, above this folder, import all of vLLM
        package.__path__ = [str(checkout / SERVING)]
        sys.modules["authors_vllm"] = package
    except Exception as error:
        return loaded | {"prefill": _missing(error), "decode": _missing(error)}
    loaded["prefill"] = _load("authors_vllm.gka_forward", "gka_chebyshev_gla_prefill")
    loaded["decode"] = _load("authors_vllm.ops.chebyshev_iteration_gqa", "chebyshev_iteration_gqa")
    return loaded


@dataclass(frozen=True)
class Peers:
    """All contenders of the sequence ops, and the authors' training op and decode kernel themselves."""

    contenders: list[Contender]
    train: Any
    decode: Any


def load(checkout: Path | None, keep_configs: int, device: str) -> Peers:
    """Everybody who is there. What fails to import takes part and says so when it is called."""
    if device == "cpu":  # fla enters its device's context, and the CPU has none: for runs under TRITON_INTERPRET=1
        torch.cpu.device = lambda *_: contextlib.nullcontext()  # type: ignore[attr-defined]
    found = [
        Contender("ours", "ours", GKA, ours, packed=True),
        Contender("ours, beta in the op", "beta", GKA_BETA, ours_beta, packed=True),
    ]
    authors: dict[str, Any] = {} if checkout is None else load_authors(checkout)

    def trained(x: Inputs) -> Tensor:
        k, v = heads(x["kb"], x), heads(x["vb"], x)
        return authors["train"](x["q"], k, v, x["alpha"], x["g"], x["g"], x["q"].shape[-1] ** -0.5)[0]

    def served(x: Inputs) -> Tensor:  # normalises q and k where they lie: unit vectors, but for their rounding
        rest = (x["v"], x["alpha"], x["g"], x["g"], x["beta"], x["q"].shape[-1] ** -0.5)
        return authors["prefill"](x["q"], x["k"], *rest, cu_seqlens=x["cu"])[0]

    if authors:
        found.append(Contender("authors", "authors", GKA, trained))
        found.append(Contender("authors, vLLM prefill", "authors", GKA_BETA, served, backward=False, packed=True, mutates=True))
    if importlib.util.find_spec("fla") is not None:
        gla = _load("fla.ops.simple_gla", "chunk_simple_gla")
        delta = _load("fla.ops.gated_delta_rule", "chunk_gated_delta_rule")
        mesa = _load("fla.ops.mesa_net", "chunk_mesa_net")
        found += [
            Contender("gated linear attention", "others", GLA, lambda x: gla(x["q"], x["kb"], x["vb"], x["g"])[0]),
            Contender("Gated DeltaNet", "others", DELTA_RULE, lambda x: delta(*(x[n] for n in DELTA_RULE.inputs))[0]),
            Contender("MesaNet", "others", MESA, lambda x: mesa(*(x[n] for n in MESA.inputs), x["ridge"])[0]),
        ]
    found.append(Contender("SDPA", "others", ATTENTION, _attention, flops=_attention_flops))
    trim_autotuners(keep_configs)
    return Peers(found, authors.get("train"), authors.get("decode"))
