"""One model slimmed as a torch program and as an ONNX graph: the same regions, curves, supports and answers."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn

from dotresize_fx.errors import NothingToSlimError, SolverError, UsageError
from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.memory import Memory
from dotresize_fx.onnx_form.answers import OnnxAnswers
from dotresize_fx.onnx_form.execution import OnnxExecution
from dotresize_fx.onnx_form.graph import OnnxGraph
from dotresize_fx.onnx_form.sensitivity import measure_onnx_curves
from dotresize_fx.onnx_form.stream_room import stream_room
from dotresize_fx.options import Options
from dotresize_fx.passes.canonicalise import canonicalise
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.prove_exactness import redraw_parameters
from dotresize_fx.passes.slim_graph import slim_graph
from dotresize_fx.passes.slim_onnx_graph import OnnxGraphs, SlimmedOnnx, slim_onnx_graph
from dotresize_fx.progress import Progress
from dotresize_fx.regions import RegionKind
from dotresize_fx.sensitivity import measure_curves
from dotresize_fx.width_plan import WidthPlan

pytest.importorskip("onnxruntime")

VOCABULARY, WIDTH = 61, 16
# Of the largest output; what the issue asks for of one plan and support. Two runtimes sum in other orders.
AGREE = 1e-3
# Prices are differences of logarithms in float32.
PRICES_AGREE = 0.02


class Block(nn.Module):
    def __init__(self, inner: int, gated: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, inner), nn.Linear(inner, WIDTH)
        self.gate = nn.Linear(WIDTH, inner, bias=False) if gated else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = self.norm(x)
        up = self.up(seen)
        inner = nn.functional.silu(self.gate(seen)) * up if self.gate is not None else nn.functional.gelu(up)
        return x + self.down(inner)


class Deep(nn.Module):
    """Two sublayers, a mixing of neighbours between them, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.first, self.second = Block(48, gated=True), Block(32, gated=False)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids) * attention_mask[..., None].to(torch.float32)
        x = self.first(x)
        return self.head(self.norm(self.second(x + x.cumsum(1) * 0.1)))


