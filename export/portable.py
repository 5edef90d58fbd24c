"""The portable form: programs without ``gka`` nodes, in standard ops alone.

On GPUs it is that of :mod:`.portable_cuda`.  On CPUs it is the reference itself (:mod:`gka_compile.custom_ops.reference`), which
is the least arithmetic: all but two loops of it is batched and traceable at any size, and the two are arguments, the scan over
chunks and the series of matrix products that is the solve.  Each consumer gets the form that it digests:

             scan over chunks                            series of ``num_iter`` products
    ONNX     ``scan``, which becomes one ``Scan``        unrolled: runtimes fuse what they see
    Inductor one masked matrix product over the chunks   ``while_loop``: unrolled, it compiles for minutes

``scan`` does not survive AOTInductor with a dynamic batch (KeyError in torch 2.13), and ``while_loop`` would copy the states of all
chunks in every turn.  The matrix product is quadratic in the number of chunks, but with so small a factor that it costs less than
the solve up to 180 000 tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._higher_order_ops.scan import scan_op
from torch._higher_order_ops.while_loop import while_loop_op
from torch._ops import OpOverload
from torch.export import ExportedProgram

from gka_compile.custom_ops import reference
from gka_compile.custom_ops.polynomial import chebyshev_coefficients
from gka_compile.custom_ops.reference import Recurrence, Scan, Series, chebyshev_series

from . import portable_cuda

__all__ = ["Table", "decompositions", "inductor_decompositions", "portable"]

Form = Callable[..., tuple[Tensor, ...]]
Table = dict[OpOverload, Form]


class Loops(NamedTuple):
    """How the two loops of the reference are written."""

    scan: Scan
    series: Series


def _scan_node(recurrences: Sequence[Recurrence]) -> list[tuple[Tensor, Tensor]]:
    """The chunk states as one ``scan`` node for all recurrences: two products and two sums a turn."""
    n = len(recurrences)

    def turn(*args: Tensor) -> list[Tensor]:
        states, decays, increments = args[:n], args[n : 2 * n], args[2 * n :]
        new = [d * s + i for s, d, i in zip(states, decays, increments, strict=True)]
        return [*new, *(s.clone() for s in states)]  # an output may not be an input

    decays = [r.total.exp()[..., None, None].transpose(0, 1) for r in recurrences]
    increments = [r.increment.transpose(0, 1) for r in recurrences]
    results = scan_op(turn, [r.initial for r in recurrences], [*decays, *increments], additional_inputs=())
    return [(before.transpose(0, 1), last) for last, before in zip(results[:n], results[n:], strict=True)]


def _scan_product(recurrences: Sequence[Recurrence]) -> list[tuple[Tensor, Tensor]]:
    """The chunk states as one masked product, see :mod:`.portable_cuda`."""
    results = []
    for r in recurrences:
        terms = torch.cat([r.initial.unsqueeze(1), r.increment], 1).transpose(1, 2)  # [N, H, n + 1, X, Y]
        states = portable_cuda.decays_between(r.total.transpose(1, 2)) @ terms.flatten(3)
        states = states.unflatten(3, r.initial.shape[2:]).transpose(1, 2)
        results.append((states[:, :-1], states[:, -1]))
    return results


def _series_loop(z: Callable[..., Tensor], operands: tuple[Tensor, ...], rhs: Tensor, ridge_ratio: float, num_iter: int) -> Tensor:
    """The series as a ``while_loop`` of two terms a turn, so that no turn hands an input on as an output."""
    c = chebyshev_coefficients(ridge_ratio, num_iter)
    previous, t = rhs, z(rhs, *operands)
    x = c[0] * previous + c[1] * t
    first = 2
    if num_iter % 2 == 0:
        previous, t = t, 2 * z(t, *operands) - previous
        x = x + c[2] * t
        first = 3
    if first > num_iter:
        return x

    def more(n: Tensor, *_: Tensor) -> Tensor:
        return n <= num_iter

    def turn(n: Tensor, previous: Tensor, t: Tensor, x: Tensor, c: Tensor, *operands: Tensor) -> tuple[Tensor, ...]:
        one = 2 * z(t, *operands) - previous
        two = 2 * z(one, *operands) - t
        c_one, c_two = c.index_select(0, n.view(1)), c.index_select(0, n.view(1) + 1)
        return n + 2, one, two, x + c_one * one + c_two * two

    # neither torch.tensor nor arange: the one does not survive run_decompositions, the other would need the formula again
    coefficients = torch.stack([rhs.new_full((), value) for value in c])
    n = rhs.new_full((), first, dtype=torch.int64)
    carried = (n, previous.contiguous(), t.contiguous(), x.contiguous())
    return while_loop_op(more, turn, carried, (coefficients, *operands))[3]  # type: ignore[no-any-return, arg-type]


ONNX = Loops(_scan_node, chebyshev_series)
INDUCTOR = Loops(_scan_product, _series_loop)


def _table(chunk_state: Form, chunk_output: Form, step: Form) -> Table:
    def contiguous(function: Form) -> Form:
        return lambda *args: tuple(x.contiguous() for x in function(*args))  # as an op's outputs are

    def unpacked(function: Form, cu_seqlens: int) -> Form:
        def checked(*args: Any) -> tuple[Tensor, ...]:
            if args[cu_seqlens] is not None:
                raise ValueError("program: expected batches of sequences, got packed ones (cu_seqlens): they have no portable form")
            return function(*args)

        return contiguous(checked)

    gka = torch.ops.gka
    return {
        gka.chunk_state.default: unpacked(chunk_state, 7),
        gka.chunk_output.default: unpacked(chunk_output, 12),
        gka.step.default: contiguous(step),
    }


def _cpu_table(loops: Loops) -> Table:
    return _table(
        partial(reference.chunk_state, scan=loops.scan),
        partial(reference.chunk_output, series=loops.series),
        partial(reference.step, series=loops.series),
    )


def decompositions(device: str = "cuda", mixed: bool = False) -> Table:
    """The portable form as decompositions, for ``program.run_decompositions(decompositions())``.

    For runtimes that execute graphs of standard ops (ONNX Runtime, TensorRT).  A program with packed sequences has no such form:
    ``run_decompositions`` then raises ValueError.

    Args:
        device: what the graph is arranged for: "cuda", few launches, or "cpu", little arithmetic. Both run on either.
        mixed: the products of the solve over chunks, nearly all of the work, take float16 operands; states, norms, sums and the
            step stay in float32. False: everything is computed in float32 (float64 beside float64). For "cuda" only.

    Raises:
        ValueError: ``device`` is something else, or "cpu" with ``mixed``.
    """
    if device not in ("cuda", "cpu"):
        raise ValueError(f"device: expected cuda or cpu, got {device!r}")
    if device == "cpu":
        if mixed:
            raise ValueError("mixed: expected device cuda, got cpu, where float16 products gain nothing")
        return _cpu_table(ONNX)
    return _table(portable_cuda.chunk_state, partial(portable_cuda.chunk_output, mixed=mixed), portable_cuda.step)


def inductor_decompositions() -> Table:
    """The portable form for AOTInductor on the CPU."""
    return _cpu_table(INDUCTOR)


def portable(program: ExportedProgram, table: Table) -> ExportedProgram:
    """``program`` with every forward ``gka`` node replaced by standard ops, as ``table`` says.

    Raises:
        ValueError: a ``gka`` node has no portable form: one of the backward, in place, or for packed sequences (lengths are data).
    """
    for node in program.graph.nodes:
        if str(node.target).startswith("gka.") and node.target not in table:
            raise ValueError(f"program: expected gka nodes among chunk_state, chunk_output and step, got {node.target}")
    return program.run_decompositions(table)  # type: ignore[arg-type]
