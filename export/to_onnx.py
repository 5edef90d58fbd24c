"""ONNX: a program as a graph of standard operators, or with its ``gka`` nodes.

A ``gka`` node has the op's name in the domain ``gka``, version 1.  Its inputs are the op's tensors in the op's order, without those
that are absent (TensorRT has no optional inputs), and the attribute ``inputs`` names them, separated by commas; its outputs are all
of the op's results; its other attributes are the op's scalars.  It comes in two forms:

    fused    Every node is a call of a function in the same file whose body is the portable form, so the file runs where our kernels
             are not.  Nodes that differ in dtypes, shapes or attributes need functions of their own: step, step_1, step_2, ....
             (ONNX has overloads for that, but TensorRT's parser does not look at them and would take the first.)
    plugin   For TensorRT's plugins: without the functions, and always the op's name.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.export import Dim, ExportedProgram

from gka_compile.custom_ops.reference import num_slots

from .bundle import OPS, is_optional, is_tensor, variants
from .portable import Table, decompositions, portable
from .program import BATCH, LENGTH, Programs
from .sealed import check_file

__all__ = ["DOMAIN", "FORMS", "NEWEST_OPSET", "OPSETS", "model_names", "present_name", "to_onnx"]

FORMS = ("portable", "fused", "plugin")
DOMAIN = "gka"
DOMAIN_VERSION = 1
STANDARD_DOMAINS = ("", "ai.onnx")
NEWEST_OPSET = 23  # of the oldest onnx and onnxruntime that the package allows
OLDEST_OPSET = 17  # with IR version 8: TensorRT 8.5
EXPORTER_OPSET = 18  # the oldest that torch writes
EXAMPLE_BATCH = 2  # neither 0 nor 1, which torch.export takes for constants
CONSTANT_SIZE = 128 * 128  # elements of constants that are looked for twice: more than any of ours, fewer than weights have
OPSETS = tuple(range(OLDEST_OPSET, NEWEST_OPSET + 1))

Size = int | None  # of a dimension; None: dynamic


def present_name(name: str) -> str:
    """The output that continues a state: h_state_0 → present_h_0, key_cache_2 → present_key_2, position → present_position.

    The spelling is that of TensorRT-Edge-LLM.
    """
    return "present_" + name.replace("_state_", "_").replace("_cache_", "_")


def model_names(programs: Programs) -> tuple[list[str], list[str]]:
    """Inputs and outputs of a model's programs, in their order."""
    return ["tokens", *programs.state], ["logits", *map(present_name, programs.state)]


