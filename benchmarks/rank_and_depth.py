"""Rank and depth beside width: LLM-ROM, MKA and their baselines, as published and as the compiler has them.

    python benchmarks/rank_and_depth.py --text-dir DIR --seeds 0 1 2 --json FILE   # smollm2-135m at 10, 20 and 30 %
    python benchmarks/rank_and_depth.py --text-dir DIR --ratios 0.4375 --methods mka aligned drop-last drop-least

Text: see texts.py. Everything is measured in one run, dense included. A ratio is the share of the blocks' linear
weights to remove; of depth the whole number of blocks that is nearest. A seed draws the sample of calibration text.
Columns: mean excess, ln(perplexity slim / perplexity dense) in nats, on the ends of the calibrating sources and on
other ones; +- is the standard deviation over seeds. Methods:

rom              as published: last blocks, eigenvectors of the outputs, on what the reduced prefix feeds
rom one-shot     the same calibrated on the dense model alone
rom everywhere   the same with one budget for all blocks
rom own          means kept by a bias, targets the linear's own outputs
rom ours         means, and targets of the dense model's stream
mka, aligned     pairs merged by likeness; neurons and heads matched by optimal transport first
aligned turned   residual coordinates matched too, where this brings the weights nearer
drop-last, drop-least   baselines: the last blocks, or the ones that turn the stream least
... refit        what reads values and FFNs fitted to the dense model's stream afterwards
width            the compiler's own cut of FFNs and heads, effort fast
rank, depth      ranks of all linears, blocks to drop, by measured loss per cost; refitted
mixed            width, rank and depth together

int8: the same with the blocks' weights rounded as export --quantize int8 stores them; MKA claims that both add up.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from bench import Setup, append, line, said
from measure import free_memory, means, runs, spending

from dotresize_fx.cost import block_linears, count_cost
from dotresize_fx.errors import DotresizeError
from dotresize_fx.export.quantize import BLOCK
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.options import Options
from dotresize_fx.passes.factorize_graph import factorize_graph, published_ranks
from dotresize_fx.passes.find_blocks import find_blocks
from dotresize_fx.passes.merge_graph import merge_graph
from dotresize_fx.passes.slim_graph import slim_graph
from dotresize_fx.progress import Progress

QUIET = Progress(quiet=True)
Cut = tuple[FxGraph, Sequence[str]]
Method = Callable[[Setup, float, int], Cut]


def rom(*, everywhere: bool = False, **how: Any) -> Method:
    """Linears of a lower rank."""

    def cut(setup: Setup, ratio: float, seed: int) -> Cut:
        cuts = published_ranks(setup.dense, ratio, everywhere=everywhere)
        found = factorize_graph(setup.dense, setup.calibrating, cuts, QUIET, **how)
        return found.graph, found.notes

    return cut


def depth(method: str, **how: Any) -> Method:
    """Fewer blocks."""

    def cut(setup: Setup, ratio: float, seed: int) -> Cut:
        count = max(1, round(ratio * len(find_blocks(setup.dense))))
        found = merge_graph(setup.dense, setup.calibrating, count, QUIET, method, seed=seed, **how)
        return found.graph, found.notes

    return cut


def width(setup: Setup, ratio: float, seed: int) -> Cut:
    """Narrower FFNs and heads."""
    options = Options(ratio=ratio, seed=seed)
    slimmed = slim_graph(setup.dense, setup.matches, setup.calibrating, options, QUIET)
    return slimmed.graph, slimmed.notes


def planned(*methods: str) -> Method:
    """One budget for all of them."""

    def cut(setup: Setup, ratio: float, seed: int) -> Cut:
        options = Options(ratio=ratio, methods=methods, seed=seed)
        slimmed = slim_graph(setup.dense, setup.matches, setup.calibrating, options, QUIET)
        return slimmed.graph, slimmed.notes

    return cut


METHODS: Mapping[str, Method] = {
    "rom": rom(published=True),
    "rom one-shot": rom(published=True, sequential=False),
    "rom everywhere": rom(published=True, everywhere=True),
    "rom own": rom(dense_targets=False),
    "rom ours": rom(),
    "mka": depth("mka"),
    "mka refit": depth("mka", refit=True),
    "aligned": depth("aligned"),
    "aligned turned": depth("aligned", turn=True),
    "aligned refit": depth("aligned", refit=True),
    "drop-last": depth("drop-last"),
    "drop-least": depth("drop-least"),
    "drop-least refit": depth("drop-least", refit=True),
    "width": width,
    "rank": planned("rank"),
    "depth": planned("depth"),
    "mixed": planned("width", "rank", "depth"),
}
COLUMNS = ["ratio", "method", "weights off", "same source", "other source", "int8", "agreement", "KL", "seconds"]


def rounded(graph: FxGraph) -> FxGraph:
    """A copy whose block linears have weights of 8 bits: BLOCK numbers along the input share a scale and a zero."""
    found = graph.copy()
    for op in block_linears(found):
        weight = found.weight(op)
        padding = -weight.shape[-1] % BLOCK
        parts = torch.nn.functional.pad(weight, (0, padding)).unflatten(-1, (-1, BLOCK))
        low, high = parts.amin(-1, keepdim=True).clamp_max(0), parts.amax(-1, keepdim=True).clamp_min(0)
        scale = ((high - low) / 255).clamp_min(torch.finfo(weight.dtype).tiny)
        zero = (-low / scale).round()
        kept = (((parts / scale).round() + zero).clamp(0, 255) - zero) * scale
        found.set_weight(op, kept.flatten(-2)[..., : weight.shape[-1]].contiguous())
    return found


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text-dir", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.2, 0.3])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="append one object a row")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--calibration-tokens", type=int, default=24_576)
    parser.add_argument("--tokens-per-text", type=int, default=4_096)
    return parser.parse_args(given)


def measure(setup: Setup, name: str, ratio: float, seed: int) -> dict[str, Any]:
    """One row: what was cut how, what it lost, what went."""
    torch.manual_seed(seed)
    with spending(setup.device) as spent:
        graph, notes = METHODS[name](setup, ratio, seed)
    found = setup.fidelity.compare(runs(graph))
    small = means(setup.fidelity.compare(runs(rounded(graph))), setup.texts)
    mean, cost = means(found, setup.texts), count_cost(graph, setup.length)
    return {
        "method": name,
        "ratio": ratio,
        "seed": seed,
        "weights_off": 1 - cost.block_linear_weights / setup.cost.block_linear_weights,
        "macs_per_token": cost.macs_per_token,
        "same_source": mean.same,
        "other_source": mean.other,
        "same_source_int8": small.same,
        "other_source_int8": small.other,
        "agreement": mean.agreement,
        "kl_to_dense": mean.divergence,
        "perplexity": {text: one.slim_perplexity for text, one in found.items()},
        "seconds": spent.seconds,
        "peak_gib": spent.peak_gib,
        "notes": list(notes),
    }


def table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Means over seeds, a line a ratio and method, in the order in which they were measured."""
    groups: dict[tuple[float, str], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["ratio"], row["method"]].append(row)
    line(COLUMNS)
    line(["---"] * len(COLUMNS))
    for (ratio, name), same in sorted(groups.items(), key=lambda pair: pair[0][0]):
        shown = [f"{spread(same, key)}" for key in ("same_source", "other_source", "same_source_int8")]
        off, agreement, kl, seconds = (
            statistics.mean(row[key] for row in same) for key in ("weights_off", "agreement", "kl_to_dense", "seconds")
        )
        line([f"{ratio:.2%}", name, f"{off:.1%}", *shown, f"{agreement:.1%}", f"{kl:.3f}", f"{seconds:.0f}"])


