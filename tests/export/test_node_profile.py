"""What is read out of a profile: here of events as ONNX Runtime writes them, with kernels of a GPU and without."""

from __future__ import annotations

from typing import Any

import pytest

from dotresize_fx.export.node_profile import Profile, read_profile

Event = dict[str, Any]


def event(cat: str, name: str, ts: int, dur: int, **args: Any) -> Event:
    return {"cat": cat, "pid": 1, "tid": 1, "dur": dur, "ts": ts, "ph": "X", "name": name, "args": args}


def node(name: str, ts: int, dur: int, op: str = "MatMul") -> Event:
    shapes = [{"float": [2, 8]}, {"float": [8, 4]}]
    return event(
        "Node",
        f"{name}_kernel_time",
        ts,
        dur,
        op_name=op,
        input_type_shape=shapes,
        output_type_shape=[{"float": [2, 4]}],
    )


def run(start: int, *kernels: Event) -> list[Event]:
    """1000 microseconds, 600 of them for launching two nodes."""
    nodes = [node("a", start + 10, 400), node("g", start + 500, 200, op="Gather")]
    return [event("Session", "model_run", start, 1000), *nodes, *kernels]


def kernel(ts: int, dur: int, name: str = "ampere_sgemm_128x64") -> Event:
    return event("Kernel", name, ts, dur, stream="0x7f", grid_x="8", block_x="128")


def read(*events: Event, runs: int = 2) -> Profile:
    start = event("Session", "model_loading_uri", 1, 5)
    return read_profile([start, *events], runs=runs, warmup=1, equations={})


def test_kernels_are_summed_by_run_without_copies_and_without_the_first_run() -> None:
    copy = kernel(2010, 800, "MemcpyDeviceToHost")
    events = [*run(1000, kernel(1100, 900)), *run(2000, kernel(2100, 100), kernel(2900, 50), copy)]
    found = read(*events, *run(3000, kernel(3100, 170)))
    assert found.kernels == pytest.approx(160e-6)
    assert found.launching == pytest.approx(0.6)
    product, gather = found.nodes
    assert (product.seconds, product.macs, product.picked) == (pytest.approx(400e-6), 2 * 8 * 4, None)
    assert gather.picked == 8 * 4


def test_without_kernels_nothing_is_known() -> None:
    """What pip's ONNX Runtime for CUDA writes, built without CUPTI."""
    found = read(*run(1000), *run(2000), *run(3000))
    assert found.kernels is None
    assert found.launching == pytest.approx(0.6)


def test_kernels_out_of_the_runs_time_are_not_taken_for_theirs() -> None:
    """Clocks of another origin: all kernels seem to lie before the first run, or in the last."""
    for ts in (0, 9000):
        kernels = [kernel(ts + index, 300) for index in range(3)]
        assert read(*run(1000), *run(2000), *run(3000), *run(4000), *kernels, runs=3).kernels is None


def test_events_of_other_makes_are_passed_over() -> None:
    odd = [{"name": "process_name", "ph": "M"}, {"cat": "Api", "name": "cudaLaunchKernel", "ts": 2050, "dur": 3}]
    found = read(*odd, *run(1000), *run(2000), *run(3000))
    assert len(found.nodes) == 2
    assert read(runs=1) == Profile([], None, None)
