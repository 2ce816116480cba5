"""The baseline: keep the neurons of the largest activation norm, drop the rows of the others, refit nothing."""

from __future__ import annotations

import torch

from dotresize_fx.gram import RegionStatistics
from dotresize_fx.region_map import RegionMap, selection
from dotresize_fx.regions import Region


def solve_magnitude(region: Region, statistics: RegionStatistics, width: int) -> RegionMap:
    """Select the ``width`` neurons (or channels of a stream) whose activations have the largest norm."""
    down = selection(top(statistics.activation_norm, width), region.width)
    return RegionMap(down, down.T)


def top(score: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the ``count`` largest scores, ascending; ties go to the lower index."""
    order = torch.argsort(score, descending=True, stable=True)
    return order[:count].sort().values
