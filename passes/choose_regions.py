"""Which of the regions found can be cut, and in which order: sublayer by sublayer, as the sweep walks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from dotresize_fx.cost import block_linears
from dotresize_fx.errors import NothingToSlimError
from dotresize_fx.graph import Graph, Kind
from dotresize_fx.passes.centre_layer_norms import why_not_centred
from dotresize_fx.passes.close_dimension import NORMS, is_entry_norm
from dotresize_fx.passes.fold_norm_gains import why_no_bias_folds
from dotresize_fx.regions import ATTENTION_KINDS, Region, RegionKind, Symmetry, counted

# What the sweep takes, in its order within a sublayer. Scores first: what the values' reader is refitted to then
# comes of the cut scores.
SWEPT = (RegionKind.HEADS, RegionKind.QUERY_KEY, RegionKind.VALUE, RegionKind.EXPERTS, RegionKind.FFN)

# What reads these is fitted anew at the full width where the stream in front of them has changed.
REFITTED = (RegionKind.VALUE, RegionKind.FFN)


def choose_regions(
    graph: Graph, found: Sequence[Region], kinds: Sequence[RegionKind]
) -> tuple[list[Region], tuple[str, ...]]:
    """The regions of these kinds that the sweep can take, in its order, and what was left alone for what reason.

    Regions of one target make a sublayer, and stand together.

    Raises:
        NothingToSlimError: there are such regions, and none of them can be cut.
    """
    asked = [region for region in found if region.kind in kinds]
    reasons = {region.name: why_not_cut(graph, region) for region in asked}
    if asked and all(reasons.values()):
        why = "; ".join(sorted(set(reasons.values())))
        words = " and ".join(
            sorted({region.kind.upper() if region.kind is RegionKind.FFN else region.kind for region in asked})
        )
        raise NothingToSlimError(f"none of the {len(asked)} {words} widths found can be cut: {why}")
    sublayers: dict[str, list[Region]] = {}
    for region in (region for region in asked if not reasons[region.name]):
        sublayers.setdefault(region.target, []).append(region)
    chosen: list[Region] = []
    left = left_alone(reason for reason in reasons.values() if reason)
    reached = -1
    for target in sorted(sublayers, key=lambda name: graph.positions[name]):
        regions = sorted(sublayers[target], key=lambda r: (SWEPT.index(r.kind), graph.positions[r.writers[0]]))
        if min(graph.positions[name] for region in regions for name in region.writers) > reached:
            chosen += regions
            reached = graph.positions[target]
        else:
            left += [f"{r.name}: left alone, it runs beside {chosen[-1].name} and adds to a later sum" for r in regions]
    return chosen, tuple(left)


def left_alone(reasons: Iterable[str]) -> list[str]:
    """One sentence a reason: how many widths it kept from being cut."""
    return [f"{counted(count, 'width')} left alone: {reason}" for reason, count in Counter(reasons).items()]


def sublayers(regions: Sequence[Region]) -> list[list[Region]]:
    """The chosen regions, those of one target together."""
    groups: dict[str, list[Region]] = {}
    for region in regions:
        groups.setdefault(region.target, []).append(region)
    return list(groups.values())


def why_not_cut(graph: Graph, region: Region) -> str:
    """Why a matched region is left alone all the same; empty when it can be cut."""
    if region.kind is RegionKind.PLAIN:
        return "nothing but linear ops between: cutting its rank is not supported yet"
    if region.kind is RegionKind.RESIDUAL and region.symmetry is Symmetry.PERMUTATION:
        return f"{region.limit}: leaving channels out is not supported there yet"
    if region.kind is RegionKind.RESIDUAL:
        return _why_not_opened(graph, region)
    if region.norms:
        return "a norm acts on it, whose mean square would change"
    if _is_averaged(graph, region):
        return "a mean or deviation is taken over it, which would change"
    ops = [graph.op(name) for name in (*region.writers, *region.readers)]
    if region.kind is RegionKind.EXPERTS:  # their biases are looked up: no linears
        ops = [op for op in ops if op.is_linear]
    if any(len(graph.users(op.weight)) > 1 for op in ops if op.weight is not None):
        return "its weights are shared by several layers, which is not supported yet"
    blocks = {op.name for op in block_linears(graph)}
    if not {op.name for op in ops} <= blocks:
        return "it is not part of a block"
    if region.kind is RegionKind.FFN and any(op.kind is Kind.EXPERTS for op in ops):
        return "experts share it with a linear of all tokens, or their rows with each other"
    if region.kind in ATTENTION_KINDS:
        return _why_no_head_goes(graph, region)
    if any(graph.op(name).attributes.get("reshape") for name in region.crossed):
        return "a reshape that names its width stands inside, which is not supported yet"
    return "" if len(region.readers) == 1 else f"it has {len(region.readers)} readers, one is supported yet"


def _is_averaged(graph: Graph, region: Region) -> bool:
    between = (graph.op(name).output for name in (*region.writers, *region.crossed) if not region.attention)
    places = dict(region.places)
    return any(user.sums_width for value in between if value.name not in places for user in graph.users(value))


def _why_no_head_goes(graph: Graph, region: Region) -> str:
    if region.kind is RegionKind.QUERY_KEY and len({graph.op(name).inputs[0] for name in region.writers}) > 1:
        return "queries and keys are made of different values (cross attention), which is not supported yet"
    if region.layout is not None and not graph.caches.keys() >= set(region.layout.cache):
        return "the cache that the graph puts out would change its size"
    axis = 1 if region.kind is RegionKind.HEADS else 3
    if region.layout is not None and any(
        graph.input_sizes(graph.caches[name])[axis] != region.width for name in region.layout.cache
    ):
        return "its cache keeps heads repeated, one a query head, which is not supported yet"
    return ""


def _why_not_opened(graph: Graph, region: Region) -> str:
    """Why a stream's layer norms cannot become RMSNorms; empty when they can, or when there are none."""
    writing = [graph.op(name) for name in region.writers if graph.op(name).kind in NORMS]
    branches = sum(not is_entry_norm(graph, op) for op in writing)
    if branches:
        return f"{branches} norms write it (sandwich norms): each would need an adapter of its full width"
    return why_no_bias_folds(graph, region) or why_not_centred(graph, region)
