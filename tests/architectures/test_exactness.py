"""The proof that the matches are right: random full-width maps, inserted and folded, leave every model as it was.

Parameters are re-drawn, maps have condition number at most 4, inputs have a batch, a length and a padding that
were not traced. The bound of 1e-5 of the largest output is the design's: float32 rounding over two layers stays
below 1e-6. A map that the symmetry does not admit must break it a hundredfold, or the proof proves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.graph import Kind
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.fold_linears import FoldLinears
from dotresize_fx.passes.insert_maps import InsertMaps
from dotresize_fx.passes.open_stream import open_stream
from dotresize_fx.passes.prove_exactness import BOUND, BROKEN, map_regions
from dotresize_fx.region_map import (
    RegionMap,
    random_admissible_map,
    random_rotation,
    random_wrong_map,
    selection,
)
from dotresize_fx.regions import Region, Symmetry

HEADS = ("value", "query_key", "kv_heads")
PRE_NORM = ["llama", "gpt2", "qwen2", "opt", "phi3"]
GATED = ["llama", "qwen2", "phi3"]
TIED = ["llama", "gpt2", "opt"]


@pytest.fixture(scope="session")
def error(
    run: Callable[..., list[torch.Tensor]],
    difference: Callable[..., float],
    tiny_batch: Callable[..., Mapping[str, torch.Tensor]],
) -> Callable[[Any, FxGraph], float]:
    """``error(model, graph)``: the graph against the model itself, on shapes that were not traced."""

    def worst(model: Any, graph: FxGraph) -> float:
        errors = []
        for rows, length, padding in ((3, 11, 4), (1, 29, 0)):
            batch = tiny_batch(rows, length, padding)
            with torch.no_grad():
                outputs = model(**batch)
            expected = [value for value in outputs.values() if isinstance(value, torch.Tensor)]
            errors.append(difference(run(graph, **batch), expected))
        return max(errors)

    return worst


@pytest.mark.parametrize("kind", PRE_NORM)
def test_admissible_maps_change_nothing(tiny_graph: Any, error: Any, kind: str) -> None:
    model, graph = tiny_graph(kind)
    assert error(model, graph) <= BOUND
    for region in find_regions(graph).of_kind("residual"):
        open_stream(graph, region)
    assert error(model, graph) <= BOUND
    assert map_regions(graph, ("ffn",), random_admissible_map) == 2
    assert map_regions(graph, ("residual",), random_admissible_map) == 1
    assert error(model, graph) <= BOUND


def test_admissible_maps_change_nothing_after_a_norm(tiny_graph: Any, error: Any) -> None:
    model, graph = tiny_graph("bert")
    assert map_regions(graph, ("ffn",), random_admissible_map) == 2
    assert error(model, graph) <= BOUND


@pytest.mark.parametrize("kind", [*PRE_NORM, "bert"])
def test_a_rotation_breaks_an_ffn(tiny_graph: Any, error: Any, kind: str) -> None:
    model, graph = tiny_graph(kind)
    map_regions(graph, ("ffn",), random_wrong_map)
    assert error(model, graph) >= BROKEN


@pytest.mark.parametrize("kind", PRE_NORM)
def test_an_uneven_scaling_breaks_a_stream(tiny_graph: Any, error: Any, kind: str) -> None:
    model, graph = tiny_graph(kind)
    map_regions(graph, ("residual",), random_wrong_map)
    assert error(model, graph) >= BROKEN


def scale_of_the_wrong_kind(region: Region, generator: torch.Generator) -> RegionMap:
    """Scales that the region's function stops: on a gate's own branch, through GELU, negative through ReLU."""
    permutation = selection(torch.randperm(region.width, generator=generator), region.width)
    scale = 2.0 ** (2 * torch.rand(region.width, generator=generator, dtype=torch.float64) - 1)
    if region.positive_scale:
        scale = -scale
    branch = permutation if region.linear_branch else None
    return RegionMap(permutation * scale, (permutation / scale).T, branch_down=branch)


@pytest.mark.parametrize("kind", [*PRE_NORM, "bert"])
def test_a_scale_that_the_function_stops_breaks_an_ffn(tiny_graph: Any, error: Any, kind: str) -> None:
    model, graph = tiny_graph(kind)
    map_regions(graph, ("ffn",), scale_of_the_wrong_kind)
    assert error(model, graph) >= BROKEN


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_a_gain_folded_without_its_bias_would_show(tiny_graph: Any, error: Any, kind: str) -> None:
    """The re-drawn biases are large enough for the bound to see one that is forgotten."""
    model, graph = tiny_graph(kind)
    norm = next(op for op in graph.ops if op.kind is Kind.LAYER_NORM)
    graph.set_bias(norm, torch.zeros(32))
    assert error(model, graph) >= BROKEN


@pytest.mark.parametrize("kind", PRE_NORM)
def test_what_the_regions_admit(tiny_graph: Any, kind: str) -> None:
    report = find_regions(tiny_graph(kind)[1])
    (stream,) = report.of_kind("residual")
    assert (stream.symmetry, stream.width, len(stream.norms)) == (Symmetry.ORTHOGONAL, 32, 5)
    for ffn in report.of_kind("ffn"):
        assert ffn.symmetry is Symmetry.PERMUTATION
        assert ffn.width == (128 if kind == "gpt2" else 64)
        assert bool(ffn.linear_branch) == (kind in GATED)
        assert ffn.positive_scale == (kind == "opt")
    assert all(linear.matched for linear in report.linears)


@pytest.mark.parametrize("kind", [*PRE_NORM, "bert"])
def test_what_the_heads_admit(tiny_graph: Any, kind: str) -> None:
    report = find_regions(tiny_graph(kind)[1])
    grouped = 2 if kind in GATED else 4
    rotary = kind in GATED
    assert report.refused == ()
    for region in report.of_kind(*HEADS):
        assert region.heads == grouped
        assert region.width == (grouped if region.kind == "kv_heads" else 8)
    symmetries = {region.kind: region.symmetry for region in report.of_kind(*HEADS)}
    assert symmetries == {
        "value": Symmetry.HEADWISE_LINEAR,
        "query_key": Symmetry.ROTARY_PAIRS if rotary else Symmetry.HEADWISE_LINEAR,
        "kv_heads": Symmetry.PERMUTATION,
    }


@pytest.mark.parametrize("kind", [*PRE_NORM, "bert"])
def test_admissible_maps_of_heads_change_nothing(tiny_graph: Any, error: Any, kind: str) -> None:
    model, graph = tiny_graph(kind)
    assert error(model, graph) <= BOUND
    for region_kind in HEADS:
        assert map_regions(graph, (region_kind,), random_admissible_map) == 2
        assert error(model, graph) <= BOUND, region_kind
    graph.refresh_shapes()
    assert map_regions(graph, HEADS, random_admissible_map, seed=1) == 6
    assert error(model, graph) <= BOUND


@pytest.mark.parametrize("region_kind", HEADS)
@pytest.mark.parametrize("kind", [*PRE_NORM, "bert"])
def test_wrong_maps_of_heads_break_it(tiny_graph: Any, error: Any, kind: str, region_kind: str) -> None:
    """A rotation across heads; rotary pairs of all angles mixed; KV heads in an order that the keys do not have."""
    model, graph = tiny_graph(kind)
    assert map_regions(graph, (region_kind,), random_wrong_map) == 2
    assert error(model, graph) >= BROKEN


PARTLY = {"qwen3": "QK-norm", "phi": "partial rotary"}


@pytest.mark.parametrize("kind", PARTLY)
def test_a_head_that_cannot_be_narrowed_can_be_moved(tiny_graph: Any, error: Any, kind: str) -> None:
    model, graph = tiny_graph(kind)
    report = find_regions(graph)
    assert [region.kind for region in report.of_kind(*HEADS)] == ["kv_heads", "value"] * 2
    assert len(report.refused) == 2
    assert all(PARTLY[kind] in reason for _, reason in report.refused)
    assert map_regions(graph, HEADS, random_admissible_map) == 4
    assert error(model, graph) <= BOUND
    map_regions(graph, ("kv_heads",), random_wrong_map)
    assert error(model, graph) >= BROKEN


def test_weights_packed_head_by_head_are_taken_apart(tiny_graph: Any, error: Any) -> None:
    model, graph = tiny_graph("neox")
    kinds = [region.kind for region in find_regions(graph).of_kind(*HEADS)]
    assert sorted(kinds) == ["kv_heads", "kv_heads", "value", "value"]
    assert map_regions(graph, HEADS, random_admissible_map) == 4
    assert error(model, graph) <= BOUND


@pytest.mark.parametrize("kind", GATED)
def test_rotary_pairs_without_their_tables_break_it(tiny_graph: Any, error: Any, kind: str) -> None:
    model, graph = tiny_graph(kind)
    generator = torch.Generator().manual_seed(0)
    for region in find_regions(graph).of_kind("query_key"):
        assert region.layout is not None
        bare = replace(region, layout=replace(region.layout, tables=()))
        insert = InsertMaps(bare, random_admissible_map(region, generator))
        insert(graph)
        FoldLinears(insert.downs, insert.ups)(graph)
    assert error(model, graph) >= BROKEN


@pytest.mark.parametrize("kind", GATED)
def test_a_basis_for_each_query_head_breaks_values(tiny_graph: Any, error: Any, kind: str) -> None:
    """Query heads that share a KV head share its basis: what reads them cannot undo one of its own."""
    model, graph = tiny_graph(kind)
    generator = torch.Generator().manual_seed(0)
    for region in find_regions(graph).of_kind("value"):
        turns = torch.stack([random_rotation(8, generator) for _ in range(4)])
        writer, reader = graph.op(region.writers[0]), graph.op(region.readers[0])
        graph.set_weight(writer, torch.block_diag(*turns[::2].mT).float() @ graph.weight(writer))
        if writer.bias is not None:
            graph.set_bias(graph.op(writer.name), torch.block_diag(*turns[::2].mT).float() @ graph.bias(writer))
        graph.set_weight(reader, graph.weight(reader) @ torch.block_diag(*turns).float())
    assert error(model, graph) >= BROKEN


@pytest.mark.parametrize("kind", [*PRE_NORM, "bert"])
def test_nothing_inserted_is_left_between_heads(tiny_graph: Any, kind: str) -> None:
    """But for the tables of a rotary embedding, which are taken in another order."""
    _, graph = tiny_graph(kind)
    before = [op.name for op in graph.ops]
    map_regions(graph, HEADS, random_admissible_map)
    added = [op.spelling for op in graph.ops if op.name not in before]
    assert added == (["index_select.default"] * 4 if kind in GATED else [])


def test_the_stream_of_a_post_norm_model_is_refused(tiny_graph: Any) -> None:
    report = find_regions(tiny_graph("bert")[1])
    assert [(region.kind, region.width) for region in report.of_kind("ffn", "residual")] == [("ffn", 64)] * 2
    first = next(linear for linear in report.linears if linear.parameter.endswith("intermediate.dense.weight"))
    assert first.writes is not None
    assert first.reads is None
    assert "post-norm" in first.reason
    assert "it is an output of the graph" in first.reason  # without the head that a permutation could be undone in


@pytest.mark.parametrize("kind", TIED)
def test_tied_tables_stay_one_parameter(tiny_graph: Any, kind: str) -> None:
    _, graph = tiny_graph(kind)
    map_regions(graph, ("ffn", "residual"), random_admissible_map)
    table = next(op for op in graph.ops if op.kind is Kind.EMBEDDING)
    head = [op for op in graph.ops if op.kind is Kind.LINEAR][-1]
    assert table.weight == head.weight
    tables = [name for name, tensor in graph.program.state_dict.items() if tensor.shape == (97, 32)]
    assert len(tables) == 1


@pytest.mark.parametrize("kind", [*PRE_NORM, "bert"])
def test_nothing_inserted_is_left(tiny_graph: Any, kind: str) -> None:
    _, graph = tiny_graph(kind)
    for region in find_regions(graph).of_kind("residual"):
        open_stream(graph, region)
    before = [(op.name, op.kind) for op in graph.ops]
    weights = sum(tensor.numel() for tensor in graph.program.state_dict.values())
    map_regions(graph, ("ffn", "residual"), random_admissible_map)
    assert [(op.name, op.kind) for op in graph.ops] == before
    assert sum(tensor.numel() for tensor in graph.program.state_dict.values()) == weights
    assert not any("inserted" in name for name in graph.program.state_dict)
