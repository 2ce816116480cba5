"""Fold what is multiplied with, or added to, each number of a linear's result into the linear."""

from __future__ import annotations

from dotresize_fx.graph import Graph, Kind, Op, Value
from dotresize_fx.passes.pass_base import Pass, PassResult


class FoldChannelScales(Pass):
    """``linear(x, W, b) * g`` becomes ``linear(x, diag(g) W, g b)``, and ``linear(x, W, b) + c`` one with bias b + c.

    g and c are parameters of one number a channel: a layer scale, or a bias that stands alone. Only where nothing else
    reads the linear's result, and nothing else its weight.
    """

    def call(self, graph: Graph) -> PassResult:
        records = []
        for name in [op.name for op in graph.ops if op.kind is Kind.LINEAR]:
            while (step := self._next(graph, graph.op(name))) is not None:
                records.append(self._fold(graph, graph.op(name), *step))
        graph.remove_dead()
        return PassResult(tuple(records))

    @staticmethod
    def _next(graph: Graph, linear: Op) -> tuple[Op, Value] | None:
        """The op behind the linear that can be folded into it, and the parameter it brings."""
        users = graph.users(linear.output)
        assert linear.weight is not None
        if len(users) != 1 or linear.output in graph.outputs or len(graph.users(linear.weight)) > 1:
            return None
        (op,) = users
        if op.kind not in (Kind.MUL, Kind.ADD) or len(op.inputs) != 2 or op.attributes.get("subtract"):
            return None
        values = [value for value in op.inputs if value != linear.output]
        if len(values) != 1 or not values[0].is_parameter or graph.is_buffer(values[0]):
            return None
        fits = (
            values[0].shape == (linear.output.width,) and graph.parameter(values[0]).dtype == graph.weight(linear).dtype
        )
        return (op, values[0]) if fits else None

    @staticmethod
    def _fold(graph: Graph, linear: Op, op: Op, value: Value) -> str:
        name = graph.parameter_name(value)
        vector, weight, bias = graph.parameter(value).double(), graph.weight(linear), graph.bias(linear)
        if op.kind is Kind.MUL:
            graph.set_weight(linear, (vector[:, None] * weight.double()).to(weight.dtype))
            if bias is not None:
                graph.set_bias(graph.op(linear.name), (vector * bias.double()).to(bias.dtype))
        else:
            moved = vector if bias is None else bias.double() + vector
            graph.set_bias(linear, moved.to(weight.dtype))
        graph.redirect(graph.op(op.name), linear.output)
        graph.remove_dead()
        return f"{op.name}: {name} folded into {linear.name}"
