"""Calls that compute again what another computed: each block of a model may make its own mask from the same inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dotresize_fx.fx_form.edits import is_impure


def repeated(nodes: Sequence[torch.fx.Node]) -> dict[torch.fx.Node, torch.fx.Node]:
    """Which one each call repeats, of calls of one graph in their order.

    None where anything in the graph writes into a tensor: that may be one of two that were alike before.
    """
    if not nodes or any(is_impure(node) for node in nodes[0].graph.nodes if node.op == "call_function"):
        return {}
    first: dict[tuple[object, str], torch.fx.Node] = {}
    same: dict[torch.fx.Node, torch.fx.Node] = {}
    for node in nodes:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            continue
        arguments = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: same.get(n, n))
        one = first.setdefault((node.target, str(arguments)), node)
        if one is not node:
            same[node] = one
    return same
