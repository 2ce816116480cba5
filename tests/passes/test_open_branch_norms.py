"""OpenBranchNorms: a norm at the end of a branch writes the stream, and a linear of its own takes its gain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.passes.choose_regions import why_not_cut
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.open_branch_norms import OpenBranchNorms
from dotresize_fx.passes.prove_exactness import BOUND, BROKEN, map_regions
from dotresize_fx.region_map import random_admissible_map, random_wrong_map
from dotresize_fx.regions import Symmetry

IDS = torch.tensor([[0, 5, 2], [6, 1, 3], [4, 4, 0]])


def sandwich(m: Any, ids: torch.Tensor) -> torch.Tensor:
    stream = m.table(ids)
    stream = stream + m.behind(m.down(torch.relu(m.up(m.before(stream)))))
    return m.head(m.final(stream))


def post_norm(m: Any, ids: torch.Tensor) -> torch.Tensor:
    stream = m.table(ids)
    stream = m.behind(stream + m.down(torch.relu(m.up(stream))))
    return m.head(m.final(stream + m.other(torch.relu(m.second(stream)))))


def graph_of(trace: Callable[..., FxGraph], forward: Any, norm: Callable[[int], nn.Module]) -> FxGraph:
    parts = {name: norm(4) for name in ("before", "behind", "final")}
    parts |= {"up": nn.Linear(4, 8), "down": nn.Linear(8, 4), "other": nn.Linear(8, 4), "second": nn.Linear(4, 8)}
    return trace(forward, (2, 3), dtype=torch.int64, table=nn.Embedding(7, 4), head=nn.Linear(4, 7), **parts)


def test_before_and_after(trace: Callable[..., FxGraph], text: Callable[[FxGraph], str], run: Any) -> None:
    graph = graph_of(trace, sandwich, nn.RMSNorm)
    before = run(graph, ids=IDS)
    (stream,) = find_regions(graph).of_kind("residual")
    assert "sandwich" in why_not_cut(graph, stream)
    assert OpenBranchNorms(stream)(graph).modified
    listing = text(graph)
    assert "rms_norm_2: 4 = rms_norm(linear_2, eps=1.19209e-07)" in listing
    assert "linear_3: 4 = linear(rms_norm_2, rms_norm_1_gain.weight[4,4])" in listing
    assert torch.allclose(run(graph, ids=IDS)[0], before[0], atol=1e-6)  # a product with a diagonal matrix: rounding


@pytest.mark.parametrize("norm", [nn.RMSNorm, nn.LayerNorm])
def test_any_rotation_passes_and_an_uneven_scaling_does_not(
    trace: Callable[..., FxGraph], run: Any, difference: Callable[..., float], norm: Any
) -> None:
    expected = run(graph_of(trace, sandwich, norm), ids=IDS)
    for draw, good in ((random_admissible_map, True), (random_wrong_map, False)):
        graph = graph_of(trace, sandwich, norm)
        assert map_regions(graph, ("residual",), draw) == 2  # the stream, and what the sandwich norm reads
        found = difference(run(graph, ids=IDS), expected)
        assert found <= BOUND if good else found >= BROKEN


def test_a_norm_that_the_skip_carries_on_is_none(trace: Callable[..., FxGraph]) -> None:
    (stream,) = find_regions(graph_of(trace, post_norm, nn.LayerNorm)).of_kind("residual")
    assert stream.symmetry is Symmetry.PERMUTATION
    assert "post-norm" in stream.limit
    assert not set(stream.norms) & set(stream.writers)
