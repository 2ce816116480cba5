"""follow_on: from what an attention mixed to the linear that reads it, gates between included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.graph import Kind
from dotresize_fx.passes.close_dimension import Escape
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.follow_heads import Way
from dotresize_fx.passes.follow_mixed import follow_on
from dotresize_fx.passes.insert_maps import InsertMaps
from dotresize_fx.passes.prove_exactness import BOUND, BROKEN, map_regions
from dotresize_fx.region_map import RegionMap, random_admissible_map, random_wrong_map, selection
from dotresize_fx.regions import Symmetry

Trace = Callable[..., FxGraph]
Spelling = Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]
LENGTH, SIZE, WIDTH, HEADS = 3, 4, 8, 4
X = torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0))


def split(x: torch.Tensor, size: int = SIZE) -> torch.Tensor:
    return x.view(x.shape[0], LENGTH, -1, size)


def merge(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], LENGTH, -1)


def result_way(trace: Trace, spelling: Spelling) -> Way:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        heads = split(x, 2).transpose(1, 2)
        return spelling(m, F.scaled_dot_product_attention(heads, heads, heads), x)

    shapes = {"mask": (1, 1, LENGTH, 1), "by_head": (1, HEADS, 1, 1), "by_number": (1, 1, 1, 2)}
    masks = {name: nn.Parameter(torch.empty(shape)) for name, shape in shapes.items()}
    linears = {"o": nn.Linear(8, 6), "gate": nn.Linear(8, 8), "few": nn.Linear(8, HEADS), "norm": nn.RMSNorm(2, 1e-6)}
    graph = trace(forward, (2, LENGTH, 8), **linears, **masks)
    return follow_on(graph, next(op for op in graph.ops if op.kind is Kind.ATTENTION))


def hidden(x: torch.Tensor, mask: torch.Tensor, number: float) -> torch.Tensor:
    return torch.where(mask > 1, torch.full((), number), x)


def test_the_result_is_merged_and_read(trace: Trace) -> None:
    way = result_way(trace, lambda m, o, x: m.o(merge(o)))
    assert (way.heads, way.size, way.linear.name, way.gate) == (HEADS, 2, "linear", None)
    assert way.of_heads == way.of_size == [("reshape", 2)]


@pytest.mark.parametrize(("mask", "by_head"), [("mask", False), ("by_head", True)])
def test_a_result_may_be_hidden_or_scaled(trace: Trace, mask: str, by_head: bool) -> None:
    for spell in (lambda o, m: hidden(o, m, 0), lambda o, m: o * m):
        way = result_way(trace, lambda m, o, x, spell=spell: m.o(merge(spell(o, getattr(m, mask)))))
        assert (way.linear.name, way.by_head) == ("linear", by_head)


def test_a_gate_a_head_behind_the_merge(trace: Trace) -> None:
    """Merged, split again, scaled head by head and merged."""

    def spelling(m: Any, o: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        gated = split(merge(o), 2) * m.few(x).sigmoid()[..., None]
        return m.o(gated.view(x.shape[0], LENGTH, 8))

    way = result_way(trace, spelling)
    assert (way.by_head, way.gate) == (True, None)
    assert way.of_size == [("reshape", 2), ("view_1", 3), ("view_2", 2)]


GATES: dict[str, tuple[Spelling, bool]] = {
    "on what is merged": (lambda m, o, x: merge(o) * m.gate(x).sigmoid(), False),
    "split and merged again": (
        lambda m, o, x: merge(o) * F.silu(split(m.gate(x), 2) * 1.5).reshape(x.shape[0], LENGTH, 8),
        False,
    ),
    "on the heads": (lambda m, o, x: merge(o * split(m.gate(x), 2).transpose(1, 2).sigmoid()), False),
    "shaped as the result": (lambda m, o, x: (t := o.transpose(1, 2)) * m.gate(x).view_as(t).sigmoid(), False),
    "with a bias a head": (
        lambda m, o, x: merge(o * (split(m.gate(x), 2).transpose(1, 2) + m.by_head).sigmoid()),
        True,
    ),
}


@pytest.mark.parametrize("name", GATES)
def test_a_gate_a_number(trace: Trace, name: str) -> None:
    spelling, by_head = GATES[name]
    way = result_way(trace, lambda m, o, x: m.o(spelling(m, o, x).reshape(x.shape[0], LENGTH, 8)))
    assert way.gate is not None
    assert (way.gate.heads, way.gate.size, way.gate.by_head) == (HEADS, 2, by_head)
    assert {way.gate.linear.name, way.linear.name} == {"linear", "linear_1"}


RESULTS: dict[str, tuple[Spelling, str]] = {
    "hidden by another number": (lambda m, o, x: m.o(merge(hidden(o, m.mask, 1))), "where"),
    "hidden number by number": (lambda m, o, x: m.o(merge(hidden(o, m.by_number, 0))), "where"),
    "a gate of the result": (lambda m, o, x: m.o(torch.sigmoid(m.gate(merge(o))) * merge(o)), "several ops read it"),
    "a gate that no linear writes": (lambda m, o, x: m.o(merge(o) * x.exp()), "gate that is not understood"),
    "a gate read elsewhere": (
        lambda m, o, x: m.o(merge(o) * (g := m.gate(x)).exp()) * g.sum(),
        "gate that is not understood: it also goes into",
    ),
    "a gate with a norm": (
        lambda m, o, x: m.o(merge(o * m.norm(split(m.gate(x), 2).transpose(1, 2)))),
        "gate that a norm acts on",
    ),
    "two gates": (lambda m, o, x: m.o(merge(o) * m.gate(x).exp() * m.gate(x).sin()), "two gates"),
    "a gate of other heads": (
        lambda m, o, x: m.o(merge(o) * split(m.gate(x), 4).transpose(1, 2).reshape(x.shape[0], LENGTH, 8)),
        "gate that is not understood",
    ),
    "merged the other way": (lambda m, o, x: m.o(o.permute(0, 2, 3, 1).reshape(x.shape[0], LENGTH, 8)), "reshaped"),
    "heads apart": (lambda m, o, x: o.transpose(1, 2), "it is an output of the graph"),
    "a nonlinearity": (lambda m, o, x: m.o(merge(o).relu()), "it goes into relu.default, which is not understood"),
}


@pytest.mark.parametrize("name", RESULTS)
def test_results_that_are_refused(trace: Trace, name: str) -> None:
    spelling, reason = RESULTS[name]
    with pytest.raises(Escape) as refused:
        result_way(trace, spelling)
    assert reason in refused.value.reason


# -- regions -------------------------------------------------------------------------------------------


def gated(m: Any, x: torch.Tensor) -> torch.Tensor:
    query, key, value = (split(part(x)).transpose(1, 2) for part in (m.q, m.k, m.v))
    mixed = merge(F.scaled_dot_product_attention(query, key, value, enable_gqa=True))
    return x + m.o(mixed * m.gate(x).sigmoid())


def joint(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Products of matrices alone: batch and heads are one axis."""
    query, key, value = (split(part(x)).transpose(1, 2).reshape(-1, LENGTH, SIZE) for part in (m.q, m.k, m.v))
    weights = torch.bmm(query, key.transpose(1, 2)).view(x.shape[0], HEADS, LENGTH, LENGTH).softmax(-1)
    mixed = torch.bmm(weights.view(-1, LENGTH, LENGTH), value)
    return x + m.o(merge(mixed.view(x.shape[0], HEADS, LENGTH, SIZE)))


