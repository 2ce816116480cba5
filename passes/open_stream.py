"""Make a residual stream ready for a map that is not diagonal: gains folded or made linears, layer norms RMSNorms."""

from __future__ import annotations

from dotresize_fx.graph import Graph
from dotresize_fx.passes.centre_layer_norms import CentreLayerNorms
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.fold_norm_gains import FoldNormGains
from dotresize_fx.passes.open_branch_norms import OpenBranchNorms
from dotresize_fx.regions import Region


def open_stream(graph: Graph, region: Region, *, check: bool = True) -> tuple[Region, tuple[str, ...]]:
    """The region as it is afterwards (a tied head brings a linear of its own into it), and what was done.

    Exact: the graph computes what it did before.
    """
    records = OpenBranchNorms(region)(graph, check=check).records
    if records:
        region = _again(graph, region)
    records += FoldNormGains(region)(graph, check=check).records
    region = _again(graph, region)
    records += CentreLayerNorms(region)(graph, check=check).records
    return _again(graph, region), records


def _again(graph: Graph, region: Region) -> Region:
    """The same stream found anew: the one that this region's last reader, a norm's, still reads."""
    known = set(region.normed_readers)
    return next(r for r in find_regions(graph).of_kind(region.kind) if known & set(r.normed_readers))
