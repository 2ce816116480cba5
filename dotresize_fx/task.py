"""What a model is for, which decides how text becomes its inputs and how a loss of its answers is told.

``decoder`` and ``encoder`` read text, tokenised. A module or a saved program reads the inputs it is given: its first
output is ``logits`` of next tokens, or ``outputs`` of any other kind.
"""

from __future__ import annotations

from typing import Literal

Task = Literal["decoder", "encoder", "logits", "outputs"]


def predicts_tokens(task: str) -> bool:
    """Whether the first output is a distribution of the next token, at every position."""
    return task in ("decoder", "logits")


def reads_text(task: str) -> bool:
    """Whether batches are token ids with a mask, free in batch and length."""
    return task in ("decoder", "encoder")
