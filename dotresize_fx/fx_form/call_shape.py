"""How a program is called: the nesting of its inputs and outputs, and its example inputs, where some are gone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import Any

from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

_GONE = object()


def leave_out(
    program: ExportedProgram, inputs: Collection[str], outputs: Collection[str], renamed: Callable[[str], str]
) -> None:
    """Take these inputs and outputs, by name, out of what the program is called with and returns, in place.

    Called while the signature still has them. What held nothing else goes too. ``renamed``: new names for the keys of
    dictionaries that are left.
    """
    signature = program.graph_signature
    whole, *parts = program.module_call_graph
    if whole.signature is None:
        return
    called = copy.copy(whole.signature)
    taken, given = list(signature.user_inputs), list(signature.user_outputs)
    examples, names = program.example_inputs, pytree.tree_unflatten(taken, called.in_spec)
    called.in_spec = _spec(called.in_spec, taken, inputs, renamed)
    called.out_spec = _spec(called.out_spec, given, outputs, renamed)
    # A copy of the program shares the list.
    program._module_call_graph = [type(whole)(fqn=whole.fqn, signature=called), *parts]
    if examples is not None:  # checked against what was just said
        values = dict(zip(taken, pytree.tree_leaves(examples), strict=True))
        left = _without(names, inputs, renamed)
        program.example_inputs = pytree.tree_map(lambda name: values[name], left)


def _spec(spec: pytree.TreeSpec, names: list[Any], gone: Collection[str], renamed: Callable[[str], str]) -> Any:
    return pytree.tree_structure(_without(pytree.tree_unflatten(names, spec), gone, renamed))


def _without(tree: Any, gone: Collection[str], renamed: Callable[[str], str]) -> Any:
    if isinstance(tree, dict):
        parts = {key: _without(part, gone, renamed) for key, part in tree.items()}
        kept = {renamed(key): part for key, part in parts.items() if part is not _GONE}
        return kept if kept or not tree else _GONE
    if isinstance(tree, (list, tuple)):
        left = [part for part in (_without(part, gone, renamed) for part in tree) if part is not _GONE]
        return type(tree)(left) if left or not tree else _GONE
    return _GONE if tree in gone else tree
