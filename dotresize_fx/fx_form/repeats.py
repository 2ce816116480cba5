"""Calls that compute again what another computed: each block of a model may make its own mask from the same inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def repeated(nodes: Sequence[torch.fx.Node]) -> tuple[dict[torch.fx.Node, torch.fx.Node], set[torch.fx.Node]]:
    """Of calls in their order: which one each repeats; and of those that repeat one, which no other call reads.

    ``nodes`` do not depend on chance.
    """
    first: dict[tuple[object, str], torch.fx.Node] = {}
    same: dict[torch.fx.Node, torch.fx.Node] = {}
    for node in nodes:
        arguments = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: same.get(n, n))
        key = node.target, str(arguments)
        if key in first:
            same[node] = first[key]
        else:
            first[key] = node
    unread = set[torch.fx.Node]()
    for node in reversed(nodes):
        if node in same and all(user in same for user in node.users):
            unread.add(node)
    return same, unread
