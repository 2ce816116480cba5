"""How much an ONNX graph's answers suffer from a cut to each width of each region.

As in :mod:`dotresize_fx.sensitivity`: a curve has the shape that its solver gives it and the height of one probe, the
dense graph run on with that region alone cut. Regions are taken one after the other, so that one Gram matrix is held at
a time; answers are compared in ONNX Runtime, and what they lose leaves as one number a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from dotresize_fx.fidelity import Inputs
from dotresize_fx.gram import GramAccumulator, RegionStatistics, padding_mask
from dotresize_fx.head_maps import at_dense_width, over_heads
from dotresize_fx.onnx_form.execution import OnnxExecution
from dotresize_fx.onnx_form.gram_nodes import GramNodes
from dotresize_fx.onnx_form.graph import OnnxGraph
from dotresize_fx.onnx_form.region_sums import ENTERED, READ, OnnxRegion, Overrides, add_to
from dotresize_fx.onnx_form.stream import OnnxStream
from dotresize_fx.probe import probed_width, reader_change
from dotresize_fx.regions import Region, RegionKind
from dotresize_fx.sensitivity import disjoint, priced
from dotresize_fx.solvers import CURVES, solvers_for
from dotresize_fx.task import predicts_tokens

_DENSE = "dotresize_fx.dense"


def measure_onnx_curves(
    graph: OnnxGraph,
    regions: Sequence[Region],
    batches: Sequence[Inputs],
    *,
    task: str,
    rows: Callable[[Inputs], int],
    device: str = "cpu",
    advanced: Callable[[], None] = lambda: None,
) -> dict[str, torch.Tensor]:
    """Region name -> (n + 1,) float64: the predicted loss at each width, as :func:`measure_curves` has it.

    Regions come in graph order. ``rows``: how many rows a batch makes, about. ``advanced`` is called once a region.
    """
    shaping, pricing = disjoint(batches, task, rows)
    execution = OnnxExecution(graph, device)
    answer = execution.results[0]
    shapes = _stream(execution, shaping, ())
    prices = _stream(execution, pricing, (answer,))
    whole = execution.piece(0, len(execution.nodes), [answer])
    dense = [{_DENSE: whole.run(environment)[0][answer]} for environment in prices.environments]
    curves: dict[str, torch.Tensor] = {}
    for region in regions:
        inputs = OnnxRegion(graph, region)
        start = inputs.start(execution)
        shapes.advance(max(start, shapes.position))
        statistics = _statistics(inputs, shapes)
        curve = CURVES[region.kind](region, statistics)
        width = probed_width(region)
        prices.advance(max(start, prices.position))
        overrides = _probe(inputs, statistics, width)
        nodes = loss_nodes(answer, task, pooled=len(graph.shape_of(answer)) == 3)
        lost = count = 0.0
        for _, found in prices.sums(len(execution.nodes), nodes, (), overrides, dense):
            lost += float(found["lost"])
            count += float(found["count"])
        curves[region.name] = priced(curve, width, max(lost, 0.0) / max(count, 1))
        advanced()
    return curves


def _stream(execution: OnnxExecution, batches: Sequence[Inputs], held: Sequence[str]) -> OnnxStream:
    masks = [padding_mask(batch) for batch in batches]
    return OnnxStream(execution, [execution.start(batch) for batch in batches], masks, held)


def _statistics(inputs: OnnxRegion, stream: OnnxStream) -> RegionStatistics:
    read, entered = GramAccumulator(), GramAccumulator()
    for _, found in stream.sums(inputs.end(stream.execution), inputs.nodes({})):
        add_to(read, found, READ)
        add_to(entered, found, ENTERED)
    return inputs.statistics(read, entered)


def _probe(inputs: OnnxRegion, statistics: RegionStatistics, width: int) -> Overrides:
    """What stands in for the constants of the region when it is cut to ``width``, at the dense width."""
    region = inputs.region
    ((_, solve),) = solvers_for("obs", region.kind)
    found = solve(region, statistics, width)
    if region.kind is not RegionKind.QUERY_KEY:
        return inputs.changed_reader(reader_change(region, statistics, found))
    downs: Mapping[str, torch.Tensor] = {
        op.name: found.key_down if found.key_down is not None and op.name in region.key_writers else found.down
        for op in inputs.writers
    }
    written = {
        op.name: over_heads(region, at_dense_width(region, found, downs[op.name]), len(inputs.graph.weight(op)))
        for op in inputs.writers
    }
    return inputs.mapped_writers(found, written)


def loss_nodes(answer: str, task: str, *, pooled: bool) -> GramNodes:
    """Sums ``lost`` and ``count`` of what ``answer`` loses against the dense one fed beside it.

    Of a decoder KL(dense || cut), of an encoder 1 - cosine of the embeddings (``pooled``: means over the tokens), of
    other outputs |cut - dense|² / |dense|² of all rows.
    """
    nodes = GramNodes()
    if task == "encoder":
        _cosine_lost(nodes, answer, pooled)
        return nodes
    dense, counted = nodes.rows(_DENSE)
    cut, _ = nodes.rows(answer)
    number = nodes.node("ReduceSum", [nodes.node("Cast", [counted], to=1)], keepdims=0)
    nodes.take("count", number)
    if predicts_tokens(task):
        first, second = (nodes.node("LogSoftmax", [rows], axis=1) for rows in (dense, cut))
        away = nodes.node("Mul", [nodes.node("Exp", [first]), nodes.node("Sub", [first, second])])
        nodes.take("lost", nodes.node("ReduceSum", [nodes.node("Cast", [away], to=11)], keepdims=0))
        return nodes
    error = nodes.square(nodes.node("Sub", [cut, dense]))
    share = nodes.node("Div", [error, nodes.node("Add", [nodes.square(dense), nodes.constant(np.float64(1e-300))])])
    nodes.take("lost", nodes.node("Mul", [share, nodes.node("Cast", [number], to=11)]))
    return nodes


def _cosine_lost(nodes: GramNodes, answer: str, pooled: bool) -> None:
    """Products alone: sums along an axis are spelled in other ways from opset to opset."""
    embedded = [_embeddings(nodes, value) if pooled else nodes.flat(value) for value in (_DENSE, answer)]
    vectors = [nodes.node("Cast", [value], to=11) for value in embedded]
    first, second = (nodes.node("LpNormalization", [value], axis=-1, p=2) for value in vectors)
    together = nodes.node("ReduceSum", [nodes.node("Mul", [first, second])], keepdims=0)
    count = nodes.node("Gather", [nodes.node("Shape", [first]), nodes.constant(np.int64(0))], axis=0)
    count = nodes.node("Cast", [count], to=11)
    nodes.take("count", count)
    nodes.take("lost", nodes.node("Sub", [count, together]))


def _embeddings(nodes: GramNodes, value: str) -> str:
    """(batch, width): the sum over the real rows of each sequence, whose direction is the mean's."""
    rows, _ = nodes.rows(value)
    shaped = nodes.node("Reshape", [rows, nodes.node("Shape", [value])])
    length = nodes.node("Gather", [nodes.node("Shape", [value]), nodes.constant(np.array([1]))], axis=0)
    ones = nodes.node("Expand", [nodes.constant(np.ones((1, 1), np.float32)), _sizes(nodes, length)])
    return nodes.node("Flatten", [nodes.node("MatMul", [ones, shaped])], axis=1)


def _sizes(nodes: GramNodes, length: str) -> str:
    return nodes.node("Concat", [nodes.constant(np.array([1])), length], axis=0)
