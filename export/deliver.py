"""Deliver: emit both models, prove the slim one in ONNX Runtime, measure it beside the dense one, report."""

from __future__ import annotations

import gc
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from dotresize_fx.cost import count_cost
from dotresize_fx.export.checkpoint import write_checkpoint
from dotresize_fx.export.emit_onnx import emit_onnx
from dotresize_fx.export.formats import write_formats
from dotresize_fx.export.genai_config import write_genai_config
from dotresize_fx.export.latency_target import prove_target
from dotresize_fx.export.onnx_file import onnx_size
from dotresize_fx.export.onnx_session import CUDA, require_onnx_runtime
from dotresize_fx.export.open_model import model_name
from dotresize_fx.export.peak_memory import peak_rss_bytes
from dotresize_fx.export.precision import Precision, provider_of, require_runtime
from dotresize_fx.export.run_report import run_report
from dotresize_fx.export.shallow_config import shallow_config
from dotresize_fx.export.timing import measure_latency
from dotresize_fx.export.trials import (
    latency_inputs,
    measure_fidelity,
    text_inputs,
    verification_cases,
    verification_inputs,
)
from dotresize_fx.export.verified_onnx import write_verified
from dotresize_fx.graph import Graph
from dotresize_fx.passes.find_blocks import find_blocks
from dotresize_fx.plan_file import write_plan
from dotresize_fx.report.contents import (
    Figures,
    Latency,
    ModelSource,
    PrecisionFigures,
    Report,
    SideFigures,
)
from dotresize_fx.report.write import write_report
from dotresize_fx.task import reads_text

if TYPE_CHECKING:
    from dotresize_fx.slim_result import SlimResult

MACS_LENGTH = 512
PLAN_FILE = "plan.json"
LATENCY_RUNS = 20


def deliver(result: SlimResult, folder: Path, work: Path, *, checkpoint: bool = False) -> Report:
    """Fill ``folder`` with everything OUT holds; ``work`` takes what is not kept.

    Raises:
        CheckpointError: a ``checkpoint`` is wanted and no stock model computes what the slim program does.
        MissingExtraError: ONNX Runtime is not installed.
        FormatError: one of the formats cannot be made or run.
        TargetLatencyError: the slim model is slower than it was to be.
        VerificationError: slim ONNX, or another format, and slim program differ by more than the tolerance.
    """
    require_onnx_runtime()
    progress, options = result.progress, result.options
    require_runtime(options)
    other = Precision(result, options.precision, folder, work) if options.precision else None
    (plain := folder if other is None else work / "slim").mkdir(exist_ok=True)
    slim = write_verified(result, plain, work)
    notes = result.notes + slim.notes
    config, why = result.loaded.config, ""
    if result.slimmed.gone and config is not None:
        gone = [block.number for block in result.slimmed.gone]
        config, why = shallow_config(config, len(find_blocks(result.dense)), gone)
    result.loaded.write_auxiliary_files(folder, config)
    notes += (why,) if why else ()
    if not (result.slimmed.gone or result.slimmed.factorized):  # widths alone would not make this model again
        write_plan(result.slimmed.plan, folder / PLAN_FILE)
    if result.captured.cache is not None:
        why = write_genai_config(result.slim, result.loaded.config, result.captured.longest, folder)
        notes += (why,) if why else ()
    if options.target == "cuda" and provider_of(options) != CUDA:
        notes += ("this ONNX Runtime has no CUDA: latencies are those of the CPU",)
    if other is not None:
        with progress.stage(f"write {other.name}"):
            other.write_slim(slim.path, lambda: verification_cases(result))
            notes += other.notes
    written = None
    if checkpoint:
        with progress.stage("write checkpoint"):
            inputs = chain(text_inputs(result), verification_inputs(result))
            written, said = write_checkpoint(result, folder, inputs, slim.noise)
            notes += said
            gc.collect()
    formats, said = write_formats(result, folder, work, slim.verification.tolerance)
    notes += said
    with progress.stage("measure fidelity", len(result.data.evaluation)) as step:
        fidelity = measure_fidelity(result, step)
    with progress.stage("convert dense to ONNX"):
        gc.collect()
        dense_path = result.dense_onnx or emit_onnx(
            result.loaded.model, result.captured, result.dense, work, options.target
        )
        if other is not None:
            other.write_dense(dense_path)
    with progress.stage("measure latency"):
        fed = {name: value.numpy() for name, value in latency_inputs(result).items()}
        timed = {"dense": dense_path, "slim": slim.path} | (other.paths if other else {})
        latency = measure_latency(timed, fed, runs=LATENCY_RUNS, work=work, provider=provider_of(options))
        if not reads_text(result.task):  # only of a text the second axis is sure to be its length
            latency = {side: replace(found, length=None) for side, found in latency.items()}
    target = None
    if result.clock is not None:
        pair = [other.paths[f"{side} {other.name}"] for side in ("dense", "slim")] if other else [dense_path, slim.path]
        target = prove_target(result, *pair)
    peak_export = peak_rss_bytes()  # without the sessions of what follows
    precisions: tuple[PrecisionFigures, ...] = ()
    if other is not None:
        with progress.stage(f"measure fidelity of {other.name}", 2 * len(result.data.evaluation)) as step:
            precisions = other.figures(latency, step)
    sizes = {"dense": onnx_size(dense_path), "slim": onnx_size(slim.path)}
    length = MACS_LENGTH if reads_text(result.task) else result.dense.attended_length
    peaks = [slim.peak_rss_bytes, *(side.peak_rss_bytes for side in latency.values())]
    figures = Figures(
        dense=side_figures(result.dense, latency["dense"], sizes["dense"], length),
        slim=side_figures(result.slim, latency["slim"], sizes["slim"], length),
        macs_length=length,
        fidelity=(fidelity,),
        verification=slim.verification,
        checkpoint=written,
        precisions=precisions,
        formats=formats,
        latency_target=target,
        peak_export_bytes=peak_export,
        peak_runtime_bytes=max((peak for peak in peaks if peak is not None), default=None),
    )
    report = run_report(
        ModelSource(name=model_name(result.loaded), description=result.loaded.source, task=result.task),
        options,
        result.matches,
        result.slimmed,
        figures,
        folder,
        cache=result.captured.cache is not None,
        inputs_sha256={**result.loaded.sha256, **result.data.sha256},
        notes=notes,
        progress=progress,
        started=result.started,
    )
    write_report(report, folder)
    return report


def side_figures(graph: Graph, latency: Latency, size: int, length: int) -> SideFigures:
    cost = count_cost(graph, length)
    return SideFigures(
        parameters=cost.parameters,
        block_linear_weights=cost.block_linear_weights,
        macs_per_token=cost.macs_per_token,
        block_macs_per_token=cost.block_macs_per_token,
        file_bytes=size,
        latency=latency,
    )
