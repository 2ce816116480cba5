"""A program's cache: keys and values of earlier tokens that it reads, and hands on with those of its own tokens."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch

from dotresize_fx.cache_names import PAST, POSITIONS, PRESENT
from dotresize_fx.fx_form.call_shape import leave_out

if TYPE_CHECKING:
    from dotresize_fx.fx_form.edits import FxEdits
    from dotresize_fx.fx_form.reading import FxReading

aten = torch.ops.aten
_LAYER = re.compile(rf"((?:{PAST}|{PRESENT})[._])(\d+)(.*)")


def at_start(node: torch.fx.Node, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What an input is that was not given: no earlier tokens, (batch, heads, 0, size), and positions counted from 0.

    ``inputs`` hold input_ids, (batch, length). Positions are those of sequences without padding on the left.

    Raises:
        KeyError: the input has to be given.
    """
    if not node.name.startswith(PAST) and node.name != POSITIONS:
        raise KeyError(node.name)
    ids, value = inputs["input_ids"], node.meta["val"]
    if node.name == POSITIONS:
        return torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    return torch.empty(len(ids), int(value.shape[1]), 0, int(value.shape[3]), dtype=value.dtype, device=ids.device)


def find_caches(graph: FxReading) -> dict[str, str]:
    """Outputs that are an input with more tokens behind it, (batch, heads, length, size), and that input; by name."""
    found = {}
    for node in graph.nodes.output_node().all_input_nodes:
        if node.target not in (aten.cat.default, aten.concatenate.default) or len(node.args) < 2:
            continue
        parts, axis = node.args[0], node.args[1]
        if not isinstance(parts, (list, tuple)) or len(parts) != 2 or axis not in (-2, 2):
            continue
        past = parts[0]
        if isinstance(past, torch.fx.Node) and past.op == "placeholder" and past.name.startswith(PAST):
            found[node.name] = past.name
    return found


def remove_caches(graph: FxEdits, outputs: Collection[str]) -> None:
    """See :meth:`dotresize_fx.graph.Graph.remove_caches`."""
    signature = graph.program.graph_signature
    gone = {graph.node(name): graph.node(graph.caches.pop(name)) for name in outputs}
    kept = [graph.node(name) for name in graph.caches.values()]
    numbers = {number: i for i, number in enumerate(sorted({_layer(past.name) for past in kept}))}
    leave_out(graph.program, [past.name for past in gone.values()], outputs, lambda name: _closed_up(name, numbers))
    end = graph.nodes.output_node()
    results: Any = end.args[0]
    end.args = (tuple(result for result in results if result not in gone),)
    signature.output_specs[:] = [spec for spec in signature.output_specs if spec.arg.name not in outputs]
    for past in gone.values():
        for user in list(past.users):
            if user.target is aten.sym_size.int:  # how many earlier tokens there are any cache tells
                user.replace_input_with(past, kept[0])
    graph.remove_dead()
    names = {past.name for past in gone.values()}
    signature.input_specs[:] = [spec for spec in signature.input_specs if spec.arg.name not in names]
    for past in gone.values():
        graph.nodes.erase_node(past)
    renamed = {past.name: _closed_up(past.name, numbers) for past in kept}
    for past in kept:
        past.name = past.target = renamed[past.name]
    for spec in signature.input_specs:
        spec.arg.name = renamed.get(spec.arg.name, spec.arg.name)
    graph.caches.update({name: renamed[past] for name, past in graph.caches.items()})
    graph.changed()


def _closed_up(name: str, numbers: Mapping[int, int]) -> str:
    """``name`` with its layer's new number; one that is of no such layer as it is."""
    found = _LAYER.match(name)
    return name if found is None else f"{found[1]}{numbers.get(int(found[2]), found[2])}{found[3]}"


def _layer(name: str) -> int:
    found = _LAYER.match(name)
    assert found is not None
    return int(found[2])
