"""Maps of heads in the graph: every stated size follows, tables are gathered, the scale stays what it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.graph import Kind
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.insert_maps import InsertMaps
from dotresize_fx.passes.pass_base import PassContractError
from dotresize_fx.region_map import RegionMap, pair_selection, selection
from dotresize_fx.regions import Region
from dotresize_fx.rotary_map import real_matrix

Trace = Callable[..., FxGraph]
LENGTH, WIDTH, SIZE = 3, 6, 4
X = torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0))
# Two more float32 products on the way, and sums of the same terms in another order.
ROUNDING = 1e-6


def split(x: torch.Tensor) -> torch.Tensor:
    return x.view(x.shape[0], LENGTH, -1, SIZE).transpose(1, 2)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return x * cos + torch.cat([-x[..., SIZE // 2 :], x[..., : SIZE // 2]], -1) * sin


def repeat(x: torch.Tensor) -> torch.Tensor:
    return x[:, :, None].expand(-1, 2, 2, LENGTH, SIZE).reshape(x.shape[0], 4, LENGTH, SIZE)


def attention(m: Any, x: torch.Tensor) -> torch.Tensor:
    angle = torch.cat([m.angle, m.angle], -1)
    query, key = (rotate(split(part(x)), angle.cos(), angle.sin()) for part in (m.q, m.k))
    mixed = F.scaled_dot_product_attention(query, repeat(key), repeat(split(m.v(x))))
    return m.o(mixed.transpose(1, 2).reshape(x.shape[0], LENGTH, 16))


def found(trace: Trace, kind: str) -> tuple[FxGraph, Region]:
    parts = {"q": nn.Linear(WIDTH, 16), "k": nn.Linear(WIDTH, 8), "v": nn.Linear(WIDTH, 8), "o": nn.Linear(16, 5)}
    graph = trace(attention, (2, LENGTH, WIDTH), **parts, angle=nn.Parameter(torch.empty(1, 1, LENGTH, SIZE // 2)))
    (region,) = find_regions(graph).of_kind(kind)
    return graph, region


def stated(graph: FxGraph) -> dict[str, tuple[int, ...]]:
    """The sizes that views, expands and slices state, less those that are computed."""
    sizes = {op.name: tuple(s for s in op.attributes.get("sizes", ()) if s) for op in graph.ops}
    slices = {op.name: (op.attributes["start"], op.attributes["stop"]) for op in graph.ops if "start" in op.attributes}
    return {name: size for name, size in {**sizes, **slices}.items() if size}


def test_before_and_after(trace: Trace, text: Callable[[FxGraph], str], run: Any, difference: Any) -> None:
    graph, region = found(trace, "value")
    lines = text(graph).splitlines()
    assert lines[-8:] == [
        "unsqueeze_2: 4 = unsqueeze(transpose_3)",
        "expand_2: 4 = expand(unsqueeze_2)",
        "reshape_2: 4 = reshape(expand_2)",
        "attention_1: 4 = attention(add_1, reshape_1, reshape_2)",
        "transpose_4: 4 = transpose(attention_1)",
        "reshape_3: 16 = reshape(transpose_4)",
        "linear_4: 5 = linear(reshape_3, o.weight[5,16], o.bias[5])",
        "return linear_4",
    ]
    down = torch.randn(2, SIZE, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    up = torch.linalg.pinv(down)
    # What a rank of three loses is taken out of the dense values: what is left passes whole.
    writer = graph.op(region.writers[0])
    kept = torch.block_diag(*(down @ up)).float()
    graph.set_weight(writer, kept.T @ graph.weight(writer))
    graph.set_bias(graph.op(writer.name), kept.T @ graph.bias(writer))
    before = run(graph, x=X)
    InsertMaps(region, RegionMap(down, up))(graph)
    assert text(graph).splitlines()[-12:] == [
        "linear_4: 6 = linear(linear_3, inserted_down.weight[6,8])",
        "view_3: 3 = view(linear_4)",
        "transpose_3: 3 = transpose(view_3)",
        "unsqueeze_2: 3 = unsqueeze(transpose_3)",
        "expand_2: 3 = expand(unsqueeze_2)",
        "reshape_2: 3 = reshape(expand_2)",
        "attention_1: 3 = attention(add_1, reshape_1, reshape_2)",
        "transpose_4: 3 = transpose(attention_1)",
        "reshape_3: 12 = reshape(transpose_4)",
        "linear_5: 16 = linear(reshape_3, inserted_up.weight[16,12])",
        "linear_6: 5 = linear(linear_5, o.weight[5,16], o.bias[5])",
        "return linear_6",
    ]
    assert difference(run(graph, x=X), before) <= ROUNDING


def test_rotary_pairs(trace: Trace, run: Any) -> None:
    graph, region = found(trace, "query_key")
    assert region.layout is not None
    assert [name for name, _ in region.layout.tables] == ["cos", "sin", "cos_1", "sin_1"]
    before = stated(graph)
    assert (before["slice_2"], before["slice_1"]) == ((0, 2), (2, None))
    attention_op = graph.op(region.attention)
    assert attention_op.attributes["scale"] is None
    insert = InsertMaps(region, pair_selection(torch.tensor([1]), SIZE))
    insert(graph)
    assert insert.ups == []
    assert graph.op(region.attention).attributes["scale"] == SIZE**-0.5
    after = stated(graph)
    assert (after["slice_2"], after["slice_1"]) == ((0, 1), (1, None))
    gathers = [op for op in graph.ops if op.spelling.startswith("index_select")]
    assert [op.inputs[0].name for op in gathers] == ["cos", "sin", "cos_1", "sin_1"]
    assert all(graph.parameter(op.inputs[1]).tolist() == [1, 3] for op in gathers)
    assert all(graph.is_buffer(op.inputs[1]) for op in gathers)
    assert run(graph, x=X)[0].isfinite().all()


def test_an_order_that_is_kept_needs_no_gathering(trace: Trace) -> None:
    graph, region = found(trace, "query_key")
    InsertMaps(region, pair_selection(torch.tensor([0, 1]), SIZE))(graph)
    assert not any(op.spelling.startswith("index_select") for op in graph.ops)


def test_kv_heads(trace: Trace, run: Any) -> None:
    graph, region = found(trace, "kv_heads")
    before = stated(graph)
    assert (before["expand_1"], before["reshape_1"], before["reshape_2"]) == ((-1, 2, 2, 3, 4), (4, 3, 4), (3, 16))
    down = selection(torch.tensor([1]), 2)
    InsertMaps(region, RegionMap(down, down.T))(graph)
    after = stated(graph)
    assert (after["expand_1"], after["reshape_1"], after["reshape_2"]) == ((-1, 1, 2, 3, 4), (2, 3, 4), (3, 8))
    assert run(graph, x=X)[0].isfinite().all()


def test_maps_that_do_not_cross_a_rotary_embedding(trace: Trace) -> None:
    graph, region = found(trace, "query_key")
    eye = torch.eye(SIZE, dtype=torch.float64)
    both = torch.arange(2)
    for down, pairs, reason in (
        (eye + eye.roll(1, 0), both, "only what mixes whole pairs"),
        (eye[[0, 2, 1, 3]], both, "only what mixes whole pairs"),
        (eye[:, :3], both, "3 numbers cannot be paired"),
        (eye[:3], both, "the map starts at 3, not 4"),
        (eye, None, "must name the pairs whose tables it keeps"),
        (eye, torch.tensor([0, 2]), r"\[0, 2\] are not 2 of its 2 rotary pairs"),
        (eye, torch.tensor([0]), r"\[0\] are not 2 of its 2 rotary pairs"),
    ):
        with pytest.raises(PassContractError, match=reason):
            InsertMaps(region, RegionMap(down, pairs=pairs))(graph)
    torn = RegionMap(eye, key_down=eye + eye.roll(1, 0), pairs=both)
    with pytest.raises(PassContractError, match="only what mixes whole pairs"):
        InsertMaps(region, torn)(graph)


@pytest.mark.parametrize("undone", [True, False])
def test_a_phase_and_a_scale_of_each_pair_and_head(trace: Trace, run: Any, difference: Any, undone: bool) -> None:
    """Queries times c and keys times 1 / conj(c) leave every score as it was; keys that keep their phase do not."""
    graph, region = found(trace, "query_key")
    before = run(graph, x=X)
    phases = torch.tensor([[[0.3, 2.0]], [[-1.0, 4.0]]], dtype=torch.float64)
    factors = torch.polar(torch.tensor([0.5, 1.5], dtype=torch.float64).expand(2, 1, 2), phases)
    keys = 1 / factors.conj() if undone else 1 / factors.abs() + 0j
    identity = torch.eye(2, dtype=torch.complex128)
    turned = RegionMap(real_matrix(identity * factors), key_down=real_matrix(identity * keys), pairs=torch.arange(2))
    InsertMaps(region, turned)(graph)
    off = difference(run(graph, x=X), before)
    assert off <= ROUNDING if undone else off >= 1000 * ROUNDING


def test_a_region_of_another_graph(trace: Trace) -> None:
    graph, region = found(trace, "query_key")
    full = pair_selection(torch.arange(2), SIZE)
    with pytest.raises(PassContractError, match=r"states 4, no multiple of 3: find the regions anew"):
        InsertMaps(replace(region, width=3), RegionMap(torch.eye(3, dtype=torch.float64)))(graph)
    swapped = pair_selection(torch.tensor([1, 0]), SIZE)
    InsertMaps(region, swapped)(graph)
    with pytest.raises(PassContractError, match="no table of it any more"):
        InsertMaps(region, full)(graph)
    assert next(op for op in graph.ops if op.kind is Kind.ATTENTION).attributes["scale"] == SIZE**-0.5
