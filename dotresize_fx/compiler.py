"""The compiler: a model in, a slim one out. The pipeline, in the order of docs/idea.md."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dotresize_fx.calibration import CalibrationData, Inputs, load_text, prepare_data
from dotresize_fx.errors import CaptureError, UsageError
from dotresize_fx.export.capture import Captured, capture
from dotresize_fx.export.model_source import LoadedModel, load_model
from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.launched import Launched
from dotresize_fx.options import Options
from dotresize_fx.passes.canonicalise import canonicalise
from dotresize_fx.passes.choose_regions import why_not_cut
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.slim_graph import Slimmed, slim_graph
from dotresize_fx.plan_file import read_plan
from dotresize_fx.progress import Progress
from dotresize_fx.regions import MatchReport
from dotresize_fx.sweep import SweptRegion, is_held_out
from dotresize_fx.width_plan import WidthPlan

if TYPE_CHECKING:
    from dotresize_fx.healing.hand_out import Handed
    from dotresize_fx.report.contents import Report

# Two float32 runs of one function differ by rounding only; a wrong capture differs by the size of its outputs.
CAPTURE_TOLERANCE = 1e-4
UNTRACED_LENGTH = 7
# A step of healing on a CPU, which has neither the memory nor the time for a GPU's.
CPU_TOKENS = 1024


@dataclass
class SlimResult:
    """A slim program beside the dense one it came from. ``save`` emits, proves and measures it."""

    loaded: LoadedModel
    captured: Captured
    dense: FxGraph
    slimmed: Slimmed
    matches: MatchReport
    data: CalibrationData
    options: Options
    progress: Progress
    notes: tuple[str, ...] = ()
    started: float = field(default_factory=time.perf_counter)

    @property
    def slim(self) -> FxGraph:
        """The slim program."""
        return self.slimmed.graph

    @property
    def swept(self) -> tuple[SweptRegion, ...]:
        """What was cut."""
        return self.slimmed.swept

    def save(self, out: Path | str, *, force: bool = False, checkpoint: bool | None = None) -> Report:
        """Write model.onnx, its weights, config, tokenizer and the two reports into ``out``; returns the report.

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


