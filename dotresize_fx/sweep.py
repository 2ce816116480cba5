"""The sweep: one walk over the sublayers with two activation streams, the dense model's and the slim model's.

Each region is calibrated on what the already slimmed prefix really feeds it, and its reader is refitted so that
the residual stream after the sublayer is the dense model's again, which repairs what earlier cuts broke.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from dotresize_fx.activation_stream import ActivationStream
from dotresize_fx.entry_refit import Entry
from dotresize_fx.expert_statistics import experts_error, refit_experts
from dotresize_fx.fx_form.edits import has_effects
from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.gram import GramAccumulator, padding_mask
from dotresize_fx.graph import Op
from dotresize_fx.least_squares import PULL
from dotresize_fx.ranks import Ranks
from dotresize_fx.reader_refit import ReaderRefit, best_map
from dotresize_fx.region_inputs import RegionInputs
from dotresize_fx.region_map import RegionMap
from dotresize_fx.regions import Region, RegionKind
from dotresize_fx.repair import Sublayer, repair
from dotresize_fx.slim_stream import SlimStream
from dotresize_fx.solvers import Solver
from dotresize_fx.stream_readers import StreamReaders

# One batch in this many is kept out of the solve and measures the region's error.
HELD_OUT_EVERY = 8
# Of the mean square of an expert's kept neurons.
EXPERT_RIDGE = 1e-4

Inputs = Mapping[str, torch.Tensor]
Solvers = Sequence[tuple[str, Solver]]


def is_held_out(batch: int) -> bool:
    """Whether the batch of this number measures and is not solved with."""
    return batch % HELD_OUT_EVERY == HELD_OUT_EVERY - 1


@dataclass(frozen=True)
class SweptRegion:
    """What the sweep did to a region, and by which solver's map (``method``).

    A region that keeps its width has "refit", or "kept" where the refitted reader did worse on held-out batches.
    ``error`` is ||slim - wanted|| / ||wanted|| of the reader's output on batches that were not solved with, ``wanted``
    being what would make the stream behind the sublayer the dense model's.
    """

    region: Region
    width: int
    method: str
    error: float | None
    notes: Mapping[str, float | int | str] = field(default_factory=dict)


class Sweep:
    """Slims sublayer after sublayer; ``apply`` inserts and folds a map (the passes live outside the core).

    ``stream`` tells, where the stream itself was cut, how the dense one is seen in the slim one's coordinates. Then
    what reads it behind norms is refitted too, and repair refines all linears of a sublayer.
    ``repair_steps``: how long each cut sublayer's weights are refined, 0 for not at all, at ``repair_rate``, see
    :func:`dotresize_fx.repair.repair`. ``pull``: how strongly readers are held to what they make of the slim
    activations themselves, see :func:`dotresize_fx.least_squares.refit_reader`.
    """

    def __init__(
        self,
        dense: FxGraph,
        slim: FxGraph,
        batches: Sequence[Inputs],
        apply: Callable[[Region, RegionMap], None],
        *,
        refit: bool = True,
        stream: SlimStream | None = None,
        repair_steps: int = 0,
        repair_rate: float | None = None,
        pull: float = PULL,
        seed: int = 0,
        ranks: Ranks | None = None,
    ) -> None:
        self.slim_graph = slim
        self.ranks = ranks or Ranks(alone=True)
        numbers = self.ranks.mine(len(batches))
        batches = [batches[i] for i in numbers]
        self.apply, self.refit, self.stream = apply, refit, stream
        self.repair_steps, self.repair_rate, self.seed = repair_steps, repair_rate, seed
        self.masks = [padding_mask(batch) for batch in batches]
        self.dense = ActivationStream(execution := Execution(dense), [execution.start(batch) for batch in batches])
        self.slim = ActivationStream(execution := Execution(slim), [execution.start(batch) for batch in batches])
        # Batches that measure: every eighth, but never so many that none is left to solve with.
        self.measuring = {i for i, number in enumerate(numbers) if is_held_out(number)}
        self.reader_refit = ReaderRefit(slim, self.slim, self.masks, self.measuring, pull, self.ranks)
        self.readers = StreamReaders(stream, self.slim, self.dense, self.masks, self.measuring, pull=pull, refit=refit)

    def slim_sublayer(
        self, cuts: Sequence[tuple[Region, int]], solvers: Callable[[Region], Solvers]
    ) -> list[SweptRegion]:
        """Cut the regions of one target, in the order given.

        Sublayers come in graph order. A region that keeps its width is only refitted. The slim stream, where it is
        not cut itself, stays in front of the sublayer until the next one: it then runs on once for both.
        """
        target = cuts[0][0].target
        stop = self._slim_index(target)
        entries = self.readers.entries(stop)
        begin = min([*self.readers.positions(stop), *(self._start(region) for region, _ in cuts)])
        if self.stream is None:
            begin = self.slim.execution.narrowest(self.slim.position, begin)
            self._run_once(begin)
        else:
            self.slim.advance(begin)
        goals, seen = self._dense_goals(target, entries)
        self.readers.refit(entries, seen)
        swept = [self._slim_region(region, width, goals, solvers(region), begin) for region, width in cuts]
        if self.repair_steps:
            notes = self._repair(target, [region for region, _ in cuts], goals)
            swept[-1] = replace(swept[-1], notes={**swept[-1].notes, **notes})
        if self.stream is not None:
            self.slim.advance(self._slim_index(target) + 1)
        return swept

    def resume_sublayer(self, regions: Sequence[Region], finish: Callable[[], None]) -> None:
        """Bring both streams behind a sublayer that was cut before; ``finish`` puts what became of it into the graph.

        Of a graph whose stream is not cut.
        """
        target = regions[0].target
        begin = min(self._start(region) for region in regions)
        self._run_once(begin)
        self.slim.advance(begin)
        self.dense.advance(self.dense.execution.index[self.dense.execution.graph.node(target)] + 1)
        finish()
        self.slim.execution = Execution(self.slim_graph)
        self.slim.advance(self._slim_index(target) + 1)

    def _run_once(self, stop: int) -> None:
        """Where neither model was run yet and up to ``stop`` they are the same, run one for both."""
        slim, dense = self.slim, self.dense
        if slim.position or dense.position or not slim.execution.begins_as(dense.execution, stop):
            return
        if any(has_effects(node.target) for node in slim.execution.nodes[stop:]):
            return  # what one writes into the other would read
        dense.advance(stop)
        pairs = zip(slim.environments, dense.environments, strict=True)
        slim.environments = [slim.execution.goes_on(own, dense.execution, values, stop) for own, values in pairs]
        slim.position = stop

    def _start(self, region: Region) -> int:
        """Where what the region watches begins, and what becomes of weights that its cut changes."""
        seen: list[torch.fx.Node] = []
        if region.kind is RegionKind.EXPERTS:
            inputs = RegionInputs(self.slim_graph, region)
            seen = [*inputs.routing, *(self.slim_graph.stored_weight(op) for op in inputs.products)]
        told = [self.slim.execution.position(node) for node in seen if node.op != "placeholder"]
        return min([*(self._slim_index(name) for name in region.writers), *told])

    def _slim_index(self, name: str) -> int:
        return self.slim.execution.index[self.slim_graph.node(name)]

    def _dense_goals(
        self, target: str, entries: Sequence[Entry]
    ) -> tuple[list[torch.Tensor], dict[torch.fx.Node, list[torch.Tensor]]]:
        """Per batch, the dense model's stream behind the sublayer, in the slim stream's coordinates; and by node what
        stands for what the entries read.
        """
        execution = self.dense.execution
        node = execution.graph.node(target)
        stop = execution.index[node] + 1
        *before, _ = execution.pieces(self.dense.position, stop)
        if before and not entries:  # what entries read may be computed on the way
            self.dense.advance(before[-1])
        goals: list[torch.Tensor] = []
        seen: dict[torch.fx.Node, list[torch.Tensor]] = {entry.dense: [] for entry in entries}
        for _, environment in self.dense.in_turn(stop):
            values = execution.run(environment, self.dense.position, stop, keep=[node, *seen])
            goal = values[node] if self.stream is None else self.stream.project(target, values[node])
            goals.append(execution.graph.kept_activation(goal))
            execution.put_away(environment, {id(goal): goals[-1]})  # what waits elsewhere waits there once
            for other, kept in seen.items():
                kept.append(values[other])
        self.dense.position = stop
        return goals, seen

    def finish(self) -> dict[str, float | str]:
        """Refit what reads a cut stream behind the last sublayer; repair the matrix in front of a tied head, if repair
        is asked for, and return notes on that.
        """
        entrance = self.readers.refit_last()
        if entrance is None or not self.repair_steps:
            return {}
        notes = self._refine(entrance, [self.slim_graph.op(entrance.target.name)])
        return {f"{name} of the head": value for name, value in notes.items()}

    # -- one region --------------------------------------------------------------------------------

    def _slim_region(
        self, region: Region, width: int, goals: list[torch.Tensor], solvers: Solvers, begin: int
    ) -> SweptRegion:
        """``begin``: the slim stream is run up to it first."""
        inputs = RegionInputs(self.slim_graph, region)
        if region.kind is RegionKind.EXPERTS:
            self.slim.advance(begin)
            return self._slim_experts(inputs, width, solvers)
        if width == region.width and not self.refit:
            return SweptRegion(region, width, "kept", None)
        gathered = self.reader_refit.gather(inputs, goals, begin)
        self._make_room()
        name, region_map, error = best_map(
            inputs,
            width,
            gathered,
            solvers,
            (lambda found: self.reader_refit.refit(inputs, found, gathered)) if self.refit else None,
        )
        if region_map is None:
            return SweptRegion(region, width, name, error)
        self.apply(region, region_map)
        self.slim.execution = Execution(self.slim_graph)  # folding adds parameters, and tables before their readers
        return SweptRegion(region, width, name, error, region_map.notes)

    def _make_room(self) -> None:
        """To solve takes the most memory of all."""
        if self.slim_graph.spool is not None:
            self.slim_graph.spool.weights.forget()

    def _slim_experts(self, inputs: RegionInputs, width: int, solvers: Solvers) -> SweptRegion:
        """Each expert is fitted to what it put out itself: what the stream lacks is no one expert's to make good."""
        region, execution = inputs.region, self.slim.execution
        fitting, held_out = inputs.new_sums(), inputs.new_sums()
        stop = max(execution.position(node) for node in inputs.nodes if node is not inputs.output) + 1
        for i, environment in enumerate(self.slim.environments):
            values = execution.run(dict(environment), self.slim.position, stop, keep=inputs.nodes)
            inputs.add_rows(held_out if i in self.measuring else fitting, values, self.masks[i])
        for sums in (fitting, held_out):
            sums.add_up(self.ranks, self.slim_graph.weight(inputs.products[0]).device)
        self._make_room()
        statistics = inputs.statistics(fitting, GramAccumulator())
        weight = statistics.reader_weight
        assert weight is not None
        assert inputs.reader is not None
        (name, solver), *_ = solvers
        found, error = solver(region, statistics, width), None
        if self.refit:
            fitted = refit_experts(found, statistics.gram, weight, ridge=EXPERT_RIDGE)
            if held_out.tokens:
                error = experts_error(held_out.gram, fitted @ found.down.mT, weight)
            found = replace(found, up=None, reader_weights={inputs.reader.name: fitted})
        self.apply(region, found)
        self.slim.execution = Execution(self.slim_graph)
        return SweptRegion(region, width, name, error, found.notes)

    # -- repair ------------------------------------------------------------------------------------

    def _repair(self, target: str, regions: Sequence[Region], goals: list[torch.Tensor]) -> dict[str, float | str]:
        """Refine writers and readers of the cut regions, behind a cut stream all linears that no other place shares;
        returns the held-out loss before and after.
        """
        graph, stream = self.slim_graph, self.slim
        if self.stream is None:
            ops = [graph.op(name) for region in regions for name in (*region.writers, *region.readers)]
        else:
            inside = {node.name for node in stream.execution.nodes[stream.position : self._slim_index(target) + 1]}
            ops = [op for op in graph.ops if op.name in inside and op.is_linear and _alone(graph, op)]
        piece = Sublayer(stream.execution, stream.environments, stream.position, graph.node(target), goals, self.masks)
        return self._refine(piece, ops)

    def _refine(self, piece: Sublayer, ops: Sequence[Op]) -> dict[str, float | str]:
        """Repair weights and biases of these ops in place."""
        graph = self.slim_graph
        owned = {value: op for op in ops for value in (op.weight, op.bias) if value is not None}
        nodes = {graph.node(value.name): (value, op) for value, op in owned.items()}
        repaired = repair(
            piece,
            list(nodes),
            sorted(self.measuring),
            steps=self.repair_steps,
            rate=self.repair_rate,
            seed=self.seed,
        )
        for node, weight in repaired.weights.items():
            value, op = nodes[node]
            op = graph.op(op.name)
            if value == op.weight:
                graph.set_weight(op, graph.oriented(op, weight))  # it was trained as it is stored
            else:
                graph.set_bias(op, weight)
        notes: dict[str, float | str] = {"loss before repair": repaired.before, "loss after repair": repaired.after}
        return notes | ({"repair": repaired.note} if repaired.note else {})


def _alone(graph: FxGraph, op: Op) -> bool:
    return op.weight is not None and len(graph.users(op.weight)) == 1
