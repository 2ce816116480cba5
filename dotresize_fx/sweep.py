"""The sweep: one walk over the regions with two activation streams, the dense model's and the slim model's.

Each region is calibrated on what the already slimmed prefix really feeds it, and its readers are refitted so that
the residual stream after the sublayer is the dense model's again, which repairs what earlier cuts broke.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from dotresize_fx.fx_form.execution import Environment, Execution
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.gram import GramAccumulator, RegionStatistics, check_finite, token_rows
from dotresize_fx.least_squares import refit_reader, relative_error
from dotresize_fx.region_map import RegionMap
from dotresize_fx.regions import Region
from dotresize_fx.solvers import Solver

# One batch in this many is kept out of the solve and measures the region's error.
HELD_OUT_EVERY = 8

Inputs = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class SweptRegion:
    """What the sweep did to a region.

    ``error`` is ||slim - wanted|| / ||wanted|| of the reader's output on batches that were not solved with, ``wanted``
    being what would make the stream behind the sublayer the dense model's.
    """

    region: Region
    width: int
    error: float | None
    notes: Mapping[str, float | int | str] = field(default_factory=dict)


@dataclass
class _Stream:
    """One model's activations: an environment per batch, run up to ``position``."""

    execution: Execution
    environments: list[Environment]
    position: int = 0

    def advance(self, stop: int) -> None:
        for environment in self.environments:
            self.execution.run(environment, self.position, stop)
        self.position = stop


