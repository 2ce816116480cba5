"""Fewer blocks for a whole graph: which go, by what rule, and what reads the stream refitted to the dense model's."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic

import torch

from dotresize_fx.calibration_runs import AnyGraph, reader_sweep, stream_states
from dotresize_fx.cost import count_cost
from dotresize_fx.depth.choice import DROPS, MERGES, blocks_to_drop, check_count, pairs_to_merge
from dotresize_fx.depth.features import DepthStatistics, depth_statistics
from dotresize_fx.depth.gone_block import GoneBlock, gone_block
from dotresize_fx.depth.similarity import neighbour_similarities
from dotresize_fx.errors import NothingToSlimError, UsageError
from dotresize_fx.fidelity import Inputs
from dotresize_fx.graph import Graph
from dotresize_fx.least_squares import PULL
from dotresize_fx.passes.align_blocks import align_blocks
from dotresize_fx.passes.check_folded import check_folded, mapped_ends
from dotresize_fx.passes.choose_regions import REFITTED, choose_regions, sublayers
from dotresize_fx.passes.cut_stream import apply_map
from dotresize_fx.passes.drop_layers import DropLayers
from dotresize_fx.passes.find_blocks import Block, find_blocks
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.merge_layers import MergeLayers
from dotresize_fx.progress import Progress
from dotresize_fx.region_map import RegionMap
from dotresize_fx.regions import Region, counted
from dotresize_fx.transport.align_regions import rotation_between

# Of the mean diagonal: towards no rotation where tokens do not say.
LEAN = 1e-3


def check_merge(graph: Graph, count: int, method: str) -> None:
    """Whether ``count`` blocks can go, as far as it can be told without data.

    Raises:
        UsageError, NothingToSlimError: see :func:`merge_graph`.
    """
    blocks = find_blocks(graph)
    check_count(count, len(blocks))
    if method in MERGES:
        _check_weights(graph, blocks)
        pairs_to_merge([0.0] * (len(blocks) - 1), _alike(blocks), count)


@dataclass(frozen=True)
class Merged(Generic[AnyGraph]):
    """A graph with fewer blocks. ``gone`` are the numbers, counted in the dense model, of those that went; ``alphas``
    what each weighed in the block behind it, empty where blocks were dropped; notes for the report.
    """

    graph: AnyGraph
    gone: tuple[int, ...]
    alphas: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()


def merge_graph(
    dense: AnyGraph,
    batches: Sequence[Inputs],
    count: int,
    progress: Progress,
    method: str = "mka",
    *,
    refit: bool = False,
    turn: bool = False,
    check: bool = False,
    seed: int = 0,
    device: str = "cpu",
) -> Merged[AnyGraph]:
    """A copy of ``dense`` with ``count`` blocks less, by a ``method`` of MERGES or DROPS.

    ``refit``: what reads FFNs and values is then fitted to the dense model's stream, sublayer by sublayer. ``turn``:
    "aligned" matches the residual coordinates too, see :func:`align_blocks`. ``device``: where an ONNX graph runs.

    Raises:
        UsageError: an unknown method, or more blocks than there are or than are alike.
        NothingToSlimError: the model's depth cannot change, or weights that nobody can read are to be averaged.
        CalibrationError: too little text to tell how alike blocks are.
    """
    if method not in (*MERGES, *DROPS):
        raise UsageError(f"--merge-method {method}: choose one of {', '.join((*MERGES, *DROPS))}")
    slim = dense.copy()
    blocks: list[Block] = find_blocks(slim)
    check_count(count, len(blocks))
    statistics = DepthStatistics((), (0.0,) * len(blocks))
    if method != "drop-last":
        states = [blocks[0].start.name, *(block.end.name for block in blocks)]
        with torch.no_grad(), progress.stage("compare blocks", len(batches)) as step:
            found = stream_states(dense, states, batches, device)
            statistics = depth_statistics(found, len(batches), seed=seed, advanced=step)
    alphas: tuple[float, ...] = ()
    if method in DROPS:
        gone = blocks_to_drop(method, statistics.influences, count)
        DropLayers([blocks[i] for i in gone])(slim, check=check)
    else:
        _check_weights(slim, blocks)
        alike = _alike(blocks)
        likeness = neighbour_similarities(statistics.features[1:]) if any(alike) else [0.0] * len(alike)
        gone = pairs_to_merge(likeness, alike, count)
        alphas = tuple(likeness[i] for i in gone)
        with progress.stage("merge", len(gone)) as step:
            turns = [_turn(*pair) for pair in itertools.pairwise(statistics.features)] if turn else None
            _merge(slim, gone, alphas, method == "aligned", turns, check, step)
    slim.refresh_shapes()
    notes = _told(dense, slim, gone, alphas, method)
    if refit:
        with torch.no_grad():
            notes += refit_graph(dense, slim, batches, progress, check=check, seed=seed, device=device)
    return Merged(slim, tuple(gone), alphas, notes)


def merged_blocks(dense: Graph, merged: Merged[AnyGraph]) -> tuple[GoneBlock, ...]:
    """The blocks of the ``dense`` graph that went."""
    blocks = find_blocks(dense)
    if not merged.alphas:
        return tuple(gone_block(dense, i, blocks[i].ops) for i in merged.gone)
    pairs = zip(merged.gone, merged.alphas, strict=True)
    return tuple(gone_block(dense, i, blocks[i].ops, i + 1, alpha) for i, alpha in pairs)


def _alike(blocks: Sequence[Block]) -> list[bool]:
    """Of each pair of neighbours."""
    return [one.form == other.form for one, other in itertools.pairwise(blocks)]


def _check_weights(graph: Graph, blocks: Sequence[Block]) -> None:
    names = [name for block in blocks for name in block.ops]
    if count := sum("quantised" in graph.op(name).attributes for name in names):
        raise NothingToSlimError(
            f"the weights of {count} linears are quantised, and such are not averaged: give the model before that, or "
            "use --merge-method drop-last or drop-least"
        )


def _merge(
    graph: Graph,
    gone: Sequence[int],
    alphas: Sequence[float],
    align: bool,
    turns: Sequence[torch.Tensor] | None,
    check: bool,
    step: Callable[[], None],
) -> None:
    """From the back forward, so that of two blocks that are neighbours now the first is still the dense model's."""
    for i, alpha in zip(gone, alphas, strict=True):
        first, second = find_blocks(graph)[i : i + 2]
        if align:
            align_blocks(graph, first, second, None if turns is None else turns[i], check=check)
        MergeLayers(first, second, alpha)(graph, check=check)
        step()


