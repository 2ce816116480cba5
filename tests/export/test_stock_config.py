"""Which field of a configuration says which width, found by trial."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from dotresize_fx.errors import CheckpointError
from dotresize_fx.export.stock_config import Cut, StockConfig
from dotresize_fx.export.stock_weights import StockWeights
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.regions import RegionKind

FIELDS: list[tuple[str, str, int, Mapping[str, int]]] = [
    ("llama", "ffn", 48, {"intermediate_size": 48}),  # max_position_embeddings is 64 too
    ("mixtral", "experts", 48, {"intermediate_size": 48}),
    ("gpt2", "ffn", 48, {"n_inner": 48}),  # left empty it follows from n_embd
    ("opt", "ffn", 48, {"ffn_dim": 48}),
    ("bert", "ffn", 48, {"intermediate_size": 48}),
    ("llama", "kv_heads", 1, {"num_key_value_heads": 1, "num_attention_heads": 2}),
    ("qwen2", "kv_heads", 1, {"num_key_value_heads": 1, "num_attention_heads": 2, "head_dim": 8}),
    ("qwen3", "residual", 20, {"hidden_size": 20}),
    ("phi3", "residual", 20, {"hidden_size": 20, "head_dim": 8}),
]


def cut_of(tiny_graph: Any, kind: str, width: str, narrow: int) -> tuple[StockConfig, Cut]:
    model, graph = tiny_graph(kind)
    regions = list(find_regions(graph).of_kind(RegionKind(width)))
    weights = StockWeights(model, graph)
    keys = frozenset(key for region in regions for key in weights.keys(region))
    return StockConfig(model, model.config), Cut(RegionKind(width), regions[0].width, narrow, keys)


@pytest.mark.parametrize(("kind", "width", "narrow", "fields"), FIELDS)
def test_finds_the_field_that_says_a_width(
    tiny_graph: Any, kind: str, width: str, narrow: int, fields: Mapping[str, int]
) -> None:
    config, cut = cut_of(tiny_graph, kind, width, narrow)
    found, shapes = config.narrowed([cut])
    before = tiny_graph(kind)[0].config.to_dict()
    assert {name: value for name, value in found.to_dict().items() if before.get(name) != value} == fields
    packed = {narrow, 2 * narrow}  # gate and up in one
    assert all(packed.intersection(shapes[key]) or width == "kv_heads" for key in cut.keys)


def test_a_width_of_some_layers_has_no_field(tiny_graph: Any) -> None:
    config, cut = cut_of(tiny_graph, "llama", "ffn", 48)
    some = Cut(cut.kind, cut.width, cut.narrow, frozenset(key for key in cut.keys if ".0." in key))
    with pytest.raises(CheckpointError, match=r"no LlamaForCausalLM has a ffn width of 48 for 64: .* does not say it"):
        config.narrowed([some])


@pytest.mark.parametrize(
    ("kind", "width", "narrow", "why"),
    [
        ("llama", "residual", 30, r"hidden size \(30\) is not a multiple of the number of attention heads \(4\)"),
        ("gpt2", "kv_heads", 3, "must be divisible by num_heads"),
        ("bert", "value", 6, "BertConfig has no field for it; leave the sizes of heads alone: --regions ffn"),
        ("llama", "value", 6, "head_dim does not say it alone"),  # nor do queries and keys get another size
    ],
)
def test_says_why_there_is_no_such_model(tiny_graph: Any, kind: str, width: str, narrow: int, why: str) -> None:
    config, cut = cut_of(tiny_graph, kind, width, narrow)
    with pytest.raises(CheckpointError, match=why):
        config.narrowed([cut])


def test_finds_of_what_a_width_must_be_a_multiple(tiny_graph: Any) -> None:
    def factor(kind: str, width: RegionKind, n: int) -> int:
        model, _ = tiny_graph(kind)
        return StockConfig(model, model.config).factor(width, n)

    assert factor("llama", RegionKind.RESIDUAL, 32) == 4
    assert factor("qwen3", RegionKind.RESIDUAL, 32) == 1
    assert factor("llama", RegionKind.HEADS, 2) == 1
    assert factor("llama", RegionKind.FFN, 64) == 1
