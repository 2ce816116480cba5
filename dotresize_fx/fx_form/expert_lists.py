"""See experts that a loop goes through one by one, each with its rows and its matrix, as one product of them all."""

from __future__ import annotations

from typing import Any

import torch

from dotresize_fx.fx_form.axes import axes_form
from dotresize_fx.fx_form.edits import FxEdits

aten = torch.ops.aten
_JOINS = {aten.cat.default, aten.concatenate.default}


def join_expert_lists(graph: FxEdits) -> list[str]:
    """See :meth:`dotresize_fx.graph.Graph.join_expert_lists`."""
    product: Any = getattr(torch.ops.transformers, "grouped_mm_fallback", None)  # where transformers registered it
    if product is None:
        return []
    changed: list[str] = []
    ends: dict[torch.fx.Node, torch.fx.Node] = {}
    for node in [node for node in graph.nodes.nodes if node.target in _JOINS]:
        found = _experts(graph, node)
        if found is None:
            continue
        rows, weight, counts = found
        if counts not in ends:
            with graph.nodes.inserting_after(counts):
                ends[counts] = graph.nodes.call_function(aten.cumsum.default, (counts, 0))
            ends[counts].meta["val"] = counts.meta["val"].to(torch.int64)
        with graph.nodes.inserting_before(node):
            turned = graph.nodes.call_function(aten.transpose.int, (weight, -2, -1))
            new = graph.nodes.call_function(product.default, (rows, turned, ends[counts]))
        turned.meta["val"] = weight.meta["val"].mT
        changed.append(f"{graph.parameter_name(graph.value(weight))}: experts seen as one product")
        graph.replace(node, new)
    return changed


def _experts(graph: FxEdits, node: torch.fx.Node) -> tuple[torch.fx.Node, torch.fx.Node, torch.fx.Node] | None:
    """The rows, the weight (experts, out, in) and how many rows each expert has, where ``node`` joins again what a
    linear of each made of its rows; None for anything else.
    """
    parts: Any = node.args[0]
    form = axes_form(node)
    if form.get("axis") != 0 or any(part.target is not aten.linear.default for part in parts):
        return None
    if any(part.kwargs or len(part.args) != 2 or len(part.users) != 1 for part in parts):
        return None  # with biases of their own, or read one by one too
    weights = _taken_in_order([part.args[1] for part in parts], "choice")
    split = _taken_in_order([part.args[0] for part in parts], "part")
    if weights is None or split is None or not graph.value(weights).is_parameter or weights.meta["val"].ndim != 3:
        return None
    if split.target is not aten.split_with_sizes.default or axes_form(split)["axis"] != 0:
        return None
    rows, sizes = split.args[:2]
    counts = _told_by(sizes)
    if counts is None or len(parts) != len(weights.meta["val"]) or rows.meta["val"].ndim != 2:  # type: ignore[union-attr]
        return None
    return rows, weights, counts  # type: ignore[return-value]


def _told_by(sizes: Any) -> torch.fx.Node | None:
    """The vector of whole numbers that a split's sizes are read from, one by one and all of them."""
    if not all(isinstance(size, torch.fx.Node) and size.target is aten.item.default for size in sizes):
        return None
    counts = _taken_in_order([size.args[0] for size in sizes], "part")
    if counts is not None and counts.target is aten.unbind.int:
        counts = counts.args[0]  # type: ignore[assignment]
    else:
        counts = _taken_in_order([size.args[0] for size in sizes], "choice")
    if counts is None or counts.meta["val"].ndim != 1 or len(counts.meta["val"]) != len(sizes):
        return None
    return None if counts.meta["val"].is_floating_point() else counts


def _taken_in_order(nodes: Any, form: str) -> torch.fx.Node | None:
    """What these nodes take the first, second, third of, and so on: ``form`` is "part", or "choice" along axis 0."""
    sources = set()
    for index, node in enumerate(nodes):
        found = axes_form(node) if isinstance(node, torch.fx.Node) else {}
        if found.get("form") != form or found.get("axis", 0) != 0 or found["index"] != index:
            return None
        sources.add(node.args[0])
    return sources.pop() if len(sources) == 1 else None
