"""The compiler: a model in, a slim one out. The pipeline, in the order of docs/idea.md."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dotresize_fx.calibration import CalibrationData, Inputs, load_text, prepare_data
from dotresize_fx.cost import one_stream
from dotresize_fx.device import compute_device, computes_in_half, free_on_gpu, held_bytes, stream_place
from dotresize_fx.errors import UsageError
from dotresize_fx.export.analyse import analyse
from dotresize_fx.export.check_depth import check_depth
from dotresize_fx.export.check_text import check_length, check_tokenizer, longest_text
from dotresize_fx.export.formats import require_formats
from dotresize_fx.export.model_source import LoadedModel
from dotresize_fx.export.module_source import Examples
from dotresize_fx.export.onnx_file import ONNX_FILE
from dotresize_fx.export.onnx_source import analyse_onnx, is_onnx_source
from dotresize_fx.export.open_model import Model, open_model, reads_given_inputs
from dotresize_fx.forecast import stream_bytes
from dotresize_fx.graph import Graph
from dotresize_fx.input_batches import Given, prepare_given
from dotresize_fx.journal import FOLDER, Journal, export_of
from dotresize_fx.launched import Launched
from dotresize_fx.offload.stored_tensors import Spool
from dotresize_fx.options import SEQUENCE_LENGTH, Options
from dotresize_fx.passes.choose_regions import why_not_cut
from dotresize_fx.passes.follow_plan import check_plan
from dotresize_fx.passes.merge_graph import check_merge
from dotresize_fx.plan_file import read_plan
from dotresize_fx.progress import Progress
from dotresize_fx.regions import MatchReport
from dotresize_fx.slim_on_device import alone_or_together, slim_on_device
from dotresize_fx.slim_result import SlimResult, task_of

if TYPE_CHECKING:
    from dotresize_fx.report.contents import Report

READ_AS_NEEDED = (
    "weights were read from the model's files as they were needed, block by block: all of them would have taken too "
    "much of the memory (--memory-budget; what of files is mapped counts in the peak that is told)"
)

IN_HALF = "calibration took products of activations in bfloat16, summed in float32 and more (--compute-dtype)"

__all__ = ["SlimResult", "analyse", "compute_device", "export", "inspect", "slim"]


def slim(
    model: Model,
    ratio: float | None = None,
    *,
    example_inputs: Examples | None = None,
    calibration: Path | str | Iterable[Path | str] | Iterable[Given] = (),
    work: Path | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> SlimResult:
    """Slim a model by ``ratio`` of its block linear weights, or of what the option ``cost`` names.

    Args:
        model: a local Hugging Face folder, a GGUF file, a hub id, a built-in name, a program that torch.export saved
            (``.pt2``) or gave, a module, or what ``load_model`` returned.
        ratio: share to remove, 0 <= ratio < 1; None is 0.2, or what the option ``plan`` says.
        example_inputs: of a module: keyword arguments (a dict), positional ones (a tuple) or the only one (a tensor) of
            its forward pass, two samples or more along the first axis where it has one.
        calibration: text files (.txt, .jsonl); without any, the text that every Python carries. For a module or a
            program: batches of inputs, each a dict, a tuple or a tensor, or .npz files or folders of them.
        work: folder for finished sublayers, if they are to be written; a run that finds its own there goes on from
            them.
        options: further fields of :class:`dotresize_fx.options.Options`.

    In a script under torchrun every process calls this: rank 0 gets the result, which the others help to calibrate or
    to heal before they leave the script here, with SystemExit(0).

    Raises:
        DotresizeError: whatever is wrong with model, text or options, one class a kind.
    """
    files: list[Any] = [calibration] if isinstance(calibration, (str, Path)) else list(calibration)
    in_memory = bool(files) and reads_given_inputs(model) and not all(isinstance(file, (str, Path)) for file in files)
    paths = () if in_memory else tuple(Path(file) for file in files)
    texts, data = ((), paths) if reads_given_inputs(model) else (paths, ())
    chosen = Options(ratio=ratio, calibration=texts, calibration_data=data, **options)
    progress = progress or Progress(quiet=True)
    with alone_or_together(chosen, progress) as launched:
        return slim_with(
            chosen,
            model,
            launched,
            progress=progress,
            work=work,
            example_inputs=example_inputs,
            batches=files if in_memory else None,
        )


def slim_with(
    chosen: Options,
    model: Model,
    launched: Launched,
    *,
    progress: Progress,
    work: Path | None = None,
    trust_remote_code: bool = False,
    example_inputs: Examples | None = None,
    batches: Sequence[Given] | None = None,
) -> SlimResult:
    """:func:`slim` with its options checked and gathered, on rank 0; ``batches`` are a module's inputs in memory."""
    started = time.perf_counter()
    torch.manual_seed(chosen.seed)
    if isinstance(model, (str, Path)) and is_onnx_source(model):
        raise UsageError(f"{model}: an ONNX file is slimmed by the command line: dotresize-fx export")
    given = reads_given_inputs(model)
    _check_kind(chosen, given, batches)
    if launched.count > 1 and chosen.memory_budget is not None:
        raise UsageError(
            "--memory-budget is for one process: what others are handed is held in memory: leave it out, or torchrun"
        )
    # What is wrong with these is said before the model is loaded.
    require_formats(chosen.formats, given)
    text = None if given else load_text(chosen.calibration)
    plan = None if chosen.plan is None else read_plan(chosen.plan)
    device = compute_device(chosen)
    with progress.stage("load"):
        # What other processes are to be handed is held in memory.
        alone = launched.count == 1
        memory = replace(chosen.memory, lazy=chosen.memory.lazy and alone, gpu=free_on_gpu(device))
        loaded = open_model(model, example_inputs, trust_remote_code=trust_remote_code, memory=memory)
    if text is not None:
        check_tokenizer(loaded)
        check_length(chosen.sequence_length, longest_text(loaded.model), SEQUENCE_LENGTH)
    check_depth(loaded, chosen.merge)
    captured, dense, matches = analyse(loaded, progress, check=chosen.check, cache=chosen.cache)
    if plan is not None and chosen.basis == "shared":  # other bases part the stream first, into regions of their own
        check_plan(plan, matches, chosen.method)
    if chosen.merge is not None:
        check_merge(dense, chosen.merge, chosen.merge_method or "mka")
    factors: Mapping[str, int] = {}
    if chosen.checkpoint and chosen.ratio != 0:
        from dotresize_fx.export.rehearse_checkpoint import rehearse_checkpoint
        from dotresize_fx.export.rehearse_depth import rehearse_depth

        with progress.stage("rehearse the checkpoint"):
            if chosen.merge is not None:
                rehearse_depth(loaded, captured, chosen)
            else:
                factors = rehearse_checkpoint(loaded, captured, matches, chosen, plan)
    task = task_of(loaded, captured)
    half = computes_in_half(chosen, loaded.stored, device)
    chosen = replace(chosen, repair_steps=chosen.steps_that_repair(task))
    own: Sequence[Inputs] = ()
    if text is None:
        assert captured.inputs is not None
        data = prepare_given(batches, chosen.calibration_data, captured.inputs, dense, captured.sample, device)
    else:
        chosen = replace(chosen, calibration_tokens=chosen.tokens_that_calibrate(task))
        data = prepare_data(text, chosen, loaded.tokenizer, task, captured.longest, device)
        own = _own_text(loaded, data, chosen, device, progress)
    with _work_folder(work) as folder:
        if loaded.lazy:
            counts = [next(iter(batch.values())).numel() for batch in data.calibration]
            largest = one_stream(dense, max(counts))
            place = stream_place(memory, stream_bytes(dense, sum(counts)), device, largest)
            dense.spool = Spool(folder, streams=place, held=held_bytes(memory, device))
        clock = None
        if chosen.by_the_clock and chosen.ratio != 0:
            from dotresize_fx.export.latency_target import start_clock

            clock = start_clock(loaded.model, captured, dense, matches, chosen, progress, folder)
        journal = None
        if work is not None and launched.count == 1 and loaded.sha256:  # else nothing tells one model from another
            journal = Journal(work / FOLDER, export_of(chosen, loaded.sha256, data, plan, device, half=half))
            if journal.other:
                progress.show(f"not taken up: {journal.other}")
        slimmed = slim_on_device(
            *(dense, matches, data, own, plan, chosen, progress, journal, task, launched, factors, clock), half=half
        )
    return SlimResult(
        loaded,
        captured,
        dense,
        slimmed,
        matches,
        data,
        chosen,
        progress,
        notes=(
            *((READ_AS_NEEDED,) if loaded.lazy else ()),
            *((IN_HALF,) if half else ()),
            *captured.notes,
            *slimmed.notes,
        ),
        clock=clock,
        dense_onnx=None if clock is None or work is None else work / ONNX_FILE,
        started=started,
    )


