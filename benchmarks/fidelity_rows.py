"""The rows of fidelity.py: what they share, and the model and the cost that each comes to."""

from __future__ import annotations

import argparse
import copy
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from allocations import (
    LARGEST_SHARE,
    block_influences,
    cuttable,
    influence_wishes,
    plan_by_shares,
    price_wishes,
)
from bench import Setup
from measure import calibration_rows, free_memory, runs, spending
from peers import PEERS, block_weights
from safetensors import safe_open
from safetensors.torch import save_file
from texts import Batches, batched, shuffled

from dotresize_fx.cost import count_cost
from dotresize_fx.export.sample_text import sample_rows
from dotresize_fx.fidelity import Run
from dotresize_fx.healing import HealOptions, heal
from dotresize_fx.options import Options
from dotresize_fx.passes.choose_regions import SWEPT, choose_regions
from dotresize_fx.passes.slim_graph import slim_graph
from dotresize_fx.passes.sweep_regions import Slimmed
from dotresize_fx.probe import probed_width
from dotresize_fx.progress import Progress
from dotresize_fx.regions import ATTENTION_KINDS, RegionKind
from dotresize_fx.sensitivity import measure_curves
from dotresize_fx.sweep import is_held_out
from dotresize_fx.width_plan import WidthPlan

# MoDeGPT's stand-in in peers/ takes the same.
TEMPERATURE = 0.1
TRIAL_SHARES = {"least": 0.03, "most": 0.75}


@dataclass
class Outcome:
    """A row's model and what it took.

    ``parts`` are those of ``seconds`` that are worth telling apart; ``widths``, by region name, are the width plan of
    what the compiler cut.
    """

    run: Run
    removed: int
    parameters: int
    seconds: float
    peak_gib: float
    parts: dict[str, float] = field(default_factory=dict)
    solvers: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    widths: Mapping[str, int] | None = None


class Bench(Setup):
    """What all rows share: the dense model, its tokens, and what was computed once."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.seed: int = arguments.seed
        torch.manual_seed(self.seed)
        super().__init__(arguments)
        self.slimmed: dict[str, tuple[Slimmed, Outcome]] = {}

    @cached_property
    def healing(self) -> tuple[Batches, Batches, float]:
        """(training, held out, seconds that sampling took), on the CPU: text, and what the model itself writes."""
        rows = calibration_rows(self.device)
        tokens, own = self.arguments.heal_tokens, self.arguments.self_tokens // self.length
        ids = [shuffled(self.texts, self.loaded.tokenizer, length=self.length, tokens=tokens, seed=self.seed)]
        seconds = 0.0
        if own:
            sampled, seconds = self.own_text(own)
            ids.append(sampled)
        counts = ", ".join(f"{part.numel()} tokens" for part in ids)
        # Not in the midst of the table.
        print(f"healing text and own text: {counts}; sampled in {seconds:.0f} s", file=sys.stderr, flush=True)
        batches = [batch for part in ids for batch in batched(part, rows, "cpu")]
        held_out = [batch for i, batch in enumerate(batches) if is_held_out(i)]
        training = [batch for i, batch in enumerate(batches) if not is_held_out(i)]
        return training, held_out or training, seconds

    def own_text(self, sequences: int) -> tuple[torch.Tensor, float]:
        """(ids, seconds that sampling took), read from ``--self-file`` where that has them."""
        file: Path | None = self.arguments.self_file
        words = (self.loaded.source, *sorted(self.loaded.sha256.items()), sequences, self.length, self.seed)
        if file is not None and file.exists():
            with safe_open(file, "pt") as stored:
                if stored.metadata()["of"] == repr(words):
                    return stored.get_tensor("ids"), float(stored.metadata()["seconds"])
        with spending(self.device) as spent:
            ids = sample_rows(self.loaded, rows=sequences, length=self.length, seed=self.seed, device=self.device)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file({"ids": ids}, file, {"of": repr(words), "seconds": str(spent.seconds)})
        return ids, spent.seconds

    @cached_property
    def influences(self) -> tuple[dict[str, float], float]:
        """By target, and seconds."""
        regions = cuttable(self.dense, self.matches, (RegionKind.FFN, *ATTENTION_KINDS))
        with spending(self.device) as spent:
            found = block_influences(self.dense, regions, self.calibrating)
        return found, spent.seconds

    @cached_property
    def curves(self) -> tuple[dict[str, torch.Tensor], float]:
        """The compiler's loss curves of everything that it cuts by default, and seconds: one measurement for all."""
        regions, _ = choose_regions(self.dense, self.matches.regions, SWEPT)
        with spending(self.device) as spent:
            found = measure_curves(self.dense, regions, self.calibrating)
        return found, spent.seconds

    @property
    def prices(self) -> tuple[dict[str, float], float]:
        """What each FFN's probe is priced at: the KL, in nats, of a cut of it alone with a one-shot refit; seconds."""
        curves, seconds = self.curves
        regions = cuttable(self.dense, self.matches, (RegionKind.FFN,))
        return {region.name: float(curves[region.name][probed_width(region)]) for region in regions}, seconds

    def slim(
        self, ratio: float, plan: WidthPlan | None = None, planned: float | None = None, **chosen: Any
    ) -> tuple[Slimmed, Outcome]:
        """The compiler with these options; ``planned`` seconds went into the plan, or into the curves it is made of."""
        progress = Progress(quiet=True)
        options = Options(ratio=ratio, seed=self.seed, repair_steps=self.arguments.repair_steps, **chosen)
        curves = None
        if plan is None and options.allocation == "measured":
            curves, planned = self.curves
        with spending(self.device) as spent:
            slimmed = slim_graph(
                self.dense, self.matches, self.calibrating, options, progress, plan=plan, curves=curves
            )
        cost = count_cost(slimmed.graph, self.length)
        parts = dict(progress.seconds)
        if planned is not None:
            parts["plan"] = planned
        return slimmed, Outcome(
            runs(slimmed.graph),
            self.cost.block_linear_weights - cost.block_linear_weights,
            cost.parameters,
            spent.seconds + (planned or 0.0),
            spent.peak_gib,
            parts,
            dict(Counter(f"{swept.region.kind} {swept.method}" for swept in slimmed.swept)),
            list(slimmed.notes),
            slimmed.plan.widths,
        )

    def effort(self, ratio: float, name: str) -> tuple[Slimmed, Outcome]:
        """One of the compiler's efforts, kept for a row that goes on from it."""
        if name not in self.slimmed:
            self.slimmed[name] = self.slim(ratio, effort=name)
        return self.slimmed[name]

    def forget(self) -> None:
        """Drop what was kept for one ratio."""
        self.slimmed.clear()
        free_memory(self.device)


