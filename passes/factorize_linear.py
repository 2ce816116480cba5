"""Replace a linear by two of a smaller rank: ``linear(linear(x, A), B, b)`` for ``linear(x, W, b)``."""

from __future__ import annotations

from collections.abc import Mapping

from dotresize_fx.errors import UsageError
from dotresize_fx.graph import Graph, Kind
from dotresize_fx.passes.pass_base import Pass, PassResult, promise
from dotresize_fx.rank.budget import break_even
from dotresize_fx.rank.factors import Factors


class FactorizeLinear(Pass):
    """Each of the named linears keeps its name for the second factor; the first is a new one in front of it.

    ``guard``: a rank at which the two hold more weights than the one did is refused (r above d1 d2 / (d1 + d2)).

    Raises:
        UsageError: the guard refuses a rank; the graph is left as it was.
    """

    def __init__(self, factors: Mapping[str, Factors], *, guard: bool = True) -> None:
        self.factors, self.guard = factors, guard

    def requires(self, graph: Graph) -> None:
        for name, found in self.factors.items():
            promise(not (why := why_not_factorized(graph, name)), f"{name}: {why}")
            shape = tuple(graph.weight(graph.op(name)).shape)
            fits = (found.second.shape[0], found.first.shape[1]) == shape and found.second.shape[1] == found.rank
            promise(fits, f"{name}: the factors are those of another shape than {shape}")

    def call(self, graph: Graph) -> PassResult:
        records = []
        for name, found in self.factors.items() if self.guard else ():
            rows, columns = graph.weight(graph.op(name)).shape
            if found.rank > break_even(rows, columns):
                raise UsageError(
                    f"{name}: rank {found.rank} of {rows} x {columns} would make it slower than it is: "
                    f"{break_even(rows, columns)} is the largest that does not"
                )
        for name, found in self.factors.items():
            op = graph.op(name)
            weight = graph.weight(op)
            assert op.weight is not None
            stem = graph.parameter_name(op.weight).removesuffix(".weight")
            first = found.first.to(weight.dtype)
            graph.insert_linear(op.inputs[0], first, users=[op], name=f"{stem}.reduced")
            graph.set_weight(graph.op(name), found.second.to(weight.dtype))
            if found.bias is not None:
                graph.set_bias(graph.op(name), found.bias.to(weight.dtype))
            records.append(f"{name}: {len(weight)} x {weight.shape[1]} of rank {found.rank}")
        return PassResult(tuple(records))

    def ensures(self, graph: Graph) -> None:
        for name, found in self.factors.items():
            op = graph.op(name)
            before = graph.producer(op.inputs[0])
            reads = before is not None and before.kind is Kind.LINEAR and before.output.width == found.rank
            promise(reads, f"{name} reads no linear of rank {found.rank}")


def why_not_factorized(graph: Graph, name: str) -> str:
    """Why an op is no linear of its own that two could stand for; empty when it is."""
    op = graph.op(name)
    if op.kind is not Kind.LINEAR or op.weight is None:
        return "it is no linear with a weight of its own"
    if len(graph.users(op.weight)) > 1:
        return "its weight is shared, and would have to be kept beside the factors"
    return ""
