"""Text for calibration and measurement: reading it, splitting it, and cutting it into batches of token ids.

Everything here is deterministic: the same text and tokenizer give the same batches.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dotresize_fx.errors import TextError

Tokenizer = Callable[..., Any]
"""A Hugging Face tokenizer (``PreTrainedTokenizerBase``); this package's core uses nothing but its call."""

_MIN_CHUNKS = 2
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
# Folders of the standard library whose modules are not of it, or whose docstrings are data.
_NOT_DOCUMENTATION = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


def read_text(paths: Iterable[Path | str]) -> str:
    """The text of ``.txt`` and ``.jsonl`` files, joined by blank lines.

    Of a ``.jsonl``, the field ``text`` of every line's object counts. Files are read as strict UTF-8; line
    ends become ``\\n``.

    Raises:
        TextError: no file given, or a file is missing, of another kind, empty, not UTF-8, or has a bad line.
    """
    parts = [_read_file(Path(path)) for path in paths]
    if not parts:
        raise TextError("no text file given")
    return "\n\n".join(parts)


def _read_file(path: Path) -> str:
    if path.suffix.lower() not in (".txt", ".jsonl"):
        raise TextError(f"{path}: text must be a .txt or .jsonl file")
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise TextError(f"{path}: not UTF-8 at byte {error.start}: convert the file to UTF-8") from error
    except OSError as error:
        raise TextError(f"{path}: cannot be read: {error.strerror}") from error
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    if path.suffix.lower() == ".jsonl":
        # Not splitlines(): it also splits at U+2028, which may stand inside a JSON string.
        lines = enumerate(text.split("\n"), start=1)
        text = "\n\n".join(_jsonl_text(line, f"{path}, line {number}") for number, line in lines if line.strip())
    if not text.strip():
        raise TextError(f"{path}: holds no text")
    return text


def _jsonl_text(line: str, where: str) -> str:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TextError(f"{where}: not valid JSON ({error})") from error
    text = entry.get("text") if isinstance(entry, dict) else None
    if not isinstance(text, str):
        raise TextError(f'{where}: must be a JSON object with a string field "text"')
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TextError(f"{where}: holds half of a surrogate pair, which is not a character") from error
    return text


def default_text() -> tuple[str, str]:
    """(calibration, evaluation): the first 80 % and the last 20 % of the English text every Python carries.

    It is the language reference in ``pydoc_data.topics``, topics in sorted order; it differs between Python
    versions, so record ``text_sha256`` beside any figure taken on it.
    """
    from pydoc_data.topics import topics  # 0.7 MB that only this needs

    return split_text("\n\n".join(topics[name] for name in sorted(topics)))


def library_docstrings(folder: Path | None = None) -> str:
    """The docstrings of Python's standard library, or of another folder's modules, parted by blank lines.

    Modules are read, not imported, in the order of their paths; files that do not parse are left out. It takes some
    seconds. What is installed differs between Python versions and distributions, so record ``text_sha256`` here too.
    """
    folder = folder or Path(sysconfig.get_path("stdlib"))
    found: list[str] = []
    for file in sorted(folder.rglob("*.py")):
        if not _NOT_DOCUMENTATION.isdisjoint(file.relative_to(folder).parts):
            continue
        try:
            tree = ast.parse(file.read_bytes())
        except (OSError, SyntaxError, ValueError):
            continue
        texts = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, _DOCUMENTED))
        found += [text for text in texts if text]
    return "\n\n".join(found)


def paragraphs(text: str) -> list[str]:
    """Those of three words or more; white space inside one becomes single blanks."""
    return [" ".join(words) for part in text.split("\n\n") if len(words := part.split()) >= 3]


def new_paragraphs(text: str, seen: Iterable[str]) -> str:
    """``paragraphs`` of the text that occur in none of the texts ``seen``, each once, parted by blank lines."""
    known = {paragraph for other in seen for paragraph in paragraphs(other)}
    return "\n\n".join(paragraph for paragraph in dict.fromkeys(paragraphs(text)) if paragraph not in known)


