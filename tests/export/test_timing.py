"""Intervals of ratios; that runs take turns in real children is tested in test_onnx_runtime and test_bench."""

from __future__ import annotations

import numpy as np
import pytest

from dotresize_fx.export.timing import ratio_interval


def test_a_ratio_without_spread() -> None:
    assert ratio_interval([2.0] * 9, [1.0] * 9) == (0.5, 0.5, 0.5)
    assert ratio_interval([4.0], [1.0]) == (0.25, 0.25, 0.25)
    with pytest.raises(ValueError, match="as many runs"):
        ratio_interval([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="as many runs"):
        ratio_interval([], [])


def test_the_interval_holds_the_true_ratio_as_often_as_it_says() -> None:
    """Of 200 experiments the share is 0.95 within three standard deviations, 0.015 each; a bootstrap of a median of
    few runs is a little off on top.
    """
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        noise = generator.lognormal(0, 0.2, (3, 20))
        shared = noise[2]  # what the machine did in that round
        _, low, high = ratio_interval(shared * noise[0], 0.9 * shared * noise[1], draws=500)
        held += low <= 0.9 <= high
    assert 0.88 <= held / 200 <= 1


def test_the_same_runs_give_the_same_interval() -> None:
    before, after = np.random.default_rng(1).uniform(1, 2, (2, 15))
    assert ratio_interval(before, after, seed=3) == ratio_interval(before, after, seed=3)
    value, low, high = ratio_interval(before, after)
    assert low < value < high
