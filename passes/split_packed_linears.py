"""See a linear whose result is split into parts, such as GPT-2's query, key and value, as one linear a part."""

from __future__ import annotations

from itertools import accumulate

from dotresize_fx.graph import Graph, Kind, Op
from dotresize_fx.passes.pass_base import Pass, PassResult, promise


class SplitPackedLinears(Pass):
    """``split(linear(x, W, b), -1)`` becomes ``linear(x, W[rows], b[rows])`` for each of its parts.

    For whoever cuts attention: query, key and value then have widths of their own. One product of a larger matrix is
    faster than several of its parts, so nothing else should split them. A weight that is used elsewhere stays whole.
    """

    def call(self, graph: Graph) -> PassResult:
        packed = [op for op in graph.ops if _parts(graph, op)]
        records = tuple(self._split(graph, op) for op in packed)
        graph.remove_dead()
        return PassResult(records)

    def _split(self, graph: Graph, linear: Op) -> str:
        (split,) = graph.users(linear.output)
        parts = _parts(graph, linear)
        assert linear.weight is not None
        name = graph.parameter_name(linear.weight)
        weight, bias = graph.weight(linear), graph.bias(linear)
        ends = tuple(accumulate(split.attributes["sizes"]))
        for part in reversed(parts):  # each goes right behind what they read, so that they stand in order
            index = part.attributes["index"]
            start, end = ends[index] - split.attributes["sizes"][index], ends[index]
            rows = graph.insert_linear(
                linear.inputs[0],
                weight[start:end].clone(),
                None if bias is None else bias[start:end].clone(),
                users=(),
                name=f"{name.removesuffix('.weight')}.{index}",
            )
            graph.redirect(graph.op(part.name), rows.output)
        return f"{name}: seen as {len(parts)} linears"

    def ensures(self, graph: Graph) -> None:
        left = [op.name for op in graph.ops if _parts(graph, op)]
        promise(not left, f"packed linears are left: {left}")


def _parts(graph: Graph, linear: Op) -> list[Op]:
    """The ops that take the parts of this linear's result; empty when it is not split, or not only."""
    users = graph.users(linear.output) if linear.kind is Kind.LINEAR else []
    if len(users) != 1 or users[0].attributes.get("form") != "split" or linear.output in graph.outputs:
        return []
    split = users[0]
    if split.attributes["axis"] != len(linear.output.shape) - 1:
        return []
    assert linear.weight is not None
    parts = graph.users(split.output)
    taken = all(op.attributes.get("form") == "part" for op in parts)
    return parts if taken and len(graph.users(linear.weight)) == 1 else []
