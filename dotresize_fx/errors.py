"""What can go wrong for a user, one class a kind, each with an exit code of its own.

A message is one line: what was wrong, where, and what to do. The command line prints it without a traceback.
"""

from __future__ import annotations

import signal

# The exit codes of a process that Ctrl-C, SIGTERM or SIGHUP ends, as a shell gives them: 128 and the signal's number.
INTERRUPTED, TERMINATED, HUNG_UP = 130, 143, 129
# Their numbers, where the system has them.
ENDING_SIGNALS = [code - 128 for code in (INTERRUPTED, TERMINATED, HUNG_UP) if code - 128 in set(signal.Signals)]


class DotresizeError(Exception):
    """Any error that a user can act on. ``exit_code`` is what the command line exits with."""

    exit_code = 1


class UsageError(DotresizeError):
    """An option or argument has a value that cannot be used (a ratio of 1.2, an unknown method)."""

    exit_code = 2


class ModelNotFoundError(DotresizeError):
    """The model's folder, file, hub id or built-in name leads to nothing that can be loaded."""

    exit_code = 3


class BadWeightsError(DotresizeError):
    """The weights are truncated, do not match their checksum, or hold NaN or infinity."""

    exit_code = 4


class CaptureError(DotresizeError):
    """``torch.export`` refused the model; the message quotes what it said."""

    exit_code = 5


class NothingToSlimError(DotresizeError):
    """No region matched, or the ratio asks for more than the matched regions hold."""

    exit_code = 6


class CalibrationError(DotresizeError):
    """What is to calibrate or measure is missing, too little, or not what the model reads."""

    exit_code = 7


class TextError(CalibrationError):
    """Calibration or evaluation text is missing, empty, too short or not UTF-8."""


class OutputError(DotresizeError):
    """OUT cannot be written: it exists and is not empty, or the disk is full."""

    exit_code = 8


class MissingExtraError(DotresizeError):
    """ONNX Runtime, or what a ``--format`` needs, is not installed; the message names the extra that brings it."""

    exit_code = 9


class VerificationError(DotresizeError):
    """The emitted ONNX, or another format, differs from the slim program by more than the tolerance."""

    exit_code = 10


class SolverError(DotresizeError):
    """A solver met numbers it cannot work with (non-finite costs, no mass to transport)."""

    exit_code = 11


class OnnxRuntimeError(DotresizeError):
    """ONNX Runtime's process failed: it was killed, or the graph holds what this build cannot run."""

    exit_code = 12


class RanksError(DotresizeError):
    """One of several processes that heal together failed or is gone; the message says which, if it is known."""

    exit_code = 13


class CheckpointError(DotresizeError):
    """No stock model has the slim widths, or one computes something else; the message says which and why."""

    exit_code = 14


class UnknownOpError(DotresizeError):
    """The file has an op, or an operator set, that this ONNX Runtime does not know."""

    exit_code = 15


class InputsDifferError(DotresizeError):
    """Models that are to be measured side by side take different inputs."""

    exit_code = 17


class OutOfMemoryError(DotresizeError):
    """The device has no room for a model, or for one run of it at the smallest batch."""

    exit_code = 18


class FormatError(DotresizeError):
    """The library behind a ``--format`` does not convert the slim program, or cannot run what it made."""

    exit_code = 20


class TargetLatencyError(DotresizeError):
    """No plan of widths reaches the latency that was asked for; the message says the best found."""

    exit_code = 19
