"""Where the time goes that a cut in MACs did not save."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from dotresize_fx.export.node_profile import ProfiledNode
from dotresize_fx.export.node_regions import layer, original_name, role
from dotresize_fx.report.bench_contents import Loss

Profile = Sequence[ProfiledNode]


def latency_losses(
    before: tuple[Profile, Profile, Mapping[str, str]], after: tuple[Profile, Profile, Mapping[str, str]]
) -> dict[str, tuple[Loss, ...]]:
    """By "op", "region" and "layer", the groups of nodes, those that ate most first.

    Each side: its nodes as the session ran them (their times), as the file has them (their MACs), and by name the
    module of each of the file's nodes. What a group has eaten is its time beyond what it took before times the ratio of
    all MACs, so that all groups together have eaten what the whole run took beyond that ratio.
    """
    total = [sum(node.macs or 0 for node in plain) for _, plain, _ in (before, after)]
    ratio = total[1] / total[0] if total[0] else 1.0
    found = {}
    for grouping, label in _GROUPINGS.items():
        sides = [_grouped(side, label) for side in (before, after)]
        losses = []
        for name in dict.fromkeys((*sides[0], *sides[1])):
            (seconds, macs), (later, left) = (side.get(name, (0.0, 0)) for side in sides)
            losses.append(
                Loss(
                    label=name,
                    before=seconds,
                    after=later,
                    before_macs=macs,
                    after_macs=left,
                    eaten=later - ratio * seconds,
                )
            )
        found[grouping] = tuple(sorted(losses, key=lambda loss: -loss.eaten))
    return found


# A group's label, of a node as it ran and the module it came from.
_GROUPINGS: dict[str, Callable[[ProfiledNode, str], str]] = {
    "op": lambda node, module: node.op,
    "region": lambda node, module: role(module),
    "layer": lambda node, module: layer(module),
}


def _grouped(
    side: tuple[Profile, Profile, Mapping[str, str]], label: Callable[[ProfiledNode, str], str]
) -> dict[str, tuple[float, int]]:
    ran, plain, modules = side
    macs = {node.name: node.macs or 0 for node in plain}
    seconds: dict[str, float] = defaultdict(float)
    counted: dict[str, int] = defaultdict(int)
    for node in ran:
        name = original_name(node.name, macs)
        group = label(node, modules.get(name, ""))
        seconds[group] += node.seconds
        counted[group] += macs.get(name, 0)
    return {group: (seconds[group], counted[group]) for group in seconds}
