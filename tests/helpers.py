"""One table of cases, one oracle, one error budget for every test of the ops."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from gka_compile.custom_ops import ops, reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
INPUTS = ("q", "k", "v", "g", "gk", "alpha", "beta", "h0", "u0")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """One combination of shapes and options. ``given`` names the optional inputs that are not None."""

    name: str
    B: int = 2
    T: int = 37
    H: int = 2
    Hk: int = 2
    K: int = 16
    V: int = 16
    given: tuple[str, ...] = ("g", "gk", "alpha", "beta")
    state: bool = True
    lengths: tuple[int, ...] = ()  # packed sequences
    shared_decay: bool = False  # one tensor as g and gk
    decay: float = 0.0  # log decay of all tokens, where it is not zero
    forgets: float = 0.0  # log decay of every ninth token, and of all tokens in the last head

    def __str__(self) -> str:
        return self.name


CASES = (
    Case("all"),
    Case("plain", given=(), state=False),
    Case("decay-u", given=("g",)),
    Case("decay-h", given=("gk",), state=False),
    Case("alpha", given=("alpha",)),
    Case("beta", given=("beta",), state=False),
    Case("shared-decay", given=("g", "gk", "alpha"), shared_decay=True),
    Case("gqa", H=4, Hk=2, K=24, V=8),
    Case("gqa-wide-v", B=1, H=3, Hk=1, K=16, V=40, T=21),
    Case("one-token", T=1),
    Case("whole-chunks", T=32),
    Case("empty", T=0),
    Case("packed", B=1, T=40, lengths=(0, 5, 0, 16, 19)),
    Case("packed-no-state", B=1, T=33, lengths=(1, 32), state=False, given=("g", "gk")),
)


def make_inputs(case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Tensor | None]:
    """Inputs as the layer makes them: unit queries and keys, gates in float32 (float64 beside float64)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    B, T, H, Hk, K, V = case.B, case.T, case.H, case.Hk, case.K, case.V
    N = len(case.lengths) or B
    unit = torch.nn.functional.normalize
    square = normal(N, H, K, K)
    made: dict[str, Any] = {
        "q": unit(normal(B, T, H, K), dim=-1).to(dtype),
        "k": unit(normal(B, T, Hk, K), dim=-1).to(dtype),
        "v": normal(B, T, Hk, V).to(dtype),
        "g": -0.3 * uniform(B, T, H),
        "gk": -0.2 * uniform(B, T, H),
        "alpha": uniform(B, T, H),
        "beta": 0.05 + 0.95 * uniform(B, T, H),
        "h0": square @ square.mT / K,
        "u0": normal(N, H, K, V),
    }
    if case.decay:
        for name in ("g", "gk"):
            made[name].fill_(case.decay)
    if case.forgets:
        for name in ("g", "gk"):
            made[name][:, 5::9] = made[name][..., -1] = case.forgets
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    for name in ("g", "gk", "alpha", "beta", "h0", "u0"):
        wanted = case.state if name in ("h0", "u0") else name in case.given
        # float32 values exactly, so that the float64 oracle sees the same numbers
        made[name] = made[name].float().to(exact) if wanted else None
    return {name: None if x is None else x.to(device) for name, x in made.items()}


def packing(case: Case, device: str = "cpu") -> Tensor | None:
    """cu_seqlens of a case."""
    if not case.lengths:
        return None
    return torch.tensor([0, *torch.tensor(case.lengths).cumsum(0).tolist()], device=device)


