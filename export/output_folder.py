"""OUT is written as a whole or not at all: all goes into a folder beside it, which is renamed at the end."""

from __future__ import annotations

import atexit
import errno
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from dotresize_fx.errors import OutputError
from dotresize_fx.report.contents import REPORT_FILE

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# Rust (safetensors, tokenizers) and C++ (protobuf, torch) report a full disk as text only.
_FULL_TEXT = ("No space left on device", "Disk quota exceeded", "File too large", "os error 28")


class OutputFolder:
    """Context manager over the folder OUT.

    Entering checks OUT before any work is done and makes two folders beside it: ``partial`` for what OUT
    will hold and ``work`` for intermediate files, which is removed in any case. Leaving without an exception
    renames ``partial`` to OUT; leaving with one (KeyboardInterrupt and SystemExit too) removes it, and the
    parents made for OUT. With ``force`` an OUT that holds a ``report.json`` is replaced whole, once the new
    one is complete. ``source`` is the model, where that is a file or folder.

    Raises:
        OutputError: OUT is a file, is not empty (without ``force``), does not look like an earlier output
            (with it), is or holds the model or the current or the home folder, is a mount point, or cannot be
            written; on leaving, also when the disk was full.
    """

    def __init__(self, out: Path | str, force: bool = False, source: Path | str | None = None) -> None:
        # Resolved, so that a link to a folder stays a link and a later chdir changes nothing.
        self.out = Path(out).resolve()
        self._force = force
        self._source = Path(source).resolve() if source is not None and Path(source).exists() else None
        self._pid = os.getpid()
        self._made_parents: list[Path] = []
        self.partial = self._beside("partial")
        self.work = self._beside("work")

    def __enter__(self) -> Self:
        try:
            self._check()
            with _signals_wait():
                for parent in reversed([p for p in self.out.parents if not p.exists()]):
                    parent.mkdir(exist_ok=True)
                    self._made_parents.append(parent)
                for folder in (self.partial, self.work):
                    if folder.exists():  # left by a killed process that had our number
                        shutil.rmtree(folder)
                    folder.mkdir()
                # Last resort for a signal that arrives between here and the body of the with statement.
                atexit.register(self._discard)
        except OSError as error:
            self._discard()
            raise OutputError(f"{self.out} cannot be written: {error.strerror}: {error.filename}") from error
        except BaseException:
            self._discard()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _signals_wait():
            try:
                if error is None:
                    self._commit()
            except OSError as problem:
                raise OutputError(f"{self.out} cannot be put in place: {problem.strerror}") from problem
            finally:
                self._discard()
        if error is not None and _is_full_disk(error):
            raise OutputError(f"the disk is full: no room for {self.out}; free some space and run again") from error

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
        if os.getpid() != self._pid:  # a forked child that runs its parent's atexit list
            return
        atexit.unregister(self._discard)
        for folder in (self.partial, self.work):
            shutil.rmtree(folder, ignore_errors=True)
        for parent in reversed(self._made_parents):
            try:
                parent.rmdir()
            except OSError:
                break  # someone else uses it by now


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Hold SIGINT and SIGTERM back until the block is done, then let them act. Only in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        arrived.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if arrived:
            signal.raise_signal(arrived[0])


def _is_full_disk(error: BaseException) -> bool:
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    return any(
        (isinstance(e, OSError) and e.errno in _FULL) or any(text in str(e) for text in _FULL_TEXT) for e in chain
    )
