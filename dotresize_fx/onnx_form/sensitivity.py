"""How much an ONNX graph's answers suffer from a cut to each width of each region.

As in :mod:`dotresize_fx.sensitivity`: a curve has the shape that its solver gives it and the height of one probe, the
dense graph run on with that region alone cut. Regions are taken one after the other, so that one Gram matrix is held at
a time; answers are compared in ONNX Runtime, and what they lose leaves as one number a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from dotresize_fx.fidelity import Inputs
from dotresize_fx.gram import GramAccumulator, RegionStatistics, padding_mask
from dotresize_fx.head_maps import at_dense_width, over_heads
from dotresize_fx.onnx_form.answers import OnnxAnswers
from dotresize_fx.onnx_form.execution import OnnxExecution
from dotresize_fx.onnx_form.graph import OnnxGraph
from dotresize_fx.onnx_form.piece import Piece
from dotresize_fx.onnx_form.region_sums import ENTERED, READ, OnnxRegion, Overrides, add_to
from dotresize_fx.onnx_form.rotary_tables import RotaryTables
from dotresize_fx.onnx_form.runtime_values import to_runtime
from dotresize_fx.onnx_form.stream import OnnxStream
from dotresize_fx.probe import probed_width, reader_change
from dotresize_fx.regions import Region, RegionKind
from dotresize_fx.sensitivity import disjoint, priced
from dotresize_fx.solvers import CURVES, solvers_for
from dotresize_fx.task import predicts_tokens

# Sessions that probes share: each begins so far in front of a region at most, of the whole graph.
SESSIONS = 32


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
    answers = OnnxAnswers(execution, task)
    tables = RotaryTables(shaping[0], padding_mask(shaping[0]), predicts_tokens(task))
    shapes = _stream(execution, shaping, ())
    prices = _stream(execution, pricing, (answers.name,))
    dense = answers.of(prices)
    stop = 1 + execution.position(answers.name)
    curves: dict[str, torch.Tensor] = {}
    piece: Piece | None = None
    for region in regions:
        inputs = OnnxRegion(graph, region)
        start = inputs.start(execution)
        shapes.advance(max(start, shapes.position))
        statistics = _statistics(inputs, shapes, tables.coherence(inputs, execution))
        curve = CURVES[region.kind](region, statistics)
        width = probed_width(region)
        if piece is None or start - prices.position > len(execution.nodes) // SESSIONS:
            prices.advance(max(start, prices.position))
            piece = prices.piece(stop, [], answers.lost())
        overrides = _probe(inputs, statistics, width)
        probed, given = piece, {name: to_runtime(tensor, device) for name, tensor in overrides.items()}
        if not piece.takes(overrides):
            probed, given = prices.piece(stop, [], answers.lost(), overrides), {}
        lost = count = 0.0
        for i, environment in enumerate(prices.environments):
            _, found = probed.run(environment, prices.masks[i], dense[i], given)
            lost += float(found["lost"])
            count += float(found["count"])
        curves[region.name] = priced(curve, width, max(lost, 0.0) / max(count, 1))
        advanced()
    return curves


def _stream(execution: OnnxExecution, batches: Sequence[Inputs], held: Sequence[str]) -> OnnxStream:
    masks = [padding_mask(batch) for batch in batches]
    return OnnxStream(execution, [execution.start(batch) for batch in batches], masks, held)


def _statistics(inputs: OnnxRegion, stream: OnnxStream, near: torch.Tensor | None) -> RegionStatistics:
    read, entered = GramAccumulator(), GramAccumulator()
    for _, found in stream.sums(inputs.end(stream.execution), inputs.nodes({})):
        add_to(read, found, READ)
        add_to(entered, found, ENTERED)
    return inputs.statistics(read, entered, near)


def _probe(inputs: OnnxRegion, statistics: RegionStatistics, width: int) -> Overrides:
    """What stands in for the constants of the region when it is cut to ``width``, at the dense width."""
    region = inputs.region
    ((_, solve),) = solvers_for("obs", region.kind)
    found = solve(region, statistics, width)
    if region.kind is not RegionKind.QUERY_KEY:
        return inputs.changed_reader(reader_change(region, statistics, found))
    overrides: Overrides = {}
    for op in inputs.writers:
        kept = at_dense_width(region, found, found.down_of(region, op.name))
        overrides |= inputs.mapped(op, over_heads(region, kept, len(inputs.graph.weight(op))))
    return overrides
