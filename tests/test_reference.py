"""The reference against independent mathematics: linear solves, autograd, and the recursions that GKA generalises."""

from __future__ import annotations

import pytest
import torch
from helpers import CASES, RIDGE_RATIO, SCALE, Case, make_cotangents, make_inputs, relative_error, run_reference

from gka_compile.custom_ops.polynomial import chebyshev_coefficients, chebyshev_tau
from gka_compile.custom_ops.reference import num_slots, recurrent_gka, step

EXACT = 150  # iterations after which the polynomial is the solve: 0.754^150 = 4e-19


def recurrent(case: Case, inputs: dict, num_iter: int | None) -> tuple:
    """recurrent_gka of a case, packed sequences one by one."""
    q, k, v, g, gk, alpha, beta, h0, u0 = inputs.values()
    if not case.lengths:
        return recurrent_gka(q, k, v, g, gk, alpha, beta, SCALE, RIDGE_RATIO, num_iter, None if h0 is None else (h0, u0))
    parts, start = [], 0
    for n, length in enumerate(case.lengths):
        cut = [None if x is None else x[:, start : start + length] for x in (q, k, v, g, gk, alpha, beta)]
        state = None if h0 is None else (h0[n : n + 1], u0[n : n + 1])
        parts.append(recurrent_gka(*cut, SCALE, RIDGE_RATIO, num_iter, state))
        start += length
    o, h, u = zip(*parts, strict=True)
    return torch.cat(o, 1), torch.cat(h), torch.cat(u)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_chunked_is_the_exact_solve_and_its_gradient(case: Case) -> None:
    inputs = make_inputs(case, torch.float64)
    leaves = {name: None if x is None else x.requires_grad_() for name, x in inputs.items()}
    outputs = recurrent(case, leaves, None)
    cotangents = tuple(x.double() for x in make_cotangents(case, torch.float64))
    present = {name: x for name, x in leaves.items() if x is not None}
    tied = [(x, c) for x, c in zip(outputs, cotangents, strict=True) if x.requires_grad]  # not o of no tokens
    gradients = torch.autograd.grad(
        [x for x, _ in tied], list(present.values()), [c for _, c in tied], allow_unused=True, materialize_grads=True
    )
    oracle = dict(zip(("o", "h", "u"), outputs, strict=True))
    oracle |= {f"d{name}": x for name, x in zip(present, gradients, strict=True)}
    if "dh0" in oracle:
        oracle["dh0"] = 0.5 * (oracle["dh0"] + oracle["dh0"].mT)
    with torch.no_grad():
        found = run_reference(case, torch.float64, torch.float64, num_iter=EXACT, cotangents=cotangents)
    assert found.keys() == oracle.keys()
    for name, x in oracle.items():
        assert relative_error(found[name], x.detach()) < 1e-11, name


@pytest.mark.parametrize("num_iter", [1, 2, 3, 10, 30])
def test_series_is_the_paper_iteration(num_iter: int) -> None:
    case = CASES[0]
    inputs = make_inputs(case, torch.float64)
    o, _, _ = recurrent(case, inputs, num_iter)
    found = run_reference(case, torch.float64, torch.float64, num_iter=num_iter)
    assert relative_error(found["o"], o) < 1e-12


def test_step_is_the_recurrence() -> None:
    inputs = make_inputs(Case("gqa", H=4, Hk=2, K=24, V=8, T=9), torch.float64)
    q, k, v, g, gk, alpha, beta, h, u = inputs.values()
    o, h_end, u_end = recurrent_gka(q, k, v, g, gk, alpha, beta, SCALE, RIDGE_RATIO, 30, (h, u))
    for t in range(q.shape[1]):
        gates = (x[:, t] for x in (g, gk, alpha, beta))
        ot, h, u = step(q[:, t], k[:, t], v[:, t], h, u, *gates, SCALE, RIDGE_RATIO, 30)
        assert relative_error(ot, o[:, t]) < 1e-12
    assert relative_error(h, h_end) < 1e-14
    assert relative_error(u, u_end) < 1e-14


