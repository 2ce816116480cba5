"""The ratio-0 proof: at full width a map only changes the basis, so inserting and folding one must change nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dotresize_fx.graph import Graph
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.fold_linears import FoldLinears
from dotresize_fx.passes.insert_maps import InsertMaps
from dotresize_fx.passes.open_stream import open_stream
from dotresize_fx.region_map import RegionMap
from dotresize_fx.regions import Region, RegionKind, Symmetry

# Largest difference over largest output, float32; and what a map that the symmetry does not admit must reach.
BOUND = 1e-5
BROKEN = 100 * BOUND

Draw = Callable[[Region, torch.Generator], RegionMap]


@torch.no_grad()
def redraw_parameters(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Draw every parameter anew in place: default initialisation hides a forgotten gain or bias.

    Gains (weights of one dimension) from 0.5 to 1.5, biases normal with deviation 0.3, matrices normal with
    deviation 1/sqrt(columns), so that no part of the model is too small to be noticed.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(0, 0.3, generator=generator)
        elif parameter.ndim == 1:
            parameter.uniform_(0.5, 1.5, generator=generator)
        else:
            parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
    return module


def map_regions(graph: Graph, kinds: tuple[str, ...], draw: Draw, seed: int = 0) -> int:
    """Insert and fold a map of full width into every region of these kinds; returns how many there were.

    A stream that rotations pass is opened first: its gains folded, its layer norms turned into RMSNorms. Regions of
    attention overlap, which is no matter at full width.
    """
    generator = torch.Generator().manual_seed(seed)
    for _ in range(2 if RegionKind.RESIDUAL in kinds else 0):  # behind a sandwich norm that was opened lies another
        streams = find_regions(graph).of_kind(RegionKind.RESIDUAL)
        for region in (one for one in streams if one.symmetry is Symmetry.ORTHOGONAL):
            open_stream(graph, region, check=True)
    regions = list(find_regions(graph).of_kind(*kinds))
    for region in regions:
        insert = InsertMaps(region, draw(region, generator))
        insert(graph)
        FoldLinears(insert.downs, insert.ups)(graph)
    return len(regions)