def slim(
    model: str | Path | LoadedModel,
    ratio: float | None = None,
    *,
    calibration: Path | str | Sequence[Path | str] = (),
    work: Path | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> SlimResult:
    """Slim a model by ``ratio`` of its block linear weights, or of what the option ``cost`` names.

    Args:
        model: a local Hugging Face folder, a GGUF file, a hub id, a built-in name, or what ``load_model`` returned.
        ratio: share to remove, 0 <= ratio < 1; None is 0.2, or what the option ``plan`` says.
        calibration: text files (.txt, .jsonl); without any, the text that every Python carries.
        work: folder for finished blocks, if they are to be written.
        options: further fields of :class:`dotresize_fx.options.Options`.

    In a script under torchrun every process calls this: rank 0 gets the result, which the others help to heal before
    they leave the script here, with SystemExit(0).

    Raises:
        DotresizeError: whatever is wrong with model, text or options, one class a kind.
    """
    files = [calibration] if isinstance(calibration, (str, Path)) else list(calibration)
    chosen = Options(ratio=ratio, calibration=tuple(Path(file) for file in files), **options)
    progress = progress or Progress(quiet=True)
    with _together(chosen, progress) as launched:
        return slim_with(chosen, model, launched, progress=progress, work=work)


@contextmanager
def _together(options: Options, progress: Progress) -> Iterator[Launched]:
    """Rank 0 goes on with the block; other ranks help it to heal and end here, with SystemExit(0)."""
    device = compute_device(options)
    with Launched(device, options.effort, progress.show) as launched:
        if launched.rank > 0:
            if launched.wait(progress.check):
                from dotresize_fx.healing.hand_out import take

                with launched.called():
                    _heal(take(device), options, Progress(quiet=True, check=progress.check))
            raise SystemExit(0)
        yield launched


def slim_with(
    chosen: Options,
    model: str | Path | LoadedModel,
    launched: Launched,
    *,
    progress: Progress,
    work: Path | None = None,
    trust_remote_code: bool = False,
) -> SlimResult:
    """:func:`slim` with its options checked and gathered, on rank 0."""
    started = time.perf_counter()
    torch.manual_seed(chosen.seed)
    text = load_text(chosen.calibration)  # what is wrong with these is said before the model is loaded
    plan = None if chosen.plan is None else read_plan(chosen.plan)
    with progress.stage("load"):
        loaded = (
            model if isinstance(model, LoadedModel) else load_model(str(model), trust_remote_code=trust_remote_code)
        )
    captured, dense, matches = analyse(loaded, progress, check=chosen.check)
    factors: Mapping[str, int] = {}
    if chosen.checkpoint and chosen.ratio != 0:
        from dotresize_fx.export.rehearse_checkpoint import rehearse_checkpoint

        with progress.stage("rehearse the checkpoint"):
            factors = rehearse_checkpoint(loaded, captured, matches, chosen, plan)
    device = compute_device(chosen)
    tokens, steps = chosen.tokens_that_calibrate(loaded.task), chosen.steps_that_repair(loaded.task)
    chosen = replace(chosen, calibration_tokens=tokens, repair_steps=steps)
    data = prepare_data(text, chosen, loaded.tokenizer, loaded.task, captured.longest, device)
    own = _own_text(loaded, data, chosen, device, progress)
    slimmed = _slim_on_device(dense, matches, data, own, plan, chosen, progress, work, loaded.task, launched, factors)
    return SlimResult(
        loaded, captured, dense, slimmed, matches, data, chosen, progress, notes=slimmed.notes, started=started
    )


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


def _slim_on_device(
    dense: FxGraph,
    matches: MatchReport,
    data: CalibrationData,
    own: Sequence[Inputs],
    plan: WidthPlan | None,
    options: Options,
    progress: Progress,
    work: Path | None,
    task: str,
    launched: Launched,
    factors: Mapping[str, int],
) -> Slimmed:
    """Calibrate, solve and heal where the options say; the slim graph comes back to the CPU."""
    device = compute_device(options)
    moved = dense
    if device != "cpu":
        moved = dense.copy()
        moved.to(device)
    batches = [{name: value.to(device) for name, value in batch.items()} for batch in data.calibration]
    slimmed = slim_graph(moved, matches, batches, options, progress, work, task=task, plan=plan, factors=factors)
    if options.effort == "heal" and slimmed.swept:
        from dotresize_fx.healing.hand_out import Handed, give

        handed = Handed(moved, slimmed.graph, (batches, own), task)
        with launched.called():
            give(handed)
            healed = _heal(handed, options, progress)
        slimmed = replace(slimmed, notes=(*slimmed.notes, *healed))
    if device != "cpu":
        slimmed.graph.to("cpu")
    return slimmed


def _heal(handed: Handed, options: Options, progress: Progress) -> tuple[str, ...]:
    """Distil end to end, measured on every eighth batch of each source; notes for the report."""
    from dotresize_fx.healing import PROGRESS_STEPS, HealOptions, heal
    from dotresize_fx.healing.ranks import Ranks

    held_out = [batch for source in handed.sources for i, batch in enumerate(source) if is_held_out(i)]
    training = [batch for source in handed.sources for i, batch in enumerate(source) if not is_held_out(i)]
    at_once = HealOptions.pass_tokens if training[0]["input_ids"].is_cuda else CPU_TOKENS
    chosen = HealOptions(
        seconds=60 * options.heal_minutes,
        steps=options.heal_steps,
        seed=options.seed,
        step_tokens=at_once,
        pass_tokens=at_once,
    )
    with progress.stage("heal", PROGRESS_STEPS) as step:
        found = heal(
            handed.dense,
            handed.slim,
            training,
            held_out or training,
            chosen,
            task=handed.task,
            checkpoint=options.heal_checkpoint,
            advanced=step,
        )
    together = f" in {count} processes" if (count := Ranks().count) > 1 else ""
    return (
        f"healed for {found.steps} steps in {found.seconds:.0f} s{together}: held-out divergence {found.before:.4f} -> "
        f"{found.after:.4f}; stopped because: {found.stopped}",
        *found.notes,
    )


def compute_device(options: Options) -> str:
    """``cpu`` or ``cuda``; of several, the one that torch takes for the current one.

    Raises:
        UsageError: CUDA was asked for and torch has none.
    """
    available = torch.cuda.is_available()
    if options.device == "cuda" and not available:
        raise UsageError("--device cuda: this torch sees no CUDA device; use --device cpu")
    return "cuda" if options.device != "cpu" and available else "cpu"


def analyse(loaded: LoadedModel, progress: Progress, *, check: bool = False) -> tuple[Captured, FxGraph, MatchReport]:
    """Capture, canonicalise and find regions; the model's weights are not changed."""
    with progress.stage("capture"):
        captured = capture(loaded.model)
        _compare_capture(loaded.model, captured)
    with progress.stage("find regions"):
        canonicalise(captured.graph, check=check)
        matches = find_regions(captured.graph)
    return captured, captured.graph, matches


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
        except RuntimeError:  # a batch or a length that tracing took for a constant
            same = False
        if not same:
            why = f"torch.export said: {captured.doubt}" if captured.doubt else "it depends on Python state or sizes"
            raise CaptureError(
                f"the program captured from {type(model).__name__} does not compute what the model's forward pass "
                f"does on inputs of shape {tuple(inputs['input_ids'].shape)}: {why}"
            )


def export(
    name: str, out: Path, options: Options, *, force: bool, trust_remote_code: bool, progress: Progress
) -> Report:
    """The command line's main job: ``slim`` and ``save`` with finished blocks in a work folder beside ``out``."""
    from dotresize_fx.export.deliver import deliver
    from dotresize_fx.export.onnx_session import require_onnx_runtime
    from dotresize_fx.export.output_folder import OutputFolder

    # Outermost, so that OUT is settled before this process ends for another's failure.
    with _together(options, progress) as launched:
        require_onnx_runtime()
        with OutputFolder(out, force) as folder:
            result = slim_with(
                options, name, launched, trust_remote_code=trust_remote_code, progress=progress, work=folder.work
            )
            return deliver(result, folder.partial, folder.work, checkpoint=options.checkpoint)


def inspect(name: str, *, trust_remote_code: bool, progress: Progress) -> tuple[MatchReport, dict[str, str]]:
    """The match report, and for regions that are matched and still not cut the reason."""
    with progress.stage("load"):
        loaded = load_model(name, trust_remote_code=trust_remote_code)
    _, graph, matches = analyse(loaded, progress)
    reasons = {region.name: why_not_cut(graph, region) for region in matches.regions}
    return matches, {region: why for region, why in reasons.items() if why}
