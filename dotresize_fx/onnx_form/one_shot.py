"""The sweep over an ONNX graph where two activation streams do not fit: the dense graph's alone, or none.

Each sublayer is calibrated on what the dense graph feeds it. What its own earlier cuts broke its reader still repairs;
what the sublayers before it lost it cannot see, which costs fidelity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import overload

from dotresize_fx.onnx_form.execution import OnnxExecution
from dotresize_fx.onnx_form.graph import OnnxGraph
from dotresize_fx.onnx_form.piece import Environment
from dotresize_fx.onnx_form.region_sums import OnnxRegion
from dotresize_fx.onnx_form.stream import OnnxStream
from dotresize_fx.onnx_form.sweep import GOAL, OnnxSweep
from dotresize_fx.region_map import RegionMap
from dotresize_fx.regions import Region
from dotresize_fx.sweep import Inputs


class OneShotSweep(OnnxSweep):
    """See :class:`OnnxSweep`. ``held``: the dense stream is kept; without it each sublayer runs all before it anew."""

    def __init__(
        self,
        dense: OnnxGraph,
        slim: OnnxGraph,
        batches: Sequence[Inputs],
        apply: Callable[[Region, RegionMap], None],
        *,
        held: bool,
        refit: bool,
        pull: float,
        causal: bool,
        device: str = "cpu",
    ) -> None:
        super().__init__(dense, slim, batches, apply, refit=refit, pull=pull, causal=causal, device=device)
        self.held, self.dense_graph = held, dense
        self._last: tuple[int, Environment] | None = None

    def _start_streams(self, dense: OnnxExecution, slim: OnnxExecution) -> tuple[OnnxStream, OnnxStream]:
        starts = [dense.start(batch) for batch in self.batches]
        return OnnxStream(dense, starts, self.masks), OnnxStream(slim, (), self.masks)

    def _reach(self, regions: Sequence[OnnxRegion], target: str) -> Sequence[Environment]:
        execution, stream = self.dense.execution, self.dense
        start = min(OnnxRegion(self.dense_graph, inputs.region).start(execution) for inputs in regions)
        start = max(start, stream.position)
        if self.held:
            stream.advance(start)
        live = execution.live_behind(start, execution.inputs)
        before = stream.piece(start, live)
        behind = execution.piece(start, execution.position(target) + 1, [target])
        self._last = None

        def reached(batch: int) -> Environment:
            if self.held:
                return stream.environments[batch]
            if self._last is None or self._last[0] != batch:
                self._last = batch, before.run(stream.environments[batch])[0]
            return self._last[1]

        def seen(batch: int) -> Environment:
            return {**reached(batch), **self.slim.execution.empty_cache(self.batches[batch])}

        def goal(batch: int) -> Environment:
            return {GOAL: behind.run(reached(batch))[0][target]}

        self.slim.environments = Computed(len(self.batches), seen)
        self.slim.position = min(inputs.start(self.slim.execution) for inputs in regions)
        return Computed(len(self.batches), goal)

    def _leave(self, target: str) -> None:
        """The dense stream goes on by itself."""

    def _edited(self) -> None:
        self.slim.execution = OnnxExecution(self.slim_graph, self.device)


class Computed(Sequence[Environment]):
    """So many environments, each computed when it is asked for and not kept."""

    def __init__(self, count: int, make: Callable[[int], Environment]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Environment: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Environment]: ...
    def __getitem__(self, index: int | slice) -> Environment | Sequence[Environment]:
        if isinstance(index, slice):
            return [self._make(i) for i in range(self._count)[index]]
        return self._make(range(self._count)[index])
