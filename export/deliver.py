"""Deliver: emit both models, prove the slim one in ONNX Runtime, measure it beside the dense one, report."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dotresize_fx.cost import count_cost
from dotresize_fx.errors import VerificationError
from dotresize_fx.export.cached_runs import continued, onnx_inputs, splits
from dotresize_fx.export.checkpoint import write_checkpoint
from dotresize_fx.export.emit_onnx import emit_onnx
from dotresize_fx.export.fused_ops import count_fused_ops
from dotresize_fx.export.genai_config import write_genai_config
from dotresize_fx.export.onnx_file import onnx_size
from dotresize_fx.export.onnx_runtime import compare_outputs
from dotresize_fx.export.onnx_session import require_onnx_runtime
from dotresize_fx.export.open_model import model_name
from dotresize_fx.export.peak_memory import peak_rss_bytes
from dotresize_fx.export.timing import measure_latency
from dotresize_fx.export.trials import latency_inputs, mask_name, measure_fidelity, text_inputs, verification_inputs
from dotresize_fx.export.weight_files import file_sha256
from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.gram import padding_input
from dotresize_fx.plan_file import write_plan
from dotresize_fx.regions import SEPARATOR
from dotresize_fx.report.contents import (
    Figures,
    Latency,
    LinearRole,
    LinearRow,
    ModelSource,
    RegionRow,
    Report,
    SideFigures,
    Verification,
)
from dotresize_fx.report.provenance import package_versions, this_machine
from dotresize_fx.report.write import write_report
from dotresize_fx.task import reads_text

if TYPE_CHECKING:
    from dotresize_fx.compiler import SlimResult

MACS_LENGTH = 512
PLAN_FILE = "plan.json"
# What a model that reads no text was not asked.
TEXT_OPTIONS = ("calibration", "calibration_tokens", "sequence_length", "evaluation_tokens", "latency_length")
LATENCY_RUNS = 20
# Two runtimes sum in other orders in every op, which is some roundings more than one in every weight.
ROUNDINGS = 4


def deliver(result: SlimResult, folder: Path, work: Path, *, checkpoint: bool = False) -> Report:
    """Fill ``folder`` with everything OUT holds; ``work`` takes what is not kept.

    Raises:
        CheckpointError: a ``checkpoint`` is wanted and no stock model computes what the slim program does.
        MissingExtraError: ONNX Runtime is not installed.
        VerificationError: slim ONNX and slim program differ by more than the tolerance.
    """
    require_onnx_runtime()
    progress, options = result.progress, result.options
    with progress.stage("convert slim to ONNX"):
        path = emit_onnx(result.loaded.model, result.captured, result.slim, folder, options.target)
        result.loaded.write_auxiliary_files(folder)
        write_plan(result.slimmed.plan, folder / PLAN_FILE)
        notes = result.notes
        if result.captured.cache is not None:
            why = write_genai_config(result.slim, result.loaded.config, result.captured.longest, folder)
            notes += (why,) if why else ()
        if options.target != "any":
            notes += (count_fused_ops(path, options.target),)
    with progress.stage("verify in ONNX Runtime"):
        comparison = compare_outputs(path, _cases(result), work, mask=mask_name(result))
        allowed = options.tolerance
        if comparison.max_abs_difference > allowed:
            noise = _rounding_noise(result)
            allowed = max(allowed, ROUNDINGS * noise)
            notes += (
                f"the slim model amplifies rounding: weights moved by their last bit move its outputs by {noise:.1e}, "
                f"so {ROUNDINGS} times that is allowed between program and ONNX",
            )
        verification = Verification(
            max_abs_difference=comparison.max_abs_difference,
            tolerance=allowed,
            max_abs_output=comparison.max_abs_expected,
            cases=len(comparison.cases),
        )
    if not verification.passed:
        raise VerificationError(
            f"the slim ONNX differs from the slim program by {comparison.max_abs_difference:.2e} "
            f"(tolerance {allowed:.0e}): nothing was written; please report this model"
        )
    written = None
    if checkpoint:
        with progress.stage("write checkpoint"):
            noise = 0.0 if comparison.max_abs_difference <= options.tolerance else allowed
            written, said = write_checkpoint(
                result, folder, chain(text_inputs(result), verification_inputs(result)), noise
            )
            notes += said
            gc.collect()
    with progress.stage("measure fidelity", len(result.data.evaluation)) as step:
        fidelity = measure_fidelity(result, step)
    with progress.stage("convert dense to ONNX"):
        gc.collect()
        dense_path = emit_onnx(result.loaded.model, result.captured, result.dense, work, options.target)
    with progress.stage("measure latency"):
        inputs = {name: value.numpy() for name, value in latency_inputs(result).items()}
        latency = measure_latency({"dense": dense_path, "slim": path}, inputs, runs=LATENCY_RUNS, work=work)
        if not reads_text(result.task):  # only of a text the second axis is sure to be its length
            latency = {side: replace(found, length=None) for side, found in latency.items()}
    sizes = {"dense": onnx_size(dense_path), "slim": onnx_size(path)}
    length = MACS_LENGTH if reads_text(result.task) else result.dense.attended_length
    peaks = [comparison.peak_rss_bytes, *(side.peak_rss_bytes for side in latency.values())]
    figures = Figures(
        dense=_side(result.dense, latency["dense"], sizes["dense"], length),
        slim=_side(result.slim, latency["slim"], sizes["slim"], length),
        macs_length=length,
        fidelity=(fidelity,),
        verification=verification,
        checkpoint=written,
        peak_export_bytes=peak_rss_bytes(),
        peak_runtime_bytes=max((peak for peak in peaks if peak is not None), default=None),
    )
    report = _report(result, figures, folder, notes)
    write_report(report, folder)
    return report


def _cases(result: SlimResult) -> Iterator[tuple[dict[str, Any], list[Any]]]:
    """Inputs and outputs of the program; with a cache, the last tokens are also left to be run behind the others."""
    execution = Execution(result.slim, caches=True)
    for inputs in verification_inputs(result):
        expected = execution.outputs(inputs)
        yield onnx_inputs(result.slim, inputs), [output.numpy() for output in expected]
        if result.captured.cache is None:
            continue
        for past in splits(inputs["attention_mask"]):
            before = [output[:, :, :past] for output in expected[1:]]
            given = continued(result.slim, inputs, before, past)
            behind = [expected[0][:, past:], *expected[1:]]
            yield onnx_inputs(result.slim, given), [output.numpy() for output in behind]


@torch.no_grad()
def _rounding_noise(result: SlimResult) -> float:
    """How far the slim program's outputs move, at real positions, when every weight moves by about its last bit."""
    moved = result.slim.copy()
    generator = torch.Generator().manual_seed(result.options.seed)
    weights = moved.program.state_dict
    for name, weight in weights.items():
        if weight.is_floating_point():
            last_bit = torch.finfo(weight.dtype).eps / 2
            weights[name] = weight * (1 + last_bit * torch.randn(weight.shape, generator=generator))
    largest = 0.0
    for inputs in verification_inputs(result):
        mask = padding_input(inputs)
        for one, other in zip(*(Execution(graph).outputs(inputs) for graph in (result.slim, moved)), strict=True):
            moves = (one - other).abs()
            real = moves[mask.bool()] if mask is not None and moves.shape[:2] == mask.shape else moves
            largest = max(largest, float(real.max()))
    return largest


