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

from bench import Setup
from measure import means, runs, spending

from dotresize_fx.cost import count_cost
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
    setup = Setup(arguments)
    texts, before, fidelity, device = setup.texts, setup.cost, setup.fidelity, setup.device
    print(texts.table())
    tokens = f"{setup.calibration_tokens} calibration tokens in sequences of {setup.length}"
    print(f"\n{setup.loaded.source}; {tokens}, on {device}")
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
                slim = slim_graph(setup.dense, setup.matches, setup.calibrating, chosen, Progress(quiet=True)).graph
            found = fidelity.compare(runs(slim))
            mean = means(found, texts)
            after = count_cost(slim, setup.length)
            off = 1 - after.block_linear_weights / before.block_linear_weights
            cells = [f"{one.slim_perplexity:.2f}" for one in found.values()]
            cells += [f"**{mean.same:.3f}**", f"**{mean.other:.3f}**", f"{off:.2%}"]
            cells += [f"{after.parameters / before.parameters - 1:+.2%}", f"{spent.seconds:.0f}"]
            print(f"| {cut} | {method} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
