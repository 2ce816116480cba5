"""Opening an ONNX file in ONNX Runtime, with errors that a user can act on.

ONNX Runtime comes with an extra, so nothing here imports it before a session is asked for.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dotresize_fx.cache_names import PAST, POSITIONS
from dotresize_fx.errors import (
    BadWeightsError,
    DotresizeError,
    MissingExtraError,
    ModelNotFoundError,
    OnnxRuntimeError,
    OutOfMemoryError,
    UnknownOpError,
)
from dotresize_fx.export.bfloat16_values import BFLOAT16, to_array, to_bfloat16

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
Array = np.ndarray[Any, Any]
# What ONNX Runtime says of a file that is newer than itself, or made for another.
UNKNOWN = (
    "is not a registered function/op",
    "No Op registered for",
    "onnx opset versions",
    "Unsupported model IR version",
)
# What ONNX Runtime, CUDA, cuBLAS and C++ say where there is no room; none has an error code that reaches Python.
_NO_ROOM = ("Failed to allocate memory", "out of memory", "ALLOC_FAILED", "bad_alloc", "bad allocation")


def provider_on(device: str) -> str:
    """What ONNX Runtime calls the one for ``cpu`` or ``cuda``."""
    return CUDA if device == "cuda" else CPU


def require_onnx_runtime() -> None:
    """Raise MissingExtraError unless ONNX Runtime is installed. Does not import it."""
    spec = importlib.util.find_spec("onnxruntime")
    if spec is None or spec.origin is None:  # without origin: an empty folder that an uninstall left behind
        raise MissingExtraError("ONNX Runtime is not installed; run: pip install 'dotresize-fx[cpu]'")


def has_provider(provider: str) -> bool:
    """Whether ONNX Runtime, which must be installed, has it."""
    import onnxruntime

    return provider in onnxruntime.get_available_providers()


def require_provider(provider: str, why: str = "") -> None:
    """Raise MissingExtraError, which begins with ``why``, unless ONNX Runtime is installed and has it."""
    require_onnx_runtime()
    if not has_provider(provider):
        extra = "cpu" if provider == CPU else "gpu"
        raise MissingExtraError(f"{why}this ONNX Runtime has no {provider}; run: pip install 'dotresize-fx[{extra}]'")


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


def open_session(
    path: Path,
    *,
    threads: int | None = None,
    provider: str = CPU,
    profile: Path | None = None,
    optimised: bool = True,
    tf32: bool = True,
) -> Any:
    """An ``onnxruntime.InferenceSession`` on ``threads`` intra-op threads (default: one a physical core).

    ``profile`` is how the names of the files begin that its profiler writes. Without ``optimised`` the nodes run as the
    file has them, and the profiler sees their weights. Without ``tf32`` CUDA does not round what it multiplies in
    float32, as it does by default.

    Raises MissingExtraError (no ONNX Runtime, or one without ``provider``), ModelNotFoundError (no such file),
    BadWeightsError (not an ONNX model, or its external data is missing or cut off), UnknownOpError and
    OutOfMemoryError.
    """
    require_onnx_runtime()  # before what is said of the file
    if not path.is_file():
        raise ModelNotFoundError(f"no ONNX model at {path}; give the path of a model.onnx")
    require_provider(provider)
    import onnxruntime

    if provider == CUDA and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()  # CUDA's libraries out of Python packages, where the system has none
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or physical_cores()
    options.log_severity_level = 3  # errors only: warnings about unfused nodes are not the user's business
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        how = {"use_tf32": "0"} if provider == CUDA and not tf32 else {}
        session = onnxruntime.InferenceSession(str(path), options, providers=[(provider, how)])
    except Exception as error:  # its exceptions share no base class but Exception
        if _no_room(error):
            raise run_failed(path, error) from error
        if any(words in str(error) for words in UNKNOWN):
            raise UnknownOpError(
                f"this ONNX Runtime does not know all that {path} is made of: {first_line(error)}; take a newer one"
            ) from error
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


def run_failed(path: Path, error: Exception) -> DotresizeError:
    """What to raise for an exception out of ONNX Runtime."""
    if _no_room(error):
        return OutOfMemoryError(f"no memory left to run {path}: {first_line(error)}; take a smaller batch or prompt")
    return OnnxRuntimeError(f"ONNX Runtime cannot run {path}: {first_line(error)}")


def _no_room(error: Exception) -> bool:
    return isinstance(error, MemoryError) or any(words in str(error) for words in _NO_ROOM)


class OnnxModel:
    """An ONNX file as a callable, in this process: arrays by input name -> outputs in the graph's order.

    float32 arrays are rounded for an input in half precision, so that what feeds one precision feeds all; an output
    in bfloat16, which numpy lacks, comes as float32.
    Takes and raises what :func:`open_session` does; a call raises OnnxRuntimeError for inputs the graph does not
    take, and OutOfMemoryError.
    """

    def __init__(self, path: Path | str, **options: Any) -> None:
        self.path = Path(path)
        self.session = open_session(self.path, **options)
        self._shapes = {item.name: item.shape for item in self.session.get_inputs()}
        self._halves = {item.name for item in self.session.get_inputs() if item.type == "tensor(float16)"}
        self._coarse = {item.name for item in self.session.get_inputs() if item.type == BFLOAT16}
        self.input_names: tuple[str, ...] = tuple(self._shapes)
        self.output_names: tuple[str, ...] = tuple(item.name for item in self.session.get_outputs())
        self._bound = bool(self._coarse) or any(item.type == BFLOAT16 for item in self.session.get_outputs())

    @property
    def has_cache(self) -> bool:
        """Whether it reads keys and values of earlier tokens."""
        return any(name.startswith(PAST) for name in self.input_names)

    def at_start(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """``inputs`` and, of a graph with a cache, what they lack of its own: no past, and positions.

        ``inputs`` hold the ``attention_mask``, (batch, length), whose padding on the left is not counted.
        """
        given = dict(inputs)
        for name, shape in self._shapes.items():
            if name in given:
                continue
            if name.startswith(PAST):
                given[name] = np.empty((len(given["attention_mask"]), shape[1], 0, shape[3]), np.float32)
            elif name == POSITIONS and self.has_cache:
                given[name] = np.maximum(given["attention_mask"].cumsum(-1) - 1, 0)
        return given

    def check_names(self, inputs: Mapping[str, Any]) -> None:
        """Raise OnnxRuntimeError unless these are the inputs that the graph takes."""
        missing = [name for name in self.input_names if name not in inputs]
        unknown = [name for name in inputs if name not in self.input_names]
        if missing or unknown:
            problem = f"missing inputs {missing}" if missing else f"unknown inputs {unknown}"
            raise OnnxRuntimeError(f"{self.path} takes {list(self.input_names)}: {problem}")

    def __call__(self, inputs: Mapping[str, Array]) -> list[Array]:
        self.check_names(inputs)
        if self._bound:
            bound: list[Array] = self._run(lambda: self._run_bound(inputs))
            return bound
        outputs: list[Array] = self._run(lambda: self.session.run(None, self._rounded(inputs)))
        return outputs

    def _run_bound(self, inputs: Mapping[str, Array]) -> list[Array]:
        binding = self.session.io_binding()
        for name, value in self.values(inputs).items():
            binding.bind_ortvalue_input(name, value)
        for name in self.output_names:
            binding.bind_output(name)
        self.session.run_with_iobinding(binding)
        return [to_array(value) for value in binding.get_outputs()]

    def values(self, inputs: Mapping[str, Array], device: str = "cpu") -> dict[str, Any]:
        """The arrays as the runtime's own, on ``device``; bfloat16 goes there when it is bound."""
        from onnxruntime import OrtValue

        # What is empty has no address on a device.
        places = {name: device if value.size else "cpu" for name, value in inputs.items()}
        arrays = {name: np.asarray(value, order="C") for name, value in self._rounded(inputs).items()}

        def made(name: str) -> Any:
            if name in self._coarse:
                return to_bfloat16(arrays[name])
            return OrtValue.ortvalue_from_numpy(arrays[name], places[name], 0)

        values: dict[str, Any] = self._run(lambda: {name: made(name) for name in places})
        return values

    def run_values(self, inputs: Mapping[str, Any]) -> list[Any]:
        """A call whose inputs and outputs are the runtime's own, so that a cache is not copied."""
        outputs: list[Any] = self._run(lambda: self.session.run_with_ort_values(self.output_names, dict(inputs)))
        return outputs

    def _rounded(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return {name: value.astype(np.float16) if name in self._halves else value for name, value in inputs.items()}

    def _run(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:  # as above
            raise run_failed(self.path, error) from error
