"""Make an exported program functional where it is not, and compute ahead what only its parameters decide."""

from __future__ import annotations

import operator
from typing import Any

import torch

from dotresize_fx.fx_form.edits import FxEdits, has_effects

aten = torch.ops.aten
# They may hand on the memory that they are given, and their schemas do not say so.
_SHARING = {aten.dropout.default, aten.type_as.default, aten._unsafe_view.default}


def drop_in_place(graph: FxEdits) -> list[str]:
    """See :meth:`dotresize_fx.graph.Graph.drop_in_place`."""
    changed = []
    for node in list(graph.nodes.nodes):
        pure = _out_of_place(node.target) if node.op == "call_function" else None
        if pure is None or not isinstance(node.args[0], torch.fx.Node) or not _alone(node.args[0]):
            continue
        if any(one.meta["val"].dtype != node.args[0].meta["val"].dtype for one in node.all_input_nodes):
            continue  # what is written takes the dtype of what is written to
        with graph.nodes.inserting_before(node):
            new = graph.nodes.call_function(pure, node.args, node.kwargs)
        changed.append(f"{node.name}: no longer in place")
        graph.replace(node, new)
    return changed


def fold_constants(graph: FxEdits, largest: int) -> list[str]:
    """See :meth:`dotresize_fx.graph.Graph.fold_constants`."""
    folded = []
    for node in list(graph.nodes.nodes):
        sources = node.all_input_nodes
        if node.op != "call_function" or not sources or not _is_small_vector(node, largest):
            continue
        values = [graph.value(source) for source in sources]
        if not all(value.is_parameter for value in values) or _may_change(node) or _is_written(node):
            continue
        arguments = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: graph.parameter(graph.value(n)))
        with torch.no_grad():
            tensor = node.target(*arguments[0], **arguments[1])
        name = graph.parameter_name(values[0])
        # Not with a dot: what is a parameter cannot hold another, and exporters go by the names.
        buffer = all(graph.is_buffer(value) for value in values)
        graph.replace(node, graph.add_parameter(f"{name}_{node.name}", tensor.detach().clone(), buffer=buffer))
        folded.append(f"{node.name}: computed from {name}")
    return folded


def _is_small_vector(node: torch.fx.Node, largest: int) -> bool:
    val = node.meta.get("val")
    return isinstance(val, torch.Tensor) and val.ndim == 1 and val.is_floating_point() and len(val) <= largest


def _may_change(node: torch.fx.Node) -> bool:
    """Whether an op puts out something else each time it runs, or writes."""
    tags = getattr(node.target, "tags", ())
    return has_effects(node.target) or torch.Tag.nondeterministic_seeded in tags


def _is_written(node: torch.fx.Node) -> bool:
    """Whether an op writes into this value, or into one that shares its memory."""
    return any(has_effects(user.target) or (_shares(user) and _is_written(user)) for user in node.users)


def _shares(node: torch.fx.Node) -> bool:
    """Whether what an op puts out may be memory of what it reads."""
    if node.target is operator.getitem or node.target in _SHARING:
        return True
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(one.alias_info is not None for one in schema.arguments)


def _out_of_place(target: Any) -> Any:
    """The op that computes what an op such as ``add_`` does; None for others."""
    packet, overload = getattr(target, "overloadpacket", None), getattr(target, "_overloadname", "")
    name = getattr(packet, "__name__", "")
    if not name.endswith("_") or name.startswith("_") or str(target).partition(".")[0] != "aten":
        return None
    return getattr(getattr(aten, name[:-1], None), overload, None)


def _alone(node: torch.fx.Node) -> bool:
    """Whether a value has one user, and is no other value's memory that something else reads."""
    while len(node.users) == 1 and node.op == "call_function":
        if not _shares(node):
            return True
        source = node.args[0]
        if not isinstance(source, torch.fx.Node):
            return False
        node = source
    return False
