"""A kernel bundle as one C++ file: the tables that ``plugin/gka_core.h`` declares, with the machine code in them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["kernels_source"]

SYMBOLS = ("B", "T")
ATTRIBUTES = ("num_heads", "chunk_size", "scale", "ridge_ratio", "num_iter")  # of gka::Attributes, in its order


def kernels_source(variants: Sequence[Mapping[str, Any]], files: Mapping[str, bytes], portable: Sequence[str]) -> str:
    """C++ source of ``variants``, as the manifest describes them, over ``files``.

    Machine code is there for every target; assembler text, which the driver compiles for a GPU that came later, for the
    ``portable`` compute capabilities alone.
    """
    return "\n".join(_Source(variants, files, portable).lines) + "\n"


class _Source:
    """Each ``_method`` returns the C++ expression of its argument, and defines first what that needs, once."""

    def __init__(self, variants: Sequence[Mapping[str, Any]], files: Mapping[str, bytes], portable: Sequence[str]) -> None:
        self.files, self.portable = files, portable
        self.lines = ["// Written by gka-compile; every change will be lost.", "namespace gka {", "namespace {"]
        self.names: dict[str, str] = {}
        listed = [self._variant(variant) for variant in variants]
        self.lines += ["} // namespace", "const Variant variants[] = {"]
        self.lines += [f"    {x}," for x in listed]
        self.lines += ["};", f"const int variant_count = {len(listed)};", "} // namespace gka"]

    def _array(self, kind: str, elements: Sequence[str]) -> str:
        """A span over a table of elements: equal ones are one."""
        if not elements:
            return "{nullptr, 0}"
        contents = f"{kind}[] = {{{', '.join(elements)}}};"
        if contents not in self.names:
            self.names[contents] = f"{kind.lower()}_{len(self.names)}"
            self.lines.append(f"const {kind} {self.names[contents]}[] = {contents.partition(' = ')[2]}")
        return f"{{{self.names[contents]}, {len(elements)}}}"

    def _size(self, size: Any) -> str:
        return self._array("Term", _postfix(size))

    def _binary(self, name: str) -> str:
        """Machine code or text as 64-bit little-endian words, with a zero at the end."""
        if name not in self.names:
            data = self.files[name]
            padded = data + bytes(8 - len(data) % 8)
            words = ",".join(hex(int.from_bytes(padded[i : i + 8], "little")) for i in range(0, len(padded), 8))
            self.names[name] = f"binary_{len(self.names)}"
            self.lines.append(f"const std::uint64_t {self.names[name]}[] = {{{words}}}; // {name}")
        return self.names[name]

    def _tensor(self, tensor: Mapping[str, Any]) -> str:
        sizes = ", ".join(self._size(size) for size in tensor["shape"])
        return f"{{{_text(tensor['name'])}, Type::{tensor['dtype']}, {len(tensor['shape'])}, {{{sizes}}}}}"

    def _launch(self, launch: Mapping[str, Any], places: Mapping[str, int], portable: bool) -> str:
        arguments = []
        for argument in launch["arguments"]:
            if "integer" in argument:
                kind = {"i32": "integer32", "i64": "integer64"}[argument["type"]]
                arguments.append(f"{{Argument::{kind}, 0, {self._size(argument['integer'])}}}")
            elif argument["pointer"] is None:
                arguments.append("{Argument::null, 0, {nullptr, 0}}")
            else:
                arguments.append(f"{{Argument::pointer, {places[argument['pointer']]}, {self._size(argument['offset'])}}}")
        grid = ", ".join(self._size(size) for size in launch["grid"])
        ptx = self._binary(launch["ptx"]) if portable else "nullptr"
        code = f"{_text(launch['kernel'])}, {self._binary(launch['cubin'])}, {ptx}"
        return f"{{{code}, {{{grid}}}, {launch['threads']}, {launch['shared_bytes']}, {self._array('Argument', arguments)}}}"

    def _target(self, capability: str, target: Mapping[str, Any], tensors: Sequence[str]) -> str:
        names = [*tensors, *(t["name"] for t in target["temporaries"])]
        places = {name: place for place, name in enumerate(names)}
        temporaries = self._array("Size", [self._size(t["bytes"]) for t in target["temporaries"]])
        launches = self._array("Launch", [self._launch(x, places, capability in self.portable) for x in target["launches"]])
        return f"{{{capability.replace('.', ', ')}, {temporaries}, {launches}}}"

    def _variant(self, variant: Mapping[str, Any]) -> str:
        values = ", ".join(repr(variant["attributes"].get(name, 0)) for name in ATTRIBUTES)
        inputs, outputs = ([self._tensor(t) for t in variant[part]] for part in ("inputs", "outputs"))
        names = [t["name"] for part in ("inputs", "outputs") for t in variant[part]]
        targets = [self._target(capability, target, names) for capability, target in variant["targets"].items()]
        spans = (self._array("Tensor", inputs), self._array("Tensor", outputs), self._array("Target", targets))
        return f"{{{_text(variant['op'])}, {{{values}}}, {', '.join(spans)}}}"


def _postfix(size: Any) -> list[str]:
    """A size in postfix order."""
    if isinstance(size, int):
        return [f"{{Term::constant, {size}}}"]
    if isinstance(size, str):
        return [f"{{Term::symbol, {SYMBOLS.index(size)}}}"]
    operator, first, *rest = size
    return [*_postfix(first), *(term for part in rest for term in (*_postfix(part), f"{{Term::{operator}, 0}}"))]


def _text(x: str) -> str:
    return json.dumps(x)