def to_onnx(
    program: ExportedProgram,
    path: str | Path,
    input_names: Sequence[str],
    output_names: Sequence[str],
    *,
    form: str = "portable",
    opset: int = NEWEST_OPSET,
    device: str | None = None,
    mixed: bool = False,
    chunk_size: int | None = None,
) -> Path:
    """Write ``program`` to ``path`` as ONNX.

    Sizes that are dynamic in the first input are named "batch" and "length", in this order, wherever they occur.  Weights past the
    2 GB of a protobuf go to a second file beside ``path``, named after it with ``.data`` added.

    Args:
        program: one of :class:`.Programs`, or any other exported program of standard and forward ``gka`` ops.
        form: "portable", standard operators alone; "fused" or "plugin", with ``gka`` nodes (see above).
        opset: 17 to 23. 17 comes with IR version 8, for TensorRT 8.5 (JetPack 5).
        device, mixed: as in :func:`.decompositions`; device None: the one that the program was exported on. Not for "plugin".
        chunk_size: tokens per chunk, for "fused" and "plugin"; None: the program's, which suits the device that it was exported on.
            For the kernels of a GPU, :func:`.config.gpu_chunk`.

    Raises:
        ImportError: onnx or onnxscript is absent.
        TypeError, ValueError: naming the argument, what was expected and what came; an operator that opset 17 does not have, a
            program without a portable form, or a ``gka`` node that no kernel serves.
        RuntimeError: an operator is not a standard one. Whatever is raised, nothing is left at ``path``.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401  torch.onnx needs it
    except ImportError as error:
        raise ImportError(f'ONNX export needs {error.name}, which is not installed: pip install "gka-compile[onnx]"') from error
    if form not in FORMS:
        raise ValueError(f"form: expected one of {', '.join(FORMS)}, got {form!r}")
    if opset not in OPSETS:
        raise ValueError(f"opset: expected one from {OLDEST_OPSET} to {NEWEST_OPSET}, got {opset!r}")
    path = check_file(path)
    if not isinstance(program, ExportedProgram):
        raise TypeError(f"program: expected an ExportedProgram, got {type(program).__name__}")
    args, _ = program.example_inputs
    inputs, outputs = program.graph_signature.user_inputs, program.graph_signature.user_outputs
    for argument, names, expected in (("input_names", input_names, inputs), ("output_names", output_names, outputs)):
        if len(names) != len(expected):
            raise ValueError(f"{argument}: expected the program's {len(expected)} names, got {len(names)}: {list(names)}")
        if wrong := [n for n in names if not isinstance(n, str) or not n]:
            raise TypeError(f"{argument}: expected names that are strings and not empty, got {wrong[0]!r}")
    every = [*input_names, *output_names]
    if twice := sorted({n for n in every if every.count(n) > 1}):
        raise ValueError(f"input_names, output_names: expected every name once, got {', '.join(twice)} more than once")
    table: Table = {}
    if form != "plugin":
        table = decompositions(args[0].device.type if device is None else device, mixed)
    elif device is not None or mixed:
        raise ValueError(
            f"device, mixed: expected neither for form 'plugin', which holds no portable form, got {device!r}, {mixed!r}"
        )
    if form == "portable":
        if chunk_size is not None:
            raise ValueError(f"chunk_size: expected None for form 'portable', got {chunk_size}")
        program = portable(program, table)
    else:
        program = _for_kernels(program, chunk_size)
    sizes = (_dynamic_sizes(program), *({},) * (len(args) - 1))  # the other inputs share these symbols
    converted = _convert(program, input_names, output_names, opset, sizes)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        built = Path(folder) / path.name
        converted.save(built)
        model = onnx.load(str(built), load_external_data=False)
        _leave_out_absent(model)
        if form == "fused":
            _add_functions(model, table, opset)
        standard = [node for node in nodes(model) if form == "portable" or node.domain != DOMAIN]
        foreign = sorted({f"{node.domain}::{node.op_type}" for node in standard if node.domain not in STANDARD_DOMAINS})
        if foreign:
            raise RuntimeError(f"ONNX: expected standard operators alone, got {', '.join(foreign)}")
        for node in nodes(model):
            node.ClearField("metadata_props")  # the Python stack of every node: most of a file, and paths of this machine
        if opset == OLDEST_OPSET:
            _lower(model)
        onnx.save(model, str(built))
        onnx.checker.check_model(str(built), full_check=True)
        for file in sorted(Path(folder).iterdir(), reverse=True):  # the data first
            file.replace(path.parent / file.name)
    return path


def _convert(program: ExportedProgram, inputs: Sequence[str], outputs: Sequence[str], opset: int, sizes: Any) -> Any:
    """A ``torch.onnx.ONNXProgram``; ``gka`` nodes stay nodes."""
    from onnx_ir.passes import common

    converted = torch.onnx.export(
        program,
        dynamo=True,
        input_names=list(inputs),
        output_names=list(outputs),
        opset_version=max(opset, EXPORTER_OPSET),
        dynamic_shapes=sizes,
        custom_translation_table={op: _translation(op) for op in _forward_ops().values()},
        verbose=False,
    )
    assert converted is not None
    # both ops of a layer split the same tensors with the same constants
    common.DeduplicateInitializersPass(size_limit=CONSTANT_SIZE)(converted.model)
    common.CommonSubexpressionEliminationPass()(converted.model)
    _cast_before_norms(converted.model)
    return converted


def _cast_before_norms(model: Any) -> None:
    """The cast of 16-bit x to the scale's float32, which the exporter draws into RMSNormalization; onnx wants its dtypes alike."""
    import onnx_ir

    for node in list(model.graph):
        if node.op_type == "RMSNormalization" and node.inputs[0].dtype != node.inputs[1].dtype:
            cast = onnx_ir.node("Cast", [node.inputs[0]], {"to": int(node.inputs[1].dtype)})
            cast.outputs[0].dtype = node.inputs[1].dtype
            model.graph.insert_before(node, cast)
            node.replace_input_with(0, cast.outputs[0])


def _dynamic_sizes(program: ExportedProgram) -> dict[int, str]:
    """Dimensions of the first input to their names."""
    first = program.graph_signature.user_inputs[0]
    shape = next(node.meta["val"].shape for node in program.graph.nodes if node.name == first)
    dynamic = [i for i, size in enumerate(shape) if isinstance(size, torch.SymInt)]
    return dict(zip(dynamic, (BATCH, LENGTH), strict=False))


def nodes(model: Any) -> Iterator[Any]:
    """All nodes of an ``onnx.ModelProto``, those of subgraphs and functions among them."""
    stack = [model.graph, *model.functions]
    while stack:
        for node in stack.pop().node:
            yield node
            for attribute in node.attribute:
                stack += [attribute.g] if attribute.HasField("g") else list(attribute.graphs)


# --- gka nodes -------------------------------------------------------------------------------------------------------------


