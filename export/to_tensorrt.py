"""TensorRT: a program or an ONNX file as an engine, with a manifest that says what it is for."""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.export import ExportedProgram

from gka_compile import __version__

from .bundle import strings
from .program import BATCH, LENGTH
from .sealed import check_file
from .to_onnx import NEWEST_OPSET, OLDEST_OPSET, to_onnx

__all__ = ["LIBRARIES", "RTX_CAPABILITIES", "Range", "library_of", "logger", "to_tensorrt"]

FORMAT, VERSION = "gka-compile engine", 1
LIBRARIES = {"rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}  # by flavour
PACKAGES = {"rtx": "tensorrt-rtx", "tensorrt": "tensorrt"}
RTX_CAPABILITIES = ("8.6", "8.9", "12.0", "12.1")
STRONGLY_TYPED_SINCE = 10  # TensorRT's version; all of TensorRT-RTX is
DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64", "INT32": "int32", "BOOL": "bool"}
ONNX_DTYPES = ("FLOAT", "FLOAT16", "BFLOAT16", "INT64", "INT32", "BOOL")

Range = tuple[int, int, int]
Manifest = dict[str, Any]


def library_of(flavour: str) -> Any:
    """The Python module of a flavour.

    Raises:
        ValueError: unknown flavour.
        ImportError: it is not installed; the message says which of the two is.
    """
    if flavour not in LIBRARIES:
        raise ValueError(f"flavour: expected one of {', '.join(LIBRARIES)}, got {flavour!r}")
    try:
        return importlib.import_module(LIBRARIES[flavour])
    except ImportError as error:
        (other,) = set(LIBRARIES) - {flavour}
        try:
            importlib.import_module(LIBRARIES[other])
            found = f"{PACKAGES[other]} is installed, which is the flavour {other!r}"
        except ImportError:
            found = "neither of the two is installed"
        how = 'pip install "gka-compile[tensorrt-rtx]"' if flavour == "rtx" else "it comes with JetPack and NVIDIA's containers"
        raise ImportError(f"flavour {flavour!r} needs {PACKAGES[flavour]} ({how}); {found}") from error


def to_tensorrt(
    source: ExportedProgram | str | Path,
    path: str | Path,
    input_names: Sequence[str] = (),
    output_names: Sequence[str] = (),
    *,
    flavour: str = "rtx",
    compute_capabilities: Sequence[str] | None = None,
    lengths: Range | None = None,
    batches: Range | None = None,
    workspace: int | None = None,
    mixed: bool = False,
) -> Manifest:
    """Build a TensorRT engine at ``path`` and its manifest at ``path`` with .json added.

    A program takes its portable form for GPUs on the way (:func:`.decompositions`).  Networks are strongly typed (TensorRT ≥ 10 and
    TensorRT-RTX) and TF32 is off, so every product is computed in the dtype that the model says.

    Args:
        source: an exported program, or an ONNX file whose dynamic sizes are named "batch" and "length".
        path: file to write.
        input_names, output_names: of a program's inputs and outputs, in order; an ONNX file has its own.
        flavour: "rtx", TensorRT-RTX, needs no GPU to build; "tensorrt" builds for the GPU of this machine.
        compute_capabilities: GPUs to build for, such as "8.9"; None: RTX_CAPABILITIES for "rtx". "tensorrt" takes none.
        lengths, batches: (least, usual, most) of the dynamic sizes; required for a size that is dynamic, not allowed for others.
        workspace: most bytes of scratch memory; None: no limit.
        mixed: as in :func:`.decompositions`; for programs.

    Returns:
        The manifest: library and version, compute capabilities, every input and output with dtype, shape and profile, layers before
        and after fusion, activation memory, seconds, size and SHA-256.

    Raises:
        ImportError: the library of ``flavour``, or onnx, is absent.
        TypeError, ValueError: naming the argument, what was expected and what came; a dtype, opset or operator that TensorRT does
            not read.
        RuntimeError: TensorRT does not build the engine. Whatever is raised, nothing is left at ``path``.
    """
    library, chosen, ranges, strong = check_options(flavour, compute_capabilities, lengths, batches, workspace, mixed)
    path = check_file(path)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as temporary:
        if isinstance(source, ExportedProgram):
            model = Path(temporary) / "model.onnx"
            opset = NEWEST_OPSET if strong else OLDEST_OPSET
            to_onnx(source, model, input_names, output_names, opset=opset, device="cuda", mixed=mixed)
        else:
            if input_names or output_names or mixed:
                raise ValueError("source: expected no names and no mixed beside an ONNX file, which has its own, got some")
            model = Path(source)
        start = time.perf_counter()
        shapes = _check_model(model, NEWEST_OPSET if strong else OLDEST_OPSET, ranges)
        plan, described = _build(library, strong, model, shapes, ranges, chosen, workspace)
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "gka_compile": __version__,
            "flavour": flavour,
            "library_version": library.__version__,
            "compute_capabilities": chosen or [_this_gpu()],
            **described,
            "seconds": round(time.perf_counter() - start, 3),
            "bytes": len(plan),
            "sha256": hashlib.sha256(plan).hexdigest(),
        }
        built, told = Path(temporary) / "engine", Path(temporary) / "manifest"
        built.write_bytes(plan)
        told.write_text(json.dumps(manifest, indent=2) + "\n")
        built.replace(path)
        told.replace(path.with_name(path.name + ".json"))
    return manifest


