"""From a loaded model to its graph and what can be cut in it: captured, compared, canonicalised, matched."""

from __future__ import annotations

from dataclasses import replace

import torch

from dotresize_fx.errors import CaptureError
from dotresize_fx.export.capture import CAPTURE_TOLERANCE, Captured, capture
from dotresize_fx.export.capture_cache import capture_with_cache
from dotresize_fx.export.capture_module import capture_module
from dotresize_fx.export.model_source import LoadedModel
from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.passes.canonicalise import canonicalise
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.progress import Progress
from dotresize_fx.regions import MatchReport
from dotresize_fx.task import reads_text

UNTRACED_LENGTH = 7


def analyse(
    loaded: LoadedModel, progress: Progress, *, check: bool = False, cache: bool = True, compare: bool = True
) -> tuple[Captured, FxGraph, MatchReport]:
    """Capture, canonicalise and find regions; the model's weights are not changed.

    Without ``compare`` the program is not run beside the model: for one whose weights are not there.
    ``cache``: a decoder's program reads and hands on the keys and values of earlier tokens, where its cache is that.

    Raises:
        CaptureError: torch.export refused, or the program is not what the model computes.
    """
    with progress.stage("capture"):
        if reads_text(loaded.task):
            captured = _captured(loaded, cache and loaded.task == "decoder", compare)
        else:
            captured = capture_module(loaded)
    with progress.stage("find regions"):
        canonicalise(captured.graph, check=check)
        matches = find_regions(captured.graph)
    return captured, captured.graph, matches


def _captured(loaded: LoadedModel, cache: bool, compare: bool) -> Captured:
    why = ""
    if cache:
        try:
            return capture_with_cache(loaded.model, compare=compare)
        except CaptureError as error:
            why = f"the ONNX has no cache, so it generates slowly: {error}"
    captured = capture(loaded.model)
    if compare:
        _compare_capture(loaded.model, captured)
    return replace(captured, notes=(*captured.notes, why)) if why else captured


@torch.no_grad()
def _compare_capture(model: torch.nn.Module, captured: Captured) -> None:
    """The traced sample, and a batch and length that were not traced, must come out as the model has them."""
    other = {name: value[1:, :UNTRACED_LENGTH] for name, value in captured.sample.items()}
    for inputs in (captured.sample, other):
        expected = model(**inputs)[0]
        try:
            found = Execution(captured.graph).outputs(inputs)[0]
            same = found.shape == expected.shape and bool(
                (found - expected).abs().max() <= CAPTURE_TOLERANCE * expected.abs().max()
            )
        except (RuntimeError, IndexError, ValueError):  # a batch or a length that tracing took for a constant
            same = False
        if not same and inputs is other and captured.fixed:
            sizes = " and ".join(f"a {name} of {size}" for name, size in captured.fixed.items())
            raise CaptureError(
                f"the program captured from {type(model).__name__} holds for {sizes} alone, which it was traced with: "
                "its forward pass takes the size for a number, and only a model whose program holds for any batch and "
                f"length can be slimmed (torch.export said: {captured.doubt})"
            )
        if not same:
            why = f"torch.export said: {captured.doubt}" if captured.doubt else "it depends on Python state or sizes"
            raise CaptureError(
                f"the program captured from {type(model).__name__} does not compute what the model's forward pass "
                f"does on inputs of shape {tuple(inputs['input_ids'].shape)}: {why}"
            )