@pytest.fixture(scope="module")
def batches() -> list[Mapping[str, torch.Tensor]]:
    """16 of 4 sequences, the first row of every third padded on the left."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for i in range(16):
        ids = torch.randint(0, VOCABULARY, (4, 24), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, : 5 * (i % 3 == 0)] = 0
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


@pytest.fixture(scope="module")
def both() -> tuple[FxGraph, OnnxGraphs]:
    return traced(Deep())


def traced(model: nn.Module) -> tuple[FxGraph, OnnxGraphs]:
    """The canonical program of a model, its parameters drawn anew, and the matched ONNX graph."""
    module = redraw_parameters(model.eval())
    sample = (torch.ones(2, 6, dtype=torch.int64), torch.ones(2, 6, dtype=torch.int64))
    free = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    program = FxGraph(torch.export.export(module, sample, dynamic_shapes=(free, free)))
    canonicalise(program)
    file = io.BytesIO()
    names = ["input_ids", "attention_mask"]
    axes = {name: {0: "batch", 1: "length"} for name in (*names, "logits")}
    torch.onnx.export(module, sample, file, input_names=names, output_names=["logits"], dynamic_axes=axes, dynamo=False)
    return program, graphs_of(onnx.load_from_string(file.getvalue()))


def graphs_of(proto: onnx.ModelProto) -> OnnxGraphs:
    given = OnnxGraph(ir.from_proto(proto))
    canonical = given.copy()
    canonicalise(canonical)
    return OnnxGraphs(given, canonical, find_regions(canonical))


def slim(graphs: OnnxGraphs, batches: Any, plan: WidthPlan | None = None, **options: Any) -> SlimmedOnnx:
    chosen = Options(regions=("ffn",), **options)
    return slim_onnx_graph(
        graphs, batches, chosen, Progress(quiet=True), task="decoder", rows=lambda batch: 96, plan=plan
    )


def ffns(matches: Any) -> list[Any]:
    return list(matches.of_kind(RegionKind.FFN))


@pytest.mark.parametrize("method", ["obs", "dotresize", "magnitude"])
def test_both_ways_slim_alike(both: tuple[FxGraph, OnnxGraphs], batches: Any, method: str) -> None:
    program, graphs = both
    matches = find_regions(program)
    pairs = list(zip(ffns(matches), ffns(graphs.matches), strict=True))
    assert [(a.width, len(a.writers)) for a, _ in pairs] == [(b.width, len(b.writers)) for _, b in pairs]
    widths = (32, 16)
    plans = [WidthPlan({pair[side].name: w for pair, w in zip(pairs, widths, strict=True)}) for side in (0, 1)]
    options = Options(regions=("ffn",), method=method)
    torch_way = slim_graph(program, matches, batches, options, Progress(quiet=True), plan=plans[0])
    onnx_way = slim(graphs, batches, plans[1], method=method)
    assert onnx_way.untouched
    for one, other in zip(torch_way.swept, onnx_way.swept, strict=True):
        assert (one.width, one.method) == (other.width, other.method)
        if one.error is not None:
            assert other.error == pytest.approx(one.error, rel=1e-3)
        kept = [
            swept_graph.weight(swept_graph.op(swept.region.writers[0]))
            for swept_graph, swept in ((torch_way.graph, one), (onnx_way.graph, other))
        ]
        assert torch.allclose(*kept, atol=1e-5)  # the same support
    expected = Execution(torch_way.graph).outputs(batches[1])[0]
    found = OnnxExecution(onnx_way.graph).outputs(batches[1])[0]
    assert (found - expected).abs().max() <= AGREE * expected.abs().max()
    dense = Execution(program).outputs(batches[1])[0]
    assert (dense - expected).abs().max() > 10 * AGREE * expected.abs().max()  # there was something to agree on


def test_the_second_sublayer_sees_what_the_first_cut_left(both: tuple[FxGraph, OnnxGraphs], batches: Any) -> None:
    """Two streams: its reader makes good what the first one lost, which one calibrated on the dense graph cannot."""
    _, graphs = both
    first, second = ffns(graphs.matches)
    together = slim(graphs, batches, WidthPlan({first.name: 16, second.name: 24}), method="obs")
    alone = slim(graphs, batches, WidthPlan({second.name: 24}), method="obs")
    reader = second.readers[0]
    weights = [slimmed.graph.weight(slimmed.graph.op(reader)) for slimmed in (together, alone)]
    assert not torch.allclose(*weights, atol=1e-3)


@pytest.mark.parametrize("task", ["decoder", "encoder", "outputs"])
def test_curves_are_those_of_the_torch_program(both: tuple[FxGraph, OnnxGraphs], batches: Any, task: str) -> None:
    program, graphs = both
    expected = measure_curves(program, ffns(find_regions(program)), batches, task=task)
    found = measure_onnx_curves(
        graphs.given, ffns(graphs.matches), batches, task=task, rows=lambda batch: batch["input_ids"].numel()
    )
    for one, other in zip(expected.values(), found.values(), strict=True):
        finite = one.isfinite()
        assert torch.equal(finite, other.isfinite())
        assert torch.allclose(one[finite], other[finite], rtol=PRICES_AGREE, atol=1e-9)


def test_of_a_large_vocabulary_the_likeliest_tokens_are_scored(batches: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Deep()
    model.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
    program, graphs = traced(model)
    for module in ("dotresize_fx.answers", "dotresize_fx.onnx_form.answers"):
        monkeypatch.setattr(f"{module}.SHORTLIST", VOCABULARY // 4)
    expected = measure_curves(program, ffns(find_regions(program)), batches, task="decoder")
    arguments = graphs.given, ffns(graphs.matches), batches
    found = measure_onnx_curves(*arguments, task="decoder", rows=lambda batch: batch["input_ids"].numel())
    for one, other in zip(expected.values(), found.values(), strict=True):
        finite = one.isfinite()
        assert torch.allclose(one[finite], other[finite], rtol=PRICES_AGREE, atol=1e-9)
    assert OnnxAnswers(OnnxExecution(graphs.given), "decoder").head is not None


def test_a_ratio_is_met_and_measured(both: tuple[FxGraph, OnnxGraphs], batches: Any) -> None:
    _, graphs = both
    slimmed = slim(graphs, batches, ratio=0.3)
    before, after = (
        sum(graph.weight(op).numel() for op in graph.ops if op.is_linear) for graph in (graphs.given, slimmed.graph)
    )
    head = VOCABULARY * WIDTH
    assert 1 - (after - head) / (before - head) == pytest.approx(0.3, abs=0.05)  # widths come in steps
    assert sum(slimmed.plan.losses.values()) > 0


def test_what_is_refused(both: tuple[FxGraph, OnnxGraphs], batches: Any) -> None:
    _, graphs = both
    with pytest.raises(UsageError, match="residual stream of an ONNX file is not cut yet"):
        slim_onnx_graph(graphs, batches, Options(regions=("residual",)), Progress(quiet=True), task="decoder", rows=len)
    with pytest.raises(NothingToSlimError, match="would make a region vanish"):
        slim(graphs, batches, ratio=0.95)
    proto = ir.to_proto(graphs.given.model)
    for tensor in proto.graph.initializer:
        if tensor.name == "first.down.bias":
            tensor.CopyFrom(
                onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * float("inf"), tensor.name)
            )
    with pytest.raises(SolverError, match="infinite or NaN"):
        slim(graphs_of(proto), batches, WidthPlan({ffns(graphs.matches)[1].name: 16}))


def test_one_shot_calibrates_on_the_dense_graph_alone(both: tuple[FxGraph, OnnxGraphs], batches: Any) -> None:
    """Whether the dense stream is kept or run anew; what the first sublayer lost the second one does not see."""
    _, graphs = both
    first, second = ffns(graphs.matches)
    plan = WidthPlan({first.name: 16, second.name: 24})
    options, progress = Options(regions=("ffn",), method="obs"), Progress(quiet=True)
    ways = [
        slim_onnx_graph(graphs, batches, options, progress, task="decoder", rows=len, plan=plan, streams=streams)
        for streams in (2, 1, 0)
    ]
    alone = [
        slim(graphs, batches, WidthPlan({region.name: plan.widths[region.name]}), method="obs")
        for region in (first, second)
    ]
    for region, apart in zip((first, second), alone, strict=True):
        two, one, none, own = (slimmed.graph.weight(slimmed.graph.op(region.readers[0])) for slimmed in (*ways, apart))
        assert torch.equal(one, none)
        assert torch.allclose(one, own, atol=1e-5)
        assert torch.allclose(two, own, atol=1e-5) == (region is first)


def test_as_many_streams_as_fit_are_kept(both: tuple[FxGraph, OnnxGraphs], batches: Any) -> None:
    _, graphs = both
    target = ffns(graphs.matches)[0].target
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    size = stream_room(graphs.given, target, batches, Memory()).size
    assert size >= 4 * WIDTH * tokens  # what the sublayer puts out, beside the inputs
    for times, fitting in ((5, 2), (3, 1), (1, 0)):  # half of it is for streams
        room = stream_room(graphs.given, target, batches, Memory(times * size))
        assert (room.streams, bool(room.notes)) == (fitting, fitting < 2)
