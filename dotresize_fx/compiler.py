"""The compiler: a model in, a slim one out. The pipeline, in the order of docs/idea.md."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dotresize_fx.calibration import CalibrationData, load_text, prepare_data
from dotresize_fx.cost import block_linears, count_cost, weights_per_unit
from dotresize_fx.errors import CaptureError, NothingToSlimError
from dotresize_fx.execution import Execution
from dotresize_fx.export.capture import Captured, capture
from dotresize_fx.export.model_source import LoadedModel, load_model
from dotresize_fx.fidelity import Inputs, perplexity
from dotresize_fx.fx_graph import FxGraph
from dotresize_fx.options import Options
from dotresize_fx.passes.canonicalise import canonicalise
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.fold_linears import FoldLinears
from dotresize_fx.passes.insert_maps import InsertMaps
from dotresize_fx.passes.open_stream import open_stream
from dotresize_fx.progress import Progress
from dotresize_fx.region_map import RegionMap
from dotresize_fx.regions import MatchReport, Region, RegionKind, Symmetry
from dotresize_fx.solvers import solver
from dotresize_fx.stream import stream_statistics
from dotresize_fx.sweep import Sweep, SweptRegion
from dotresize_fx.text import read_text, token_batches
from dotresize_fx.width_plan import plan_widths

if TYPE_CHECKING:
    from dotresize_fx.report import Report

# Two float32 runs of one function differ by rounding only; a wrong capture differs by the size of its outputs.
CAPTURE_TOLERANCE = 1e-4


@dataclass
class SlimResult:
    """A slim program beside the dense one it came from. ``save`` emits, proves and measures it."""

    loaded: LoadedModel
    captured: Captured
    dense: FxGraph
    slim: FxGraph
    matches: MatchReport
    swept: tuple[SweptRegion, ...]
    data: CalibrationData
    options: Options
    progress: Progress
    notes: tuple[str, ...] = ()
    started: float = field(default_factory=time.perf_counter)

    def save(self, out: Path | str, *, force: bool = False) -> Report:
        """Write model.onnx, its weights, config, tokenizer and the two reports into ``out``; returns the report.

        Nothing is left half-written. Raises OutputError when ``out`` cannot be written (it exists and is not empty
        without ``force``), MissingExtraError without ONNX Runtime, VerificationError when it disagrees.
        """
        from dotresize_fx.export.deliver import deliver
        from dotresize_fx.export.output_folder import OutputFolder

        with OutputFolder(out, force) as folder:
            return deliver(self, folder.partial, folder.work)


def slim(
    model: str | Path | LoadedModel,
    ratio: float = 0.2,
    *,
    calibration: Path | str | Sequence[Path | str] = (),
    work: Path | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> SlimResult:
    """Slim a model by ``ratio`` of its block linear weights.

    Args:
        model: a local Hugging Face folder, a GGUF file, a hub id, a built-in name, or what ``load_model`` returned.
        ratio: share to remove, 0 <= ratio < 1.
        calibration: text files (.txt, .jsonl); without any, the text that every Python carries.
        work: folder for finished blocks, if they are to be written.
        options: further fields of :class:`dotresize_fx.options.Options`.

    Raises:
        DotresizeError: whatever is wrong with model, text or options, one class a kind.
    """
    files = [calibration] if isinstance(calibration, (str, Path)) else list(calibration)
    chosen = Options(ratio=ratio, calibration=tuple(Path(file) for file in files), **options)
    return slim_with(chosen, model, progress=progress or Progress(quiet=True), work=work)


def slim_with(
    chosen: Options,
    model: str | Path | LoadedModel,
    *,
    progress: Progress,
    work: Path | None = None,
    trust_remote_code: bool = False,
) -> SlimResult:
    """:func:`slim` with its options checked and gathered."""
    started = time.perf_counter()
    torch.manual_seed(chosen.seed)
    text = load_text(chosen.calibration)  # what is wrong with it is said before the model is loaded
    with progress.stage("load"):
        loaded = (
            model if isinstance(model, LoadedModel) else load_model(str(model), trust_remote_code=trust_remote_code)
        )
    captured, dense, matches = analyse(loaded, progress, check=chosen.check)
    data = prepare_data(text, chosen, loaded.tokenizer, loaded.task, captured.longest)
    slimmed, swept, notes = _slim_graph(dense, matches, data.calibration, chosen, progress, work)
    return SlimResult(
        loaded, captured, dense, slimmed, matches, swept, data, chosen, progress, notes=notes, started=started
    )


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
    expected = model(**captured.sample)[0]
    found = Execution(captured.graph).outputs(captured.sample)[0]
    if not (found - expected).abs().max() <= CAPTURE_TOLERANCE * expected.abs().max():
        raise CaptureError(f"the program captured from {type(model).__name__} computes something else than the model")


def _slim_graph(
    dense: FxGraph,
    matches: MatchReport,
    batches: Sequence[Mapping[str, torch.Tensor]],
    options: Options,
    progress: Progress,
    work: Path | None,
) -> tuple[FxGraph, tuple[SweptRegion, ...], tuple[str, ...]]:
    """Cut the stream first, if asked, then the FFNs, so that they repair what the stream lost."""
    slimmed = dense.copy()
    if options.ratio == 0:
        return slimmed, (), ("ratio 0: nothing was cut",)
    total = _block_weights(dense)
    swept: list[SweptRegion] = []
    notes: tuple[str, ...] = ()
    basis = None
    if "residual" in options.regions:
        share = options.ratio if options.regions == ("residual",) else options.ratio / 2
        cut, basis, notes = _cut_stream(slimmed, matches, batches, total, share, options, progress)
        swept.append(cut)
    if "ffn" in options.regions:
        left = _block_weights(slimmed)
        ratio = max(0.0, 1 - (1 - options.ratio) * total / left)
        regions = [r for r in find_regions(slimmed).of_kind(RegionKind.FFN) if not why_not_cut(slimmed, r)]
        units = {r.name: weights_per_unit(slimmed, r) for r in regions}
        widths = plan_widths(regions, units, left, ratio, multiple=options.multiple)
        sweep = Sweep(
            dense,
            slimmed,
            batches,
            lambda region, found: _apply(slimmed, region, found, options.check),
            refit=options.method != "magnitude",
            basis=basis,
        )
        with progress.stage("sweep", len(regions)) as step:
            for region in regions:
                swept.append(sweep.slim_region(region, widths[region.name], solver(options.method)))
                _write_block(slimmed, region, work)
                step()
    slimmed.refresh_shapes()
    return slimmed, tuple(swept), notes


def _block_weights(graph: FxGraph) -> int:
    return count_cost(graph, 1).block_linear_weights


def why_not_cut(graph: FxGraph, region: Region) -> str:
    """Why a matched region is left alone all the same; empty when it can be cut."""
    if region.kind is RegionKind.PLAIN:
        return "nothing but linear ops between: cutting its rank is not supported yet"
    if region.kind is RegionKind.RESIDUAL:
        return "" if region.symmetry is Symmetry.ORTHOGONAL else f"only {region.symmetry}s pass"
    ops = [graph.op(name) for name in (*region.writers, *region.readers)]
    if any(len(graph.users(op.weight)) > 1 for op in ops if op.weight is not None):
        return "its weights are shared by several layers, which is not supported yet"
    blocks = {op.name for op in block_linears(graph)}
    if not {op.name for op in ops} <= blocks:
        return "it is not part of a block"
    return "" if len(region.readers) == 1 else f"it has {len(region.readers)} readers, one is supported yet"


def _cut_stream(
    graph: FxGraph,
    matches: MatchReport,
    batches: Sequence[Mapping[str, torch.Tensor]],
    total: int,
    ratio: float,
    options: Options,
    progress: Progress,
) -> tuple[SweptRegion, torch.Tensor, tuple[str, ...]]:
    """One basis for the whole stream; returns the cut, the basis (d, k) and notes for the report."""
    streams = [r for r in matches.of_kind(RegionKind.RESIDUAL) if not why_not_cut(graph, r)]
    if not streams:
        reasons = {row.writes_reason for row in matches.linears if "norm" in row.writes_reason}
        why = min(reasons, default="no width that norms and blocks share was found")
        raise NothingToSlimError(f"the residual stream cannot be cut: {why}; use --regions ffn")
    stream = max(streams, key=lambda r: len(r.readers))
    width = plan_widths(
        [stream], {stream.name: weights_per_unit(graph, stream)}, total, ratio, multiple=options.multiple
    )[stream.name]
    stream, records = open_stream(graph, stream, check=options.check)
    with progress.stage("stream statistics", len(batches)) as step:
        statistics = stream_statistics(graph, stream, batches, step)
    found = solver(options.method)(stream, statistics, width)
    _apply(graph, stream, found, options.check)
    kept = tuple(record for record in records if "tied" in record)
    return SweptRegion(stream, width, None, found.notes), found.down, kept


def _apply(graph: FxGraph, region: Region, found: RegionMap, check: bool) -> None:
    insert = InsertMaps(region, found)
    insert(graph, check=check)
    FoldLinears(insert.downs, insert.ups)(graph, check=check)


def _write_block(graph: FxGraph, region: Region, work: Path | None) -> None:
    """Put a finished region's weights into the work folder."""
    if work is None:
        return
    from safetensors.torch import save_file

    folder = work / "blocks"
    folder.mkdir(exist_ok=True)
    ops = [graph.op(name) for name in (*region.writers, *region.readers)]
    values = {value for op in ops for value in (op.weight, op.bias) if value is not None}
    tensors: dict[str, torch.Tensor] = {
        graph.parameter_name(v): graph.parameter(v).detach().contiguous() for v in values
    }
    save_file(tensors, folder / f"{region.name}.safetensors")


