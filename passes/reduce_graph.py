"""What the options ask of a model's structure: linears of a lower rank, or fewer blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.least_squares import ENCODER_PULL, PULL
from dotresize_fx.options import Options
from dotresize_fx.passes.factorize_graph import factorize_graph, published_ranks
from dotresize_fx.passes.merge_graph import merge_graph, refit_graph
from dotresize_fx.progress import Progress
from dotresize_fx.repair import ENCODER_LEARNING_RATE
from dotresize_fx.task import predicts_tokens


class Reduced(NamedTuple):
    """The reduced copy of a graph, notes for the report, and the numbers of the blocks that are ``gone``."""

    graph: FxGraph
    notes: tuple[str, ...]
    gone: tuple[int, ...] = ()


def reduce_graph(
    dense: FxGraph,
    batches: Sequence[Mapping[str, torch.Tensor]],
    options: Options,
    progress: Progress,
    task: str = "decoder",
) -> Reduced:
    """Methods as published are not refitted, "aligned" is, and with more effort all that leave out blocks are: but for
    "drop-last", behind which the blocks that stay put out what they did.
    """
    if options.merge is None:
        cuts = published_ranks(dense, options.ratio or 0.0)
        published = options.method == "rom"
        found = factorize_graph(dense, batches, cuts, progress, published=published, check=options.check)
        return Reduced(found.graph, found.notes)
    method = options.merge_method or "mka"
    merged = merge_graph(dense, batches, options.merge, progress, method, check=options.check, seed=options.seed)
    notes = merged.notes
    if method == "aligned" or (method != "drop-last" and options.effort != "fast"):
        notes += refit_graph(
            dense,
            merged.graph,
            batches,
            progress,
            repair_steps=0 if options.effort == "fast" else options.steps_that_repair(task),
            repair_rate=None if predicts_tokens(task) else ENCODER_LEARNING_RATE,
            pull=PULL if predicts_tokens(task) else ENCODER_PULL,
            check=options.check,
            seed=options.seed,
        )
    return Reduced(merged.graph, notes, merged.gone)
