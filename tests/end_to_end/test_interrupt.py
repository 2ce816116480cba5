"""Ctrl-C, SIGTERM and SIGHUP at any moment: the exit code of a signal, one line at most, and nothing half-written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of another kind")

# What has ended when the signal is sent (empty: nothing yet), and how many seconds later. The stages after these
# words: starting and loading, capture, conversion, the child that verifies, the child that measures.
MOMENTS = [("", 0.1), ("", 1.5), ("load", 1.0), ("find regions", 0.2), ("convert slim", 0.15)]


# What a journal's files, and the lock beside it, end in.
JOURNAL = {".safetensors", ".json", ""}

Send = Callable[[int, int], None]


def interrupt(
    process: subprocess.Popen[str], after: str, delay: float, number: int, send: Send
) -> tuple[int, str, str]:
    """Send the signal at the moment asked for; (code, stdout, stderr)."""
    lines: list[str] = []
    reached = threading.Event()

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            if after and line.startswith(after):
                reached.set()
        reached.set()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert reached.wait(120) if after else has_begun(process)
        time.sleep(delay)
        assert process.poll() is None, "".join(lines)
        send(process.pid, number)
        assert process.wait(60) is not None
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        reader.join()
    assert process.stdout is not None
    with process.stdout as stream:
        out = stream.read()
    assert process.stderr is not None
    process.stderr.close()
    return process.returncode, out, "".join(lines)


def has_begun(process: subprocess.Popen[str]) -> bool:
    """Wait until our code runs: before it does, Python itself answers a signal. It begins by catching SIGTERM."""
    status = Path(f"/proc/{process.pid}/status")
    if not status.exists():  # not Linux
        time.sleep(3)
        return True
    for _ in range(3000):
        caught = next(line for line in status.read_text().splitlines() if line.startswith("SigCgt:"))
        if int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1:
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize(("after", "delay"), [*MOMENTS, pytest.param("convert dense", 0.1, marks=pytest.mark.slow)])
def test_ctrl_c(
    start: Callable[..., subprocess.Popen[str]],
    tree: Callable[[Path], dict[str, str]],
    model_folder: Callable[[str], Path],
    few_tokens: list[str],
    tmp_path: Path,
    after: str,
    delay: float,
) -> None:
    process = start("export", model_folder("llama"), tmp_path / "new" / "out", *few_tokens, cwd=tmp_path)
    code, out, err = interrupt(process, after, delay, signal.SIGINT, os.killpg)  # as a terminal does
    assert code == 130, err
    assert out == ""
    # What was finished by then goes too, which is said.
    assert err.splitlines()[-1].startswith("dotresize-fx: interrupted; nothing half-written was left behind")
    assert sum(line.startswith("dotresize-fx") for line in err.splitlines()) == 1
    assert "Traceback" not in err
    assert "Exception ignored" not in err
    assert tree(tmp_path) == {}
    assert group_is_gone(process.pid)


def group_is_gone(group: int) -> bool:
    """Whether no process of the group runs any more, ONNX Runtime's child included; it may take a moment."""
    for _ in range(50):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize(("number", "how"), [(signal.SIGTERM, "terminated"), (signal.SIGHUP, "hung up")])
def test_a_termination_of_the_command_alone_ends_its_child_too(
    start: Callable[..., subprocess.Popen[str]],
    tree: Callable[[Path], dict[str, str]],
    model_folder: Callable[[str], Path],
    few_tokens: list[str],
    tmp_path: Path,
    number: signal.Signals,
    how: str,
) -> None:
    """As ``kill PID``, a job's time limit and a terminal that is closed do; an earlier output that was to be replaced
    stays, and finished sublayers are kept beside it.
    """
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.json").write_text("{}")
    before = tree(tmp_path)
    process = start("export", model_folder("llama"), tmp_path / "out", "--force", *few_tokens, cwd=tmp_path)
    code, out, err = interrupt(process, "convert slim", 0.15, number, os.kill)
    assert (code, out) == (128 + number, "")
    assert "Traceback" not in err
    assert f"{how}; nothing half-written was left behind; the same command goes on behind" in err.splitlines()[-1]
    left = tree(tmp_path)
    assert {name: left[name] for name in before} == before
    assert {Path(name).suffix for name in left.keys() - before.keys() if left[name] != "folder"} == JOURNAL
    assert group_is_gone(process.pid)
