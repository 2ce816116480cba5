"""How many activation streams of an ONNX graph fit: the dense graph's and the slim one's, one, or none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dotresize_fx.memory import Memory, show_size
from dotresize_fx.onnx_form.execution import OnnxExecution
from dotresize_fx.onnx_form.graph import OnnxGraph
from dotresize_fx.sweep import Inputs


@dataclass(frozen=True)
class StreamRoom:
    """``streams`` (2, 1 or 0) are kept, each of ``size`` bytes."""

    streams: int
    size: int

    @property
    def notes(self) -> tuple[str, ...]:
        """What it costs that they are fewer than two."""
        if self.streams == 2:
            return ()
        kept = "the dense one alone was kept" if self.streams else "none was kept"
        return (
            f"calibrated in one shot: two activation streams of {show_size(self.size)} each do not fit, {kept}. No "
            "sublayer makes good what those before it lost, which costs fidelity (MiniLM-L6 at 20 %: 1 - cosine 0.0161 "
            "instead of 0.0150): give it more memory, or calibrate on less",
        )


def stream_room(
    graph: OnnxGraph, target: str, batches: Sequence[Inputs], memory: Memory, device: str = "cpu"
) -> StreamRoom:
    """Of streams of these batches; ``target`` is the value whose place in the graph is looked at.

    On a GPU its own free memory counts.
    """
    execution = OnnxExecution(graph, device)
    stop = 1 + execution.position(target)
    live = execution.live_behind(stop, execution.inputs)
    sample = max(batches, key=_numbers)
    values, _ = execution.piece(0, stop, live).run(execution.start(sample))
    held = sum(value.tensor_size_in_bytes() for value in values.values())
    size = round(held * sum(map(_numbers, batches)) / max(1, _numbers(sample)))
    there = None if device == "cpu" else torch.cuda.mem_get_info()[0]
    fitting = [count for count in (2, 1) if memory.has_room_for_kept_streams(count * size, there)]
    return StreamRoom(max(fitting, default=0), size)


def _numbers(batch: Inputs) -> int:
    return sum(value.numel() for value in batch.values())
