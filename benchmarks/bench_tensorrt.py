"""The portable form in TensorRT and in ONNX Runtime's CUDA provider, and our kernels in TensorRT, beside the Triton op.

    python bench_tensorrt.py export FOLDER            where gka-compile[onnx] is installed; no GPU
    python bench_tensorrt.py bundle FOLDER            where gka-compile and a Triton for the GPU's driver are; no GPU
    python bench_tensorrt.py trt FOLDER [--profile]   where tensorrt ≥ 8.5 and numpy are, on a GPU; needs no torch
    python bench_tensorrt.py torch FOLDER [--ort]     where torch and gka_compile are, on a GPU; --ort: onnxruntime-gpu too

``export`` writes models (opset 17, IR 8, batch 1) and a CASE.npz for each CASE_*.onnx: inputs, and outputs computed in float64,
under the models' own names.  ``bundle`` compiles the kernels of the models that end in _plugin, for Hopper, to FOLDER/bundle; they
take part in ``trt`` where --plugins names the library over that bundle (docs/deploy.md).  ``trt`` builds every model, runs it on
these inputs and prints one line: relative errors, seconds to build, engine and activation memory, and milliseconds per run,
launched one by one and as a CUDA graph.  ``torch`` times the op on the same inputs under torch.compile.  Milliseconds are the
median over ROUNDS rounds of CALLS runs that follow each other, host and device.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

PREFILL = ("q", "k", "v", "g", "gk", "alpha", "beta", "h", "u")
STEP = ("q", "k", "v", "h", "u", "g", "gk", "alpha", "beta")
OUTPUTS = ("o", "present_h", "present_u")
LENGTHS = (64, 512, 4096)  # profile of the dynamic length
ROUNDS, CALLS = 15, 10
DTYPES = {"FLOAT": np.float32, "HALF": np.float16, "INT64": np.int64, "INT32": np.int32, "BOOL": np.bool_}  # by TensorRT's names
HOPPER = "9.0"
WIDE = "prefill_b1_t4096_h16_k128_mixed"  # for ONNX Runtime: float16 inputs


def inputs(T: int | None, H: int, K: int) -> dict[str, np.ndarray]:
    """Unit keys and queries, gates as a layer makes them, the state after some tokens; batch 1."""
    random = np.random.default_rng(0)

    def unit(*shape: int) -> np.ndarray:
        x = random.standard_normal(shape)
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    size = (1, H) if T is None else (1, T, H)
    seen = unit(1, H, 2 * K, K)
    made = {"q": unit(*size, K), "k": unit(*size, K), "v": random.standard_normal((*size, K))}
    made |= {name: -0.1 * random.random(size) for name in ("g", "gk")} | {name: random.random(size) for name in ("alpha", "beta")}
    made |= {"h": seen.swapaxes(-1, -2) @ seen, "u": seen.swapaxes(-1, -2) @ random.standard_normal((1, H, 2 * K, K))}
    return {name: x.astype(np.float32) for name, x in made.items()}


def op(order: tuple[str, ...]) -> Any:
    """Prefill or step as a function of tensors in ``order``."""
    from gka_compile import chunk_gka, step_gka

    def prefill(q, k, v, g, gk, alpha, beta, h, u):  # type: ignore[no-untyped-def]
        o, state = chunk_gka(q, k, v, g, gk, alpha, initial_state=(h, u), output_final_state=True, beta=beta)
        return o, *state

    def step(q, k, v, h, u, g, gk, alpha, beta):  # type: ignore[no-untyped-def]
        o, state = step_gka(q, k, v, (h, u), g, gk, alpha, beta=beta)
        return o, *state

    return prefill if order == PREFILL else step


def milliseconds(call: Callable[[], Any], synchronize: Callable[[], None]) -> float:
    rounds = []
    for _ in range(1 + ROUNDS):
        synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        synchronize()
        rounds.append((time.perf_counter() - start) / CALLS * 1e3)
    return statistics.median(rounds[1:])  # the first warms up


# --- export ----------------------------------------------------------------------------------------------------------------


def case_of(model: Path) -> Path:
    """prefill_b1_t512_fp32.onnx → prefill_b1_t512.npz"""
    return model.with_name(model.stem.rpartition("_")[0] + ".npz")


def module(order: tuple[str, ...]) -> Any:
    from torch import nn

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.op = op(order)

        def forward(self, *args: Any) -> Any:
            return self.op(*args)

    return Module().eval()


def exported(order: tuple[str, ...], made: dict[str, np.ndarray]) -> Any:
    import torch
    from torch.export import Dim

    example = args = tuple(torch.from_numpy(made[n]) for n in order)
    sizes: Any = None
    if order == PREFILL:  # sizes of the example that are not taken for constants
        example = tuple(x if n in ("h", "u") else x[:, :130] for n, x in zip(order, args, strict=True))
        example = tuple(torch.cat([x, x]) for x in example)
        batch, length = Dim("batch"), Dim("length")
        sizes = (tuple({0: batch} if n in ("h", "u") else {0: batch, 1: length} for n in order),)
    return torch.export.export(module(order), example, dynamic_shapes=sizes, strict=False)


def bundle(folder: Path) -> None:
    from dataclasses import replace

    from gka_compile.export.bundle import build_bundle, variants

    programs = (exported(PREFILL, inputs(512, 2, 64)), exported(STEP, inputs(None, 16, 128)))
    asked = [replace(v, chunk_size=None) for program in programs for v in variants(program)]
    build_bundle(folder / "bundle", asked, [HOPPER], print)


def export(folder: Path) -> None:
    import onnx
    import torch

    from gka_compile.custom_ops.config import gpu_chunk
    from gka_compile.export import to_onnx

    def write(name: str, order: tuple[str, ...], made: dict[str, np.ndarray], **options: Any) -> None:
        with torch.no_grad():
            exact = module(order)(*(torch.from_numpy(made[n]).double() for n in order))
        path = to_onnx(exported(order, made), folder / f"{name}.onnx", order, OUTPUTS, opset=17, **options)
        model = onnx.load(path)
        for x in (*model.graph.input, *model.graph.output):
            for size in x.type.tensor_type.shape.dim:
                if size.dim_param == "batch":
                    size.dim_value = 1
        onnx.save(model, path)
        np.savez(case_of(path), **made, **{n: x.float().numpy() for n, x in zip(OUTPUTS, exact, strict=True)})
        print(path, flush=True)

    folder.mkdir(parents=True, exist_ok=True)
    made = inputs(512, 2, 64)
    write("prefill_b1_t512_h2_k64_fp32", PREFILL, made, device="cuda")
    write("prefill_b1_t512_h2_k64_mixed", PREFILL, made, device="cuda", mixed=True)
    write("prefill_b1_t512_h2_k64_cpu", PREFILL, made, device="cpu")
    write("prefill_b1_t512_h2_k64_plugin", PREFILL, made, form="plugin", chunk_size=gpu_chunk(int(HOPPER[0]), 4, 64, 64))
    made = inputs(None, 16, 128)
    write("step_b1_h16_k128_plugin", STEP, made, form="plugin")
    write("step_b1_h16_k128_fp32", STEP, made, device="cuda")
    half = {n: x[:, :130].astype(np.float16) if n in "qkv" else x for n, x in inputs(512, 16, 128).items()}
    half |= {n: half[n][:, :130] for n in ("g", "gk", "alpha", "beta")}
    write(WIDE, PREFILL, half, device="cuda", mixed=True)


# --- TensorRT --------------------------------------------------------------------------------------------------------------


class Cuda:
    """The CUDA driver, as export/driver.py calls it: by its file, for the package needs torch."""

    def __init__(self) -> None:
        file = Path(__file__).parent.parent / "export" / "driver.py"
        spec = importlib.util.spec_from_file_location("driver", file)
        module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        spec.loader.exec_module(module)  # type: ignore[union-attr]
        self.driver = module.Driver()

    def buffer(self, array: np.ndarray) -> int:
        pointer = self.driver.allocate(array.nbytes)
        self.driver.upload(pointer, array.ctypes.data, array.nbytes)
        self.driver.synchronize()
        return pointer

    def read(self, pointer: int, array: np.ndarray) -> np.ndarray:
        self.driver.download(array.ctypes.data, pointer, array.nbytes)
        self.driver.synchronize()
        return array

    def graph(self, call: Any) -> Any:
        stream, graph, executable = ctypes.c_void_p(self.driver.stream), ctypes.c_void_p(), ctypes.c_void_p()
        self.driver("StreamBeginCapture_v2", stream, 2)  # relaxed
        call()
        self.driver("StreamEndCapture", stream, ctypes.byref(graph))
        self.driver("GraphInstantiateWithFlags", ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
        return lambda: self.driver("GraphLaunch", executable, stream)


def trt(folder: Path, names: list[str], tf32: bool, profile: bool, plugins: Path | None) -> None:
    import tensorrt

    if plugins is not None:
        ctypes.CDLL(os.fspath(plugins.resolve()))  # registers them
    print("TensorRT", tensorrt.__version__, "TF32" if tf32 else "no TF32", flush=True)
    cuda, log = Cuda(), tensorrt.Logger(tensorrt.Logger.ERROR)
    failed = False
    for path in sorted(folder.glob("*.onnx")):
        if names and not any(n in path.name for n in names):
            continue
        if path.stem == WIDE or (plugins is None and path.stem.endswith("_plugin")):
            continue
        try:
            print(trt_line(tensorrt, cuda, log, path, tf32, profile), flush=True)
        except Exception as problem:
            failed = True
            print(f"{path.name}: {problem}", flush=True)
    sys.exit(failed)


def trt_line(t: Any, cuda: Cuda, log: Any, path: Path, tf32: bool, profile: bool) -> str:
    data = np.load(case_of(path))
    builder = t.Builder(log)
    strong = hasattr(t.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")
    flag = t.NetworkDefinitionCreationFlag.STRONGLY_TYPED if strong else t.NetworkDefinitionCreationFlag.EXPLICIT_BATCH
    network = builder.create_network(1 << int(flag))
    parser = t.OnnxParser(network, log)
    if not parser.parse(path.read_bytes()):
        raise RuntimeError("does not parse: " + "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors)))
    config = builder.create_builder_config()
    if profile:
        config.profiling_verbosity = t.ProfilingVerbosity.DETAILED
    if not tf32:
        config.clear_flag(t.BuilderFlag.TF32)
    halves = 0
    if not strong:  # before TensorRT 10: say every layer's precision, which is what the model says
        config.set_tactic_sources(1 << int(t.TacticSource.CUBLAS_LT))  # no cuBLAS, as to_tensorrt.py; cuDNN may be absent
        if "mixed" in path.name:
            config.set_flag(t.BuilderFlag.FP16)
            config.set_flag(t.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
            for i in range(network.num_layers):
                layer = network.get_layer(i)
                dtype = layer.get_output(0).dtype
                if dtype in (t.float32, t.float16) and layer.type not in (t.LayerType.CONSTANT, t.LayerType.IDENTITY):  # a cast
                    layer.precision = dtype
                    layer.set_output_type(0, dtype)
                    halves += dtype == t.float16
    shapes = builder.create_optimization_profile()
    dynamic = False
    for i in range(network.num_inputs):
        x = network.get_input(i)
        if -1 in tuple(x.shape):
            dynamic = True
            shapes.set_shape(x.name, *([n if d == -1 else d for d in x.shape] for n in LENGTHS))
    if dynamic:
        config.add_optimization_profile(shapes)
    start = time.perf_counter()
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RuntimeError("does not build")
    seconds = time.perf_counter() - start
    engine = t.Runtime(log).deserialize_cuda_engine(plan)
    context = engine.create_execution_context()
    tensors = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    places = {}
    for name in sorted(tensors, key=lambda n: engine.get_tensor_mode(n) != t.TensorIOMode.INPUT):
        if engine.get_tensor_mode(name) == t.TensorIOMode.INPUT:
            array = np.ascontiguousarray(data[name])
            context.set_input_shape(name, array.shape)
        else:
            array = np.zeros(tuple(context.get_tensor_shape(name)), DTYPES[engine.get_tensor_dtype(name).name])
        places[name] = (cuda.buffer(array), array)
        context.set_tensor_address(name, places[name][0])

    def call() -> None:
        if not context.execute_async_v3(cuda.driver.stream):
            raise RuntimeError("does not run")

    plain = milliseconds(call, cuda.driver.synchronize)
    errors = []
    for name in OUTPUTS:
        found, want = cuda.read(*places[name]).astype(np.float64), data[name].astype(np.float64)
        errors.append(f"{name} {np.linalg.norm(found - want) / np.linalg.norm(want):.1e}")
    if profile:
        show_layers(t, context, call, cuda)
    try:
        graphed = f"{milliseconds(cuda.graph(call), cuda.driver.synchronize):.3f} as a CUDA graph"
    except RuntimeError as problem:
        graphed = f"no CUDA graph ({problem})"
    memory = getattr(engine, "device_memory_size_v2", None) or engine.device_memory_size
    half = f", {halves} layers in float16" if halves else ""
    return (
        f"{path.name}: {plain:.3f} ms/run, {graphed}; {', '.join(errors)}; build {seconds:.1f} s, "
        f"engine {plan.nbytes / 1e6:.1f} MB, activations {memory / 1e6:.1f} MB, {network.num_layers} layers parsed, "
        f"{engine.num_layers} in the engine{half}"
    )


def show_layers(t: Any, context: Any, call: Any, cuda: Cuda) -> None:
    """Milliseconds of every layer of one run, the slowest first."""

    class Profiler(t.IProfiler):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.layers: list[tuple[float, str]] = []

        def report_layer_time(self, name: str, ms: float) -> None:
            self.layers.append((ms, name))

    context.profiler = profiler = Profiler()
    call()
    cuda.driver.synchronize()
    print(f"  {len(profiler.layers)} layers, {sum(ms for ms, _ in profiler.layers):.3f} ms with a profiler attached")
    for ms, name in sorted(profiler.layers, reverse=True)[:20]:
        print(f"  {ms:.4f} ms  {name[:150]}")


# --- torch and ONNX Runtime ------------------------------------------------------------------------------------------------


def torch_(folder: Path, ort: bool) -> None:
    import torch

    print("torch", torch.__version__, torch.cuda.get_device_name())

    def times(call: Any, args: list[Any]) -> str:
        compiled = torch.compile(call, fullgraph=True)
        compiled(*args)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        compiled(*args)
        peak = (torch.cuda.max_memory_allocated() - before) / 1e6
        plain = milliseconds(lambda: compiled(*args), torch.cuda.synchronize)
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            compiled(*args)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            compiled(*args)
        graphed = milliseconds(graph.replay, torch.cuda.synchronize)
        return f"torch.compile {plain:.3f} ms/run, {graphed:.3f} as a CUDA graph; peak {peak:.1f} MB with outputs"

    with torch.no_grad():
        for name, order, sizes, half in (
            ("prefill B1 T512 H2 K64 fp32", PREFILL, (512, 2, 64), False),
            ("step B1 H16 K128 fp32", STEP, (None, 16, 128), False),
            ("prefill B1 T4096 H16 K128 fp16", PREFILL, (4096, 16, 128), True),
        ):
            made = {n: torch.from_numpy(x).cuda() for n, x in inputs(*sizes).items()}
            args = [made[n].half() if half and n in "qkv" else made[n] for n in order]
            print(f"{name}: {times(op(order), args)}", flush=True)
        if ort:
            print(f"{WIDE}: {ort_line(folder / f'{WIDE}.onnx', args)}", flush=True)


def ort_line(path: Path, args: list[Any]) -> str:
    """The ONNX model on the same tensors, which stay on the GPU."""
    import onnxruntime
    import torch

    session = onnxruntime.InferenceSession(os.fspath(path), providers=[("CUDAExecutionProvider", {"use_tf32": "0"})])
    expected = op(PREFILL)(*args)
    binding = session.io_binding()
    outputs = [torch.empty_like(x) for x in expected]
    for bind, names, tensors in ((binding.bind_input, PREFILL, args), (binding.bind_output, OUTPUTS, outputs)):
        for name, x in zip(names, tensors, strict=True):
            bind(name, "cuda", 0, np.float16 if x.dtype == torch.float16 else np.float32, tuple(x.shape), x.data_ptr())
    ms = milliseconds(lambda: session.run_with_iobinding(binding), torch.cuda.synchronize)
    errors = [((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in zip(outputs, expected, strict=True)]
    return f"onnxruntime {onnxruntime.__version__} {ms:.3f} ms/run, off the op by {', '.join(f'{e:.1e}' for e in errors)}"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("what", choices=("export", "bundle", "trt", "torch"))
    options.add_argument("folder", type=Path)
    options.add_argument("--only", action="append", default=[], help="trt: a part of a model's name; may be repeated")
    options.add_argument("--tf32", action="store_true", help="trt: allow TF32 products")
    options.add_argument("--profile", action="store_true", help="trt: the slowest layers")
    options.add_argument("--plugins", type=Path, metavar="LIBRARY", help="trt: libgka_trt.so over FOLDER/bundle")
    options.add_argument("--ort", action="store_true", help="torch: ONNX Runtime as well")
    args = options.parse_args()
    if args.what == "export":
        export(args.folder)
    elif args.what == "bundle":
        bundle(args.folder)
    elif args.what == "trt":
        trt(args.folder, args.only, args.tf32, args.profile, args.plugins)
    else:
        torch_(args.folder, args.ort)


if __name__ == "__main__":
    main()
