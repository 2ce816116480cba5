"""Opening an ONNX file in ONNX Runtime, with errors that a user can act on.

ONNX Runtime comes with an extra, so nothing here imports it before a session is asked for.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dotresize_fx.errors import BadWeightsError, MissingExtraError, ModelNotFoundError, OnnxRuntimeError

CPU = "CPUExecutionProvider"


def require_onnx_runtime() -> None:
    """Raise MissingExtraError unless ONNX Runtime is installed. Does not import it."""
    spec = importlib.util.find_spec("onnxruntime")
    if spec is None or spec.origin is None:  # without origin: an empty folder that an uninstall left behind
        raise MissingExtraError("ONNX Runtime is not installed; run: pip install 'dotresize-fx[cpu]'")


def physical_cores() -> int:
    """Physical cores that this process may use, at least 1: what a thread per core should be counted by."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    siblings = set()
    for cpu in os.sched_getaffinity(0):
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            siblings.add(topology.read_text(encoding="ascii").strip())
        except OSError:  # no topology to be seen: every CPU counts as a core
            siblings.add(str(cpu))
    return max(1, len(siblings))


def open_session(path: Path, *, threads: int | None = None, provider: str = CPU) -> Any:
    """An ``onnxruntime.InferenceSession`` on ``threads`` intra-op threads (default: one a physical core).

    Raises MissingExtraError (no ONNX Runtime, or one without ``provider``), ModelNotFoundError (no such file)
    and BadWeightsError (not an ONNX model, or its external data is missing or cut off).
    """
    require_onnx_runtime()
    if not path.is_file():
        raise ModelNotFoundError(f"no ONNX model at {path}; give the path of a model.onnx")
    import onnxruntime

    if provider not in onnxruntime.get_available_providers():
        extra = "cpu" if provider == CPU else "gpu"
        raise MissingExtraError(f"this ONNX Runtime has no {provider}; run: pip install 'dotresize-fx[{extra}]'")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or physical_cores()
    options.log_severity_level = 3  # errors only: warnings about unfused nodes are not the user's business
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
    except Exception as error:  # its exceptions share no base class but Exception
        raise BadWeightsError(
            f"ONNX Runtime cannot open {path}: {first_line(error)}; the file or its data is damaged, export it again"
        ) from error
    if session.get_providers()[0] != provider:  # a GPU provider that fails to start falls back without an error
        raise OnnxRuntimeError(f"ONNX Runtime could not start {provider} for {path}; check the driver and the device")
    return session


def first_line(error: Exception) -> str:
    """The first line of what an exception says, or its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


class OnnxModel:
    """An ONNX file as a callable, in this process: arrays by input name -> outputs in the graph's order.

    Raises what :func:`open_session` raises; a call raises OnnxRuntimeError for inputs the graph does not
    take.
    """

    def __init__(self, path: Path | str, *, threads: int | None = None, provider: str = CPU) -> None:
        self.path = Path(path)
        self._session = open_session(self.path, threads=threads, provider=provider)
        self.input_names: tuple[str, ...] = tuple(item.name for item in self._session.get_inputs())
        self.output_names: tuple[str, ...] = tuple(item.name for item in self._session.get_outputs())

    def __call__(self, inputs: Mapping[str, np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        missing = [name for name in self.input_names if name not in inputs]
        unknown = [name for name in inputs if name not in self.input_names]
        if missing or unknown:
            problem = f"missing inputs {missing}" if missing else f"unknown inputs {unknown}"
            raise OnnxRuntimeError(f"{self.path} takes {list(self.input_names)}: {problem}")
        try:
            outputs: list[np.ndarray[Any, Any]] = self._session.run(None, dict(inputs))
        except Exception as error:  # as above
            raise OnnxRuntimeError(f"ONNX Runtime cannot run {self.path}: {first_line(error)}") from error
        return outputs
