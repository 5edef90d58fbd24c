"""The kernels of the forward ops compiled ahead of time: a folder that launches them without Triton, torch or Python.

    manifest.json                              per op, variant and compute capability: launches, arguments, temporaries
    chunk_solve_kernel.sm_90.1f0c….cubin, .ptx  machine code for that GPU, and assembler text
    gka_kernels.inc                            all of it as C++, for a library that holds its kernels (plugin/)

Nothing in the manifest is written by hand.  The op's own launcher runs once on fake tensors whose batch B and length T are symbols,
with the launches caught on their way to the GPU: grids, integer arguments and temporaries come out as expressions of B and T, and
a launcher that changes changes the bundle.  The manifest, per variant:

    op, attributes     the op's scalars: num_heads, chunk_size, scale, ridge_ratio, num_iter, as far as it has them
    inputs, outputs    name, dtype, shape; in the order of the op, absent optional inputs left out
    targets            by compute capability ("9.0"):
      temporaries        name, bytes
      launches           in this order on one stream, those with an empty grid left out:
        kernel             name of the entry point in the files ``cubin`` and ``ptx``
        grid               blocks in x, y, z
        threads            of a block, in x
        shared_bytes       dynamic shared memory; above 48 KiB the driver wants it announced
        arguments          {"pointer": tensor or temporary, "offset": bytes}, {"integer": value, "type": "i32" or "i64"}, or
                           {"pointer": None}: a null pointer for Triton's scratch memory, of which these kernels use none

A size is a number, "B", "T", or [operator, size, …] with the operators of :data:`OPERATORS`; :func:`evaluate` computes it.  What
is assumed: every pointer is a multiple of ``alignment`` bytes, and every tensor is contiguous.  Packed sequences have no bundle.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import inspect
import itertools
import json
import math
import operator
import os
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._sympy import functions as symbolic

from gka_compile.custom_ops import ahead, config
from gka_compile.custom_ops.reference import num_slots, storage_dtype
from gka_compile.validation import MAX_WIDTH

from .bundle_source import kernels_source
from .sealed import Manifest, Sealed

__all__ = [
    "ALIGNMENT",
    "CAPABILITIES",
    "OPS",
    "BundleError",
    "Size",
    "Variant",
    "build_bundle",
    "check_capabilities",
    "evaluate",
    "is_optional",
    "is_tensor",
    "known_capabilities",
    "load_bundle",
    "target_for",
    "variants",
]

SOURCE = "gka_kernels.inc"
ALIGNMENT = 16  # bytes; torch and TensorRT align to 256

CAPABILITIES = {  # compute capability: KiB of shared memory that a block may use
    **{"8.0": 163, "8.6": 99, "8.7": 163, "8.9": 99, "9.0": 227, "10.0": 227},
    **{"10.1": 227, "11.0": 227, "12.0": 99, "12.1": 99},  # Thor is 10.1 to CUDA 12 and 11.0 to CUDA 13; DGX Spark is 12.1
}
PORTABLE_BELOW = 9  # from this major version on, Triton compiles for one GPU only (sm_90a, sm_120a)
OPS = {  # outputs, in the order of the op
    "chunk_state": ("h_chunks", "u_chunks", "state_scales", "h_out", "u_out"),
    "chunk_output": ("o", "x", "x_scale", "phi"),
    "step": ("o", "h_out", "u_out"),
}
GATES = ("g", "gk", "alpha", "beta")
DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}  # and Triton's names of them

Size = Any  # int | str | list[str | Size]
OPERATORS: dict[str, Callable[[int, int], int]] = {
    "add": operator.add,
    "mul": operator.mul,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
    "max": max,
    "min": min,
}


class BundleError(ValueError):
    """A folder that is not a bundle, not a whole one, or kernels that cannot be put into one."""


SEALED = Sealed("a kernel bundle", "gka-compile kernel bundle", 1, "build the bundle again", BundleError)


def evaluate(size: Size, B: int, T: int) -> int:
    """A size of the manifest at batch B and length T; divisions round down."""
    if isinstance(size, str):
        return {"B": B, "T": T}[size]
    if isinstance(size, int):
        return size
    return functools.reduce(OPERATORS[size[0]], (evaluate(part, B, T) for part in size[1:]))


# --- what to compile -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """One op with everything fixed but batch and length.

    Attributes:
        op: "chunk_state", "chunk_output" or "step".
        dtype: of q, k and v: float32, float16 or bfloat16.
        num_heads, num_kv_heads, key_width, value_width: H, Hk, K, V; widths are multiples of 8 up to 128.
        optional: the op's optional inputs that are given: of g, gk, alpha, beta, h0 and u0.
        gate_dtype: of g, gk, alpha and beta: float32 or ``dtype``.
        chunk_size: C; None: what suits each compute capability (:func:`.config.gpu_chunk`).
        scale: factor of the output; None: K^{-1/2}.
        ridge_ratio, num_iter: of the solve.

    An op ignores the fields that it has no use for: step has no chunks, chunk_state no solve.

    Raises:
        ValueError, TypeError: naming the field, what was expected and what came.
    """

    op: str
    dtype: torch.dtype
    num_heads: int
    num_kv_heads: int
    key_width: int
    value_width: int
    optional: tuple[str, ...] = ()
    gate_dtype: torch.dtype = torch.float32
    chunk_size: int | None = None
    scale: float | None = None
    ridge_ratio: float = config.RIDGE_RATIO
    num_iter: int = config.NUM_ITER

    def __post_init__(self) -> None:
        if self.op not in OPS:
            raise ValueError(f"op: expected one of {', '.join(OPS)}, got {self.op!r}")
        if self.dtype not in DTYPES:
            raise TypeError(f"dtype: expected float32, float16 or bfloat16, got {self.dtype}")
        for name in ("key_width", "value_width"):
            width = getattr(self, name)
            if not 8 <= width <= MAX_WIDTH or width % 8:
                raise ValueError(f"{name}: expected a head width that is a multiple of 8 from 8 to {MAX_WIDTH}, got {width}")
        if self.num_kv_heads < 1 or self.num_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads: expected a divisor of num_heads = {self.num_heads}, got {self.num_kv_heads}")
        known = [a.name for a in _schema(self.op) if is_optional(a)]
        unknown = [name for name in self.optional if name not in known]
        if unknown or len(set(self.optional)) != len(self.optional):
            raise ValueError(f"optional: expected some of {', '.join(known)}, each once, got {self.optional}")
        if self.gate_dtype not in (torch.float32, self.dtype):
            raise TypeError(f"gate_dtype: expected float32 or {self.dtype}, got {self.gate_dtype}")
        C = self.chunk_size
        if C is not None and (C < 16 or C & (C - 1)):
            raise ValueError(f"chunk_size: expected None or a power of two of at least 16, got {C}")
        if not 0 < self.ridge_ratio < math.inf:
            raise ValueError(f"ridge_ratio: expected a positive number, got {self.ridge_ratio}")
        if self.num_iter < 1:
            raise ValueError(f"num_iter: expected at least 1, got {self.num_iter}")

    def chunk(self, capability: str) -> int:
        """C on a GPU of this compute capability."""
        if self.chunk_size is not None:
            return self.chunk_size
        return config.gpu_chunk(_version(capability)[0], self.dtype.itemsize, self.key_width, self.value_width)


def variants(program: ExportedProgram) -> list[Variant]:
    """The variants that the forward ``gka`` nodes of a program need, each once.

    Raises:
        ValueError: a node that no kernel serves (packed sequences, gates of several dtypes, a head width).
    """
    found: dict[Variant, None] = {}
    for node in program.graph.nodes:
        op = next((op for op in OPS if node.target is getattr(torch.ops.gka, op).default), None)
        if op is None:
            continue
        given = {a.name: x for a, x in zip(_schema(op, packed=True), node.args, strict=True) if x is not None}
        if "cu_seqlens" in given:
            raise ValueError(f"{node.name}: expected sequences of one length, got packed ones (cu_seqlens): they run in torch only")
        values = {name: x.meta["val"] if isinstance(x, torch.fx.Node) else x for name, x in given.items()}
        gate_dtypes = {values[name].dtype for name in GATES if name in values} or {torch.float32}
        if len(gate_dtypes) > 1:
            raise ValueError(f"{node.name}: expected g, gk, alpha and beta of one dtype, got {sorted(map(str, gate_dtypes))}")
        k, v = values["k"], values["v"]
        variant = Variant(
            op=op,
            dtype=k.dtype,
            num_heads=values["num_heads"] if op == "chunk_state" else values["q"].shape[-2],
            num_kv_heads=k.shape[-2],
            key_width=k.shape[-1],
            value_width=v.shape[-1],
            optional=tuple(a.name for a in _schema(op) if is_optional(a) and a.name in given),
            gate_dtype=gate_dtypes.pop(),
            **{name: values[name] for name in ("chunk_size", "scale", "ridge_ratio", "num_iter") if name in values},
        )
        found[variant] = None
    return list(found)


def _schema(op: str, packed: bool = False) -> list[Any]:
    """Arguments of an op."""
    arguments = getattr(torch.ops.gka, op).default._schema.arguments
    return [a for a in arguments if packed or a.name != "cu_seqlens"]


def is_tensor(argument: Any) -> bool:
    """Of an op's schema."""
    return "Tensor" in str(argument.type)


