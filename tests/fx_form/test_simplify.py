"""A program made shorter: the same numbers, fewer ops."""

from __future__ import annotations

import torch

from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.fx_form.simplify import simplify

aten = torch.ops.aten


class Repeats(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        first = (x * 2)[:, 0:].clone().reshape(x.shape)
        second = (x * 2).transpose(0, 1).contiguous().view(-1)
        return first + 1, second, (x * 2.0)[:, 1:], x * 2


def captured(module: torch.nn.Module) -> FxGraph:
    batch = torch.export.Dim("batch")
    return FxGraph(torch.export.export(module, (torch.ones(3, 4),), dynamic_shapes=({0: batch},)))


def targets(graph: FxGraph) -> list[object]:
    return [node.target for node in graph.nodes.nodes if node.op == "call_function"]


def test_what_is_computed_twice_is_computed_once_and_copies_are_gone() -> None:
    graph = captured(Repeats())
    inputs = {"x": torch.randn(5, 4)}
    expected = Execution(graph).outputs(inputs)
    assert simplify(graph)
    found = targets(graph)
    # 2 and 2.0 are not the same to an op, and what is put out keeps its node.
    assert found.count(aten.mul.Tensor) == 3
    assert [kind for kind in found if kind in (aten.clone.default, aten.contiguous.default)] == []
    assert found.count(aten.slice.Tensor) == 1
    assert found.count(aten.reshape.default) == 1
    graph.program.validate()
    for one, other in zip(Execution(graph).outputs(inputs), expected, strict=True):
        assert torch.equal(one, other)


def test_random_ops_stay_two() -> None:
    class Noise(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.rand_like(x) - torch.rand_like(x)

    graph = captured(Noise())
    simplify(graph)
    assert targets(graph).count(aten.rand_like.default) == 2


def test_a_program_that_writes_in_place_is_left_alone() -> None:
    class Writes(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x * 2
            y.add_(1)
            return y + x * 2

    graph = captured(Writes())
    before = targets(graph)
    assert simplify(graph) == 0
    assert targets(graph) == before


def test_an_index_that_picks_all_in_order_is_none() -> None:
    class Picks(torch.nn.Module):
        def forward(self, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            rows, columns = (torch.arange(size) for size in mask.shape)
            return mask[rows[:, None, None, None], columns[None, None, None]] + 1, mask[rows[:, None], columns + 0] + 1

    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    shapes = ({0: batch, 1: length},)
    graph = FxGraph(torch.export.export(Picks(), (torch.ones(3, 4),), dynamic_shapes=shapes))
    simplify(graph)
    assert targets(graph).count(aten.index.Tensor) == 1  # what was computed to be all is not known to be
    graph.program.validate()
    mask = torch.randn(5, 7)
    for one, other in zip(Execution(graph).outputs({"mask": mask}), Picks()(mask), strict=True):
        assert torch.equal(one, other)


def test_all_that_is_true_and_an_expansion_to_the_same_shape_are_none() -> None:
    class Masks(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            positive = x > 0
            kept = torch.ones((), dtype=torch.bool) & positive.expand(x.shape)
            wider = torch.ones(1, x.shape[0], 1, dtype=torch.bool) & positive
            return kept * 2, wider * 2

    graph = captured(Masks())
    simplify(graph)
    found = targets(graph)
    assert found.count(aten.__and__.Tensor) + found.count(aten.bitwise_and.Tensor) == 1  # the wider changes the shape
    assert aten.expand.default not in found
    graph.program.validate()
    x = torch.randn(5, 4)
    for one, other in zip(Execution(graph).outputs({"x": x}), Masks()(x), strict=True):
        assert torch.equal(one, other)
