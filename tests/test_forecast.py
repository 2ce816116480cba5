"""What an export will take, from shapes alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dotresize_fx.cost import stream_width
from dotresize_fx.forecast import LIBRARIES, STREAMS, Work, forecast, stream_bytes
from dotresize_fx.offload.lazy_tensor import LazyTensor
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.regions import RegionKind


def test_nothing_is_read_and_more_of_all_takes_more(tiny_graph: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dotresize_fx.forecast._rate", lambda device, dtype: 1e9)
    _, graph = tiny_graph("llama")
    found = find_regions(graph)

    def unread() -> torch.Tensor:
        raise AssertionError("a weight was read")

    state = graph.program.state_dict
    for name, tensor in state.items():
        state[name] = torch.nn.Parameter(LazyTensor(unread, tuple(tensor.shape), tensor.dtype), requires_grad=False)

    def told(kind: RegionKind = RegionKind.FFN, **changed: Any) -> Any:
        given = {"tokens": 1000, "measuring": 100, "length": 50, "device": "cpu", "lazy": True}
        given |= {"streams": "files", "half": False, "measured": True}
        return forecast(graph, list(found.of_kind(kind)), Work(analysed=1.0, stored=4, **{**given, **changed}))

    assert stream_width(graph) == 32
    assert stream_bytes(graph, 10) == STREAMS * 10 * 32 * 4
    least = told()
    assert least.host > LIBRARIES
    assert least.gpu == 0
    assert told(lazy=False).host > least.host
    measuring = told(measuring=10**6).stages
    assert measuring["calibrate and solve"] == least.stages["calibrate and solve"]
    assert measuring["convert and measure"] > least.stages["convert and measure"]
    repaired = told(steps=100).stages
    assert repaired["calibrate and solve"] > least.stages["calibrate and solve"]
    assert repaired["convert and measure"] == least.stages["convert and measure"]
    # What is not cut where widths are measured is run once alone, and measuring takes few tokens of many.
    assert told(tokens=10**6).operations < 0.8 * told(tokens=10**6, measured=False).operations
    assert told(steps=100, ratio=0.2).operations < told(steps=100).operations
    # Scores are read and written anew in each step, which products do not tell.
    solved, repaired = (told(RegionKind.VALUE, steps=steps, length=500) for steps in (0, 100))
    assert repaired.seconds - solved.seconds > 2 * (repaired.operations - solved.operations) / 1e9 > 0
    # What waits of probes side by side on a GPU, which does not in files.
    assert told(device="cuda", streams="pinned").gpu > told(device="cuda").gpu > 0
    assert told(device="cuda", streams="pinned").host > told(device="cuda").host
    assert told(streams="device", tokens=10**6).host > told(tokens=10**6).host
    assert told(tokens=10**6).operations > least.operations
    assert told(tokens=10**6).stages["calibrate and solve"] > least.stages["calibrate and solve"]
    assert least.stages["load and capture"] > 1
    assert least.seconds == sum(least.stages.values())
    assert len(least.lines()) == 2