def is_optional(argument: Any) -> bool:
    """Of an op's schema."""
    return "Optional" in str(argument.type)


# --- tracing a launcher ----------------------------------------------------------------------------------------------------


class _Sizes:
    """B and T: numbers, or by default symbols for everything from 0 up."""

    def __init__(self, B: Any = None, T: Any = None) -> None:
        self._env = ShapeEnv(specialize_zero_one=False, duck_shape=False)
        self._names: dict[sympy.Symbol, str] = {}
        self.mode = FakeTensorMode(shape_env=self._env)
        self.B = self._symbol("B", 3) if B is None else B
        self.T = self._symbol("T", 1031) if T is None else T

    def _symbol(self, name: str, example: int) -> Any:
        source = ConstantSource(name)
        symbol = self._env.create_symbol(example, source, DimDynamic.DYNAMIC)
        assert isinstance(symbol, sympy.Symbol)
        self._names[symbol] = name
        return self._env.create_symintnode(symbol, hint=example, source=source)

    def express(self, x: int | torch.SymInt) -> Size:
        return self._express(x.node.expr) if isinstance(x, torch.SymInt) else int(x)

    def _express(self, x: sympy.Basic) -> Size:
        if isinstance(x, sympy.Integer):
            return int(x)
        if isinstance(x, sympy.Symbol):
            return self._names[x]
        if isinstance(x, sympy.Pow) and isinstance(x.exp, sympy.Integer) and x.exp > 0:
            return ["mul", *[self._express(x.base)] * int(x.exp)]
        kinds = {
            sympy.Add: "add",
            sympy.Mul: "mul",
            symbolic.FloorDiv: "floordiv",
            symbolic.Mod: "mod",
            symbolic.PythonMod: "mod",
            symbolic.Max: "max",
            symbolic.Min: "min",
        }
        for kind, name in kinds.items():
            if isinstance(x, kind):
                return [name, *map(self._express, x.args)]
        raise BundleError(f"launcher: expected sizes of sums, products, integer divisions, minima and maxima, got {x}")