def spread(rows: Sequence[Mapping[str, Any]], key: str) -> str:
    """The mean, and the deviation where there are several."""
    values = [row[key] for row in rows]
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) < 2 else f"{mean} +- {statistics.stdev(values):.3f}"


def main() -> None:
    arguments = parse()
    rows: list[dict[str, Any]] = []
    for seed in arguments.seeds:
        setup = Setup(arguments, sample=seed)
        if not rows:
            print(setup.texts.table())
            print(f"\n{setup.loaded.source}, on {setup.where}; {setup.calibration_tokens} calibration tokens")
        found = setup.fidelity.compare(setup.fidelity.dense)
        dense = {text: one.dense_perplexity for text, one in found.items()}
        print(f"seed {seed}, dense: " + ", ".join(f"{text} {value:.2f}" for text, value in dense.items()), flush=True)
        append(arguments.json, {"kind": "run", "arguments": said(arguments), "device": setup.where, "dense": dense})
        for ratio in arguments.ratios:
            for name in arguments.methods:
                try:
                    row = measure(setup, name, ratio, seed)
                except DotresizeError as error:  # a ratio that does not go with the model: other rows still count
                    print(f"{name} at {ratio:.0%}: {error}", flush=True)
                    continue
                rows.append(row)
                append(arguments.json, {"kind": "row", **row})
                print(f"{name} at {ratio:.0%}: {row['same_source']:.3f} ({'; '.join(row['notes'])})", flush=True)
                free_memory(setup.device)
    print()
    table(rows)


if __name__ == "__main__":
    main()
