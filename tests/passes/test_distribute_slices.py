"""DistributeSlices: parts of a sum become sums of parts, so that the linear in it can be split."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dotresize_fx.passes.distribute_slices import DistributeSlices
from dotresize_fx.passes.split_packed_linears import SplitPackedLinears

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
ROUNDING = 1e-6  # products of fewer rows at a time may add up in another order


def by_turns(m: Any, x: torch.Tensor) -> torch.Tensor:
    both = m.packed(x) + m.table[(x[:, 0] > 0).long()]
    return m.out(torch.relu(both[..., ::2]) * both[..., 1::2])


def in_halves(m: Any, x: torch.Tensor) -> torch.Tensor:
    gate, up = (m.packed(x) + m.other(x)).chunk(2, -1)
    return m.out(torch.relu(gate) * up)


def parts() -> dict[str, Any]:
    linears = {"packed": nn.Linear(4, 6), "other": nn.Linear(4, 6), "out": nn.Linear(3, 4)}
    return linears | {"table": nn.Parameter(torch.empty(2, 6))}


def test_before_and_after(trace: Any, text: Any, run: Any, difference: Any) -> None:
    graph = trace(by_turns, (2, 4), **parts())
    before, listing = run(graph, x=X), text(graph)
    assert "slice(add_1)" in listing
    assert DistributeSlices()(graph).modified
    assert SplitPackedLinears()(graph).records == ("packed.weight: seen as 2 linears",)
    after = text(graph)
    assert "packed.0.weight[3,4]" in after
    assert "packed.1.weight[3,4]" in after
    assert "table_0[2,3]" in after
    assert "table_1[2,3]" in after
    assert "slice" not in after.partition("linear_1")[2]
    assert difference(run(graph, x=X), before) <= ROUNDING


def test_two_linears_that_are_split_together(trace: Any, run: Any, difference: Any) -> None:
    graph = trace(in_halves, (2, 4), **parts())
    before = run(graph, x=X)
    assert DistributeSlices()(graph).modified
    assert len(SplitPackedLinears()(graph).records) == 2
    assert difference(run(graph, x=X), before) <= ROUNDING


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: (both := m.packed(x) + m.other(x)).sum() + m.out(both[..., :3] * both[..., 3:]),
        lambda m, x: m.out((both := m.packed(x) + x[:, :1])[..., :3] * both[..., 3:]),
        lambda m, x: m.out((m.packed(x) + m.other(x))[..., :3]),
    ],
    ids=["read whole", "broadcast", "one slice"],
)
def test_others_stay(trace: Any, forward: Any) -> None:
    assert not DistributeSlices()(trace(forward, (2, 4), **parts())).modified


def test_a_sum_of_numbers_has_no_parts(trace: Any) -> None:
    graph = trace(lambda m, x: m.packed(x)[..., :4] * (x.sum() + x.mean()), (2, 4), **parts())
    assert not DistributeSlices()(graph).modified
