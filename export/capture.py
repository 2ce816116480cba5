"""Capture: a Hugging Face model becomes a torch.export program, dynamic in batch and length.

The program is traced through transformers' own ONNX exporter, whose patches make it convertible later; the
exporter is stopped once it has the program, and :mod:`dotresize_fx.export.emit_onnx` lets it go on from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.exporters.configs import OnnxConfig
from transformers.exporters.exporter_dynamo import DynamoExporter
from transformers.exporters.exporter_onnx import OnnxExporter

from dotresize_fx.errors import CaptureError
from dotresize_fx.export.quiet import quiet_libraries
from dotresize_fx.fx_graph import FxGraph

# Traced with two sequences, one of them padded, so that the attention mask stays an input.
TRACED_BATCH, TRACED_LENGTH, TRACED_PADDING = 2, 16, 5
LARGEST_BATCH = 4096


@dataclass(frozen=True)
class Captured:
    """A captured model: the editable graph, the sample it was traced with, and what converting it needs.

    ``longest`` is the longest sequence the model takes, ``vocabulary`` the number of token ids.
    """

    graph: FxGraph
    sample: Mapping[str, torch.Tensor]
    metadata: Any
    longest: int
    vocabulary: int


def sample_inputs(vocabulary: int) -> dict[str, torch.Tensor]:
    """int64 ``input_ids`` and ``attention_mask``, (TRACED_BATCH, TRACED_LENGTH), the first row padded on the left."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (TRACED_BATCH, TRACED_LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :TRACED_PADDING] = 0
    return {"input_ids": ids, "attention_mask": mask}


def capture(model: torch.nn.Module) -> Captured:
    """Trace the model's forward pass without a cache.

    Raises:
        CaptureError: torch.export refused; the message quotes the first line of what it said.
    """
    config: Any = model.config
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    longest = int(getattr(text_config, "max_position_embeddings", None) or 2048)
    vocabulary = int(text_config.vocab_size)
    sample = sample_inputs(vocabulary)
    batch = torch.export.Dim("batch", min=1, max=LARGEST_BATCH)
    length = torch.export.Dim("length", min=1, max=longest)
    shapes = {name: {0: batch, 1: length} for name in sample}
    export_config = OnnxConfig(dynamic=True, dynamic_shapes=shapes)
    try:
        with quiet_libraries():
            _StoppedOnnxExporter().export(model, dict(sample), export_config)
    except _Captured as captured:
        return Captured(FxGraph(captured.program), sample, captured.metadata, longest, vocabulary)
    except Exception as error:
        said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CaptureError(
            f"torch.export cannot capture {type(model).__name__}: {said.strip()[:300]} "
            "(only models whose forward pass has no data-dependent control flow can be slimmed)"
        ) from error
    raise AssertionError("the exporter returned without a program")


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
