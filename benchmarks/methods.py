"""Methods side by side on one model: perplexity on text of the same sources as the calibration, and on others.

    python benchmarks/methods.py --text-dir DIR                                # smollm2-135m, 20 % off its FFNs
    python benchmarks/methods.py --text-dir DIR --cut ffn:0.2 ffn:0.3 residual:0.1 --length 1024

DIR holds English text, UTF-8, plain or xz-compressed: ``calibration-*.txt[.xz]`` (the first 80 % of each calibrates,
the last 20 % is measured: *same source*) and ``heldout-*.txt[.xz]`` (measured only: *other source*). Everything is
measured in one run, dense included; excess is ln(perplexity slim / perplexity dense) in nats.
"""

from __future__ import annotations

import argparse
import hashlib
import lzma
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from dotresize_fx.compiler import analyse, compute_device
from dotresize_fx.cost import count_cost
from dotresize_fx.export.model_source import load_model
from dotresize_fx.fidelity import DecoderComparison, compare_decoders
from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.options import Options
from dotresize_fx.passes.slim_graph import slim_graph
from dotresize_fx.progress import Progress
from dotresize_fx.text import split_text, token_batches

Batches = list[Mapping[str, torch.Tensor]]
METHODS = {
    "ffn": ("magnitude", "dotresize", "obs"),
    "residual": ("magnitude", "dotresize", "pca"),
    "ffn,residual": ("magnitude", "dotresize"),
}


def read(file: Path) -> str:
    """The file's text, decompressed."""
    raw = file.read_bytes()
    return (lzma.decompress(raw) if file.suffix == ".xz" else raw).decode("utf-8")


def batches(text: str, tokenizer: object, length: int, tokens: int, batch: int) -> Batches:
    """About ``tokens`` tokens in sequences spread evenly over the text."""
    count = max(2, round(tokens / length))
    found = token_batches(text, tokenizer, length=length, count=count, batch=batch)  # type: ignore[arg-type]
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in found]


def to_device(batch: Mapping[str, torch.Tensor], device: str) -> Mapping[str, torch.Tensor]:
    """The same inputs there."""
    return {name: value.to(device) for name, value in batch.items()}


def measure(dense: FxGraph, slim: FxGraph, texts: Mapping[str, Batches]) -> dict[str, DecoderComparison]:
    """Both programs on every text."""
    first, second = Execution(dense), Execution(slim)
    return {
        name: compare_decoders(lambda b: first.outputs(b)[0], lambda b: second.outputs(b)[0], text)
        for name, text in texts.items()
    }


def mean_excess(found: Mapping[str, DecoderComparison], names: Sequence[str]) -> float:
    """Mean over texts, in nats."""
    return sum(found[name].excess for name in names) / len(names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text-dir", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--cut", nargs="+", default=["ffn:0.2"], metavar="REGIONS:RATIO")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--calibration-tokens", type=int, default=24_576)
    parser.add_argument("--tokens-per-text", type=int, default=4_096)
    options = parser.parse_args()

    loaded = load_model(options.model)
    sources = {f.name.split(".")[0]: read(f) for f in sorted(options.text_dir.glob("calibration-*"))}
    others = {f.name.split(".")[0]: read(f) for f in sorted(options.text_dir.glob("heldout-*"))}
    print("| text | characters | SHA-256 of the text |\n|---|---|---|")
    for name, text in {**sources, **others}.items():
        print(f"| {name} | {len(text)} | {hashlib.sha256(text.encode()).hexdigest()} |")
    device = compute_device(Options(device=options.device))
    calibrating: Batches = []
    measured: dict[str, Batches] = {}
    for name, text in sources.items():
        calibration, evaluation = split_text(text)
        share = options.calibration_tokens // len(sources)
        calibrating += batches(calibration, loaded.tokenizer, options.length, share, 4)
        measured[name] = batches(evaluation, loaded.tokenizer, options.length, options.tokens_per_text, 1)
    for name, text in others.items():
        measured[name] = batches(text, loaded.tokenizer, options.length, options.tokens_per_text, 1)

    progress = Progress()
    _, dense, matches = analyse(loaded, progress)
    before = count_cost(dense, options.length)
    tokens = sum(batch["input_ids"].numel() for batch in calibrating)
    print(f"\n{loaded.source}; {tokens} calibration tokens in sequences of {options.length}, on {device}")
    print(f"parameters {before.parameters}, block linear weights {before.block_linear_weights}\n")
    columns = [*measured, "same source", "other source", "weights off", "parameters", "seconds"]
    print(f"| cut | method | {' | '.join(columns)} |\n|---|---|{'---|' * len(columns)}")
    dense.to(device)
    calibrating = [to_device(batch, device) for batch in calibrating]
    measured = {name: [to_device(batch, device) for batch in text] for name, text in measured.items()}
    found = measure(dense, dense, measured)
    print(f"| | dense | {' | '.join(f'{found[n].dense_perplexity:.2f}' for n in measured)} |" + " |" * 5)
    for cut in options.cut:
        regions, ratio = cut.split(":")
        for method in METHODS[regions]:
            chosen = Options(ratio=float(ratio), regions=tuple(regions.split(",")), method=method)
            started = time.perf_counter()
            slim, _, _ = slim_graph(dense, matches, calibrating, chosen, Progress(quiet=True), None)
            seconds = time.perf_counter() - started
            found = measure(dense, slim, measured)
            after = count_cost(slim, options.length)
            off = 1 - after.block_linear_weights / before.block_linear_weights
            cells = [f"{found[name].slim_perplexity:.2f}" for name in measured]
            cells += [f"**{mean_excess(found, list(names)):.3f}**" if names else "" for names in (sources, others)]
            cells += [f"{off:.2%}", f"{after.parameters / before.parameters - 1:+.2%}", f"{seconds:.0f}"]
            print(f"| {cut} | {method} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
