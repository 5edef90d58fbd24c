"""The work that bench_ops.py measures: sizes, inputs, and what the results are checked with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from measure import error_of_part
from peers import Definition, Inputs, result_names
from torch import Tensor

__all__ = ["CASES", "SMALL", "Case", "Oracle", "make_inputs", "shrink"]


@dataclass(frozen=True)
class Case:
    """One piece of work, and who takes part besides ours and the authors'."""

    work: str  # forward, forward+backward, ops (forward+backward, op by op) or decode
    B: int
    T: int = 1
    H: int = 16
    Hk: int = 16
    K: int = 128  # V is the same
    lengths: tuple[int, ...] = ()  # packed sequences
    others: bool = False  # fla's ops and SDPA
    beta: bool = False  # ours with beta as an argument of the op
    compiled: bool = False  # ours under torch.compile
    latency: bool = False  # so small that launches count: the GPU waits for them, and CUDA graphs take part
    quick: bool = False  # part of --quick

    @property
    def backward(self) -> bool:
        return self.work in ("forward+backward", "ops")

    def __str__(self) -> str:
        T = "" if self.work == "decode" else f" T{self.T}"
        Hk = f" Hk{self.Hk}" if self.Hk != self.H else ""
        return f"{self.work} B{self.B}{T} H{self.H}{Hk} K{self.K}" + (f" packed{len(self.lengths)}" if self.lengths else "")


def both(**fields: Any) -> tuple[Case, Case]:
    return Case("forward", **fields), Case("forward+backward", **fields)


PACKED = (1, 17, 64, 130, 512, 1000, 2048, 4096, 8192, 16708)  # 32768 tokens
CASES = (
    *both(B=8, T=4096, others=True, beta=True, compiled=True, quick=True),
    *both(B=1, T=32768, others=True),
    *(Case("decode", B, H=32, Hk=32, compiled=True, quick=B != 16) for B in (1, 16, 128)),
    Case("ops", B=8, T=4096, quick=True),
    Case("ops", B=1, T=32768),
    *both(B=8, T=4096, H=32, Hk=32, K=64),
    *both(B=8, T=4096, Hk=4, beta=True),
    *both(B=1, T=32768, lengths=PACKED),
    *both(B=1, T=131072),
    *both(B=1, T=128, latency=True),
)
SMALL = Case("forward+backward", B=1, T=384, H=4, Hk=4)  # for the error of every gradient


def shrink(case: Case) -> Case:
    """A case for the CPU: the same code paths, on sizes that say nothing about speed."""
    groups = case.H // case.Hk
    lengths = (1, 17, 46) if case.lengths else ()
    T = sum(lengths) if lengths else min(case.T, 70)
    return replace(case, B=min(case.B, 2), T=T, H=2 * groups, Hk=2, K=case.K // 4, lengths=lengths)


def make_inputs(case: Case, device: str, seed: int) -> Inputs:
    """Unit queries and keys, and gates as the released layer has them at initialisation."""
    generator = torch.Generator(device).manual_seed(seed)
    B, T, H, Hk, K = case.B, case.T, case.H, case.Hk, case.K

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(H, device=device).uniform_(low, high, generator=generator)

    low = torch.bfloat16 if device == "cuda" else torch.float32  # Triton's interpreter cannot compute in bfloat16
    dt = uniform(-6.9, -2.3).exp()  # 0.001 to 0.1, evenly in the logarithm
    bias = dt + (-torch.expm1(-dt)).log()  # softplus(bias) = dt
    g = -uniform(0, 16) * torch.nn.functional.softplus(0.5 * normal(B, T, H) + bias)
    q, k = (torch.nn.functional.normalize(normal(B, T, h, K), dim=-1).to(low) for h in (H, Hk))
    v = normal(B, T, Hk, K).to(low)
    beta = normal(B, T, Hk).sigmoid() + 1e-6  # heads that share a key share it, so that k can carry it
    return {
        **{"q": q, "k": k, "v": v, "g": g, "alpha": normal(B, T, H).sigmoid().to(low)},
        **{"kb": (k * beta[..., None]).to(low), "vb": (v * beta[..., None]).to(low)},
        "beta": beta.repeat_interleave(H // Hk, 2),
        "cu": torch.tensor([0, *case.lengths], device=device).cumsum(0) if case.lengths else None,
        "ridge": torch.ones(H, K, device=device),
        "do": normal(B, T, H, K).to(low),
    }


class Oracle:
    """A definition in float64 on the last sequence and its last heads: o, and the gradients of all inputs."""

    def __init__(self, definition: Definition, x: Inputs, backward: bool) -> None:
        (_, T, H, _), Hk = x["q"].shape, x["k"].shape[2]
        keys = 1 if T > 16384 or Hk < H else 2
        tokens = T if definition.whole else min(T, 256)

        def cut(t: Tensor) -> Tensor:
            return t[-1:, :tokens, -(keys if t.shape[2] == Hk else keys * H // Hk) :].detach().double().cpu()

        self.cut = cut
        self.names = result_names(definition.inputs)
        leaves = {name: cut(x[name]).requires_grad_(backward) for name in definition.inputs}
        o = definition.exact({**leaves, "cu": None if x["cu"] is None else x["cu"].cpu()})
        self.exact = [o.detach()]
        if backward and definition.whole:
            self.exact += torch.autograd.grad(o, list(leaves.values()), cut(x["do"]))

    def errors(self, result: list[Tensor]) -> dict[str, float]:
        """Of [o, gradients...]; a gradient that is not compared has to be finite."""
        compared = zip(self.names, result, self.exact, strict=False)
        errors = {name: error_of_part(t, self.cut, exact) for name, t, exact in compared}
        rest = zip(self.names, result, strict=False)
        return errors | {name: float("inf") for name, t in rest if name not in errors and not bool(t.isfinite().all())}
