"""Linears of a lower rank, or fewer blocks, in a graph that exists only as ONNX."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

from dotresize_fx.errors import NothingToSlimError
from dotresize_fx.onnx_form.graph import OnnxGraph
from dotresize_fx.options import Options
from dotresize_fx.passes.choose_regions import SWEPT
from dotresize_fx.passes.factorize_graph import published_ranks
from dotresize_fx.passes.find_blocks import find_blocks
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.reduce_graph import reduce_graph
from dotresize_fx.passes.slim_onnx_graph import REWRITTEN, Inputs, OnnxGraphs, SlimmedOnnx, attempts, ends
from dotresize_fx.progress import Progress


def reduce_onnx_graph(
    graphs: OnnxGraphs,
    batches: Sequence[Inputs],
    options: Options,
    progress: Progress,
    *,
    task: str,
    device: str = "cpu",
) -> SlimmedOnnx:
    """A reduced copy of the least rewritten graph in which all is found that the options ask for.

    Raises:
        NothingToSlimError: there are no blocks, or they share weights, or their depth cannot change.
        SolverError: activations are infinite or NaN.
        UsageError: more blocks than there are or than are alike.
    """
    dense = _editable(graphs, options)
    blocks = find_blocks(dense)
    reduced = reduce_graph(dense, batches, options, progress, task, device)
    outputs = [name for block in reduced.gone for name in blocks[block.number].caches]
    # Matches are those of the canonical graph, whose ops may have other names.
    named = find_blocks(graphs.canonical) if reduced.gone else []
    untouched = dense is graphs.given
    return SlimmedOnnx(
        reduced.graph,
        dense,
        untouched,
        notes=(*reduced.notes, *(() if untouched else (REWRITTEN,))),
        factorized=reduced.factorized,
        gone=tuple(replace(block, ops=frozenset(named[block.number].ops)) for block in reduced.gone),
        gone_caches=frozenset(name for output in outputs for name in (output, dense.caches[output])),
    )


def _editable(graphs: OnnxGraphs, options: Options) -> OnnxGraph:
    wanted = _found(graphs.canonical, options)
    for attempt in attempts(graphs):
        try:
            if _found(attempt, options) == wanted:
                return attempt
        except NothingToSlimError:  # it is spelled in ways that only the canonical graph shows
            continue
    return graphs.canonical


def _found(graph: OnnxGraph, options: Options) -> object:
    """What the options change: linears with their ranks; or blocks, and what they are aligned and refitted by."""
    if options.merge is None:
        cuts = published_ranks(graph, options.ratio or 0.0)
        return [(cut, tuple(graph.weight(graph.op(cut.op)).shape)) for cut in cuts]
    blocks = find_blocks(graph)
    alike = [one.form == other.form for one, other in itertools.pairwise(blocks)]
    regions = find_regions(graph).of_kind(*SWEPT) if options.merge_method == "aligned" else ()
    return [(block.start, block.end, block.caches) for block in blocks], alike, {ends(region) for region in regions}