class Sweep:
    """Slims regions one after another; ``apply`` inserts and folds a map (the passes live outside the core).

    ``basis`` (d, k) takes the dense stream into the slim one's coordinates where the stream itself was cut.
    """

    def __init__(
        self,
        dense: FxGraph,
        slim: FxGraph,
        batches: Sequence[Inputs],
        apply: Callable[[Region, RegionMap], None],
        *,
        refit: bool = True,
        basis: torch.Tensor | None = None,
    ) -> None:
        self.slim_graph = slim
        self.apply, self.refit, self.basis = apply, refit, basis
        self.masks = [batch.get("attention_mask") for batch in batches]
        self.dense = _Stream(execution := Execution(dense), [execution.start(batch) for batch in batches])
        self.slim = _Stream(execution := Execution(slim), [execution.start(batch) for batch in batches])
        # Batches that measure: every eighth, but never so many that none is left to solve with.
        self.measuring = {i for i in range(len(batches)) if i % HELD_OUT_EVERY == HELD_OUT_EVERY - 1}

    def slim_region(self, region: Region, width: int, solver: Solver) -> SweptRegion:
        """Solve one region, fold the map and bring both streams behind its target. Regions come in graph order."""
        first = min(self._slim_index(name) for name in region.writers)
        self.slim.advance(first)
        wanted = self._dense_targets(region)
        statistics, outputs = self._statistics(region, wanted)
        region_map = solver(region, statistics, width)
        error = None
        if self.refit:
            region_map, error = self._refit(region, region_map, wanted, outputs)
        self.apply(region, region_map)
        self._rebuild()
        self.slim.advance(self._slim_index(region.target) + 1)
        return SweptRegion(region, width, error, region_map.notes)

    def _slim_index(self, name: str) -> int:
        return self.slim.execution.index[self.slim_graph.node(name)]

    def _rebuild(self) -> None:
        """Folding may add parameters; nodes, and so environments, stay."""
        self.slim.execution = Execution(self.slim_graph)

    def _dense_targets(self, region: Region) -> list[torch.Tensor]:
        """Per batch, the dense model's stream behind the sublayer, in the slim stream's coordinates."""
        execution = self.dense.execution
        node = self.dense.execution.graph.node(region.target)
        stop = execution.index[node] + 1
        targets = []
        for environment in self.dense.environments:
            value = execution.run(environment, self.dense.position, stop, keep=[node])[node]
            targets.append(value if self.basis is None else value @ self.basis.to(value.dtype))
        self.dense.position = stop
        return targets

    def _statistics(self, region: Region, wanted: list[torch.Tensor]) -> tuple[RegionStatistics, list[torch.Tensor]]:
        """Run the sublayer as it is. ``wanted`` becomes what the reader should put out; returns what it does."""
        graph, execution = self.slim_graph, self.slim.execution
        reader = graph.op(region.readers[0])
        writers = [graph.op(name) for name in region.writers]
        hidden, output = graph.node(reader.inputs[0].name), graph.node(reader.name)
        entry, target = graph.node(writers[0].inputs[0].name), graph.node(region.target)
        read, written = GramAccumulator(), GramAccumulator()
        outputs = []
        for i, environment in enumerate(self.slim.environments):
            scratch = dict(environment)
            values = execution.run(
                scratch, self.slim.position, execution.index[target] + 1, keep=[hidden, output, entry, target]
            )
            # Some models run a sublayer with batch and length joined and part them behind the addition.
            wanted[i] = (wanted[i] - values[target]).reshape_as(values[output]) + values[output]
            outputs.append(values[output])
            if i in self.measuring:
                continue
            read.add(token_rows(values[hidden], self.masks[i]))
            if all(op.inputs[0] == writers[0].inputs[0] for op in writers):
                written.add(token_rows(values[entry], self.masks[i]))
        check_finite(read.gram, region)
        writer_gram = None
        if written.tokens:
            weights = [graph.weight(op).double() for op in writers]
            writer_gram = sum((w @ (written.gram / written.tokens) @ w.T for w in weights), written.gram.new_zeros(()))
        statistics = RegionStatistics(
            tokens=read.tokens,
            gram=read.gram / read.tokens,
            reader_norm=graph.weight(reader).double().norm(dim=0),
            reader_weight=graph.weight(reader).double(),
            writer_gram=writer_gram,
        )
        return statistics, outputs

    def _refit(
        self, region: Region, region_map: RegionMap, wanted: list[torch.Tensor], own: list[torch.Tensor]
    ) -> tuple[RegionMap, float | None]:
        """Replace the map's way up by a reader fitted to ``wanted``, from the merged neurons' own activations."""
        graph = self.slim_graph
        reader = graph.op(region.readers[0])
        with_bias = graph.bias(reader) is not None
        fitting, held_out = GramAccumulator(), GramAccumulator()
        for i, hidden in enumerate(self._merged_activations(region, region_map)):
            rows = token_rows(hidden, self.masks[i])
            if with_bias:
                rows = torch.cat([rows, torch.ones_like(rows[:, :1])], 1)
            (held_out if i in self.measuring else fitting).add(
                rows, wanted=token_rows(wanted[i], self.masks[i]), own=token_rows(own[i], self.masks[i])
            )
        refit = refit_reader(fitting.gram, fitting.cross["wanted"], fitting.cross["own"], with_bias=with_bias)
        full = refit.weight if refit.bias is None else torch.cat([refit.weight, refit.bias[:, None]], 1)
        error = relative_error(held_out, "wanted", full) ** 0.5 if held_out.tokens else None
        refitted = RegionMap(
            region_map.down,
            branch_down=region_map.branch_down,
            reader_weights={reader.name: refit.weight},
            reader_biases={} if refit.bias is None else {reader.name: refit.bias},
            notes=region_map.notes,
        )
        return refitted, error

    def _merged_activations(self, region: Region, region_map: RegionMap) -> Iterator[torch.Tensor]:
        """Per batch, what the reader will see: the sublayer up to the reader with the writers already mapped."""
        graph, execution = self.slim_graph, self.slim.execution
        hidden = graph.node(graph.op(region.readers[0]).inputs[0].name)
        down = region_map.down
        weights: dict[torch.fx.Node, torch.Tensor] = {}
        for op in (graph.op(name) for name in region.writers):
            assert op.weight is not None
            weight = graph.weight(op)
            weights[graph.node(op.weight.name)] = (down.T @ weight.double()).to(weight.dtype)
            if op.bias is not None and (bias := graph.bias(op)) is not None:
                weights[graph.node(op.bias.name)] = (down.T @ bias.double()).to(bias.dtype)
        stop = execution.index[hidden] + 1
        for environment in self.slim.environments:
            scratch = dict(environment)
            yield execution.run(scratch, self.slim.position, stop, keep=[hidden], parameters=weights)[hidden]
