"""Inputs for a program with a cache: a prompt, what stands behind a part of it, and both as the ONNX names them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from dotresize_fx.cache_names import PAST, POSITIONS
from dotresize_fx.export.cached_forward import CachedForward, positions_of
from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.fx_form.graph import FxGraph


def prompt_inputs(cached: CachedForward | None, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """A prompt, (batch, length) both, for the model and its program; with positions where the program reads them."""
    inputs = {"input_ids": ids, "attention_mask": mask}
    if cached is not None and cached.positions:
        inputs[POSITIONS] = positions_of(mask, ids.shape[1])
    return inputs


def continued(
    graph: FxGraph, whole: Mapping[str, torch.Tensor], present: Sequence[torch.Tensor], past: int
) -> dict[str, torch.Tensor]:
    """The inputs for what stands behind the first ``past`` tokens of ``whole``, whose cache ``present`` is."""
    results = [node.name for node in graph.nodes.output_node().all_input_nodes][1:]
    return behind(whole, past) | {graph.caches[name]: value for name, value in zip(results, present, strict=True)}


def behind(whole: Mapping[str, torch.Tensor], past: int) -> dict[str, torch.Tensor]:
    """Of the same inputs those that are no cache."""
    return {name: value if name == "attention_mask" else value[:, past:] for name, value in whole.items()}


def splits(mask: torch.Tensor) -> list[int]:
    """Lengths of a past, of sequences with this mask (batch, length): one leaves half of the tokens, one the last.

    What is left holds no padding.
    """
    length, padded = mask.shape[1], int((mask == 0).sum(-1).max())
    return sorted({past for past in (length // 2, length - 1) if 0 < past < length and past >= padded})


def onnx_inputs(graph: FxGraph, inputs: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray[Any, Any]]:
    """Every input of the program, those that are not given as at the start, by the names that the ONNX has for them."""
    return {_onnx_name(node.name): value.numpy() for node, value in Execution(graph).start(inputs).items()}


def _onnx_name(name: str) -> str:
    return re.sub(rf"^{PAST}_(\d+)_(key|value)$", rf"{PAST}.\1.\2", name)
