"""What an ONNX node does to the axes of its input: the attributes that :class:`dotresize_fx.graph.Op` documents."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import onnx_ir as ir

from dotresize_fx.onnx_form.axes import axes
from dotresize_fx.onnx_form.constants import constant, integers
from dotresize_fx.onnx_form.linears import attribute
from dotresize_fx.onnx_form.shape_rules import slices, split_sizes
from dotresize_fx.onnx_form.sizes import sizes_of


def axes_form(node: ir.Node, index: int = 0) -> dict[str, Any]:
    """``form`` of the output at ``index`` and what goes with it; empty for an op that moves no axes.

    A part of a Split is a slice of what is split; a Squeeze is a view, and so is a Flatten.
    """
    known = node.domain == "" and node.inputs and sizes_of(node.inputs[0]) is not None
    if not known or sizes_of(node.outputs[index]) is None:
        return {}
    if node.op_type == "Split":
        return _part(node, index)
    read = _READERS.get(node.op_type)
    return {} if read is None else read(node)


def _rank(value: ir.Value | None) -> int:
    return len(sizes_of(value) or ())


def _permute(node: ir.Node) -> dict[str, Any]:
    order, rank = node.attributes.get("perm"), _rank(node.inputs[0])
    return {"form": "permute", "order": tuple(order.as_ints()) if order is not None else tuple(range(rank))[::-1]}


def stated_sizes(value: ir.Value | None) -> list[int | None] | None:
    """The sizes in a Reshape's or Expand's target, None for each that is computed; None where their count is not known.

    They stand in a constant, or in constants that a Concat joins with what is computed.
    """
    stated = integers(value)
    if stated is not None:
        return list(stated)
    concat = value.producer() if value is not None else None
    if concat is None or concat.op_type != "Concat" or concat.domain != "":
        count = sizes_of(value)
        return [None] * int(count[0]) if count and isinstance(count[0], int) else None
    found: list[int | None] = []
    for part in concat.inputs:
        known, length = integers(part), sizes_of(part)
        if known is None and (not length or not isinstance(length[0], int)):
            return None
        found += known if known is not None else [None] * int(length[0])  # type: ignore[index]
    return found


def _sized(form: str) -> Callable[[ir.Node], dict[str, Any]]:
    def read(node: ir.Node) -> dict[str, Any]:
        stated = stated_sizes(node.inputs[1])
        if stated is None or len(stated) > _rank(node.outputs[0]):
            return {}
        # An Expand may state fewer sizes than its input has axes; its 1 is the input's size there, as is a Reshape's 0.
        shape = sizes_of(node.outputs[0]) or ()
        known = zip(shape[len(shape) - len(stated) :], stated, strict=True)
        if any(size is None and isinstance(actual, int) for actual, size in known):
            return {}  # it is computed, and nobody knows what from
        of_input = 1 if form == "expand" else 0
        sizes = [None] * (len(shape) - len(stated)) + [None if size == of_input else size for size in stated]
        return {"form": form, "sizes": tuple(sizes)}

    return read


def _view(node: ir.Node) -> dict[str, Any]:
    return {"form": "view", "sizes": (None,) * _rank(node.outputs[0])}


def _unsqueeze(node: ir.Node) -> dict[str, Any]:
    chosen = axes(node)
    if chosen is None or len(chosen) != 1:
        return _view(node)
    return {"form": "unsqueeze", "axis": chosen[0] % _rank(node.outputs[0])}


def _concat(node: ir.Node) -> dict[str, Any]:
    return {"form": "concat", "axis": int(attribute(node, "axis", 0)) % _rank(node.outputs[0])}


def _slice(node: ir.Node) -> dict[str, Any]:
    taken = slices(node)
    if taken is None or len(taken) != 1:
        return {}
    ((axis, (start, stop, step)),) = taken.items()
    if step > 1 and stop is None and start >= 0:
        return {"form": "strided", "axis": axis, "start": start, "step": step}
    return {"form": "slice", "axis": axis, "start": start, "stop": stop} if step == 1 else {}


def _part(node: ir.Node, index: int) -> dict[str, Any]:
    sizes = split_sizes(node)
    if sizes is None or len(sizes) != len(node.outputs):
        return {}
    stop = list(accumulate(sizes))[index]
    axis = int(attribute(node, "axis", 0)) % _rank(node.inputs[0])
    return {"form": "slice", "axis": axis, "start": stop - sizes[index], "stop": stop}


def _choice(node: ir.Node) -> dict[str, Any]:
    places = integers(node.inputs[1])
    if places is None or len(places) != 1 or _rank(node.inputs[1]) != 0 or constant(node.inputs[0]) is not None:
        return {}
    return {"form": "choice", "axis": int(attribute(node, "axis", 0)) % _rank(node.inputs[0]), "index": places[0]}


def _where(node: ir.Node) -> dict[str, Any]:
    return {"form": "where"}


_READERS: dict[str, Callable[[ir.Node], dict[str, Any]]] = {
    "Transpose": _permute,
    "Reshape": _sized("view"),
    "Expand": _sized("expand"),
    "Flatten": _view,
    "Squeeze": _view,
    "Unsqueeze": _unsqueeze,
    "Concat": _concat,
    "Slice": _slice,
    "Gather": _choice,
    "Where": _where,
}
