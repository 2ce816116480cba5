"""Reading, splitting and batching text."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dotresize_fx.errors import TextError
from dotresize_fx.text import (
    default_text,
    library_docstrings,
    new_paragraphs,
    paragraphs,
    read_text,
    sentence_batches,
    split_text,
    text_sha256,
    token_batches,
)


def test_txt_and_jsonl_are_joined_by_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    lines = [json.dumps({"text": "a\u2028b"}, ensure_ascii=False), "", json.dumps({"text": "c", "id": 1})]
    (tmp_path / "b.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert read_text([tmp_path / "a.txt", tmp_path / "b.jsonl"]) == "one\ntwo\n\na\u2028b\n\nc"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b" \n\t\n", "holds no text"),
        ("a.txt", b"good \xff bad", "not UTF-8 at byte 5"),
        ("a.txt", "text".encode("utf-16"), "not UTF-8 at byte 0"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "line 2: not valid JSON"),
        ("a.jsonl", b'{"text": "x"}\n\n{"body": "x"}', "line 3: must be"),
        ("a.jsonl", b'["text"]', "line 1: must be"),
        ("a.jsonl", b'{"text": 7}', "line 1: must be"),
        ("a.jsonl", b'{"text": "\\ud800"}', "line 1: holds half"),
        ("a.jsonl", b'{"text": ""}', "holds no text"),
        ("a.pdf", b"text", "must be a .txt or .jsonl"),
    ],
)
def test_bad_files_are_named_with_the_place(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TextError) as caught:
        read_text([tmp_path / name])
    assert said in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_and_no_file(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="cannot be read: No such file"):
        read_text([tmp_path / "gone.txt"])
    with pytest.raises(TextError, match="no text file"):
        read_text([])


def test_default_text_is_split_at_a_paragraph_near_four_fifths() -> None:
    calibration, evaluation = default_text()
    whole = calibration + evaluation
    assert len(whole) > 100_000
    assert calibration.endswith("\n\n")
    assert abs(len(calibration) / len(whole) - 0.8) < 0.01  # paragraphs there are far below 1 % of the text
    assert default_text() == (calibration, evaluation)


def test_docstrings_are_read_without_importing(tmp_path: Path) -> None:
    method = 'def f():\n        """Of\n        f."""'
    (tmp_path / "b.py").write_text(f"'Of b.'\nraise SystemExit\nclass C:\n    {method}")
    (tmp_path / "a.py").write_text("'Of a.'\nasync def g(): 'Of g.'\n'none'")
    (tmp_path / "broken.py").write_text("'Of broken.'\nprint 1")
    (tmp_path / "bytes.py").write_bytes(b"'\xff'")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "a.py").write_text("'Of a test.'")
    assert library_docstrings(tmp_path) == "Of a.\n\nOf g.\n\nOf b.\n\nOf\nf."


def test_the_standard_library_is_documented() -> None:
    text = library_docstrings()
    assert len(text) > 1_000_000
    assert "Heap queue algorithm" in text


def test_paragraphs_that_are_new() -> None:
    text = "one  two\nthree\n\ntoo few\n\nfour five six\n\none two three\n\nseven eight nine"
    assert paragraphs(text) == ["one two three", "four five six", "one two three", "seven eight nine"]
    assert new_paragraphs(text, ["a b c\n\nfour  five six", ""]) == "one two three\n\nseven eight nine"


@given(st.text(alphabet="ab \n", min_size=1, max_size=200), st.floats(0.1, 0.9))
def test_split_loses_nothing_and_stays_near_the_share(text: str, share: float) -> None:
    try:
        first, second = split_text(text, share)
    except TextError:
        # Refused only if a part is blank for every cut within reach of the share, the plain one included.
        cut = int(len(text) * share)
        reach = len(text) // 10
        assert not all(
            text[:c].strip() and text[c:].strip() for c in range(max(cut - reach, 0), min(cut + reach, len(text)) + 1)
        )
        return
    assert first + second == text
    assert first.strip()
    assert second.strip()
    assert abs(len(first) - int(len(text) * share)) <= len(text) // 10 + 1


def test_split_prefers_paragraphs_to_lines_to_words() -> None:
    assert split_text("a" * 78 + "\n\n" + "b\nc d" + "e" * 15)[0] == "a" * 78 + "\n\n"
    assert split_text("a" * 78 + "\n" + "b c d" + "e" * 16)[0] == "a" * 78 + "\n"
    assert split_text("a" * 78 + " " + "b" * 21)[0] == "a" * 78 + " "
    assert split_text("a" * 100)[0] == "a" * 80


def test_sha256_is_of_the_utf8_bytes() -> None:
    # printf 'é' | sha256sum
    assert text_sha256("é") == "4a99557e4033c3539de2eb65472017cad5f9557f7a0625a09f1c3f6e2ba69c4c"


def test_token_batches_are_consecutive_chunks_without_special_tokens(
    tmp_path: Path,
    tiny_tokenizer: Callable[[Path], Any],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    text = "".join(chr(97 + i % 26) for i in range(1005))
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # else caplog sees nothing
    with caplog.at_level(logging.WARNING):
        batches = token_batches(text, tokenizer, length=10, batch=8)
    assert not caplog.records  # 1005 tokens, and the tokenizer's limit is 64
    assert [tuple(b.shape) for b in batches] == [(8, 10)] * 12 + [(4, 10)]
    assert all(b.dtype == torch.int64 for b in batches)
    assert tokenizer.decode(torch.cat(batches).flatten()) == text[:1000]


def test_count_spreads_chunks_evenly(tmp_path: Path, tiny_tokenizer: Callable[[Path], Any]) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    text = "".join(chr(97 + i) * 10 for i in range(12))
    chunks = torch.cat(token_batches(text, tokenizer, length=10, count=4, batch=3))
    assert [tokenizer.decode(chunk) for chunk in chunks] == [c * 10 for c in "adgj"]
    assert len(torch.cat(token_batches(text, tokenizer, length=10, count=99))) == 12


def test_too_few_tokens_says_how_many(tmp_path: Path, tiny_tokenizer: Callable[[Path], Any]) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    assert len(token_batches("x" * 20, tokenizer, length=10)) == 1
    with pytest.raises(TextError, match=r"has 19 tokens, at least 20 are needed \(2 chunks of 10\)"):
        token_batches("x" * 19, tokenizer, length=10)


def test_sentence_batches_pad_and_mask(tmp_path: Path, tiny_tokenizer: Callable[[Path], Any]) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    text = "a b\n c\n\ntwo words\n\nd e f g h i\n\n" + "j " * 40
    (ids, mask), (last_ids, last_mask) = sentence_batches(text, tokenizer, length=12, batch=2)
    assert ids.dtype == mask.dtype == torch.int64
    assert ids.shape == mask.shape == (2, 12)
    assert mask.sum(1).tolist() == [7, 12]  # "a b c" and [CLS] [SEP]; the second is cut at 12
    assert (ids[mask == 0] == tokenizer.pad_token_id).all()
    assert ids[:, 0].tolist() == [tokenizer.cls_token_id] * 2
    assert last_ids.shape == last_mask.shape == (1, 12)
    ((few, _),) = sentence_batches(text, tokenizer, length=12, tokens=20)  # of 7 + 12 + 12
    assert len(few) == 2
    ((both, _),) = sentence_batches(text, tokenizer, length=12, tokens=1)
    assert len(both) == 2


def test_sentence_batches_have_little_padding(tmp_path: Path, tiny_tokenizer: Callable[[Path], Any]) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    text = "\n\n".join("a b c" if i % 2 else "a b c d e f" for i in range(8))
    batches = sentence_batches(text, tokenizer, length=32, batch=4)
    assert [ids.shape for ids, _ in batches] == [(4, 7), (4, 13)]
    assert all(mask.all() for _, mask in batches)


def test_sentence_batches_need_paragraphs_and_padding(tmp_path: Path, tiny_tokenizer: Callable[[Path], Any]) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    with pytest.raises(TextError, match="has 1 paragraphs"):
        sentence_batches("one long enough\n\ntwo words", tokenizer, length=12)
    tokenizer.pad_token = None
    with pytest.raises(TextError, match="no padding token"):
        sentence_batches("one long enough\n\nand another one", tokenizer, length=12)