def _turn(before: torch.Tensor, behind: torch.Tensor) -> torch.Tensor:
    """(d, d): the rotation that takes the stream before a block to the one behind it, of too few tokens nearly none."""
    one, other = (rows / rows.norm(dim=1, keepdim=True) for rows in (before, behind))
    near = one.T @ other
    return rotation_between(near + LEAN * near.diagonal().abs().mean() * torch.eye(len(near)).to(near))


def _told(dense: Graph, slim: Graph, gone: Sequence[int], alphas: Sequence[float], method: str) -> tuple[str, ...]:
    before, after = (count_cost(graph, 1).block_linear_weights for graph in (dense, slim))
    share = f", {1 - after / before:.1%} of the block weights" if before else ""  # all may be quantised
    told = ", ".join(
        f"{i}" if not alphas else f"{i} (merged into {i + 1}, of which it is {alpha:.0%})"
        for i, alpha in sorted(itertools.zip_longest(gone, alphas, fillvalue=0.0))
    )
    return (f"{method}: {counted(len(gone), 'block')} went{share}, counted from 0: {told}",)


def refit_graph(
    dense: AnyGraph,
    slim: AnyGraph,
    batches: Sequence[Inputs],
    progress: Progress,
    *,
    repair_steps: int = 0,
    repair_rate: float | None = None,
    pull: float = PULL,
    check: bool = False,
    seed: int = 0,
    device: str = "cpu",
) -> tuple[str, ...]:
    """Fit the readers of FFNs and values so that the stream behind each sublayer of ``slim`` is that of the ``dense``
    one of its name. The rest: see Sweep. Returns a note on what was fitted, or that nothing of the kind was found.
    """
    try:
        regions, _ = choose_regions(slim, find_regions(slim).regions, REFITTED)
    except NothingToSlimError as error:
        return (f"nothing was refitted: {error}",)

    def apply(region: Region, found: RegionMap) -> None:
        ends = mapped_ends(slim, region, found)
        apply_map(slim, region, found, check)
        check_folded(slim, region, ends)

    sweep = reader_sweep(
        dense,
        slim,
        batches,
        apply,
        repair_steps=repair_steps,
        repair_rate=repair_rate,
        pull=pull,
        seed=seed,
        device=device,
    )
    together = sublayers(regions)
    with progress.stage("refit", len(together)) as step:
        for part in together:
            sweep.slim_sublayer([(region, region.width) for region in part], lambda _: ())
            step()
    slim.refresh_shapes()
    refined = f" and refined for {repair_steps} steps each" if repair_steps else ""
    return (f"{counted(len(together), 'sublayer')} refitted{refined}",)