def export(
    name: str, out: Path, options: Options, *, force: bool, trust_remote_code: bool, progress: Progress
) -> Report:
    """The command line's main job: ``slim`` and ``save`` with finished blocks in a work folder beside ``out``."""
    from dotresize_fx.export.deliver import deliver
    from dotresize_fx.export.onnx_session import require_onnx_runtime
    from dotresize_fx.export.output_folder import OutputFolder

    require_onnx_runtime()
    with OutputFolder(out, force) as folder:
        result = slim_with(options, name, trust_remote_code=trust_remote_code, progress=progress, work=folder.work)
        return deliver(result, folder.partial, folder.work)


def inspect(name: str, *, trust_remote_code: bool, progress: Progress) -> tuple[MatchReport, dict[str, str]]:
    """The match report, and for regions that are matched and still not cut the reason."""
    with progress.stage("load"):
        loaded = load_model(name, trust_remote_code=trust_remote_code)
    _, graph, matches = analyse(loaded, progress)
    reasons = {region.name: why_not_cut(graph, region) for region in matches.regions}
    return matches, {region: why for region, why in reasons.items() if why}


def evaluate(
    name: str,
    files: Sequence[Path],
    *,
    sequence_length: int,
    tokens: int | None,
    trust_remote_code: bool,
    progress: Progress,
) -> tuple[float, int]:
    """(perplexity, predicted tokens) of a model, or of an exported folder's ONNX in ONNX Runtime."""
    from dotresize_fx.export.evaluation import open_decoder

    text = read_text(files)
    with progress.stage("load"):
        decoder = open_decoder(name, trust_remote_code=trust_remote_code)
    length = min(sequence_length, decoder.longest)
    count = None if tokens is None else max(2, round(tokens / length))
    batches = [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for ids in token_batches(text, decoder.tokenizer, length=length, count=count, batch=1)
    ]
    with progress.stage("evaluate", len(batches)) as step:
        return perplexity(decoder.run, _counted(batches, step))


def _counted(batches: Sequence[Inputs], step: Callable[[], None]) -> Iterator[Inputs]:
    for batch in batches:
        yield batch
        step()
