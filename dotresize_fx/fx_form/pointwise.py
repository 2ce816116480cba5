"""See a convolution of single pixels as a linear of their channels, and put it back."""

from __future__ import annotations

from typing import Any

import torch

from dotresize_fx.fx_form.axes import axes_form
from dotresize_fx.fx_form.channelwise import CONVOLUTIONS
from dotresize_fx.fx_form.edits import FxEdits

aten = torch.ops.aten
_DEFAULTS: tuple[Any, ...] = (None, [1], [0], [1], 1)
_PLAIN = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}


def recognise_pointwise(graph: FxEdits) -> list[str]:
    """See :meth:`dotresize_fx.graph.Graph.recognise_pointwise`."""
    found = [node for node in graph.nodes.nodes if node.target in CONVOLUTIONS and _is_pointwise(graph, node)]
    for view in graph.nodes.find_nodes(op="call_function", target=aten.view.default) if found else ():
        view.target = aten.reshape.default  # what was a view of the old memory may be none of the new
    return [_rewrite(graph, node) for node in found]


def _is_pointwise(graph: FxEdits, node: torch.fx.Node) -> bool:
    given: Any = (*node.args, *_DEFAULTS[len(node.args) - 2 :])
    source, weight, bias, stride, padding, _, groups = given[:7]
    stored = [one for one in (weight, bias) if one is not None]
    if node.kwargs or not all(isinstance(one, torch.fx.Node) and graph.value(one).is_parameter for one in stored):
        return False
    if len(weight.users) > 1:  # one kernel of several convolutions stays one
        return False
    places = CONVOLUTIONS[node.target]
    single = set(weight.meta["val"].shape[2:]) == {1} and source.meta["val"].ndim == places + 2
    return single and set(stride) == {1} and (isinstance(padding, str) or set(padding) == {0}) and groups == 1


def _rewrite(graph: FxEdits, node: torch.fx.Node) -> str:
    arguments: Any = node.args
    source, weight, *rest = arguments
    value = graph.value(weight)
    name = graph.parameter_name(value)
    graph.set_parameter(value, graph.parameter(value).flatten(1))
    stored = graph.node(value.name)
    behind, before = _orders(CONVOLUTIONS[node.target])
    image = source.meta["val"]
    with graph.nodes.inserting_before(node):
        rows = graph.nodes.call_function(aten.permute.default, (source, behind))
        new = graph.nodes.call_function(aten.linear.default, (rows, stored, rest[0] if rest else None))
        back = graph.nodes.call_function(aten.permute.default, (new, before))
    rows.meta["val"] = image.permute(behind)
    new.meta["val"] = node.meta["val"].permute(behind)
    graph.replace(node, back)
    return f"{name}: a convolution of single pixels seen as a linear"


def restore_pointwise(graph: FxEdits) -> None:
    """Make convolutions again of what :func:`recognise_pointwise` rewrote, whatever widths they have by now."""
    for node in graph.nodes.find_nodes(op="call_function", target=aten.linear.default):
        arguments: Any = node.args
        rows, weight, *rest = arguments
        places = node.meta["val"].ndim - 2
        if places not in _PLAIN or len(node.users) != 1 or len(weight.users) != 1:
            continue
        if not graph.value(weight).is_parameter:
            continue
        (back,) = node.users
        behind, before = (tuple(order) for order in _orders(places))
        if axes_form(rows).get("order") != behind or axes_form(back).get("order") != before:
            continue
        matrix = graph.parameter(graph.value(weight))
        graph.set_parameter(graph.value(weight), matrix.reshape(*matrix.shape, *[1] * places))
        weight = graph.node(weight.name)
        with graph.nodes.inserting_before(back):
            new = graph.nodes.call_function(_PLAIN[places], (rows.args[0], weight, rest[0] if rest else None))
        graph.replace(back, new)
    graph.remove_dead()


def _orders(places: int) -> tuple[list[int], list[int]]:
    """Of axes: what puts channels last, and what puts them back."""
    axes = range(2, places + 2)
    return [0, *axes, 1], [0, places + 1, *range(1, places + 1)]