def graph_of(trace: Trace, forward: Any, kv_heads: int) -> FxGraph:
    sizes = {"q": (WIDTH, HEADS * SIZE), "k": (WIDTH, kv_heads * SIZE), "v": (WIDTH, kv_heads * SIZE)}
    sizes |= {"gate": (WIDTH, HEADS * SIZE), "o": (HEADS * SIZE, WIDTH)}
    return trace(forward, (2, LENGTH, WIDTH), **{name: nn.Linear(*size) for name, size in sizes.items()})


FORMS = {"gated": (gated, 2, ["value", "query_key", "kv_heads"]), "joint": (joint, HEADS, ["value"])}


@pytest.mark.parametrize("name", FORMS)
def test_maps_of_full_width(trace: Trace, run: Any, difference: Any, name: str) -> None:
    forward, kv_heads, kinds = FORMS[name]
    graph = graph_of(trace, forward, kv_heads)
    before = run(graph, x=X)
    assert {region.kind for region in find_regions(graph).regions if region.attention} == set(kinds)
    for kind in kinds:
        for draw, holds in ((random_admissible_map, True), (random_wrong_map, False)):
            mapped = graph.copy()
            assert map_regions(mapped, (kind,), draw) == 1
            worst = difference(run(mapped, x=X), before)
            assert worst <= BOUND if holds else worst >= BROKEN


