"""Does optimal transport earn its place? Each formulation with transport and the same pipeline without it.

    python benchmarks/ot_ablation.py --text-dir DIR --seeds 0 --json seed0.jsonl
    python benchmarks/ot_ablation.py --table seed0.jsonl seed1.jsonl seed2.jsonl

Text: see texts.py. The formulations are pairs of members in ot_formulations.py. A seed gives the random sample of
calibration text and the order of repair; the text that is measured on stays the same. Both members of a pair follow
one width plan, made from curves that are measured once a seed (a stream has one width). The cut is a share of the
blocks' linear weights for FFNs and streams; for attentions, which hold too little, of the weights of the linears that a
member can cut. Effort best repairs every cut sublayer for ``--repair-steps`` steps.

"With" and "without" are mean excess, ln(perplexity slim / perplexity dense) in nats, and mean KL to the dense model
on the ends of the calibrating sources, "other" the excess on other sources; +- is the standard deviation over seeds.
Differences are with minus without, seed by seed, so that below zero transport wins; bold where the mean is further
from zero than the spread. "Error" is the mean over regions of the reader's relative error on held-out calibration
batches, by which constants were chosen.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from bench import Setup, append, line, said
from measure import free_memory, means, runs, spending
from ot_formulations import FORMULATIONS, MEMBERS, Member
from ot_sweep import TransportSweep
from ot_table import EFFORTS, print_table, read_rows

from dotresize_fx.cost import count_cost, weights_per_unit
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.options import Options
from dotresize_fx.passes.choose_regions import choose_regions, sublayers
from dotresize_fx.passes.cut_stream import apply_map, widest_stream
from dotresize_fx.passes.slim_graph import slim_graph
from dotresize_fx.progress import Progress
from dotresize_fx.regions import Region, RegionKind
from dotresize_fx.sensitivity import measure_curves
from dotresize_fx.sweep import SweptRegion
from dotresize_fx.width_plan import WidthPlan, plan_by_curves, plan_uniformly


class Ablation(Setup):
    """One seed: its text, and plans by kind and ratio."""

    def __init__(self, arguments: argparse.Namespace, seed: int, kinds: Sequence[RegionKind]) -> None:
        self.seed = seed
        torch.manual_seed(seed)
        super().__init__(arguments, sample=seed)
        swept = [kind for kind in kinds if kind is not RegionKind.RESIDUAL]
        self.regions, _ = choose_regions(self.dense, self.matches.regions, swept)
        self.values = {r.attention: r for r in self.matches.of_kind(RegionKind.VALUE)}
        self.curves: dict[str, torch.Tensor] = {}
        if self.regions:
            self.curves = measure_curves(self.dense, self.regions, self.calibrating)

    def plan(self, kind: RegionKind, ratio: float) -> WidthPlan:
        """One for all members that cut this kind."""
        total = self.cost.block_linear_weights
        if kind is RegionKind.RESIDUAL:
            stream = widest_stream(self.dense, self.matches)
            return plan_uniformly([stream], {stream.name: weights_per_unit(self.dense, stream)}, total, ratio)
        regions = [region for region in self.regions if region.kind is kind]
        units = {region.name: weights_per_unit(self.dense, region) for region in regions}
        if kind is not RegionKind.FFN:
            total = sum(region.width * units[region.name] for region in regions)
        return plan_by_curves(regions, self.curves, units, total, ratio)

    def slim(self, member: Member, plan: WidthPlan, effort: str) -> tuple[FxGraph, list[SweptRegion]]:
        """The slim graph, and what was done to each region."""
        steps = self.arguments.repair_steps
        if member.kind is RegionKind.RESIDUAL:
            method = member.solvers[0][0]
            options = Options(regions=("residual",), method=method, effort=effort, repair_steps=steps, seed=self.seed)
            quiet = Progress(quiet=True)
            slimmed = slim_graph(self.dense, self.matches, self.calibrating, options, quiet, plan=plan)
            return slimmed.graph, list(slimmed.swept)
        slim = self.dense.copy()
        sweep = TransportSweep(
            self.dense,
            slim,
            self.calibrating,
            lambda region, found: apply_map(slim, region, found, False),
            repair_steps=0 if effort == "fast" else steps,
            seed=self.seed,
        )
        sweep.mix, sweep.reader_refit.watches_entry, sweep.values = member.mix, member.entered, self.values
        swept: list[SweptRegion] = []
        for together in sublayers([region for region in self.regions if region.kind is member.kind]):
            cuts = [(region, plan.widths[region.name]) for region in together]
            if cuts := [(region, width) for region, width in cuts if width < region.width]:
                swept += sweep.slim_sublayer(self._and_refitted(cuts), lambda _: member.solvers)
        slim.refresh_shapes()
        return slim, swept

    def _and_refitted(self, cuts: list[tuple[Region, int]]) -> list[tuple[Region, int]]:
        """Where scores are cut, the reader of the values is refitted behind them."""
        scores = [region.attention for region, _ in cuts if region.kind is RegionKind.QUERY_KEY]
        return cuts + [(self.values[name], self.values[name].width) for name in scores if name in self.values]

    def row(self, name: str, ratio: float, effort: str) -> dict[str, Any]:
        """Cut with a member and measure."""
        member = MEMBERS[name]
        plan = self.plan(member.kind, ratio)
        with spending(self.device) as spent:
            graph, swept = self.slim(member, plan, effort)
        found = self.fidelity.compare(runs(graph))
        mean = means(found, self.texts)
        errors = [one.error for one in swept if one.error is not None]
        left = count_cost(graph, self.length).block_linear_weights
        return {
            "kind": "row",
            "seed": self.seed,
            "member": name,
            "ratio": ratio,
            "effort": effort,
            "excess": mean.same,
            "kl": mean.divergence,
            "other": mean.other,
            "agreement": mean.agreement,
            "error": statistics.fmean(errors) if errors else math.nan,
            "perplexity": {text: one.slim_perplexity for text, one in found.items()},
            "weights_off": 1 - left / self.cost.block_linear_weights,
            "seconds": spent.seconds,
            "peak_gib": spent.peak_gib,
            "solvers": dict(Counter(one.method for one in swept)),
            "widths": dict(plan.widths),
        }


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, nargs="+", default=None, metavar="FILE", help="print it, measure nothing")
    parser.add_argument("--text-dir", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument(
        "--formulations", nargs="+", choices=tuple(FORMULATIONS), default=list(FORMULATIONS), metavar="F"
    )
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.3, 0.5])
    parser.add_argument("--efforts", nargs="+", choices=EFFORTS, default=list(EFFORTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--repair-steps", type=int, default=100)
    parser.add_argument("--length", type=int, default=None, help="of sequences; default 1024, on the CPU 512")
    parser.add_argument("--calibration-tokens", type=int, default=65_536)
    parser.add_argument("--tokens-per-text", type=int, default=16_384)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="append all figures to it")
    parser.add_argument("--budget-minutes", type=float, default=math.inf, help="start no run after so long")
    arguments = parser.parse_args(given)
    if arguments.table is None and arguments.text_dir is None:
        parser.error("--text-dir is needed, unless --table is given")
    return arguments


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Every member of the formulations asked for, once a seed, cut and effort."""
    started = time.perf_counter()
    pairs = [FORMULATIONS[name] for name in arguments.formulations]
    members = list(dict.fromkeys(name for pair in pairs for name in (pair.transport, pair.without)))
    rows: list[dict[str, Any]] = []
    left_out = []
    for seed in arguments.seeds:
        bench = Ablation(arguments, seed, list(dict.fromkeys(MEMBERS[name].kind for name in members)))
        run = {"kind": "run", "seed": seed, "model": bench.loaded.source, "device": bench.where}
        run |= {"torch": torch.__version__, "python": platform.python_version(), "arguments": said(arguments)}
        run |= {"length": bench.length, "calibration_tokens": bench.calibration_tokens}
        append(arguments.json, run)
        print(f"\n{bench.loaded.source}, seed {seed}, {bench.calibration_tokens} calibration tokens, {bench.where};")
        print(f"best repairs for {arguments.repair_steps} steps; started in {time.perf_counter() - started:.0f} s\n")
        line(["seed", "member", "cut", "effort", "weights off", "excess", "other", "KL", "error", "seconds", "solvers"])
        line(["---"] * 11)
        for ratio, effort, name in ((r, e, m) for r in arguments.ratios for e in arguments.efforts for m in members):
            if time.perf_counter() - started > 60 * arguments.budget_minutes:
                left_out.append(f"{name} at {ratio:.0%}, {effort}, seed {seed}")
                continue
            try:
                row = bench.row(name, ratio, effort)
            except Exception as error:  # a share that cannot go: the other rows still count
                row = {"kind": "failed", "seed": seed, "member": name, "ratio": ratio, "effort": effort}
                row["error"] = f"{type(error).__name__}: {error}"
                print(row["error"], flush=True)
            else:
                rows.append(row)
                cells = [str(seed), name, f"{ratio:.0%}", effort, f"{row['weights_off']:.2%}"]
                cells += [f"{row[figure]:.4f}" for figure in ("excess", "other", "kl", "error")]
                line([*cells, f"{row['seconds']:.1f}", ", ".join(f"{n} {one}" for one, n in row["solvers"].items())])
            append(arguments.json, row)
            free_memory(bench.device)
    print(f"\nAll of it in {time.perf_counter() - started:.0f} s.\n")
    if left_out:
        append(arguments.json, {"kind": "left out", "rows": left_out})
        print(f"Left out for want of time: {', '.join(left_out)}.\n")
    return rows


def main() -> None:
    arguments = parse()
    print_table(read_rows(arguments.table) if arguments.table is not None else measure(arguments))


if __name__ == "__main__":
    main()