class _OnlyAllocations(TorchDispatchMode):
    """What a launcher does beside launching must be within what a bundle can repeat: uninitialised memory, and views."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not (func.is_view or name == "device" or name.startswith(("empty", "new_empty"))):
            raise BundleError(f"launcher: expected Triton launches, empty tensors and views, got {func}, which no bundle holds")
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class _Launch:
    """One launch on its way to the GPU, its arguments by name."""

    kernel: Any
    grid: tuple[Any, ...]
    arguments: dict[str, Any]  # by parameter: Tensor, int, SymInt or a constexpr
    options: dict[str, Any]  # num_warps, num_stages, …


def _bound(made: ahead.Launch) -> _Launch:
    kernel, named = made.kernel, dict(made.named)
    options = {name: named.pop(name) for name in made.named if name not in kernel.arg_names}
    bound = inspect.signature(kernel.fn).bind(*made.args, **named)
    bound.apply_defaults()
    return _Launch(kernel, (*made.grid, 1, 1)[:3], dict(bound.arguments), options)


def _trace(launch: Callable[[], None], tensors: Mapping[str, Tensor], sizes: _Sizes) -> tuple[list[_Launch], dict[str, Any]]:
    """Run ``launch``, which works on ``tensors``, the op's inputs and outputs: (launches, what the manifest says of them)."""
    names = {t.untyped_storage()._cdata: name for name, t in tensors.items()}
    temporaries: list[dict[str, Any]] = []
    launches: list[dict[str, Any]] = []
    with sizes.mode, ahead.keeping_launches() as kept, _OnlyAllocations():
        launch()
    caught = [_bound(made) for made in kept]
    for made in caught:
        arguments: list[dict[str, Any]] = []
        for parameter in made.kernel.params:
            x = made.arguments[parameter.name]
            if parameter.is_constexpr:
                continue
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                if storage._cdata not in names:
                    names[storage._cdata] = f"temporary_{len(temporaries)}"
                    temporaries.append({"name": names[storage._cdata], "bytes": sizes.express(storage.nbytes())})
                offset = sizes.express(x.storage_offset() * x.element_size())
                arguments.append({"pointer": names[storage._cdata], "offset": offset})
            elif isinstance(x, (int, torch.SymInt)) and not isinstance(x, bool):
                arguments.append({"integer": sizes.express(x), "type": _integer_type(x)})
            else:
                raise BundleError(f"{made.kernel.__name__}: expected tensors and integers, got {parameter.name} = {x!r}")
        grid = [sizes.express(n) for n in made.grid]
        constants = {p.name: made.arguments[p.name] for p in made.kernel.params if p.is_constexpr}
        unique = {"kernel": made.kernel.__name__, "constants": str(constants), "options": str(made.options)}
        launches.append({**unique, "grid": grid, "arguments": arguments})
    return caught, {"temporaries": temporaries, "launches": launches}


