"""Widths by the clock on the command line: a target that is met and proved, and one that no plan reaches."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dotresize_fx.clock import TRIALS

WORKLOAD = ["--workload", "prompt=32,decode=2,batch=8"]
# Fractions of a millisecond are timed while other tests run beside; the export says itself when that was too uneven.
TRIES = 4


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOTRESIZE_FX_CACHE", str(tmp_path / "cache"))


def test_a_generous_target_is_met_and_proved(
    here: Callable[..., Any], model_folder: Callable[[str], Path], few_tokens: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = ["--target-latency", 0.9, *WORKLOAD, "--regions", "ffn", *few_tokens]
    for _ in range(TRIES):
        ended = here("export", model_folder("wide llama"), out, *options)
        if ended.code != 19 or "run again when the machine is idle" not in ended.stderr:
            break
        assert not out.exists()
    assert ended.code == 0, ended.stderr
    report = json.loads((out / "report.json").read_text())
    found = report["figures"]["latency_target"]
    assert (found["target"], found["workload"]) == (0.9, "prompt=32,decode=2,batch=8")
    assert found["low"] <= found["measured"] <= found["high"]
    assert found["low"] <= 0.9
    assert 0 < found["predicted"] < 1
    assert 1 <= len(found["rehearsals"]) <= TRIALS
    assert "ratio" not in report["options"]
    (region,) = [row for row in report["regions"] if row["kind"] == "ffn"]
    assert region["width_after"] < region["width_before"]
    assert region["width_after"] % 16 == 0
    assert report["figures"]["verification"]["max_abs_difference"] <= 1e-3
    assert "asked for 0.900" in ended.stdout
    assert "prompt=32,decode=2,batch=8" in (out / "report.html").read_text()


def test_a_target_that_no_plan_reaches_has_a_code_of_its_own(
    here: Callable[..., Any], model_folder: Callable[[str], Path], few_tokens: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = ["--target-latency", 0.01, *WORKLOAD, "--quiet", *few_tokens]
    ended = here("export", model_folder("llama"), out, *options)
    assert ended.code == 19
    (line,) = ended.stderr.splitlines()
    assert line.startswith("dotresize-fx: --target-latency 0.01: no plan reaches it: the narrowest widths of the ")
    assert "of the dense latency (prompt=32,decode=2,batch=8)" in line
    assert not out.exists()


def test_a_prompt_that_the_model_cannot_read(
    here: Callable[..., Any], model_folder: Callable[[str], Path], few_tokens: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = ["--profile", "--workload", "prompt=60,decode=8,batch=1", "--quiet", *few_tokens]
    ended = here("export", model_folder("llama"), out, *options)
    assert ended.code == 2
    assert "the model reads at most 64 tokens" in ended.stderr
    assert not out.exists()