@contextmanager
def _work_folder(work: Path | None) -> Iterator[Path]:
    """The given one, or one that goes at the end."""
    with nullcontext(work) if work is not None else tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _check_kind(options: Options, given: bool, batches: Sequence[Given] | None) -> None:
    """
    Raises:
        UsageError: text for a model that reads other inputs, or the other way round.
    """
    if options.tokenizer is not None:
        raise UsageError("--tokenizer is for ONNX files: any other model has its own or reads no text: leave it out")
    if given and options.calibration:
        raise UsageError("--calibration is text, which a module or a program does not read: give --calibration-data")
    if not given and options.calibration_data:
        raise UsageError("--calibration-data is for modules and programs: a model with a tokenizer takes --calibration")
    if given and not options.calibration_data and not batches:
        raise UsageError(
            "a module or a program calibrates on inputs of its own: give --calibration-data (calibration in Python)"
        )
    if given and options.effort == "heal":
        raise UsageError("--effort heal distils on text, which a module or a program does not read: use best")


def _own_text(
    loaded: LoadedModel, data: CalibrationData, options: Options, device: str, progress: Progress
) -> Sequence[Inputs]:
    """Batches that the dense model writes itself, shaped like the calibration's; none where none are asked for."""
    rows, length = data.calibration[0]["input_ids"].shape
    count = options.own_tokens(loaded.task, device) // length
    if count == 0:
        return ()
    from dotresize_fx.export.sample_text import sample_rows

    with progress.stage("sample the model's own text"):
        ids = sample_rows(loaded, rows=count, length=length, seed=options.seed, device=device)
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in torch.split(ids, rows)]


