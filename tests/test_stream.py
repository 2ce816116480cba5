"""Statistics of a residual stream against the model's own norms, watched from outside."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.open_stream import open_stream
from dotresize_fx.regions import Region
from dotresize_fx.stream import SAMPLES, stream_statistics

Batch = Mapping[str, torch.Tensor]
NORMS = ("norm", "ln_1", "ln_2", "ln_f")


def opened(graph: FxGraph) -> Region:
    (stream,) = find_regions(graph).of_kind("residual")
    return open_stream(graph, stream)[0]


def watched(model: Any, batches: list[Batch]) -> torch.Tensor:
    """(tokens of all norms, width), float64: what the model's norms read, normalised by hand, without gain."""
    rows: list[torch.Tensor] = []
    current: Batch = {}

    def watch(norm: Any, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
        x = inputs[0].double()
        if isinstance(norm, torch.nn.LayerNorm):
            x, epsilon = x - x.mean(-1, keepdim=True), norm.eps
        else:
            epsilon = norm.variance_epsilon
        x = x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt()
        rows.append(x[current["attention_mask"].bool()])

    hooks = [m.register_forward_hook(watch) for name, m in model.named_modules() if name.endswith(NORMS)]
    with torch.no_grad():
        for current in batches:
            model(**current)
    for hook in hooks:
        hook.remove()
    return torch.cat(rows)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_gram_matrix_is_that_of_the_normalised_stream(tiny_graph: Any, tiny_batch: Any, kind: str) -> None:
    """Over every norm and every real token; GPT-2's layer norms count as RMS norms of the centred stream."""
    model, graph = tiny_graph(kind)
    batches = [tiny_batch(2, 12, 5, seed=0), tiny_batch(3, 9, seed=1)]
    (statistics,) = stream_statistics(graph, [opened(graph)], batches)
    rows = watched(model, batches)
    assert statistics.tokens == len(rows) == 5 * (24 - 5 + 27)
    # The program sums float32 products.
    torch.testing.assert_close(statistics.gram, rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)
    assert float(statistics.gram.trace()) == pytest.approx(32, rel=1e-3)  # every token counts alike
    assert torch.equal(statistics.reader_norm, torch.ones(32, dtype=torch.float64))


def test_samples_are_real_rows(tiny_graph: Any, tiny_batch: Any) -> None:
    model, graph = tiny_graph("llama")
    batches = [tiny_batch(2, 12, 5)]
    samples = stream_statistics(graph, [opened(graph)], batches)[0].samples
    assert samples is not None
    assert samples.dtype == torch.float64
    rows = watched(model, batches)
    assert samples.shape == rows.shape  # so few tokens that all are kept
    assert float(torch.cdist(samples, rows).min(1).values.max()) < 1e-4


def test_many_tokens_are_sampled(tiny_graph: Any, tiny_batch: Callable[..., Batch]) -> None:
    _, graph = tiny_graph("llama")
    batches = [tiny_batch(16, 64, seed=seed) for seed in range(2)]
    (statistics,) = stream_statistics(graph, [opened(graph)], batches)
    assert statistics.tokens == 5 * 2 * 16 * 64
    assert statistics.samples is not None
    assert SAMPLES / 2 < len(statistics.samples) <= SAMPLES


def test_samples_are_not_all_first_tokens(tiny_graph: Any, tiny_batch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row a norm and batch: sequences that begin alike must not give the same row every time."""
    _, graph = tiny_graph("llama")
    region = opened(graph)
    batches = [tiny_batch(2, 32, seed=seed) for seed in range(8)]
    for batch in batches:
        batch["input_ids"][:, 0] = 5
    monkeypatch.setattr("dotresize_fx.stream.SAMPLES", len(region.norms) * len(batches))
    samples = stream_statistics(graph, [region], batches)[0].samples
    assert samples is not None
    first_norm = samples[:: len(region.norms)]
    assert len(first_norm) == len(batches)
    assert len(first_norm.unique(dim=0)) > len(batches) // 2


def test_every_batch_is_told(tiny_graph: Any, tiny_batch: Any) -> None:
    _, graph = tiny_graph("llama")
    told: list[int] = []
    stream_statistics(graph, [opened(graph)], [tiny_batch(1, 8, seed=i) for i in range(3)], lambda: told.append(1))
    assert len(told) == 3
