"""Capture of a decoder with its cache: one program for the prompt, an empty past, and for every token behind it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dotresize_fx.errors import BadWeightsError, CaptureError
from dotresize_fx.export.cached_forward import PAST_LENGTH, cached_forward
from dotresize_fx.export.cached_runs import continued, prompt_inputs
from dotresize_fx.export.capture import (
    CAPTURE_TOLERANCE,
    LARGEST_BATCH,
    Captured,
    longest_of,
    sample_inputs,
    text_config_of,
    trace,
    what_it_said,
)
from dotresize_fx.export.quiet import quiet_libraries
from dotresize_fx.export.stand_ins import stand_ins
from dotresize_fx.fx_form.cache import find_caches
from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.fx_form.graph import FxGraph

# (tokens of the past, new tokens) of the sample's; a single new token is tried in a batch of one.
SPLITS = ((0, 16), (0, 1), (9, 7), (15, 1))


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
            _compare(model, captured)
        return captured
    raise CaptureError(f"torch.export said: {what_it_said(refusal or Exception())}") from refusal


def free_sizes(longest: int) -> tuple[Any, Any, Any]:
    """Batch, length and past for torch.export, which knows of them then that they may be 0 or 1."""
    return (
        torch.export.Dim("batch", min=1, max=LARGEST_BATCH),
        torch.export.Dim.AUTO,
        torch.export.Dim("past", min=0, max=max(longest, PAST_LENGTH + 1)),
    )


@torch.no_grad()
def _compare(model: Any, captured: Captured) -> None:
    """The model's logits, once without a cache, against the program's, in one go and behind a past of its own: a
    decoder's logits do not depend on what stands behind or in other rows.
    """
    assert captured.cache is not None
    ids, mask = captured.sample["input_ids"], captured.sample["attention_mask"]
    execution = Execution(captured.graph, caches=True)
    expected = None
    present: list[torch.Tensor] = []
    for past, length in SPLITS:
        first, stop = 1 if length == 1 else 0, past + length
        whole = prompt_inputs(captured.cache, ids[first:, :stop], mask[first:, :stop])
        try:
            if expected is None:
                expected = model(**whole)[0]
            given: Mapping[str, torch.Tensor] = whole
            if past:
                given = continued(captured.graph, whole, [value[first:, :, :past] for value in present], past)
            found, *caches = execution.outputs(given)
            present = present or caches
            wanted = expected[first:, past:stop]
            same = found.shape == wanted.shape and bool(
                (found - wanted)[mask[first:, past:stop].bool()].abs().max()
                <= CAPTURE_TOLERANCE * expected[mask.bool()].abs().max()
            )
        except BadWeightsError:
            raise
        except Exception:  # sizes that tracing took for constants, or positions that the model cannot be given
            same = False
        if not same:
            raise CaptureError(
                f"with a past of {past} and {length} new tokens the captured program computes something else"
            )
