"""The compiler's own checks between the passes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from dotresize_fx.compiler import analyse, slim
from dotresize_fx.errors import CaptureError, TextError
from dotresize_fx.export.capture import TRACED_LENGTH
from dotresize_fx.export.model_source import load_model
from dotresize_fx.progress import Progress

SaveModel = Callable[..., Path]


class AnotherAnswer(transformers.LlamaForCausalLM):  # type: ignore[misc]
    """Computes something else for any length but the traced one; torch.export does not see that there are two ways."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **kwargs: Any) -> Any:
        shift = 0 if input_ids.shape[1] == TRACED_LENGTH else 1
        return super().forward((input_ids + shift) % 300, attention_mask, **kwargs)


def test_a_capture_that_holds_for_the_traced_shape_only(tmp_path: Path, save_tiny_model: SaveModel) -> None:
    loaded = load_model(str(save_tiny_model(tmp_path)))
    loaded.model.__class__ = AnotherAnswer
    with pytest.raises(CaptureError, match=r"AnotherAnswer does not compute what .* of shape .*: torch.export said: "):
        analyse(loaded, Progress(quiet=True))


def test_a_bad_text_is_told_before_the_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    with pytest.raises(TextError, match="holds no text"):
        slim(tmp_path / "no model", calibration=tmp_path / "empty.txt")
