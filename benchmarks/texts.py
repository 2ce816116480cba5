"""The benchmarks' text: what calibrates, what is measured on, and batches of both.

A folder holds English text, UTF-8, plain or xz-compressed: ``calibration-*.txt[.xz]`` (the first 80 % of each
calibrates, the last 20 % is measured: *same source*) and ``heldout-*.txt[.xz]`` (measured only: *other source*).
"""

from __future__ import annotations

import hashlib
import lzma
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from dotresize_fx.fidelity import Inputs
from dotresize_fx.text import Tokenizer, split_text, token_batches

Batches = list[Inputs]


@dataclass(frozen=True)
class Texts:
    """Everything by the name of its file. ``measured`` has the same sources first, then the others."""

    calibrating: Mapping[str, str]
    measured: Mapping[str, str]
    whole: Mapping[str, str]

    @property
    def same(self) -> list[str]:
        return [name for name in self.measured if name in self.calibrating]

    @property
    def other(self) -> list[str]:
        return [name for name in self.measured if name not in self.calibrating]

    def table(self) -> str:
        """Which text it was, as a markdown table."""
        rows = ["| text | characters | SHA-256 of the text |", "|---|---|---|"]
        for name, text in self.whole.items():
            rows.append(f"| {name} | {len(text)} | {hashlib.sha256(text.encode()).hexdigest()} |")
        return "\n".join(rows)


def read_texts(folder: Path) -> Texts:
    """
    Raises:
        SystemExit: the folder has no calibration text.
    """
    sources = {file.name.split(".")[0]: _read(file) for file in sorted(folder.glob("calibration-*"))}
    others = {file.name.split(".")[0]: _read(file) for file in sorted(folder.glob("heldout-*"))}
    if not sources:
        raise SystemExit(f"{folder}: holds no calibration-*.txt or calibration-*.txt.xz")
    parts = {name: split_text(text) for name, text in sources.items()}
    return Texts(
        {name: first for name, (first, _) in parts.items()},
        {name: last for name, (_, last) in parts.items()} | others,
        sources | others,
    )


def _read(file: Path) -> str:
    raw = file.read_bytes()
    return (lzma.decompress(raw) if file.suffix == ".xz" else raw).decode("utf-8")


def sequences(text: str, tokenizer: Tokenizer, length: int, tokens: int) -> torch.Tensor:
    """(count, length) ids spread evenly over the text, about ``tokens`` of them; 0 is all there are."""
    count = max(2, round(tokens / length)) if tokens else None
    return torch.cat(token_batches(text, tokenizer, length=length, count=count))


def batched(ids: torch.Tensor, rows: int, device: str) -> Batches:
    """(sequences, length) as batches of so many rows."""
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.to(device).split(rows)]


def calibration(
    texts: Texts, tokenizer: Tokenizer, *, length: int, tokens: int, rows: int, device: str, seed: int | None = None
) -> Batches:
    """The same number of tokens from each source, one source after the other.

    Spread evenly over each source; with a seed, a random sample of its sequences.
    """
    share = tokens // len(texts.calibrating)
    taken = 0 if seed is not None else share
    parts = [sequences(text, tokenizer, length, taken) for text in texts.calibrating.values()]
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        count = max(2, round(share / length))
        parts = [part[torch.randperm(len(part), generator=generator)[:count]] for part in parts]
    return [batch for part in parts for batch in batched(part, rows, device)]


def evaluation(
    texts: Texts, tokenizer: Tokenizer, *, length: int, tokens: int, rows: int, device: str
) -> dict[str, Batches]:
    """So many tokens of each measured text."""
    return {
        name: batched(sequences(text, tokenizer, length, tokens), rows, device) for name, text in texts.measured.items()
    }


def shuffled(texts: Texts, tokenizer: Tokenizer, *, length: int, tokens: int, seed: int) -> torch.Tensor:
    """(sequences, length) of all sources in one random order, on the CPU; ``tokens`` 0 is all there are."""
    share = tokens // len(texts.calibrating)
    ids = torch.cat([sequences(text, tokenizer, length, share) for text in texts.calibrating.values()])
    return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))]
