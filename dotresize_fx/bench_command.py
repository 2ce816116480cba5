"""The bench command: its options, and what it prints and writes."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dotresize_fx.report.bench_contents import BenchReport


def bench_options(bench: argparse.ArgumentParser) -> None:
    """Add the options; the defaults are those of ``export.bench.bench``."""
    bench.add_argument(
        "models",
        metavar="MODEL",
        type=Path,
        nargs="+",
        help="folders that export wrote, or .onnx files; the first is what the others are compared with",
    )
    bench.add_argument(
        "--workload",
        metavar="SIZES",
        action="append",
        default=[],
        help="repeatable (prompt=128,decode=64,batch=1)",
    )
    bench.add_argument("--runs", type=int, default=20, metavar="N", help="rounds that count (20)")
    bench.add_argument("--threads", type=int, metavar="N", help="of ONNX Runtime (one a physical core)")
    bench.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    bench.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    bench.add_argument("--html", type=Path, metavar="FILE", help="write a page there")
    bench.add_argument("--quiet", action="store_true", help="no progress on standard error")


def run_bench(bench: Callable[..., BenchReport], arguments: argparse.Namespace, check: Callable[[], None]) -> None:
    """Measure, print, write. ``bench`` is that of ``export``; ``check`` runs between the stages and may raise."""
    from dotresize_fx.progress import Progress
    from dotresize_fx.report.bench_tables import bench_table
    from dotresize_fx.report.write import check_writable, write_bench
    from dotresize_fx.workload import read_workload

    workloads = [read_workload(text) for text in arguments.workload]
    for file in (arguments.json, arguments.html):
        if file is not None:
            check_writable(file)
    report = bench(
        arguments.models,
        workloads,
        runs=arguments.runs,
        threads=arguments.threads,
        device=arguments.device,
        progress=Progress(quiet=arguments.quiet, check=check),
    )
    print(bench_table(report))
    write_bench(report, arguments.json, arguments.html)
