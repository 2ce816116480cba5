"""A process of its own for ONNX Runtime, asked one thing after the other.

The child is ``runtime_process``; it ends with this process, whether that is interrupted, fails or is killed.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import dotresize_fx.errors
from dotresize_fx.errors import DotresizeError, OnnxRuntimeError


class RuntimeChild:
    """Context manager. ``folder`` is the child's working folder, made in ``work`` (default: the system's temporary
    folder), for arrays on their way; it goes with the child.
    """

    def __init__(self, work: Path | None = None) -> None:
        self._temporary = tempfile.TemporaryDirectory(dir=work, prefix="runtime-")
        self.folder = Path(self._temporary.name).resolve()
        # -P: neither the working folder nor a source tree in it may shadow the installed package.
        command = [sys.executable, "-P", "-m", "dotresize_fx.export.runtime_process"]
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                command, cwd=self.folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, encoding="utf-8"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):  # a request that nobody read
                pipe.close()
        self._temporary.cleanup()

    def ask(self, task: str, **request: Any) -> dict[str, Any]:
        """The child's answer. Its user errors are raised here; OnnxRuntimeError where it has ended without one."""
        pipe, answers = self._process.stdin, self._process.stdout
        assert pipe is not None
        assert answers is not None
        try:
            pipe.write(json.dumps({"task": task, **request}) + "\n")
            pipe.flush()
            line = answers.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise OnnxRuntimeError(_last_words(self._process.wait(), self._errors))
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            kind = getattr(dotresize_fx.errors, answer["error"], OnnxRuntimeError)
            error = kind(answer["message"]) if issubclass(kind, DotresizeError) else OnnxRuntimeError(answer["message"])
            raise error
        return answer

    @property
    def _errors(self) -> Path:
        return self.folder / "stderr.txt"


def _last_words(status: int, stderr: Path) -> str:
    lines = [line.strip() for line in stderr.read_text(encoding="utf-8", errors="replace").splitlines()]
    said = next((line for line in reversed(lines) if line), "it said nothing")
    if status >= 0:
        return f"the ONNX Runtime process ended with status {status}: {said}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    hint = " (out of memory?)" if name == "SIGKILL" else ""
    return f"the ONNX Runtime process was ended by {name}{hint}: {said}"
