"""What is said of a GPU that waits, and of one that nothing is known of."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dotresize_fx.export.bench_phase import idle_gpu, unknown_business
from dotresize_fx.report.bench_contents import BenchModel, BenchReport, Peak, Phase, Ratio, RunFigures, WorkloadFigures
from dotresize_fx.report.bench_page import render_bench_page
from dotresize_fx.report.bench_tables import bench_table
from dotresize_fx.report.contents import Latency, Machine

LATENCY = Latency(
    median=0.01, min=0.01, max=0.01, p25=0.01, p75=0.01, runs=5, batch=1, length=1, threads=1, provider="CUDA"
)
DENSE = RunFigures(
    model="dense", latency=LATENCY, tokens_per_run=1, macs=100, weight_bytes=400_000_000, cache_bytes=100_000_000
)
SLIM = replace(DENSE, model="slim", macs=80, weight_bytes=300_000_000).beside(DENSE, Ratio(value=1, low=1, high=1))


def report(*runs: RunFigures) -> BenchReport:
    phase = Phase(name="output token", detail="", runs=runs, findings=tuple(idle_gpu(runs)))
    peaks = tuple(Peak(model=run.model, rss_bytes=1, device_bytes=1) for run in runs)
    notes = tuple(unknown_business(runs))
    workload = WorkloadFigures(prompt=1, decode=1, batch=1, phases=(phase,), peaks=peaks, notes=notes)
    return BenchReport(
        tool_version="0",
        packages={"onnxruntime": "1.31.0"},
        machine=Machine(cpu="a CPU", threads=1, platform="Linux"),
        device="a GPU",
        provider="CUDAExecutionProvider",
        threads=1,
        runs=5,
        seed=0,
        models=tuple(BenchModel(name=run.model, path=run.model, file_bytes=1, cached=True) for run in runs),
        workloads=(workload,),
    )


def test_bytes_beside_the_first_models() -> None:
    assert SLIM.bytes_moved == 400_000_000
    assert SLIM.bytes_ratio == pytest.approx(0.8)
    assert SLIM.gigabytes_per_second == pytest.approx(40)
    printed = bench_table(report(DENSE, SLIM), ascii_only=True)
    assert "-20.0%" in printed.replace(" ", "")
    assert max(map(len, printed.splitlines())) <= 100
    assert replace(SLIM, weight_bytes=None).beside(DENSE, Ratio(value=1, low=1, high=1)).bytes_ratio is None


def test_a_gpu_that_waits_is_a_finding() -> None:
    made = report(replace(DENSE, gpu_busy=0.43, launching=0.9), replace(SLIM, gpu_busy=0.81, launching=0.9))
    (finding,) = made.workloads[0].phases[0].findings
    assert finding.model == "dense"
    for text in (bench_table(made, ascii_only=True), render_bench_page(made)):
        assert "launching kernels dominates there" in " ".join(text.split())
        assert "What ate it" not in text
        assert "43%" in text
        assert "unknown" not in text


def test_what_is_not_known_is_said() -> None:
    made = report(replace(DENSE, launching=0.97), replace(SLIM, launching=0.62))
    assert made.workloads[0].phases[0].findings == ()
    for text in (bench_table(made, ascii_only=True), render_bench_page(made)):
        assert "GPU busy: unknown" in " ".join(text.split())
        assert "97% of a run of dense, 62% of a run of slim" in " ".join(text.split())
