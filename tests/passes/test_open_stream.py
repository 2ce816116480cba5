"""Opening a stream changes nothing that is computed, and says what a tied head cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.graph import Kind
from dotresize_fx.options import Options
from dotresize_fx.passes.choose_regions import why_not_cut
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.open_stream import open_stream
from dotresize_fx.passes.prove_exactness import BOUND
from dotresize_fx.passes.slim_graph import slim_graph
from dotresize_fx.progress import Progress


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "opt"])
def test_every_norm_is_a_bare_rms_norm(tiny_graph: Any, tiny_batch: Any, run: Any, difference: Any, kind: str) -> None:
    model, graph = tiny_graph(kind)
    (before,) = find_regions(graph).of_kind("residual")
    after, records = open_stream(graph, before)
    assert records
    norms = [graph.op(name) for name in after.norms]
    assert len(norms) == len(before.norms)
    assert all(op.kind is Kind.RMS_NORM and op.weight is None for op in norms)
    batch = tiny_batch(2, 9, 3)
    with torch.no_grad():
        assert difference(run(graph, **batch), [model(**batch).logits]) <= BOUND


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_the_dense_stream_meets_the_opened_one_in_the_basis(tiny_graph: Any, tiny_batch: Any, kind: str) -> None:
    """LayerNorm's mean leaves the slim stream: the dense one must lose it on the way into the basis too."""
    _, dense = tiny_graph(kind)
    data = [tiny_batch(4, 24, 3, seed=seed) for seed in range(4)]
    opened = dense.copy()
    (stream,) = find_regions(opened).of_kind("residual")
    open_stream(opened, stream)
    target = next(find_regions(dense).of_kind("ffn")).target

    def value(graph: Any) -> torch.Tensor:
        execution = Execution(graph)
        node = graph.node(target)
        return execution.run(execution.start(data[0]), 0, execution.index[node] + 1, keep=[node])[node]

    centring = torch.eye(32) - 1 / 32
    # float32 sums over 32 entries of size one.
    assert torch.allclose(value(dense) @ centring, value(opened), atol=1e-4)
    assert not torch.allclose(value(dense), value(opened), atol=1e-2)


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_cutting_both_ends_near_the_dense_model(tiny_graph: Any, tiny_batch: Any, run: Any, kind: str) -> None:
    """Readers refitted toward targets that still have their mean would end far off: twice as far, as measured."""
    model, dense = tiny_graph(kind)
    data = [tiny_batch(8, 32, seed=seed) for seed in range(8)]
    errors = {}
    for regions in (("residual",), ("ffn", "residual")):
        options = Options(ratio=0.1, regions=regions, method="dotresize")
        slimmed = slim_graph(dense, find_regions(dense), data, options, Progress(quiet=True))
        batch = tiny_batch(4, 16, seed=99)
        with torch.no_grad():
            expected = model(**batch).logits
        errors[regions] = float((run(slimmed.graph, **batch)[0] - expected).norm() / expected.norm())
        assert any("stays tied" in note for note in slimmed.notes)
    assert errors["ffn", "residual"] < 1.5 * errors["residual",]


def test_a_layer_norm_stream_with_a_bare_reader_is_left_alone(trace: Any) -> None:
    from torch import nn

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        stream = m.first(x)
        stream = stream + m.down(torch.relu(m.up(m.norm(stream))))
        return m.head(m.last(stream)) + m.bare(stream)

    parts = {"first": nn.Linear(6, 8), "up": nn.Linear(8, 16), "down": nn.Linear(16, 8), "norm": nn.LayerNorm(8)}
    graph = trace(forward, (2, 6), **parts, last=nn.LayerNorm(8), head=nn.Linear(8, 3), bare=nn.Linear(8, 3))
    (stream,) = find_regions(graph).of_kind("residual")
    assert "reads it without a norm" in why_not_cut(graph, stream)