def _forward_ops() -> dict[str, OpOverload]:
    return {name: getattr(torch.ops.gka, name).default for name in OPS}


def _tensors(op: OpOverload) -> list[Any]:
    """Its tensor arguments."""
    return [a for a in op._schema.arguments if is_tensor(a)]


def _for_kernels(program: ExportedProgram, chunk_size: int | None) -> ExportedProgram:
    """``program`` with ``chunk_size`` tokens per chunk, if given.

    Raises:
        TypeError, ValueError: a node that no kernel serves.
    """
    known = _forward_ops().values()
    for node in program.graph.nodes:
        if str(node.target).startswith("gka.") and node.target not in known:
            raise ValueError(f"program: expected gka nodes among {', '.join(OPS)}, got {node.target}")
    if chunk_size is None:
        variants(program)
        return program
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int):
        raise TypeError(f"chunk_size: expected an integer or None, got {chunk_size!r}")
    program = program.run_decompositions({})  # a copy
    for node in program.graph.nodes:
        if node.target in known:
            names = [a.name for a in node.target._schema.arguments]
            node.args = tuple(chunk_size if name == "chunk_size" else x for name, x in zip(names, node.args, strict=True))
    variants(program)
    return program.run_decompositions({})  # the shapes of the chunk states


def _translation(op: OpOverload) -> Callable[..., Any]:
    """The node of an op, for torch's exporter."""
    from onnx.defs import OpSchema
    from onnxscript.values import Op, Opset

    def parameter(name: str, optional: bool) -> Any:
        option = OpSchema.FormalParameterOption
        return OpSchema.FormalParameter(
            name, "T", param_option=option.Optional if optional else option.Single, is_homogeneous=False
        )

    tensors = _tensors(op)
    scalars = [a for a in op._schema.arguments if a not in tensors]
    kinds = {"int": OpSchema.AttrType.INT, "float": OpSchema.AttrType.FLOAT}
    schema = OpSchema(
        op._opname,
        DOMAIN,
        DOMAIN_VERSION,
        inputs=[parameter(a.name, is_optional(a)) for a in tensors],
        outputs=[parameter(name, False) for name in OPS[op._opname]],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(int64)"], "")],
        attributes=[OpSchema.Attribute(a.name, kinds[str(a.type)]) for a in scalars],
    )
    node = Op(Opset(DOMAIN, DOMAIN_VERSION), op._opname, schema)

    def translate(*args: Any) -> Any:
        given = dict(zip((a.name for a in op._schema.arguments), args, strict=True))
        inputs = [given.pop(a.name) for a in tensors]
        return node(*inputs, **given)

    return translate


def _leave_out_absent(model: Any) -> None:
    """Name the inputs of ``gka`` nodes and drop the empty ones, in place."""
    import onnx

    for node in nodes(model):
        if node.domain == DOMAIN:
            given = {a.name: x for a, x in zip(_tensors(_forward_ops()[node.op_type]), node.input, strict=False) if x}
            del node.input[:]
            node.input.extend(given.values())
            node.attribute.append(onnx.helper.make_attribute("inputs", ",".join(given)))


def _add_functions(model: Any, table: Table, opset: int) -> None:
    """Give every ``gka`` node of a ModelProto its function, in place."""
    import onnx

    graph = model.graph
    types = {x.name: x.type.tensor_type for x in (*graph.input, *graph.value_info, *graph.output)}
    kinds = {name: (x.elem_type, tuple(d.dim_value or None for d in x.shape.dim)) for name, x in types.items()}
    kinds |= {x.name: (x.data_type, tuple(x.dims)) for x in graph.initializer}
    made: dict[tuple[Any, ...], str] = {}
    for node in [node for node in graph.node if node.domain == DOMAIN]:
        op = _forward_ops()[node.op_type]
        scalars = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        names = scalars.pop("inputs").decode().split(",")
        inputs = {argument: kinds[x] for argument, x in zip(names, node.input, strict=True)}
        key = (node.op_type, *inputs.items(), *sorted(scalars.items()))
        if key not in made:
            before = sum(op == node.op_type for op, *_ in made)
            made[key] = f"{node.op_type}_{before}" if before else node.op_type
            model.functions.append(_function(made[key], op, inputs, scalars, table, opset))
        node.op_type = made[key]


class _Call(nn.Module):
    """An op as a function of the tensors that are given."""

    def __init__(self, op: OpOverload, names: Sequence[str], scalars: dict[str, int | float]) -> None:
        super().__init__()
        self.op, self.names, self.scalars = op, names, scalars

    def forward(self, *given: Tensor) -> Any:
        known = self.scalars | dict(zip(self.names, given, strict=True))
        return self.op(*(known.get(a.name) for a in self.op._schema.arguments))


