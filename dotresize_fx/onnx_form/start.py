"""Inputs of an ONNX graph that follow from the others: no earlier tokens in a cache, positions counted from 0."""

from __future__ import annotations

import re
from collections.abc import Mapping

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import to_torch_dtype

from dotresize_fx.cache_names import POSITIONS
from dotresize_fx.onnx_form.attention_ops import past_heads

_PAST = re.compile(r"^past(_key_values)?[._]")
_PRESENT = re.compile(r"^present(_key_values)?[._]")
MASK, TYPES = "attention_mask", "token_type_ids"


def is_past(name: str) -> bool:
    """Whether an input of this name holds keys or values of earlier tokens."""
    return bool(_PAST.match(name))


def is_cache(name: str) -> bool:
    """Whether an input or output of this name holds keys or values."""
    return is_past(name) or bool(_PRESENT.match(name))


def follows(name: str) -> bool:
    """Whether :func:`at_start` may give it."""
    return is_past(name) or name in (POSITIONS, TYPES)


def at_start(value: ir.Value, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What an input is that was not given.

    Positions are counted along the mask (batch, length), where there is one, else along the first input of integers.
    A cache is empty along every free axis but the first, the batch; the number and the size of its heads, where the
    file only names them, are those that its attention has.

    Raises:
        KeyError: the input has to be given.
    """
    name = str(value.name)
    assert value.dtype is not None
    dtype = to_torch_dtype(value.dtype)
    ids = next((tensor for tensor in inputs.values() if tensor.ndim == 2 and not tensor.is_floating_point()), None)
    if ids is None or not follows(name):
        raise KeyError(name)
    if name == POSITIONS:
        places = inputs[MASK].cumsum(-1) - 1 if MASK in inputs else torch.arange(ids.shape[1]).expand(ids.shape)
        return places.clamp_min(0).to(dtype)
    if name == TYPES:
        return torch.zeros_like(ids, dtype=dtype)
    sizes = [size if isinstance(size, int) else 0 for size in value.shape or ()]
    if len(sizes) == 4:
        sizes[1::2] = cache_heads(value)
    return torch.zeros([len(ids), *sizes[1:]], dtype=dtype)


def cache_heads(past: ir.Value) -> tuple[int, int]:
    """The number and the size of the heads of a cache, (batch, heads, length, size); 0 where they are not known."""
    known = past_heads(past) or (0, 0)
    heads, size = (
        size if isinstance(size, int) else other
        for size, other in zip(list(past.shape or (0,) * 4)[1::2], known, strict=True)
    )
    return heads, size
