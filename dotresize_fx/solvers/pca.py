"""Principal components of a stream, as SliceGPT takes them (Ashkboos et al. 2024), in one basis for all layers."""

from __future__ import annotations

import torch

from dotresize_fx.errors import UsageError
from dotresize_fx.gram import RegionStatistics
from dotresize_fx.region_map import RegionMap
from dotresize_fx.regions import Region, Symmetry


def solve_pca(region: Region, statistics: RegionStatistics, width: int) -> RegionMap:
    """Keep the span of the ``width`` leading eigenvectors of the (uncentred) second moments.

    Raises:
        UsageError: the region does not admit rotations.
    """
    if region.symmetry is not Symmetry.ORTHOGONAL:
        raise UsageError(f"pca needs a region that admits rotations; {region.name} admits {region.symmetry}s only")
    vectors = torch.linalg.eigh(statistics.gram).eigenvectors.flip(1)[:, :width]
    return RegionMap(vectors, vectors.T)
