"""From files to batches: what calibrates, what measures, and that they share nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dotresize_fx.calibration import CALIBRATION_BATCH, Text, load_text, prepare_data
from dotresize_fx.errors import TextError, UsageError
from dotresize_fx.options import Options
from dotresize_fx.text import text_sha256

# A hundred paragraphs that differ, so that a token sequence tells where it is from.
PARAGRAPHS = [f"paragraph number {i} of the text" for i in range(100)]


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    first, second = tmp_path / "first.txt", tmp_path / "second.txt"
    first.write_text("\n\n".join(PARAGRAPHS[:60]))
    second.write_text("\n\n".join(PARAGRAPHS[60:]))
    return [first, second]


@pytest.fixture
def tokenizer(tiny_tokenizer: Callable[[Path], Any], tmp_path: Path) -> Any:
    return tiny_tokenizer(tmp_path / "tokenizer")


def rows(batches: Any, name: str = "input_ids") -> list[list[int]]:
    return [row.tolist() for batch in batches for row in batch[name]]


def test_every_file_is_split_by_itself(files: list[Path]) -> None:
    text = load_text(files)
    assert text.description == "first.txt, second.txt, first 80 % of each calibrates, last 20 % measures"
    calibration, evaluation = text.calibration.split("\n\n"), text.evaluation.split("\n\n")
    assert sorted(filter(None, calibration + evaluation)) == sorted(PARAGRAPHS)
    assert not set(filter(None, calibration)) & set(filter(None, evaluation))
    for part, whole in ((PARAGRAPHS[:60], 60), (PARAGRAPHS[60:], 40)):
        # Cut at a paragraph, so off by one of them at most.
        assert len(set(part) & set(evaluation)) == pytest.approx(0.2 * whole, abs=1)


def test_without_files_the_text_that_python_carries() -> None:
    text = load_text([])
    assert text.names == "pydoc_data.topics"
    assert len(text.calibration) > 3 * len(text.evaluation) > 100_000


def test_a_decoder_gets_whole_sequences(files: list[Path], tokenizer: Any) -> None:
    options = Options(calibration_tokens=320, sequence_length=32, evaluation_tokens=96)
    data = prepare_data(load_text(files), options, tokenizer, "decoder", longest=64)
    assert [tuple(batch["input_ids"].shape) for batch in data.calibration] == [(CALIBRATION_BATCH, 32)] * (
        10 // CALIBRATION_BATCH
    )
    assert [tuple(batch["input_ids"].shape) for batch in data.evaluation] == [(1, 32)] * 3
    for batch in (*data.calibration, *data.evaluation):
        assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64
        assert batch["attention_mask"].all()
    text = load_text(files)
    for part, batches in ((text.calibration, data.calibration), (text.evaluation, data.evaluation)):
        assert all(tokenizer.decode(row) in part for row in rows(batches))
    assert data.sha256 == {
        "calibration text": text_sha256(text.calibration),
        "evaluation text": text_sha256(text.evaluation),
    }


def test_sequences_are_no_longer_than_the_model_takes(files: list[Path], tokenizer: Any) -> None:
    data = prepare_data(load_text(files), Options(sequence_length=512), tokenizer, "decoder", longest=16)
    assert {len(row) for row in rows(data.calibration)} == {16}


def test_an_encoder_gets_padded_paragraphs(files: list[Path], tokenizer: Any) -> None:
    data = prepare_data(load_text(files), Options(sequence_length=32), tokenizer, "encoder", longest=64)
    text = load_text(files)
    for part, batches in ((text.calibration, data.calibration), (text.evaluation, data.evaluation)):
        for ids, mask in zip(rows(batches), rows(batches, "attention_mask"), strict=True):
            real = [token for token, keep in zip(ids, mask, strict=True) if keep]
            assert len(real) <= 32
            assert (real[0], real[-1]) == (1, 2)  # [CLS] and [SEP]
            assert tokenizer.decode(real[1:-1]) in part
            assert set(ids[len(real) :]) <= {tokenizer.pad_token_id}


def test_the_same_text_gives_the_same_batches(files: list[Path], tokenizer: Any) -> None:
    def once() -> Any:
        return prepare_data(load_text(files), Options(sequence_length=32), tokenizer, "decoder", longest=64)

    assert rows(once().calibration) == rows(once().calibration)


def test_which_part_is_too_short(tokenizer: Any) -> None:
    options, enough = Options(sequence_length=32), "enough of words " * 10
    for calibration, evaluation, part in (("few", enough, "first 80 %"), (enough, "few", "last 20 %")):
        with pytest.raises(TextError, match=rf"^a\.txt, the {part}, which .*: the text has 3 tokens, at least 64"):
            prepare_data(Text(calibration, evaluation, "a.txt", "a.txt"), options, tokenizer, "decoder", longest=64)


def test_a_model_without_tokenizer_cannot_read(files: list[Path]) -> None:
    with pytest.raises(UsageError, match="has no tokenizer"):
        prepare_data(load_text(files), Options(), None, "decoder", longest=64)
