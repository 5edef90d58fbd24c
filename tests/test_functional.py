"""The functional API: one function in chunks, in segments, packed and by steps; padding; dtypes; clear errors."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from helpers import DEVICE, INTERPRETED, Case, make_inputs, packing, relative_error

from gka_compile import GKAState, chunk_gka, num_iter_for, step_gka
from gka_compile.custom_ops import recurrent_gka
from gka_compile.custom_ops.config import chunk_size, gpu_chunk

# float64 where the reference runs, else what float32 kernels reach
DTYPE = torch.float32 if INTERPRETED or DEVICE == "cuda" else torch.float64
TOLERANCE = 4e-6 if torch.float32 == DTYPE else 1e-12
LENGTH = 20 if INTERPRETED else 150
gate_names = ("g", "gk", "alpha", "beta")


def inputs(case: Case, dtype: torch.dtype = DTYPE) -> dict[str, torch.Tensor]:
    return make_inputs(case, dtype, DEVICE)


def call(made: dict, where: slice = slice(None), state: object = None, **more: object) -> tuple:
    q, k, v = (made[n][:, where] for n in "qkv")
    gates = {n: None if made[n] is None else made[n][:, where] for n in gate_names}
    return chunk_gka(q, k, v, **gates, initial_state=state, output_final_state=True, **more)


def test_default_arguments_match_the_definition() -> None:
    made = inputs(Case("gqa", H=4, Hk=2, K=24, V=8, T=LENGTH))
    o, state = call(made, state=(made["h0"], made["u0"]))
    q, k, v, g, gk, alpha, beta, h0, u0 = (x.double().cpu() for x in made.values())
    oracle = recurrent_gka(q, k, v, g, gk, alpha, beta, initial_state=(h0, u0))
    for found, x in zip((o, *state), oracle, strict=True):
        assert relative_error(found, x) < TOLERANCE


def test_positional_order_is_that_of_flash_linear_attention() -> None:
    made = inputs(Case("order", T=5))
    q, k, v, g, gk, alpha, beta, h0, u0 = made.values()
    a, _ = chunk_gka(q, k, v, g, gk, alpha, 0.5, 0.1, 7, (h0, u0), True, None, beta=beta)
    b, _ = chunk_gka(
        q=q, k=k, v=v, g=g, gk=gk, alpha=alpha, scale=0.5, ridge_ratio=0.1, num_iter=7, initial_state=(h0, u0), beta=beta
    )
    assert torch.equal(a, b)


def test_segments_and_steps_are_the_whole() -> None:
    made = inputs(Case("segments", T=LENGTH, H=4, Hk=2))
    whole, end = call(made)
    cut = LENGTH // 3
    first, state = call(made, slice(0, cut))
    second, state = call(made, slice(cut, LENGTH - 2), state)
    outputs = [first, second]
    for t in (LENGTH - 2, LENGTH - 1):
        q, k, v = (made[n][:, t] for n in "qkv")
        o, state = step_gka(q, k, v, state, **{n: made[n][:, t] for n in gate_names})
        outputs.append(o[:, None])
    assert relative_error(torch.cat(outputs, 1), whole.cpu()) < TOLERANCE
    for found, x in zip(state, end, strict=True):
        assert relative_error(found, x.cpu()) < TOLERANCE


def test_packed_is_separate() -> None:
    case = Case("packed", B=1, T=40, lengths=(0, 5, 0, 16, 19), H=4, Hk=2)
    made = inputs(case)
    cu = packing(case, DEVICE)
    leaves = {n: None if x is None else x.requires_grad_() for n, x in made.items()}
    o, state = call(leaves, state=(leaves["h0"], leaves["u0"]), cu_seqlens=cu)
    for n, (start, end) in enumerate(zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)):
        alone, last = call(leaves, slice(start, end), (leaves["h0"][n : n + 1], leaves["u0"][n : n + 1]))
        assert relative_error(o[:, start:end], alone.detach().cpu()) < TOLERANCE
        assert relative_error(state.h_kk[n : n + 1], last.h_kk.detach().cpu()) < TOLERANCE
    # nothing leaks backwards either: the first 21 tokens do not hear of the last 19
    dv = torch.autograd.grad(o[:, 21:].square().sum(), leaves["v"], retain_graph=True)[0]
    assert dv[:, :21].abs().max() == 0
    assert dv[:, 21:].abs().max() > 0


def test_padding_leaves_the_state_bit_for_bit() -> None:
    made = inputs(Case("padded", T=3))
    h0, u0 = made["h0"], made["u0"]
    zeros = {n: torch.zeros_like(made[n]) for n in ("k", "v", "g", "gk")}
    padded = {**made, **zeros}
    _, state = call(padded, state=(h0, u0))
    assert torch.equal(state.h_kk, h0)
    assert torch.equal(state.h_kv, u0)
    q, k, v = (padded[n][:, 0] for n in "qkv")
    _, state = step_gka(q, k, v, (h0, u0), g=padded["g"][:, 0], gk=padded["gk"][:, 0], beta=padded["beta"][:, 0])
    assert torch.equal(state.h_kk, h0)
    assert torch.equal(state.h_kv, u0)
    # to the right of real tokens
    right = {n: None if x is None or n in ("h0", "u0") else torch.cat([x, zeros.get(n, x)], 1) for n, x in made.items()}
    _, longer = call(right)
    _, state = call(made)
    assert torch.equal(longer.h_kk, state.h_kk)
    assert torch.equal(longer.h_kv, state.h_kv)


@pytest.mark.parametrize("dtype", [DTYPE, torch.bfloat16, torch.float16], ids=str)
def test_left_padding_is_finite_and_without_effect(dtype: torch.dtype) -> None:
    case = Case("left", T=LENGTH, state=False)
    made = inputs(case, dtype)
    pad = 7
    padded = {}
    for n, x in made.items():
        padded[n] = None if x is None else torch.cat([torch.zeros_like(x[:, :pad]), x], 1).requires_grad_()
    with torch.no_grad():
        padded["q"][:, :pad] = 1.0
        padded["alpha"][:, :pad] = 0.5
    o, _ = call(padded)
    alone, _ = call(made)
    tolerance = {torch.bfloat16: 8e-3, torch.float16: 4e-3}.get(dtype, TOLERANCE)
    assert relative_error(o[:, pad:], alone.cpu()) < tolerance
    assert o[:, :pad].abs().max() == 0
    present = [x for x in padded.values() if x is not None]
    for gradient in torch.autograd.grad(o.float().square().sum(), present):
        assert gradient.isfinite().all()


def test_one_tensor_as_both_decays_adds_up() -> None:
    made = inputs(Case("shared", T=10))
    g, gk = made["g"].detach().requires_grad_(), made["g"].detach().clone().requires_grad_()
    loss = lambda a, b: call({**made, "g": a, "gk": b})[0].square().sum()  # noqa: E731
    dg, dgk = torch.autograd.grad(loss(g, gk), (g, gk))
    both = torch.autograd.grad(loss(g, g), g)[0]
    assert relative_error(both, (dg + dgk).cpu()) < 1e-6


def test_inputs_need_not_be_contiguous() -> None:
    made = inputs(Case("strided", T=10, H=4, Hk=2))
    o, state = call(made)

    def strided(x: torch.Tensor) -> torch.Tensor:
        wide = torch.stack([x, x], -1)[..., 0].transpose(0, -1).contiguous().transpose(0, -1)
        assert not wide.is_contiguous()
        return wide

    other, other_state = call({n: None if x is None else strided(x) for n, x in made.items()})
    assert torch.equal(o, other)
    assert torch.equal(state.h_kk, other_state.h_kk)


def test_inplace_step_updates_the_given_tensors() -> None:
    made = inputs(Case("inplace", T=1))
    q, k, v = (made[n][:, 0].contiguous() for n in "qkv")
    gates = {n: made[n][:, 0] for n in gate_names}
    state = GKAState(made["h0"].clone(), made["u0"].clone())
    o, new = step_gka(q, k, v, GKAState(made["h0"], made["u0"]), **gates)
    o_, same = step_gka(q, k, v, state, **gates, inplace=True)
    assert torch.equal(o, o_)
    assert same.h_kk is state.h_kk
    assert torch.equal(state.h_kk, new.h_kk)
    assert torch.equal(state.h_kv, new.h_kv)
    with pytest.raises(ValueError, match="inplace: expected no argument that requires grad"):
        step_gka(q.requires_grad_(), k, v, state, inplace=True)


def test_autocast_takes_q_k_v_and_leaves_decays_and_states() -> None:
    made = inputs(Case("autocast", T=20), torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        o, state = call(made, state=(made["h0"], made["u0"]))
    assert o.dtype == torch.bfloat16
    assert state.h_kk.dtype == torch.float32
    low = {n: made[n].bfloat16() if n in "qkv" else made[n] for n in made}
    expected, expected_state = call(low, state=(made["h0"], made["u0"]))
    assert torch.equal(o, expected)
    assert torch.equal(state.h_kk, expected_state.h_kk)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": None}, TypeError, "q: expected a Tensor, got NoneType"),
        ({"q": torch.zeros(2, 5, 16)}, ValueError, r"q: expected 4 dimensions \[B,T,heads,width\], got shape \(2, 5, 16\)"),
        ({"q": torch.zeros(2, 5, 4, 16, dtype=torch.int64)}, TypeError, "q: expected dtype float64, float32, float16 or bfloat16"),
        (
            {"k": torch.zeros(2, 5, 4, 16, dtype=torch.float16)},
            TypeError,
            r"k: expected dtype torch.float32 \(q's\), got torch.float16",
        ),
        ({"k": torch.zeros(2, 6, 4, 16)}, ValueError, r"k: expected shape \[B,T,Hk,K\] = \(2, 5, 4, 16\), got \(2, 6, 4, 16\)"),
        (
            {"k": torch.zeros(2, 5, 3, 16), "v": torch.zeros(2, 5, 3, 8)},
            ValueError,
            "k: expected a number of key/value heads Hk that divides the 4 heads of q, got 3",
        ),
        (
            {"q": torch.zeros(2, 5, 4, 12), "k": torch.zeros(2, 5, 4, 12)},
            ValueError,
            "q: expected a head width K that is a multiple of 8 from 8 to 128, got 12",
        ),
        ({"v": torch.zeros(2, 5, 4, 136)}, ValueError, "v: expected a head width V .* got 136"),
        ({"g": torch.zeros(2, 5, 1)}, ValueError, r"g: expected shape \[B,T,H\] = \(2, 5, 4\), got \(2, 5, 1\)"),
        (
            {"alpha": torch.zeros(2, 5, 4, dtype=torch.float16)},
            TypeError,
            r"alpha: expected dtype float32 or torch.float32 \(q's\)",
        ),
        ({"num_iter": 0}, ValueError, "num_iter: expected at least 1, got 0"),
        ({"num_iter": 3.0}, TypeError, "num_iter: expected an int, got float"),
        ({"ridge_ratio": 0.0}, ValueError, r"ridge_ratio: expected a positive number from .*, got 0\.0"),
        ({"ridge_ratio": float("nan")}, ValueError, "ridge_ratio: expected a positive number from .*, got nan"),
        ({"scale": True}, TypeError, "scale: expected a float or None, got bool"),
        ({"scale": float("inf")}, ValueError, "scale: expected a finite number, got inf"),
        ({"ridge_ratio": True}, TypeError, "ridge_ratio: expected a float, got bool"),
        ({n: torch.zeros(2, 5, 0, 8) for n in "qkv"}, ValueError, r"q: expected at least one head, got shape \(2, 5, 0, 8\)"),
        ({"scale": "1"}, TypeError, "scale: expected a float or None, got str"),
        (
            {"initial_state": torch.zeros(3)},
            TypeError,
            r"initial_state: expected a GKAState or another pair \(h_kk, h_kv\), got Tensor",
        ),
        (
            {"initial_state": (torch.zeros(2, 4, 16, 8), torch.zeros(2, 4, 16, 8))},
            ValueError,
            r"initial_state\.h_kk: expected shape \[N,H,K,K\] = \(2, 4, 16, 16\), got \(2, 4, 16, 8\)",
        ),
        (
            {"initial_state": (torch.zeros(2, 4, 16, 16).half(), torch.zeros(2, 4, 16, 8))},
            TypeError,
            r"initial_state\.h_kk: expected dtype torch.float32, got torch.float16",
        ),
        ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, r"cu_seqlens: expected packed sequences .* \(B = 1\), got B = 2"),
        ({"cu_seqlens": torch.tensor([0.0, 5.0])}, TypeError, "cu_seqlens: expected dtype int32 or int64, got torch.float32"),
        ({"cu_seqlens": torch.tensor([0])}, ValueError, r"cu_seqlens: expected shape \[N\+1\] with N >= 1, got \(1,\)"),
    ],
)
def test_bad_input_is_named(change: dict, error: type[Exception], message: str) -> None:
    given = {"q": torch.zeros(2, 5, 4, 16), "k": torch.zeros(2, 5, 4, 16), "v": torch.zeros(2, 5, 4, 8)}
    with pytest.raises(error, match=message):
        chunk_gka(**{**given, **change})


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ([0, 3, 4], "expected to start at 0 and end at T = 5, got 0 and 4"),
        ([1, 5], "expected to start at 0 and end at T = 5, got 1 and 5"),
        ([0, 4, 3, 5], r"expected non-decreasing bounds, got \[0, 4, 3, 5\]"),
    ],
)
def test_bad_packing_is_named(bounds: list[int], message: str) -> None:
    q = torch.zeros(1, 5, 2, 8)
    with pytest.raises(ValueError, match=f"cu_seqlens: {message}"):
        chunk_gka(q, q, q, cu_seqlens=torch.tensor(bounds))


def test_forward_mode_is_refused() -> None:
    """It takes an op of torch.library for a constant: derivatives would be zero or, in a layer, a part of what they are."""
    q, k, v = (torch.randn(1, 5, 2, 8) for _ in range(3))
    state = (torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 8, 8))
    calls = (
        lambda q: chunk_gka(q, k, v)[0],
        lambda v: chunk_gka(q, k, v)[0],
        lambda q: step_gka(q[:, 0], k[:, 0], v[:, 0], state)[0],
    )
    for call in calls:
        with pytest.raises(NotImplementedError, match="forward-mode AD"):
            torch.func.jvp(call, (q,), (q,))
        with pytest.raises(NotImplementedError, match="forward-mode AD"):
            torch.func.jacfwd(call)(q)
    with torch.autograd.forward_ad.dual_level():
        chunk_gka(q, k, v)
        with pytest.raises(NotImplementedError, match="forward-mode AD"):
            chunk_gka(q, torch.autograd.forward_ad.make_dual(k, k), v)


def test_bad_step_is_named() -> None:
    q, h = torch.zeros(2, 4, 16), torch.zeros(2, 4, 16, 16)
    with pytest.raises(ValueError, match=r"q: expected 3 dimensions \[B,heads,width\]"):
        step_gka(q[None], q, q, (h, h))
    with pytest.raises(ValueError, match=r"state\.h_kv: expected shape \[N,H,K,V\]"):
        step_gka(q, q, q, (h, h[..., :8]))
    with pytest.raises(ValueError, match="state: expected two tensors to update in place, got one for both"):
        step_gka(q, q, q, (h, h), inplace=True)
    with pytest.raises(ValueError, match="scale: expected a finite number, got 1000"):
        step_gka(q, q, q, (h, h), scale=10**400)


def test_chunk_lengths_are_powers_of_two_that_tensor_cores_take() -> None:
    assert chunk_size(torch.device("cpu"), 2, 64, 64) == 64
    for major in (8, 9, 10, 12):
        for itemsize in (2, 4):
            for width in range(8, 129, 8):
                assert gpu_chunk(major, itemsize, width, width) in (16, 32, 64)


def test_cold_import_registers_the_ops() -> None:
    code = "import torch, gka_compile; print(torch.ops.gka.chunk_state.default, torch.ops.gka.step_.default)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.split() == ["gka.chunk_state.default", "gka.step_.default"], run.stderr


def test_import_without_triton_says_what_is_missing_only_when_asked() -> None:
    code = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch, gka_compile
q = torch.zeros(1, 3, 1, 8)
gka_compile.chunk_gka(q, q, q)
import os; os.environ["TRITON_INTERPRET"] = "1"
try:
    gka_compile.chunk_gka(q, q, q)
except RuntimeError as error:
    print(error)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert "Triton, which is not installed: pip install triton" in run.stdout, run.stderr


@pytest.mark.parametrize("ridge_ratio", [0.02, 0.5])
@pytest.mark.parametrize("tolerance", [0.3, 1e-2, 1e-3])
def test_num_iter_for_is_enough_and_no_more_than_it_takes(tolerance: float, ridge_ratio: float) -> None:
    # one head has a spectrum of all sizes, the other has rank one and a query that its key does not see: the worst case
    K = 16
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(K, K, generator=generator, dtype=torch.float64)).Q
    broad = basis * torch.logspace(0, -6, K, dtype=torch.float64) @ basis.mT
    h = torch.stack([broad, basis[:, :1] @ basis[:, :1].mT])[None]
    q = torch.stack([torch.randn(K, generator=generator, dtype=torch.float64), basis[:, 1]])[None]
    ridge = ridge_ratio * torch.linalg.matrix_norm(h)[..., None, None] * torch.eye(K, dtype=torch.float64)
    exact = torch.linalg.solve(h + ridge, q)

    def error(num_iter: int) -> torch.Tensor:
        zero, u = torch.zeros_like(q), torch.eye(K, dtype=torch.float64).expand_as(h).contiguous()  # o is x
        tensors = [x.to(DEVICE, DTYPE) for x in (q, zero, zero, h, u)]
        o, _ = step_gka(*tensors[:3], (tensors[3], tensors[4]), scale=1.0, ridge_ratio=ridge_ratio, num_iter=num_iter)
        return (o.cpu().double() - exact).norm(dim=-1) / exact.norm(dim=-1)

    num_iter = num_iter_for(tolerance, ridge_ratio)
    assert (error(num_iter) <= tolerance + TOLERANCE).all()
    assert num_iter == 1 or error(num_iter - 1)[0, 1] > tolerance


def test_num_iter_for_refuses_what_is_no_tolerance() -> None:
    for tolerance in (0.0, 1.0, -1e-3, float("nan")):
        with pytest.raises(ValueError, match=r"tolerance: expected a number between 0 and 1, got"):
            num_iter_for(tolerance)
    with pytest.raises(TypeError, match="tolerance: expected a float, got int"):
        num_iter_for(1)
    for ridge_ratio in (0.0, 1e-11, 1e11, float("nan")):
        with pytest.raises(ValueError, match=r"ridge_ratio: expected a positive number from 1e-10 to 1e\+10, got"):
            num_iter_for(1e-3, ridge_ratio)
    assert num_iter_for(1e-3, 1e-10) > num_iter_for(1e-3) > num_iter_for(1e-3, 1e10) == 1
    assert num_iter_for(5e-324) > num_iter_for(1e-3) > num_iter_for(0.999) == 1
