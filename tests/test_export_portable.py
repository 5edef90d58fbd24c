"""The portable form for GPUs, op by op, against the float64 reference: rounding, float16 products, sizes, magnitudes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import (
    CASES,
    NUM_ITER,
    RIDGE_RATIO,
    SCALE,
    Case,
    RoundedProducts,
    check,
    make_inputs,
    relative_error,
)
from torch import Tensor

from gka_compile.custom_ops import reference
from gka_compile.export.portable import decompositions
from gka_compile.export.portable_cuda import decays_between

CHUNK = 16
DENSE = [case for case in CASES if not case.lengths]
gka = torch.ops.gka
Inputs = list[Any]


class HalfProducts(RoundedProducts):
    """Products whose operands *and results* are float16."""

    def __init__(self, seed: int) -> None:
        super().__init__(11)
        self.generator.manual_seed(seed)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)
        if func not in (torch.Tensor.matmul, torch.Tensor.__matmul__, torch.matmul):
            return result
        return result * (1 + 2.0**-self.bits * (2 * torch.rand(result.shape, generator=self.generator) - 1))


def inputs(case: Case, dtype: torch.dtype, k_scale: float = 1, h_scale: float = 1, seed: int = 0) -> Inputs:
    """q, k, v, g, gk, alpha, beta, h0, u0, with keys and the first state of any size."""
    made = make_inputs(case, dtype, seed=seed)
    for name, factor in (("k", k_scale), ("h0", h_scale)):
        made[name] = None if (x := made[name]) is None else x * factor
    if case.shared_decay:
        made["g"] = made["gk"]
    return list(made.values())


def forward(chunk_state: Any, chunk_output: Any, case: Case, x: Inputs) -> dict[str, Tensor]:
    """Outputs of two functions with the signatures of the chunk ops."""
    _, k, v, g, gk, _, beta, h0, u0 = x
    *states, h, u = chunk_state(k, v, g, gk, beta, h0, u0, None, case.H, CHUNK)
    o, *_ = chunk_output(*x, *states, None, SCALE, RIDGE_RATIO, NUM_ITER, CHUNK)
    return {"o": o, "h": h, "u": u}


def portable(case: Case, x: Inputs, mixed: bool = False) -> dict[str, Tensor]:
    table = decompositions(mixed=mixed)
    return forward(table[gka.chunk_state.default], table[gka.chunk_output.default], case, x)


def specification(case: Case, x: Inputs) -> dict[str, Tensor]:
    return forward(reference.chunk_state, reference.chunk_output, case, x)


def exact(case: Case, x: Inputs) -> dict[str, Tensor]:
    """The reference in float64 on the same values."""
    wide = {id(t): t.double() for t in x if t is not None}
    return specification(case, [None if t is None else wide[id(t)] for t in x])


@pytest.mark.parametrize("case", DENSE, ids=str)
def test_every_output_is_that_of_the_op_in_float64(case: Case) -> None:
    x = inputs(case, torch.float64)
    q, k, v, g, gk, alpha, beta, h0, u0 = x
    table, sizes = decompositions(), (case.H, CHUNK)
    states = gka.chunk_state(k, v, g, gk, beta, h0, u0, None, *sizes)
    read = (q, k, v, g, gk, alpha, beta, h0, u0, *states[:3], None, SCALE, RIDGE_RATIO, NUM_ITER, CHUNK)
    pairs = [
        *zip(table[gka.chunk_state.default](k, v, g, gk, beta, h0, u0, None, *sizes), states, strict=True),
        *zip(table[gka.chunk_output.default](*read), gka.chunk_output(*read), strict=True),
    ]
    if case.T:
        h, u = states[3:]
        one = [None if t is None else t[:, 0] for t in (g, gk, alpha, beta)]
        step = (q[:, 0], k[:, 0], v[:, 0], h, u, *one, SCALE, RIDGE_RATIO, NUM_ITER)
        pairs += zip(table[gka.step.default](*step), gka.step(*step), strict=True)
    for found, expected in pairs:
        assert found.shape == expected.shape
        assert found.dtype == expected.dtype
        assert found.is_contiguous()
        assert relative_error(found, expected) < 1e-13


@pytest.mark.parametrize("case", DENSE, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounds_no_worse_than_the_kernels_may(case: Case, dtype: torch.dtype) -> None:
    """Twice what the reference loses with the operands that kernels have: 22 bits beside float32, 11 beside 16-bit inputs."""
    x = inputs(case, dtype)
    oracle = exact(case, x)
    with RoundedProducts(22 if dtype == torch.float32 else 11):
        low = specification(case, x)
    floor = torch.finfo(torch.float32).eps
    check(portable(case, x), oracle, {n: 2 * max(relative_error(low[n], oracle[n]), floor) for n in oracle})


@pytest.mark.parametrize("forgets", [-50.0, -1e6, -1e9, float("-inf")])
def test_decays_that_forget_all(forgets: float) -> None:
    """What comes after a token that forgets all is as exact as after one of -111, whose exp is zero in float32 already."""
    case = Case("forgets", B=1, T=40, forgets=forgets)
    zero = replace(case, forgets=-111.0)

    def made(case: Case, seed: int) -> Inputs:
        return inputs(case, torch.float32, h_scale=1e8, seed=seed)  # forgotten, too

    draws = []  # the ulp of a sum near -111 is the error: a few sums draw it
    for seed in range(4):
        low, high = specification(zero, made(zero, seed)), exact(zero, made(zero, seed))
        draws.append({n: relative_error(low[n], high[n]) for n in low})
    allowed = {n: 2 * max(errors[n] for errors in draws) for n in draws[0]}
    for seed in range(4):
        x = made(case, seed)
        check(portable(case, x), exact(case, x), allowed)


@pytest.mark.parametrize("case", DENSE, ids=str)
@pytest.mark.parametrize(("k_scale", "h_scale"), [(1, 1), (1e-4, 1), (1e5, 1), (1, 1e-8), (1, 1e8)], ids=str)
def test_float16_products_lose_what_float16_products_must(case: Case, k_scale: float, h_scale: float) -> None:
    """Whatever the size of keys and states. Only the solve is in float16, so the states are as exact as ever."""
    x = inputs(case, torch.float32, k_scale, h_scale)
    oracle = exact(case, x)
    draws = []  # a single token is a single draw of its rounding
    for seed in range(3):
        with HalfProducts(seed):
            draws.append(relative_error(specification(case, x)["o"], oracle["o"]))
    allowed = {"o": 2 * max(draws)}
    single = specification(case, x)
    for name in ("h", "u"):
        allowed[name] = 2 * relative_error(single[name], oracle[name]) + torch.finfo(torch.float32).eps
    check(portable(case, x, mixed=True), oracle, allowed)


def worst_steps(K: int, kind: str) -> Inputs:
    """q, k, v, h, u of a step that the solve finds hard, of 8 heads; V = 2K, and U begins with I, so that o begins with x."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(8, *shape, generator=generator, dtype=torch.float64)

    keys, strong, q, v = normal(500, K), normal(1, K), normal(1, K), normal(500, K)
    if kind != "isotropic":
        keys = strong.expand(8, 500, K) if kind in ("rank-1", "q along the only key") else keys + 3 * strong
        q = strong if kind.startswith("q along") else q
    keys, q = (torch.nn.functional.normalize(x, dim=-1) for x in (keys, q))
    k, one = torch.zeros(8, 1, K), torch.zeros(8, 1, 2 * K)
    h, u = keys.mT @ keys, torch.cat([torch.eye(K).expand(8, K, K), keys.mT @ v], -1)
    if kind == "first token":
        k, one, h, u = keys[:, :1], v[:, :1].repeat(1, 1, 2), torch.zeros_like(h), torch.zeros_like(u)
    return [x.float().unsqueeze(0) for x in (q.squeeze(1), k.squeeze(1), one.squeeze(1), h, u)]


