"""FoldLinears: inserted linears are multiplied away, and the graph computes what it did with them in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.graph import Kind
from dotresize_fx.passes.fold_linears import FoldLinears
from dotresize_fx.passes.pass_base import PassContractError

Run = Callable[..., list[torch.Tensor]]
Difference = Callable[..., float]

IDS = torch.tensor([[0, 5, 2], [6, 1, 3], [4, 4, 0]])
# Products are taken in float64 and rounded to float32 once, where the unfolded graph rounds at every linear. The
# matrices here have at most 8 columns and entries of about 1.
ROUNDING = 1e-5


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) / columns**0.5


def insert(graph: FxGraph, after: str, before: str, k: int, *, bias: bool = False) -> tuple[list[str], list[str]]:
    """n -> k behind one op, k -> n before another that reads it; returns (downs, ups)."""
    writer, reader = graph.op(after), graph.op(before)
    n = writer.output.width or 0
    down = graph.insert_linear(writer.output, matrix(k, n, 1), matrix(1, k, 2)[0] if bias else None, name="down_map")
    reader = graph.op(reader.name)
    shift = matrix(1, n, 4)[0] if bias else None
    up = graph.insert_linear(reader.inputs[0], matrix(n, k, 3), shift, users=[reader], name="up_map")
    return [down.name], [up.name]


def plain(trace: Callable[..., FxGraph], n: int = 8, *, bias: bool = True, width: int = 4) -> FxGraph:
    parts = {"up": nn.Linear(width, n, bias=bias), "down": nn.Linear(n, width, bias=bias)}
    return trace(lambda m, x: m.down(torch.relu(m.up(x))), (2, width), **parts)


def tied(trace: Callable[..., FxGraph], width: int = 4) -> FxGraph:
    table, head = nn.Embedding(7, width), nn.Linear(width, 7, bias=False)
    head.weight = table.weight
    return trace(lambda m, ids: m.head(torch.relu(m.table(ids))), (2, 3), dtype=torch.int64, table=table, head=head)


def test_before_and_after(trace: Callable[..., FxGraph], text: Callable[[FxGraph], str]) -> None:
    graph = plain(trace)
    downs, ups = insert(graph, "linear", "linear_1", 3, bias=True)
    assert (
        text(graph)
        == """\
linear_1: 8 = linear(x, up.weight[8,4], up.bias[8])
linear_2: 3 = linear(linear_1, down_map.weight[3,8], down_map.bias[3])
relu_1: 3 = relu(linear_2)
linear_3: 8 = linear(relu_1, up_map.weight[8,3], up_map.bias[8])
linear_4: 4 = linear(linear_3, down.weight[4,8], down.bias[4])
return linear_4"""
    )
    assert FoldLinears(downs, ups)(graph).records == ("folded down_map", "folded up_map")
    assert (
        text(graph)
        == """\
linear_1: 3 = linear(x, up.weight[3,4], up.bias[3])
relu_1: 3 = relu(linear_1)
linear_2: 4 = linear(relu_1, down.weight[4,3], down.bias[4])
return linear_2"""
    )
    shapes = {name: tuple(tensor.shape) for name, tensor in graph.program.state_dict.items()}
    assert shapes == {"up.weight": (3, 4), "up.bias": (3,), "down.weight": (4, 3), "down.bias": (4,)}


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    n=st.integers(2, 8),
    k=st.integers(1, 8),
    width=st.integers(2, 6),
    own_bias=st.booleans(),
    map_bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_folding_changes_nothing(
    trace: Callable[..., FxGraph],
    run: Run,
    difference: Difference,
    n: int,
    k: int,
    width: int,
    own_bias: bool,
    map_bias: bool,
    seed: int,
) -> None:
    graph = plain(trace, n, bias=own_bias, width=width)
    downs, ups = insert(graph, "linear", "linear_1", k, bias=map_bias)
    x = matrix(5, width, seed)
    before = run(graph, x=x)
    FoldLinears(downs, ups)(graph)
    assert [op.kind for op in graph.ops] == [Kind.LINEAR, Kind.POINTWISE, Kind.LINEAR]
    assert difference(run(graph, x=x), before) <= ROUNDING
    assert {size for tensor in graph.program.state_dict.values() for size in tensor.shape} <= {k, width}


@settings(max_examples=10, deadline=None, derandomize=True)
@given(width=st.integers(2, 6), k=st.integers(1, 6), same=st.booleans(), rows_at_once=st.sampled_from([2, 7, 100]))
def test_a_tied_table_stays_one_where_both_sides_fold_the_same(
    trace: Callable[..., FxGraph], run: Run, difference: Difference, width: int, k: int, same: bool, rows_at_once: int
) -> None:
    graph = tied(trace, width)
    down = graph.insert_linear(graph.op("embedding").output, matrix(k, width, 1), name="down_map")
    head = graph.op("linear")
    up = matrix(width, k, 3) if not same else matrix(k, width, 1).T
    inserted = graph.insert_linear(head.inputs[0], up, users=[head], name="up_map")
    before = run(graph, ids=IDS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dotresize_fx.passes.fold_linears.ROWS_AT_ONCE", rows_at_once)
        FoldLinears([down.name], [inserted.name])(graph)
    assert difference(run(graph, ids=IDS), before) <= ROUNDING
    tables = [tensor for tensor in graph.program.state_dict.values() if tensor.shape[0] == 7]
    assert len(tables) == (1 if same else 2)
    assert all(table.shape == (7, k) for table in tables)


def test_a_table_that_only_the_lookup_folds_is_forked(
    trace: Callable[..., FxGraph], text: Callable[[FxGraph], str], run: Run, difference: Difference
) -> None:
    graph = tied(trace)
    down = graph.insert_linear(graph.op("embedding").output, matrix(4, 4, 1), name="down_map")
    before = run(graph, ids=IDS)
    FoldLinears([down.name], [])(graph)
    assert (
        text(graph)
        == """\
