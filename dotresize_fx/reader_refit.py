"""A region's reader, fitted so that the stream behind its sublayer is the dense model's again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from dotresize_fx.activation_stream import ActivationStream
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.gram import GramAccumulator, RegionStatistics, token_rows, with_ones
from dotresize_fx.head_maps import over_heads
from dotresize_fx.least_squares import refit_reader, relative_error
from dotresize_fx.ranks import Ranks
from dotresize_fx.region_inputs import RegionInputs
from dotresize_fx.region_map import RegionMap
from dotresize_fx.region_ops import RegionOps
from dotresize_fx.regions import ATTENTION_KINDS, Region
from dotresize_fx.solvers import Solver


@dataclass
class Sums:
    """A region's sums on the slim prefix: solved with, which the statistics have parts of, and held out. Of wide
    regions they are the largest there is, and :func:`best_map` forgets them once they are not needed any more.
    """

    statistics: RegionStatistics | None
    fitting: GramAccumulator
    held_out: GramAccumulator

    def forget(self) -> None:
        self.statistics, self.fitting, self.held_out = None, GramAccumulator(), GramAccumulator()


@dataclass
class Gathered(Sums):
    """And per batch what its reader should put out (``wanted``) and does (``own``), joined or not."""

    wanted: list[torch.Tensor]
    own: list[torch.Tensor]


class ReaderRefit:
    """Sums over the slim stream as far as it was run, and readers fitted to them.

    measuring: numbers of the batches that measure and are not solved with. masks: per batch, see
    :func:`dotresize_fx.gram.padding_mask`. pull: see :func:`dotresize_fx.least_squares.refit_reader`. ranks: who has
    the other batches.
    """

    def __init__(
        self,
        graph: FxGraph,
        stream: ActivationStream,
        masks: Sequence[torch.Tensor | None],
        measuring: set[int],
        pull: float,
        ranks: Ranks | None = None,
    ) -> None:
        self.ranks = ranks or Ranks(alone=True)
        self.graph, self.stream, self.masks, self.measuring, self.pull = graph, stream, masks, measuring, pull

    def gather(self, inputs: RegionInputs, goals: list[torch.Tensor], begin: int) -> Gathered:
        """Run the sublayer as it is, which starts at ``begin`` or before; the stream is run up to that on the way."""
        execution = self.stream.execution
        target = self.graph.node(inputs.region.target)
        fitting, held_out, entered = GramAccumulator(), GramAccumulator(), GramAccumulator()
        wanted, own, near = [], [], None
        last = inputs.entry if inputs.output is None else target
        assert last is not None
        stop, keep = 1 + max(execution.position(node) for node in (last, *inputs.nodes)), [*inputs.nodes, target]
        self._approach(begin, stop)
        start, begin = self.stream.position, max(begin, self.stream.position)
        beside = [] if inputs.output is None else [goals]
        for i, environment in self.stream.in_turn(stop, *beside):
            execution.run(environment, start, begin)
            values = execution.run(dict(environment), begin, stop, keep=keep)
            if start < begin:
                execution.put_away(environment)
            solves, mask = i not in self.measuring, self.masks[i]
            if inputs.output is not None:
                output = values[inputs.output]
                # Some models run a sublayer with batch and length joined and part them behind the addition.
                goal = (goals[i] - values[target]).reshape_as(output) + output
                wanted.append(self.graph.kept_activation(goal))
                own.append(self.graph.kept_activation(output))
                sums = fitting if solves else held_out
                sums.add(inputs.read_rows(values, mask), wanted=token_rows(goal, mask))
            if solves and (rows := inputs.entry_rows(values, mask)) is not None:
                entered.add(rows)
            near = inputs.coherence(values, mask) if near is None else near
        self.stream.position = begin
        device = self.graph.weight(inputs.writers[0]).device
        for sums in (fitting, held_out):
            sums.add_up(self.ranks, device, ("wanted",))
        entered.add_up(self.ranks, device)
        near = self.ranks.first_matrix(near, device)
        return Gathered(inputs.statistics(fitting, entered, near), fitting, held_out, wanted, own)

    def _approach(self, begin: int, stop: int) -> None:
        """Run the stream so near to ``begin`` that weights up to ``stop`` can be held."""
        start = self.stream.position
        before = [piece for piece in self.stream.execution.pieces(start, stop) if start < piece <= begin]
        if before:
            self.stream.advance(before[-1])

    def refit(self, inputs: RegionInputs, region_map: RegionMap, gathered: Gathered) -> tuple[RegionMap, float | None]:
        """Replace the map's way up by a reader fitted to ``wanted`` from what the reader will see."""
        return fit_reader(
            inputs, region_map, gathered, lambda: self._gather_merged(inputs, region_map, gathered), self.pull
        )

    def _gather_merged(
        self, inputs: RegionInputs, region_map: RegionMap, gathered: Gathered
    ) -> tuple[GramAccumulator, GramAccumulator]:
        """The sums over what the reader sees once the writers are mapped: merged neurons have to be run."""
        fitting, held_out = GramAccumulator(), GramAccumulator()
        for i, hidden in self._merged_activations(inputs, region_map, gathered):
            rows = token_rows(hidden, self.masks[i])
            (held_out if i in self.measuring else fitting).add(
                with_ones(rows) if inputs.biased else rows,
                wanted=token_rows(gathered.wanted[i], self.masks[i]),
                own=token_rows(gathered.own[i], self.masks[i]),
            )
        for sums in (fitting, held_out):
            sums.add_up(self.ranks, self.graph.weight(inputs.writers[0]).device, ("wanted", "own"))
        return fitting, held_out

    def _merged_activations(
        self, inputs: RegionInputs, region_map: RegionMap, gathered: Gathered
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """By batch, the sublayer up to the reader with the writers already mapped."""
        execution, region = self.stream.execution, inputs.region
        assert inputs.hidden is not None
        weights: dict[torch.fx.Node, torch.Tensor] = {}
        for op in inputs.writers:
            weights |= inputs.mapped(op, region_map.down_of(region, op.name))
        stop = execution.index[inputs.hidden] + 1
        for i, environment in self.stream.in_turn(stop, gathered.wanted, gathered.own):
            values = execution.run(
                dict(environment), self.stream.position, stop, keep=[inputs.hidden], parameters=weights
            )
            yield i, values[inputs.hidden]


def fit_reader(
    inputs: RegionOps,
    region_map: RegionMap,
    gathered: Sums,
    merged: Callable[[], tuple[GramAccumulator, GramAccumulator]],
    pull: float,
) -> tuple[RegionMap, float | None]:
    """The map with a reader fitted to what it should put out; and its relative error on held-out rows, if any.

    ``merged`` gives the sums, ``wanted`` and ``own`` among them, over what the reader sees once the writers are mapped;
    it is asked where that does not follow from ``gathered``.
    """
    region, reader = inputs.region, inputs.reader
    assert reader is not None
    mix, kept = None, region_map.selected(region)
    if kept is not None or region.kind in ATTENTION_KINDS:
        weight = inputs.reader_weight()
        width = weight.shape[1] - inputs.biased
        held_out = gathered.held_out
        if kept is not None:
            kept = torch.cat([kept, kept.new_tensor([width])]) if inputs.biased else kept
            fitting = gathered.fitting.of(kept)
            own = gathered.fitting.gram.index_select(0, kept) @ weight.T
        else:
            mix = over_heads(region, region_map.down, width)
            if inputs.biased:
                mix = torch.block_diag(mix, mix.new_ones(1, 1))  # type: ignore[no-untyped-call]
            fitting = gathered.fitting.through(mix)
            own = mix.T @ gathered.fitting.gram @ weight.T
    else:
        fitting, held_out = merged()
        own = fitting.cross["own"]
    refit = refit_reader(fitting.gram, fitting.cross["wanted"], own, with_bias=inputs.biased, pull=pull)
    del fitting, own  # before as much is made of the held-out sums
    full = refit.weight if refit.bias is None else torch.cat([refit.weight, refit.bias[:, None]], 1)
    error = None
    if held_out.tokens:
        held_out = held_out.of(kept) if kept is not None else held_out.through(mix) if mix is not None else held_out
        error = relative_error(held_out, "wanted", full) ** 0.5
    refitted = RegionMap(
        region_map.down,
        branch_down=region_map.branch_down,
        key_down=region_map.key_down,
        reader_weights={reader.name: refit.weight},
        reader_biases={} if refit.bias is None else {reader.name: refit.bias},
        notes=region_map.notes,
    )
    return refitted, error


def best_map(
    inputs: RegionOps,
    width: int,
    gathered: Sums,
    solvers: Sequence[tuple[str, Solver]],
    fit: Callable[[RegionMap], tuple[RegionMap, float | None]] | None,
) -> tuple[str, RegionMap | None, float | None]:
    """(solver, map, error) of the solver whose fitted reader does best on held-out rows, the first of equals. Uses up
    what was gathered.

    ``fit`` None: readers are taken as the solver has them. At the full width the reader alone is fitted ("refit"); no
    map, and "kept", where its own does better.
    """
    region, fits = inputs.region, fit is not None and inputs.reader is not None
    if width == region.width and inputs.reader is not None:
        solvers = [("refit", _keep_all)]
    best: tuple[str, RegionMap, float | None] | None = None
    for i, (name, solver) in enumerate(solvers):
        assert gathered.statistics is not None
        region_map, error = solver(region, gathered.statistics, width), None
        last = width < region.width and i == len(solvers) - 1
        if last and region.kind not in ATTENTION_KINDS and region_map.selected(region) is None:
            gathered.forget()  # merged neurons have to be run
        if fit is not None and fits:
            region_map, error = fit(region_map)
        # Without held-out batches nothing tells them apart.
        if best is None or (error or 0.0) < (best[2] or 0.0):
            best = name, region_map, error
    assert best is not None
    name, region_map, error = best
    if width == region.width and error is not None:
        kept = relative_error(gathered.held_out, "wanted", inputs.reader_weight()) ** 0.5
        if kept <= error:  # too few tokens for a fit that holds on others
            return "kept", None, kept
    return name, region_map, error


def _keep_all(region: Region, statistics: RegionStatistics, width: int) -> RegionMap:
    identity = torch.eye(width, dtype=torch.float64, device=statistics.gram.device)
    return RegionMap(identity, identity)
