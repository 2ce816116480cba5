"""Capture: a Hugging Face model becomes a torch.export program, dynamic in batch and, if it reads text, in length.

The program is traced through transformers' own ONNX exporter, whose patches make it convertible later; the
exporter is stopped once it has the program, and :mod:`dotresize_fx.export.emit_onnx` lets it go on from there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.exporters.configs import OnnxConfig
from transformers.exporters.exporter_dynamo import DynamoExporter
from transformers.exporters.exporter_onnx import OnnxExporter

from dotresize_fx.errors import CaptureError
from dotresize_fx.export.cached_forward import CachedForward
from dotresize_fx.export.quiet import quiet_libraries
from dotresize_fx.export.stand_ins import stand_ins
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.program_inputs import ProgramInputs

# Traced with two sequences, one of them padded, so that the attention mask stays an input.
TRACED_BATCH, TRACED_LENGTH, TRACED_PADDING = 2, 16, 5
# Two float32 runs of one function differ by rounding only; a wrong capture differs by the size of its outputs.
CAPTURE_TOLERANCE = 1e-4
LARGEST_BATCH = 4096
UNLIMITED = 2048  # the longest sequence of a model that states none

LONGEST_QUOTE = 300  # characters
_SOURCE_LINE = re.compile(r'File "(.+)", line (\d+)')


@dataclass(frozen=True)
class Captured:
    """A captured model: the editable graph, the sample it was traced with, and what converting it needs.

    ``longest`` is the longest sequence the model takes, ``vocabulary`` the number of token ids (0: it reads none).
    ``doubt`` is what torch.export said against a free batch and length, if it did: such a program may hold for the
    sample's shape only. ``inputs`` is what a module or a saved program reads, None for a model of text, ``predicts``
    the one of them whose next token the first output predicts, and ``notes`` say which of its sizes are fixed, and why.
    ``cache`` is what a program with a cache was traced through.
    """

    graph: FxGraph
    sample: Mapping[str, torch.Tensor]
    metadata: Any
    longest: int
    vocabulary: int
    doubt: str = ""
    inputs: ProgramInputs | None = None
    predicts: str = ""
    notes: tuple[str, ...] = ()
    cache: CachedForward | None = None

    @property
    def fixed(self) -> dict[str, int]:
        """The sizes that a program in doubt may hold for alone, by "batch" and, of a model of text, "length"."""
        if not self.doubt:
            return {}
        sizes = self.graph.value(self.graph.node(next(iter(self.sample)))).shape
        names = ("batch", "length") if self.vocabulary else ("batch",)
        return {name: size for name, size in zip(names, sizes, strict=False) if isinstance(size, int)}


def sample_inputs(vocabulary: int) -> dict[str, torch.Tensor]:
    """int64 ``input_ids`` and ``attention_mask``, (TRACED_BATCH, TRACED_LENGTH), the first row padded on the left."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (TRACED_BATCH, TRACED_LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :TRACED_PADDING] = 0
    return {"input_ids": ids, "attention_mask": mask}


def text_config_of(model: Any) -> Any:
    """The configuration of the part that reads text, or the model's own where it has no parts."""
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def longest_of(text_config: Any) -> int:
    """Tokens that a sequence may have, as the configuration says."""
    longest = int(getattr(text_config, "max_position_embeddings", None) or 0)
    return longest if longest > 0 else UNLIMITED  # XLNet says -1


def capture(model: torch.nn.Module, sample: Mapping[str, torch.Tensor] | None = None) -> Captured:
    """Trace the model's forward pass without a cache.

    ``sample``: two of what it reads, by name, for a model that reads no token ids; the first axis of each is dynamic.

    Raises:
        CaptureError: torch.export refused; the message quotes what it said.
    """
    text_config = text_config_of(model)
    longest = longest_of(text_config)
    vocabulary = int(text_config.vocab_size) if sample is None else 0
    reads_text = sample is None
    chosen = sample_inputs(vocabulary) if sample is None else dict(sample)
    named = torch.export.Dim("batch", min=1, max=LARGEST_BATCH), torch.export.Dim("length", min=1, max=longest)
    # Older tracers cannot prove bounds of a named dimension that hold anyway; left to themselves they need not.
    free = torch.export.Dim.AUTO, torch.export.Dim.AUTO
    refusal: Exception | None = None
    for batch, length in (named, free):
        try:
            shapes = {name: {0: batch, 1: length} if reads_text else {0: batch} for name in chosen}
            program, metadata = trace(model, chosen, shapes)
            doubt = "" if refusal is None else what_it_said(refusal)
            return Captured(FxGraph(program), chosen, metadata, longest, vocabulary, doubt)
        except Exception as error:
            refusal = refusal or error
            if "Constraints violated" not in str(error):
                break
    raise CaptureError(
        f"torch.export cannot capture {type(model).__name__}: {what_it_said(refusal or Exception())} (only a model "
        "whose forward pass takes any batch and length and does not branch on its data can be slimmed)"
    ) from refusal


def trace(
    model: torch.nn.Module, sample: Mapping[str, torch.Tensor], shapes: Mapping[str, Any]
) -> tuple[torch.export.ExportedProgram, Any]:
    """The program of a forward pass, and what converting it needs; raises whatever torch.export does."""
    with stand_ins(model) as put_back:
        try:
            with quiet_libraries(), no_fast_path(), no_stack_traces():
                config = OnnxConfig(dynamic=True, dynamic_shapes=dict(shapes))
                _StoppedOnnxExporter().export(model, dict(sample), config)
        except _Captured as captured:
            put_back(captured.program)
            return captured.program, captured.metadata
    raise AssertionError("the exporter handed on no program")


@contextmanager
def no_fast_path() -> Iterator[None]:
    """Inside, torch.nn's transformer layers compute op by op, not in one fused op that has nothing to cut."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def no_stack_traces() -> Iterator[None]:
    """Inside, nodes do not note which lines made them, which would be paths of this machine and takes its time."""
    emitted = getattr(torch.fx.config, "do_not_emit_stack_traces", False)  # not there in older releases
    torch.fx.config.do_not_emit_stack_traces = True
    try:
        yield
    finally:
        torch.fx.config.do_not_emit_stack_traces = emitted


def what_it_said(error: Exception) -> str:
    """Its first line; the first point of a list under it, which says more; and the source line it names."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    said = lines[0].partition(" For more information")[0][:LONGEST_QUOTE]
    point = next((line[2:] for line in lines[1:] if line.startswith("- ")), "")
    if point:
        said += f" {point.partition('. ')[0][:LONGEST_QUOTE]}"
    place = next((found for line in lines if (found := _SOURCE_LINE.match(line))), None)
    return said if place is None else f"{said}, at {Path(place[1]).name} line {place[2]}"


class _Captured(BaseException):
    """Carries the program out of the exporter; not an Exception, so that nothing on the way handles it."""

    def __init__(self, program: torch.export.ExportedProgram, metadata: Any) -> None:
        super().__init__()
        self.program, self.metadata = program, metadata


class _Stop(DynamoExporter):  # type: ignore[misc]
    """Stands between the ONNX exporter and the dynamo exporter in the method resolution order."""

    def export_program(self, *args: Any, **kwargs: Any) -> Any:
        raise _Captured(*super().export_program(*args, **kwargs))


class _StoppedOnnxExporter(OnnxExporter, _Stop):  # type: ignore[misc]
    """The ONNX exporter up to the program it would convert."""
