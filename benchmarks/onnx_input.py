"""A model slimmed by both ways: from its program, and from the ONNX file that export writes of the dense one.

    python benchmarks/onnx_input.py                                                    # minilm-l6
    python benchmarks/onnx_input.py --model smollm2-135m --calibration-tokens 24576    # hours on two cores
    python benchmarks/onnx_input.py --model smollm2-135m --calibration-tokens 4096 --supports-only

Both get the same batches and seed. "Same supports": the ONNX way follows the other's width plan, and its maps stand in
for what it would solve for; only how activations are run and summed, readers refitted and maps folded differs then.
Latency: dense and slim ONNX in turns, of the file that the ONNX way gave. Held-out text as the export's report has it.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from encoders import embeddings
from measure import runs, spending
from texts import Batches

from dotresize_fx.calibration import load_text, prepare_data
from dotresize_fx.compiler import analyse
from dotresize_fx.cost import count_cost
from dotresize_fx.export.emit_onnx import emit_onnx
from dotresize_fx.export.model_source import load_model
from dotresize_fx.export.onnx_source import load_onnx
from dotresize_fx.export.timing import measure_latency
from dotresize_fx.export.write_onnx import Stated, write_onnx
from dotresize_fx.fidelity import Run, compare_decoders
from dotresize_fx.gram import RegionStatistics
from dotresize_fx.onnx_form.execution import OnnxExecution
from dotresize_fx.onnx_form.graph import OnnxGraph
from dotresize_fx.options import Options
from dotresize_fx.passes.canonicalise import canonicalise
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.slim_graph import slim_graph
from dotresize_fx.passes.slim_onnx_graph import OnnxGraphs, SlimmedOnnx, slim_onnx_graph
from dotresize_fx.passes.sweep_regions import Slimmed
from dotresize_fx.progress import Progress
from dotresize_fx.region_map import RegionMap
from dotresize_fx.regions import MatchReport, Region, RegionKind
from dotresize_fx.solvers import SOLVERS, Solver
from dotresize_fx.width_plan import WidthPlan

# What is asked: outputs given the same supports, fidelity of either way by itself, an encoder's cosine at 20 %, and
# how far latency may stay behind MACs.
SAME_OUTPUTS, SAME_FIDELITY, COSINE, BEHIND_MACS = 1e-3, 0.01, 0.98, 0.05
LENGTH, BATCHES, THREADS = 128, (1, 32), 2


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="minilm-l6")
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--calibration-tokens", type=int, help="those of export where not given")
    parser.add_argument("--supports-only", action="store_true", help="regions and the row of the same supports alone")
    parser.add_argument(
        "--streams",
        action="store_true",
        help="compare only how many activation streams the file's sweep keeps: two, or one shot over one or none",
    )
    parser.add_argument("--runs", type=int, default=20, help="of each file, for the latency")
    return parser.parse_args(given)


@contextmanager
def noted(maps: dict[tuple[str, int], RegionMap]) -> Iterator[None]:
    """Inside, solvers note their maps by region and width."""

    def noting(solve: Solver) -> Solver:
        def found(region: Region, statistics: RegionStatistics, width: int) -> RegionMap:
            return maps.setdefault((region.name, width), solve(region, statistics, width))

        return found

    with patch.dict(SOLVERS, {name: noting(solve) for name, solve in SOLVERS.items()}):
        yield


@contextmanager
def given(maps: dict[tuple[str, int], RegionMap], names: Mapping[str, str]) -> Iterator[None]:
    """Inside, these maps are what solvers find; ``names`` has a region's name in them."""

    def found(region: Region, statistics: RegionStatistics, width: int) -> RegionMap:
        return maps[names[region.name], width]

    with patch.dict(SOLVERS, dict.fromkeys(SOLVERS, found)):
        yield


def sizes(matches: MatchReport) -> list[tuple[str, int]]:
    """Kind and width of all regions, kind by kind in graph order."""
    return [(str(kind), region.width) for kind in RegionKind for region in matches.of_kind(kind)]


def paired(one: MatchReport, other: MatchReport) -> dict[str, str]:
    """Region names of ``one`` -> of ``other``: exporters number the weights that they turn round."""
    return {a.name: b.name for kind in RegionKind for a, b in zip(one.of_kind(kind), other.of_kind(kind), strict=False)}


