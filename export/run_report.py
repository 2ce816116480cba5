"""The report of one export: what it was asked for, on what it ran, and what it wrote."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch

from dotresize_fx.export.match_rows import block_rows, linear_rows, rank_rows, region_rows
from dotresize_fx.export.weight_files import file_sha256
from dotresize_fx.options import Options
from dotresize_fx.passes.slim_onnx_graph import SlimmedOnnx
from dotresize_fx.passes.sweep_regions import Slimmed
from dotresize_fx.progress import Progress
from dotresize_fx.regions import MatchReport
from dotresize_fx.report.contents import Figures, ModelSource, Report
from dotresize_fx.report.given_options import given_options
from dotresize_fx.report.provenance import package_versions, this_machine
from dotresize_fx.task import reads_text

# What a model that reads no text was not asked.
TEXT_OPTIONS = ("calibration", "calibration_tokens", "sequence_length", "evaluation_tokens", "latency_length")


def run_report(
    model: ModelSource,
    options: Options,
    matches: MatchReport,
    slimmed: Slimmed | SlimmedOnnx,
    figures: Figures,
    folder: Path,
    *,
    cache: bool,
    inputs_sha256: Mapping[str, str],
    notes: tuple[str, ...],
    progress: Progress,
    started: float,
) -> Report:
    """``folder`` holds all that was written; ``started`` is when the run was, by ``time.perf_counter``."""
    gone = {op for block in slimmed.gone for op in block.ops}
    left_out = {"seed"} if reads_text(model.task) else {"seed", *TEXT_OPTIONS}
    return Report(
        tool_version=version("dotresize-fx"),
        packages=package_versions(),
        machine=this_machine(torch.get_num_threads()),
        model=model,
        options=given_options({key: value for key, value in asdict(options).items() if key not in left_out}),
        seed=options.seed,
        cache=cache,
        inputs_sha256=dict(inputs_sha256),
        outputs_sha256={
            file.relative_to(folder).as_posix(): file_sha256(file)
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        },
        regions=region_rows(matches, slimmed.swept, gone),
        linears=linear_rows(matches, gone),
        removed_blocks=block_rows(slimmed.gone),
        low_rank_linears=rank_rows(slimmed.factorized),
        figures=figures,
        stage_seconds={**progress.seconds, "total": time.perf_counter() - started},
        notes=notes,
    )
