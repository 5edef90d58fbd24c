"""The plugin library: its core over a driver that only prints, and its adapters as TensorRT calls them, without a GPU.

The adapters need NVIDIA's headers: GKA_TENSORRT_INCLUDE names folders of them, one or several TensorRT versions, separated by
colons, and GKA_CUDA_INCLUDE that of the CUDA runtime.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels do not compile", allow_module_level=True)
if shutil.which("g++") is None:
    pytest.skip("needs g++", allow_module_level=True)

from gka_compile.custom_ops import kernels
from gka_compile.export import bundle
from gka_compile.export.bundle import Variant, build_bundle, evaluate, target_for

HERE = Path(__file__).parent
PLUGIN = HERE.parent / "export" / "plugin"
GATES = ("g", "gk", "alpha", "beta")
TYPES = {"float32": 0, "float16": 1, "bfloat16": 2}
HEADERS = [Path(x) for x in os.environ.get("GKA_TENSORRT_INCLUDE", "").split(":") if x]
Entry = dict[str, Any]


def variant(op: str, dtype: torch.dtype = torch.float16, **changed: Any) -> Variant:
    given = {"chunk_state": ("g", "beta", "h0", "u0"), "chunk_output": ("g", "alpha", "h0", "u0"), "step": GATES}[op]
    sizes = {"num_heads": 4, "num_kv_heads": 2, "key_width": 16, "value_width": 24, "scale": 0.37}
    return Variant(op, dtype, **{"optional": given, **sizes, **changed})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All ops in two dtypes, and for two kinds of GPU; the read-out of chunk_output through temporaries."""
    folder = tmp_path_factory.mktemp("plugin") / "bundle"
    real = kernels.launch_chunk_output

    def launch(q: Any, *rest: Any) -> None:
        *args, (o, x, x_scale, phi) = rest
        B, T, H, K = q.shape
        x_part = q.new_empty(2, B, -(-T // 3) * 3, H, K, dtype=x.dtype)
        more = torch.sym_max(T, 40) + torch.sym_min(B, 2) + T % 7  # every operator
        phi_part = q.new_empty(B * T * H + more, dtype=torch.float32)
        real(q, *args, (o, x_part[1], x_scale, phi_part))
        real(q, *args, (o, x, x_scale, phi))

    dtypes = (torch.float16, torch.float32)
    asked = [variant(op, dtype) for op in bundle.OPS for dtype in dtypes] + [variant("step", optional=(), key_width=32)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "launch_chunk_output", launch)
        build_bundle(folder, asked, ["8.6", "8.9", "9.0"])
    return folder


@pytest.fixture(scope="module")
def entries(folder: Path) -> list[Entry]:
    found: list[Entry] = bundle.load_bundle(folder)["variants"]
    return found


def compiled(program: Path, *sources: str | Path) -> Path:
    command = ["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-o", program, *sources]
    ran = subprocess.run([*map(str, command), "-ldl"], capture_output=True, text=True)
    assert not ran.returncode, ran.stderr
    return program


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a libcuda.so.1 that prints."""
    folder = tmp_path_factory.mktemp("driver")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", folder / "libcuda.so.1", HERE / "plugin_driver.c"], check=True)
    return folder


@pytest.fixture(scope="module")
def core(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("core") / "core"
    return compiled(program, f"-I{folder}", f"-I{PLUGIN}", PLUGIN / "gka_core.cpp", HERE / "plugin_core.cpp")


def node(entry: Entry) -> str:
    """The line that both programs read: op, inputs and attributes."""
    attributes = [entry["attributes"].get(n, 0) for n in ("num_heads", "chunk_size", "scale", "ridge_ratio", "num_iter")]
    return " ".join(map(str, [entry["op"], ",".join(t["name"] for t in entry["inputs"]), *attributes]))


def shapes(tensors: list[Entry], B: int, T: int) -> list[list[int]]:
    return [[TYPES[t["dtype"]], len(t["shape"]), *(evaluate(s, B, T) for s in t["shape"])] for t in tensors]


def run(program: Path, driver: Path, folder: Path, lines: list[Any], launches: list[Entry], code: str, **extra: str) -> list[str]:
    """Standard output of a program on a GPU that would launch ``launches``."""
    kinds = {"i32": "i", "i64": "l"}
    known = [
        f"{x['kernel']}:{(folder / x[code]).stat().st_size}:" + "".join(kinds.get(a.get("type", ""), "p") for a in x["arguments"])
        for x in launches
    ]
    environment = {"LD_LIBRARY_PATH": str(driver), "FAKE_CAPABILITY": "8.9", "FAKE_KERNELS": ",".join(known), **extra}
    text = "\n".join(line if isinstance(line, str) else " ".join(map(str, line)) for line in lines)
    ran = subprocess.run([program], input=text, capture_output=True, text=True, env=environment)
    assert not ran.returncode, (ran.returncode, ran.stdout, ran.stderr)
    return ran.stdout.splitlines()


def fnv(data: bytes) -> int:
    hashed = 14695981039346656037
    for byte in data:
        hashed = (hashed ^ byte) * 1099511628211 % 2**64
    return hashed


def expected(folder: Path, entry: Entry, target: Entry, code: str, B: int, T: int) -> tuple[int, list[str], list[str]]:
    """(workspace of the target, lines of loading, lines of launching)."""
    places = {t["name"]: (i + 1) << 20 for i, t in enumerate(entry["inputs"])}
    places |= {t["name"]: (i + 1) << 30 for i, t in enumerate(entry["outputs"])}
    workspace = 0
    for temporary in target["temporaries"]:
        places[temporary["name"]] = (1 << 40) + workspace
        workspace += -(-evaluate(temporary["bytes"], B, T) // 256) * 256
    loads, launches = [], []
    for launch in target["launches"]:
        kernel, shared = launch["kernel"], launch["shared_bytes"]
        loads += [f"load {kernel} {fnv((folder / launch[code]).read_bytes())}", f"attribute {kernel} 8 {shared}"]
        values = []
        for a in launch["arguments"]:
            if "integer" in a:
                values.append(evaluate(a["integer"], B, T))
            else:
                values.append(0 if a["pointer"] is None else places[a["pointer"]] + evaluate(a["offset"], B, T))
        grid = [evaluate(n, B, T) for n in launch["grid"]]
        if 0 not in grid:
            launches.append(" ".join(map(str, ["launch", kernel, *grid, launch["threads"], 1, 1, shared, 7, 1, *values])))
    return workspace, loads, launches


# --- the core --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capability", ["8.6", "8.7", "8.9", "9.0", "12.0"])
@pytest.mark.parametrize("index", range(7))
def test_core_launches_what_the_manifest_says(
    index: int, capability: str, core: Path, driver: Path, folder: Path, entries: list[Entry]
) -> None:
    entry = entries[index]
    target, code = target_for(entry, capability)
    for B, T in ((1, 1), (3, 100), (2, 64)):
        lines = [node(entry), *shapes(entry["inputs"], B, T)]
        told = run(core, driver, folder, lines, target["launches"], code, FAKE_CAPABILITY=capability)
        _, loads, launches = expected(folder, entry, target, code, B, T)
        most = max(expected(folder, entry, t, "cubin", B, T)[0] for t in entry["targets"].values())
        assert told[0] == f"workspace {most}"
        assert told[1 : 1 + len(loads)] == loads
        assert told[1 + len(loads) : -1] == launches * 2
        assert told[-1].startswith(f"error gka {entry['op']}: expected tensors at multiples of 16 bytes")
    assert most > 0 or entry["op"] != "chunk_output"


@pytest.mark.parametrize(
    ("edit", "environment", "message"),
    [
        (
            lambda lines: lines[0].append(0.5) or lines[0].pop(-3),
            {},
            "expected a node that the kernel bundle was built for (inputs=",
        ),
        (
            lambda lines: lines.__setitem__(0, ["bidding", *lines[0][1:]]),
            {},
            "gka bidding: expected a node .* (it has none of this op)",
        ),
        (
            lambda lines: lines[1].__setitem__(0, 2),
            {},
            "expected types, head counts and widths .* got q bfloat16 [2,4,16], k float16",
        ),
        (lambda lines: lines[1].__setitem__(4, 128), {}, "expected types, head counts and widths .* got q float16 [2,4,128]"),
        (lambda lines: lines[2].__setitem__(2, 3), {}, "gka step: expected k to have size 2 in dimension 0, got 3"),
        (
            lambda lines: None,
            {"FAKE_CAPABILITY": "7.5"},
            "expected a GPU .* built for, 8.6, 8.9, 9.0, got one of 7.5: build the bundle",
        ),
        (lambda lines: None, {"FAKE_NO_CONTEXT": "1"}, "CUDA: expected a current context on this thread, got none"),
        (lambda lines: None, {"FAKE_KERNELS": "other:1:p"}, "gka step: loading step_kernel failed with CUDA error 500"),
        (lambda lines: None, {"LD_LIBRARY_PATH": "/"}, "CUDA: expected an NVIDIA driver, got a machine without libcuda.so.1"),
    ],
    ids=["attributes", "op", "dtype", "width", "batch", "capability", "context", "kernel", "driver"],
)
def test_core_says_what_is_wrong(
    edit: Any, environment: dict[str, str], message: str, core: Path, driver: Path, folder: Path, entries: list[Entry]
) -> None:
    entry = next(entry for entry in entries if entry["op"] == "step")
    lines = [node(entry).split(), *shapes(entry["inputs"], 2, 1)]
    edit(lines)
    told = run(core, driver, folder, lines, entry["targets"]["8.9"]["launches"], "cubin", **environment)
    parts = message.split(" .* ")
    assert told[-1].startswith("error ")
    assert all(part in told[-1] for part in parts), told[-1]


# --- the adapters ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=HEADERS or [None], ids=str)
def adapter(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """(major version of the headers, program)."""
    if request.param is None:
        pytest.skip("needs TensorRT's headers: GKA_TENSORRT_INCLUDE")
    cuda = os.environ.get("GKA_CUDA_INCLUDE", "/usr/local/cuda/include")
    includes = [f"-I{folder}", f"-I{PLUGIN}", "-isystem", request.param, "-isystem", cuda]
    sources = [PLUGIN / name for name in ("gka_core.cpp", "tensorrt_v2.cpp", "tensorrt_v3.cpp")]
    program = tmp_path_factory.mktemp("adapter") / "adapter"
    flags = ["-Wno-deprecated-declarations", "-Wno-non-virtual-dtor"]
    compiled(program, *flags, *includes, *sources, HERE / "plugin_tensorrt.cpp")
    asked = ["g++", "-E", "-P", "-xc++", *map(str, includes), "-"]
    text = "#include <NvInferVersion.h>\nNV_TENSORRT_MAJOR"
    major = subprocess.run(asked, input=text, capture_output=True, text=True, check=True).stdout.split()[-1]
    return int(major), program


CREATORS = [
    "creator chunk_state 1 '' num_heads chunk_size inputs",
    "creator chunk_output 1 '' scale ridge_ratio num_iter chunk_size inputs",
    "creator step 1 '' scale ridge_ratio num_iter inputs",
]


@pytest.mark.parametrize("index", range(7))
def test_adapters_do_what_tensorrt_asks(
    index: int, adapter: tuple[int, Path], driver: Path, folder: Path, entries: list[Entry]
) -> None:
    (major, program), entry = adapter, entries[index]
    target, B, T = entry["targets"]["8.9"], 3, 100
    inputs, outputs = shapes(entry["inputs"], B, T), shapes(entry["outputs"], B, T)
    lines = [node(entry), [len(inputs)], *inputs, *outputs]
    told = run(program, driver, folder, lines, target["launches"], "cubin")
    workspace, loads, launches = expected(folder, entry, target, "cubin", B, T)
    most = max(expected(folder, entry, t, "cubin", B, T)[0] for t in entry["targets"].values())
    assert most >= workspace
    second = entry["inputs"][1]["name"]
    version = "expected an engine of this library, version 1, got version 0: build the engine again"
    assert told == [
        *CREATORS,
        f"plugin {entry['op']} 1",
        f"outputs {len(outputs)}",
        *["status 0 0"] * (major >= 10),
        *(f"output {t} {' '.join(map(str, dims))}" for t, _, *dims in outputs),
        f"supports {' '.join('1' for _ in (*inputs, *outputs))} 0 0",
        f"workspace {most}",
        *[f"log gka {entry['op']}: {version}", "stale 1"] * (major < 10),
        *loads,
        *launches,
        "enqueue 0",
        f"log gka {entry['op']}: expected {second} to have size {B} in dimension 0, got {B + 1}",
        "enqueue 1",
    ]


def test_adapters_refuse_a_node_without_kernels(
    adapter: tuple[int, Path], driver: Path, folder: Path, entries: list[Entry]
) -> None:
    entry = next(entry for entry in entries if entry["op"] == "chunk_output")
    lines = [node(entry).replace("q,k,v,g,", "q,k,v,"), [0]]
    told = run(adapter[1], driver, folder, lines, [], "cubin")
    assert told[:3] == CREATORS
    assert told[3].startswith(
        "log gka chunk_output: expected a node that the kernel bundle was built for (inputs=q,k,v,g,alpha,h0,"
    )
    assert len(told) == 4


# --- the library -----------------------------------------------------------------------------------------------------------

needs_cmake = pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")


def cmake(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["cmake", *map(str, arguments)], capture_output=True, text=True)


@needs_cmake
def test_build_without_a_bundle_says_so(tmp_path: Path) -> None:
    ran = cmake("-S", PLUGIN, "-B", tmp_path / "build", f"-DGKA_BUNDLE={tmp_path}")
    assert ran.returncode
    said = " ".join(ran.stderr.split())
    assert f"GKA_BUNDLE: expected the folder of a kernel bundle, got '{tmp_path}' without gka_kernels.inc" in said


@needs_cmake
@pytest.mark.parametrize("headers", HEADERS or [None], ids=str)
def test_library_asks_little_and_offers_what_tensorrt_looks_for(headers: Path | None, folder: Path, tmp_path: Path) -> None:
    if headers is None:
        pytest.skip("needs TensorRT's headers: GKA_TENSORRT_INCLUDE")
    stub = tmp_path / "libnvinfer.so"  # of the two functions that the library calls where TensorRT is 8.5
    text = "void* getPluginRegistry(void) { return 0; } void* getLogger(void) { return 0; }"
    command = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libnvinfer.so.8", "-Wl,--as-needed", "-xc", "-", "-o", stub]
    subprocess.run(command, input=text, text=True, check=True)
    given = {"GKA_BUNDLE": folder, "TENSORRT_INCLUDE_DIR": headers, "NVINFER_LIBRARY": stub}
    if "GKA_CUDA_INCLUDE" in os.environ:
        given["CUDA_INCLUDE_DIR"] = Path(os.environ["GKA_CUDA_INCLUDE"])
    ran = cmake("-S", PLUGIN, "-B", tmp_path / "build", *(f"-D{name}={value}" for name, value in given.items()))
    assert not ran.returncode, ran.stderr
    ran = cmake("--build", tmp_path / "build")
    assert not ran.returncode, ran.stdout + ran.stderr
    assert "warning" not in ran.stdout + ran.stderr
    library = tmp_path / "build" / "libgka_trt.so"

    def told(*command: str) -> str:
        return subprocess.run([*command, library], capture_output=True, text=True, check=True).stdout

    exported = {line.split()[-1] for line in told("nm", "-D", "--defined-only").splitlines() if " T " in line}
    undefined = told("nm", "-D", "--undefined-only")
    if "getPluginRegistry" in undefined:  # TensorRT 8.5: registered when it is loaded
        assert exported == set()
    else:
        assert exported in ({"getPluginCreators", "setLoggerFinder"}, {"getCreators", "setLoggerFinder"})
    needed = {line.split("[")[1].rstrip("]") for line in told("readelf", "-d").splitlines() if "NEEDED" in line}
    assert needed <= {"libc.so.6", "libdl.so.2", "libm.so.6", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1", "libnvinfer.so.8"}
