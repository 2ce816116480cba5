"""A decoder's forward pass with its cache as plain inputs and outputs, named as Optimum and ONNX Runtime GenAI do."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dotresize_fx.cache_names import PAST, POSITIONS
from dotresize_fx.errors import CaptureError

Layers = Sequence[Mapping[str, torch.Tensor]]
# Sizes of the traced sample that no other size equals by chance.
PAST_LENGTH = 3


@dataclass(frozen=True)
class CachedForward:
    """``sizes`` are (KV heads, size of a key, size of a value) of each layer. ``positions``: the model takes them.

    Inputs are ``input_ids`` (batch, length), ``attention_mask`` (batch, past + length), ``position_ids`` (batch,
    length) and ``past_key_values.N.key`` and ``.value`` (batch, KV heads, past, size); outputs are ``logits`` (batch,
    length, vocabulary) and ``present.N.key`` and ``.value`` (batch, KV heads, past + length, size).
    """

    sizes: tuple[tuple[int, int, int], ...]
    positions: bool
    sample: Mapping[str, Any] = field(repr=False)

    def shapes(self, batch: Any, length: Any, past: Any) -> dict[str, Any]:
        """What torch.export is told of each input's sizes; that the mask is as long as both it is told in the pass."""
        free: dict[str, Any] = {
            "input_ids": {0: batch, 1: length},
            "attention_mask": {0: batch, 1: torch.export.Dim.AUTO},
        }
        if self.positions:
            free[POSITIONS] = {0: batch, 1: length}
        layer = {"key": {0: batch, 2: past}, "value": {0: batch, 2: past}}
        return free | {PAST: [layer for _ in self.sizes]}

    @contextmanager
    def on(self, model: torch.nn.Module) -> Iterator[None]:
        """Inside, ``model`` takes and gives what is said above; layers as dictionaries in a list."""
        original = model.forward

        def forward(
            input_ids: torch.Tensor,
            attention_mask: torch.Tensor,
            position_ids: torch.Tensor | None = None,
            past_key_values: Layers = (),
        ) -> dict[str, Any]:
            return self.run(original, input_ids, attention_mask, position_ids, past_key_values)

        model.forward = forward
        try:
            yield
        finally:
            model.forward = original

    def run(
        self, original: Any, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor | None, past: Layers
    ) -> dict[str, Any]:
        """What ``model`` gives inside :meth:`on`; ``original`` is its own forward pass."""
        _check_sizes(ids, mask, positions, past)
        extra = {} if positions is None else {POSITIONS: positions}
        with _same_symbols([ids, mask, *extra.values(), *(value for layer in past for value in layer.values())]):
            found = original(input_ids=ids, attention_mask=mask, past_key_values=_cache(past), use_cache=True, **extra)
        layers = found.past_key_values.layers
        return {"logits": found.logits, "present": [{"key": each.keys, "value": each.values} for each in layers]}


def positions_of(mask: torch.Tensor, length: int) -> torch.Tensor:
    """(batch, length): of the last tokens of a mask (batch, past + length), counted without padding on the left."""
    # Contiguous: strides of a slice would become a condition of what is traced with it.
    return (mask.cumsum(-1) - 1).clamp(min=0)[:, -length:].contiguous()


@torch.no_grad()
def cached_forward(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> CachedForward:
    """What the model's cache is like; ``ids`` and ``mask``, (batch, length), are what it is tried, and traced, with.
    Nothing is computed where shapes alone tell it.

    Raises:
        CaptureError: it is not keys and values of every layer, one behind the other; the message says what it is.
    """
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    taken = inspect.signature(model.forward).parameters
    if PAST not in taken or "use_cache" not in taken:
        raise CaptureError("its forward pass takes no past_key_values")
    found = _shapes_of(model, ids, mask)
    if found is None:
        found = model(input_ids=ids, attention_mask=mask, use_cache=True)
    layers = getattr(getattr(found, PAST, None), "layers", None)
    if not layers or not hasattr(found, "logits"):
        raise CaptureError("its forward pass gives no cache of layers")
    kinds = {type(layer) for layer in layers}
    if other := kinds - {DynamicLayer, DynamicSlidingWindowLayer}:
        raise CaptureError(f"its cache holds {min(kind.__name__ for kind in other)}, not keys and values alone")
    sizes = []
    for layer in layers:
        keys, values = layer.keys, layer.values
        if keys is None or keys.ndim != 4 or values.ndim != 4 or keys.shape[:3] != values.shape[:3]:
            raise CaptureError("its cache is not (batch, heads, length, size) in every layer")
        sizes.append((keys.shape[1], keys.shape[3], values.shape[3]))
    generator = torch.Generator().manual_seed(0)
    rows, dtype = len(ids), layers[0].keys.dtype
    longer = torch.cat([mask[:, :1].expand(rows, PAST_LENGTH), mask], 1)  # padding goes on to the left
    sample: dict[str, Any] = {"input_ids": ids, "attention_mask": longer}
    positions = POSITIONS in taken
    if positions:
        sample[POSITIONS] = positions_of(longer, ids.shape[1])
    sample[PAST] = [
        {
            name: torch.randn(rows, heads, PAST_LENGTH, size, generator=generator).to(dtype)
            for name, size in (("key", key), ("value", value))
        }
        for heads, key, value in sizes
    ]
    return CachedForward(tuple(sizes), positions, sample)


def _shapes_of(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> Any | None:
    """What the model gives, without its numbers; None where it cannot be told without them."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            return model(input_ids=ids, attention_mask=mask, use_cache=True)
    except Exception:  # an op that says nothing of shapes, or code that asks for numbers
        return None
    finally:
        log.disabled = before


def _cache(layers: Layers) -> Any:
    """transformers' cache of these keys and values, all of them kept: the mask is what a sliding window is."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache = DynamicCache()
    for given in layers:
        layer = DynamicLayer()
        layer.keys, layer.values = given["key"], given["value"]
        layer.dtype, layer.device, layer.is_initialized = layer.keys.dtype, layer.keys.device, True
        cache.layers.append(layer)
    return cache


@contextmanager
def _same_symbols(inputs: Iterable[torch.Tensor]) -> Iterator[None]:
    """Inside, traced sizes that were said to be the same have the same symbol.

    Each input has its own symbols, and by these torch looks up the shapes that it has told before: it would find none
    of one layer in the next. Afterwards they are as they were, which is what torch holds the bounds against.
    """
    before = []
    for tensor in inputs:
        for size in (*tensor.size(), *tensor.stride(), tensor.storage_offset()):
            node: Any = getattr(size, "node", None)
            if hasattr(node, "_expr"):
                before.append((node, node._expr))
                node._expr = node.expr
    try:
        yield
    finally:
        for node, expression in reversed(before):
            node._expr = expression


def _check_sizes(ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor | None, layers: Layers) -> None:
    """Tell torch.export which sizes are the same, which named dimensions cannot (a mask as long as past and length)."""
    past = layers[0]["key"].shape[2]
    for tensor in (tensor for layer in layers for tensor in layer.values()):
        torch._check(tensor.shape[0] == ids.shape[0])  # type: ignore[no-untyped-call]
        torch._check(tensor.shape[2] == past)  # type: ignore[no-untyped-call]
    torch._check(mask.shape[0] == ids.shape[0])  # type: ignore[no-untyped-call]
    torch._check(mask.shape[1] == past + ids.shape[1])  # type: ignore[no-untyped-call]
    if positions is not None:
        torch._check(positions.shape[0] == ids.shape[0])  # type: ignore[no-untyped-call]
        torch._check(positions.shape[1] == ids.shape[1])  # type: ignore[no-untyped-call]
