"""The rewrites that every captured graph goes through before regions are looked for. All are exact."""

from __future__ import annotations

from dotresize_fx.graph import Graph
from dotresize_fx.passes.distribute_slices import DistributeSlices
from dotresize_fx.passes.drop_no_ops import DropNoOps
from dotresize_fx.passes.fold_channel_scales import FoldChannelScales
from dotresize_fx.passes.fold_constants import FoldConstants
from dotresize_fx.passes.join_expert_lists import JoinExpertLists
from dotresize_fx.passes.normalise_views import NormaliseViews
from dotresize_fx.passes.pass_base import PassResult
from dotresize_fx.passes.recognise_linears import RecogniseLinears
from dotresize_fx.passes.recognise_norms import RecogniseNorms
from dotresize_fx.passes.recognise_patches import RecognisePatches
from dotresize_fx.passes.recognise_pointwise import RecognisePointwise
from dotresize_fx.passes.split_packed_heads import SplitPackedHeads
from dotresize_fx.passes.split_packed_linears import SplitPackedLinears


def canonicalise(graph: Graph, *, check: bool = True, norms: bool = True) -> PassResult:
    """No-ops gone, what parameters alone decide computed, linears and norms each one op, packed linears one a part.

    Without ``norms`` these stay spelled as they are.
    """
    passes = (
        DropNoOps(),
        FoldConstants(),
        NormaliseViews(),
        RecogniseLinears(),
        RecognisePatches(),
        RecognisePointwise(),
        JoinExpertLists(),
        FoldChannelScales(),
        DistributeSlices(),
        SplitPackedLinears(),
        SplitPackedHeads(),
        RecogniseNorms(),
    )
    steps = passes if norms else passes[:-1]
    return PassResult(tuple(record for step in steps for record in step(graph, check=check).records))