def _function(
    name: str,
    op: OpOverload,
    inputs: dict[str, tuple[int, tuple[Size, ...]]],
    scalars: dict[str, int | float],
    table: Table,
    opset: int,
) -> Any:
    """A FunctionProto: the portable form of ``op`` on inputs of these dtypes and sizes."""
    import onnx
    from onnx_ir import DataType, tensor_adapters

    sizes = inputs["k"][1]
    B, C = sizes[0] or EXAMPLE_BATCH, int(scalars.get("chunk_size", 0))
    T = (sizes[1] or 2 * C + 2) if C else 0
    tensors, dynamic = [], []
    for argument, (dtype, size) in inputs.items():
        first = num_slots(B, T, None, C) if argument in OPS["chunk_state"] else B
        shape = [(first, T)[i] if n is None else n for i, n in enumerate(size)]
        tensors.append(torch.empty(shape, dtype=tensor_adapters.to_torch_dtype(DataType(dtype))))
        dynamic.append({i: Dim.DYNAMIC for i, n in enumerate(size) if n is None})
    with torch.no_grad():
        call = _Call(op, list(inputs), scalars)
        program = portable(torch.export.export(call, tuple(tensors), dynamic_shapes=(tuple(dynamic),), strict=False), table)
    graph = _convert(program, list(inputs), OPS[op._opname], opset, None).model_proto.graph
    constants = [onnx.helper.make_node("Constant", [], [x.name], value=x) for x in graph.initializer]
    return onnx.helper.make_function(
        DOMAIN,
        name,
        list(inputs),
        list(OPS[op._opname]),
        [*constants, *graph.node],
        [onnx.helper.make_opsetid("", max(opset, EXPORTER_OPSET))],
        ["inputs", *sorted(scalars)],
    )


# --- TensorRT 8.5 ----------------------------------------------------------------------------------------------------------


def _lower(model: Any) -> None:
    """A ModelProto of opset 18 to opset 17 and IR version 8, in place, in what the parser of TensorRT 8.5 reads.

    onnx's own converter does not know Pad, and that parser overlooks the attributes of Shape.

    Raises:
        ValueError: an operator that opset 17 does not have.
    """
    for graph in (model.graph, *model.functions):
        held = list(graph.node)
        del graph.node[:]
        graph.node.extend(_lowered(held, getattr(graph, "initializer", ())))
    for entries in (model.opset_import, *(f.opset_import for f in model.functions)):
        (domain,) = (entry for entry in entries if entry.domain in STANDARD_DOMAINS)
        domain.version = OLDEST_OPSET
    model.ir_version = 8


def _lowered(held: Sequence[Any], initializers: Sequence[Any]) -> Iterator[Any]:
    """The nodes of a graph or function, in opset 17."""
    import onnx

    constants = {x.name: x for x in initializers}
    constants |= {node.output[0]: node.attribute[0].t for node in held if node.op_type == "Constant"}
    for node in held:
        if node.domain == DOMAIN:
            yield node
            continue
        since = onnx.defs.get_schema(node.op_type, EXPORTER_OPSET).since_version
        if node.op_type == "Shape" and node.attribute:  # a part of the shape: shape, then slice
            bounds = {a.name: a.i for a in node.attribute}
            whole = f"{node.output[0]}_whole"
            yield onnx.helper.make_node("Shape", list(node.input), [whole], f"{node.name}_whole")
            names = []
            for name, value in (("start", bounds.get("start", 0)), ("end", bounds.get("end", 2**31 - 1))):
                names.append(f"{node.output[0]}_{name}")
                number = onnx.helper.make_tensor(names[-1], onnx.TensorProto.INT64, [1], [value])
                yield onnx.helper.make_node("Constant", [], [names[-1]], names[-1], value=number)
            node = onnx.helper.make_node("Slice", [whole, *names], list(node.output), node.name)
        elif node.op_type.startswith("Reduce") and since == EXPORTER_OPSET:  # axes were an attribute
            _drop(node, "noop_with_empty_axes")
            axes = onnx.numpy_helper.to_array(constants[node.input.pop()])
            node.attribute.append(onnx.helper.make_attribute("axes", axes.tolist()))
        elif node.op_type == "Split":  # the number of outputs was not said
            _drop(node, "num_outputs")
        elif since == EXPORTER_OPSET and (node.op_type not in ("Pad", "ScatterElements", "ScatterND") or len(node.input) > 3):
            raise ValueError(f"opset: expected operators of opset {OLDEST_OPSET}, got {node.op_type} of opset {since}")
        yield node


def _drop(node: Any, name: str) -> None:
    for attribute in [a for a in node.attribute if a.name == name]:
        node.attribute.remove(attribute)
