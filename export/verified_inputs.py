"""What slim programs and what was made of them are compared on: shapes that were not traced, padding included."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from dotresize_fx.compiler import SlimResult

# (batch, length, padded tokens on the left of the last row)
VERIFIED_SHAPES = ((1, 1, 0), (2, 16, 5), (3, 37, 11), (1, 130, 0))
TEXT_LENGTHS = (41, 128)


def random_inputs(result: SlimResult, batch: int, length: int, padding: int) -> dict[str, torch.Tensor]:
    """Random token ids (a language model's answer to noise is as comparable as any) and a mask padded on the left."""
    generator = torch.Generator().manual_seed(result.options.seed + 1)
    ids = torch.randint(0, result.captured.vocabulary, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask}


def verified_inputs(result: SlimResult) -> Iterator[dict[str, torch.Tensor]]:
    """Random token ids of every shape."""
    for batch, length, padding in VERIFIED_SHAPES:
        yield random_inputs(result, batch, min(length, result.captured.longest), padding)


def text_inputs(result: SlimResult) -> Iterator[dict[str, torch.Tensor]]:
    """The beginning of the text that did not calibrate, at several lengths."""
    text = next(iter(result.data.evaluation))
    for length in TEXT_LENGTHS:
        yield {name: value[:2, :length] for name, value in text.items()}