def ours(**chosen: Any) -> Callable[[Bench, float], Outcome]:
    return lambda bench, ratio: bench.slim(ratio, **chosen)[1]


def peer(name: str) -> Callable[[Bench, float], Outcome]:
    def row(bench: Bench, ratio: float) -> Outcome:
        model: Any = copy.deepcopy(bench.loaded.model).to(bench.device)
        before = block_weights(model)
        with spending(bench.device) as spent:
            result = PEERS[name](model, bench.calibrating, ratio)
        # What it left in place as zeros is gone too.
        zeros = result.removed_weights - (before - block_weights(model))
        parameters = sum(parameter.numel() for parameter in model.parameters()) - zeros
        return Outcome(
            lambda batch: model(**batch, use_cache=False).logits,
            result.removed_weights,
            parameters,
            spent.seconds,
            spent.peak_gib,
            notes=[result.notes],
        )

    return row


def block_influence(bench: Bench, ratio: float) -> Outcome:
    regions = cuttable(bench.dense, bench.matches, (RegionKind.FFN, *ATTENTION_KINDS))
    influences, seconds = bench.influences
    wishes = influence_wishes(regions, influences, TEMPERATURE)
    plan = plan_by_shares(bench.dense, regions, wishes, ratio, most=LARGEST_SHARE)
    return bench.slim(ratio, plan, seconds)[1]


def trial(power: float, **chosen: Any) -> Callable[[Bench, float], Outcome]:
    def row(bench: Bench, ratio: float) -> Outcome:
        regions = cuttable(bench.dense, bench.matches, (RegionKind.FFN,))
        prices, seconds = bench.prices
        plan = plan_by_shares(bench.dense, regions, price_wishes(prices, power), ratio, **TRIAL_SHARES)
        return bench.slim(ratio, plan, seconds, method="obs", regions=("ffn",), **chosen)[1]

    return row


def healed(bench: Bench, ratio: float) -> Outcome:
    slimmed, best = bench.effort(ratio, "best")
    training, held_out, sampling = bench.healing
    graph = slimmed.graph.copy()
    options = HealOptions(seconds=60 * bench.arguments.heal_minutes, seed=bench.seed)
    with spending(bench.device) as spent:
        result = heal(bench.dense, graph, training, held_out, options)
    said = (
        f"{result.steps} steps, held-out KL {result.before:.4f} -> {result.after:.4f}; stopped because: "
        f"{result.stopped}"
    )
    return Outcome(
        runs(graph),
        best.removed,
        count_cost(graph, bench.length).parameters,
        best.seconds + sampling + spent.seconds,
        max(best.peak_gib, spent.peak_gib),
        {"best": best.seconds, "sample": sampling, "heal": spent.seconds},
        notes=[said, *result.notes],
        widths=best.widths,
    )


ROWS: dict[str, Callable[[Bench, float], Outcome]] = {
    "magnitude": ours(method="magnitude", regions=("ffn",), allocation="uniform"),
    **{name: peer(name) for name in PEERS},
    "obs-uniform": ours(method="obs", regions=("ffn",), allocation="uniform"),
    "fast-uniform": ours(allocation="uniform"),
    "block-influence": block_influence,
    "trial-closed": trial(1.0),
    "trial-repaired": trial(0.5, effort="best"),
    "fast": ours(effort="fast"),
    "best": lambda bench, ratio: bench.effort(ratio, "best")[1],
    "heal": healed,
}