# --- checks ----------------------------------------------------------------------------------------------------------------


def check_options(
    flavour: str = "rtx",
    compute_capabilities: Sequence[str] | None = None,
    lengths: Range | None = None,
    batches: Range | None = None,
    workspace: int | None = None,
    mixed: bool = False,
) -> tuple[Any, list[str], dict[str, Range | None], bool]:
    """Options of :func:`to_tensorrt` that need no model: the library, GPUs for the builder, sizes, whether networks are typed."""
    library = library_of(flavour)
    chosen = _check_capabilities(library, flavour, compute_capabilities)
    ranges = {name: check_range(argument, x) for name, argument, x in ((BATCH, "batches", batches), (LENGTH, "lengths", lengths))}
    if workspace is not None and (isinstance(workspace, bool) or not isinstance(workspace, int) or workspace < 1):
        raise ValueError(f"workspace: expected a positive number of bytes or None, got {workspace!r}")
    strong = flavour == "rtx" or _major(library) >= STRONGLY_TYPED_SINCE
    if mixed and not strong:
        raise ValueError(
            f"mixed: expected TensorRT {STRONGLY_TYPED_SINCE} or later, which has typed networks, got {library.__version__}"
        )
    return library, chosen, ranges, strong


def _major(library: Any) -> int:
    return int(library.__version__.split(".")[0])


def _this_gpu() -> str:
    from .driver import Driver

    return Driver().capability


def _check_capabilities(library: Any, flavour: str, given: Sequence[str] | None) -> list[str]:
    """What to pass to the builder; nothing for the GPU of this machine."""
    if flavour == "tensorrt":
        if given is not None:
            raise ValueError(
                f"compute_capabilities: expected None for flavour 'tensorrt', which builds for this GPU, got {given!r}"
            )
        return []
    known = {f"{name[2:-1]}.{name[-1]}" for name in dir(library.ComputeCapability) if re.fullmatch(r"SM\d+", name)}
    chosen = strings(RTX_CAPABILITIES if given is None else given)
    if not chosen or len(set(chosen)) != len(chosen) or set(chosen) - known:
        offered = ", ".join(sorted(known, key=float))
        raise ValueError(f"compute_capabilities: expected some of {offered} (TensorRT-RTX {library.__version__}), got {given!r}")
    return chosen


