"""Text from an exported decoder, and what is said where none can come."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from dotresize_fx.errors import ModelNotFoundError, UsageError
from dotresize_fx.export.generate import Generator, Speed, _TextStream

VOCAB = 300


@pytest.fixture
def folder(tmp_path: Path, save_tiny_model: Callable[..., Path]) -> Callable[..., Path]:
    """``folder(next_token, cache=True, task="decoder")``: as export writes it, each token followed by a known one."""

    def make(following: dict[int, int], *, cache: bool = True, task: str = "decoder") -> Path:
        save_tiny_model(tmp_path)
        table = np.zeros((VOCAB, VOCAB), np.float32)
        for token in range(VOCAB):
            table[token, following.get(token, 0)] = 1
        ints, floats = TensorProto.INT64, TensorProto.FLOAT
        inputs = [helper.make_tensor_value_info(n, ints, ["b", n]) for n in ("input_ids", "attention_mask")]
        outputs = [helper.make_tensor_value_info("logits", floats, ["b", "input_ids", VOCAB])]
        nodes = [helper.make_node("Gather", ["table", "input_ids"], ["logits"])]
        if cache:
            inputs.append(helper.make_tensor_value_info("past_key_values.0.key", floats, ["b", 1, "past", 1]))
            outputs.append(helper.make_tensor_value_info("present.0.key", floats, ["b", 1, "attention_mask", 1]))
            nodes.append(helper.make_node("Cast", ["input_ids"], ["keys"], to=floats))
            nodes.append(helper.make_node("Unsqueeze", ["keys", "axes"], ["new"]))
            nodes.append(helper.make_node("Concat", ["past_key_values.0.key", "new"], ["present.0.key"], axis=2))
        stored = [numpy_helper.from_array(table, "table"), numpy_helper.from_array(np.array([1, 3]), "axes")]
        graph = helper.make_graph(nodes, "next", inputs, outputs, stored if cache else stored[:1])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        onnx.save(model, tmp_path / "model.onnx")
        (tmp_path / "report.json").write_text(json.dumps({"model": {"task": task}}))
        return tmp_path

    return make


def token(folder: Path, letter: str) -> int:
    from transformers import AutoTokenizer

    found: int = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(letter)
    return found


@pytest.fixture
def counting(folder: Callable[..., Path]) -> Path:
    """After the letter a comes b, and so on to f; after x, and after the separator that the tokenizer adds, a."""
    place = folder({})
    first, *letters = [token(place, letter) for letter in "xabcdef"]
    return folder({2: letters[0], **dict(zip([first, *letters], letters, strict=False))})


def test_text_comes_in_pieces_until_there_is_enough(counting: Path) -> None:
    speed = Speed()
    assert list(Generator(counting, threads=1).pieces("x", 4, speed)) == ["a", "b", "c", "d"]
    assert (speed.prompt_tokens, speed.tokens) == (2, 4)  # the separator ends a text: nothing goes on from it
    assert speed.prompt_seconds > 0 < speed.seconds
    assert str(speed).startswith("4 tokens; prompt of 2 in 0.0")
    assert str(speed).endswith(" tokens/s")


def test_it_ends_where_the_model_does_and_where_its_positions_do(counting: Path) -> None:
    config = json.loads((counting / "config.json").read_text())
    (counting / "config.json").write_text(json.dumps(config | {"eos_token_id": [token(counting, "c")]}))
    assert "".join(Generator(counting, threads=1).pieces("x", 50, Speed())) == "ab"
    (counting / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 5, "eos_token_id": None}))
    assert "".join(Generator(counting, threads=1).pieces("x", 50, Speed())) == "ab"
    with pytest.raises(UsageError, match="the prompt is 7 tokens long, and the model takes 5"):
        list(Generator(counting, threads=1).pieces("x" * 5, 50, Speed()))
    with pytest.raises(UsageError, match="--max-tokens is 0"):
        list(Generator(counting, threads=1).pieces("x", 0, Speed()))


def test_characters_of_several_tokens_come_whole(counting: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(counting)
    ids = tokenizer("a naïve €", add_special_tokens=False).input_ids
    stream = _TextStream(tokenizer, ids[:1])
    pieces = [stream.add(each) for each in ids[1:]]
    assert "".join(pieces) == " naïve €"
    assert "ï" in pieces
    assert "€" in pieces


@pytest.mark.parametrize(
    ("made", "said"),
    [({"cache": False}, "a graph without a cache"), ({"task": "encoder"}, "an encoder, which generates no text")],
)
def test_graphs_that_cannot_generate(folder: Callable[..., Path], made: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Generator(folder({}, **made))


def test_folders_that_are_broken(counting: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no ONNX model at .*nowhere"):
        Generator(tmp_path / "nowhere")
    (counting / "tokenizer.json").unlink()
    (counting / "tokenizer_config.json").unlink()
    with pytest.raises(UsageError, match="no readable tokenizer"):
        Generator(counting)
    (counting / "report.json").write_text("[]")
    with pytest.raises(UsageError, match="not a report"):
        Generator(counting)
    (counting / "report.json").unlink()
    (counting / "model.onnx").write_bytes(b"\x00" * 64)
    with pytest.raises(ModelNotFoundError, match="is not an ONNX model"):
        Generator(counting)
