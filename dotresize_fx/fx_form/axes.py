"""What a torch.fx node does to the axes of its input: the attributes that :class:`dotresize_fx.graph.Op` documents."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch

aten = torch.ops.aten

_OPEN = 2**63 - 1  # how torch spells a slice's open end


def axes_form(node: torch.fx.Node) -> dict[str, Any]:
    """``form`` and what goes with it; empty for an op that moves no axes or is spelled in a way not taught here."""
    read = _READERS.get(node.target)
    return {} if read is None else read(node)


def _rank(node: Any) -> int:
    return len(node.meta["val"].shape)


def _argument(node: torch.fx.Node, position: int, keyword: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(keyword, default)


def _transpose(node: torch.fx.Node) -> dict[str, Any]:
    order = list(range(_rank(node)))
    first, second = (int(axis) % len(order) for axis in node.args[1:3])  # type: ignore[arg-type]
    order[first], order[second] = order[second], order[first]
    return {"form": "permute", "order": tuple(order)}


def _permute(node: torch.fx.Node) -> dict[str, Any]:
    axes: Any = node.args[1]
    return {"form": "permute", "order": tuple(axis % _rank(node) for axis in axes)}


def _sized(form: str) -> Callable[[torch.fx.Node], dict[str, Any]]:
    def read(node: torch.fx.Node) -> dict[str, Any]:
        stated: Any = node.args[1]
        return {"form": form, "sizes": tuple(size if isinstance(size, int) else None for size in stated)}

    return read


def _view_as(node: torch.fx.Node) -> dict[str, Any]:
    return {"form": "view", "sizes": (None,) * _rank(node), "view_as": True}


def _unbind(node: torch.fx.Node) -> dict[str, Any]:
    parts: Any = node.meta["val"]
    axis = _argument(node, 1, "dim", 0) % (len(parts[0].shape) + 1)
    return {"form": "unbind", "axis": axis, "sizes": (1,) * len(parts)}


def _unsqueeze(node: torch.fx.Node) -> dict[str, Any]:
    axis: Any = node.args[1]
    return {"form": "unsqueeze", "axis": axis % _rank(node)}


def _concat(node: torch.fx.Node) -> dict[str, Any]:
    return {"form": "concat", "axis": _argument(node, 1, "dim", 0) % _rank(node)}


def _slice(node: torch.fx.Node) -> dict[str, Any]:
    start, stop, step = (_argument(node, i + 2, name, None) for i, name in enumerate(("start", "end", "step")))
    start, step = start or 0, 1 if step is None else step
    if isinstance(step, int) and step > 1 and isinstance(start, int) and stop in (None, _OPEN):
        return {"form": "strided", "axis": _argument(node, 1, "dim", 0) % _rank(node), "start": start, "step": step}
    if step != 1 or not isinstance(start, int) or not (stop is None or isinstance(stop, int)):
        return {}
    axis = _argument(node, 1, "dim", 0) % _rank(node)
    return {"form": "slice", "axis": axis, "start": start, "stop": None if stop == _OPEN else stop}


def _split(node: torch.fx.Node) -> dict[str, Any]:
    parts: Any = node.meta["val"]
    axis = _argument(node, 2, "dim", 0) % len(parts[0].shape)
    return {"form": "split", "axis": axis, "sizes": tuple(part.shape[axis] for part in parts)}


def _choice(node: torch.fx.Node) -> dict[str, Any]:
    axis, index = node.args[1], node.args[2]
    if not isinstance(index, int):
        return {}
    return {"form": "choice", "axis": axis % (_rank(node) + 1), "index": index}  # type: ignore[operator]


def _part(node: torch.fx.Node) -> dict[str, Any]:
    return {"form": "part", "index": node.args[1]}


def _fill(position: int | None) -> Callable[[torch.fx.Node], dict[str, Any]]:
    def read(node: torch.fx.Node) -> dict[str, Any]:
        number = 0 if position is None else node.args[position]
        return {"form": "fill", "number": number} if isinstance(number, (int, float)) else {}

    return read


def _form(name: str) -> Callable[[torch.fx.Node], dict[str, Any]]:
    return lambda node: {"form": name}


_READERS: dict[Any, Callable[[torch.fx.Node], dict[str, Any]]] = {
    aten.transpose.int: _transpose,
    aten.permute.default: _permute,
    aten.view.default: _sized("view"),
    aten.reshape.default: _sized("view"),
    aten._unsafe_view.default: _sized("view"),
    aten.view_as.default: _view_as,
    aten.expand.default: _sized("expand"),
    aten.unsqueeze.default: _unsqueeze,
    aten.cat.default: _concat,
    aten.concatenate.default: _concat,
    aten.slice.Tensor: _slice,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.chunk.default: _split,
    aten.unbind.int: _unbind,
    operator.getitem: _part,
    aten.where.self: _form("where"),
    aten.select.int: _choice,
    aten.new_empty.default: _form("shaped like"),
    aten.new_zeros.default: _form("shaped like"),
    aten.zeros.default: _fill(None),
    aten.zeros_like.default: _fill(None),
    aten.full.default: _fill(1),
    aten.scalar_tensor.default: _fill(0),
    aten.sym_size.int: _form("size"),
}