def _side(graph: Any, latency: Latency, size: int, length: int) -> SideFigures:
    cost = count_cost(graph, length)
    return SideFigures(
        parameters=cost.parameters,
        block_linear_weights=cost.block_linear_weights,
        macs_per_token=cost.macs_per_token,
        block_macs_per_token=cost.block_macs_per_token,
        file_bytes=size,
        latency=latency,
    )


def _report(result: SlimResult, figures: Figures, folder: Path, notes: tuple[str, ...]) -> Report:
    left_out = {"seed"} if reads_text(result.task) else {"seed", *TEXT_OPTIONS}
    options = {key: value for key, value in asdict(result.options).items() if key not in left_out}
    seconds = {**result.progress.seconds, "total": time.perf_counter() - result.started}
    return Report(
        tool_version=version("dotresize-fx"),
        packages=package_versions(),
        machine=this_machine(torch.get_num_threads()),
        model=ModelSource(
            name=model_name(result.loaded),
            description=result.loaded.source,
            task=result.task,
        ),
        options=options,
        seed=result.options.seed,
        cache=result.captured.cache is not None,
        inputs_sha256={**result.loaded.sha256, **result.data.sha256},
        outputs_sha256={
            file.relative_to(folder).as_posix(): file_sha256(file)
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        },
        regions=_region_rows(result),
        linears=_linear_rows(result),
        figures=figures,
        stage_seconds=seconds,
        notes=notes,
    )


def _region_rows(result: SlimResult) -> tuple[RegionRow, ...]:
    swept = {entry.region.name: entry for entry in result.swept}
    names = {row.op: row.parameter.removesuffix(".weight") for row in result.matches.linears}
    rows = []
    known = {region.name for region in result.matches.regions}
    parted = [entry.region for entry in result.swept if entry.region.name not in known]  # a post-norm stream
    for region in (*result.matches.regions, *parted):
        entry = swept.get(region.name)
        rows.append(
            RegionRow(
                name=region.name,
                kind=region.kind.value,
                symmetry=region.symmetry.value,
                width_before=region.width,
                width_after=entry.width if entry else region.width,
                writers=tuple(names.get(op, op) for op in region.writers),
                readers=tuple(names.get(op, op) for op in region.readers),
                method=entry.method if entry else None,
                error=entry.error if entry else None,
                notes=dict(entry.notes) if entry else {},
            )
        )
    return tuple(rows)


def _linear_rows(result: SlimResult) -> tuple[LinearRow, ...]:
    rows = []
    for match in result.matches.linears:
        roles = []
        if match.reads is not None:
            roles += [LinearRole(region=name, role="reader") for name in match.reads.split(SEPARATOR)]
        if match.writes is not None:
            roles += [LinearRole(region=name, role="writer") for name in match.writes.split(SEPARATOR)]
        name = match.parameter.removesuffix(".weight")
        rows.append(LinearRow(name=name, shape=match.shape, roles=tuple(roles), reason=match.reason))
    return tuple(rows)
