"""Calibration statistics of a residual stream, over all its norms at once: one shared basis serves every layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from dotresize_fx.fidelity import Inputs
from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.gram import GramAccumulator, RegionStatistics, check_finite, token_rows
from dotresize_fx.graph import Kind, Op
from dotresize_fx.regions import Region

# Rows kept for costs that a Gram matrix cannot give, such as L1 distances.
SAMPLES = 4096
# Most that the moments and metrics of single norms may take.
SIGHT_BYTES = 4 * 2**30


def stream_statistics(
    graph: FxGraph, regions: Sequence[Region], batches: Sequence[Inputs], advanced: Callable[[], None] = lambda: None
) -> list[RegionStatistics]:
    """Run the batches and gather what each region's readers see behind its norms, whose gains were folded away.

    The stream is taken as the norms leave it, so that every token counts alike. ``advanced`` is called once a batch.
    """
    execution = Execution(graph)
    watched = [(i, graph.node(name)) for i, region in enumerate(regions) for name in region.norms]
    watched.sort(key=lambda pair: execution.index[pair[1]])
    totals = [GramAccumulator() for _ in watched]
    kept: list[list[torch.Tensor]] = [[] for _ in regions]
    visits = [max(1, SAMPLES // (max(1, len(region.norms)) * len(batches))) for region in regions]
    generator = torch.Generator().manual_seed(0)
    for batch in batches:
        environment, position = execution.start(batch), 0
        for total, (i, node) in zip(totals, watched, strict=True):
            stop = execution.index[node] + 1
            rows = token_rows(
                execution.run(environment, position, stop, keep=[node])[node], batch.get("attention_mask")
            )
            total.add(rows)
            # Any token, not every so many: a stride would pick the same positions, the first among them, each time.
            chosen = torch.randperm(len(rows), generator=generator)[: visits[i]]
            kept[i].append(rows[chosen.to(rows.device)].double())
            position = stop
        advanced()
    found = []
    for i, (region, samples) in enumerate(zip(regions, kept, strict=True)):
        mine = [(node.name, total) for total, (owner, node) in zip(totals, watched, strict=True) if owner == i]
        tokens, gram = sum(total.tokens for _, total in mine), torch.stack([total.gram for _, total in mine]).sum(0)
        check_finite(gram, region)
        sights: list[tuple[torch.Tensor, torch.Tensor]] = []
        if len(watched) * 2 * gram.numel() * gram.element_size() <= SIGHT_BYTES:
            moments = {norm: total.gram / total.tokens for norm, total in mine}
            sights = [(moment, _metric(graph, region, norm, moment)) for norm, moment in moments.items()]
        found.append(RegionStatistics(tokens, gram / tokens, samples=torch.cat(samples), sights=sights))
    return found


def _metric(graph: FxGraph, region: Region, norm: str, moment: torch.Tensor) -> torch.Tensor:
    """(n, n) float64: how what reads behind a norm feels an error there, see RegionStatistics.sights."""
    total = torch.zeros_like(moment)
    for reader in (graph.op(name) for name in region.normed_readers):
        if _normed_by(graph, reader) != norm:
            continue
        weight = graph.weight(reader).flatten(0, -2).double()
        square = weight.T @ weight
        users = graph.users(reader.output)
        if len(users) == 1 and users[0].kind is Kind.LINEAR and users[0].name not in region.normed_readers:
            head = graph.weight(users[0]).float()  # behind a tied head's gain; softmax does not feel the mean
            head = head - head.mean(0)
            square = weight.T @ (head.T @ head).double() @ weight
        total += square / (square * moment).sum().clamp_min(torch.finfo(torch.float64).tiny)
    return total


def _normed_by(graph: FxGraph, reader: Op) -> str:
    op = graph.producer(reader.inputs[0])
    while op is not None and op.kind in (Kind.KEEP, Kind.SCALE, Kind.MUL):
        op = graph.producer(op.inputs[0])
    return "" if op is None else op.name
