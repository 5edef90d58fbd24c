"""Kernel bundles: what is traced is what launches; every chip compiles; the driver alone runs it; bad input is refused."""

from __future__ import annotations

import ctypes
import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from helpers import DEVICE, NUM_ITER, RIDGE_RATIO, SCALE, Case, budget, check, make_inputs, run_reference

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels do not compile", allow_module_level=True)

from torch._library.triton import set_wrap_triton_enabled  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from gka_compile.custom_ops import kernels, ops  # noqa: E402
from gka_compile.custom_ops.kernels.decode import step_kernel  # noqa: E402
from gka_compile.export import bundle, sealed  # noqa: E402
from gka_compile.export.bundle import BundleError, Variant, build_bundle, evaluate, load_bundle, target_for, variants  # noqa: E402
from gka_compile.export.driver import Driver  # noqa: E402

ALL = ("g", "gk", "alpha", "beta", "h0", "u0")
Manifest = dict[str, Any]


def of_op(op: str, given: tuple[str, ...] = ALL) -> tuple[str, ...]:
    """Those of ``given`` that an op takes."""
    taken = [a.name for a in getattr(torch.ops.gka, op).default._schema.arguments if "Optional" in str(a.type)]
    return tuple(name for name in given if name in taken)


def variant(op: str, dtype: torch.dtype = torch.float16, given: tuple[str, ...] = ALL, **changed: Any) -> Variant:
    sizes = {"num_heads": 4, "num_kv_heads": 2, "key_width": 64, "value_width": 40, **changed}
    return Variant(op, dtype, optional=of_op(op, given), scale=SCALE, **sizes)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every op for every capability that this Triton knows."""
    folder = tmp_path_factory.mktemp("bundles") / "bundle"
    build_bundle(folder, [variant(op) for op in bundle.OPS])
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One variant for one capability."""
    folder = tmp_path_factory.mktemp("bundles") / "small"
    build_bundle(folder, [variant("step", key_width=16, value_width=16)], ["8.7"])
    return folder


# --- what is in it ---------------------------------------------------------------------------------------------------------


