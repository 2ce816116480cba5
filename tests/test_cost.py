"""Parameters and multiply-accumulates, cross-checked with what PyTorch counts while the model runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dotresize_fx.cost import CostModel, block_linears, count_cost, macs_per_unit, weights_per_unit
from dotresize_fx.options import Options
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.open_stream import open_stream
from dotresize_fx.passes.slim_graph import slim_graph
from dotresize_fx.progress import Progress
from dotresize_fx.width_plan import WidthPlan

KINDS = ["llama", "gpt2", "qwen2", "opt", "bert"]


def counted_macs(model: Any, length: int) -> int:
    """Of one sequence, by PyTorch's counter: half its FLOPs, without the rotary tables' product.

    It counts fused attention on the CPU as nothing, so attention runs as two matrix products.
    """
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros(1, length, dtype=torch.int64))
    modules = counter.get_flop_counts()
    rotary = sum(sum(ops.values()) for name, ops in modules.items() if name.endswith("rotary_emb"))
    return (counter.get_total_flops() - rotary) // 2


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "opt"])
def test_macs_are_those_that_pytorch_counts(tiny_graph: Any, tiny_model: Any, kind: str) -> None:
    _, graph = tiny_graph(kind)
    for length in (16, 48):
        assert count_cost(graph, length).macs_per_token * length == counted_macs(tiny_model(kind), length)


def test_an_encoders_macs_but_for_the_pooler(tiny_graph: Any, tiny_model: Any) -> None:
    """PyTorch runs the pooler on the first token only; per token it is counted like any linear."""
    _, graph = tiny_graph("bert")
    pooler = 32 * 32
    assert (count_cost(graph, 24).macs_per_token - pooler) * 24 + pooler == counted_macs(tiny_model("bert"), 24)


def test_macs_by_formula(tiny_graph: Any) -> None:
    cost = count_cost(tiny_graph("llama")[1], 100)
    block = 2 * (32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 32 * 64)  # Q, K and V of 2 of 4 heads, O, FFN; two layers
    attention = 2 * 4 * 100 * (8 + 8)  # layers, heads, keys, head sizes of K and V
    assert cost.block_macs_per_token == cost.block_linear_weights == block
    assert cost.attention_macs_per_token == attention
    assert cost.macs_per_token == block + 97 * 32 + attention
    assert cost.length == 100


def test_experts_cost_what_a_token_is_routed_to(tiny_graph: Any) -> None:
    graph = tiny_graph("mixtral")[1]
    cost = count_cost(graph, 100)
    attention, router = 2 * 32 * 32 + 2 * 16 * 32, 4 * 32
    assert cost.block_linear_weights == 2 * (attention + router + 4 * 3 * 32 * 64)
    assert cost.block_macs_per_token == 2 * (attention + router + 2 * 3 * 32 * 64)
    region = next(find_regions(graph).of_kind("experts"))
    assert weights_per_unit(graph, region) == 4 * 3 * 32
    assert macs_per_unit(graph, region, 100) == 2 * 3 * 32


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_count_once_even_where_they_are_tied(tiny_graph: Any, kind: str) -> None:
    model, graph = tiny_graph(kind)
    expected = sum(parameter.numel() for parameter in model.parameters())
    assert count_cost(graph, 1).parameters == expected
    tied = kind in ("llama", "gpt2", "opt")
    assert (model.get_input_embeddings().weight is getattr(model.get_output_embeddings(), "weight", None)) == tied


@pytest.mark.parametrize("kind", KINDS)
def test_block_linears_are_all_but_head_and_pooler(tiny_graph: Any, kind: str) -> None:
    _, graph = tiny_graph(kind)
    names = {graph.parameter_name(op.weight) for op in block_linears(graph) if op.weight is not None}
    everything = {row.parameter for row in find_regions(graph).linears}
    outside = everything - names
    assert len(names) == {"llama": 14, "qwen2": 14, "gpt2": 12, "opt": 12, "bert": 12}[kind]
    assert len(outside) == 1
    # A tied head carries the embedding's name.
    assert outside <= {"lm_head.weight", "pooler.dense.weight", "transformer.wte.weight"} | {
        "model.embed_tokens.weight",
        "model.decoder.embed_tokens.weight",
    }


def test_a_gain_in_front_of_a_tied_head_belongs_to_the_head(tiny_graph: Any) -> None:
    _, graph = tiny_graph("llama")
    before = count_cost(graph, 1)
    (stream,) = find_regions(graph).of_kind("residual")
    open_stream(graph, stream)
    after = count_cost(graph, 1)
    assert after.block_linear_weights == before.block_linear_weights
    assert after.macs_per_token == before.macs_per_token + 32 * 32  # the matrix that keeps the tie is not free


@pytest.mark.parametrize("kind", KINDS)
def test_a_unit_of_width_is_what_a_cut_removes(tiny_graph: Any, tiny_batch: Any, kind: str) -> None:
    _, graph = tiny_graph(kind)
    batches = [tiny_batch(2, 16, seed=seed) for seed in range(2)]
    options = Options(ratio=0.2, method="magnitude")
    done = slim_graph(graph, find_regions(graph), batches, options, Progress(quiet=True))
    slimmed, swept = done.graph, done.swept
    units = sum((cut.region.width - cut.width) * weights_per_unit(graph, cut.region) for cut in swept)
    removed = count_cost(graph, 1).block_linear_weights - count_cost(slimmed, 1).block_linear_weights
    assert units == removed > 0


def test_weights_per_unit_by_formula(tiny_graph: Any) -> None:
    report = find_regions(graph := tiny_graph("llama")[1])
    assert {weights_per_unit(graph, region) for region in report.of_kind("ffn")} == {3 * 32}
    (stream,) = report.of_kind("residual")
    # Rows of Q, K, V, gate and up that read it, columns of O and down that write it; embedding and head are outside.
    assert weights_per_unit(graph, stream) == 2 * (32 + 16 + 16 + 64 + 64 + 32 + 64)


def test_macs_per_unit_by_formula(tiny_graph: Any) -> None:
    """Of heads of 8, two KV heads and four query heads on 32 channels; attention over 100 tokens."""
    report = find_regions(graph := tiny_graph("llama")[1])
    found = {str(region.kind): macs_per_unit(graph, region, 100) for region in report.regions}
    queries, head = 4 * 100, 8 * 100
    assert found == {
        "ffn": 3 * 32,
        "residual": weights_per_unit(graph, next(report.of_kind("residual"))),
        "value": (2 + 4) * 32 + queries,  # columns of V and rows of O, and the mixing
        "query_key": (4 + 2) * 32 + queries,  # columns of Q and K, and the scores
        "kv_heads": 8 * (2 + 1 + 1 + 2) * 32 + 2 * (head + head),  # two query heads a KV head: Q, K, V and O
    }


CUTS = {
    "ffn": {"model.layers.0.mlp": 40},
    "sizes of heads": {"model.layers.0.self_attn query_key": 6, "model.layers.1.self_attn value": 5},
    "whole heads": {"model.layers.1.self_attn kv_heads": 1},
    "both of a head": {"model.layers.1.self_attn query_key": 2, "model.layers.1.self_attn value": 3},
}


@pytest.mark.parametrize("widths", CUTS.values(), ids=CUTS.keys())
@pytest.mark.parametrize("kind", ["weights", "macs"])
def test_a_unit_of_width_costs_what_its_cut_saves(
    tiny_graph: Any, tiny_batch: Any, kind: str, widths: dict[str, int]
) -> None:
    _, graph = tiny_graph("llama")
    matches, cost = find_regions(graph), CostModel(kind, 24)
    slimmed = slim_graph(
        graph, matches, [tiny_batch(2, 24)], Options(), Progress(quiet=True), plan=WidthPlan(widths)
    ).graph
    regions = {region.name: region for region in matches.regions}
    units = sum((regions[n].width - width) * cost.per_unit(graph, regions[n]) for n, width in widths.items())
    assert cost.total(graph) - cost.total(slimmed) == units > 0


def test_total_costs(tiny_graph: Any) -> None:
    _, graph = tiny_graph("llama")
    counted = count_cost(graph, 100)
    assert CostModel().total(graph) == counted.block_linear_weights
    assert CostModel("macs", 100).total(graph) == counted.macs_per_token - 97 * 32  # all but the head
