"""See a decomposed RMSNorm or layer norm as one op."""

from __future__ import annotations

from dotresize_fx.graph import Graph, Kind, Op, Value
from dotresize_fx.passes.pass_base import Pass, PassResult


class RecogniseNorms(Pass):
    """``x * rsqrt(mean(x**2, -1) + eps)``, with casts and with or without a gain, becomes one RMSNorm; a layer norm
    where x is ``v - mean(v, -1)``.

    Matched backwards from the product: one factor must be the inverse root of the mean square of the other.
    Zhang & Sennrich 2019, "Root Mean Square Layer Normalization", equation 4.
    """

    def call(self, graph: Graph) -> PassResult:
        records = []
        replaced: set[str] = set()
        for name in [op.name for op in graph.ops if op.kind is Kind.MUL]:
            if name in replaced:  # the product with a gain
                continue
            product = graph.op(name)  # read anew: what it reads may have become a norm
            match = self._match(graph, product)
            if match is None:
                continue
            source, epsilon = match
            last, gain = self._gain(graph, product)
            whole = self._centred(graph, source)
            if whole is None:
                graph.replace_with_rms_norm(last, source, gain, epsilon)
            elif not graph.replace_with_layer_norm(last, whole, gain, epsilon):
                continue
            replaced.add(last.name)
            name = "RMSNorm" if whole is None else "layer norm"
            records.append(f"{last.name}: {name} of {source.name}" + ("" if gain is None else " with its gain"))
        graph.remove_dead()
        return PassResult(tuple(records))

    def _match(self, graph: Graph, product: Op) -> tuple[Value, float] | None:
        """(normalised value, epsilon) when ``product`` is ``x * rsqrt(mean(x**2) + eps)``."""
        if len(product.inputs) != 2:
            return None
        for x, root in (product.inputs, product.inputs[::-1]):
            mean_square = self._inverse_root(graph, root)
            if mean_square is None:
                continue
            shifted, epsilon = mean_square
            mean = graph.producer(shifted)
            if mean is None or mean.kind is not Kind.MEAN or not mean.attributes["keepdim"]:
                continue
            squared = self._square(graph, mean.inputs[0])
            source = _uncast(graph, x)
            if squared is not None and _same(graph, _uncast(graph, squared), source):
                return source, epsilon
        return None

    @staticmethod
    def _centred(graph: Graph, source: Value) -> Value | None:
        """v when ``source`` is ``v - mean(v, -1)``."""
        op = graph.producer(source)
        if op is None or op.kind is not Kind.ADD or not op.attributes.get("subtract") or len(op.inputs) != 2:
            return None
        whole, mean = op.inputs[0], graph.producer(op.inputs[1])
        taken = mean is not None and mean.kind is Kind.MEAN and mean.attributes["keepdim"]
        return whole if taken and mean is not None and mean.inputs[0] == whole else None

    @staticmethod
    def _inverse_root(graph: Graph, value: Value) -> tuple[Value, float] | None:
        """(v, eps) when ``value`` is ``(v + eps) ** -0.5`` in any spelling."""
        op = graph.producer(value)
        if op is None:
            return None
        if op.function == "reciprocal":
            inner = graph.producer(op.inputs[0])
            if inner is None or inner.function != "sqrt":
                return None
            op = inner
        elif op.function != "rsqrt" and not (op.function == "pow" and op.attributes["number"] == -0.5):
            return None
        shift = graph.producer(op.inputs[0])
        if shift is None or shift.function != "add" or not isinstance(shift.attributes["number"], float):
            return None
        return shift.inputs[0], shift.attributes["number"]

    @staticmethod
    def _square(graph: Graph, value: Value) -> Value | None:
        op = graph.producer(value)
        if op is None:
            return None
        if op.function == "square" or (op.function == "pow" and op.attributes["number"] == 2):
            return op.inputs[0]
        return op.inputs[0] if op.kind is Kind.MUL and len(op.inputs) == 1 else None

    @staticmethod
    def _gain(graph: Graph, product: Op) -> tuple[Op, Value | None]:
        """The last op of the norm and its gain: a product with a parameter, behind casts if any."""
        op = product
        while len(users := graph.users(op.output)) == 1 and users[0].attributes.get("cast"):
            op = users[0]
        if len(users) == 1 and users[0].kind is Kind.MUL:
            for value in users[0].inputs:
                if value.is_parameter and len(value.shape) == 1 and value.width == product.output.width:
                    return users[0], value
        return product, None


def _same(graph: Graph, one: Value, other: Value) -> bool:
    """Whether they are one value, or the same difference computed twice."""
    if one == other:
        return True
    first, second = graph.producer(one), graph.producer(other)
    if first is None or second is None or not (first.attributes.get("subtract") and second.attributes.get("subtract")):
        return False
    return first.inputs == second.inputs


def _uncast(graph: Graph, value: Value) -> Value:
    """The value before any casts that kept every number."""
    while (op := graph.producer(value)) is not None and op.attributes.get("widens"):
        value = op.inputs[0]
    return value
