"""The process's age: what a process says of itself beside a clock from outside."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from dotresize_fx import process_start as module
from dotresize_fx.process_start import process_start

SLEPT = 0.5
CODE = f"""
import time
time.sleep({SLEPT})
from dotresize_fx.process_start import process_start
print(time.perf_counter() - process_start())
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="only Linux says it")
def test_what_ran_before_counts() -> None:
    before = time.perf_counter()
    age = float(subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True).stdout)
    whole = time.perf_counter() - before
    assert SLEPT - 0.01 <= age <= whole + 0.02  # ticks of a hundredth of a second


def test_where_the_system_does_not_say_it_is_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "Path", lambda _: Path("/nowhere"))
    assert process_start() == pytest.approx(time.perf_counter(), abs=0.5)
