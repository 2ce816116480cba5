"""What can be saved at what loss: frontiers of cuts that go together or rule each other out, and the choice of cuts.

A frontier is the lower convex hull of (saved, loss), from no cut at all. Cuts that go together add up, segment by
segment in the order of loss per cost (Fox 1966, "Discrete optimization via marginal analysis"); of cuts that rule each
other out the hull of all is left, whose corners are each of one of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

# (one of METHODS, a region's, an op's or a block's name)
Cut = tuple[str, str]
METHODS = WIDTH, RANK, DEPTH = "width", "rank", "depth"


@dataclass(frozen=True)
class Point:
    """``saved`` of the cost at a ``loss``, by cuts of these ``sizes``: what is left, by what is cut and its name."""

    saved: float
    loss: float
    sizes: Mapping[Cut, int] = field(default_factory=dict)


Frontier = Sequence[Point]
NOTHING = Point(0.0, 0.0)


def hull(points: Iterable[Point]) -> Frontier:
    """The frontier of single points of which one is chosen; a point that saves nothing, or no more at no less, goes."""
    left = sorted((point for point in points if point.saved > 0), key=lambda point: (point.saved, point.loss))
    found = [NOTHING]
    while left:
        at = found[-1]
        best = min(left, key=lambda point: ((point.loss - at.loss) / (point.saved - at.saved), -point.saved))
        found.append(best)
        left = [point for point in left if point.saved > best.saved]
    return found


def either(*frontiers: Frontier) -> Frontier:
    """Of frontiers that rule each other out."""
    return hull(point for frontier in frontiers for point in frontier)


def together(*frontiers: Frontier) -> Frontier:
    """Of frontiers whose cuts add up."""
    segments = _in_order(frontiers)
    return [NOTHING, *(_sum(segments[: i + 1]) for i in range(len(segments)))]


def scaled(frontier: Frontier, factor: float) -> Frontier:
    """With every loss times ``factor``."""
    return [Point(point.saved, point.loss * factor, point.sizes) for point in frontier]


def choose(frontiers: Sequence[Frontier], wanted: float) -> Point | None:
    """The least loss found that saves ``wanted``, one point of each frontier added up; None where all save too little.

    Segments are taken in the order of loss per cost. One that saves more than is wanted by then is an end: it is taken
    there, with what it makes superfluous given back; and left out, to go on with finer ones. The best end is chosen.
    """
    if wanted <= 0:
        return NOTHING
    best: Point | None = None
    taken: list[_Segment] = []
    closed: set[int] = set()
    saved = 0.0
    for part in _in_order(frontiers):
        if part.frontier in closed:
            continue
        if saved + part.saved < wanted - 1e-9 * max(wanted, 1.0):
            taken.append(part)
            saved += part.saved
            continue
        end = _without_surplus([*taken, part], wanted)
        if best is None or end.loss < best.loss:
            best = end
        closed.add(part.frontier)
    return best


@dataclass(frozen=True)
class _Segment:
    frontier: int
    saved: float
    loss: float
    end: Point


def _in_order(frontiers: Sequence[Frontier]) -> list[_Segment]:
    """All segments by loss per cost; those of one frontier keep their order."""
    segments = [
        _Segment(i, b.saved - a.saved, b.loss - a.loss, b)
        for i, frontier in enumerate(frontiers)
        for a, b in pairwise(frontier)
    ]
    return sorted(segments, key=lambda part: (part.loss / part.saved, part.frontier))


def _without_surplus(taken: Sequence[_Segment], wanted: float) -> Point:
    """The segments but for the dearest that are not needed; of each frontier the last ones go first."""
    surplus = sum(part.saved for part in taken) - wanted
    kept: list[_Segment] = []
    blocked: set[int] = set()
    for part in reversed(taken[:-1]):
        if part.saved <= surplus and part.frontier not in blocked | {taken[-1].frontier}:
            surplus -= part.saved
        else:
            kept.append(part)
            blocked.add(part.frontier)
    return _sum([*reversed(kept), taken[-1]])


def _sum(segments: Sequence[_Segment]) -> Point:
    """What the segments lead to, of each frontier from its start on."""
    ends = {part.frontier: part.end for part in segments}
    sizes = {cut: size for end in ends.values() for cut, size in end.sizes.items()}
    return Point(sum(end.saved for end in ends.values()), sum(end.loss for end in ends.values()), sizes)
