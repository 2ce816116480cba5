"""What the options ask of a model's structure: linears of a lower rank, or fewer blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic

import torch

from dotresize_fx.calibration_runs import AnyGraph
from dotresize_fx.depth.gone_block import GoneBlock
from dotresize_fx.least_squares import ENCODER_PULL, PULL
from dotresize_fx.options import Options
from dotresize_fx.passes.factorize_graph import factorize_graph, low_rank_linears, published_ranks
from dotresize_fx.passes.merge_graph import merge_graph, merged_blocks, refit_graph
from dotresize_fx.progress import Progress
from dotresize_fx.rank.low_rank_linear import LowRankLinear
from dotresize_fx.repair import ENCODER_LEARNING_RATE
from dotresize_fx.structure_table import depth_table, rank_table
from dotresize_fx.task import predicts_tokens


@dataclass(frozen=True)
class Reduced(Generic[AnyGraph]):
    """A reduced graph, its linears that are two now, the dense one's blocks that went, and notes for the report."""

    graph: AnyGraph
    factorized: tuple[LowRankLinear, ...] = ()
    gone: tuple[GoneBlock, ...] = ()
    notes: tuple[str, ...] = ()


def reduce_graph(
    dense: AnyGraph,
    batches: Sequence[Mapping[str, torch.Tensor]],
    options: Options,
    progress: Progress,
    task: str = "decoder",
    device: str = "cpu",
) -> Reduced[AnyGraph]:
    """A reduced copy of ``dense``. Methods as published are not refitted, "aligned" is, and with more effort all that
    leave out blocks are: but for "drop-last", behind which the blocks that stay put out what they did. ``device`` is
    where an ONNX graph runs.
    """
    if options.merge is None:
        cuts = published_ranks(dense, options.ratio or 0.0)
        found = factorize_graph(
            dense, batches, cuts, progress, published=options.method == "rom", check=options.check, device=device
        )
        linears = low_rank_linears(dense, found)
        progress.show(rank_table(linears))
        return Reduced(found.graph, factorized=linears, notes=found.notes)
    method = options.merge_method or "mka"
    merged = merge_graph(
        dense, batches, options.merge, progress, method, check=options.check, seed=options.seed, device=device
    )
    gone = merged_blocks(dense, merged)
    progress.show(depth_table(gone))
    notes = merged.notes
    if method == "aligned" or (method != "drop-last" and options.effort != "fast"):
        notes += refit_graph(
            dense,
            merged.graph,
            batches,
            progress,
            repair_steps=options.steps_taken(task),
            repair_rate=None if predicts_tokens(task) else ENCODER_LEARNING_RATE,
            pull=PULL if predicts_tokens(task) else ENCODER_PULL,
            check=options.check,
            seed=options.seed,
            device=device,
        )
    return Reduced(merged.graph, gone=gone, notes=notes)
