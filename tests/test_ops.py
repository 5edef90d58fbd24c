"""The ops against the float64 reference: CPU kernels here, Triton kernels on a GPU, and the same Triton source interpreted.

Which of the three runs is a matter of the machine and of TRITON_INTERPRET; test_interpreter.py runs this file a second time.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import (
    CASES,
    DEVICE,
    DTYPES,
    INTERPRETED,
    NUM_ITER,
    RIDGE_RATIO,
    SCALE,
    Case,
    budget,
    check,
    make_cotangents,
    make_inputs,
    packing,
    relative_error,
    run_ops,
    run_reference,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from gka_compile.custom_ops import config, ops, pieces, reference
from gka_compile.custom_ops.config import chunk_size

WIDE = (
    Case("wide", B=1, T=150, K=128, V=128),
    Case("square", B=1, T=150, K=64, V=64),
    Case("wide-k", B=1, T=150, K=128, V=64),
    Case("narrow-v", B=1, T=150, K=64, V=16),
    Case("odd", B=2, T=70, H=4, Hk=2, K=40, V=24, given=(), state=False),
    Case("wide-v", B=1, T=70, K=32, V=128),
    Case("packed-wide", B=1, T=200, lengths=(0, 3, 130, 67), K=128, V=128),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients(case: Case, dtype: torch.dtype) -> None:
    if INTERPRETED and dtype == torch.float16 and case is not CASES[0]:
        pytest.skip("slow in the interpreter, and bfloat16 inputs take the same path: float16 products")
    oracle = run_reference(case, dtype, torch.float64)
    check(run_ops(case, dtype, DEVICE), oracle, budget(case, dtype, oracle))


@pytest.mark.parametrize("forgets", [-50.0, -1e6, -1e9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d).removeprefix("torch."))
def test_decays_that_forget_all(dtype: torch.dtype, forgets: float) -> None:
    """What comes after a token that forgets all is as exact as after one of -111, whose exp is zero in float32 already."""
    case = Case("forgets", B=1, T=40, forgets=forgets)
    zero = replace(case, forgets=-111.0)
    allowed = budget(zero, dtype, run_reference(zero, dtype, torch.float64, 32), 32)
    # the kernels' sums of decays are in base 2: numbers 1.44 times as large have an ulp of up to twice the reference's
    allowed = {name: 2 * x for name, x in allowed.items()}
    check(run_ops(case, dtype, DEVICE, 32), run_reference(case, dtype, torch.float64, 32), allowed)


@pytest.mark.parametrize("decay", [-3.0, -6.0])
@pytest.mark.parametrize("gate", ["g", "gk"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_gradient_of_strong_decays(dtype: torch.dtype, gate: str, decay: float) -> None:
    """It is small beside the terms that it is a sum of, and so is its sum over the tokens, which is what a layer trains."""
    case = Case("fades", T=100, given=(gate,), state=False, decay=decay)
    # of the exact solve: truncation adds 5e-4
    exact = run_reference(case, dtype, torch.float64, num_iter=200)[f"d{gate}"]
    found = run_ops(case, dtype, DEVICE)[f"d{gate}"]
    assert relative_error(found, exact) < 3e-3
    assert relative_error(found.sum((0, 1)), exact.sum((0, 1))) < 3e-3


@pytest.mark.skipif(INTERPRETED, reason="minutes in the interpreter; the same code path is covered by the small widths")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", WIDE, ids=str)
def test_outputs_and_gradients_at_full_width(case: Case, dtype: torch.dtype) -> None:
    chunk = chunk_size(torch.device(DEVICE), dtype.itemsize, case.K, case.V)
    oracle = run_reference(case, dtype, torch.float64)
    found = run_ops(case, dtype, DEVICE, chunk)
    check(found, oracle, budget(case, dtype, oracle, chunk))


@pytest.mark.skipif(not INTERPRETED and DEVICE == "cpu", reason="the reference scans once")
@pytest.mark.parametrize(("room", "chunks_in_first"), [(2, None), (3, 3), (9, 2)])
@pytest.mark.parametrize(
    "case",
    [
        Case("all", B=1, T=120, V=24),
        Case("plain", B=2, T=113, given=("g", "gk"), state=False),
        Case("packed", B=1, T=170, lengths=(113, 0, 20, 37), H=4, Hk=2),
    ],
    ids=str,
)
def test_scan_in_segments(case: Case, room: int, chunks_in_first: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    from gka_compile.custom_ops.kernels import state

    cu, sequences, blocks = packing(case), len(case.lengths) or case.B, 2
    slots: Any = slice(None)
    if cu is not None:  # some stay empty
        slots = [first + i for first, n in reference._sequence_slots(cu, 16) for i in range(n)]
    monkeypatch.setattr(config, "SEGMENTED_CHUNKS", 3)
    monkeypatch.setattr(config, "scan_programs", lambda chunk_size: room * sequences * case.H * blocks)
    totals: list[torch.Tensor] = []
    wrap_triton = state.wrap_triton

    class Spy:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: object) -> Any:
            def launch(*args: Any, **named: Any) -> None:
                wrap_triton(self.kernel)[grid](*args, **named)
                totals.extend([args[8].clone()] if named.get("ENDS") else [])

            return launch

    monkeypatch.setattr(state, "wrap_triton", Spy)
    for dtype in (torch.float32, torch.bfloat16):
        made = make_inputs(case, dtype, DEVICE)
        k, v, g, gk, beta, h0, u0 = (made[name] for name in ("k", "v", "g", "gk", "beta", "h0", "u0"))
        if beta is not None and dtype == torch.bfloat16:
            beta[:, 32:] *= 1e-3  # what bounds a state lies in earlier segments
        found = ops.chunk_state(k, v, g, gk, beta, h0, u0, packing(case, DEVICE), case.H, 16)
        exact = [None if x is None else x.double().cpu() for x in (k, v, g, gk, beta, h0, u0)]
        expected = reference.chunk_state(*exact, cu, case.H, 16)
        for i, name in enumerate(("h_chunks", "u_chunks")):
            x, y = (states[i].double().cpu() * states[2][..., i].double().cpu()[..., None, None] for states in (found, expected))
            assert relative_error(x[slots], y[slots]) < (2e-6 if dtype == torch.float32 else 5e-4), name
            assert found[i][slots].abs().max() < 2, name  # divided by a power of two near a bound
        for name, x, y in zip(("h", "u"), found[3:], expected[3:], strict=True):
            assert relative_error(x, y) < (2e-6 if dtype == torch.float32 else 5e-4), name
    assert len(totals) == (2 if chunks_in_first else 0)
    if chunks_in_first:
        assert gk is not None
        # what the first segment of the first sequence and head leaves of the state before it
        left = gk[0, : 16 * chunks_in_first, 0].sum().exp().item()
        assert [x[0, 0].item() for x in totals] == pytest.approx(2 * [left], rel=1e-5)


@pytest.mark.skipif(not INTERPRETED and DEVICE == "cpu", reason="the reference does all at once")
@pytest.mark.parametrize(
    ("most", "cut", "dtype"),
    [(6, (2, 3), torch.float32), (2, (1, 2), torch.float32), (2, (1, 2), torch.bfloat16)],
    ids=["sequences-float32", "parts-float32", "parts-bfloat16"],
)
@pytest.mark.parametrize(
    "case", [Case("all", B=3, T=40, H=1, Hk=1, V=24), Case("plain", B=3, T=40, Hk=1, given=(), state=False)], ids=str
)
def test_gradients_in_pieces(
    case: Case, most: int, cut: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gka_compile.custom_ops.kernels import backward

    made = make_inputs(case, dtype)
    k, v = made["k"], made["v"]
    assert k is not None
    assert v is not None
    oracle = run_reference(case, dtype, torch.float64)
    whole = run_ops(case, dtype, DEVICE)
    stored = 2 if dtype == torch.bfloat16 else 4
    monkeypatch.setattr(config, "PIECE_BYTES", most * stored * case.H * case.K * (case.K + case.V))
    assert pieces.piece_sizes(k, v, None, case.H, 16) == cut
    launched: list[tuple[int, int]] = []
    launch = backward._launch_piece

    def spy(rows: tuple, *args: object) -> None:
        launched.append(tuple(rows[0].shape[:2]))
        launch(rows, *args)

    monkeypatch.setattr(backward, "_launch_piece", spy)
    found = run_ops(case, dtype, DEVICE)
    # the gradient of o, and that of the final states
    assert launched == 2 * ([(2, 40), (1, 40)] if cut[0] == 2 else 3 * [(1, 8), (1, 32)])
    check(found, oracle, budget(case, dtype, oracle))
    if cut[1] == 3:  # whole sequences: nothing is computed otherwise
        for name, x in whole.items():
            assert torch.equal(x, found[name]), name
    if dtype == torch.float32:
        monkeypatch.setattr(backward, "TENSORS", frozenset())  # as where it is traced
        for name, x in run_ops(case, dtype, DEVICE).items():
            assert torch.equal(x, found[name]), name


@pytest.mark.parametrize(
    ("B", "T", "cut", "traced"),
    [
        (2, 64, None, None),
        (5, 64, (2, 4), (2, 4)),
        (64, 64, (2, 4), (16, 4)),
        (1, 640, (1, 8), (1, 10)),
        (2, 640, (1, 8), (1, 20)),
        (3, 640, (1, 8), (1, 40)),
        (9, 640, (1, 8), (3, 40)),
    ],
)
def test_pieces_are_few_where_they_are_traced(
    B: int, T: int, cut: tuple[int, int], traced: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    H = 2
    monkeypatch.setattr(config, "PIECE_BYTES", 8 * 4 * H * 16 * 32)  # eight chunks
    k = torch.zeros(B, T, H, 16)
    assert pieces.piece_sizes(k, k, None, H, 16) == cut
    with FakeTensorMode() as fake:
        fake_k = fake.from_tensor(k)
        assert pieces.piece_sizes(fake_k, fake_k, None, H, 16) == traced


@pytest.mark.parametrize("B", [1, 3])
def test_starts_of_pieces_do_not_keep_all_states(B: int, monkeypatch: pytest.MonkeyPatch) -> None:
    k, H, chunks = torch.zeros(B, 40, 2, 16), 2, 3
    sizes = ((16, 16), (16, 16), (2, 1))
    states = [torch.arange(B * chunks).view(-1, 1, 1, 1).repeat(1, H, *size) for size in sizes]
    monkeypatch.setattr(config, "PIECE_BYTES", 2 * 4 * H * 16 * 32)  # two chunks
    for x in pieces.piece_starts(k, k, None, H, 16, states):
        assert x is not None
        assert x.shape[:2] == (B, 1)
        assert x[:, 0, 0, 0, 0].tolist() == [chunks * b + 2 for b in range(B)]
        assert x.untyped_storage().nbytes() == x.nbytes


def step_inputs(case: Case, dtype: torch.dtype, device: str = DEVICE) -> tuple:
    made = make_inputs(case, dtype, device)
    q, k, v, g, gk, alpha, beta, h, u = (x if x is None or n in ("h0", "u0") else x[:, 0].contiguous() for n, x in made.items())
    return q, k, v, h, u, g, gk, alpha, beta


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("num_iter", [1, 2, 29, 30])
@pytest.mark.parametrize("case", [CASES[0], CASES[7], Case("bare", given=()), Case("wide", K=128, V=64)], ids=str)
def test_step(case: Case, dtype: torch.dtype, num_iter: int) -> None:
    inputs = step_inputs(case, dtype)
    exact = [None if x is None else x.double().cpu() for x in inputs]
    o, h, u = reference.step(*exact, SCALE, RIDGE_RATIO, num_iter)
    low = reference.step(*(None if x is None else x.cpu() for x in inputs), SCALE, RIDGE_RATIO, num_iter)
    kept = [x.clone() for x in inputs[3:5]]
    found = ops.step(*inputs, SCALE, RIDGE_RATIO, num_iter)
    for name, x, y, z in zip("ohu", found, (o, h, u), low, strict=True):
        # the interpreter cuts bfloat16 off where a GPU rounds: one more unit in the last place of o
        cut = 2 if INTERPRETED and dtype == torch.bfloat16 else 1
        # the order of a sum moves the error of a single small case about: allow one rounding per iteration in any case
        assert relative_error(x, y) <= 2 * cut * max(relative_error(z, y), (num_iter + 1) * 2**-25), name
    assert all(torch.equal(a, b) for a, b in zip(kept, inputs[3:5], strict=True)), "step changed its input states"
    o_ = ops.step_(*inputs, SCALE, RIDGE_RATIO, num_iter)
    assert torch.equal(o_, found[0])
    assert torch.equal(inputs[3], found[1])
    assert torch.equal(inputs[4], found[2])


def test_step_gradient_is_that_of_a_one_token_sequence() -> None:
    case = Case("step", T=1, H=4, Hk=2)
    dtype = torch.float32 if INTERPRETED or DEVICE == "cuda" else torch.float64
    inputs = [x.requires_grad_() for x in step_inputs(case, dtype)]
    outputs = ops.step(*inputs, SCALE, RIDGE_RATIO, NUM_ITER)
    oracle = run_reference(case, dtype, torch.float64)
    do, dh, du = make_cotangents(case, dtype)
    cotangents = [x.to(outputs[0]).to(DEVICE) for x in (do[:, 0], dh, du)]
    gradients = torch.autograd.grad(outputs, inputs, cotangents)
    names = ("dq", "dk", "dv", "dh0", "du0", "dg", "dgk", "dalpha", "dbeta")
    for name, x in zip(names, gradients, strict=True):
        expected = oracle[name] if name in ("dh0", "du0") else oracle[name][:, 0]
        assert relative_error(x, expected) < (1e-12 if dtype == torch.float64 else 4e-6), name


def chain(dtype: torch.dtype, case: Case) -> list[tuple]:
    """(op, arguments) of every op, each fed by those before it."""
    made = make_inputs(case, dtype, DEVICE)
    q, k, v, g, gk, alpha, beta, h0, u0 = made.values()
    chunk = 16
    calls: list[tuple] = []

    def call(op: object, *args: object) -> tuple:
        calls.append((op, args))
        return op(*args)  # type: ignore[operator]

    *states, _h, _u = call(ops.chunk_state, k, v, g, gk, beta, h0, u0, None, case.H, chunk)
    parameters = (None, SCALE, RIDGE_RATIO, NUM_ITER, chunk)
    o, x, x_scale, phi = call(ops.chunk_output, q, k, v, g, gk, alpha, beta, h0, u0, *states, *parameters)
    read = (torch.ones_like(o), q, alpha, x, x_scale, phi)
    rest = (h0, u0, None, None, None, *parameters[:-1], case.H, chunk)
    call(ops.chunk_bwd, k, v, g, gk, beta, h0, u0, *read, *rest)
    call(ops.chunk_bwd, k, v, g, gk, beta, h0, u0, *(None,) * 6, *rest)
    one = step_inputs(case, dtype)
    call(ops.step, *one, SCALE, RIDGE_RATIO, NUM_ITER)
    calls.append((ops.step_, (*one, SCALE, RIDGE_RATIO, NUM_ITER)))
    return calls


@pytest.mark.parametrize("given", [(), ("g", "gk", "alpha", "beta")], ids=["bare", "all"])
@pytest.mark.parametrize("index", range(6), ids=["state", "output", "bwd", "bwd-of-states", "step", "step_"])
def test_opcheck(index: int, given: tuple[str, ...]) -> None:
    op, args = chain(torch.float32, Case("opcheck", B=2, T=20, given=given))[index]
    if op in (ops.chunk_state, ops.chunk_output, ops.step):
        differentiable = range(9 if op is not ops.chunk_state else 7)
        args = tuple(a.requires_grad_() if i in differentiable and isinstance(a, torch.Tensor) else a for i, a in enumerate(args))
    # AOT dispatch of a Triton op opens it, and an interpreted kernel has no intermediate code to look into
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(op, args, test_utils=tests if INTERPRETED else (*tests, "test_aot_dispatch_dynamic"))


@pytest.mark.parametrize("magnitude", [1e-9, 1e-3, 1e3, 1e6])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_any_magnitude(magnitude: float, dtype: torch.dtype) -> None:
    """H scaled by magnitude²: x scales by its inverse, and no float16 operand over- or underflows."""
    made = make_inputs(Case("scaled", T=20, given=("gk", "beta"), state=False), dtype, DEVICE)
    q, k, v, _, gk, _, beta, _, _ = made.values()

    def run(factor: float) -> torch.Tensor:
        *states, _, _ = ops.chunk_state(k, v, None, gk, beta * factor, None, None, None, 2, 16)
        unused = (None, None)
        read = (*states, None, SCALE, RIDGE_RATIO, NUM_ITER, 16)
        return ops.chunk_output(q, k, v, None, gk, None, beta * factor, *unused, *read)[0].cpu()

    # o = Uᵀx, and both scale by factor² and its inverse: the same output
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 1.6e-2}[dtype]
    assert relative_error(run(magnitude), run(1.0)) < tolerance


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_keys_of_zeros_while_the_state_decays(dtype: torch.dtype) -> None:
    """The squares of what is left leave float32 long before it does; from 2^-100 on it counts as zero, and so does x."""
    case = Case("zeros", B=1, T=120, given=("gk",), state=False, decay=-1.0)
    q, k, v, _, gk, *_ = make_inputs(case, dtype, DEVICE).values()
    assert k is not None
    assert q is not None
    k[:, 8:], q[:, 8:] = 0, q[:, 7:8]  # H is a multiple of that of token 7, and x of its x
    *states, _, _ = ops.chunk_state(k, v, None, gk, None, None, None, None, case.H, 16)
    read = (*states, None, SCALE, RIDGE_RATIO, NUM_ITER, 16)
    _, x, x_scale, phi = (t.double().cpu() for t in ops.chunk_output(q, k, v, None, gk, None, None, None, None, *read))
    expected = phi[:, 7:8] * torch.arange(113)[:, None].neg().double().exp()
    zero = 7 + int((expected[0, :, 0] > 2**-100).sum())
    assert (phi[:, zero + 1 :] == 0).all()
    assert (x_scale[:, zero + 1 :] == 0).all()
    solution = x * (x_scale * phi)[..., None]
    allowed, tolerance = (2e-6, 1e-5) if dtype == torch.float32 else (2e-4, 2e-2)
    for t in range(8, zero):
        assert relative_error(phi[:, t], expected[:, t - 7]) < allowed, t
        assert relative_error(solution[:, t], solution[:, 7]) < tolerance, t


@pytest.mark.skipif(INTERPRETED, reason="counting does not depend on the kernels")
@pytest.mark.parametrize("given", [(), ("g",), ("gk", "alpha", "beta")], ids=str)
def test_flop_formulas_count_the_products_of_the_reference(given: tuple[str, ...]) -> None:
    for op, args in chain(torch.float32, Case("flops", B=2, T=64, H=4, Hk=2, K=32, V=16, given=given))[:5]:
        arguments = tuple(x.cpu() if isinstance(x, torch.Tensor) else x for x in args)
        with FlopCounterMode(display=False) as counted:
            op(*args)
        with FlopCounterMode(display=False) as products:
            getattr(reference, op._name.removeprefix("gka::"))(*arguments)
        # the formulas leave out the products of masks with vectors
        assert counted.get_total_flops() == pytest.approx(products.get_total_flops(), rel=1e-3), op._name
