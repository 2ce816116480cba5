"""find_heads: the three widths of an attention, and the reason where one of them is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.head_layout import HeadLayout
from dotresize_fx.passes.find_heads import find_heads
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.regions import Region, RegionKind, Symmetry

LENGTH, WIDTH, SIZE, HEADS, GROUPS = 3, 12, 4, 3, 2


def linears(kv_heads: int = HEADS, groups: int = GROUPS, **changes: nn.Module) -> dict[str, nn.Module]:
    sizes = {"q": (WIDTH, kv_heads * groups * SIZE), "k": (WIDTH, kv_heads * SIZE), "v": (WIDTH, kv_heads * SIZE)}
    sizes |= {"o": (kv_heads * groups * SIZE, WIDTH)}
    return {name: nn.Linear(*size) for name, size in sizes.items()} | changes


def split(x: torch.Tensor) -> torch.Tensor:
    return x.view(x.shape[0], LENGTH, -1, SIZE).transpose(1, 2)


def repeat(x: torch.Tensor, groups: int = GROUPS) -> torch.Tensor:
    return x[:, :, None].expand(-1, -1, groups, -1, -1).reshape(x.shape[0], -1, LENGTH, SIZE)


def merge(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], LENGTH, -1)


def grouped(m: Any, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    mixed = F.scaled_dot_product_attention(split(m.q(x)), repeat(split(m.k(x))), repeat(split(m.v(x))), mask)
    return x + m.o(merge(mixed))


Trace = Callable[..., FxGraph]
SHAPE = (2, LENGTH, WIDTH)


def test_the_regions_of_an_attention(trace: Trace, text: Callable[[FxGraph], str]) -> None:
    graph = trace(grouped, SHAPE, **linears())
    before = text(graph)
    assert (
        before
        == """\
linear_1: 24 = linear(x, q.weight[24,12], q.bias[24])
view_1: 4 = view(linear_1)
transpose_1: 4 = transpose(view_1)
linear_2: 12 = linear(x, k.weight[12,12], k.bias[12])
view_2: 4 = view(linear_2)
transpose_2: 4 = transpose(view_2)
unsqueeze_1: 4 = unsqueeze(transpose_2)
expand_1: 4 = expand(unsqueeze_1)
reshape_1: 4 = reshape(expand_1)
linear_3: 12 = linear(x, v.weight[12,12], v.bias[12])
view_3: 4 = view(linear_3)
transpose_3: 4 = transpose(view_3)
unsqueeze_2: 4 = unsqueeze(transpose_3)
expand_2: 4 = expand(unsqueeze_2)
reshape_2: 4 = reshape(expand_2)
attention_1: 4 = attention(transpose_1, reshape_1, reshape_2)
transpose_4: 4 = transpose(attention_1)
reshape_3: 24 = reshape(transpose_4)
linear_4: 12 = linear(reshape_3, o.weight[12,24], o.bias[12])
add_1: 12 = add(x, linear_4)
return add_1"""
    )
    found = find_heads(graph)
    assert (found.refused, found.reads_reasons, found.writes_reasons) == ((), {}, {})
    value, query_key, heads = found.regions
    assert text(graph) == before
    shared = {"attention": "scaled_dot_product_attention", "attention_reader": "linear_3", "target": "add", "heads": 3}
    for region in found.regions:
        assert {name: getattr(region, name) for name in shared} == shared
    assert (value.kind, value.symmetry, value.width) == (RegionKind.VALUE, Symmetry.HEADWISE_LINEAR, SIZE)
    assert (value.writers, value.readers, value.key_writers) == (("linear_2",), ("linear_3",), ())
    assert value.layout == HeadLayout(
        sizes=(("reshape_1", 3), ("expand_1", 4), ("view_2", 3), ("reshape_2", 2)),
    )
    assert (query_key.kind, query_key.symmetry) == (RegionKind.QUERY_KEY, Symmetry.HEADWISE_LINEAR)
    assert (query_key.writers, query_key.readers, query_key.key_writers) == (("linear", "linear_1"), (), ("linear_1",))
    assert (heads.kind, heads.symmetry, heads.width) == (RegionKind.HEADS, Symmetry.PERMUTATION, HEADS)
    assert (heads.writers, heads.readers) == (("linear", "linear_1", "linear_2"), ("linear_3",))
    assert heads.layout is not None
    assert ("view", 2) in heads.layout.sizes
    assert ("reshape_2", 2) in heads.layout.sizes


def test_the_linears_name_their_regions(trace: Trace) -> None:
    report = find_regions(trace(grouped, SHAPE, **linears()))
    value, query_key, heads = (next(report.of_kind(kind)).name for kind in ("value", "query_key", "kv_heads"))
    rows = {row.parameter: (row.reads, row.writes) for row in report.linears}
    assert rows["q.weight"] == rows["k.weight"] == (None, f"{query_key}, {heads}")
    assert rows["v.weight"][1] == f"{value}, {heads}"
    assert rows["o.weight"] == (f"{value}, {heads}", None)


def test_attention_that_shares_heads_by_itself(trace: Trace) -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        query, key, value = (split(part(x)) for part in (m.q, m.k, m.v))
        return x + m.o(merge(F.scaled_dot_product_attention(query, key, value, enable_gqa=True)))

    found = find_heads(trace(forward, SHAPE, **linears()))
    assert [(region.kind, region.width) for region in found.regions] == [
        ("value", SIZE),
        ("query_key", SIZE),
        ("kv_heads", HEADS),
    ]


def test_a_single_kv_head_is_all_there_is(trace: Trace) -> None:
    found = find_heads(trace(grouped, SHAPE, **linears(kv_heads=1)))
    assert [(region.kind, region.heads) for region in found.regions] == [("value", 1), ("query_key", 1)]
    assert found.refused == ()


def test_keys_and_values_for_a_cache(trace: Trace) -> None:
    """Appended to an empty cache and returned: their size is declared to change."""

    def forward(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        key, value = (torch.cat([x.new_zeros(0), split(part(x))], -2) for part in (m.k, m.v))
        return m.o(merge(F.scaled_dot_product_attention(split(m.q(x)), key, value))), key, value

    value, query_key, heads = find_heads(trace(forward, SHAPE, **linears(groups=1))).regions
    layouts = [region.layout.cache for region in (value, query_key, heads) if region.layout is not None]
    assert layouts == [("cat_1",), ("cat",), ("cat", "cat_1")]


def refusals(found: Any) -> dict[str, str]:
    return {what.rsplit(" ", 1)[1]: reason for what, reason in found.refused}


def test_a_mask_for_each_head_keeps_heads_in_place(trace: Trace) -> None:
    found = find_heads(trace(grouped, SHAPE, (2, HEADS * GROUPS, LENGTH, LENGTH), **linears()))
    assert [region.kind for region in found.regions] == ["value", "query_key"]
    assert refusals(found) == {"kv_heads": "the mask that is added to the scores differs from head to head"}
    assert len(find_heads(trace(grouped, SHAPE, (2, 1, LENGTH, LENGTH), **linears())).regions) == 3


def test_a_result_hidden_for_some_heads_keeps_heads_in_place(trace: Trace) -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        query, key, value = split(m.q(x)), repeat(split(m.k(x))), repeat(split(m.v(x)))
        mixed = F.scaled_dot_product_attention(query, key, value)
        return m.o(merge(torch.where(m.mask > 1, torch.zeros(()), mixed)))

    found = find_heads(trace(forward, SHAPE, **linears(), mask=nn.Parameter(torch.empty(HEADS * GROUPS, 1, 1))))
    assert [region.kind for region in found.regions] == ["value", "query_key"]
    assert refusals(found) == {"kv_heads": "what acts on it differs from head to head"}


def test_weights_packed_and_sliced_say_so(trace: Trace) -> None:
    """Also where a rotary embedding that is not understood stands before the slices."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        packed = m.q(x)
        query, key, value = (split(packed[..., i * 8 : i * 8 + 8]) for i in range(3))
        return m.k(merge(F.scaled_dot_product_attention(query + query.roll(1, -1), key, value)))

    report = find_regions(trace(forward, SHAPE, q=nn.Linear(WIDTH, 24), k=nn.Linear(8, WIDTH)))
    assert report.linears[0].writes_reason == "query, key and value are packed in one weight"