def export(
    name: str, out: Path, options: Options, *, force: bool, trust_remote_code: bool, progress: Progress, started: float
) -> Report:
    """The command line's main job: ``slim`` and ``save`` with finished blocks in a work folder beside ``out``.

    ``started``: when the command was, by ``time.perf_counter``.
    """
    from dotresize_fx.export.deliver import deliver
    from dotresize_fx.export.onnx_session import require_onnx_runtime
    from dotresize_fx.export.output_folder import OutputFolder
    from dotresize_fx.export.precision import require_runtime
    from dotresize_fx.export.slim_onnx import slim_onnx_file

    progress.seconds["start"] = time.perf_counter() - started  # imports, mostly
    if is_onnx_source(name):
        with OutputFolder(out, force, name, check=progress.check) as folder:
            return slim_onnx_file(name, folder.partial, folder.work, options, progress, started)
    # Outermost, so that OUT is settled before this process ends for another's failure.
    with alone_or_together(options, progress) as launched:
        require_onnx_runtime()
        require_runtime(options)
        with OutputFolder(out, force, name, check=progress.check) as folder:
            result = slim_with(
                options, name, launched, trust_remote_code=trust_remote_code, progress=progress, work=folder.work
            )
            result = replace(result, started=started)
            return deliver(result, folder.partial, folder.work, checkpoint=options.checkpoint)


def inspect(name: str, *, trust_remote_code: bool, progress: Progress) -> tuple[MatchReport, dict[str, str]]:
    """The match report, and for regions that are matched and still not cut the reason."""
    graph: Graph
    if is_onnx_source(name):
        graph, matches = analyse_onnx(name, progress)
    else:
        with progress.stage("load"):
            loaded = open_model(name, trust_remote_code=trust_remote_code)
        _, graph, matches = analyse(loaded, progress)
    reasons = {region.name: why_not_cut(graph, region) for region in matches.regions}
    return matches, {region: why for region, why in reasons.items() if why}
