"""Products of an exported program in bfloat16, as autocast takes them, where that costs nothing that matters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

aten = torch.ops.aten
# What autocast would compute in bfloat16.
PRODUCTS = (aten.matmul.default, aten.mm.default, aten.bmm.default, aten.baddbmm.default, aten.addmm.default)
PRODUCTS_OF_WEIGHTS = (aten.linear.default, *PRODUCTS)
_LOWEST = torch.finfo(torch.bfloat16).min


def without_parameters(nodes: Iterable[torch.fx.Node], parameters: Iterable[torch.fx.Node]) -> list[torch.fx.Node]:
    """Calls that only inputs and buffers enter: masks and position tables. ``nodes`` in their order."""
    learned, fixed = set(parameters), []
    for node in nodes:
        if not learned.isdisjoint(node.all_input_nodes):
            learned.add(node)
        elif node.op == "call_function":
            fixed.append(node)
    return fixed


def only_in_products(parameters: Iterable[torch.fx.Node]) -> set[torch.fx.Node]:
    """Those that linears alone read, which round them to bfloat16 first."""
    linear = aten.linear.default
    return {
        node
        for node in parameters
        if node.users and all(user.target is linear and node is not user.args[0] for user in node.users)
    }


def exact(target: Any) -> Callable[..., Any]:
    """The op as it is without autocast: positions of a position table are no round numbers in bfloat16."""

    def product(*args: torch.Tensor, **kwargs: Any) -> Any:
        with torch.autocast(args[0].device.type, enabled=False):
            return target(*args, **kwargs)

    return product


def clamped(arguments: Any) -> Any:
    """A node's arguments with masks of float32's lowest number made bfloat16's, which rounding leaves finite."""
    return torch.fx.node.map_aggregate(arguments, _clamped)


def _clamped(argument: Any) -> Any:
    return max(argument, _LOWEST) if isinstance(argument, float) and argument > -float("inf") else argument
