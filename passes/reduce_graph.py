"""What the options ask of a model's structure: linears of a lower rank, or fewer blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.options import Options
from dotresize_fx.passes.factorize_graph import factorize_graph, published_ranks
from dotresize_fx.passes.merge_graph import merge_graph
from dotresize_fx.progress import Progress


def reduce_graph(
    dense: FxGraph, batches: Sequence[Mapping[str, torch.Tensor]], options: Options, progress: Progress
) -> tuple[FxGraph, tuple[str, ...]]:
    """The reduced copy of ``dense``, and notes for the report. Methods as published are not refitted, "aligned" is."""
    if options.merge is not None:
        method = options.merge_method or "mka"
        merged = merge_graph(
            dense,
            batches,
            options.merge,
            progress,
            method,
            refit=method == "aligned",
            check=options.check,
            seed=options.seed,
        )
        return merged.graph, merged.notes
    cuts = published_ranks(dense, options.ratio or 0.0)
    published = options.method == "rom"
    found = factorize_graph(dense, batches, cuts, progress, published=published, check=options.check)
    return found.graph, found.notes
