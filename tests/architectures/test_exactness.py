"""The proof that the matches are right: random full-width maps, inserted and folded, leave every model as it was.

Parameters are re-drawn, maps have condition number at most 4, inputs have a batch, a length and a padding that
were not traced. The bound of 1e-5 of the largest output is the design's: float32 rounding over two layers stays
below 1e-6. A map that the symmetry does not admit must break it a hundredfold, or the proof proves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.graph import Kind
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.open_stream import open_stream
from dotresize_fx.passes.prove_exactness import BOUND, BROKEN, map_regions
from dotresize_fx.region_map import RegionMap, random_admissible_map, random_wrong_map, selection
from dotresize_fx.regions import Region, Symmetry

PRE_NORM = ["llama", "gpt2", "qwen2", "opt"]
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
        assert bool(ffn.linear_branch) == (kind in ("llama", "qwen2"))
        assert ffn.positive_scale == (kind == "opt")
    assert all(linear.matched for linear in report.linears)


def test_the_stream_of_a_post_norm_model_is_refused(tiny_graph: Any) -> None:
    report = find_regions(tiny_graph("bert")[1])
    assert [(region.kind, region.width) for region in report.regions] == [("ffn", 64), ("ffn", 64)]
    first = next(linear for linear in report.linears if linear.parameter.endswith("intermediate.dense.weight"))
    assert first.writes is not None
    assert first.reads is None
    assert "post-norm" in first.reason


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
