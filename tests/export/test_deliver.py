"""What is asked of a slim ONNX whose program amplifies rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import dotresize_fx
from dotresize_fx.export.trials import half_noise, rounding_noise


def test_rounding_noise_is_small_and_grows_with_the_outputs(save_tiny_model: Any, tmp_path: Path) -> None:
    result = dotresize_fx.slim(
        str(save_tiny_model(tmp_path / "model")), 0.2, calibration_tokens=256, sequence_length=32, evaluation_tokens=64
    )
    noise = rounding_noise(result)
    # A well-conditioned tiny model with logits below one: a few last bits.
    assert 0 < noise < 1e-5
    # Products of 11 bits, then of 8.
    half, coarser = (max(half_noise(result, dtype)) for dtype in (torch.float16, torch.bfloat16))
    assert 1e-4 < half < 5e-3 < coarser < 5e-2
    head = next(name for name in result.slim.program.state_dict if "lm_head" in name)
    weight = result.slim.program.state_dict[head]
    result.slim.program.state_dict[head] = torch.nn.Parameter(weight * 1e4, requires_grad=False)
    assert rounding_noise(result) > 1e3 * noise
