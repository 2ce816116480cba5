"""The sweep over an ONNX graph: two activation streams in ONNX Runtime, the dense graph's and the slim one's.

As in :mod:`dotresize_fx.sweep` each region is calibrated on what the already slimmed prefix feeds it, and its reader is
fitted so that the stream behind the sublayer is the dense graph's again. What the dense graph puts out stays in the
runtime and is fed to the slim graph's piece, whose nodes sum what both give: no activation is copied out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dotresize_fx.gram import GramAccumulator, padding_mask
from dotresize_fx.least_squares import PULL
from dotresize_fx.onnx_form.execution import OnnxExecution
from dotresize_fx.onnx_form.graph import OnnxGraph
from dotresize_fx.onnx_form.piece import Environment
from dotresize_fx.onnx_form.region_sums import ENTERED, OWN, READ, WANTED, OnnxRegion, add_to
from dotresize_fx.onnx_form.rotary_tables import RotaryTables
from dotresize_fx.onnx_form.stream import OnnxStream
from dotresize_fx.reader_refit import Sums, best_map, fit_reader
from dotresize_fx.region_map import RegionMap
from dotresize_fx.regions import Region
from dotresize_fx.sweep import Inputs, Solvers, SweptRegion, is_held_out

# What is fed beside the slim graph's own values: the dense stream, and what unmapped writers led to.
GOAL = "dotresize_fx.goal"
_SEEN = "dotresize_fx.seen."


class OnnxSweep:
    """Slims sublayer after sublayer; ``apply`` inserts and folds a map. ``batches`` are whole inputs of the graph.

    ``pull``: see :func:`dotresize_fx.least_squares.refit_reader`. ``causal``: see :class:`RotaryTables`.
    """

    def __init__(
        self,
        dense: OnnxGraph,
        slim: OnnxGraph,
        batches: Sequence[Inputs],
        apply: Callable[[Region, RegionMap], None],
        *,
        refit: bool = True,
        pull: float = PULL,
        causal: bool = True,
        device: str = "cpu",
    ) -> None:
        self.slim_graph, self.apply, self.refit, self.pull, self.device = slim, apply, refit, pull, device
        self.batches = batches
        self.masks = [padding_mask(batch) for batch in batches]
        self.dense, self.slim = self._start_streams(*(OnnxExecution(graph, device) for graph in (dense, slim)))
        self.measuring = {i for i in range(len(batches)) if is_held_out(i)}
        fitting = next((i for i in range(len(batches)) if i not in self.measuring), 0)
        self.tables = RotaryTables(batches[fitting], self.masks[fitting], causal)

    def slim_sublayer(
        self, cuts: Sequence[tuple[Region, int]], solvers: Callable[[Region], Solvers]
    ) -> list[SweptRegion]:
        """Cut the regions of one target, in the order given, and bring both streams behind it.

        Sublayers come in graph order.
        """
        target = cuts[0][0].target
        goals = self._reach([OnnxRegion(self.slim_graph, region) for region, _ in cuts], target)
        swept = [self._slim_region(region, width, goals, solvers(region)) for region, width in cuts]
        self._leave(target)
        return swept

    def _start_streams(self, dense: OnnxExecution, slim: OnnxExecution) -> tuple[OnnxStream, OnnxStream]:
        first, second = (
            OnnxStream(execution, [execution.start(batch) for batch in self.batches], self.masks)
            for execution in (dense, slim)
        )
        return first, second

    def _reach(self, regions: Sequence[OnnxRegion], target: str) -> Sequence[Environment]:
        """Bring the slim stream to where a sublayer begins; by batch, as GOAL, what the dense graph has behind it."""
        self.slim.advance(min(inputs.start(self.slim.execution) for inputs in regions))
        goals = self.dense.advance(self.dense.execution.position(target) + 1, [target])
        return [{GOAL: goal[target]} for goal in goals]

    def _leave(self, target: str) -> None:
        """Bring the slim stream behind the sublayer."""
        self.slim.advance(self.slim.execution.position(target) + 1)

    def _edited(self) -> None:
        self.slim.go_on_in(OnnxExecution(self.slim_graph, self.device), self.batches)

    def _slim_region(self, region: Region, width: int, extra: Sequence[Environment], solvers: Solvers) -> SweptRegion:
        if width == region.width and not self.refit:
            return SweptRegion(region, width, "kept", None)
        inputs = OnnxRegion(self.slim_graph, region)
        sums = self._gather(inputs, extra)

        def fit(found: RegionMap) -> tuple[RegionMap, float | None]:
            return fit_reader(inputs, found, sums, lambda: self._gather_merged(inputs, found, extra), self.pull)

        name, found, error = best_map(inputs, width, sums, solvers, fit if self.refit else None)
        if found is None:
            return SweptRegion(region, width, name, error)
        self.apply(region, found)
        self._edited()
        return SweptRegion(region, width, name, error, found.notes)

    def _gather(self, inputs: OnnxRegion, extra: Sequence[Environment]) -> Sums:
        """The sublayer as it is."""
        fitting, held_out, entered = GramAccumulator(), GramAccumulator(), GramAccumulator()
        execution, target = self.slim.execution, inputs.region.target
        others = {}
        if inputs.output is not None:
            others = {WANTED: ((GOAL, 1.0), (target, -1.0), (inputs.output, 1.0))}
        stop = max(inputs.end(execution), 1 + execution.position(target))
        for i, (_, found) in enumerate(self.slim.sums(stop, inputs.nodes(others), extra=extra)):
            add_to(held_out if i in self.measuring else fitting, found, READ)
            if i not in self.measuring:
                add_to(entered, found, ENTERED)
        near = self.tables.coherence(inputs, self.dense.execution)
        return Sums(inputs.statistics(fitting, entered, near), fitting, held_out)

    def _gather_merged(
        self, inputs: OnnxRegion, found: RegionMap, extra: Sequence[Environment]
    ) -> tuple[GramAccumulator, GramAccumulator]:
        """Over what the reader sees once the writers are mapped; what it is to put out comes of the unmapped ones."""
        assert inputs.hidden is not None
        assert inputs.output is not None
        execution, target = self.slim.execution, inputs.region.target
        fitting, held_out = GramAccumulator(), GramAccumulator()
        stop = max(inputs.end(execution), 1 + execution.position(target))
        plain = self.slim.piece(stop, [target, inputs.output])
        others: dict[str, Any] = {
            WANTED: ((GOAL, 1.0), (_SEEN + target, -1.0), (_SEEN + inputs.output, 1.0)),
            OWN: ((_SEEN + inputs.output, 1.0),),
        }
        mapped = self.slim.piece(
            1 + execution.position(inputs.hidden), [], inputs.nodes(others), inputs.mapped_writers(found)
        )
        for i, environment in enumerate(self.slim.environments):
            values, _ = plain.run(environment)
            seen = {_SEEN + name: value for name, value in values.items()}
            _, sums = mapped.run(environment, self.masks[i], {**extra[i], **seen})
            add_to(held_out if i in self.measuring else fitting, sums, READ)
        return fitting, held_out
