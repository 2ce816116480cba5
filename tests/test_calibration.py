"""From files to batches: what calibrates, what measures, and that they share nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dotresize_fx.calibration import CALIBRATION_BATCH, Text, load_text, prepare_data, sequences_at_once
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
    options = Options(calibration_tokens=1280, sequence_length=32, evaluation_tokens=96)
    data = prepare_data(load_text(files), options, tokenizer, "decoder", longest=64)
    assert [tuple(batch["input_ids"].shape) for batch in data.calibration] == [(CALIBRATION_BATCH, 32)] * (
        40 // CALIBRATION_BATCH
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


@pytest.mark.parametrize(
    ("tokens", "device", "expected"),
    [
        (196_608, "cpu", CALIBRATION_BATCH),
        (4_096, "cpu", 1),
        (196_608, "cuda", 16),
        (24_576, "cuda", 3),
        (64, "cuda", 1),
    ],
)
def test_batches_are_enough_to_hold_some_out(tokens: int, device: str, expected: int) -> None:
    assert sequences_at_once(tokens, 512, device) == expected


def test_a_step_of_repair_takes_fewer_on_a_gpu() -> None:
    assert sequences_at_once(196_608, 512, "cuda", repairs=True) == 8
    assert sequences_at_once(196_608, 512, "cpu", repairs=True) == CALIBRATION_BATCH


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


def supplemented(supplement: Callable[[], str] | None) -> Text:
    """Thirty paragraphs calibrate, one of them twice, and ten measure, one of which is among the thirty."""
    parts = [*PARAGRAPHS[:30], PARAGRAPHS[3]], [*PARAGRAPHS[30:39], PARAGRAPHS[5]]
    return Text(*("\n\n".join(part) for part in parts), "a text", "a text", supplement)


def test_an_encoder_sees_no_paragraph_twice_and_none_that_measures(tokenizer: Any) -> None:
    data = prepare_data(supplemented(None), Options(calibration_tokens=10_000), tokenizer, "encoder", longest=64)
    calibrating = [tokenizer.decode(row, skip_special_tokens=True) for row in rows(data.calibration)]
    measured = [tokenizer.decode(row, skip_special_tokens=True) for row in rows(data.evaluation)]
    assert (len(calibrating), len(set(calibrating)), len(measured)) == (29, 29, 10)
    assert not set(calibrating) & set(measured)


def test_an_encoder_with_too_little_text_gets_more(tokenizer: Any) -> None:
    text = supplemented(lambda: "\n\n".join(PARAGRAPHS))
    data = prepare_data(text, Options(calibration_tokens=10_000), tokenizer, "encoder", longest=64)
    assert data.description == "a text; docstrings calibrate too"
    calibrating = [tokenizer.decode(row, skip_special_tokens=True) for row in rows(data.calibration)]
    assert sorted(calibrating) == sorted([*PARAGRAPHS[:5], *PARAGRAPHS[6:30], *PARAGRAPHS[39:]])
    alone = prepare_data(supplemented(None), Options(calibration_tokens=10_000), tokenizer, "encoder", longest=64)
    assert rows(data.evaluation) == rows(alone.evaluation)
    assert data.sha256["calibration text"] != alone.sha256["calibration text"]


@pytest.mark.parametrize(("task", "tokens"), [("encoder", 250), ("decoder", 10_000)])
def test_who_has_enough_or_is_no_encoder_gets_no_more(tokenizer: Any, task: str, tokens: int) -> None:
    def unread() -> str:
        raise AssertionError("read")

    options = Options(calibration_tokens=tokens, sequence_length=16)
    assert prepare_data(supplemented(unread), options, tokenizer, task, longest=64).description == "a text"
