"""A program's cache: keys and values of earlier tokens that it reads, and hands on with those of its own tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from dotresize_fx.cache_names import PAST, POSITIONS

if TYPE_CHECKING:
    from dotresize_fx.fx_form.reading import FxReading

aten = torch.ops.aten


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
