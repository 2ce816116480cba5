"""Putting maps, sweep and passes together on small graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dotresize_fx.cost import count_cost
from dotresize_fx.errors import NothingToSlimError
from dotresize_fx.options import Options
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.slim_graph import slim_graph
from dotresize_fx.progress import Progress

QUIET = Progress(quiet=True)


def batches(count: int = 4) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(16, 8, generator=generator)} for _ in range(count)]


def ffns_beside(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.head(x + m.down1(torch.relu(m.up1(x))) + m.down2(torch.relu(m.up2(x))))


def test_ffns_that_add_to_one_sum_are_one_sublayer(trace: Any, run: Any) -> None:
    parts = {"up1": nn.Linear(8, 32), "down1": nn.Linear(32, 8), "up2": nn.Linear(8, 32), "down2": nn.Linear(32, 8)}
    graph = trace(ffns_beside, (2, 8), **parts, head=nn.Linear(8, 3))
    options = Options(ratio=0.2, allocation="uniform")  # what is measured would be tokens of a language model
    slimmed = slim_graph(graph, find_regions(graph), batches(), options, QUIET)
    # 0.2 of 64 neurons, on a grid of 4.
    assert sorted(entry.region.width - entry.width for entry in slimmed.swept) == [4, 8]
    assert slimmed.notes == ()
    assert run(slimmed.graph, x=torch.ones(3, 8))[0].isfinite().all()


@pytest.mark.parametrize("regions", [("ffn",), ("residual",), ("ffn", "residual"), ("ffn", "attention")])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_a_quarter_goes(tiny_graph: Any, tiny_batch: Any, run: Any, kind: str, regions: tuple[str, ...]) -> None:
    _, dense = tiny_graph(kind)
    data = [tiny_batch(4, 24, 3, seed=seed) for seed in range(4)]
    options = Options(ratio=0.25, regions=regions, check=True)
    slimmed = slim_graph(dense, find_regions(dense), data, options, QUIET)
    before, after = (count_cost(graph, 16).block_linear_weights for graph in (dense, slimmed.graph))
    # One step of a tiny region's grid is up to a sixteenth of its width; a tied table under LayerNorm brings a
    # matrix behind the embedding.
    allowed = 0.08 if kind == "gpt2" or kind == "opt" else 0.04
    assert 1 - after / before == pytest.approx(0.25, abs=allowed)
    widths = {entry.region.name: entry.width for entry in slimmed.swept}
    assert all(slimmed.plan.widths[name] == width for name, width in widths.items())
    # All that was swept was cut, or refitted because scores or the stream were.
    cut = {entry.region.name for entry in slimmed.swept if entry.width < entry.region.width}
    assert {entry.method for entry in slimmed.swept if entry.region.name not in cut} <= {"refit"}
    assert {name for name, width in slimmed.plan.widths.items() if width < whole(dense)[name]} == cut
    assert run(slimmed.graph, **tiny_batch(2, 9, 2))[0].isfinite().all()


def whole(graph: Any) -> dict[str, int]:
    return {region.name: region.width for region in find_regions(graph).regions}


def test_a_post_norm_stream_is_refused(tiny_graph: Any, tiny_batch: Any) -> None:
    _, dense = tiny_graph("bert")
    with pytest.raises(NothingToSlimError, match="post-norm"):
        slim_graph(dense, find_regions(dense), [tiny_batch(2, 8)], Options(regions=("residual",)), QUIET)
