"""Exports that are killed outright: the next one goes on from what was finished, to the same bytes."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dotresize_fx.errors import TERMINATED

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="nothing is killed so there")

Start = Callable[..., "subprocess.Popen[str]"]


def goes_on(said: str) -> bool:
    """Whether a run took up what another had finished, which it then must not have thrown away."""
    assert "not taken up: " not in said
    return any(line.startswith("goes on behind") for line in said.splitlines())


def run(
    process: subprocess.Popen[str],
    moment: Callable[[], bool] | None = None,
    delay: float = 0.0,
    number: int = signal.SIGKILL,
) -> tuple[int, str]:
    """(code, stderr) of a process that gets the signal so long after ``moment`` has come, or not at all."""

    def kill() -> None:
        while moment is not None and not moment() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(delay)
        process.send_signal(number)

    killer = threading.Thread(target=kill)
    if moment is not None:
        killer.start()
    _, said = process.communicate(timeout=300)
    if moment is not None:
        killer.join()
    return process.returncode, said


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments(
    start: Start, model_folder: Callable[[str], Path], few_tokens: list[str], tmp_path: Path, kills: int
) -> None:
    """The first time once a sublayer is finished, then terminated once another one is; from there on also wherever it
    is in seconds, from the start on.
    """
    model = model_folder("deep llama")
    (folder := tmp_path / "parts").mkdir()
    draw = random.Random(0)

    def begin(out: Path) -> subprocess.Popen[str]:
        return start("export", model, out, "--ratio", 0.25, *few_tokens, cwd=tmp_path)

    def finished() -> int:
        return len([*folder.glob(".out.work-*/journal/*.safetensors")])

    code, said = run(begin(whole := tmp_path / "whole"))
    assert code == 0, said
    out, gone_on = folder / "out", 0
    for kill in range(kills):
        if kill % 2 and kill > 1:
            moment, delay = (lambda: True), draw.uniform(0, 15)
        else:
            moment, delay = (lambda: finished() > kill % 2), draw.uniform(0, 0.05)  # noqa: B023
        code, said = run(begin(out), moment, delay, number := signal.SIGTERM if kill % 3 == 1 else signal.SIGKILL)
        gone_on += goes_on(said)
        assert code in (0, -number, 128 + number), said  # Python itself answers before our code runs
        if out.exists():  # it was quicker, if only just
            assert same(out, whole)
            shutil.rmtree(out)
        else:
            assert code
            if code == TERMINATED and finished() and "load  " in said:  # else it ended before it looked at OUT
                assert "/journal" in said.splitlines()[-1]
    code, said = run(begin(out))
    assert code == 0, said
    assert gone_on + goes_on(said)
    assert same(out, whole)
    assert [entry.name for entry in folder.iterdir()] == ["out"]


def same(out: Path, other: Path) -> bool:
    """Whether model and width plan are, byte for byte."""
    names = ("model.onnx", "model.onnx.data", "plan.json")
    return all((out / name).read_bytes() == (other / name).read_bytes() for name in names)
