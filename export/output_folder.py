"""OUT is written as a whole or not at all: all goes into a folder beside it, which is renamed at the end."""

from __future__ import annotations

import atexit
import errno
import glob
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from filelock import FileLock, Timeout

from dotresize_fx.errors import ENDING_SIGNALS, HUNG_UP, INTERRUPTED, TERMINATED, OutputError
from dotresize_fx.journal import FOLDER as JOURNAL
from dotresize_fx.journal import count_finished, drop_half_written, taken_up
from dotresize_fx.regions import counted
from dotresize_fx.report.contents import REPORT_FILE

# Held by the process that works, and free once it is gone however it went.
LOCK = "lock"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# Rust (safetensors, tokenizers) and C++ (protobuf, torch) report a full disk as text only.
_FULL_TEXT = ("No space left on device", "Disk quota exceeded", "File too large", "os error 28")


class OutputFolder:
    """Context manager over the folder OUT.

    Entering checks OUT before any work is done and makes two folders beside it: ``partial`` for what OUT
    will hold and ``work`` for intermediate files, which is removed. Leaving without an exception renames
    ``partial`` to OUT; leaving with one (KeyboardInterrupt and SystemExit too) removes it, and the parents made for
    OUT. A process that is killed leaves ``work``; one whose disk is full, or that SIGTERM or SIGHUP ends (a job's time
    limit, a machine that is taken back, a terminal that is closed), leaves the journal in it, if that has a finished
    sublayer. The next one for this OUT takes the journal over, see :mod:`dotresize_fx.journal`. ``check`` raises what a
    signal has asked for and something swallowed. With ``force`` an OUT that holds a ``report.json`` is replaced whole,
    once the new one is complete.
    ``source`` is the model, where that is a file or folder.

    Raises:
        OutputError: another process writes OUT, it is a file, is not empty (without ``force``), does not look like an
            earlier output (with it), is or holds the model or the current or the home folder, is a mount point, or
            cannot be written; on leaving, also when the disk was full.
    """

    def __init__(
        self,
        out: Path | str,
        force: bool = False,
        source: Path | str | None = None,
        *,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        # Resolved, so that a link to a folder stays a link and a later chdir changes nothing.
        self.out = Path(out).resolve()
        self._force = force
        self._source = Path(source).resolve() if source is not None and Path(source).exists() else None
        self._pid = os.getpid()
        self._made_parents: list[Path] = []
        self.partial = self._beside("partial")
        self.work = self._beside("work")
        self._lock = FileLock(self.work / LOCK)
        self._check_signals = check
        # Unless the work comes to an end, or is given up.
        self._keep_journal = True
        self._taken_up = 0
        # Before it is settled that nobody else does, nothing beside OUT is ours.
        self._entered = False

    def __enter__(self) -> Self:
        try:
            self._check()
            self._check_nobody_writes()
            self._entered = True
            with _signals_wait():
                for parent in reversed([p for p in self.out.parents if not p.exists()]):
                    parent.mkdir(exist_ok=True)
                    self._made_parents.append(parent)
                if self.partial.exists():  # left by a killed process that had our number
                    shutil.rmtree(self.partial)
                self._take_over()
                self.partial.mkdir()
                self.work.mkdir(exist_ok=True)
                with suppress(OSError, NotImplementedError):  # a file system without locks: nothing is taken over
                    self._lock.acquire(timeout=0)
                # Last resort for a signal that arrives between here and the body of the with statement.
                atexit.register(self._discard)
            self._taken_up = taken_up(self.work / JOURNAL)
        except OSError as error:
            self._discard()
            raise OutputError(f"{self.out} cannot be written: {error.strerror}: {error.filename}") from error
        except BaseException as error:
            self._keep_journal = not _is_given_up(error)
            self._discard()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        full, ended = error is not None and _is_full_disk(error), self._termination(error)
        told = ""
        try:
            with _signals_wait():
                told = self._settle_journal(error, goes_on=full or ended is not None)
                try:
                    if error is None:
                        self._commit()
                except OSError as problem:
                    raise OutputError(f"{self.out} cannot be put in place: {problem.strerror}") from problem
                finally:
                    self._discard()
        except SystemExit:
            if ended is None:  # else it is ended already, and says more
                raise
        if full:
            said = f"the disk is full: no room for {self.out}; free some space and run again"
            raise OutputError(f"{said}; {told}" if told else said) from error
        if told and (last := ended or error) is not None:
            last.add_note(told)
            if last is not error:
                raise last from error

    def _settle_journal(self, error: BaseException | None, *, goes_on: bool) -> str:
        """Whether it is kept, and what to tell of it; ``goes_on``: a later run may go on where this one ends."""
        folder = self.work / JOURNAL
        untouched, given_up = taken_up(folder) == self._taken_up, _is_given_up(error)
        # What is wrong with a command is no reason to lose what another has finished.
        self._keep_journal = goes_on or (untouched and error is not None and not given_up)
        if not (count := count_finished(folder)):
            return ""
        finished = counted(count, "finished sublayer")
        if given_up:
            return f"{finished} went too, which a termination (kill PID) keeps"
        if not goes_on:
            return ""
        if untouched:  # this run did not come as far as to look whose it is
            return f"{finished} of an earlier run stay in {folder}"
        return f"the same command goes on behind {finished}, kept in {folder}"

    def _termination(self, error: BaseException | None) -> SystemExit | None:
        """What SIGTERM or SIGHUP raised, though something on its way may have made another error of it."""
        if isinstance(error, Exception):
            try:
                self._check_signals()
            except SystemExit as swallowed:
                error = swallowed
        return error if isinstance(error, SystemExit) and error.code in (TERMINATED, HUNG_UP) else None

    def _work_folders(self) -> list[Path]:
        return list(self.out.parent.glob(f".{glob.escape(self.out.name)}.work-*"))

    def _check_nobody_writes(self) -> None:
        busy = next((folder for folder in self._work_folders() if _is_held(folder / LOCK)), None)
        if busy is not None:
            raise OutputError(
                f"{self.out}: another export writes it (and works in {busy}): wait for its end, or give another folder"
            )

    def _take_over(self) -> None:
        """Of what killed runs left: the latest one's journal becomes ours, all else goes."""
        found = self._work_folders()
        # One with our own number and without a lock is no living process's; in a container all may have one number.
        left = [f for f in found if _is_held(f / LOCK) is False or (f == self.work and not (f / LOCK).exists())]
        left.sort(key=lambda folder: folder.stat().st_mtime)
        latest = next((folder for folder in reversed(left) if (folder / JOURNAL).is_dir()), None)
        for folder in left:
            if folder != latest:
                shutil.rmtree(folder)
            shutil.rmtree(folder.with_name(folder.name.replace(".work-", ".partial-")), ignore_errors=True)
        if latest is not None:
            latest.rename(self.work)
            self._clear_work()

    def _clear_work(self) -> None:
        """All goes but the lock and what is whole of the journal."""
        drop_half_written(self.work / JOURNAL)
        for entry in self.work.iterdir():
            if entry.is_dir() and entry.name != JOURNAL:
                shutil.rmtree(entry, ignore_errors=True)
            elif entry.is_file() and entry.name != LOCK:
                entry.unlink(missing_ok=True)

    def _beside(self, what: str) -> Path:
        return self.out.parent / f".{self.out.name}.{what}-{self._pid}"

    def _check(self) -> None:
        out = self.out
        kept = (Path.cwd(), Path(os.path.expanduser("~")))  # not Path.home(): it raises where there is none
        if not out.name or any(place == out or out in place.parents for place in kept):
            raise OutputError(f"{out} is or holds the current or the home folder: give the name of a new folder")
        if self._source is not None and (self._source == out or out in self._source.parents):
            raise OutputError(f"{out} is or holds the model itself: give the name of a new folder")
        if not out.exists():
            return
        if not out.is_dir():
            raise OutputError(f"{out} is a file: give the name of a folder")
        if os.path.ismount(out):
            raise OutputError(f"{out} is a mount point and cannot be replaced: give the name of a folder inside it")
        try:
            found = {entry.name for entry in out.iterdir()}
        except OSError as error:
            raise OutputError(f"{out} cannot be read: {error.strerror}") from error
        if found and not self._force:
            raise OutputError(f"{out} exists and is not empty: choose another folder or pass --force")
        if found and REPORT_FILE not in found:
            raise OutputError(f"{out} holds no report.json, so it is not an earlier output: --force leaves it alone")

    def _commit(self) -> None:
        self._check()  # again: minutes have passed
        old = self._beside("old")
        if self.out.exists():
            self.out.rename(old)
        try:
            self.partial.rename(self.out)
        except OSError:
            if old.exists():
                old.rename(self.out)
            raise
        self._made_parents.clear()
        shutil.rmtree(old, ignore_errors=True)

    def _discard(self) -> None:
        if not self._entered or os.getpid() != self._pid:  # or a forked child runs its parent's atexit list
            return
        atexit.unregister(self._discard)
        shutil.rmtree(self.partial, ignore_errors=True)
        keep = self._keep_journal and count_finished(self.work / JOURNAL) > 0
        if keep:
            self._clear_work()
        self._lock.release()
        if not keep:
            shutil.rmtree(self.work, ignore_errors=True)
        for parent in reversed(self._made_parents):
            try:
                parent.rmdir()
            except OSError:
                break  # someone else uses it by now


def _is_given_up(error: BaseException | None) -> bool:
    """Whether it is Ctrl-C."""
    return isinstance(error, KeyboardInterrupt) or (isinstance(error, SystemExit) and error.code == INTERRUPTED)


def _is_held(lock: Path) -> bool | None:
    """Whether a process that works there holds it; None where nothing tells: no lock, or a file system without any."""
    if not lock.is_file():
        return None
    try:
        (other := FileLock(lock)).acquire(timeout=0)
    except Timeout:
        return True
    except (OSError, NotImplementedError):
        return None
    other.release()
    return False


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Hold back what ends a process until the block is done, then let it act. Only in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        arrived.append(number)

    before = {number: signal.signal(number, note) for number in ENDING_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for number in arrived:  # the first that is not ignored ends it
            signal.raise_signal(number)


def _is_full_disk(error: BaseException) -> bool:
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    return any(
        (isinstance(e, OSError) and e.errno in _FULL) or any(text in str(e) for text in _FULL_TEXT) for e in chain
    )
