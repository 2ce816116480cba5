"""Calibration statistics of a residual stream, over all its norms at once: one shared basis serves every layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from dotresize_fx.fidelity import Inputs
from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.gram import GramAccumulator, RegionStatistics, check_finite, padding_mask, token_rows
from dotresize_fx.regions import Region

# Rows kept for costs that a Gram matrix cannot give, such as L1 distances.
SAMPLES = 4096


def stream_statistics(
    graph: FxGraph, regions: Sequence[Region], batches: Sequence[Inputs], advanced: Callable[[], None] = lambda: None
) -> list[RegionStatistics]:
    """Run the batches and gather what each region's readers see behind its norms, whose gains were folded away.

    The stream is taken as the norms leave it, so that every token counts alike. ``advanced`` is called once a batch.
    """
    execution = Execution(graph)
    watched = [(i, graph.node(name)) for i, region in enumerate(regions) for name in region.norms]
    watched.sort(key=lambda pair: execution.index[pair[1]])
    totals = [GramAccumulator() for _ in regions]
    kept: list[list[torch.Tensor]] = [[] for _ in regions]
    visits = [max(1, SAMPLES // (max(1, len(region.norms)) * len(batches))) for region in regions]
    generator = torch.Generator().manual_seed(0)
    for batch in batches:
        environment, position, mask = execution.start(batch), 0, padding_mask(batch)
        for i, node in watched:
            stop = execution.index[node] + 1
            rows = token_rows(execution.run(environment, position, stop, keep=[node])[node], mask)
            totals[i].add(rows)
            # Any token, not every so many: a stride would pick the same positions, the first among them, each time.
            chosen = torch.randperm(len(rows), generator=generator)[: visits[i]]
            kept[i].append(rows[chosen.to(rows.device)].double())
            position = stop
        advanced()
    found = []
    for region, total, samples in zip(regions, totals, kept, strict=True):
        check_finite(total.gram, region)
        found.append(RegionStatistics(total.tokens, total.gram / total.tokens, samples=torch.cat(samples)))
    return found