embedding_1: 4 = embedding(ids, head.weight_1[7,4])
relu_1: 4 = relu(embedding_1)
linear_1: 7 = linear(relu_1, head.weight[7,4])
return linear_1"""
    )
    assert difference(run(graph, ids=IDS), before) <= ROUNDING


def test_a_layer_that_is_called_twice_stays_one(
    trace: Callable[..., FxGraph], run: Run, difference: Difference
) -> None:
    def twice(m: Any, x: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            x = x + m.down(torch.relu(m.up(x)))
        return x

    graph = trace(twice, (2, 4), up=nn.Linear(4, 8), down=nn.Linear(8, 4))
    first = insert(graph, "linear", "linear_1", 3)
    second = insert(graph, "linear_2", "linear_3", 3)
    before = run(graph, x=matrix(5, 4))
    FoldLinears(first[0] + second[0], first[1] + second[1])(graph)
    assert difference(run(graph, x=matrix(5, 4)), before) <= ROUNDING
    weights = sorted(tuple(t.shape) for t in graph.program.state_dict.values() if t.ndim == 2)
    assert weights == [(3, 4), (4, 3)]


def test_linears_that_share_a_weight_and_fold_different_maps_part(
    trace: Callable[..., FxGraph], run: Run, difference: Difference
) -> None:
    graph = trace(lambda m, x: m.up(m.up(x)), (2, 4), up=nn.Linear(4, 4))
    downs = [
        graph.insert_linear(graph.op(name).output, matrix(4, 4, seed), name="down_map").name
        for seed, name in enumerate(["linear", "linear_1"])
    ]
    before = run(graph, x=matrix(5, 4))
    FoldLinears(downs, [])(graph)
    assert difference(run(graph, x=matrix(5, 4)), before) <= ROUNDING
    assert len([t for t in graph.program.state_dict.values() if t.ndim == 2]) == 2


def test_a_linear_that_folds_on_both_sides(trace: Callable[..., FxGraph], run: Run, difference: Difference) -> None:
    graph = trace(lambda m, x: m.b(m.a(x)), (2, 4), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    b = graph.op("linear_1")
    up = graph.insert_linear(b.inputs[0], matrix(4, 4, 1), users=[b], name="up_map")
    down = graph.insert_linear(graph.op("linear_1").output, matrix(4, 4, 2), name="down_map")
    before = run(graph, x=matrix(5, 4))
    FoldLinears([down.name], [up.name])(graph)
    assert len(graph.ops) == 2
    assert difference(run(graph, x=matrix(5, 4)), before) <= ROUNDING


def test_half_precision_is_kept(trace: Callable[..., FxGraph]) -> None:
    layers = {"up": nn.Linear(4, 8).bfloat16(), "down": nn.Linear(8, 4).bfloat16()}
    graph = trace(lambda m, x: m.down(torch.relu(m.up(x.to(torch.bfloat16)))), (2, 4), **layers)
    weight = graph.weight(graph.op("linear")).double()
    down = graph.insert_linear(graph.op("linear").output, matrix(3, 8, 1).bfloat16(), name="down_map")
    FoldLinears([down.name], [])(graph)
    folded = graph.weight(graph.op("linear"))
    assert torch.equal(folded, (matrix(3, 8, 1).bfloat16().double() @ weight).bfloat16())


def test_a_writer_that_something_else_reads_is_refused(trace: Callable[..., FxGraph]) -> None:
    graph = trace(
        lambda m, x: m.down(h := m.up(x)) + torch.relu(h)[:, :4], (2, 4), up=nn.Linear(4, 8), down=nn.Linear(8, 4)
    )
    reader = graph.op("linear_1")
    down = graph.insert_linear(graph.op("linear").output, matrix(8, 8), users=[reader], name="down_map")
    with pytest.raises(PassContractError, match="follows no weight of its own"):
        FoldLinears([down.name], [])(graph)


def test_a_nonlinearity_between_is_refused(trace: Callable[..., FxGraph]) -> None:
    graph = plain(trace)
    behind_relu = graph.insert_linear(graph.op("relu").output, matrix(8, 8), name="map")
    with pytest.raises(PassContractError, match="follows no weight of its own"):
        FoldLinears([behind_relu.name], [])(graph)
    graph = plain(trace)
    before_relu = graph.insert_linear(graph.op("linear").output, matrix(8, 8), name="map")
    with pytest.raises(PassContractError, match="has no reader of its own"):
        FoldLinears([], [before_relu.name])(graph)
