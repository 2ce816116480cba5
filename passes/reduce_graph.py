"""What the options ask of a model's structure: linears of a lower rank, or fewer blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic

import torch

from dotresize_fx.calibration_runs import AnyGraph
from dotresize_fx.options import Options
from dotresize_fx.passes.factorize_graph import factorize_graph, published_ranks
from dotresize_fx.passes.merge_graph import merge_graph
from dotresize_fx.progress import Progress


@dataclass(frozen=True)
class Reduced(Generic[AnyGraph]):
    """A reduced graph, the names of its linears that are two now, the numbers of the blocks that went, and notes for
    the report.
    """

    graph: AnyGraph
    factorized: tuple[str, ...] = ()
    gone: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()


def reduce_graph(
    dense: AnyGraph,
    batches: Sequence[Mapping[str, torch.Tensor]],
    options: Options,
    progress: Progress,
    device: str = "cpu",
) -> Reduced[AnyGraph]:
    """A reduced copy of ``dense``. Methods as published are not refitted, "aligned" is. ``device``: where an ONNX graph
    runs.
    """
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
            device=device,
        )
        return Reduced(merged.graph, gone=merged.gone, notes=merged.notes)
    cuts = published_ranks(dense, options.ratio or 0.0)
    found = factorize_graph(
        dense, batches, cuts, progress, published=options.method == "rom", check=options.check, device=device
    )
    return Reduced(found.graph, factorized=tuple(found.ranks), notes=found.notes)
