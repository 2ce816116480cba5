"""Part a stream into one dimension a sublayer: an identity linear on each skip, which maps turn into an adapter."""

from __future__ import annotations

import torch

from dotresize_fx.graph import Graph, Kind, Op, Value
from dotresize_fx.passes.close_dimension import NORMS
from dotresize_fx.passes.pass_base import Pass, PassResult, promise
from dotresize_fx.regions import Region

ADAPTER = "_adapter"  # what their names end in, but for a number


class InsertAdapters(Pass):
    """``stream + f(norm(stream))`` becomes ``linear(stream, I) + f(norm(stream))``, at each of the region's norms.

    Exact. The dimension before the linear and the one behind it are then two, each with a basis of its own; folded maps
    leave Q'.T Q in the linear, k x k weights (Ashkboos et al. 2024, "SliceGPT").
    """

    def __init__(self, region: Region) -> None:
        self.region = region

    def call(self, graph: Graph) -> PassResult:
        like = graph.weight(graph.op(self.region.readers[0]))
        states = dict.fromkeys(graph.op(name).inputs[0] for name in self.region.norms)
        records = []
        for state in states:
            skips = [op for op in graph.users(state) if not op.is_linear and op.kind not in NORMS]
            if skips:
                records.append(_insert(graph, state, like, skips))
        return PassResult(tuple(records))

    def ensures(self, graph: Graph) -> None:
        for name in self.region.norms:
            users = graph.users(graph.op(name).inputs[0])
            promise(not any(op.kind is Kind.ADD for op in users), f"what {name} reads is added to without an adapter")


class InsertPostNormAdapters(Pass):
    """``norm(y + f(y))`` with ``y`` a norm's output, gain and all, becomes ``norm(linear(y, I) + f(y))``.

    Exact. The norm's gain and bias can then be folded into all that reads it, the new linear among them, and between
    two norms is a dimension that any rotation passes. A norm whose output the graph puts out gets such a linear in
    front of the output.
    """

    def call(self, graph: Graph) -> PassResult:
        records = []
        for name in post_norms(graph):
            norm = graph.op(name)
            assert norm.weight is not None
            if norm.output in graph.outputs:
                records.append(_insert(graph, norm.output, graph.weight(norm), None))
                continue
            skips = [op for op in graph.users(norm.output) if op.kind is Kind.ADD]
            records.append(_insert(graph, norm.output, graph.weight(norm), skips))
        return PassResult(tuple(records))

    def ensures(self, graph: Graph) -> None:
        promise(not post_norms(graph), "the skip of a post-norm has no adapter")


def post_norms(graph: Graph) -> list[str]:
    """Norms with a gain whose output is both read by linears and added to what they lead to; and with such, those whose
    output the graph puts out.
    """
    found, last = [], []
    for op in graph.ops:
        if op.kind not in NORMS or op.weight is None:
            continue
        kinds = {user.kind for user in graph.users(op.output)}
        if op.output in graph.outputs:
            last.append(op.name)
        elif Kind.ADD in kinds and Kind.LINEAR in kinds and not kinds & set(NORMS):
            found.append(op.name)
    return found + last if found else []


def _insert(graph: Graph, state: Value, like: torch.Tensor, users: list[Op] | None) -> str:
    width = state.width
    assert width is not None
    identity = torch.eye(width, dtype=like.dtype, device=like.device)
    op = graph.insert_linear(state, identity, users=users, name=f"{state.name}{ADAPTER}")
    return f"{op.name}: {width} x {width} behind {state.name}"
