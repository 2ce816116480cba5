"""A workload is read as it is written."""

from __future__ import annotations

import pytest

from dotresize_fx.errors import UsageError
from dotresize_fx.workload import Workload, read_workload


def test_what_is_left_out_keeps_its_default() -> None:
    assert read_workload("prompt=16") == Workload(16, 64, 1)
    assert read_workload(" decode=0, batch=4") == Workload(128, 0, 4)
    assert read_workload(str(Workload(3, 2, 1))) == Workload(3, 2, 1)


@pytest.mark.parametrize(
    "text", ["", "prompt", "prompt=", "prompt=0", "batch=-1", "prompt=1.5", "prompt=²", "length=3", "batch=1,batch=1"]
)
def test_what_cannot_be_run_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--workload"):
        read_workload(text)
