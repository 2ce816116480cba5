"""One region cut moderately, as what it changes in a run of the dense model."""

from __future__ import annotations

import torch

from dotresize_fx.expert_statistics import refit_experts
from dotresize_fx.fx_form.execution import Environment, Execution
from dotresize_fx.gram import RegionStatistics
from dotresize_fx.head_maps import at_dense_width, over_heads
from dotresize_fx.least_squares import solve_positive
from dotresize_fx.offload.lazy_tensor import in_memory
from dotresize_fx.region_inputs import RegionInputs
from dotresize_fx.region_map import RegionMap
from dotresize_fx.regions import Region, RegionKind, Symmetry
from dotresize_fx.solvers import solvers_for

# The share of its width that a probe keeps; a KV head is the least that can go.
PROBED = {RegionKind.FFN: 0.6, RegionKind.EXPERTS: 0.6, RegionKind.VALUE: 0.75, RegionKind.QUERY_KEY: 0.75}
# Merging the first quarter of rotary pairs loses next to nothing, which says little of what the others lose.
PROBED_PAIRS = 0.5
# Of the mean square of what a reader reads: a probe fitted to few tokens is to be no better than one fitted to many.
RIDGE = 1e-3


def probed_width(region: Region) -> int:
    """The width at which a region's curve is priced."""
    if region.kind is RegionKind.HEADS:
        return region.width - 1
    share = PROBED_PAIRS if region.symmetry is Symmetry.ROTARY_PAIRS else PROBED[region.kind]
    return max(2, int(region.width * share / 2) * 2)


def reader_change(region: Region, statistics: RegionStatistics, found: RegionMap) -> torch.Tensor:
    """(n, out): from what the reader reads to the error in what it puts out, fitted to what the map leaves."""
    weight = statistics.reader_weight
    assert weight is not None
    chosen = found.selected(region)
    if chosen is None:
        down = over_heads(region, found.down, weight.shape[1])
        from_all = down.T @ statistics.gram
        kept = from_all @ down
    else:
        from_all = statistics.gram.index_select(0, chosen)
        kept = from_all.index_select(1, chosen)
    kept.diagonal().add_(RIDGE * kept.diagonal().mean().clamp_min(torch.finfo(kept.dtype).tiny))
    fitted = solve_positive(kept, from_all @ weight.T)
    back = down @ fitted if chosen is None else torch.zeros_like(weight.T).index_copy_(0, chosen, fitted)
    return back - weight.T


class Probe:
    """One region cut to its probed width, as what it changes in a run of the dense model.

    ``change`` (n, out) takes what the reader reads to the error in what it puts out; for queries and keys ``weights``
    stand in for the writers' own: what is left of them, written at the dense width.
    """

    def __init__(self, inputs: RegionInputs, statistics: RegionStatistics) -> None:
        self.inputs, self.region = inputs, inputs.region
        region, graph = self.region, inputs.graph
        self.name, self.rarely = region.name, region.kind is RegionKind.HEADS
        self.width = probed_width(region)
        self.change = torch.zeros(0)
        self.weights: dict[torch.fx.Node, torch.Tensor] = {}
        ((_, solve),) = solvers_for("obs", region.kind)
        found = solve(region, statistics, self.width)
        if region.kind is RegionKind.QUERY_KEY:
            for op in inputs.writers:
                kept = at_dense_width(region, found, found.down_of(region, op.name))
                written = over_heads(region, kept, len(graph.weight(op)))
                self.weights |= {node: graph.kept(found) for node, found in inputs.mapped(op, written).items()}
            self.departs = [graph.node(name) for name in region.writers]
            return
        assert inputs.output is not None
        assert statistics.reader_weight is not None
        self.departs = [inputs.output]
        weight = statistics.reader_weight
        if region.kind is RegionKind.EXPERTS:
            assert inputs.reader is not None
            kept = refit_experts(found, statistics.gram, weight, ridge=RIDGE) @ found.down.mT
            parameter, stored = graph.stored_expert_weight(inputs.reader, kept)
            self.weights, self.departs = {parameter: graph.kept(stored)}, list(parameter.users)
            return
        assert inputs.reader is not None
        dtype = torch.bfloat16 if graph.half_products else graph.weight(inputs.reader).dtype
        self.change = graph.kept(reader_change(region, statistics, found).to(dtype))

    def depart(self, execution: Execution, environment: Environment, start: int) -> int:
        """Cut the region in ``environment``, which was run up to ``start``; returns how far it is run then."""
        node, hidden = self.inputs.output, self.inputs.hidden
        if node is not None and hidden is not None and not self.weights:
            rows = in_memory(environment[hidden])
            values = execution.run(environment, start, stop := execution.index[node] + 1, keep=[node])
            environment[node] = values[node] + rows @ self.change.to(rows.dtype)
            return stop
        stop = 1 + max(execution.index[user] for weight in self.weights for user in weight.users)
        execution.run(environment, start, stop, parameters=self.weights)
        return stop
