"""Methods on the residual stream side by side: perplexity on text of the calibration's sources, and of others.

    python benchmarks/methods.py --text-dir DIR                                # smollm2-135m, 10 % off its stream
    python benchmarks/methods.py --text-dir DIR --cut residual:0.2 ffn,residual:0.2 --length 1024

Text: see texts.py. Everything is measured in one run, dense included; excess is ln(perplexity slim / perplexity dense)
in nats, a mean over texts. FFNs and attention are in fidelity.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from measure import Fidelity, calibration_rows, evaluation_rows, means, runs, spending
from texts import calibration, evaluation, read_texts

from dotresize_fx.compiler import analyse, compute_device
from dotresize_fx.cost import count_cost
from dotresize_fx.export.model_source import load_model
from dotresize_fx.options import Options
from dotresize_fx.passes.slim_graph import slim_graph
from dotresize_fx.progress import Progress

METHODS = {
    "residual": ("magnitude", "dotresize", "pca"),
    "ffn,residual": ("magnitude", "dotresize", "auto"),
}


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text-dir", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--cut", nargs="+", default=["residual:0.1"], metavar="REGIONS:RATIO")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--calibration-tokens", type=int, default=24_576)
    parser.add_argument("--tokens-per-text", type=int, default=4_096)
    arguments = parser.parse_args(given)
    for cut in arguments.cut:
        if cut.split(":")[0] not in METHODS:
            parser.error(f"--cut {cut}: its regions must be one of {' '.join(METHODS)}")
    return arguments


def main() -> None:
    arguments = parse()
    device = compute_device(Options(device=arguments.device))
    length = arguments.length
    texts = read_texts(arguments.text_dir)
    loaded = load_model(arguments.model)
    _, dense, matches = analyse(loaded, Progress())
    before = count_cost(dense, length)
    dense.to(device)
    calibrating = calibration(
        texts,
        loaded.tokenizer,
        length=length,
        tokens=arguments.calibration_tokens,
        rows=calibration_rows(device),
        device=device,
    )
    fidelity = Fidelity(
        dense,
        evaluation(
            texts,
            loaded.tokenizer,
            length=length,
            tokens=arguments.tokens_per_text,
            rows=evaluation_rows(device),
            device=device,
        ),
    )
    tokens = sum(batch["input_ids"].numel() for batch in calibrating)
    print(texts.table())
    print(f"\n{loaded.source}; {tokens} calibration tokens in sequences of {length}, on {device}")
    print(f"parameters {before.parameters}, block linear weights {before.block_linear_weights}\n")
    columns = [*texts.measured, "same source", "other source", "weights off", "parameters", "seconds"]
    print(f"| cut | method | {' | '.join(columns)} |\n|---|---|{'---|' * len(columns)}")
    found = fidelity.compare(fidelity.dense)
    print(f"| | dense | {' | '.join(f'{one.dense_perplexity:.2f}' for one in found.values())} |" + " |" * 5, flush=True)
    for cut in arguments.cut:
        regions, ratio = cut.split(":")
        for method in METHODS[regions]:
            chosen = Options(ratio=float(ratio), regions=tuple(regions.split(",")), method=method)
            with spending(device) as spent:
                slim = slim_graph(dense, matches, calibrating, chosen, Progress(quiet=True)).graph
            found = fidelity.compare(runs(slim))
            mean = means(found, texts)
            after = count_cost(slim, length)
            off = 1 - after.block_linear_weights / before.block_linear_weights
            cells = [f"{one.slim_perplexity:.2f}" for one in found.values()]
            cells += [f"**{mean.same:.3f}**", f"**{mean.other:.3f}**", f"{off:.2%}"]
            cells += [f"{after.parameters / before.parameters - 1:+.2%}", f"{spent.seconds:.0f}"]
            print(f"| {cut} | {method} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
