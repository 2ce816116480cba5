"""Whether so many blocks can go, as far as a model says so before it is captured."""

from __future__ import annotations

from typing import Any

import torch

from dotresize_fx.depth.choice import check_count
from dotresize_fx.export.capture import text_config_of
from dotresize_fx.export.model_source import LoadedModel


def check_depth(loaded: LoadedModel, count: int | None) -> None:
    """Raises UsageError where more blocks are to go than there are; None is none."""
    layers = None if count is None else told_layers(loaded)
    if count is not None and layers is not None:
        check_count(count, layers)


def told_layers(loaded: LoadedModel) -> int | None:
    """How many layers the configuration says, where the module has one list of as many and no other list; None where it
    does not say so, or layers may be used several times or stand beside others.
    """
    if loaded.config is None:
        return None
    told: Any = getattr(text_config_of(loaded.model), "num_hidden_layers", None)
    return told if type(told) is int and _lists(loaded.model) == [told] else None


def _lists(module: torch.nn.Module) -> list[int]:
    """Lengths of the outermost lists of modules."""
    if isinstance(module, torch.nn.ModuleList):
        return [len(module)]
    return [length for child in module.children() for length in _lists(child)]
