"""Finding the weight files of a folder, and refusing what is not whole or not safetensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from dotresize_fx.errors import BadWeightsError, DotresizeError, ModelNotFoundError, UsageError
from dotresize_fx.export.model_source import load_model
from dotresize_fx.export.weight_files import weight_files

SaveModel = Callable[..., Path]


def refusal(kind: type[DotresizeError], folder: Path) -> str:
    with pytest.raises(kind) as caught:
        weight_files(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_shards_load_and_a_missing_one_is_named(tmp_path: Path, save_tiny_model: SaveModel) -> None:
    folder = save_tiny_model(tmp_path)
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    shards = sorted(file.name for file in folder.glob("*.safetensors"))
    assert len(shards) > 1
    assert [file.name for file in weight_files(folder)] == ["model.safetensors.index.json", *shards]
    assert torch.equal(load_model(str(folder)).model.state_dict()["lm_head.weight"], model.lm_head.weight)
    (folder / shards[-1]).unlink()
    assert shards[-1] in refusal(BadWeightsError, folder)
    index = folder / "model.safetensors.index.json"
    for name in ("../model-00001.safetensors", "pytorch_model.bin"):
        index.write_text(json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": name}}))
        assert "not a safetensors file of this folder" in refusal(BadWeightsError, folder)
    index.write_text("[]")
    assert "not an index" in refusal(BadWeightsError, folder)


def test_no_weights_and_pickled_weights(tmp_path: Path, save_tiny_model: SaveModel) -> None:
    folder = save_tiny_model(tmp_path)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    assert "holds no weights" in refusal(ModelNotFoundError, folder)
    torch.save(weights, folder / "pytorch_model.bin")
    assert "convert them to safetensors" in refusal(ModelNotFoundError, folder)


@pytest.mark.parametrize("size", [0, 5, 300, -1])
def test_truncated_weights(tmp_path: Path, save_tiny_model: SaveModel, size: int) -> None:
    file = save_tiny_model(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    said = refusal(BadWeightsError, tmp_path)
    assert "model.safetensors: truncated or damaged" in said


def test_a_distributed_checkpoint_is_refused(tmp_path: Path, save_tiny_model: SaveModel) -> None:
    folder = save_tiny_model(tmp_path)
    (folder / "shard-00000-model-00001-of-00001.safetensors").write_bytes(b"")
    assert "distributed" in refusal(UsageError, folder)