def test_every_capability_compiles(built: Path) -> None:
    manifest, known = load_bundle(built), bundle.known_capabilities()
    assert {"8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "12.0"} <= set(known)
    assert {"10.1", "11.0"} & set(known)  # Thor, by the name that this CUDA gives it
    for op in bundle.OPS:
        targets: dict[str, Any] = {}
        for entry in manifest["variants"]:
            if entry["op"] == op:
                targets |= entry["targets"]
        assert set(targets) == set(known)
        for capability, target in targets.items():
            for launch in target["launches"]:
                number = capability.replace(".", "")
                assert (built / launch["cubin"]).read_bytes()[:4] == b"\x7fELF"
                ptx = (built / launch["ptx"]).read_text()
                assert f".target sm_{number}" in ptx
                assert f".entry {launch['kernel']}(" in ptx
                assert launch["shared_bytes"] <= bundle.CAPABILITIES[capability] * 1024


def test_files_are_those_of_the_manifest_and_hold_no_paths(built: Path) -> None:
    manifest = load_bundle(built)
    assert {path.name for path in built.iterdir()} == {"manifest.json", *manifest["files"]}
    here = str(Path(bundle.__file__).resolve().parents[1]).encode()
    assert not [path.name for path in built.iterdir() if here in path.read_bytes()]


def recorded(launch: Any, *args: Any) -> list[tuple[str, tuple[int, ...], dict[str, Any], dict[str, Any]]]:
    """(kernel, grid, arguments by name, options) of real launches, on real tensors."""
    found = []

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        arguments = dict(zip(kernel.arg_names, args, strict=False)) | {n: x for n, x in named.items() if n in kernel.arg_names}
        options = {n: x for n, x in named.items() if n not in kernel.arg_names}
        constants = {p.name for p in kernel.params if p.is_constexpr}
        given = {name: arguments[name] for name in kernel.arg_names if name not in constants}
        real = {name: x for name, x in given.items() if isinstance(x, torch.Tensor) or x != 1}
        found.append((kernel.__name__, (*grid, 1, 1)[:3], real, options))

    with set_wrap_triton_enabled(False), mock.patch.object(JITFunction, "run", run):
        launch(*args)
    return found


def op_arguments(op: str, made: dict[str, Any], chunk: int) -> tuple[Any, ...]:
    """Arguments of an op on inputs of make_inputs; those of step are of its first token."""
    q, k, v, g, gk, alpha, beta, h0, u0 = made.values()
    H = q.shape[2]
    if op == "step":
        token = [None if x is None else x[:, 0].contiguous() for x in (q, k, v, g, gk, alpha, beta)]
        return (*token[:3], h0, u0, *token[3:], SCALE, RIDGE_RATIO, NUM_ITER)
    args = (k, v, g, gk, beta, h0, u0, None, H, chunk)
    if op == "chunk_state":
        return args
    states = ops.chunk_state(*args)[:3]
    return (q, k, v, g, gk, alpha, beta, h0, u0, *states, None, SCALE, RIDGE_RATIO, NUM_ITER, chunk)


@pytest.mark.parametrize("given", [ALL, ()], ids=["all", "none"])
@pytest.mark.parametrize("op", bundle.OPS)
def test_expressions_are_those_of_real_launches(
    op: str, given: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if op == "step" and not given:
        given = ("h0", "u0")  # its states are required
    asked = variant(op, torch.float16, given, key_width=16, value_width=24)
    (entry,) = build_bundle(tmp_path / "b", [asked], ["9.0"])["variants"]
    chunk, target = asked.chunk("9.0"), entry["targets"]["9.0"]
    monkeypatch.setattr(kernels.state, "TENSORS", frozenset())  # an eager call knows when a launch has nothing to do
    for B, T in ((1, 1), (1, 2), (2, 1), (3, 31), (2, 32), (1, 33), (5, 64), (2, 200), (0, 7), (2, 0)):
        if op == "step" and T == 0:
            continue
        case = Case("", B=B, T=T, H=4, Hk=2, K=16, V=24, given=given, state="h0" in given)
        args = op_arguments(op, make_inputs(case, torch.float16), chunk)
        outputs = getattr(ops, f"_{op}_outputs")(*args)
        names = [a.name for a in getattr(torch.ops.gka, op).default._schema.arguments]
        tensors = {name: x for name, x in zip(names, args, strict=True) if isinstance(x, torch.Tensor)}
        tensors |= dict(zip(bundle.OPS[op], outputs, strict=True))
        for described in (*entry["inputs"], *entry["outputs"]):
            real = tensors.pop(described["name"])
            assert [evaluate(s, B, T) for s in described["shape"]] == list(real.shape)
            assert described["dtype"] == str(real.dtype).removeprefix("torch.")
        assert not tensors
        named = {x.untyped_storage()._cdata: n for n, x in zip((*names, *bundle.OPS[op]), (*args, *outputs), strict=True)
                 if isinstance(x, torch.Tensor)}  # fmt: skip
        launches = recorded(getattr(kernels, f"launch_{op}"), *args, outputs)
        assert len(launches) == len(target["launches"])
        temporaries: list[torch.Tensor] = []
        for launch, (kernel, grid, arguments, options) in zip(target["launches"], launches, strict=True):
            assert launch["kernel"] == kernel
            assert [evaluate(n, B, T) for n in launch["grid"]] == list(grid)
            assert launch["threads"] == 32 * options["num_warps"]
            for x in arguments.values():
                if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in named:  # allocated by the launcher
                    temporary = target["temporaries"][len(temporaries)]
                    assert evaluate(temporary["bytes"], B, T) == x.untyped_storage().nbytes()
                    named[x.untyped_storage()._cdata] = temporary["name"]
                    temporaries.append(x)
            real = [named[x.untyped_storage()._cdata] if isinstance(x, torch.Tensor) else x for x in arguments.values()]
            traced = [a["pointer"] if "pointer" in a else evaluate(a["integer"], B, T) for a in launch["arguments"]]
            scratch = [x for x in traced if x is None]
            assert len(scratch) <= 2
            # a length of 1 is compiled for where Triton launches, but is an argument here
            traced = [x for x in traced if x not in (None, 1)]
            assert traced == real


def test_temporaries_and_views(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A launcher that changes changes the bundle."""
    real = kernels.launch_step

    def launch(q: Any, *rest: Any) -> None:
        *args, out = rest
        B, H, V = out[0].shape
        parts = q.new_empty(2, B * ((B + 2) // 3), H, V)
        real(q, *args, (parts[1], *out[1:]))
        real(q, *args, out)

    monkeypatch.setattr(kernels, "launch_step", launch)
    (entry,) = build_bundle(tmp_path / "b", [variant("step", key_width=16, value_width=16)], ["8.7"])["variants"]
    target = entry["targets"]["8.7"]
    (temporary,) = target["temporaries"]
    assert [x["kernel"] for x in target["launches"]] == ["step_kernel"] * 2
    place = [p.name for p in step_kernel.params].index("o_ptr")
    first, second = (launch["arguments"][place] for launch in target["launches"])
    assert second == {"pointer": "o", "offset": 0}
    assert first["pointer"] == temporary["name"]
    for B in (1, 2, 3, 4, 100):
        whole = 2 * B * ((B + 2) // 3) * 4 * 16 * 2
        assert evaluate(temporary["bytes"], B, 1) == whole
        assert evaluate(first["offset"], B, 1) == whole // 2


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        (lambda *args: args[-1][0].zero_(), "aten.zero_"),
        (lambda *args: real_step(*args) if args[0].shape[0] > 8 else None, "the same launches at every batch and length"),
    ],
    ids=["other work", "a choice by size"],
)
def test_what_a_bundle_cannot_repeat_is_refused(launch: Any, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kernels, "launch_step", launch)
    with pytest.raises(BundleError, match=message):
        build_bundle(tmp_path / "b", [variant("step")], ["8.7"])
    assert not list(tmp_path.iterdir())


real_step = kernels.launch_step


class Layer(torch.nn.Module):
    def forward(self, q: Any, k: Any, v: Any, g: Any, h: Any, u: Any) -> Any:
        h_chunks, u_chunks, scales, h_out, u_out = torch.ops.gka.chunk_state(k, v, g, None, None, h, u, None, 4, 32)
        read = (h_chunks, u_chunks, scales, None, 0.5, 0.03, 20, 32)
        o, *_ = torch.ops.gka.chunk_output(q, k, v, g, None, None, None, h, u, *read)
        return o, h_out, u_out


def test_variants_of_a_program() -> None:
    made = make_inputs(Case("", H=4, Hk=2, K=24, V=16), torch.float32)
    args = tuple(made[name] for name in ("q", "k", "v", "g", "h0", "u0"))
    program = torch.export.export(Layer(), args)
    heads = {"num_heads": 4, "num_kv_heads": 2, "key_width": 24, "value_width": 16}
    common: dict[str, Any] = {**heads, "optional": ("g", "h0", "u0"), "chunk_size": 32}
    assert variants(program) == [
        Variant("chunk_state", torch.float32, **common),
        Variant("chunk_output", torch.float32, **common, scale=0.5, ridge_ratio=0.03, num_iter=20),
    ]


# --- what is refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"op": "chunk_grads"}, ValueError, "op: expected one of chunk_state, chunk_output, step, got 'chunk_grads'"),
        ({"key_width": 136}, ValueError, "key_width: expected a head width that is a multiple of 8 from 8 to 128, got 136"),
        ({"value_width": 20}, ValueError, "value_width: .* got 20"),
        ({"dtype": torch.float64}, TypeError, "dtype: expected float32, float16 or bfloat16, got torch.float64"),
        ({"num_kv_heads": 3}, ValueError, "num_kv_heads: expected a divisor of num_heads = 4, got 3"),
        ({"optional": ("h0",)}, ValueError, r"optional: expected some of g, gk, alpha, beta, each once, got \('h0',\)"),
        ({"gate_dtype": torch.bfloat16}, TypeError, "gate_dtype: expected float32 or torch.float16, got torch.bfloat16"),
        ({"chunk_size": 48}, ValueError, "chunk_size: expected None or a power of two of at least 16, got 48"),
        ({"ridge_ratio": 0.0}, ValueError, "ridge_ratio: expected a positive number, got 0.0"),
        ({"num_iter": 0}, ValueError, "num_iter: expected at least 1, got 0"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)
def test_variants_that_no_kernel_serves(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    heads = {"num_heads": 4, "num_kv_heads": 2, "key_width": 16, "value_width": 16}
    good: dict[str, Any] = {"op": "step", "dtype": torch.float16, **heads}
    Variant(**good)
    with pytest.raises(error, match=message):
        Variant(**(good | changed))


@pytest.mark.parametrize("capabilities", [["7.5"], ["9.0", "sm_90"], [], "9.0"], ids=str)
def test_unknown_capability(capabilities: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"compute_capabilities: expected some of 8.0, .*, got "):
        build_bundle(tmp_path / "b", [variant("step")], capabilities)


def test_no_variants(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="variants: expected at least one, got none"):
        build_bundle(tmp_path / "b", [])


def test_too_much_shared_memory_names_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bundle.CAPABILITIES, "8.6", 4)
    with pytest.raises(BundleError, match=r"at most the 4 KiB .* capability 8.6, got .* choose a smaller chunk_size"):
        build_bundle(tmp_path / "b", [variant("chunk_state")], ["8.6"])
    assert not list(tmp_path.iterdir())


def test_failed_build_leaves_what_was_there(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [variant("step", key_width=16, value_width=16)]
    build_bundle(tmp_path / "b", asked, ["8.7"])
    before = {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(sealed, "digest_of", fail)
    for name in ("b", "new"):
        with pytest.raises(OSError, match="disk full"):
            build_bundle(tmp_path / name, asked, ["8.7"])
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()} == before


def test_other_folders_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("42")
    with pytest.raises(BundleError, match=r"mine: expected a new folder or a kernel bundle to replace, got no manifest\.json"):
        build_bundle(tmp_path / "mine", [variant("step")], ["8.7"])
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "42"


def copied(small: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in small.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_changed_files_are_found(small: Path, tmp_path: Path) -> None:
    folder = copied(small, tmp_path / "b")
    name = next(path.name for path in folder.iterdir() if path.suffix == ".cubin")
    good = (folder / name).read_bytes()
    load_bundle(folder)
    (folder / name).write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(BundleError, match="the file was changed"):
        load_bundle(folder)
    (folder / name).unlink()
    with pytest.raises(BundleError, match=f"expected the file {name} that manifest.json lists, got none"):
        load_bundle(folder)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m["variants"][0]["targets"]["8.7"]["launches"][0].update(threads=96), "the manifest was changed"),
        (lambda m: m.update(version=2), "expected format version 1 .* got 2 .*: build the bundle again"),
        (lambda m: m.update(format="artifact"), "got JSON of another kind"),
    ],
    ids=["content", "version", "format"],
)
def test_changed_manifest(edit: Any, message: str, small: Path, tmp_path: Path) -> None:
    folder = copied(small, tmp_path / "b")
    manifest = json.loads((folder / "manifest.json").read_text())
    edit(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=message):
        load_bundle(folder)


def test_gpus_that_run_it(small: Path) -> None:
    (entry,) = load_bundle(small)["variants"]
    orin = entry["targets"]["8.7"]
    ampere: dict[str, Any] = {"op": "step", "targets": {"8.0": {}, "8.7": orin, "9.0": {}}}
    assert target_for(ampere, "8.7") == (orin, "cubin")
    assert target_for(ampere, "8.9") == (orin, "cubin")  # machine code of the same major version
    assert target_for(ampere, "8.6") == ({}, "cubin")
    assert target_for(ampere, "9.1") == (orin, "ptx")  # sm_90a is for 9.0 alone
    assert target_for(ampere, "12.0") == (orin, "ptx")
    for other in ("8.6", "7.5"):
        with pytest.raises(BundleError, match=rf"step: expected a GPU .* built for, 8.7, got one of {other}"):
            target_for(entry, other)


# --- on a GPU, by the driver alone -----------------------------------------------------------------------------------------


def launch_by_driver(driver: Driver, folder: Path, entry: Manifest, tensors: dict[str, torch.Tensor]) -> None:
    """Run a variant on inputs and outputs by name."""
    B, T = tensors["k"].shape[:2]  # step has no T, and nothing that depends on it
    target, code = target_for(entry, driver.capability)
    pointers = {name: x.data_ptr() for name, x in tensors.items()}
    held = [torch.empty(evaluate(t["bytes"], B, T), dtype=torch.uint8, device="cuda") for t in target["temporaries"]]
    pointers |= {t["name"]: x.data_ptr() for t, x in zip(target["temporaries"], held, strict=True)}
    for launch in target["launches"]:
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        driver("ModuleLoadData", ctypes.byref(module), (folder / launch[code]).read_bytes())
        driver("ModuleGetFunction", ctypes.byref(function), module, launch["kernel"].encode())
        driver("FuncSetAttribute", function, 8, launch["shared_bytes"])  # the most dynamic shared memory
        values: list[Any] = []
        for argument in launch["arguments"]:
            if "pointer" in argument:
                name = argument["pointer"]
                values.append(ctypes.c_uint64(0 if name is None else pointers[name] + evaluate(argument["offset"], B, T)))
            else:
                integer = ctypes.c_int32 if argument["type"] == "i32" else ctypes.c_int64
                values.append(integer(evaluate(argument["integer"], B, T)))
        parameters = (ctypes.c_void_p * len(values))(*(ctypes.addressof(x) for x in values))
        grid = [evaluate(n, B, T) for n in launch["grid"]]
        stream = ctypes.c_void_p(driver.stream)
        driver("LaunchKernel", function, *grid, launch["threads"], 1, 1, launch["shared_bytes"], stream, parameters, None)
    driver.synchronize()


@pytest.fixture(scope="module")
def driver() -> Driver:
    if DEVICE != "cuda":
        pytest.skip("needs a GPU")
    torch.zeros(1, device="cuda")
    driver = Driver()
    driver.stream = torch.cuda.current_stream().cuda_stream
    return driver


RUN = (
    Case("all", B=2, T=150, H=4, Hk=2, K=64, V=40),
    Case("plain", B=1, T=64, H=4, Hk=4, K=128, V=128, given=(), state=False),
    Case("one-token", B=3, T=1, H=2, Hk=1, K=24, V=16),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", RUN, ids=str)
def test_the_driver_alone_runs_what_the_op_runs(case: Case, dtype: torch.dtype, driver: Driver, tmp_path: Path) -> None:
    made = make_inputs(case, dtype, "cuda")
    given = tuple(name for name in ALL if made[name] is not None)
    names = ("chunk_state", "chunk_output") if case.T > 1 else tuple(bundle.OPS)
    heads = {"num_heads": case.H, "num_kv_heads": case.Hk, "key_width": case.K, "value_width": case.V}
    asked = [variant(op, dtype, given, **heads) for op in names]
    build_bundle(tmp_path / "b", asked, [driver.capability])
    entries = {entry["op"]: entry for entry in load_bundle(tmp_path / "b")["variants"]}
    chunk = asked[0].chunk(driver.capability)
    oracle = run_reference(case, dtype, torch.float64, chunk)
    allowed = budget(case, dtype, oracle, chunk)
    for op in names:
        args = op_arguments(op, made, chunk)
        expected = dict(zip(bundle.OPS[op], getattr(ops, op)(*args), strict=True))
        schema = getattr(torch.ops.gka, op).default._schema.arguments
        tensors = {a.name: x for a, x in zip(schema, args, strict=True) if isinstance(x, torch.Tensor)}
        found = {name: torch.full_like(x, float("nan")) for name, x in expected.items()}
        launch_by_driver(driver, tmp_path / "b", entries[op], tensors | found)
        for name, x in found.items():
            assert (x.double() - expected[name].double()).norm() <= 1e-3 * expected[name].double().norm(), f"{op}: {name}"
        renamed = {"o": "o", "h_out": "h", "u_out": "u"}
        results = {short: found[name].reshape(oracle[short].shape).cpu() for name, short in renamed.items() if name in found}
        check(results, {name: oracle[name] for name in results}, allowed)
