"""Signals that end a command."""

from __future__ import annotations

import logging
import signal
import sys
from types import FrameType

from dotresize_fx.errors import ENDING_SIGNALS


class Stop:
    """Ctrl-C, SIGTERM and a terminal that is closed, as a SystemExit that is not lost.

    A library may swallow the exception that a signal raises (an import that it only tries, a callback from C): the
    signal is remembered, and ``check``, which runs between the stages, raises again. Or it writes what is raised in it
    to a log, which is off from then on. It is no KeyboardInterrupt, because Python kills itself at its end where one
    has passed through an ``exec``, handled or not.
    """

    def __init__(self) -> None:
        self.code: int | None = None
        numbers = [n for n in ENDING_SIGNALS if signal.getsignal(n) != signal.SIG_IGN]  # as nohup has a hang-up
        self._hook, sys.unraisablehook = sys.unraisablehook, self._swallowed
        self._logs = logging.root.manager.disable
        self._before = {number: signal.signal(number, self._arrived) for number in numbers}

    def check(self) -> None:
        """Raise SystemExit if a signal has arrived."""
        if self.code is not None:
            raise SystemExit(self.code)

    def end(self, restore: bool) -> None:
        """Put back the handlers that were there, or, where only the interpreter's end is left, ignore what comes."""
        for number, handler in self._before.items():
            signal.signal(number, handler if restore else signal.SIG_IGN)
        sys.unraisablehook = self._hook
        if restore:
            logging.disable(self._logs)

    def _swallowed(self, lost: sys.UnraisableHookArgs) -> None:
        """What a destructor or a callback cannot raise Python prints, with a traceback: not what a signal raised."""
        if self.code is None:
            self._hook(lost)

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        self.code = 128 + number
        logging.disable()
        self.check()