@pytest.mark.parametrize("kind", ["isotropic", "strong", "q along the strong key", "rank-1", "q along the only key", "first token"])
@pytest.mark.parametrize("K", [64, 128])
def test_step_in_powers_of_z_is_as_exact_as_the_chain(K: int, kind: str) -> None:
    """Doubling the degree rounds matrices instead of vectors; what it may lose is what the op's own chain of products does."""
    x = worst_steps(K, kind)
    rest = (None, None, None, None, 1.0, RIDGE_RATIO, NUM_ITER)
    oracle = reference.step(*(t.double() for t in x), *rest)[0]
    with RoundedProducts(22):
        low = reference.step(*x, *rest)[0]
    found, op = decompositions()[gka.step.default](*x, *rest)[0], gka.step(*x, *rest)[0]
    x_itself, read = slice(K), slice(K, None)  # U reads x along the keys, where it is small
    # what is read along the only key is off by 1.7e-6, 2.6 times what the chain may lose: not asserted
    for part in (x_itself,) if kind == "q along the only key" else (x_itself, read):
        error, once, allowed = (relative_error(o[..., part], oracle[..., part]) for o in (found, op, low))
        print(f"{error:.1e}, allowed {2 * allowed:.1e}, op {once:.1e}")
        assert error <= 2 * allowed


@pytest.mark.parametrize("num_iter", [1, 2, 3, 7, 8, 16, 30, 100])
@pytest.mark.parametrize("ridge_ratio", [0.02, 1e-3])
def test_step_takes_any_number_of_iterations(num_iter: int, ridge_ratio: float) -> None:
    q, k, v, g, gk, alpha, beta, h, u = inputs(Case(""), torch.float64)
    one = (q[:, 0], k[:, 0], v[:, 0], h, u, *(x[:, 0] for x in (g, gk, alpha, beta)), 1.0, ridge_ratio, num_iter)
    for found, expected in zip(decompositions()[gka.step.default](*one), gka.step(*one), strict=True):
        assert relative_error(found, expected) < 1e-13


def test_long_sequences_keep_the_digits_of_their_decay() -> None:
    """2000 chunks whose decays sum to −2000: a difference of running sums would be off by 1e-4."""
    total = -1 - 1e-3 * torch.rand(1, 1, 2000, generator=torch.Generator().manual_seed(0))
    found, running = decays_between(total), torch.nn.functional.pad(total.double().cumsum(-1), (1, 0))
    expected = (running.unsqueeze(-1) - running.unsqueeze(-2)).tril().exp().tril()
    assert relative_error(found.tril(), expected) < 1e-6
    assert not found.triu(1).any()
