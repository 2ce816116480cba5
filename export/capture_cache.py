"""Capture of a decoder with its cache: one program for the prompt, an empty past, and for every token behind it."""

from __future__ import annotations

from typing import Any

import torch

from dotresize_fx.errors import BadWeightsError, CaptureError
from dotresize_fx.export.cached_forward import PAST_LENGTH, cached_forward
from dotresize_fx.export.capture import (
    LARGEST_BATCH,
    Captured,
    longest_of,
    sample_inputs,
    text_config_of,
    trace,
    what_it_said,
)
from dotresize_fx.export.compare_cached import compare_cached
from dotresize_fx.export.quiet import quiet_libraries
from dotresize_fx.export.stand_ins import stand_ins
from dotresize_fx.fx_form.cache import find_caches
from dotresize_fx.fx_form.graph import FxGraph


def capture_with_cache(model: Any, *, compare: bool = True) -> Captured:
    """Trace the forward pass with keys and values as inputs and outputs, and hold it against the model.

    Without ``compare`` only what it puts out as its cache is.

    Raises:
        CaptureError: the cache is something else, or torch.export refused, or the program computes something else;
            the message begins with what.
    """
    config = text_config_of(model)
    longest = longest_of(config)
    vocabulary = int(config.vocab_size)
    sample = sample_inputs(vocabulary)
    with quiet_libraries():
        try:
            with stand_ins(model):
                cached = cached_forward(model, sample["input_ids"], sample["attention_mask"])
        except BadWeightsError:
            raise
        except Exception as error:  # what a model's own code raises
            raise CaptureError(what_it_said(error)) from error
    auto = torch.export.Dim.AUTO
    refusal: Exception | None = None
    for sizes in (free_sizes(longest), (auto, auto, auto)):
        try:
            with cached.on(model):
                program, metadata = trace(model, cached.sample, cached.shapes(*sizes))
        except Exception as error:
            refusal = refusal or error
            if "Constraints violated" not in str(error):
                break
            continue
        captured = Captured(FxGraph(program), sample, metadata, longest, vocabulary, cache=cached)
        graph = captured.graph
        graph.caches.update(find_caches(graph))
        if len(graph.caches) != 2 * len(cached.sizes):
            raise CaptureError("what it puts out as its cache is not the past with the new tokens behind it")
        if compare:
            compare_cached(model, captured)
        return captured
    raise CaptureError(f"torch.export said: {what_it_said(refusal or Exception())}") from refusal


def free_sizes(longest: int) -> tuple[Any, Any, Any]:
    """Batch, length and past for torch.export, which knows of them then that they may be 0 or 1."""
    return (
        torch.export.Dim("batch", min=1, max=LARGEST_BATCH),
        torch.export.Dim.AUTO,
        torch.export.Dim("past", min=0, max=max(longest, PAST_LENGTH + 1)),
    )
