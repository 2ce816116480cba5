"""One ONNX file whose runs are timed, with inputs and outputs bound where it computes: nothing is copied in a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dotresize_fx.errors import OnnxRuntimeError
from dotresize_fx.export.onnx_session import CUDA, OnnxModel, run_failed

Array = np.ndarray[Any, Any]


class TimedModel:
    """``run`` times one run, ``continue_with`` the runs that go on from what the last ``run`` left.

    Only the runs are timed: neither what is bound before one nor the way of its outputs to the host. Raises what
    :class:`OnnxModel` raises; OutOfMemoryError where the device has no room for a run.
    """

    def __init__(self, path: Path | str, *, threads: int | None, provider: str) -> None:
        self._model = OnnxModel(path, threads=threads, provider=provider)
        self._device = "cuda" if provider == CUDA else "cpu"
        self._start: dict[str, Any] = {}
        self._left: dict[str, Any] = {}

    def start_with(self, inputs: Mapping[str, Array]) -> None:
        """What every ``run`` runs on; of a cache's own inputs those may be missing that are told at the start."""
        given = self._model.at_start(inputs)
        self._model.check_names(given)
        self._start = self._model.values(given, self._device)

    def run(self) -> float:
        """Seconds of one run on what it starts with; its outputs are kept until the next."""
        self._left = {}  # first, so that their memory can be taken again
        return self._timed(self._start)

    def continue_with(
        self, steps: int, inputs: Callable[[int], Mapping[str, Array]], cache: Mapping[str, str]
    ) -> list[float]:
        """Seconds of each of ``steps`` runs: ``inputs(step)``, and by ``cache`` (input: output) what the run before
        left, without a copy.
        """
        if missing := [name for name in cache.values() if name not in self._left]:
            raise OnnxRuntimeError(f"{self._model.path} has no outputs {missing}, which its cache would come from")
        seconds = []
        for step in range(steps):
            bound = self._model.values(inputs(step), self._device) | {
                into: self._left[name] for into, name in cache.items()
            }
            seconds.append(self._timed(bound))
        return seconds

    def _timed(self, inputs: Mapping[str, Any]) -> float:
        binding = self._model.session.io_binding()
        try:
            for name, value in inputs.items():
                binding.bind_ortvalue_input(name, value)
            for name in self._model.output_names:
                binding.bind_output(name, self._device, 0)
            begin = time.perf_counter()
            self._model.session.run_with_iobinding(binding)
            binding.synchronize_outputs()
            taken = time.perf_counter() - begin
        except Exception as error:  # as above
            raise run_failed(self._model.path, error) from error
        self._left = dict(zip(self._model.output_names, binding.get_outputs(), strict=True))
        return taken