class BothWays:
    """A model's program and the ONNX file of it, matched, with one set of batches."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.loaded = load_model(arguments.model)
        captured, self.dense, self.matches = analyse(self.loaded, Progress())
        self.path = emit_onnx(self.loaded.model, captured, captured.graph, folder)
        graph = OnnxGraph(load_onnx(self.path))
        canonical = graph.copy()
        canonicalise(canonical)
        self.graphs = OnnxGraphs(graph, canonical, find_regions(canonical))
        options = Options(calibration_tokens=arguments.calibration_tokens)
        self.data = prepare_data(
            load_text(()), options, self.loaded.tokenizer, self.loaded.task, captured.longest, "cpu"
        )
        self.options = Options(ratio=arguments.ratio, calibration_tokens=arguments.calibration_tokens)

    def of_program(self, **options: object) -> Slimmed:
        chosen = Options(**{**vars(self.options), **options})  # type: ignore[arg-type]
        batches = list(self.data.calibration)
        return slim_graph(self.dense, self.matches, batches, chosen, Progress(quiet=True), task=self.loaded.task)

    def of_file(self, plan: WidthPlan | None = None, streams: int | None = None, **options: object) -> SlimmedOnnx:
        return slim_onnx_graph(
            self.graphs,
            self.data.calibration,
            Options(**{**vars(self.options), **options}),  # type: ignore[arg-type]
            Progress(quiet=True),
            task=self.loaded.task,
            rows=lambda batch: batch["input_ids"].numel(),
            plan=plan,
            streams=streams,
        )

    @torch.no_grad()
    def lost(self, run: Run) -> float:
        """Excess in nats of a decoder, 1 - cosine of an encoder's pooled embeddings."""
        dense, measured = runs(self.dense), list(self.data.evaluation)
        if self.loaded.task == "decoder":
            return compare_decoders(dense, run, measured).excess
        alike = torch.nn.functional.cosine_similarity(embeddings(dense, measured), embeddings(run, measured))
        return 1 - float(alike.mean())


def first_output(graph: OnnxGraph) -> Run:
    whole = OnnxExecution(graph).whole(first=True)
    return lambda batch: whole(batch)[0].float()


@torch.no_grad()
def difference(one: Run, other: Run, batches: Batches) -> float:
    """Largest difference of the first output at real positions, relative to the largest output."""
    away = size = 0.0
    for batch in batches:
        real = batch["attention_mask"].bool()
        first, second = one(batch)[real], other(batch)[real]
        away, size = max(away, float((first - second).abs().max())), max(size, float(first.abs().max()))
    return away / size


def row(figure: str, program: str, file: str, asked: str, good: bool | None) -> None:
    said = "" if good is None else "yes" if good else "NO"
    print(f"| {figure} | {program} | {file} | {asked} | {said} |", flush=True)


def compare_regions(ways: BothWays) -> dict[str, str]:
    """Print whether they are the same; returns the file's names of regions -> the program's."""
    one, other = sizes(ways.matches), sizes(ways.graphs.matches)
    row("regions", str(len(one)), str(len(other)), "the same", one == other)
    return paired(ways.graphs.matches, ways.matches)


def compare_each_by_itself(ways: BothWays, names: Mapping[str, str]) -> SlimmedOnnx:
    """Print what either way gives by itself; returns what the ONNX way does."""
    with spending("cpu") as by_program:
        program = ways.of_program()
    with spending("cpu") as by_file:
        file = ways.of_file()
    allowed = 2 * by_program.seconds
    row(
        *("seconds to measure, plan and sweep", f"{by_program.seconds:.0f}", f"{by_file.seconds:.0f}"),
        *(f"<= {allowed:.0f}", by_file.seconds <= allowed),
    )
    same = sum(program.plan.widths.get(names[name]) == width for name, width in file.plan.widths.items())
    row("widths alike", str(len(program.plan.widths)), str(same), "", None)
    lost = [ways.lost(run) for run in (runs(program.graph), first_output(file.graph))]
    figure = "excess, nats" if ways.loaded.task == "decoder" else "1 - cosine"
    apart = abs(lost[0] - lost[1])
    row(figure, f"{lost[0]:.4f}", f"{lost[1]:.4f}", f"within {SAME_FIDELITY}", apart <= SAME_FIDELITY)
    if ways.loaded.task == "encoder":
        row("cosine", f"{1 - lost[0]:.4f}", f"{1 - lost[1]:.4f}", f">= {COSINE}", 1 - lost[1] >= COSINE)
    return file