def make_cotangents(case: Case, dtype: torch.dtype, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Cotangents of o (in ``dtype``'s values), h and u."""
    generator = torch.Generator().manual_seed(seed)
    N = len(case.lengths) or case.B
    shapes = ((case.B, case.T, case.H, case.V), (N, case.H, case.K, case.K), (N, case.H, case.K, case.V))
    do, dh, du = (torch.randn(s, generator=generator) for s in shapes)
    return do.to(dtype), dh, du


SCALE, RIDGE_RATIO, NUM_ITER = 0.37, 0.02, 30


def run_reference(
    case: Case,
    dtype: torch.dtype,
    compute: torch.dtype,
    chunk: int = 16,
    num_iter: int = NUM_ITER,
    cotangents: tuple[Tensor, Tensor, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Outputs and gradients by the chunked reference, on the values that ``dtype`` inputs hold, computed in ``compute``."""
    made = make_inputs(case, dtype)
    high = torch.float64 if compute == torch.float64 else None
    q, k, v, g, gk, alpha, beta, h0, u0 = (None if x is None else x.to(high or x.dtype) for x in made.values())
    assert q is not None
    assert k is not None
    assert v is not None
    do, dh, du = (x.to(high or x.dtype) for x in cotangents or make_cotangents(case, dtype))
    cu, sizes = packing(case), (case.H, chunk)
    *states, h, u = reference.chunk_state(k, v, g, gk, beta, h0, u0, cu, *sizes)
    read = (*states, cu, SCALE, RIDGE_RATIO, num_iter, chunk)
    o, *solved = reference.chunk_output(q, k, v, g, gk, alpha, beta, h0, u0, *read)
    given = (do, q, alpha, *solved, dh, du, None, None, None, *read[3:-1], *sizes)
    gradients = dict(zip(INPUTS, reference.chunk_bwd(k, v, g, gk, beta, h0, u0, *given), strict=True))
    return {"o": o, "h": h, "u": u, **{f"d{n}": gradients[n] for n in INPUTS if made[n] is not None}}


def run_ops(case: Case, dtype: torch.dtype, device: str, chunk: int = 16) -> dict[str, Tensor]:
    """The same by the ops and autograd."""
    made = make_inputs(case, dtype, device)
    leaves = {name: None if x is None else x.requires_grad_() for name, x in made.items()}
    q, k, v, g, gk, alpha, beta, h0, u0 = leaves.values()
    cu = packing(case, device)
    *states, h, u = ops.chunk_state(k, v, g, gk, beta, h0, u0, cu, case.H, chunk)
    o, *_ = ops.chunk_output(q, k, v, g, gk, alpha, beta, h0, u0, *states, cu, SCALE, RIDGE_RATIO, NUM_ITER, chunk)
    present = {name: x for name, x in leaves.items() if x is not None}
    cotangents = [x.to(device) for x in make_cotangents(case, dtype)]
    gradients = torch.autograd.grad((o, h, u), list(present.values()), cotangents)
    results = {"o": o, "h": h, "u": u, **{f"d{n}": x for n, x in zip(present, gradients, strict=True)}}
    return {name: x.detach().cpu() for name, x in results.items()}


class RoundedProducts(TorchFunctionMode):
    """Disturb the operands of every matrix product as rounding to ``bits`` does: by up to 2^-bits of each entry, at random.

    What is left of the reference is what any implementation with such operands must lose (Monte Carlo arithmetic). Actual
    rounding would disturb an operand equally wherever it recurs, errors would cancel in the gradient, and the budget mislead.
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.generator = torch.Generator().manual_seed(0)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.matmul, torch.Tensor.__matmul__, torch.matmul):
            args = tuple(a * (1 + 2.0**-self.bits * (2 * torch.rand(a.shape, generator=self.generator) - 1)) for a in args)
        return func(*args, **(kwargs or {}))


def relative_error(x: Tensor, oracle: Tensor) -> float:
    """‖x − oracle‖/‖oracle‖ in float64; NaN in x is an infinite error."""
    difference = (x.double().cpu() - oracle.double()).norm().item()
    size = oracle.double().norm().item()
    error = difference / size if size else difference
    return float("inf") if error != error else error


def budget(case: Case, dtype: torch.dtype, oracle: dict[str, Tensor], chunk: int = 16) -> dict[str, float]:
    """Twice the error of a low-precision reference.

    Its arithmetic is float32; its operands have float16's 11 bits beside 16-bit inputs and the 22 of two float16 numbers beside
    float32 ones (kernels/tile.py).
    """
    with RoundedProducts(22 if dtype == torch.float32 else 11):
        low = run_reference(case, dtype, torch.float32, chunk)
    floor = torch.finfo(torch.float32).eps  # a state that the reference happens to get exactly
    # the interpreter cuts bfloat16 off where a GPU rounds: what is stored in it loses twice as much
    cut = {name: 2 if INTERPRETED and x.dtype == torch.bfloat16 else 1 for name, x in low.items()}
    return {name: 2 * cut[name] * max(relative_error(x, oracle[name]), floor) for name, x in low.items()}


def check(found: dict[str, Tensor], oracle: dict[str, Tensor], allowed: dict[str, float]) -> None:
    """Every result within its budget, all misses in one message."""
    errors = {name: relative_error(found[name], oracle[name]) for name in oracle}
    misses = [f"{name}: {errors[name]:.2e} > {allowed[name]:.2e}" for name in oracle if not errors[name] <= allowed[name]]
    assert not misses, "relative error over twice that of the low-precision reference: " + ", ".join(misses)


class Recorder(TorchDispatchMode):
    """Sees every gka op, all of which go through the dispatcher then."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "gka":
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def count_replays(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A list that every call by a plan made from here on adds to: the addresses that it launches kernels with."""
    from gka_compile.custom_ops.kernels import launch

    replay, replays = launch.replay, list[Any]()

    def counting(*args: Any) -> Any:
        again = replay(*args)

        def counted(addresses: Any) -> None:
            replays.append(addresses)
            again(addresses)

        return counted

    monkeypatch.setattr(launch, "replay", counting)
    return replays
