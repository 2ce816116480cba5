"""What the ends of a region tell: the name of the module that holds them, and the stream behind its readers."""

from __future__ import annotations

from collections.abc import Iterable

from dotresize_fx.graph import Graph, Kind, Op, Value
from dotresize_fx.regions import Region


def common_module(graph: Graph, ops: Iterable[Op]) -> str:
    """The module that holds all their weights, as far as names tell; names are for people only."""
    names = [graph.parameter_name(op.weight) for op in ops if op.weight is not None]
    stem = []
    for parts in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        stem.append(parts[0])
    return ".".join(stem)


def tables_of(graph: Graph, region: Region) -> list[Value]:
    """The parameters that the region's ops between read as they are, each once."""
    ops = [graph.op(name) for name in (*region.crossed, *region.norms)]
    read = dict.fromkeys(value for op in ops for value in (*op.inputs, op.weight, op.bias) if value is not None)
    return [value for value in read if value.name in region.tables]


def stream_behind(graph: Graph, reader: Op) -> str:
    """Follow the reader's output through the additions that only it feeds: the stream after the sublayer."""
    value, routed = reader.output, reader.kind is Kind.EXPERTS
    while len(users := graph.users(value)) == 1 and (users[0].kind in (Kind.ADD, Kind.KEEP) or users[0].scales_rows):
        op = users[0]
        # What experts put out is weighted, put back in order and summed; elsewhere such an op takes some of the rows.
        moved = (op.attributes.get("reshape") and op.attributes.get("form") != "expand") or (
            routed and op.attributes.get("moves_rows")
        )
        reshaped = op.kind is Kind.KEEP and op.output.shape != value.shape and not moved
        if op.scales_rows and not routed:
            break
        if value in graph.outputs or reshaped or op.attributes.get("subtract"):
            break
        value = op.output
    return value.name
