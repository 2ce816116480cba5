"""The blocks of tiny models of every make, and why other graphs have none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from dotresize_fx.errors import NothingToSlimError
from dotresize_fx.export.capture import capture
from dotresize_fx.passes.canonicalise import canonicalise
from dotresize_fx.passes.find_blocks import find_blocks

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
SIZES |= {"max_position_embeddings": 64}
# By model: how many states of the stream a block passes, and how many of its ops have weights.
FORMS = {"llama": (2, 9), "bert": (4, 8), "gpt2": (2, 8), "neox": (1, 8), "gemma": (2, 9), "mixtral": (2, 10)}


@pytest.mark.parametrize("kind", FORMS)
def test_every_layer_is_a_block(tiny_graph: Any, kind: str) -> None:
    _, graph = tiny_graph(kind)
    first, second = find_blocks(graph)
    states, owned = FORMS[kind]
    assert len(first.states) == len(second.states) == states
    assert len(first.owned) == len(second.owned) == owned
    assert first.end == second.start
    assert set(first.ops).isdisjoint(second.ops)
    assert first.form == second.form


def _graph(config: Any, make: Any) -> Any:
    model = make(config).eval()
    model.config.use_cache = False
    graph = capture(model).graph
    canonicalise(graph)
    return graph


def test_sliding_and_full_attention_are_unlike() -> None:
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    config = transformers.Qwen2Config(
        **SIZES,
        num_key_value_heads=2,
        num_hidden_layers=3,
        use_sliding_window=True,
        sliding_window=4,
        layer_types=kinds,
    )
    sliding, full, again = find_blocks(_graph(config, transformers.Qwen2ForCausalLM))
    assert sliding.form != full.form == again.form


def test_shared_layers_are_refused() -> None:
    config = transformers.AlbertConfig(**SIZES, num_hidden_layers=2, embedding_size=32)
    with pytest.raises(NothingToSlimError, match="share one set of weights"):
        find_blocks(_graph(config, transformers.AlbertModel))


def test_attention_to_another_stack_is_refused(trace: Any) -> None:
    """A decoder block that attends to what an encoder put out."""

    def attend(queries: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
        parts = (value.view(value.shape[0], 6, 1, 8).transpose(1, 2) for value in (queries, read, read))
        return nn.functional.scaled_dot_product_attention(*parts).transpose(1, 2).reshape(queries.shape)

    def forward(m: Any, ids: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        stream, read = m.table(ids), m.encode(seen)
        stream = stream + m.out(attend(m.query(stream), read))
        return m.head(stream + m.down(torch.relu(m.up(stream))))

    parts = {name: nn.Linear(8, 8) for name in ("encode", "query", "out", "up", "down", "head")}
    module = type("Traced", (nn.Module,), {"forward": forward})()
    for name, part in (parts | {"table": nn.Embedding(9, 8)}).items():
        setattr(module, name, part)
    from dotresize_fx.fx_form.graph import FxGraph

    inputs = (torch.ones(2, 6, dtype=torch.int64), torch.ones(2, 6, 8))
    with pytest.raises(NothingToSlimError, match="encoder-decoder"):
        find_blocks(FxGraph(torch.export.export(module, inputs)))


def test_no_attention_no_blocks(trace: Any) -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.head(x + m.down(torch.relu(m.up(x))))

    graph = trace(forward, (2, 8), up=nn.Linear(8, 16), down=nn.Linear(16, 8), head=nn.Linear(8, 3))
    with pytest.raises(NothingToSlimError, match="no blocks found"):
        find_blocks(graph)
