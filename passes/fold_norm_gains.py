"""Fold a norm's gain and bias into the linears that read it, so that nothing diagonal stands in the way."""

from __future__ import annotations

import torch

from dotresize_fx.graph import Graph, Kind, Op, Value
from dotresize_fx.passes.pass_base import Pass, PassResult, promise
from dotresize_fx.regions import Region


class FoldNormGains(Pass):
    """``linear(norm(x) * g + b, W, c)`` becomes ``linear(norm(x), W diag(g), c + W b)``.

    A reader whose weight something else shares (a head tied to the embedding) would lose its tie: there the gain
    stays as an explicit linear in front of the reader, and a later map turns it into a small k x k matrix.
    """

    def __init__(self, region: Region) -> None:
        self.region = region

    def call(self, graph: Graph) -> PassResult:
        records = []
        for name in self.region.norms:
            norm = graph.op(name)
            if norm.weight is None and norm.bias is None:
                continue
            records.append(self._fold(graph, norm))
        return PassResult(tuple(records))

    def _fold(self, graph: Graph, norm: Op) -> str:
        gain = graph.weight(norm).double() if norm.weight is not None else None
        bias = graph.bias(norm)
        scales = _readers(graph, norm.output)
        by_row = any(op.scales_rows or op.attributes.get("sums_rows") for op in between(graph, norm.output))
        promise(bias is None or not by_row, f"{norm.name}: its bias is scaled or summed before it is read")
        experts = any(op.kind is Kind.EXPERTS for op in scales)
        promise(bias is None or not experts, f"{norm.name}: experts read it, and have no place for its bias")
        readers = list(scales)
        tied = [op for op in readers if len(graph.users(_weight_of(op))) > 1]
        for op in (op for op in readers if op not in tied):
            weight = graph.weight(op)
            if bias is not None:
                shift = weight.double() @ bias.double() * scales[op]
                own = graph.bias(op)
                graph.set_bias(op, (shift if own is None else own.double() + shift).to(weight.dtype))
                op = graph.op(op.name)
            if gain is not None:
                graph.set_weight(op, (weight.double() * gain).to(weight.dtype))
        width = norm.output.width
        assert width is not None
        for op in tied:
            weight = graph.weight(op)
            ones = weight.new_ones(width, dtype=torch.float64)
            graph.insert_linear(
                op.inputs[0],
                torch.diag(ones if gain is None else gain).to(weight.dtype),
                None if bias is None else bias.detach() * scales[op],
                users=[op],
                name=f"{op.name}_gain",
            )
        graph.drop_affine(graph.op(norm.name))
        graph.remove_dead()
        kept = f"; kept in front of {tied[0].name}, whose weight is tied" if tied else ""
        return f"{norm.name}: gain folded into {len(readers) - len(tied)} readers{kept}"

    def ensures(self, graph: Graph) -> None:
        for name in self.region.norms:
            norm = graph.op(name)
            promise(norm.weight is None and norm.bias is None, f"{name} still has a gain or a bias")


def why_no_bias_folds(graph: Graph, region: Region) -> str:
    """Why a norm's bias cannot be folded into what reads it; empty where none has one or it can."""
    for norm in (graph.op(name) for name in region.norms):
        behind = between(graph, norm.output) if norm.bias is not None else []
        if any(op.scales_rows or op.attributes.get("sums_rows") for op in behind):
            return f"the bias of {norm.name} is scaled from row to row, or summed, before it is read"
        if any(user.kind is Kind.EXPERTS for op in (norm, *behind) for user in graph.users(op.output)) and norm.bias:
            return f"experts read {norm.name}, whose bias they have no place for"
    return ""


def _weight_of(op: Op) -> Value:
    assert op.weight is not None
    return op.weight


def between(graph: Graph, value: Value) -> list[Op]:
    """The ops that pass ``value`` on to the linears that read it."""
    passed = [op for op in graph.users(value) if not op.is_linear]
    return passed + [op for one in passed for op in between(graph, one.output)]


def _readers(graph: Graph, value: Value, scale: float = 1.0) -> dict[Op, float]:
    """The linears that read ``value``, behind nothing but ops that pass it on, and the number that scales it there."""
    readers: dict[Op, float] = {}
    for op in graph.users(value):
        if op.is_linear:
            readers[op] = scale
        else:
            promise(op.kind in (Kind.KEEP, Kind.SCALE) or op.scales_rows, f"{op.name} between a norm and its readers")
            number = float(op.attributes["number"]) if op.kind is Kind.SCALE else 1.0
            readers |= _readers(graph, op.output, scale * number)
    return readers