def test_numbers_behind_a_gate_are_left_out(trace: Trace, text: Callable[[FxGraph], str], run: Any) -> None:
    graph = graph_of(trace, gated, 2)
    value = next(find_regions(graph).of_kind("value"))
    assert (value.symmetry, value.width, value.heads) == (Symmetry.PERMUTATION, SIZE, 2)
    assert [graph.parameter_name(graph.op(name).weight) for name in value.writers] == ["v.weight", "gate.weight"]
    assert value.linear_branch == value.writers[:1]
    kept = torch.stack([selection(torch.tensor(one), SIZE) for one in ([0, 2], [1, 3])])
    with torch.no_grad():  # what goes is silent: nothing is lost
        weight = graph.weight(graph.op(value.writers[0])).clone().view(2, SIZE, WIDTH)
        bias = graph.bias(graph.op(value.writers[0])).clone().view(2, SIZE)
        weight[0, [1, 3]], weight[1, [0, 2]], bias[0, [1, 3]], bias[1, [0, 2]] = 0, 0, 0, 0
        graph.set_weight(graph.op(value.writers[0]), weight.flatten(0, 1))
        graph.set_bias(graph.op(value.writers[0]), bias.flatten())
    before = run(graph, x=X)
    InsertMaps(value, RegionMap(kept, kept.mT))(graph)
    assert torch.allclose(run(graph, x=X)[0], before[0], atol=1e-6)  # sums of the same terms
    listed = text(graph)
    assert "sigmoid_1: 8 =" in listed
    assert "reshape_1: 8 =" in listed


def test_heads_that_are_one_axis_with_the_batch_stay(trace: Trace) -> None:
    refused = dict(find_regions(graph_of(trace, joint, HEADS)).refused)
    assert {what.rsplit(" ", 1)[1] for what in refused} == {"query_key", "kv_heads"}


def test_a_gate_that_differs_from_head_to_head_keeps_heads_in_place(trace: Trace, run: Any) -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        query, key, value = (split(part(x)).transpose(1, 2) for part in (m.q, m.k, m.v))
        gate = split(m.gate(x)).transpose(1, 2) + m.bias
        return m.o(merge(F.scaled_dot_product_attention(query, key, value) * gate.sigmoid()))

    parts = {name: nn.Linear(WIDTH, HEADS * SIZE) for name in ("q", "k", "v", "gate")}
    bias = nn.Parameter(torch.empty(1, HEADS, 1, 1))
    report = find_regions(trace(forward, (2, LENGTH, WIDTH), **parts, o=nn.Linear(HEADS * SIZE, WIDTH), bias=bias))
    assert {region.kind for region in report.regions} == {"value", "query_key"}
    assert [reason for _, reason in report.refused] == ["what acts on it differs from head to head"]
