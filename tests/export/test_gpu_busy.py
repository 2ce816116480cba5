"""The driver's account of a GPU that works."""

from __future__ import annotations

import pytest
import torch

from dotresize_fx.export.gpu_busy import gpu_busy


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_driver_nothing_is_known() -> None:
    assert gpu_busy(lambda: pytest.fail("nothing need be done")) is None


@pytest.mark.gpu
def test_a_gpu_with_large_products_is_busy_and_an_idle_one_is_not() -> None:
    matrix = torch.randn(4096, 4096, device="cuda")

    def multiply() -> None:
        for _ in range(20):
            matrix @ matrix
        torch.cuda.synchronize()

    busy, idle = gpu_busy(multiply), gpu_busy(lambda: None)
    assert busy is not None
    assert idle is not None
    assert busy > 0.9
    assert idle < 0.1
