"""OUT appears whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dotresize_fx.errors import OutputError
from dotresize_fx.export.output_folder import OutputFolder


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


def test_what_is_ignored_does_not_stand_for_another_signal(tmp_path: Path) -> None:
    """Under nohup a terminal that is closed ends nothing, but a termination behind it does."""

    class Terminated(OutputFolder):
        def _commit(self) -> None:
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGTERM)
            super()._commit()

    def arrived(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = {signal.SIGHUP: signal.SIG_IGN, signal.SIGTERM: arrived}
    before = {number: signal.signal(number, handler) for number, handler in before.items()}
    try:
        with pytest.raises(SystemExit, match="143"), Terminated(tmp_path / "out") as folder:
            write(folder)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert names(tmp_path) == ["out"]
