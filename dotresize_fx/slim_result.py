"""What slimming gives: a slim program beside the dense one, to be looked at and to be saved."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dotresize_fx.calibration import CalibrationData
from dotresize_fx.clock import Clock
from dotresize_fx.export.capture import Captured
from dotresize_fx.export.model_source import LoadedModel
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.options import Options
from dotresize_fx.passes.sweep_regions import Slimmed
from dotresize_fx.progress import Progress
from dotresize_fx.regions import MatchReport
from dotresize_fx.sweep import SweptRegion
from dotresize_fx.task import Task

if TYPE_CHECKING:
    from dotresize_fx.report.contents import Report


@dataclass
class SlimResult:
    """A slim program beside the dense one it came from. ``save`` emits, proves and measures it.

    ``clock`` has what widths take, where they were planned by that, and ``dense_onnx`` is the dense model's file, if
    there is one that lasts.
    """

    loaded: LoadedModel
    captured: Captured = field(repr=False)
    dense: FxGraph = field(repr=False)
    slimmed: Slimmed = field(repr=False)
    matches: MatchReport = field(repr=False)
    data: CalibrationData = field(repr=False)
    options: Options
    progress: Progress
    notes: tuple[str, ...] = ()
    clock: Clock | None = field(default=None, repr=False)
    dense_onnx: Path | None = None
    started: float = field(default_factory=time.perf_counter)

    @property
    def task(self) -> Task:
        """What the model is for."""
        return task_of(self.loaded, self.captured)

    @property
    def slim(self) -> FxGraph:
        """The slim program."""
        return self.slimmed.graph

    @property
    def swept(self) -> tuple[SweptRegion, ...]:
        """What was cut."""
        return self.slimmed.swept

    def save(self, out: Path | str, *, force: bool = False, checkpoint: bool | None = None) -> Report:
        """Write model.onnx, its weights, config and tokenizer if it has any, and the reports into ``out``; returns the
        report.

        ``checkpoint``: and a folder of that name which stock ``from_pretrained`` loads; None is what the options say.
        Nothing is left half-written. Raises OutputError when ``out`` cannot be written (it exists and is not empty
        without ``force``), MissingExtraError without ONNX Runtime, VerificationError when it disagrees, CheckpointError
        when no stock model has the slim widths.
        """
        from dotresize_fx.export.deliver import deliver
        from dotresize_fx.export.output_folder import OutputFolder

        with OutputFolder(out, force) as folder:
            wanted = self.options.checkpoint if checkpoint is None else checkpoint
            return deliver(self, folder.partial, folder.work, checkpoint=wanted)


def task_of(loaded: LoadedModel, captured: Captured) -> Task:
    """What a model is for, by what was captured of it."""
    return "logits" if captured.predicts else loaded.task
