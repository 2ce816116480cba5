"""Make an exported program shorter without changing a number, for what has to walk through all of it."""

from __future__ import annotations

import operator
from typing import Any

import torch

from dotresize_fx.fx_form.edits import FxEdits, has_effects

aten = torch.ops.aten
_COPIES = (aten.clone.default, aten.contiguous.default)
_BOTH = (aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default)
_ONES = (aten.new_ones.default, aten.ones.default)
_OPEN = 2**63 - 1  # how torch spells a slice's open end


def simplify(graph: FxEdits) -> int:
    """Drop copies, slices of everything, reshapes and expansions to the same shape, picks of all rows and columns in
    their order and conjunctions with all that is true, and compute once what is computed twice.

    Returns how many ops are gone. Shapes must be up to date. A program that writes to a tensor in place is left as it
    is. Views become reshapes, since what was a view of a copy may be none of the original.
    """
    nodes = graph.nodes
    if any(has_effects(node.target) for node in nodes.nodes):
        return 0
    before = len(nodes.nodes)
    for view in nodes.find_nodes(op="call_function", target=aten.view.default):
        view.target = aten.reshape.default
    ends = set(nodes.output_node().all_input_nodes)
    first: dict[tuple[Any, ...], torch.fx.Node] = {}
    for node in list(nodes.nodes):
        if node.op != "call_function" or node in ends:
            continue
        same = node.args[0] if _hands_on(node) else _other_than_true(node)
        if same is None and _is_pure(node.target):
            same = first.setdefault((node.target, repr(node.args), repr(node.kwargs)), node)
        if isinstance(same, torch.fx.Node) and same is not node:
            node.replace_all_uses_with(same)
            nodes.erase_node(node)
    for pick in list(nodes.find_nodes(op="call_function", target=aten.index.Tensor)):
        if _picks_all(pick):
            _put_axes_between(graph, pick)
    graph.remove_dead()
    return before - len(nodes.nodes)


def _hands_on(node: torch.fx.Node) -> bool:
    """Whether an op puts out the very numbers it reads."""
    if node.target in _COPIES:
        return True
    if node.target in (aten.reshape.default, aten.expand.default):
        source: Any = node.args[0]
        before, after = source.meta["val"].shape, node.meta["val"].shape
        return [str(size) for size in before] == [str(size) for size in after]
    if node.target != aten.slice.Tensor:
        return False
    given: tuple[Any, ...] = (*node.args[2:], None, None, None)
    start, stop, step = given[:3]
    return start in (None, 0) and stop in (None, _OPEN) and step in (None, 1)


def _other_than_true(node: torch.fx.Node) -> torch.fx.Node | None:
    """The side of a conjunction that decides it: the other is one ``True``."""
    if node.target not in _BOTH:
        return None
    one, other = node.args[:2]
    for ones, side in ((one, other), (other, one)):
        if isinstance(ones, torch.fx.Node) and isinstance(side, torch.fx.Node) and ones.target in _ONES:
            values = ones.meta["val"], side.meta["val"]
            if values[0].ndim == 0 and values[0].dtype == values[1].dtype == torch.bool:
                return side
    return None


def _picks_all(node: torch.fx.Node) -> bool:
    """Whether an index is ``table[rows, columns]`` with all rows, (n, 1, ..., 1), and all columns, (1, ..., 1, m)."""
    table, indices = node.args[:2]
    if not isinstance(table, torch.fx.Node) or not isinstance(indices, (list, tuple)) or len(indices) != 2:
        return False
    sizes, shape = table.meta["val"].shape, [str(size) for size in node.meta["val"].shape]
    if len(sizes) != 2 or shape != [str(sizes[0]), *["1"] * (len(shape) - 2), str(sizes[1])]:
        return False
    for index, size, axis in zip(indices, sizes, (0, -1), strict=True):
        counted = index
        while isinstance(counted, torch.fx.Node) and counted.target == aten.unsqueeze.default:
            counted = counted.args[0]
        if not isinstance(counted, torch.fx.Node) or counted.target != aten.arange.default:
            return False
        if index.meta["val"].ndim != len(shape) or str(index.meta["val"].shape[axis]) != str(size):
            return False
    return True


def _put_axes_between(graph: FxEdits, node: torch.fx.Node) -> None:
    """In place of an index that picks all of a table."""
    (table, _), value = node.args[:2], node.meta["val"]
    with graph.nodes.inserting_before(node):
        current: Any = table
        for _ in range(value.ndim - 2):
            wider = graph.nodes.call_function(aten.unsqueeze.default, (current, 1))
            wider.meta["val"] = current.meta["val"].unsqueeze(1)
            current = wider
    graph.replace(node, current)


def _is_pure(target: Any) -> bool:
    """Whether an op puts out the same each time it reads the same."""
    if isinstance(target, torch._ops.OpOverload):
        return torch.Tag.nondeterministic_seeded not in target.tags and not has_effects(target)
    return getattr(operator, getattr(target, "__name__", ""), None) is target
