"""What the tests of the sweep share: a tiny Llama, tokens to calibrate on, and tokens that it does not see."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from dotresize_fx.fx_form.graph import FxGraph

Batch = Mapping[str, torch.Tensor]


@pytest.fixture(scope="module")
def dense(tiny_graph: Callable[[str], tuple[Any, FxGraph]]) -> FxGraph:
    return tiny_graph("llama")[1]


@pytest.fixture(scope="module")
def batches(tiny_batch: Callable[..., Batch]) -> list[Batch]:
    return [tiny_batch(4, 32, padding=5, seed=seed) for seed in range(9)]


@pytest.fixture(scope="module")
def unseen(tiny_batch: Callable[..., Batch]) -> Batch:
    return tiny_batch(8, 32, seed=100)
