"""OUT appears whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dotresize_fx.errors import INTERRUPTED, TERMINATED, OutputError
from dotresize_fx.export.output_folder import OutputFolder
from dotresize_fx.journal import Journal


def write(folder: OutputFolder, text: str = "new") -> None:
    (folder.partial / "report.json").write_text(text)
    (folder.work / "block0").write_text("x" * 100)


def write_and_raise(out: Path, error: BaseException, force: bool = False) -> None:
    with OutputFolder(out, force) as folder:
        write(folder)
        raise error


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_success_leaves_out_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "new" / "parents" / "out"
    with OutputFolder(out) as folder:
        write(folder)
        assert not out.exists()
        assert names(out.parent) == [f".out.partial-{os.getpid()}", f".out.work-{os.getpid()}"]
    assert names(out) == ["report.json"]
    assert names(out.parent) == ["out"]


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_passes_and_leaves_nothing(tmp_path: Path, kind: type[BaseException]) -> None:
    with pytest.raises(kind):
        write_and_raise(tmp_path / "a" / "out", kind())
    assert names(tmp_path) == []


def test_an_empty_folder_is_taken_without_force(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with OutputFolder(out) as folder:
        write(folder)
    assert names(tmp_path) == ["out"]
    assert names(out) == ["report.json"]


def test_force_replaces_whole_and_only_on_success(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.json").write_text("old")
    (out / "old.bin").write_text("old")
    with pytest.raises(OutputError, match="not empty: choose another folder or pass --force"):
        OutputFolder(out).__enter__()
    with pytest.raises(RuntimeError):
        write_and_raise(out, RuntimeError(), force=True)
    assert names(out) == ["old.bin", "report.json"]
    assert (out / "report.json").read_text() == "old"
    with OutputFolder(out, force=True) as folder:
        write(folder)
    assert names(out) == ["report.json"]
    assert names(tmp_path) == ["out"]


def test_force_leaves_a_folder_alone_that_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    with pytest.raises(OutputError, match=r"no report\.json"):
        OutputFolder(tmp_path / "out", force=True).__enter__()
    assert names(tmp_path / "out") == ["thesis.tex"]


def test_current_home_and_root_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, here = tmp_path / "home", tmp_path / "here" / "below"
    for folder in (home, here, here.parent):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").write_text("{}")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    for out in (home, here, here.parent, Path("."), Path("/")):
        with pytest.raises(OutputError, match="current or the home folder"):
            OutputFolder(out, force=True).__enter__()


def test_a_file_or_a_file_among_the_parents_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file"):
        OutputFolder(tmp_path / "file", force=True).__enter__()
    with pytest.raises(OutputError, match="cannot be written: Not a directory"):
        OutputFolder(tmp_path / "file" / "out").__enter__()


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that not even root can write")
def test_an_unwritable_parent_is_refused() -> None:
    with pytest.raises(OutputError, match="cannot be written"):
        OutputFolder(Path("/proc/self/out")).__enter__()


def test_someone_elses_out_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    folder = OutputFolder(out).__enter__()
    write(folder)
    out.mkdir()
    (out / "report.json").write_text("theirs")
    with pytest.raises(OutputError, match="not empty"):
        folder.__exit__(None, None, None)
    assert (out / "report.json").read_text() == "theirs"
    assert names(tmp_path) == ["out"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with OutputFolder(tmp_path / "link") as folder:
        write(folder)
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "target") == ["report.json"]


def test_leftovers_of_a_killed_process_with_our_number_are_replaced(tmp_path: Path) -> None:
    stale = tmp_path / f".out.partial-{os.getpid()}"
    stale.mkdir()
    (stale / "half").write_text("x")
    with OutputFolder(tmp_path / "out") as folder:
        write(folder)
    assert names(tmp_path / "out") == ["report.json"]


def test_disk_full_is_told_and_cleaned_up(tmp_path: Path) -> None:
    wrapped = RuntimeError("could not save")
    try:
        with open("/dev/full", "w") as full:  # a real ENOSPC
            full.write("x" * 100_000)
    except OSError as error:
        wrapped.__cause__ = error
    for error in (wrapped, RuntimeError("I/O error: No space left on device (os error 28)")):
        with pytest.raises(OutputError, match="disk is full"):
            write_and_raise(tmp_path / "out", error)
        assert names(tmp_path) == []
    with pytest.raises(PermissionError):
        write_and_raise(tmp_path / "out", PermissionError(13, "other errors keep their kind"))


FULL = OSError(errno.ENOSPC, "No space left on device")
BEHIND = r"; the same command goes on behind 1 finished sublayer, kept in .*journal$"


WHOLE = ["00000.json", "00000.safetensors", "export.json"]


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
            write(folder)
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
        write(folder)
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


def told(error: BaseException) -> str:
    return "; ".join([str(error), *getattr(error, "__notes__", ())])


_CHILD = """
import resource, signal, sys, time
from dotresize_fx.export.output_folder import OutputFolder
from dotresize_fx.errors import OutputError

signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
with OutputFolder(sys.argv[1], force=True) as folder:
    (folder.partial / "report.json").write_text("half")
    if sys.argv[2] == "limit":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            (folder.partial / "model.onnx.data").write_bytes(bytes(5000))
        finally:
            print("written", flush=True)
    print("ready", flush=True)
    time.sleep(60)
"""


def child(out: Path, mode: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _CHILD, str(out), mode]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_real_signal_leaves_the_old_out(tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.json").write_text("old")
    with child(out, "wait") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert len(names(tmp_path)) == 3
        process.send_signal(number)
        assert process.wait(timeout=30) != 0
    assert names(tmp_path) == ["out"]
    assert (out / "report.json").read_text() == "old"


def test_an_exit_before_the_body_leaves_nothing(tmp_path: Path) -> None:
    code = "import sys; from dotresize_fx.export.output_folder import *; OutputFolder(sys.argv[1]).__enter__()"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], check=True)
    assert names(tmp_path) == []


def test_a_file_size_limit_is_a_full_disk(tmp_path: Path) -> None:
    with child(tmp_path / "out", "limit") as process:
        _, said = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "OutputError: the disk is full" in said
    assert names(tmp_path) == []


def test_a_full_tmpfs(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no right to mount a tmpfs")
    try:
        with pytest.raises(OutputError, match="disk is full"), OutputFolder(small / "out") as folder:
            (folder.partial / "model.onnx.data").write_bytes(bytes(1 << 20))
        assert names(small) == []
        with pytest.raises(OutputError, match="mount point"):
            OutputFolder(small).__enter__()
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_signal_during_the_last_steps_waits_for_them(tmp_path: Path) -> None:
    class Interrupting(OutputFolder):
        def _commit(self) -> None:
            signal.raise_signal(signal.SIGINT)
            super()._commit()

    with pytest.raises(KeyboardInterrupt), Interrupting(tmp_path / "out") as folder:
        write(folder)
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["report.json"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