def _integer_type(x: int | torch.SymInt) -> str:
    """As Triton's launcher chooses it. A size that is not known yet is taken for 32 bits; whoever launches has to check."""
    return "i64" if isinstance(x, int) and not -(2**31) <= x < 2**31 else "i32"


# --- one variant on one compute capability ---------------------------------------------------------------------------------


def _describe(variant: Variant, C: int, sizes: _Sizes) -> tuple[dict[str, Any], dict[str, Tensor], list[Any]]:
    """Fake arguments of the op: (what the manifest says of the variant, inputs and outputs by name, the op's arguments)."""
    v = variant
    B, T, H, Hk, K, V = sizes.B, sizes.T, v.num_heads, v.num_kv_heads, v.key_width, v.value_width
    lead = (B,) if v.op == "step" else (B, T)
    S = num_slots(B, T, None, C)
    shapes = {
        **{"q": (*lead, H, K), "k": (*lead, Hk, K), "v": (*lead, Hk, V)},
        **dict.fromkeys(GATES, (*lead, H)),
        **{"h": (B, H, K, K), "u": (B, H, K, V), "h0": (B, H, K, K), "u0": (B, H, K, V)},
        **{"h_chunks": (S, H, K, K), "u_chunks": (S, H, K, V), "state_scales": (S, H, 2)},
    }
    stored = storage_dtype(torch.empty(0, dtype=v.dtype))
    dtypes = {
        **dict.fromkeys(("q", "k", "v"), v.dtype),
        **dict.fromkeys(GATES, v.gate_dtype),
        **dict.fromkeys(("h_chunks", "u_chunks"), stored),
    }
    scalars: dict[str, int | float] = {
        "num_heads": H,
        "chunk_size": C,
        "scale": K**-0.5 if v.scale is None else float(v.scale),
        "ridge_ratio": float(v.ridge_ratio),
        "num_iter": v.num_iter,
    }
    tensors: dict[str, Tensor] = {}
    args: list[Any] = []
    with sizes.mode:
        for argument in _schema(v.op, packed=True):
            name = argument.name
            if not is_tensor(argument):
                args.append(scalars[name])
            elif name in v.optional or not is_optional(argument):
                tensors[name] = torch.empty(shapes[name], dtype=dtypes.get(name, torch.float32))
                args.append(tensors[name])
            else:
                args.append(None)
        outputs = dict(zip(OPS[v.op], getattr(torch.ops.gka, v.op)(*args), strict=True))

    def described(tensors: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        return [
            {"name": n, "dtype": str(t.dtype).removeprefix("torch."), "shape": [sizes.express(s) for s in t.shape]}
            for n, t in tensors.items()
        ]

    attributes = {a.name: scalars[a.name] for a in _schema(v.op) if not is_tensor(a)}
    description = {"op": v.op, "attributes": attributes, "inputs": described(tensors), "outputs": described(outputs)}
    return description, {**tensors, **outputs}, args


def _compile(made: _Launch, described: dict[str, Any], capability: str) -> dict[str, bytes]:
    """Compile a traced launch and complete its description: (suffix → contents)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    traced, described["arguments"] = iter(described["arguments"]), []
    for i, parameter in enumerate(made.kernel.params):
        x = made.arguments[parameter.name]
        argument = None if parameter.is_constexpr else next(traced)
        if argument is None or (isinstance(x, int) and x == 1 and not parameter.do_not_specialize):
            signature[parameter.name], constants[(i,)] = "constexpr", x  # Triton, too, compiles a kernel of its own for 1
            continue
        described["arguments"].append(argument)
        if "pointer" in argument:
            signature[parameter.name], multiple = f"*{DTYPES[x.dtype]}", argument["offset"]
        else:
            signature[parameter.name], multiple = argument["type"], argument["integer"]
        if _is_multiple(multiple) and not parameter.do_not_specialize:
            attributes[(i,)] = [["tt.divisibility", ALIGNMENT]]
    source = ASTSource(made.kernel, signature, constants, attributes)
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.disable_line_info = True  # it holds paths of this machine
        target = GPUTarget("cuda", int(capability.replace(".", "")), 32)
        compiled = triton.compile(source, target=target, options=dict(made.options))
    told, name = compiled.metadata, made.kernel.__name__
    features = ("global_scratch_size", "profile_scratch_size", "launch_cooperative_grid", "launch_pdl")
    unusual = [x for x in features if getattr(told, x)] + ["num_ctas"] * (told.num_ctas != 1)
    if unusual:
        raise BundleError(f"{name}: expected a plain launch without scratch memory, got one with {', '.join(unusual)}")
    available = CAPABILITIES[capability]
    if told.shared > available * 1024:
        raise BundleError(
            f"{name}: expected at most the {available} KiB of shared memory of compute capability {capability}, "
            f"got {told.shared / 1024:.1f} KiB: choose a smaller chunk_size or head width"
        )
    ptx = compiled.asm["ptx"]
    declared = re.findall(r"\.param\s+\.(\w+)", ptx[ptx.index(f".entry {told.name}(") :].partition("{")[0])
    expected = ["u64" if "pointer" in a else "u" + a["type"][1:] for a in described["arguments"]]
    scratch = ["u64"] * (len(declared) - len(expected))
    if declared != expected + scratch or len(scratch) > 2:
        raise BundleError(f"{name}: expected parameters {expected} and Triton's two, got {declared}: an unknown Triton")
    described["arguments"] += [{"pointer": None} for _ in scratch]
    del described["constants"], described["options"]  # they are in the machine code
    described |= {"kernel": told.name, "threads": 32 * told.num_warps, "shared_bytes": told.shared}
    return {"cubin": compiled.asm["cubin"], "ptx": ptx.encode()}


def _is_multiple(size: Size) -> bool:
    """Whether a size is a multiple of ALIGNMENT at every B and T, as far as one sees."""
    if isinstance(size, int):
        return size % ALIGNMENT == 0
    return isinstance(size, list) and size[0] == "mul" and any(map(_is_multiple, size[1:]))


def _target(variant: Variant, capability: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, bytes]]:
    """(description of the variant, of its launches on ``capability``, files)."""
    from gka_compile.custom_ops import kernels

    launcher, C = getattr(kernels, f"launch_{variant.op}"), variant.chunk(capability)

    def traced(sizes: _Sizes) -> tuple[dict[str, Any], list[_Launch], dict[str, Any]]:
        description, tensors, args = _describe(variant, C, sizes)
        outputs = tuple(tensors[name] for name in OPS[variant.op])
        return description, *_trace(lambda: launcher(*args, outputs), tensors, sizes)

    description, launches, target = traced(_Sizes())
    for B, T in itertools.product((1, 2, 9, 64, 1000), (1, 2, 63, 64, 65, 5000)):
        if _at((description, target), B, T) != _at(traced(_Sizes(B, T))[::2], B, T):
            raise BundleError(
                f"{variant.op}: expected the same launches at every batch and length, got others at batch {B}, length {T}"
            )
    files = {}
    for made, described in zip(launches, target["launches"], strict=True):
        for suffix, contents in _compile(made, described, capability).items():
            digest = hashlib.sha256(contents).hexdigest()[:16]
            name = f"{made.kernel.__name__}.sm_{capability.replace('.', '')}.{digest}.{suffix}"
            described[suffix], files[name] = name, contents
    return description, target, files


def _at(x: Any, B: int, T: int) -> Any:
    """A description with its sizes evaluated."""
    if isinstance(x, dict):
        return {key: _at(value, B, T) for key, value in x.items()}
    if isinstance(x, (list, tuple)) and not (x and isinstance(x[0], str) and x[0] in OPERATORS):
        return [_at(value, B, T) for value in x]
    return evaluate(x, B, T) if isinstance(x, list) or x in ("B", "T") else x


# --- writing ---------------------------------------------------------------------------------------------------------------


@functools.cache
def known_capabilities() -> tuple[str, ...]:
    """Those of :data:`CAPABILITIES` that the installed Triton's assembler knows."""
    from triton.backends.nvidia.compiler import get_ptxas

    def known(number: int) -> bool:
        told = subprocess.run([get_ptxas(number).path, "--help"], capture_output=True, text=True)
        return re.search(rf"\bsm_{number}\b", told.stdout) is not None

    return tuple(c for c in CAPABILITIES if known(int(c.replace(".", ""))))


def strings(given: Any) -> list[str]:
    """A list of strings as one, and anything else as an empty one."""
    listed = isinstance(given, Sequence) and not isinstance(given, str) and all(isinstance(x, str) for x in given)
    return list(given) if listed else []


def check_capabilities(given: Sequence[str] | None) -> tuple[str, ...]:
    """``compute_capabilities`` of :func:`build_bundle`, each once, or what it raises of them."""
    try:
        import triton
    except ImportError:
        raise ImportError("a kernel bundle needs Triton, which is not installed: pip install triton") from None
    known = known_capabilities()
    chosen = known if given is None else tuple(dict.fromkeys(strings(given)))
    if not chosen or set(chosen) - set(known):
        raise ValueError(
            f"compute_capabilities: expected some of {', '.join(known)} (those that Triton {triton.__version__} knows), "
            f"got {given!r}"
        )
    return chosen


def build_bundle(
    folder: str | Path,
    variants: Sequence[Variant],
    compute_capabilities: Sequence[str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Manifest:
    """Compile ``variants`` and write the bundle to ``folder``, which appears when it is whole or not at all.

    Args:
        folder: new, or a bundle, which is replaced.
        compute_capabilities: such as "8.7" (Orin) or "9.0" (Hopper), of :data:`CAPABILITIES`; None: all that the installed Triton
            knows. :func:`target_for` says which GPUs run what.
        progress: called with a short text before each compilation.

    Returns:
        The manifest.

    Raises:
        BundleError: ``folder`` exists and is not a bundle, or a kernel does not fit a GPU's shared memory.
        ImportError: Triton is absent.
        ValueError: no variants, or a compute capability that is not known here.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("TRITON_INTERPRET: expected it unset, for interpreted kernels do not compile, got 1")
    if not variants:
        raise ValueError("variants: expected at least one, got none")
    chosen = check_capabilities(compute_capabilities)
    folder = Path(folder)
    SEALED.check_replaceable(folder)
    say = progress if progress is not None else lambda _: None
    described: dict[str, dict[str, Any]] = {}
    files: dict[str, bytes] = {}
    for variant in dict.fromkeys(variants):
        for capability in chosen:
            say(f"{variant.op} {str(variant.dtype).removeprefix('torch.')} {capability}")
            description, target, contents = _target(variant, capability)
            key = json.dumps(description)
            described.setdefault(key, description | {"targets": {}})["targets"][capability] = target
            files |= contents
    portable = [c for c in chosen if _version(c)[0] < PORTABLE_BELOW]
    files[SOURCE] = kernels_source(list(described.values()), files, portable).encode()

    def fill(built: Path) -> Manifest:
        for name, data in files.items():
            (built / name).write_bytes(data)
        return {
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "triton")},
            "alignment": ALIGNMENT,
            "variants": list(described.values()),
        }

    return SEALED.write(folder, fill)


# --- reading ---------------------------------------------------------------------------------------------------------------


def load_bundle(folder: str | Path) -> Manifest:
    """The manifest of the bundle in ``folder``, every file checked against it.

    Raises:
        BundleError: the folder or a file is absent, truncated or changed, or the format is another version's.
    """
    return SEALED.load(folder)


def target_for(variant: Mapping[str, Any], capability: str) -> tuple[dict[str, Any], str]:
    """What a GPU of this compute capability runs of a variant: (one of its targets, "cubin" or "ptx").

    Its own machine code; where code is portable, up to 8.9, that of the greatest minor version below its own; else the assembler
    text of the greatest version below its own, which the driver compiles.

    Raises:
        BundleError: there is none.
    """
    targets, own = variant["targets"], _version(capability)
    if capability in targets:
        return targets[capability], "cubin"
    older = [c for c in targets if _version(c) < own and _version(c)[0] < PORTABLE_BELOW]
    if not older:
        raise BundleError(
            f"{variant['op']}: expected a GPU of a compute capability that the bundle was built for, {', '.join(targets)}, "
            f"got one of {capability}: build it for that too"
        )
    best = max([c for c in older if _version(c)[0] == own[0]] or older, key=_version)
    return targets[best], "cubin" if _version(best)[0] == own[0] else "ptx"


def _version(capability: str) -> tuple[int, int]:
    major, minor = map(int, capability.split("."))
    return major, minor
