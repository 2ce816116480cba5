"""The compiler's estimate of what a cut costs, against cutting one region after the other.

    python benchmarks/sensitivity.py --text-dir DIR
    python benchmarks/sensitivity.py --text-dir DIR --layers 0 7 29

Text: see texts.py. Estimated: ``measure_curves`` at the width it probes, which takes one pass over a few calibration
tokens for all regions together. Measured: that region alone is cut to that width with a one-shot refit, the statistics
being those of as many calibration tokens, and the KL to the dense model is taken on the ends of the same sources. Both
in nats a token. Whole KV heads, which share their weights with the other two kinds of attention region, are left out.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from allocations import cuttable
from bench import Setup
from measure import Fidelity, free_memory, runs, spending
from texts import Batches

from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.passes.cut_stream import apply_map
from dotresize_fx.probe import probed_width
from dotresize_fx.regions import Region, RegionKind
from dotresize_fx.sensitivity import GPU_SCALE, SHAPE_TOKENS, measure_curves
from dotresize_fx.solvers import solvers_for
from dotresize_fx.sweep import Sweep

KINDS = (RegionKind.FFN, RegionKind.VALUE, RegionKind.QUERY_KEY)


def cut_alone(dense: FxGraph, region: Region, width: int, batches: Batches) -> FxGraph:
    """A copy with nothing else cut."""
    slim = dense.copy()
    sweep = Sweep(dense, slim, batches, lambda one, found: apply_map(slim, one, found, False))
    sweep.slim_sublayer([(region, width)], lambda one: solvers_for("obs", one.kind))
    return slim


def ranks(values: Sequence[float]) -> list[float]:
    """From 0; equal values share the mean of theirs."""
    order = sorted(values)
    return [(order.index(value) + len(order) - 1 - order[::-1].index(value)) / 2 for value in values]


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Rank correlation; NaN where there is nothing to rank."""
    if len(first) < 2:
        return math.nan
    found = torch.corrcoef(torch.tensor([ranks(first), ranks(second)], dtype=torch.float64))
    return float(found[0, 1])


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text-dir", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--calibration-tokens", type=int, default=98_304, help="that the estimate picks from")
    parser.add_argument("--solve-tokens", type=int, default=None, help="for each single cut; default as the estimate")
    parser.add_argument("--tokens-per-text", type=int, default=4_096, help="that the KL is measured on")
    parser.add_argument("--layers", type=int, nargs="+", default=None, help="by number within each kind; default all")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(given)


def main() -> None:
    arguments = parse()
    setup = Setup(arguments)
    dense, matches, device = setup.dense, setup.matches, setup.device
    solving = setup.calibration(arguments.solve_tokens or SHAPE_TOKENS * (1 if device == "cpu" else GPU_SCALE))
    fidelity = Fidelity(dense, {name: setup.measured[name] for name in setup.texts.same})

    numbered: list[tuple[int, Region]] = []
    for kind in KINDS:
        of_kind = list(enumerate(cuttable(dense, matches, (kind,))))
        numbered += [(i, region) for i, region in of_kind if arguments.layers is None or i in arguments.layers]
    # In graph order, as the estimate wants them.
    regions = sorted((region for _, region in numbered), key=lambda r: dense.positions[r.writers[0]])
    with spending(device) as spent:
        curves = measure_curves(dense, regions, setup.calibrating)
    tokens = sum(batch["input_ids"].numel() for batches in fidelity.measured.values() for batch in batches)
    print(f"{setup.loaded.source}, on {device}, torch {torch.__version__}; KL measured on {tokens} tokens")
    print(f"estimated for {len(regions)} regions in {spent.seconds:.1f} s\n", flush=True)
    print("| region | kind | width | estimated KL | measured KL | seconds |\n|---|---|---|---|---|---|")
    pairs: dict[RegionKind, list[tuple[float, float]]] = {}
    total = 0.0
    for i, region in numbered:
        width = probed_width(region)
        started = time.perf_counter()
        found = fidelity.compare(runs(cut_alone(dense, region, width, solving))).values()
        truth = sum(one.divergence for one in found) / sum(one.tokens for one in found)
        seconds = time.perf_counter() - started
        total += seconds
        estimate = float(curves[region.name][width])
        pairs.setdefault(region.kind, []).append((estimate, truth))
        row = f"{i} | {region.kind} | {region.width} -> {width} | {estimate:.5f} | {truth:.5f} | {seconds:.1f}"
        print(f"| {row} |", flush=True)
        free_memory(device)
    print(
        "\n| kind | regions | Spearman's rank correlation | estimated / measured, geometric mean |\n|---|---|---|---|"
    )
    everything = [pair for found in pairs.values() for pair in found]
    for name, found in [*pairs.items(), ("all", everything)]:
        estimates, truths = zip(*found, strict=True)
        positive = [math.log(a / b) for a, b in found if a > 0 and b > 0]
        factor = math.exp(sum(positive) / len(positive)) if positive else math.nan
        print(f"| {name} | {len(found)} | {spearman(estimates, truths):.3f} | {factor:.2f} |")
    print(f"\nEstimated in {spent.seconds:.1f} s, measured one after the other in {total:.1f} s.")


if __name__ == "__main__":
    main()
