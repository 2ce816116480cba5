"""More blocks to remove than there are: refused before capture where a model says how many it has."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import transformers

from dotresize_fx.errors import UsageError
from dotresize_fx.export.check_depth import check_depth, told_layers
from dotresize_fx.export.model_source import LoadedModel

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}


def loaded(model: Any) -> LoadedModel:
    return LoadedModel(model, None, None, copy.deepcopy(model.config), "decoder", "", {})


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "mixtral", "opt"])
def test_a_stack_of_layers_is_counted(tiny_model: Any, kind: str) -> None:
    source = loaded(tiny_model(kind, layers=3))
    assert told_layers(source) == 3
    check_depth(source, None)
    check_depth(source, 2)
    for count in (3, 99):
        with pytest.raises(UsageError, match=f"--merge {count}: the model has 3 blocks, of which one at least has to"):
            check_depth(source, count)


def test_nothing_is_said_of_layers_used_twice_or_beside_others() -> None:
    albert = transformers.AlbertModel(transformers.AlbertConfig(**SIZES, num_hidden_layers=2, embedding_size=16))
    sizes = {"vocab_size": 97, "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64}
    funnel = transformers.FunnelModel(transformers.FunnelConfig(**sizes, block_sizes=[1]))
    for model in (albert, funnel):
        assert told_layers(loaded(model)) is None
        check_depth(loaded(model), 99)
