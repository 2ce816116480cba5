"""What a block is called."""

from __future__ import annotations

from typing import Any

import pytest

from dotresize_fx.depth.gone_block import gone_block
from dotresize_fx.passes.find_blocks import find_blocks


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("llama", "model.layers.1"),
        ("gpt2", "transformer.h.1"),
        ("bert", "encoder.layer.1"),
        ("mixtral", "model.layers.1"),
    ],
)
def test_a_block_is_named_by_its_weights(tiny_graph: Any, kind: str, name: str) -> None:
    _, graph = tiny_graph(kind)
    block = find_blocks(graph)[1]
    found = gone_block(graph, 1, block.ops)
    assert (found.name, found.ops, found.into, found.alpha) == (name, set(block.ops), None, None)


def test_weights_without_a_common_name_give_none(tiny_graph: Any) -> None:
    _, graph = tiny_graph("llama")
    assert gone_block(graph, 0, []).name == ""
    alone = next(op.name for op in graph.ops if op.weight is not None)
    assert gone_block(graph, 0, [alone]).name == ""
