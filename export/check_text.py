"""What a model has to bring before text can be run through it, seen before anything long begins."""

from __future__ import annotations

from typing import Any

from dotresize_fx.errors import UsageError
from dotresize_fx.export.capture import longest_of, text_config_of
from dotresize_fx.export.model_source import LoadedModel


def check_tokenizer(loaded: LoadedModel) -> None:
    """Raises UsageError where there is none, or one that cannot be read."""
    if loaded.tokenizer is None:
        why = f" ({loaded.tokenizer_problem})" if loaded.tokenizer_problem else ""
        raise UsageError(
            f"{loaded.source} has no tokenizer that can be read, which text needs{why}: fetch its files again"
        )


def check_length(length: int, longest: int, usual: int) -> None:
    """Raises UsageError where a ``length`` of sequences was asked for, other than the ``usual`` one, that is too long.

    The usual one is shortened where need be.
    """
    if length > longest and length != usual:
        raise UsageError(
            f"--sequence-length is {length}, and the model takes {longest} tokens at most: choose one up to {longest}"
        )


def longest_text(model: Any) -> int:
    """Tokens that a sequence may have."""
    return longest_of(text_config_of(model))
