"""Signals that end a command: none is lost, and none outlives it."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dotresize_fx.cli import main

# Between the command line and the work, something that keeps what is raised in it to itself.
SWALLOWS = {
    "a library": "try:\n        os.kill(os.getpid(), int(name))\n    except BaseException:\n        pass",
    "a log": "try:\n        os.kill(os.getpid(), int(name))\n    except BaseException:\n"
    "        logging.getLogger('torch').exception('no luck')\n        raise RuntimeError('no luck') from None",
    "a destructor": "type('Part', (), {'__del__': lambda part: os.kill(os.getpid(), int(name))})()",
}
SWALLOWED = [("a library", signal.SIGINT), ("a log", signal.SIGINT), ("a destructor", signal.SIGTERM)]
SCRIPT = """
import logging, os, sys
from dotresize_fx import cli, compiler

def open_model(name, **options):
    {body}

compiler.open_model = open_model
cli.main(["inspect", sys.argv[1], "--quiet"])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals of another kind")
@pytest.mark.parametrize(("swallower", "number"), SWALLOWED)
def test_a_signal_that_is_swallowed(tmp_path: Path, swallower: str, number: int) -> None:
    """The command ends behind the stage all the same, before what the stage did not do can fail."""
    script = SCRIPT.format(body=SWALLOWS[swallower])
    command = [sys.executable, "-P", "-c", script, str(int(number))]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a child inherits that it is ignored
    try:
        ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (ended.returncode, ended.stdout) == (128 + number, "")
    how = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}[signal.Signals(number)]
    assert ended.stderr == f"dotresize-fx: {how}; nothing half-written was left behind\n"


def test_signals_are_handled_as_before_afterwards() -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    with pytest.raises(SystemExit):
        main(["--version"])
    assert [signal.getsignal(number) for number in numbers] == before