def check_range(argument: str, given: Range | None) -> Range | None:
    if given is None:
        return None
    sizes = tuple(given) if isinstance(given, Sequence) else ()
    if len(sizes) != 3 or any(isinstance(n, bool) or not isinstance(n, int) for n in sizes):
        raise TypeError(f"{argument}: expected three integers (least, usual, most), got {given!r}")
    if not 1 <= sizes[0] <= sizes[1] <= sizes[2] < 2**31:
        raise ValueError(f"{argument}: expected 1 ≤ least ≤ usual ≤ most < 2^31, got {given!r}")
    return sizes


def _check_model(path: Path, newest: int, ranges: dict[str, Range | None]) -> dict[str, list[int | str]]:
    """Shapes of the inputs and outputs by name, with the names of dynamic sizes."""
    import onnx

    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # OSError, or protobuf's DecodeError, whose place depends on its version
        raise ValueError(f"source: expected an ONNX file, got {path}: {error}") from None
    opset = {entry.domain: entry.version for entry in model.opset_import}.get("", 0)
    if not OLDEST_OPSET <= opset <= newest:
        raise ValueError(f"source: expected ONNX opset {OLDEST_OPSET} to {newest}, got {opset}: export it with opset={newest}")
    names = {x.name for x in model.graph.initializer}
    shapes: dict[str, list[int | str]] = {}
    used = set()
    for x in (*model.graph.input, *model.graph.output):
        if x.name in names:
            continue
        tensor = x.type.tensor_type
        dtype = onnx.TensorProto.DataType.Name(tensor.elem_type)
        if dtype not in ONNX_DTYPES:
            raise ValueError(
                f"source: expected dtypes among {', '.join(DTYPES.values())}, which TensorRT has, got {dtype.lower()} {x.name}"
            )
        shape: list[int | str] = [d.dim_param or d.dim_value for d in tensor.shape.dim]
        shapes[x.name] = shape
        used |= {d for d in shape if isinstance(d, str)} if x in model.graph.input else set()
    if used - set(ranges):
        raise ValueError(f"source: expected dynamic sizes named {BATCH} and {LENGTH}, got {', '.join(sorted(used - set(ranges)))}")
    for name, argument in ((BATCH, "batches"), (LENGTH, "lengths")):
        if name in used and ranges[name] is None:
            raise ValueError(f"{argument}: expected (least, usual, most) of the model's dynamic {name}, got None")
        if name not in used and ranges[name] is not None:
            raise ValueError(f"{argument}: expected None for a model whose {name} is not dynamic, got {ranges[name]}")
    return shapes


# --- building --------------------------------------------------------------------------------------------------------------


