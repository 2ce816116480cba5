"""The width plan: how the share of weights to remove is split over the regions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import floor

from dotresize_fx.errors import NothingToSlimError, UsageError
from dotresize_fx.regions import Region

# Kernels like widths on a grid (a width off it ran 3.8 times slower than the dense one on a GPU); small regions
# take a finer grid, so that a ratio can still be met.
MULTIPLE = 16
STEPS_AT_LEAST = 8

NO_REGION = "no region matched, so nothing can be slimmed: `dotresize-fx inspect` says why"


def check_ratio(ratio: float) -> None:
    """Raises UsageError unless 0 <= ratio < 1."""
    if not 0 <= ratio < 1:
        raise UsageError(f"--ratio is {ratio}: it is a share of the block weights, at least 0 and below 1")


def grid(width: int, multiple: int = MULTIPLE) -> int:
    """The largest power-of-two divisor of ``multiple`` that leaves a region of this width enough steps."""
    while multiple > 1 and width < multiple * STEPS_AT_LEAST:
        multiple //= 2
    return multiple


def _too_much(ratio: float, held: float, most: float) -> str:
    return (
        f"--ratio {ratio} would make a region vanish: the chosen regions hold {held:.0%} of the block "
        f"weights and give up at most {floor(most * 100) / 100}; choose a lower ratio or more --regions"
    )


def plan_widths(
    regions: Sequence[Region],
    weights_per_unit: Mapping[str, int],
    total: int,
    ratio: float,
    *,
    multiple: int = MULTIPLE,
) -> dict[str, int]:
    """Region name -> width, cutting every region by the same share, so that ``ratio`` of ``total`` goes.

    weights_per_unit: weights that one unit of each region's width accounts for. total: all block linear weights.
    Widths are on the region's grid; the regions with most to lose by rounding are rounded so that the sum comes
    within one step of the ratio.

    Raises:
        NothingToSlimError: there is no region, or they hold too little for the ratio.
    """
    if not regions:
        raise NothingToSlimError(NO_REGION)
    held = sum(region.width * weights_per_unit[region.name] for region in regions)
    wanted = ratio * total
    if ratio == 0:
        return {region.name: region.width for region in regions}
    share = wanted / held
    steps = {region.name: grid(region.width, multiple) for region in regions}
    most = min(1 - steps[region.name] / region.width for region in regions)
    if share > most + 1e-9:
        raise NothingToSlimError(_too_much(ratio, held / total, most * held / total))
    ideal = {region.name: max(region.width * (1 - share), steps[region.name]) for region in regions}
    widths = {name: int(width // steps[name] * steps[name]) for name, width in ideal.items()}
    removed = sum((region.width - widths[region.name]) * weights_per_unit[region.name] for region in regions)
    for region in sorted(regions, key=lambda r: (widths[r.name] - ideal[r.name], r.name)):
        # A width that was never on the grid has no whole step above it: there the next one is the dense width.
        above = min(widths[region.name] + steps[region.name], region.width)
        gain = (above - widths[region.name]) * weights_per_unit[region.name]
        if removed - gain / 2 >= wanted:
            widths[region.name] = above
            removed -= gain
    return widths
