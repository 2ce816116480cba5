"""Bring a slim graph into the form of a stock model: nothing inserted, the epsilons that its configuration says."""

from __future__ import annotations

import math

from dotresize_fx.errors import CheckpointError
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.graph import Graph, Kind, Op
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.fold_linears import FoldLinears
from dotresize_fx.regions import Region, RegionKind

CENTRED = (
    "a cut stream's layer norms become RMSNorms (what is left has a mean of its own), and no stock model of this class "
    "has those; leave the stream alone: --regions ffn"
)


def fit_stock(slim: FxGraph, dense: FxGraph) -> FxGraph:
    """A copy of ``slim`` that computes the same with the ops and epsilons of ``dense``.

    A matrix in front of a tied head goes into the head, which then has a weight of its own.

    Raises:
        CheckpointError: an op has no counterpart in the dense model.
    """
    graph = slim.copy()
    graph.refresh_shapes()
    known = {op.name: op for op in dense.ops}
    owners = [op for op in graph.ops if op.weight is not None or op.kind in (Kind.RMS_NORM, Kind.LAYER_NORM)]
    for op in [op for op in owners if op.name not in known]:
        _fold_away(graph, op)
    graph.refresh_shapes()
    _restore_epsilons(graph, known)
    return graph


def _fold_away(graph: Graph, op: Op) -> None:
    if op.kind is Kind.RMS_NORM:
        raise CheckpointError(f"--checkpoint: {CENTRED}")
    users = graph.users(op.output)
    if op.kind is not Kind.LINEAR or len(users) != 1 or users[0].kind is not Kind.LINEAR:
        shape = " x ".join(str(size) for size in graph.weight(op).shape)
        raise CheckpointError(f"--checkpoint: no stock model has a place for {op.name}, a {op.kind} of {shape}")
    FoldLinears([], [op.name])(graph)


def _restore_epsilons(graph: Graph, known: dict[str, Op]) -> None:
    """An RMSNorm of c x with epsilon c² e is that of x with e: so a stream that was cut is scaled, all of it alike."""
    changed = {
        op.name: _ratio(op, known[op.name]) for op in graph.ops if op.name in known and _differs(op, known[op.name])
    }
    if not changed:
        return
    for region in find_regions(graph).of_kind(RegionKind.RESIDUAL):
        ratios = [changed.pop(name, 1.0) for name in region.norms]
        if any(ratio != 1.0 for ratio in ratios):
            if max(ratios) > min(ratios) * (1 + 1e-9):
                raise CheckpointError(f"--checkpoint: norms of one stream have several epsilons: {sorted(set(ratios))}")
            _scale_stream(graph, region, math.sqrt(ratios[0]))
    if changed:
        raise CheckpointError(f"--checkpoint: {min(changed)} has another epsilon, which no field of the model says")


def _differs(op: Op, dense: Op) -> bool:
    return op.kind is Kind.RMS_NORM and op.attributes["epsilon"] != dense.attributes["epsilon"]


def _ratio(op: Op, dense: Op) -> float:
    return float(dense.attributes["epsilon"]) / float(op.attributes["epsilon"])


def _scale_stream(graph: Graph, region: Region, factor: float) -> None:
    for name in region.writers:
        op = graph.op(name)
        if not op.is_linear and op.kind is not Kind.EMBEDDING:
            raise CheckpointError(f"--checkpoint: {name} writes the stream and cannot be scaled")
        graph.set_weight(op, graph.weight(op) * factor)
        bias = graph.bias(op)
        if bias is not None:
            graph.set_bias(graph.op(name), bias * factor)
    for name in set(region.readers) - set(region.normed_readers):
        op = graph.op(name)
        graph.set_weight(op, graph.weight(op) / factor)
