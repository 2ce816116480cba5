"""What is left of a model: other tools' methods, simple allocations and the compiler's own efforts in one table.

    pip install torch-pruning                              # for its row
    python benchmarks/fidelity.py --text-dir DIR --json fidelity.jsonl
    python benchmarks/fidelity.py --text-dir DIR --ratios 0.1 0.4 0.6 --rows magnitude fast best heal --json more.jsonl

Text: see texts.py. All rows are measured in one run on the same tokens, dense included, and printed as soon as they
are; ``--json`` appends them to a file of one JSON object a line. Excess is ln(perplexity slim / perplexity dense) in
nats, a mean over texts, and so are agreement on the most likely next token and KL to the dense model, both on the
same sources. "Weights off" is measured on what came out, as a share of the blocks' linear weights. Seconds are those
of calibrating, solving and training; "forward" gives them in forward passes of the dense model over the calibration
tokens. Memory is the peak of the same time. The rows of one ratio:

magnitude               FFNs by activation norm, the same width everywhere, nothing refitted
torch-pruning-taylor    Torch-Pruning itself (peers/)
flap-wifv               FLAP's metric and compensation, FFNs alone (peers/)
modegpt                 a reconstruction of MoDeGPT (peers/)
obs-uniform             structured OBS on the FFNs, the same width everywhere
fast-uniform            the closed forms on FFNs and attention, the same share everywhere
block-influence         the closed forms, a sublayer's share by softmax of -(1 - cosine of its stream) / temperature
trial-closed            OBS on the FFNs, a layer's share in proportion to 1 / sensitivity, clipped to 3..75 %
trial-repaired          the same with the root of the sensitivity, and every sublayer repaired
fast, best, heal        the compiler's efforts; heal goes on from the graph that best made

The trial rows' sensitivity is the KL of a cut of 40 % of that layer alone with a one-shot refit, not by cutting one
layer after the other but by the compiler's estimate of it (sensitivity.py here shows how the two agree).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
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
    probe_prices,
)
from measure import (
    Fidelity,
    calibration_rows,
    evaluation_rows,
    forward_seconds,
    free_memory,
    means,
    runs,
    spending,
)
from peers import PEERS, block_weights
from safetensors import safe_open
from safetensors.torch import save_file
from texts import Batches, Texts, batched, calibration, evaluation, read_texts, shuffled

from dotresize_fx.compiler import analyse, compute_device
from dotresize_fx.cost import Cost, count_cost
from dotresize_fx.export.model_source import LoadedModel, load_model
from dotresize_fx.export.sample_text import SEQUENCES_AT_ONCE, sample_tokens
from dotresize_fx.fidelity import DecoderComparison, Run
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.healing import HealOptions, heal
from dotresize_fx.options import Options
from dotresize_fx.passes.slim_graph import Slimmed, slim_graph
from dotresize_fx.progress import Progress
from dotresize_fx.regions import ATTENTION_KINDS, MatchReport, RegionKind
from dotresize_fx.sweep import is_held_out
from dotresize_fx.width_plan import WidthPlan

# MoDeGPT's stand-in in peers/ takes the same.
TEMPERATURE = 0.1
TRIAL_SHARES = {"least": 0.03, "most": 0.75}
# On CUDA a step of sampling takes about as long for this many sequences as for one.
SAMPLED_AT_ONCE = 256


@dataclass
class Outcome:
    """A row's model and what it took. ``parts`` are those of ``seconds`` that are worth telling apart."""

    run: Run
    removed: int
    parameters: int
    seconds: float
    peak_gib: float
    parts: dict[str, float] = field(default_factory=dict)
    solvers: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Bench:
    """What all rows share: the dense model, its tokens, and what was computed once."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.seed: int = arguments.seed
        torch.manual_seed(self.seed)
        self.device = compute_device(Options(device=arguments.device))
        self.length: int = arguments.length or (512 if self.device == "cpu" else 1024)
        self.texts: Texts = read_texts(arguments.text_dir)
        self.loaded: LoadedModel = load_model(arguments.model)
        dense: FxGraph
        matches: MatchReport
        _, dense, matches = analyse(self.loaded, Progress(quiet=True))
        dense.to(self.device)
        self.dense, self.matches = dense, matches
        self.cost: Cost = count_cost(dense, self.length)
        shape: dict[str, Any] = {"length": self.length, "device": self.device}
        self.calibrating: Batches = calibration(
            self.texts,
            self.loaded.tokenizer,
            tokens=arguments.calibration_tokens,
            rows=calibration_rows(self.device),
            **shape,
        )
        self.fidelity = Fidelity(
            dense,
            evaluation(
                self.texts,
                self.loaded.tokenizer,
                tokens=arguments.tokens_per_text,
                rows=evaluation_rows(self.device),
                **shape,
            ),
        )
        self.forward = forward_seconds(dense, self.calibrating, self.device)
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
            ids = sample_tokens(
                self.loaded,
                sequences=sequences,
                length=self.length,
                seed=self.seed,
                device=self.device,
                batch=SEQUENCES_AT_ONCE if self.device == "cpu" else SAMPLED_AT_ONCE,
            )
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
    def prices(self) -> tuple[dict[str, float], float]:
        """Of the FFNs, and seconds."""
        regions = cuttable(self.dense, self.matches, (RegionKind.FFN,))
        with spending(self.device) as spent:
            found = probe_prices(self.dense, regions, self.calibrating, self.seed)
        return found, spent.seconds

    def slim(
        self, ratio: float, plan: WidthPlan | None = None, planned: float | None = None, **chosen: Any
    ) -> tuple[Slimmed, Outcome]:
        """The compiler with these options; ``planned`` seconds went into the plan."""
        progress = Progress(quiet=True)
        options = Options(ratio=ratio, seed=self.seed, repair_steps=self.arguments.repair_steps, **chosen)
        with spending(self.device) as spent:
            slimmed = slim_graph(self.dense, self.matches, self.calibrating, options, progress, plan=plan)
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


# -- rows ------------------------------------------------------------------------------------------


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


# -- the table -------------------------------------------------------------------------------------


def record(bench: Bench, ratio: float, name: str, outcome: Outcome) -> dict[str, Any]:
    """Measure a row: all its figures."""
    found: Mapping[str, DecoderComparison] = bench.fidelity.compare(outcome.run)
    mean = means(found, bench.texts)
    return {
        "kind": "row",
        "ratio": ratio,
        "method": name,
        "weights_off": outcome.removed / bench.cost.block_linear_weights,
        "parameters": outcome.parameters,
        "perplexity": {text: one.slim_perplexity for text, one in found.items()},
        "excess": {text: one.excess for text, one in found.items()},
        "top1_agreement": {text: one.top1_agreement for text, one in found.items()},
        "kl_to_dense": {text: one.kl_to_dense for text, one in found.items()},
        "same_source": mean.same,
        "other_source": mean.other,
        "difference": mean.other - mean.same,
        "same_source_agreement": mean.agreement,
        "same_source_kl": mean.divergence,
        "seconds": outcome.seconds,
        "forward_passes": outcome.seconds / bench.forward,
        "peak_gib": outcome.peak_gib,
        "parts": outcome.parts,
        "solvers": outcome.solvers,
        "notes": outcome.notes,
    }


def cells(row: Mapping[str, Any], texts: Texts) -> list[str]:
    """A row as people read it."""
    parts = "; ".join(f"{name} {seconds:.1f} s" for name, seconds in row["parts"].items())
    solvers = ", ".join(f"{count} {name}" for name, count in sorted(row["solvers"].items()))
    return [
        f"{row['ratio']:.0%}",
        row["method"],
        f"{row['weights_off']:.2%}",
        f"{row['parameters'] / 1e6:.2f} M",
        *(f"{row['perplexity'][name]:.2f}" for name in texts.measured),
        *(f"{row[name]:.3f}" for name in ("same_source", "other_source", "difference")),
        f"{row['same_source_agreement']:.1%}",
        f"{row['same_source_kl']:.3f}",
        f"{row['seconds']:.1f}",
        f"{row['forward_passes']:.1f}",
        f"{row['peak_gib']:.1f}",
        "; ".join(part for part in (parts, solvers, *row["notes"]) if part),
    ]


def line(values: Sequence[str]) -> None:
    print(f"| {' | '.join(values)} |", flush=True)


def append(file: Path | None, entry: Mapping[str, Any]) -> None:
    """One line of JSON; numbers that JSON does not have become null."""
    if file is not None:
        with file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(finite(entry)) + "\n")


def finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text-dir", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.3, 0.5])
    parser.add_argument("--rows", nargs="+", choices=tuple(ROWS), default=list(ROWS), metavar="ROW")
    parser.add_argument("--length", type=int, default=None, help="of sequences; default 1024, on the CPU 512")
    parser.add_argument("--calibration-tokens", type=int, default=196_608)
    parser.add_argument("--repair-steps", type=int, default=Options.repair_steps)
    parser.add_argument("--heal-tokens", type=int, default=0, help="text for healing; 0 is all there is")
    parser.add_argument("--self-tokens", type=int, default=786_432, help="text that the model writes for healing")
    parser.add_argument("--self-file", type=Path, default=None, help="where runs of the same settings share that text")
    parser.add_argument("--heal-minutes", type=float, default=2.5)
    parser.add_argument("--tokens-per-text", type=int, default=16_384)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="append all figures to it")
    parser.add_argument("--budget-minutes", type=float, default=math.inf, help="start no row after so long")
    return parser.parse_args(given)


def main() -> None:
    started = time.perf_counter()
    arguments = parse()
    bench = Bench(arguments)
    texts = bench.texts
    dense = {name: one.dense_perplexity for name, one in bench.fidelity.compare(bench.fidelity.dense).items()}
    where = torch.cuda.get_device_name() if bench.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    tokens = sum(batch["input_ids"].numel() for batch in bench.calibrating)
    append(
        arguments.json,
        {
            "kind": "run",
            "model": bench.loaded.source,
            "device": where,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "arguments": {key: str(v) if isinstance(v, Path) else v for key, v in vars(arguments).items()},
            "length": bench.length,
            "calibration_tokens": tokens,
            "dense_perplexity": dense,
            "same": texts.same,
            "other": texts.other,
            "parameters": bench.cost.parameters,
            "block_linear_weights": bench.cost.block_linear_weights,
            "forward_seconds": bench.forward,
        },
    )
    print(texts.table())
    print(f"\n{bench.loaded.source}; {tokens} calibration tokens in sequences of {bench.length}, on {where}, torch")
    print(f"{torch.__version__}; {bench.cost.block_linear_weights} block linear weights; a forward pass of the dense")
    print(f"model over the calibration tokens takes {bench.forward:.2f} s; started in ", end="")
    print(f"{time.perf_counter() - started:.0f} s\n")
    columns = ["cut", "method", "weights off", "parameters", *texts.measured, "same source", "other source"]
    columns += ["other - same", "top-1", "KL", "seconds", "forward", "GiB", "parts"]
    line(columns)
    line(["---"] * len(columns))
    blank = [""] * 9
    line(["", "dense", "", f"{bench.cost.parameters / 1e6:.2f} M", *(f"{one:.2f}" for one in dense.values()), *blank])
    left_out = []
    for ratio in arguments.ratios:
        for name in (row for row in ROWS if row in arguments.rows):
            if time.perf_counter() - started > 60 * arguments.budget_minutes:
                left_out.append(f"{name} at {ratio:.0%}")
                continue
            try:
                row = record(bench, ratio, name, ROWS[name](bench, ratio))
            except Exception as error:  # of another's code or of a share that cannot go: the other rows still count
                said = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
                append(arguments.json, {"kind": "failed", "ratio": ratio, "method": name, "error": said})
                line([f"{ratio:.0%}", name, *[""] * (len(columns) - 3), f"failed: {said}"])
            else:
                append(arguments.json, row)
                line(cells(row, texts))
            free_memory(bench.device)
        bench.forget()
    print(f"\nAll of it in {time.perf_counter() - started:.0f} s.")
    if left_out:
        append(arguments.json, {"kind": "left out", "rows": left_out})
        print(f"Left out for want of time: {', '.join(left_out)}.")


if __name__ == "__main__":
    main()