@functools.cache
def logger(library: Any) -> Any:
    """The one logger that TensorRT uses in a process; it keeps what it is told, until cleared."""

    class Log(library.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.told: list[tuple[Any, str]] = []

        def log(self, severity: Any, message: str) -> None:
            self.told.append((severity, message))

        def error(self) -> str:
            errors = [m for s, m in self.told if s in (library.ILogger.Severity.ERROR, library.ILogger.Severity.INTERNAL_ERROR)]
            return errors[0].strip() if errors else "no reason was given"

    return Log()


def _build(
    library: Any,
    strong: bool,
    model: Path,
    shapes: dict[str, list[int | str]],
    ranges: dict[str, Range | None],
    capabilities: Sequence[str],
    workspace: int | None,
) -> tuple[bytes, Manifest]:
    log = logger(library)
    log.told.clear()
    try:
        builder = library.Builder(log)
    except TypeError:  # what the bindings make of a null pointer
        raise RuntimeError(f"TensorRT: expected a machine with a GPU to build on, got {log.error()}") from None
    flags = library.NetworkDefinitionCreationFlag
    network = builder.create_network(1 << int(flags.STRONGLY_TYPED if strong else flags.EXPLICIT_BATCH))
    parser = library.OnnxParser(network, log)
    if not parser.parse_from_file(str(model)):
        error = parser.get_error(0)
        operator = getattr(error, "node_operator", lambda: "an operator")() or "an operator"
        raise ValueError(
            f"source: expected operators that TensorRT {library.__version__} reads, got {operator}: {error.desc().strip()}"
        )
    _let_attention_decompose(library, network)
    config = _configuration(library, builder, strong, capabilities, workspace)
    profile = builder.create_optimization_profile()
    inputs = [_describe(network.get_input(i), shapes) for i in range(network.num_inputs)]
    for x in inputs:
        bounds = [[(ranges[d] or ())[i] if isinstance(d, str) else d for d in x["shape"]] for i in range(3)]
        x["profile"] = dict(zip(("least", "usual", "most"), bounds, strict=True))
        if bounds[0] != x["shape"]:
            profile.set_shape(x["name"], *bounds)
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RuntimeError(f"TensorRT: expected an engine, got none: {log.error()}")
    outputs = [_describe(network.get_output(i), shapes) for i in range(network.num_outputs)]
    engine = _told(log.told) if capabilities else _opened(library, log, plan)
    described = {"inputs": inputs, "outputs": outputs, "network_layers": network.num_layers, **engine}
    log.told.clear()
    return bytes(plan), described


def _configuration(library: Any, builder: Any, strong: bool, capabilities: Sequence[str], workspace: int | None) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = library.ProfilingVerbosity.DETAILED
    config.clear_flag(library.BuilderFlag.TF32)  # on unless cleared: float32 products would keep float16's digits
    if not strong:  # before TensorRT 10, which leaves cuBLAS out itself: a step is launched in a fifth less time without it
        config.set_tactic_sources(config.get_tactic_sources() & ~(1 << int(library.TacticSource.CUBLAS)))
    if workspace is not None:
        config.set_memory_pool_limit(library.MemoryPoolType.WORKSPACE, workspace)
    if capabilities:
        config.num_compute_capabilities = len(capabilities)
        for i, capability in enumerate(capabilities):
            config.set_compute_capability(getattr(library.ComputeCapability, "SM" + capability.replace(".", "")), i)
    return config


def _let_attention_decompose(library: Any, network: Any) -> None:
    """Attention whose sizes or dtype no fused kernel covers is computed from its parts, rather than refused."""
    kind = getattr(library.LayerType, "ATTENTION_INPUT", None)
    for i in range(network.num_layers if kind is not None else 0):
        layer = network.get_layer(i)
        if layer.type == kind:
            layer.__class__ = library.IAttentionInputLayer  # how the bindings cast
            layer.attention.decomposable = True


def _describe(tensor: Any, shapes: dict[str, list[int | str]]) -> dict[str, Any]:
    return {"name": tensor.name, "dtype": DTYPES[tensor.dtype.name], "shape": shapes[tensor.name]}


def _opened(library: Any, log: Any, plan: Any) -> dict[str, Any]:
    """Layers of an engine for this GPU, and bytes of its activations."""
    engine = library.Runtime(log).deserialize_cuda_engine(plan)
    if engine is None:
        raise RuntimeError(f"TensorRT: expected an engine that loads here, got none: {log.error()}")
    memory = engine.device_memory_size_v2 if hasattr(engine, "device_memory_size_v2") else engine.device_memory_size
    return {"engine_layers": engine.num_layers, "activation_bytes": memory}


def _told(told: Sequence[tuple[Any, str]]) -> dict[str, Any]:
    """The same as the builder tells it, of an engine for other GPUs, which does not open here."""
    layers, memory = None, None
    for _, message in told:
        if message.startswith("Layers:\n"):
            layers = len(re.findall(r"^Name: ", message, re.MULTILINE))
        elif found := re.match(r"Total Activation Memory: (\d+) bytes", message):
            memory = int(found[1])
    return {"engine_layers": layers, "activation_bytes": memory}
