"""From an ONNX file to a slim one: calibrated, cut, written, proved and measured in ONNX Runtime alone."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dotresize_fx.device import compute_device
from dotresize_fx.errors import NothingToSlimError, UsageError
from dotresize_fx.export.deliver import LATENCY_RUNS, MACS_LENGTH, PLAN_FILE, side_figures
from dotresize_fx.export.fidelity_figures import fidelity_figures
from dotresize_fx.export.genai_config import GENAI_FILE, follow_heads
from dotresize_fx.export.inline_functions import inline_crossed
from dotresize_fx.export.inline_weights import move_out
from dotresize_fx.export.onnx_file import ONNX_FILE, onnx_size
from dotresize_fx.export.onnx_inputs import OnnxData, prepare_onnx_data, rows_of
from dotresize_fx.export.onnx_session import (
    CUDA,
    has_provider,
    provider_on,
    require_onnx_runtime,
    require_provider,
)
from dotresize_fx.export.onnx_source import load_onnx
from dotresize_fx.export.peak_memory import peak_rss_bytes
from dotresize_fx.export.prove_onnx import verify_onnx
from dotresize_fx.export.run_report import run_report
from dotresize_fx.export.shallow_config import CONFIG_FILE, follow_depth
from dotresize_fx.export.timing import measure_latency
from dotresize_fx.export.trials import VERIFIED_BATCHES
from dotresize_fx.export.weight_files import file_sha256
from dotresize_fx.export.why_nothing import quantised_linears, why_nothing
from dotresize_fx.export.write_onnx import LARGE, Stated, check_written, write_onnx
from dotresize_fx.onnx_form.execution import OnnxExecution
from dotresize_fx.onnx_form.graph import OnnxGraph
from dotresize_fx.onnx_form.runtime_values import to_numpy
from dotresize_fx.onnx_form.start import cache_heads, is_past
from dotresize_fx.options import Options
from dotresize_fx.passes.canonicalise import canonicalise
from dotresize_fx.passes.choose_regions import SWEPT
from dotresize_fx.passes.find_blocks import find_blocks
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.merge_graph import check_merge
from dotresize_fx.passes.reduce_onnx_graph import reduce_onnx_graph
from dotresize_fx.passes.slim_onnx_graph import OnnxGraphs, SlimmedOnnx, attended_length, slim_onnx_graph
from dotresize_fx.plan_file import read_plan, write_plan
from dotresize_fx.program_inputs import Inputs
from dotresize_fx.progress import Progress
from dotresize_fx.report.contents import (
    DecoderFidelity,
    EncoderFidelity,
    Figures,
    ModelSource,
    OutputFidelity,
    Report,
)
from dotresize_fx.report.write import write_report
from dotresize_fx.structure_options import changes_structure
from dotresize_fx.task import reads_text

# What lies beside a model and goes with it, as it is.
COMPANIONS = (
    *("config.json", "generation_config.json", "preprocessor_config.json", "chat_template.jinja"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.txt", "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model"),
)


@dataclass
class _Run:
    """One run, as far as it has come."""

    path: Path
    stated: Stated
    graphs: OnnxGraphs
    prepared: OnnxData
    slimmed: SlimmedOnnx
    options: Options
    progress: Progress
    started: float
    device: str


def slim_onnx_file(name: str, folder: Path, work: Path, options: Options, progress: Progress, started: float) -> Report:
    """Fill ``folder`` with the slim file, what lay beside the dense one, the plan and the reports.

    ``started``: when the command was, by ``time.perf_counter``.

    Raises:
        UsageError: an option asks for what an ONNX file cannot give.
        ModelNotFoundError, BadWeightsError: see :func:`load_onnx`.
        CalibrationError: see :func:`prepare_onnx_data`.
        NothingToSlimError: no width can be cut; the message says why.
        SolverError: see :func:`slim_onnx_graph`.
        VerificationError: what was written is not what was solved for.
    """
    run = _slimmed(name, work, options, progress, started)
    with progress.stage("write ONNX"):
        path = write_onnx(run.slimmed, run.stated, _timed(run), folder, work, run.device)
        beside = _copy_beside(run, folder)
        if not (run.slimmed.gone or run.slimmed.factorized):  # widths alone would not make this model again
            write_plan(run.slimmed.plan, folder / PLAN_FILE)
    with progress.stage("verify in ONNX Runtime"):
        notes = check_written(run.path, path, run.slimmed)
        verification = verify_onnx(run.graphs.given, run.slimmed, path, _verified(run), work, run.device)
    with progress.stage("measure fidelity", len(run.prepared.data.evaluation)) as step:
        fidelity = _fidelity(run, step)
    peak = peak_rss_bytes()
    with progress.stage("measure latency"):
        gc.collect()
        sides = {"dense": run.graphs.given, "slim": run.slimmed.graph}
        fed = {side: OnnxExecution(graph).completed(_timed(run)) for side, graph in sides.items()}
        inputs = {name: to_numpy(value) for name, value in fed["slim"].items() if not is_past(name)}
        # An empty cache is each side's own: its heads may differ.
        own = {side: {n: to_numpy(value) for n, value in given.items() if is_past(n)} for side, given in fed.items()}
        models = {"dense": run.path, "slim": path}
        provider = provider_on(run.device)
        latency = measure_latency(models, inputs, runs=LATENCY_RUNS, work=work, own=own, provider=provider)
    length = MACS_LENGTH if reads_text(run.prepared.task) else attended_length(run.graphs.canonical, _timed(run))
    figures = Figures(
        dense=side_figures(run.slimmed.dense, latency["dense"], onnx_size(run.path), length),
        slim=side_figures(run.slimmed.graph, latency["slim"], onnx_size(path), length),
        macs_length=length,
        fidelity=(fidelity,),
        verification=verification,
        peak_export_bytes=peak,
        peak_runtime_bytes=max((side.peak_rss_bytes or 0 for side in latency.values()), default=0) or None,
    )
    report = run_report(
        _source(run),
        run.options,
        run.graphs.matches,
        run.slimmed,
        figures,
        folder,
        cache=any(is_past(str(value.name)) for value in run.graphs.given.model.graph.inputs),
        inputs_sha256={run.path.name: file_sha256(run.path), **run.prepared.data.sha256},
        notes=(*run.prepared.notes, *run.slimmed.notes, *beside, *notes),
        progress=run.progress,
        started=run.started,
    )
    write_report(report, folder)
    return report


def _slimmed(name: str, work: Path, options: Options, progress: Progress, started: float) -> _Run:
    require_onnx_runtime()
    _refuse(options)
    plan = None if options.plan is None else read_plan(options.plan)
    torch.manual_seed(options.seed)
    path = Path(name) / ONNX_FILE if Path(name).is_dir() else Path(name)
    with progress.stage("load"):
        model = load_onnx(_on_disk(path, work))
        stated = Stated.by(path)
    with progress.stage("find regions"):
        model, inlined = inline_crossed(model) if options.ratio != 0 or plan is not None else (model, ())
        given = OnnxGraph(model)
        canonical = given.copy()
        canonicalise(canonical, check=options.check)
        graphs = OnnxGraphs(given, canonical, find_regions(canonical))
    reduces = changes_structure(options) and options.ratio != 0
    if options.ratio != 0 and not reduces and not any(graphs.matches.of_kind(*SWEPT)):
        why = why_nothing(model, graphs.matches)
        raise NothingToSlimError(f"{path.name}: no region matched: {why}; `dotresize-fx inspect` shows all of it")
    if options.merge is not None:
        check_merge(graphs.canonical, options.merge, options.merge_method or "mka")
    device = _device(options)
    with progress.stage("read calibration inputs"):
        prepared = prepare_onnx_data(given, path, options, device)
        rows = _count_rows(graphs, prepared, device)
    batches = prepared.data.calibration
    if reduces:
        slimmed = reduce_onnx_graph(graphs, batches, options, progress, task=prepared.task, device=device)
    else:
        slimmed = slim_onnx_graph(
            graphs, batches, options, progress, task=prepared.task, rows=rows, plan=plan, device=device
        )
    if quantised := quantised_linears(graphs.matches):
        inlined += (f"{quantised} linears with quantised weights were left alone",)
    slimmed = replace(slimmed, notes=(*inlined, *slimmed.notes))
    return _Run(path, stated, graphs, prepared, slimmed, options, progress, started, device)


def _device(options: Options) -> str:
    """Where ONNX Runtime runs: on a GPU where it is asked for, or where torch and ONNX Runtime both have it.

    Raises:
        MissingExtraError: a GPU was asked for, of which this ONNX Runtime knows nothing.
    """
    device = compute_device(options)
    if device == "cuda" and options.device == "cuda":
        require_provider(CUDA, "--device cuda: ")
    return device if device == "cpu" or has_provider(CUDA) else "cpu"


def _count_rows(graphs: OnnxGraphs, prepared: OnnxData, device: str) -> Callable[[Inputs], int]:
    """How many rows a batch makes for the readers of regions, about: in proportion to what is in it."""
    first = next((region.readers[0] for region in graphs.matches.regions if region.readers), None)
    if first is None:
        return prepared.inputs.samples
    value, sample = graphs.canonical.op(first).inputs[0].name, prepared.data.calibration[0]
    rows = rows_of(graphs.given, OnnxExecution(graphs.given, device), sample, value)
    each = rows / max(1, _numbers(sample))
    return lambda batch: round(each * _numbers(batch))


def _numbers(batch: Inputs) -> int:
    return sum(value.numel() for value in batch.values())


def _copy_beside(run: _Run, folder: Path) -> tuple[str, ...]:
    """What lies beside the dense file, or with its tokenizer; notes."""
    for source in (run.path.parent, run.options.tokenizer):
        for companion in COMPANIONS:
            if source is not None and (file := source / companion).is_file():
                shutil.copyfile(file, folder / companion)
    notes: tuple[str, ...] = ()
    if (gone := run.slimmed.gone) and (config := folder / CONFIG_FILE).is_file():
        count = len(find_blocks(run.slimmed.dense))
        notes = (follow_depth(config, count, [block.number for block in gone]),)
    if not (config := run.path.with_name(GENAI_FILE)).is_file():
        return tuple(filter(None, notes))
    inputs = run.slimmed.graph.model.graph.inputs
    heads = {cache_heads(value) for value in inputs if is_past(str(value.name))}
    return tuple(filter(None, (*notes, follow_heads(config, heads, folder, len(gone)))))


def _on_disk(path: Path, work: Path) -> Path:
    """Of a large file with its weights inside, a copy with them beside it, which are then read when they are wanted."""
    if path.is_file() and path.stat().st_size >= LARGE:
        (folder := work / "spooled").mkdir()
        try:
            return move_out(path, folder)
        except ValueError:  # loading it says what is wrong
            shutil.rmtree(folder)
    return path


def _refuse(options: Options) -> None:
    """
    Raises:
        UsageError: an option needs the model's program, of which an ONNX file has none.
    """
    wanted = {
        f"--effort {options.effort}": options.effort != "fast",
        "--checkpoint": options.checkpoint,
        f"--format {','.join(options.formats)}": bool(set(options.formats) - {"onnx"}),
        f"--dtype {options.dtype}": options.dtype != "float32",
        f"--quantize {options.quantize}": options.quantize is not None,
        f"--target {options.target}": options.target != "any",
        "--target-latency and --profile": options.by_the_clock,
        f"--basis {options.basis}": options.basis != "shared",
    }
    if options.methods:
        raise UsageError(
            f"--methods {','.join(options.methods)}: one budget for all is planned for programs alone yet: take "
            "--ratio, --method rank or --merge"
        )
    if asked := [option for option, said in wanted.items() if said]:
        raise UsageError(
            f"{asked[0]}: not for an ONNX file, which stays what it is but for widths, ranks and depth: leave it out"
        )


def _verified(run: _Run) -> list[Inputs]:
    """One sample alone, where a run takes that, and batches that did not calibrate."""
    held_out, inputs = run.prepared.data.evaluation, run.prepared.inputs
    alone = [inputs.part(held_out[0], 0, 1)] if inputs.batch and inputs.batch_size is None else []
    return [*alone, *held_out[:VERIFIED_BATCHES]]


def _timed(run: _Run) -> Inputs:
    inputs, batch = run.prepared.inputs, run.prepared.data.evaluation[0]
    one = inputs.part(batch, 0, inputs.batch_size or 1)
    if not reads_text(run.prepared.task):
        return one
    return {name: value[:, : run.options.latency_length] for name, value in one.items()}


def _fidelity(run: _Run, step: Callable[[], None]) -> DecoderFidelity | EncoderFidelity | OutputFidelity:
    """The slim graph against the dense one on what did not calibrate."""
    graphs = run.graphs.given, run.slimmed.graph
    dense, slim = (OnnxExecution(graph, run.device).whole(first=True) for graph in graphs)
    prepared = run.prepared
    return fidelity_figures(
        lambda batch: dense(batch)[0].float(),
        lambda batch: slim(batch)[0].float(),
        prepared.data,
        prepared.task,
        prepared.predicts,
        step,
    )


def _source(run: _Run) -> ModelSource:
    model = run.graphs.given.model
    made = " ".join(part for part in (model.producer_name, model.producer_version) if part)
    described = f"ONNX file {run.path.name}{f' of {made}' if made else ''}"
    return ModelSource(name=run.path.name, description=described, task=run.prepared.task)
