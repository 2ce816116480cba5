"""The sweep with what transport wants besides: more statistics, and writers changed before their region is cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from ot_formulations import Mix

from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.gram import GramAccumulator, token_rows, with_ones
from dotresize_fx.reader_refit import Gathered, ReaderRefit
from dotresize_fx.region_inputs import RegionInputs
from dotresize_fx.regions import Region, RegionKind
from dotresize_fx.sweep import Solvers, Sweep, SweptRegion


class WatchingRefit(ReaderRefit):
    """Where it ``watches_entry``, an FFN's statistics hold the Gram matrix of what enters it."""

    watches_entry = False

    def gather(self, inputs: RegionInputs, goals: list[torch.Tensor], begin: int) -> Gathered:
        gathered = super().gather(inputs, goals, begin)
        assert gathered.statistics is not None
        gathered.statistics = replace(gathered.statistics, writer_weights=inputs.writer_weights())
        if not self.watches_entry or inputs.region.kind is not RegionKind.FFN:
            return gathered
        execution, sums = self.stream.execution, GramAccumulator()
        entry = self.graph.node(inputs.writers[0].inputs[0].name)
        for i, environment in enumerate(self.stream.environments):
            if i in self.measuring:
                continue
            if entry in environment:
                value = environment[entry]
            else:
                stop = execution.index[entry] + 1
                value = execution.run(dict(environment), self.stream.position, stop, keep=[entry])[entry]
            sums.add(with_ones(token_rows(value, self.masks[i])))
        statistics = replace(gathered.statistics, entry_gram=sums.gram / max(sums.tokens, 1))
        return replace(gathered, statistics=statistics)


class TransportSweep(Sweep):
    """``values`` are the VALUE regions by their attention. Of a region that keeps its width nothing is changed."""

    mix: Mix | None = None
    values: Mapping[str, Region] = {}

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        refit = self.reader_refit
        self.reader_refit: WatchingRefit = WatchingRefit(
            self.slim_graph, self.slim, self.masks, self.measuring, refit.pull
        )

    def _slim_region(
        self, region: Region, width: int, goals: list[torch.Tensor], solvers: Solvers, begin: int
    ) -> SweptRegion:
        if self.mix is not None and width < region.width:
            self._mix(region, width, goals, begin)
        return super()._slim_region(region, width, goals, solvers, begin)

    def _mix(self, region: Region, width: int, goals: list[torch.Tensor], begin: int) -> None:
        assert self.mix is not None
        statistics = self.reader_refit.gather(RegionInputs(self.slim_graph, region), goals, begin).statistics
        writers = self.values[region.attention].writers if region.attention in self.values else ()
        found = self.mix(region, statistics, width, writers)
        for name, weight in found.items():
            op = self.slim_graph.op(name)
            dtype = self.slim_graph.weight(op).dtype
            self.slim_graph.set_weight(op, weight[:, :-1].to(dtype))
            if op.bias is not None:
                self.slim_graph.set_bias(self.slim_graph.op(name), weight[:, -1].to(dtype))
        self.slim.execution = Execution(self.slim_graph)