@pytest.mark.parametrize("ridge_ratio", [1e-3, 0.02, 0.5, 3.0])
def test_truncation_shrinks_by_tau_each_iteration(ridge_ratio: float) -> None:
    # the residual of degree N is T_{N+1}(−Z)/T_{N+1}(w): at most 2 τ^{N+1} over the whole spectrum, reached at its ends
    z = torch.linspace(-1, 1, 2001, dtype=torch.float64)
    for num_iter in (1, 5, 30):
        c = chebyshev_coefficients(ridge_ratio, num_iter)
        basis = torch.cos(torch.arange(num_iter + 1, dtype=torch.float64)[:, None] * z.clamp(-1, 1).acos())
        x = (torch.tensor(c, dtype=torch.float64)[:, None] * basis).sum(0)  # φ x for q = 1
        residual = (1 - x * (0.5 * (z + 1) + ridge_ratio)).abs().max().item()
        tau = chebyshev_tau(ridge_ratio)
        bound = 2 * tau ** (num_iter + 1) / (1 + tau ** (2 * (num_iter + 1)))
        assert residual == pytest.approx(bound, rel=1e-6, abs=1e-14)


def test_num_iter_zero_limit_is_gated_linear_attention() -> None:
    case = Case("alpha-zero", T=20)
    inputs = make_inputs(case, torch.float64)
    inputs["alpha"] = torch.zeros_like(inputs["alpha"])
    o, _, _ = recurrent(case, inputs, 30)
    q, k, v, g, _, _, beta, _, u = inputs.values()
    k, v = k * beta[..., None], v * beta[..., None]
    for t in range(case.T):
        u = u * g[:, t].exp()[..., None, None] + k[:, t, :, :, None] * v[:, t, :, None, :]
        assert relative_error(o[:, t], SCALE * (q[:, t, :, None, :] @ u)[:, :, 0]) < 1e-13


def test_fixed_ridge_is_a_steady_state_kalman_filter() -> None:
    # no decay, fixed λ: S_t = U_tᵀ (H_t + λI)^{-1} follows the Kalman recursion with gain k/(1 + kᵀΦk) (Sherman-Morrison)
    generator = torch.Generator().manual_seed(0)
    K, V, T, lam = 8, 5, 30, 0.3
    k, v = (torch.randn(T, n, generator=generator, dtype=torch.float64) for n in (K, V))
    S, phi = torch.zeros(V, K, dtype=torch.float64), torch.eye(K, dtype=torch.float64) / lam
    h, u = torch.zeros(K, K, dtype=torch.float64), torch.zeros(K, V, dtype=torch.float64)
    for t in range(T):
        gain = phi @ k[t] / (1 + k[t] @ phi @ k[t])
        S = S - torch.outer(S @ k[t] - v[t], gain)
        phi = phi - torch.outer(gain, k[t] @ phi)
        h, u = h + torch.outer(k[t], k[t]), u + torch.outer(k[t], v[t])
        direct = torch.linalg.solve(h + lam * torch.eye(K, dtype=torch.float64), u).T
        assert relative_error(S, direct) < 1e-12


def test_identity_covariance_is_deltanet() -> None:
    # the covariance held at identity: the Kalman gain for a unit key is βk with β = 1/(1 + r)
    generator = torch.Generator().manual_seed(0)
    K, V, r = 8, 5, 0.7
    k = torch.nn.functional.normalize(torch.randn(K, generator=generator, dtype=torch.float64), dim=0)
    v, S = torch.randn(V, generator=generator, dtype=torch.float64), torch.randn(K, V, generator=generator, dtype=torch.float64)
    gain = k / (k @ k + r)
    beta = 1 / (1 + r)
    deltanet = (torch.eye(K, dtype=torch.float64) - beta * torch.outer(k, k)) @ S + beta * torch.outer(k, v)
    assert relative_error(S + torch.outer(gain, v - k @ S), deltanet) < 1e-14


def test_slots_of_packed_sequences_never_overlap() -> None:
    for lengths in ((0, 0, 1), (16, 16), (15, 1, 17, 0, 33), (1,) * 20):
        cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
        taken: set[int] = set()
        for n, length in enumerate(lengths):
            slots = {int(cu[n]) // 16 + n + i for i in range(-(-length // 16))}
            assert not taken & slots
            taken |= slots
        assert not taken or max(taken) < num_slots(1, int(cu[-1]), cu, 16)
