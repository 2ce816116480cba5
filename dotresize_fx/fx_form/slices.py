"""Take the parts of a sum as sums of parts, so that each term's own linear can be seen as one a part."""

from __future__ import annotations

import operator
from itertools import accumulate
from typing import Any, NamedTuple

import torch

from dotresize_fx.fx_form.axes import axes_form
from dotresize_fx.fx_form.edits import FxEdits
from dotresize_fx.graph import Kind

aten = torch.ops.aten
_OPEN = 2**63 - 1
_SPLITS = {aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default}


class _Range(NamedTuple):
    """What of the last axis is taken: from ``start`` to ``stop`` (exclusive), each ``step``-th."""

    start: int
    stop: int
    step: int


def distribute_slices(graph: FxEdits) -> list[str]:
    """See :meth:`dotresize_fx.graph.Graph.distribute_slices`."""
    changed = []
    for node in [node for node in graph.nodes.nodes if node.target is aten.add.Tensor]:
        takers = _takers(node)
        terms = node.args if not node.kwargs and len(node.args) == 2 else ()
        if (
            len(takers) < 2
            or not any(_writes(graph, term) for term in terms)
            or not all(_is_wide(node, t) for t in terms)
        ):
            continue
        for taker, part in takers.items():
            with graph.nodes.inserting_before(taker):
                parts = [_part_of(graph, term, part) for term in terms]
                new = graph.nodes.call_function(aten.add.Tensor, tuple(parts))
            graph.replace(taker, new)
        changed.append(f"{node.name}: taken apart before it is summed")
    return changed


def _takers(node: torch.fx.Node) -> dict[torch.fx.Node, _Range]:
    """The nodes that take parts of this value's last axis; empty if anything else reads it."""
    if not node.meta["val"].shape:  # a number
        return {}
    width, found = node.meta["val"].shape[-1], {}
    for user in node.users:
        if user.target in _SPLITS and (form := axes_form(user))["axis"] == node.meta["val"].ndim - 1:
            ends = list(accumulate(form["sizes"]))
            for part in user.users:
                if part.target is not operator.getitem:
                    return {}
                index: Any = part.args[1]
                found[part] = _Range(ends[index] - form["sizes"][index], ends[index], 1)
            continue
        form = axes_form(user)
        if form.get("form") not in ("slice", "strided") or form["axis"] != node.meta["val"].ndim - 1:
            return {}
        start, stop, _ = slice(form["start"], form.get("stop")).indices(width)
        found[user] = _Range(start, stop, form.get("step", 1))
    return found


def _writes(graph: FxEdits, term: Any) -> bool:
    return isinstance(term, torch.fx.Node) and term.op == "call_function" and graph.op(term.name).is_linear


def _is_wide(node: torch.fx.Node, term: Any) -> bool:
    """Whether a term has the sum's last axis, and is not broadcast along it."""
    return isinstance(term, torch.fx.Node) and term.meta["val"].shape[-1:] == node.meta["val"].shape[-1:]


def _part_of(graph: FxEdits, term: Any, part: _Range) -> torch.fx.Node:
    """The term's part: a slice of it, or a lookup in a part of its table."""
    if term.op == "call_function" and (op := graph.op(term.name)).kind is Kind.EMBEDDING:
        table = graph.weight(op)[:, part.start : part.stop : part.step]
        assert op.weight is not None
        stored = graph.add_parameter(f"{graph.parameter_name(op.weight)}_{part.start}", table.clone())
        new = graph.nodes.call_function(term.target, (stored, *term.args[1:]), term.kwargs)
    else:
        axis = term.meta["val"].ndim - 1
        stop = _OPEN if part.step > 1 else part.stop
        new = graph.nodes.call_function(aten.slice.Tensor, (term, axis, part.start, stop, part.step))
    shape = (*term.meta["val"].shape[:-1], len(range(*part)))
    new.meta["val"] = term.meta["val"].new_empty(shape)
    return new
