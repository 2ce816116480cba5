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
    graph: FxGraph, region: Region, batches: Sequence[Inputs], advanced: Callable[[], None] = lambda: None
) -> RegionStatistics:
    """Run the batches and gather what the readers see behind the region's norms, whose gains were folded away.

    The stream is taken as the norms leave it, so that every token counts alike. ``advanced`` is called once a batch.
    """
    execution = Execution(graph)
    nodes = sorted((graph.node(name) for name in region.norms), key=execution.index.__getitem__)
    total = GramAccumulator()
    kept: list[torch.Tensor] = []
    per_visit = max(1, SAMPLES // (len(nodes) * len(batches)))
    generator = torch.Generator().manual_seed(0)
    for batch in batches:
        environment, position, mask = execution.start(batch), 0, padding_mask(batch)
        for node in nodes:
            stop = execution.index[node] + 1
            rows = token_rows(execution.run(environment, position, stop, keep=[node])[node], mask)
            total.add(rows)
            # Any token, not every so many: a stride would pick the same positions, the first among them, each time.
            chosen = torch.randperm(len(rows), generator=generator)[:per_visit]
            kept.append(rows[chosen.to(rows.device)].double())
            position = stop
        advanced()
    check_finite(total.gram, region)
    return RegionStatistics(
        tokens=total.tokens,
        gram=total.gram / total.tokens,
        samples=torch.cat(kept),
    )
