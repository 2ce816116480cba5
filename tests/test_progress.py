"""Stages: timed always, told on standard error unless quiet."""

from __future__ import annotations

import io
import re
import sys
import time

import pytest

from dotresize_fx.progress import Progress


def test_a_stage_is_one_line_with_its_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress()
    with progress.stage("load"):
        time.sleep(0.05)
    with progress.stage("sweep", 3) as step:
        for _ in range(3):
            step()
    captured = capsys.readouterr()
    assert captured.out == ""
    first, second = captured.err.splitlines()
    assert re.fullmatch(r"load +0\.\d s", first)
    assert re.fullmatch(r"sweep +\d+\.\d s", second)
    assert len(first) == len(second)
    assert list(progress.seconds) == ["load", "sweep"]
    assert 0.05 <= progress.seconds["load"] < 5


def test_a_quiet_one_only_times(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(quiet=True)
    with progress.stage("load", 2) as step:
        step()
    assert capsys.readouterr() == ("", "")
    assert progress.seconds["load"] >= 0


def test_a_stage_entered_twice_adds_up() -> None:
    progress = Progress(quiet=True)
    for _ in range(2):
        with progress.stage("convert"):
            time.sleep(0.02)
    assert progress.seconds["convert"] >= 0.04


def test_a_failed_stage_is_not_told_as_done(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress()
    with pytest.raises(KeyboardInterrupt), progress.stage("load"):
        raise KeyboardInterrupt
    assert capsys.readouterr().err == ""
    assert progress.seconds == {}


def test_a_log_is_told_now_and_then(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 25))
    monkeypatch.setattr("dotresize_fx.progress.time.perf_counter", lambda: float(next(clock)))
    with Progress().stage("sweep", 6) as step:  # 25 s each
        for _ in range(6):
            step()
    assert capsys.readouterr().err.splitlines()[:-1] == ["sweep: 3 of 6, 75 s"]


class Terminal(io.StringIO):
    """Standard error as a terminal sees it."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_sees_a_bar_that_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress().stage("sweep", 4) as step:
        for _ in range(4):
            time.sleep(0.06)  # the bar is drawn ten times a second at most
            step()
    text = terminal.getvalue()
    assert re.search(r"sweep .* [1-4]/4 00:0\d", text)
    assert re.fullmatch(r"sweep +\d+\.\d s", text.rpartition("\r")[2].rstrip("\n"))


class Closed(io.StringIO):
    """A pipe whose reader went away."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_work_goes_on_when_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Closed())
    progress = Progress()
    for name in ("load", "capture"):
        with progress.stage(name):
            pass
    assert progress.quiet
    assert list(progress.seconds) == ["load", "capture"]


@pytest.mark.parametrize("stop_at", [1, 2, 3, 4])
def test_a_check_may_end_the_work(stop_at: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Before a stage, after each of two steps, and behind it."""
    calls: list[str] = []

    def check() -> None:
        calls.append("check")
        if calls.count("check") == stop_at:
            raise KeyboardInterrupt

    def work() -> None:
        with Progress(check=check).stage("sweep", 2) as step:
            for _ in range(2):
                calls.append("work")
                step()

    with pytest.raises(KeyboardInterrupt):
        work()
    assert calls.count("work") == min(stop_at - 1, 2)
    assert capsys.readouterr().err == ""
