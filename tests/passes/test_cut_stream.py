"""The residual stream, cut in one basis for all layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dotresize_fx.cost import CostModel
from dotresize_fx.errors import NothingToSlimError
from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.options import Options
from dotresize_fx.passes.cut_stream import cut_stream, widest_stream
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.insert_adapters import InsertPostNormAdapters
from dotresize_fx.progress import Progress

QUIET = Progress(quiet=True)


def cut(graph: FxGraph, data: list[Any], ratio: float = 0.25, width: int | None = None, **options: Any) -> Any:
    chosen = Options(regions=("residual",), check=True, **options)
    found = cut_stream(graph, find_regions(graph), data, CostModel(), ratio, chosen, QUIET, width)
    return found.swept, found.stream, found.notes


@pytest.fixture
def data(tiny_batch: Any) -> list[Any]:
    return [tiny_batch(4, 24, 3, seed=seed) for seed in range(3)]


@pytest.mark.parametrize("method", ["auto", "pca", "dotresize", "magnitude"])
def test_by_the_ratio(tiny_graph: Any, tiny_batch: Any, run: Any, data: list[Any], method: str) -> None:
    _, graph = tiny_graph("llama")
    swept, stream, _ = cut(graph, data, method=method)
    assert (swept.width, swept.method) == (24, "pca" if method == "auto" else method)
    assert {basis.shape for basis in stream.bases.values()} == {(32, 24)}
    assert run(graph, **tiny_batch(2, 9, 2))[0].isfinite().all()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "opt"])
def test_at_its_whole_width_nothing_changes(
    tiny_graph: Any, tiny_batch: Any, run: Any, difference: Any, data: list[Any], kind: str
) -> None:
    """A rotation alone: the outputs stay, and the basis takes the dense stream into the slim one's coordinates."""
    _, dense = tiny_graph(kind)
    slim = dense.copy()
    swept, stream, notes = cut(slim, data, width=32)
    assert swept.width == 32
    batch = tiny_batch(2, 9, 2)
    assert difference(run(slim, **batch), run(dense, **batch)) <= 1e-5  # as for every full-rank map in float32
    target = next(find_regions(dense).of_kind("ffn")).target
    streams = []
    for graph in (dense, slim):
        execution, node = Execution(graph), graph.node(target)
        streams.append(execution.run(execution.start(batch), 0, execution.index[node] + 1, keep=[node])[node])
    assert difference([streams[1]], [stream.project(target, streams[0])]) <= 1e-5
    # Keeping a tie costs a matrix (under layer norms two), which is said.
    tied = {"llama": "32 x 32 beside", "gpt2": "32 x 32 and 32 x 32 beside", "opt": "32 x 32 and 32 x 32 beside"}
    assert [tied[kind] in note for note in notes] == [True] * (kind in tied)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_one_basis_a_sublayer(
    tiny_graph: Any, tiny_batch: Any, run: Any, difference: Any, data: list[Any], kind: str
) -> None:
    """At its whole width nothing changes; the dense stream meets the slim one in each sublayer's own basis."""
    _, dense = tiny_graph(kind)
    slim = dense.copy()
    if kind == "bert":
        InsertPostNormAdapters()(slim)
    _, stream, notes = cut(slim, data, width=32, basis="sublayer")
    batch = tiny_batch(2, 9, 2)
    assert difference(run(slim, **batch), run(dense, **batch)) <= 1e-5
    targets = [region.target for region in find_regions(dense).of_kind("ffn")]
    assert not torch.allclose(stream.bases[targets[0]], stream.bases[targets[1]], atol=0.1)
    values = []
    for graph in (dense, slim):
        execution, nodes = Execution(graph), [graph.node(name) for name in targets]
        values.append(execution.run(execution.start(batch), 0, len(execution.nodes), keep=nodes))
    for name in targets:
        there, here = values[0][dense.node(name)], values[1][slim.node(name)]
        assert difference([here], [stream.project(name, there)]) <= 1e-5
    adapters = 5 if kind == "bert" else 4  # the last, of post-norm, stands in front of the output
    assert notes[0] == f"5 bases, one a sublayer, and {adapters} adapters between them ({adapters * 1024} weights)"


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("ratio", [0.1, 0.3])
def test_the_ratio_counts_adapters(tiny_graph: Any, data: list[Any], kind: str, ratio: float) -> None:
    _, dense = tiny_graph(kind)
    slim = dense.copy()
    if kind == "bert":
        InsertPostNormAdapters()(slim)
    width = cut(slim, data, ratio=ratio, basis="sublayer", multiple=1)[0].width
    # One channel is 3 % of the width.
    assert CostModel().total(slim) / CostModel().total(dense) == pytest.approx(1 - ratio, abs=0.03)
    assert width < 32 * (1 - ratio)


def test_a_ratio_that_adapters_eat_up_is_refused(tiny_graph: Any, data: list[Any]) -> None:
    _, graph = tiny_graph("llama")
    with pytest.raises(NothingToSlimError, match="adapters and all"):
        cut(graph, data, ratio=0.995, basis="sublayer")


def test_to_a_width_whatever_the_ratio(tiny_graph: Any, data: list[Any]) -> None:
    _, graph = tiny_graph("llama")
    assert cut(graph, data, ratio=0.01, width=20)[0].width == 20
    assert {tuple(graph.weight(op).shape) for op in graph.ops if op.name.startswith("linear")} >= {(64, 20), (20, 64)}


def test_a_post_norm_stream_is_refused(tiny_graph: Any) -> None:
    _, graph = tiny_graph("bert")
    with pytest.raises(NothingToSlimError, match=r"post-norm .* use --basis sublayer or --regions ffn"):
        widest_stream(graph, find_regions(graph))


def test_of_several_streams_the_one_that_most_linears_read(trace: Any) -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        short = m.short_in(x)
        return m.short_head(m.short_norm(short)) + two_readers(m, m.wide_in(x))

    def two_readers(m: Any, y: torch.Tensor) -> torch.Tensor:
        normed = m.wide_norm(y)
        return m.wide_head(normed) + m.other_head(normed)

    linear, norm = torch.nn.Linear, torch.nn.RMSNorm
    parts = {"short_in": linear(8, 12), "short_norm": norm(12), "short_head": linear(12, 8)}
    parts |= {"wide_in": linear(8, 16), "wide_norm": norm(16), "wide_head": linear(16, 8), "other_head": linear(16, 8)}
    graph = trace(forward, (2, 8), **parts)
    matches = find_regions(graph)
    assert sorted(region.width for region in matches.of_kind("residual")) == [12, 16]
    assert widest_stream(graph, matches).width == 16