def split_text(text: str, share: float = 0.8) -> tuple[str, str]:
    """Split near ``share`` (0 to 1) of the characters; the two parts joined are ``text`` again.

    The cut is the paragraph boundary nearest to that point, or the line or word boundary where no paragraph
    ends within a tenth of the text's length.

    Raises:
        TextError: a part would hold nothing but white space.
    """
    target = int(len(text) * share)
    reach = len(text) // 10
    low, high = max(target - reach, 0), min(target + reach, len(text))
    cut = target
    for separator in ("\n\n", "\n", " "):
        before = text.rfind(separator, low, target)
        after = text.find(separator, target, high)
        ends = [found + len(separator) for found in (before, after) if found >= 0]
        if ends:
            cut = min(ends, key=lambda end: abs(end - target))
            break
    if not text[:cut].strip() or not text[cut:].strip():
        raise TextError(f"the text has {len(text)} characters, too few to split: give more text")
    return text[:cut], text[cut:]


def text_sha256(text: str) -> str:
    """SHA-256 of the text as UTF-8, in hexadecimal."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def token_batches(
    text: str, tokenizer: Tokenizer, *, length: int, count: int | None = None, batch: int = 8
) -> list[Tensor]:
    """Chunks of ``length`` consecutive tokens, without overlap, as int64 tensors of shape (batch, length).

    No special tokens. With ``count``, that many chunks spread evenly over the text (all there are, if fewer);
    the last batch may be smaller.

    Raises:
        TextError: the text has fewer than two chunks' worth of tokens.
    """
    # verbose=False: a whole text is meant to be longer than the model's context.
    encoded = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)
    ids = torch.tensor(encoded["input_ids"], dtype=torch.int64)
    if len(ids) < _MIN_CHUNKS * length:
        raise TextError(
            f"the text has {len(ids)} tokens, at least {_MIN_CHUNKS * length} are needed "
            f"({_MIN_CHUNKS} chunks of {length}): give more text"
        )
    available = len(ids) // length
    chunks = ids[: available * length].view(available, length)
    chosen = chunks[_spread(available, count)]
    return [chosen[start : start + batch] for start in range(0, len(chosen), batch)]


def sentence_batches(
    text: str, tokenizer: Tokenizer, *, length: int, tokens: int | None = None, least: int = 2, batch: int = 8
) -> list[tuple[Tensor, Tensor]]:
    """Paragraphs with special tokens, for encoders: pairs of (input_ids, attention_mask).

    Both are int64 of shape (batch, longest paragraph of the batch, at most ``length``); the mask is 0 on
    padding. Paragraphs of fewer than three words are left out, white space inside one becomes single blanks.
    With ``tokens``, as many paragraphs, spread evenly over the text, as hold about that many, padding not counted, and
    at least ``least`` (all there are, if fewer). Shorter ones come first, so that batches have little padding.

    Raises:
        TextError: the text has fewer than two such paragraphs, or the tokenizer has no padding token.
    """
    sentences = paragraphs(text)
    if len(sentences) < _MIN_CHUNKS:
        raise TextError(
            f"the text has {len(sentences)} paragraphs of three words or more, "
            f"at least {_MIN_CHUNKS} are needed: give more text, with blank lines between paragraphs"
        )
    if getattr(tokenizer, "pad_token_id", None) is None:
        raise TextError("the model's tokenizer has no padding token: set pad_token in its tokenizer_config.json")
    encoded = tokenizer(sentences, truncation=True, max_length=length, return_attention_mask=False)
    lengths = [len(ids) for ids in encoded["input_ids"]]
    count = None if tokens is None else max(least, round(tokens * len(sentences) / sum(lengths)))
    chosen = [sentences[i] for i in sorted(_spread(len(sentences), count), key=lengths.__getitem__)]
    batches = []
    for start in range(0, len(chosen), batch):
        encoded = tokenizer(
            chosen[start : start + batch],
            padding=True,
            truncation=True,
            max_length=length,
            return_tensors="pt",
        )
        batches.append((encoded["input_ids"], encoded["attention_mask"]))
    return batches


def _spread(available: int, count: int | None) -> list[int]:
    """``count`` distinct indices below ``available``, evenly spaced and ascending."""
    wanted = available if count is None else min(count, available)
    return [index * available // wanted for index in range(wanted)]
