"""Go on with a prompt from an exported decoder: greedily, as a stream of text."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dotresize_fx.errors import UsageError
from dotresize_fx.export.greedy import greedy
from dotresize_fx.export.onnx_file import ONNX_FILE, read_onnx, task_of
from dotresize_fx.export.onnx_session import OnnxModel, first_line
from dotresize_fx.task import reads_text

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what the first bytes of a character are decoded to


@dataclass
class Speed:
    """Tokens and seconds of the prompt's run, which gives the first new token, and of the others."""

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    tokens: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        said = f"{self.tokens} tokens; prompt of {self.prompt_tokens} in {self.prompt_seconds:.2f} s"
        rest = self.tokens - 1
        return f"{said}; then {rest / self.seconds:.1f} tokens/s" if rest > 0 and self.seconds > 0 else said


class Generator:
    """A folder that ``export`` wrote, opened.

    Raises:
        UsageError: it holds no decoder, or one without a cache, or no tokenizer.
        ModelNotFoundError, BadWeightsError, MissingExtraError: see ``open_session``.
    """

    def __init__(self, folder: Path, *, threads: int | None = None) -> None:
        from transformers import AutoConfig, AutoTokenizer

        if threads is not None and threads < 1:
            raise UsageError(f"--threads is {threads}: it must be at least 1")
        _require_decoder(folder)
        if (folder / ONNX_FILE).is_file():
            read_onnx(folder / ONNX_FILE)
        self.model = OnnxModel(folder / ONNX_FILE, threads=threads)
        if not self.model.has_cache:
            raise UsageError(f"{folder} holds a graph without a cache: its report.json says why, or it was --no-cache")
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            config: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise UsageError(f"{folder} has no readable tokenizer and config: {first_line(error)}") from error
        text: Any = config.get_text_config()
        self.longest: int | None = getattr(text, "max_position_embeddings", None)
        ends = getattr(text, "eos_token_id", None)
        self.ends = {self.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}

    def pieces(self, prompt: str, max_tokens: int, speed: Speed) -> Iterator[str]:
        """New text as it comes, until the model ends it, or after so many tokens or at the longest it takes.

        ``speed`` is filled in on the way.

        Raises:
            UsageError: the prompt has no token, or more than the model takes, or no token is asked for.
        """
        if max_tokens < 1:
            raise UsageError(f"--max-tokens is {max_tokens}: it must be at least 1")
        ids: list[int] = self._encoded(prompt)
        room = max_tokens if self.longest is None else min(max_tokens, self.longest - len(ids))
        if room < 1:
            raise UsageError(f"the prompt is {len(ids)} tokens long, and the model takes {self.longest}: shorten it")
        stream = _TextStream(self.tokenizer, ids)
        array = np.array([ids], np.int64)
        speed.prompt_tokens, started = len(ids), time.perf_counter()
        for chosen in greedy(self.model, array, np.ones_like(array)):
            speed.tokens += 1
            if speed.tokens == 1:
                speed.prompt_seconds = time.perf_counter() - started
                started = time.perf_counter()
            else:
                speed.seconds = time.perf_counter() - started
            token = int(chosen[0])
            if token in self.ends:
                break
            if piece := stream.add(token):
                yield piece
            if speed.tokens == room:
                break
        if piece := stream.rest():
            yield piece

    def _encoded(self, prompt: str) -> list[int]:
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UsageError("the prompt is no UTF-8 text: convert it first") from error
        found: list[int] = self.tokenizer(prompt).input_ids
        # What closes a sequence (a byte-level BERT tokenizer's separator) is nothing to go on from.
        while found and found[-1] in self.ends:
            found = found[:-1]
        if not found and self.tokenizer.bos_token_id is not None:
            found = [self.tokenizer.bos_token_id]
        if not found:
            raise UsageError("the prompt is empty: give some text to go on with")
        return found


def _require_decoder(folder: Path) -> None:
    task = task_of(folder)
    if task == "encoder":
        raise UsageError(f"{folder} holds an encoder, which generates no text: give an exported decoder")
    if not reads_text(task):
        raise UsageError(f"{folder} holds a module that reads no text: give an exported decoder")


class _TextStream:
    """Tokens to text that is only handed on once no later token can change it.

    A token is decoded behind the last ones, since a space may belong to where it stands.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        self.tokenizer, self.ids = tokenizer, list(prompt)
        self.start, self.said = max(0, len(prompt) - 1), len(prompt)

    def add(self, token: int) -> str:
        self.ids.append(token)
        piece = self.rest()
        if piece.endswith(UNFINISHED) or not piece:
            return ""
        self.start, self.said = self.said, len(self.ids)
        return piece

    def rest(self) -> str:
        before = self._text(self.ids[self.start : self.said])
        return self._text(self.ids[self.start :])[len(before) :]

    def _text(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text
