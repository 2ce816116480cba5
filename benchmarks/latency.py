"""Does a cut in MACs become a cut in milliseconds? Dense beside slim in ONNX Runtime, prompt and tokens behind it.

    python benchmarks/latency.py                                          # smollm2-135m, 20 and 40 %, on the CPU
    python benchmarks/latency.py --model llama-3-8b --blocks 2 --device cuda --dtype float16 --targets any cuda \
        --workload prompt=512,decode=32,batch=1 --workload prompt=512,decode=32,batch=16

``llama-3-8b`` has that model's shapes, few blocks and random weights: of it speed alone is measured. What is cut is
planned evenly and by the norms of activations (a method that solves nothing), since how well it is cut does not
change its speed. A row holds where the latency ratio is at most the MACs ratio + 0.05.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from bench import line

from dotresize_fx.export.analyse import analyse
from dotresize_fx.export.bench import bench
from dotresize_fx.export.convert_dtype import convert_dtype
from dotresize_fx.export.emit_onnx import emit_onnx
from dotresize_fx.export.model_source import LoadedModel, load_model
from dotresize_fx.export.onnx_file import WEIGHTS_FILE
from dotresize_fx.options import TARGETS, Options
from dotresize_fx.passes.slim_graph import slim_graph
from dotresize_fx.progress import Progress
from dotresize_fx.report.bench_contents import BenchReport
from dotresize_fx.workload import read_workload

LLAMA = "llama-3-8b"
ALLOWED = 0.05
COLUMNS = ("target", "cut", "workload", "phase", "MACs", "file", "latency, 95 %", "ms, dense", "ms, slim", "holds")


def llama(blocks: int, vocabulary: int) -> LoadedModel:
    """Llama 3 8B's shapes with random weights, a few blocks and a smaller vocabulary."""
    config = transformers.LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_hidden_layers=blocks,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        rope_theta=500_000.0,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    model.config.use_cache = False
    return LoadedModel(model.requires_grad_(False), None, None, config, "decoder", LLAMA, {})


def emit_all(loaded: LoadedModel, arguments: argparse.Namespace, folder: Path) -> dict[str, list[Path]]:
    """By the target: the dense file, then slim ones."""
    progress = Progress()
    captured, dense, matches = analyse(loaded, progress)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, captured.vocabulary, (4, 128), generator=generator)
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(2)]
    files: dict[str, list[Path]] = {target: [] for target in arguments.targets}
    for ratio in (0.0, *arguments.ratios):
        graph = dense
        if ratio:
            options = Options(
                ratio=ratio, allocation="uniform", method="magnitude", regions=tuple(arguments.regions.split(","))
            )
            graph = slim_graph(dense, matches, batches, options, progress).graph
        for target in arguments.targets:
            place = folder / target / (f"{ratio:.0%}" if ratio else "dense")
            place.mkdir(parents=True)
            with progress.stage(f"convert {target} {place.name}"):
                file = emit_onnx(loaded.model, captured, graph, place, target)
            if arguments.dtype != "float32":
                (half := place / arguments.dtype).mkdir()
                with progress.stage(f"convert to {arguments.dtype}"):
                    half_file = convert_dtype(file, half, arguments.dtype)
                file.with_name(WEIGHTS_FILE).unlink()
                file = half_file
            files[target].append(file)
        del graph
    return files


def rows(report: BenchReport, target: str) -> list[list[str]]:
    """One a slim model, workload and phase."""
    found = []
    sizes = {model.name: model.file_bytes for model in report.models}
    for workload in report.workloads:
        for phase in workload.phases:
            dense, *slim = phase.runs
            for run in slim:
                assert run.ratio is not None
                holds = run.macs_ratio is not None and run.ratio.value <= run.macs_ratio + ALLOWED
                found.append(
                    [
                        target,
                        run.model,
                        f"prompt={workload.prompt},decode={workload.decode},batch={workload.batch}",
                        phase.name,
                        "-" if run.macs_ratio is None else f"{run.macs_ratio:.3f}",
                        f"{sizes[run.model] / sizes[dense.model]:.3f}",
                        f"{run.ratio.value:.3f} ({run.ratio.low:.3f} to {run.ratio.high:.3f})",
                        f"{1e3 * dense.latency.median:.2f}",
                        f"{1e3 * run.latency.median:.2f}",
                        "yes" if holds else "no",
                    ]
                )
    return found


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help=f"as export takes it, or {LLAMA}")
    parser.add_argument("--blocks", type=int, default=2, help=f"of {LLAMA}")
    parser.add_argument("--vocabulary", type=int, default=32_000, help=f"of {LLAMA}")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.4])
    parser.add_argument("--regions", default="ffn")
    parser.add_argument("--workload", action="append", default=[])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--targets", nargs="+", default=["any"], choices=TARGETS)
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    return parser.parse_args(given)


def main() -> None:
    arguments = parse()
    loaded = llama(arguments.blocks, arguments.vocabulary) if arguments.model == LLAMA else load_model(arguments.model)
    workloads = [read_workload(text) for text in arguments.workload or ["prompt=128,decode=64", "prompt=256,decode=16"]]
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        files = emit_all(loaded, arguments, Path(name))
        del loaded
        for index, (target, paths) in enumerate(files.items()):
            report = bench(paths, workloads, runs=arguments.runs, threads=arguments.threads, device=arguments.device)
            if not index:
                print(
                    f"{arguments.model} in ONNX Runtime on {report.device}, {report.threads} threads, "
                    f"{report.runs} rounds\n"
                )
                line(COLUMNS)
                line(["---"] * len(COLUMNS))
            for row in rows(report, target):
                line(row)
            for workload in report.workloads:
                for note in (*workload.notes, *(each.text for phase in workload.phases for each in phase.findings)):
                    print(f"\n{note}", flush=True)


if __name__ == "__main__":
    main()