def test_qk_norm(trace: Trace) -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        query, key = m.norm(split(m.q(x))), m.norm(split(m.k(x)))
        return m.o(merge(F.scaled_dot_product_attention(query, repeat(key), repeat(split(m.v(x))))))

    found = find_heads(trace(forward, SHAPE, **linears(norm=nn.RMSNorm(SIZE, eps=1e-6))))
    assert [region.kind for region in found.regions] == ["value", "kv_heads"]
    assert "QK-norm" in refusals(found)["query_key"]


def test_a_value_that_is_read_elsewhere_leaves_queries_and_keys(trace: Trace) -> None:
    def forward(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        value = m.v(x)
        mixed = F.scaled_dot_product_attention(split(m.q(x)), repeat(split(m.k(x))), repeat(split(value)))
        return m.o(merge(mixed)), value.exp()

    graph = trace(forward, SHAPE, **linears())
    found = find_heads(graph)
    assert [region.kind for region in found.regions] == ["query_key"]
    assert refusals(found)["kv_heads"] == "of its value: it also goes into exp.default, which is not understood"
    rows = {row.parameter: row for row in find_regions(graph).linears}
    assert rows["v.weight"].writes_reason == "it also goes into exp.default, which is not understood"
    assert "of its value" in rows["o.weight"].reads_reason


def test_a_result_that_no_linear_reads(trace: Trace) -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(split(m.q(x)), repeat(split(m.k(x))), repeat(split(m.v(x)))).exp()

    graph = trace(forward, SHAPE, **linears())
    assert find_heads(graph).regions == []
    reasons = {row.parameter: row.writes_reason for row in find_regions(graph).linears}
    assert set(reasons.values()) == {"of its output: it goes into exp.default, which is not understood"}


@pytest.mark.parametrize("name", ["k", "v"])
def test_a_weight_that_is_used_twice(trace: Trace, name: str) -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return grouped(m, x) + getattr(m, name)(x.exp())

    found = find_heads(trace(forward, SHAPE, **linears()))
    left = {"k": ["value"], "v": ["query_key"]}
    assert [region.kind for region in found.regions] == left[name]
    assert refusals(found)["kv_heads"].endswith("its weight is used elsewhere too")


def test_names_are_of_the_module_that_holds_all(tiny_graph: Any) -> None:
    regions: list[Region] = find_heads(tiny_graph("llama")[1]).regions
    assert [region.name for region in regions[:3]] == [
        "model.layers.0.self_attn value",
        "model.layers.0.self_attn query_key",
        "model.layers.0.self_attn kv_heads",
    ]
    assert [region.symmetry for region in regions[:3]] == [
        Symmetry.HEADWISE_LINEAR,
        Symmetry.ROTARY_PAIRS,
        Symmetry.PERMUTATION,
    ]
