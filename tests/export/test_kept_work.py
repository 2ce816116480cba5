"""What stays of the work behind OUT when an export ends early: finished sublayers, for the same command alone."""

from __future__ import annotations

import errno
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dotresize_fx.errors import INTERRUPTED, TERMINATED, OutputError
from dotresize_fx.export.output_folder import OutputFolder
from dotresize_fx.journal import Journal

FULL = OSError(errno.ENOSPC, "No space left on device")
BEHIND = r"; the same command goes on behind 1 finished sublayer, kept in .*journal$"
WHOLE = ["00000.json", "00000.safetensors", "export.json"]


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def told(error: BaseException) -> str:
    return "; ".join([str(error), *getattr(error, "__notes__", ())])


def swallowed() -> None:
    raise SystemExit(TERMINATED)


@pytest.mark.parametrize(
    ("failure", "check", "raised", "said"),
    [
        pytest.param(FULL, lambda: None, OutputError, f"run again{BEHIND}", id="full disk"),
        pytest.param(SystemExit(TERMINATED), lambda: None, SystemExit, BEHIND, id="SIGTERM"),
        pytest.param(RuntimeError("half"), swallowed, SystemExit, BEHIND, id="swallowed"),
    ],
)
def test_finished_sublayers_alone_are_kept(
    tmp_path: Path, failure: BaseException, check: Callable[[], None], raised: type[BaseException], said: str
) -> None:
    """The next run takes them over, in a process of the same number too, as the first ones of containers are."""
    out = tmp_path / "new" / "out"

    def run(finish: bool, error: BaseException | None) -> list[str]:
        with OutputFolder(out, check=check) as folder:
            found = names(folder.work)
            journal = Journal(folder.work / "journal", {"of": "this"})
            if finish:
                journal.write_sublayer(0, [], {}, {"weight": torch.ones(2)})
            journal.folder.mkdir(exist_ok=True)
            (journal.folder / "partial").write_text("half")
            (journal.folder / "00001.safetensors").write_text("without what was swept")
            (folder.work / "spooled").mkdir()
            (folder.partial / "report.json").write_text("new")
            if error is not None:
                raise error
        return found

    with pytest.raises((raised, type(failure))) as nothing:
        run(False, failure)
    assert "goes on behind" not in told(nothing.value)
    assert names(tmp_path) == []
    for _ in range(2):
        with pytest.raises(raised) as kept:
            run(True, failure)
        assert re.search(said, told(kept.value))
        kept.value.__notes__ = []
        assert names(out.parent / f".out.work-{os.getpid()}" / "journal") == WHOLE
        assert names(out.parent) == [f".out.work-{os.getpid()}"]
        assert names(out.parent / f".out.work-{os.getpid()}") == ["journal", "lock"]
    (out.parent / f".out.work-{os.getpid()}").rename(out.parent / ".out.work-1")
    assert run(True, None) == ["journal", "lock"]
    assert names(out.parent) == ["out"]


def finish_one(out: Path) -> None:
    """A sublayer, and be terminated."""
    with OutputFolder(out) as folder:
        Journal(folder.work / "journal", {}).write_sublayer(0, [], {}, {"weight": torch.ones(2)})
        raise SystemExit(TERMINATED)


def leave_a_journal(out: Path) -> Path:
    """Returns its folder."""
    with pytest.raises(SystemExit):
        finish_one(out)
    (work,) = out.parent.glob(".out.work-*")
    return work / "journal"


@pytest.mark.parametrize("error", [SystemExit(TERMINATED), FULL, SystemExit(INTERRUPTED)])
def test_what_was_taken_over_stays_if_nothing_is_begun(
    tmp_path: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for Ctrl-C; no more is said of it than that it is there: nobody looked whose it is."""
    journal = leave_a_journal(out := tmp_path / "out")
    with pytest.raises((SystemExit, OutputError)) as raised, OutputFolder(out):
        raise error
    stays = getattr(error, "code", None) != INTERRUPTED
    assert ("1 finished sublayer of an earlier run stay in" in told(raised.value)) == stays
    assert journal.exists() == stays
    journal = leave_a_journal(out)

    def fail(folder: OutputFolder) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(OutputFolder, "_take_over", fail)
        with pytest.raises((SystemExit, OutputError)):
            OutputFolder(out).__enter__()
    assert journal.exists() == stays
    with OutputFolder(out) as folder:
        assert (Journal(folder.work / "journal", {}).finished == 1) == stays


def test_what_is_wrong_with_a_command_does_not_cost_what_another_finished(tmp_path: Path) -> None:
    """Once it has written something of its own it does."""
    journal = leave_a_journal(out := tmp_path / "out")
    with pytest.raises(ValueError, match="no such plan"):
        fail_at_another(out, writes=False)
    assert journal.exists()
    with pytest.raises(ValueError, match="no such plan"):
        fail_at_another(out, writes=True)
    assert names(tmp_path) == []


def fail_at_another(out: Path, *, writes: bool) -> None:
    with OutputFolder(out) as folder:
        journal = Journal(folder.work / "journal", {"of": "another"})
        assert journal.other
        if writes:
            journal.write_sublayer(0, [], {}, {"weight": torch.ones(2)})
        raise ValueError("no such plan")


def test_one_process_at_a_time(tmp_path: Path) -> None:
    """The other is left alone, of the same number or not."""
    with OutputFolder(tmp_path / "out") as folder:
        (folder.partial / "report.json").write_text("new")
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(OutputError, match=r"out: another export writes it \(and works in .*\): wait for its end"):
            OutputFolder(tmp_path / "out").__enter__()
        assert sorted(tmp_path.rglob("*")) == before
    assert names(tmp_path) == ["out"]


def test_ctrl_c_says_what_goes(tmp_path: Path) -> None:
    leave_a_journal(out := tmp_path / "out")
    with pytest.raises(SystemExit) as ended, OutputFolder(out):
        raise SystemExit(INTERRUPTED)
    assert told(ended.value) == "130; 1 finished sublayer went too, which a termination (kill PID) keeps"
    assert names(tmp_path) == []


def test_a_second_signal_while_it_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def arrived(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    discard = OutputFolder._discard
    monkeypatch.setattr(OutputFolder, "_discard", lambda folder: (signal.raise_signal(signal.SIGTERM), discard(folder)))
    before = signal.signal(signal.SIGTERM, arrived)
    try:
        with pytest.raises(SystemExit) as ended:
            finish_one(tmp_path / "out")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert re.search(BEHIND, told(ended.value))
