"""See a convolution that cuts an image into patches as a linear of each patch's pixels."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from dotresize_fx.fx_form.axes import axes_form
from dotresize_fx.fx_form.edits import FxEdits

aten = torch.ops.aten


class _Grid(NamedTuple):
    """The sizes that a convolution's input falls into: rows and columns of patches, (height, width) of each."""

    channels: int
    rows: int
    height: int
    columns: int
    width: int


def recognise_patches(graph: FxEdits) -> list[str]:
    """See :meth:`dotresize_fx.graph.Graph.recognise_patches`."""
    records = []
    for node in [node for node in graph.nodes.nodes if node.target in (aten.conv2d.default, aten.conv2d.padding)]:
        grid, last = _grid(graph, node), _channels_last(node)
        if grid is not None and last is not None:
            records.append(_rewrite(graph, node, grid, last))
    return records


def _grid(graph: FxEdits, node: torch.fx.Node) -> _Grid | None:
    """The patches; None where they overlap, leave pixels out, or are not of one weight that is stored."""
    source, weight, bias, stride, padding, dilation, groups = (*node.args, *_DEFAULTS[len(node.args) - 2 :])[:7]
    if node.kwargs or not all(one is None or _is_stored(graph, one) for one in (weight, bias)):
        return None
    channels, kernel = weight.meta["val"].shape[1], list(weight.meta["val"].shape[2:])
    size = source.meta["val"].shape[2:]
    plain = (
        list(stride) == kernel and (padding == "valid" or set(padding) == {0}) and set(dilation) == {1} and groups == 1
    )
    if not plain or not all(isinstance(one, int) for one in size) or source.meta["val"].ndim != 4:
        return None
    if any(one % step for one, step in zip(size, kernel, strict=True)):
        return None
    return _Grid(channels, size[0] // kernel[0], kernel[0], size[1] // kernel[1], kernel[1])


_DEFAULTS: tuple[Any, ...] = (None, [1, 1], [0, 0], [1, 1], 1)


def _is_stored(graph: FxEdits, value: Any) -> bool:
    return isinstance(value, torch.fx.Node) and graph.value(value).is_parameter


def _channels_last(node: torch.fx.Node) -> torch.fx.Node | None:
    """The op that brings the channels to the end, alone or behind one that joins rows and columns."""
    shape = node.meta["val"].shape
    (user, *others) = node.users
    if others:
        return None
    if axes_form(user).get("order") == (0, 2, 3, 1):
        return user
    joined = user.meta["val"]
    if not isinstance(joined, torch.Tensor) or tuple(joined.shape) != (*shape[:2], shape[2] * shape[3]):
        return None
    (last, *others) = user.users
    return last if not others and axes_form(last).get("order") == (0, 2, 1) else None


def _rewrite(graph: FxEdits, node: torch.fx.Node, grid: _Grid, last: torch.fx.Node) -> str:
    source, weight, *rest = node.args
    value = graph.value(weight)  # type: ignore[arg-type]
    name, matrix = graph.parameter_name(value), graph.parameter(value).flatten(1)
    if len(graph.node(value.name).users) == 1:
        graph.set_parameter(value, matrix)
        stored = graph.node(value.name)
    else:
        stored = graph.add_parameter(name, matrix)
    places = [grid.rows, grid.columns] if last.meta["val"].ndim == 4 else [grid.rows * grid.columns]
    with graph.nodes.inserting_before(last):
        cut = graph.nodes.call_function(aten.reshape.default, (source, [-1, *grid]))
        ordered = graph.nodes.call_function(aten.permute.default, (cut, [0, 2, 4, 1, 3, 5]))
        pixels = matrix.shape[1]
        rows = graph.nodes.call_function(aten.reshape.default, (ordered, [-1, *places, pixels]))
        new = graph.nodes.call_function(aten.linear.default, (rows, stored, rest[0] if rest else None))
    image = source.meta["val"]  # type: ignore[union-attr]
    cut.meta["val"] = image.new_empty((image.shape[0], *grid))
    ordered.meta["val"] = cut.meta["val"].permute(0, 2, 4, 1, 3, 5)
    rows.meta["val"] = image.new_empty((image.shape[0], *places, pixels))
    graph.replace(last, new)
    return f"{name}: a convolution of patches seen as a linear"