def compare_with_same_supports(ways: BothWays, names: Mapping[str, str]) -> None:
    """Print how far outputs differ where the ONNX way takes the program's plan and maps."""
    maps: dict[tuple[str, int], RegionMap] = {}
    with noted(maps):
        program = ways.of_program(method="obs")
    widths = {name: program.plan.widths[names[name]] for name in names if names[name] in program.plan.widths}
    with given(maps, names):
        followed = ways.of_file(WidthPlan(widths), method="obs")
    away = difference(runs(program.graph), first_output(followed.graph), list(ways.data.evaluation)[:4])
    row("same supports: outputs differ by", "", f"{away:.1e}", f"<= {SAME_OUTPUTS:.0e}", away <= SAME_OUTPUTS)


def compare_streams(ways: BothWays) -> None:
    """Print what one plan of widths gives by how many streams its sweep keeps."""
    figure = "excess, nats" if ways.loaded.task == "decoder" else "1 - cosine"
    print(f"| streams | seconds to sweep | {figure} |\n|---|---|---|")
    plan = ways.of_file().plan
    for streams in (2, 1, 0):
        with spending("cpu") as spent:
            slimmed = ways.of_file(WidthPlan(plan.widths), streams)
        print(f"| {streams} | {spent.seconds:.0f} | {ways.lost(first_output(slimmed.graph)):.4f} |", flush=True)


def time_files(ways: BothWays, slimmed: SlimmedOnnx, folder: Path, count: int) -> None:
    """Print latency beside MACs, at every batch."""
    (work := folder / "work").mkdir()
    ids = torch.randint(0, 1000, (max(BATCHES), LENGTH), generator=torch.Generator().manual_seed(0))
    one = {"input_ids": ids[:1], "attention_mask": torch.ones_like(ids[:1])}
    (slim_folder := folder / "slim").mkdir()
    slim = write_onnx(slimmed, Stated.by(ways.path), one, slim_folder, work)
    macs = [count_cost(graph, LENGTH).macs_per_token for graph in (slimmed.graph, slimmed.dense)]
    share = macs[0] / macs[1]
    for batch in BATCHES:
        inputs = {"input_ids": ids[:batch].numpy(), "attention_mask": torch.ones_like(ids[:batch]).numpy()}
        fed = {value.name for value in OnnxGraph(load_onnx(ways.path)).model.graph.inputs}
        inputs = {name: value for name, value in inputs.items() if name in fed}
        found = measure_latency(
            {"dense": ways.path, "slim": slim}, inputs, runs=count, threads=THREADS, work=work, budget=math.inf
        )
        ratio = found["slim"].median / found["dense"].median
        row(
            f"latency of dense and slim, ms, batch {batch} x {LENGTH}, {THREADS} threads",
            *(f"{1000 * found[name].median:.1f}" for name in ("dense", "slim")),
            *(f"ratio {ratio:.3f} <= MACs {share:.3f} + {BEHIND_MACS}", ratio <= share + BEHIND_MACS),
        )


def main() -> None:
    arguments = parse()
    with tempfile.TemporaryDirectory() as folder:
        ways = BothWays(arguments, Path(folder))
        tokens = sum(int(batch["attention_mask"].sum()) for batch in ways.data.calibration)
        print(f"{ways.loaded.source}; {tokens} calibration tokens of {ways.data.description}; {arguments.ratio:.0%}\n")
        if arguments.streams:
            compare_streams(ways)
            return
        print("| figure | from the program | from the ONNX file | asked | met |\n|---|---|---|---|---|")
        names = compare_regions(ways)
        slimmed = None if arguments.supports_only else compare_each_by_itself(ways, names)
        compare_with_same_supports(ways, names)
        if slimmed is not None and ways.loaded.task == "encoder":
            time_files(ways, slimmed, Path(folder), arguments.runs)


if __name__ == "__main__":
    main()
