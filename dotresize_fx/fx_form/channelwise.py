"""Ops that keep an image's channels apart: depthwise convolutions, normalisation by stored statistics, pooling."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch

aten = torch.ops.aten
CHANNELS = 1  # the axis of channels, behind that of samples

# With the axes of places that a sample has.
CONVOLUTIONS: dict[Any, int] = {
    aten.conv1d.default: 1,
    aten.conv1d.padding: 1,
    aten.conv2d.default: 2,
    aten.conv2d.padding: 2,
    aten.conv3d.default: 3,
    aten.conv3d.padding: 3,
}
_POOLS = {aten.avg_pool2d.default, aten.max_pool2d.default, aten.adaptive_avg_pool2d.default}
_PADS = {aten.pad.default, aten.constant_pad_nd.default}
_GROUPS = 6  # which argument of a convolution counts its groups


def keeps_channels_apart(node: torch.fx.Node, parameters: Container[str]) -> bool:
    """Whether each channel of the output follows from that of the input, and from what the parameters have for it.

    ``parameters`` are names of placeholders. All that it reads besides its input are then parameters, channels first.
    """
    arguments: Any = node.args
    if node.kwargs or not arguments or not isinstance(arguments[0], torch.fx.Node):
        return False
    source, *others = arguments
    if not isinstance(source.meta.get("val"), torch.Tensor):
        return False
    rank = source.meta["val"].ndim
    read = [other for other in others if isinstance(other, torch.fx.Node)]
    if not all(other.name in parameters for other in read):
        return False
    if (places := CONVOLUTIONS.get(node.target)) is not None:
        channels = source.meta["val"].shape[CHANNELS]
        depthwise = groups(node) == channels == read[0].meta["val"].shape[0]
        return bool(depthwise and rank == places + 2 and channels > 1)
    if node.target is aten.batch_norm.default:
        return bool(rank > 2 and len(read) > 1 and arguments[5] is False)
    if node.target is aten.mean.dim:
        return bool(others[0]) and rank > 2 and all(axis % rank > CHANNELS for axis in others[0])
    if node.target in _PADS:
        return bool(len(others[0]) <= 2 * (rank - CHANNELS - 1))
    return bool(node.target in _POOLS and rank == 4)


def groups(node: torch.fx.Node) -> int:
    """Of a convolution."""
    stated: Any = node.args[_GROUPS] if len(node.args) > _GROUPS else 1
    return int(stated)


def resize_channels(node: torch.fx.Node, width: int) -> None:
    """Let a depthwise convolution have so many channels; the others ask their input."""
    if node.target in CONVOLUTIONS:
        node.args = (*node.args[:_GROUPS], width)
