"""What rank, depth and width save in ONNX Runtime: each method's ONNX beside the dense one, float32 and int8.

    python benchmarks/rank_and_depth_onnx.py --text-dir DIR --threads 2          # smollm2-135m at 20 %, on the CPU

All files are timed in one run, in turns: MACs and latency as shares of the dense model's, medians with 95 % intervals.
Methods are those of rank_and_depth.py. int8 files are timed beside the dense int8 file.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from bench import Setup, line
from rank_and_depth import METHODS

from dotresize_fx.export.bench import bench
from dotresize_fx.export.emit_onnx import emit_onnx
from dotresize_fx.export.quantize import quantize
from dotresize_fx.workload import read_workload

COLUMNS = ["file", "workload", "phase", "MACs", "latency", "dense ms", "ms"]
DENSE = "dense"


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text-dir", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--ratio", type=float, default=0.2)
    methods = ["rom", "rom ours", "mka", "drop-least", "width", "mixed"]
    parser.add_argument("--methods", nargs="+", default=methods, choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", default="cpu", choices=("any", "cpu"))
    parser.add_argument("--workload", action="append", default=[])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--calibration-tokens", type=int, default=4_096, help="few do: what is timed are shapes")
    parser.add_argument("--length", type=int, default=512)
    parser.set_defaults(device="cpu")
    return parser.parse_args(given)


def emit_all(arguments: argparse.Namespace, folder: Path) -> dict[str, list[Path]]:
    """Files by precision, the dense one first."""
    setup = Setup(arguments, sample=arguments.seed)
    files: dict[str, list[Path]] = {"float32": [], "int8": []}
    (work := folder / "work").mkdir()
    for name in (DENSE, *arguments.methods):
        graph, notes = (setup.dense, ()) if name == DENSE else METHODS[name](setup, arguments.ratio, arguments.seed)
        place = folder / "float32" / name
        place.mkdir(parents=True)
        files["float32"].append(emit_onnx(setup.loaded.model, setup.captured, graph, place, arguments.target))
        (small := folder / "int8" / name).mkdir(parents=True)
        files["int8"].append(quantize(files["float32"][-1], small, "int8", work).path)
        print(f"{name}: {'; '.join(notes)}", flush=True)
    return files


def main() -> None:
    arguments = parse()
    workloads = [read_workload(text) for text in arguments.workload or ["prompt=128,decode=32"]]
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        files = emit_all(arguments, Path(name))
        for precision, paths in files.items():
            report = bench(paths, workloads, runs=arguments.runs, threads=arguments.threads)
            if precision == "float32":
                print(f"\n{report.device}, {report.threads} threads, {report.runs} rounds, {arguments.ratio:.0%}\n")
                line(COLUMNS)
                line(["---"] * len(COLUMNS))
            for workload in report.workloads:
                said = f"prompt={workload.prompt},decode={workload.decode},batch={workload.batch}"
                for phase in workload.phases:
                    dense, *slim = phase.runs
                    for run in slim:
                        assert run.ratio is not None
                        macs = "-" if run.macs_ratio is None else f"{run.macs_ratio:.3f}"
                        ratio = f"{run.ratio.value:.3f} ({run.ratio.low:.3f} to {run.ratio.high:.3f})"
                        times = [f"{1e3 * side.latency.median:.2f}" for side in (dense, run)]
                        line([f"{run.model} {precision}", said, phase.name, macs, ratio, *times])


if __name__ == "__main__":
    main()
