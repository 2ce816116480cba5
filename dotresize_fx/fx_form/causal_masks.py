"""Attention masks that say no more than that nobody looks ahead, which an attention knows how to do without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch

from dotresize_fx.fx_form.half_products import without_parameters
from dotresize_fx.fx_form.repeats import repeated

Known = dict[tuple[Any, ...], torch.Tensor]
_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
# Where attention without a mask is another, faster kernel, and a mask that is as long as the text takes room.
DEVICES = ("cuda",)
# What is added to scores that do not count.
LOWEST = -1e30


class CausalMasks:
    """Those of a program: all batches of a shape share one, which no attention needs to read.

    ``nodes`` are all of its nodes in their order, ``learned`` its parameters. ``known`` are the shared masks of all
    programs that are run side by side, added to here.
    """

    def __init__(self, nodes: Sequence[torch.fx.Node], learned: Sequence[torch.fx.Node], known: Known) -> None:
        self._nodes, self._learned, self._known = nodes, learned, known

    # What is asked of the nodes is told once it is needed: on other devices never.

    @cached_property
    def fixed(self) -> list[torch.fx.Node]:
        """The calls that only inputs and buffers enter."""
        return without_parameters(self._nodes, self._learned)

    @cached_property
    def _masks(self) -> set[torch.fx.Node]:
        return {mask for node in self._nodes if isinstance(mask := mask_of(node), torch.fx.Node)}

    @cached_property
    def _watched(self) -> set[torch.fx.Node]:
        # What more than one block makes its mask of, and waits until then, is of bools.
        waiting = {node for node in self.fixed if len(node.users) > 1 and _dtype(node) is torch.bool}
        return self._masks.intersection(self.fixed) | waiting

    @cached_property
    def _first(self) -> dict[torch.fx.Node, torch.fx.Node]:
        same = repeated(self.fixed)
        return {mask: same[mask] for mask in self._masks if mask in same}

    @cached_property
    def last(self) -> dict[torch.fx.Node, torch.fx.Node]:
        """By a mask that later blocks make again the last that does."""
        return {first: mask for mask, first in sorted(self._first.items())}

    def found(self, node: torch.fx.Node, values: Mapping[torch.fx.Node, Any]) -> Any:
        """What a node gives that makes again a mask that is shared already; None where it has to be computed."""
        first = self._first.get(node) if self._known else None
        value = None if first is None else values.get(first)
        return value if self.knows(value) else None

    def shared(self, node: torch.fx.Node, value: Any) -> Any:
        """The value of a node, or the one that other batches have where it is such a mask."""
        if not isinstance(value, torch.Tensor) or value.device.type not in DEVICES or node not in self._watched:
            return value
        if _is_recorded() or not is_causal(value):
            return value
        key = tuple(value.shape), value.dtype, value.device
        if key not in self._known:
            one = value.reshape(-1, *value.shape[-2:])[0].clone()
            self._known[key] = one.expand(value.shape)
        return self._known[key]

    def knows(self, value: Any) -> bool:
        return any(value is one for one in self._known.values())

    def without(self, node: torch.fx.Node, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """An attention's arguments, given by ``node`` and with values in their places, without such a mask."""
        if not self._known or node.target is not _ATTENTION:
            return args, kwargs
        if not self.knows(_mask(args, kwargs)):
            return args, kwargs
        kept = {name: value for name, value in kwargs.items() if name in ("scale", "enable_gqa", "dropout_p")}
        dropout = args[4] if len(args) > 4 else kept.pop("dropout_p", 0.0)
        return (*args[:3], None, dropout, True), kept


def _dtype(node: torch.fx.Node) -> torch.dtype | None:
    found = node.meta.get("val")
    return found.dtype if isinstance(found, torch.Tensor) else None


def _is_recorded() -> bool:
    """Whether no number can be asked for: what is computed goes into a CUDA graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def mask_of(node: torch.fx.Node) -> Any:
    """What an attention is given for a mask; None of other nodes."""
    return _mask(node.args, node.kwargs) if node.target is _ATTENTION else None


def _mask(args: Any, kwargs: Any) -> Any:
    return args[3] if len(args) > 3 else kwargs.get("attn_mask")


def is_causal(mask: torch.Tensor) -> bool:
    """Whether a mask (..., length, length) lets each position see itself and those before it, and no other.

    It is bool, or added to scores.
    """
    length = mask.shape[-1] if mask.ndim > 1 else 1
    if length < 2 or mask.shape[-2] != length:
        return False
    seen = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    if mask.dtype is torch.bool:
        return bool((mask == seen).all())
    return bool(torch.where(seen, mask == 0, mask <= LOWEST).all())
