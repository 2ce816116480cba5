"""Sizes as far as they follow from those of the inputs, by number or by name, and the integers computed from them.

ONNX's own inference gives what a computed Reshape makes a new name, or none. Whether a reshape takes heads apart, or
joins batch and length, is seen only where the same size has the same name.
"""

from __future__ import annotations

import onnx_ir as ir

from dotresize_fx.onnx_form.constants import integers
from dotresize_fx.onnx_form.linears import attribute
from dotresize_fx.onnx_form.shape_rules import OPEN, RULES
from dotresize_fx.onnx_form.sizes import Size, Sizes, quotient, set_sizes, sizes_of, total

LONGEST = 16  # of the vectors that are followed: shapes
HANDED_ON = ("Cast", "Identity", "Squeeze", "Unsqueeze")


class SymbolicShapes:
    """``run`` names the sizes of all values of a graph anew; ``numbers`` has the vectors and scalars of integers that
    follow from sizes, elements that are not known by the size's name.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.numbers: dict[ir.Value, Sizes] = {}
        self.names: dict[str, str] = {}  # of sizes that an output of the graph calls otherwise

    def run(self) -> None:
        for node in self.graph:
            if node.domain not in ("", "com.microsoft"):
                continue
            found = self._numbers(node)
            if found is not None:
                self.numbers[node.outputs[0]] = self._named(found)
            rule = RULES.get(node.op_type)
            shapes = rule(node, self.known) if rule is not None and node.inputs else None
            for output, shape in zip(node.outputs, shapes or (), strict=False):
                if shape is None:
                    continue
                shape = self._named(shape)
                if output.is_graph_output():
                    self._learn(shape, sizes_of(output))
                else:
                    set_sizes(output, shape)

    def _named(self, sizes: Sizes) -> Sizes:
        return tuple(self.names.get(size, size) if isinstance(size, str) else size for size in sizes)

    def _learn(self, found: Sizes, stated: Sizes | None) -> None:
        for size, name in zip(found, stated or (), strict=False):
            if isinstance(size, str) and isinstance(name, str) and size != name:
                self.names[size] = name

    # -- integers ------------------------------------------------------------------------------------

    def known(self, value: ir.Value | None) -> Sizes | None:
        """The integers in a value, flat."""
        if value is None:
            return None
        if value in self.numbers:
            return self.numbers[value]
        stored = integers(value) if value.shape is not None and len(value.shape) < 2 else None
        return None if stored is None or len(stored) > LONGEST else tuple(stored)

    def _numbers(self, node: ir.Node) -> Sizes | None:
        first = node.inputs[0] if node.inputs else None
        if node.op_type == "Shape":
            shape = sizes_of(first)
            start = int(attribute(node, "start", 0))
            end = node.attributes.get("end")
            return None if shape is None else shape[start : None if end is None else end.as_int()]
        if node.op_type == "Concat":
            parts = [self.known(value) for value in node.inputs]
            return None if None in parts else tuple(size for part in parts if part is not None for size in part)
        read = self.known(first)
        if read is None or node.domain:
            return None
        if node.op_type in HANDED_ON:
            output = node.outputs[0].dtype
            return read if output is None or output.is_integer() else None
        if node.op_type == "Reshape":
            return read if len(node.outputs[0].shape or (0,)) < 2 else None
        if node.op_type == "Gather":
            places = self.known(node.inputs[1])
            if places is None or not all(isinstance(i, int) and -len(read) <= i < len(read) for i in places):
                return None
            return tuple(read[int(i)] for i in places)
        if node.op_type == "Slice":
            given = [self.known(value) for value in node.inputs[1:]]
            if not all(part is not None and len(part) == 1 and isinstance(part[0], int) for part in given):
                return None
            start, stop = (int(part[0]) for part in given[:2] if part)
            step = int(given[3][0]) if len(given) > 3 and given[3] else 1
            return read[start : stop if abs(stop) < OPEN else None : step]
        if node.op_type == "ConstantOfShape":
            stated = node.attributes.get("value")
            filling = 0 if stated is None else stated.as_tensor().numpy().reshape(-1)[0]
            few = len(read) == 1 and isinstance(read[0], int) and read[0] <= LONGEST
            return (int(filling),) * int(read[0]) if few else None
        rest = [self.known(value) for value in node.inputs[1:]]
        if node.op_type not in ("Add", "Sub", "Mul", "Div", "Equal", "Where") or None in rest:
            return None
        return _elementwise(node.op_type, [read, *(part for part in rest if part is not None)])


def _elementwise(op: str, vectors: list[Sizes]) -> Sizes | None:
    length = max(map(len, vectors))
    if any(len(vector) not in (1, length) for vector in vectors):
        return None
    rows = zip(*(vector * length if len(vector) == 1 else vector for vector in vectors), strict=True)
    if op == "Where":
        if any(isinstance(test, str) for test in vectors[0]):
            return None
        return tuple(first if test else second for test, first, second in rows)
    if op == "Equal":  # no size is below 0; else a name may stand for any number
        pairs = list(rows)
        sure = all(
            one == other
            or any(isinstance(n, int) and n < 0 for n in (one, other))
            or (isinstance(one, int) and isinstance(other, int))
            for one, other in pairs
        )
        return tuple(int(one == other) for one, other in pairs) if sure else None
    return tuple(_combine(op, one, other) for one, other in rows)


def _combine(op: str, one: Size, other: Size) -> Size:
    if isinstance(one, int) and isinstance(other, int):
        numbers = {"Add": one + other, "Sub": one - other, "Mul": one * other, "Div": int(one / other) if other else 0}
        return numbers[op]
    if op == "Mul":
        return quotient((one, other), ())
    if op == "Div" and other == 1:
        return one
    if op == "Add":
        return total((one, other))
    signs = {"Sub": "-", "Div": "/"}
    return f"{one} {signs[op]} {other}"
