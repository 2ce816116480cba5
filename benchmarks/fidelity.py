"""What is left of a model: other tools' methods, simple allocations and the compiler's own efforts in one table.

    pip install torch-pruning                              # for its row
    python benchmarks/fidelity.py --text-dir DIR --json fidelity.jsonl
    python benchmarks/fidelity.py --text-dir DIR --ratios 0.1 0.4 0.6 --rows magnitude fast best heal --json more.jsonl

Text: see texts.py. All rows are measured in one run on the same tokens, dense included, and printed as soon as they
are; ``--json`` appends them to a file of one JSON object a line. Excess is ln(perplexity slim / perplexity dense) in
nats, a mean over texts, and so are agreement on the most likely next token and KL to the dense model, both on the
same sources. "Weights off" is measured on what came out, as a share of the blocks' linear weights. Seconds are those
of calibrating, solving and training; "forward" gives them in forward passes of the dense model over the calibration
tokens; sensitivity is measured once and counted in every row that uses it. Memory is the peak of the same time. The
rows of one ratio:

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
import math
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from bench import append, line, said
from fidelity_rows import ROWS, Bench, Outcome
from measure import free_memory, means
from texts import Texts

from dotresize_fx.fidelity import DecoderComparison
from dotresize_fx.options import SELF_TOKENS, Options


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
        "widths": outcome.widths,
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
    parser.add_argument("--self-tokens", type=int, default=SELF_TOKENS, help="text that the model writes for healing")
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
    where, tokens = bench.where, bench.calibration_tokens
    append(
        arguments.json,
        {
            "kind": "run",
            "model": bench.loaded.source,
            "device": where,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "arguments": said(arguments),
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
                why = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
                append(arguments.json, {"kind": "failed", "ratio": ratio, "method": name, "error": why})
                line([f"{ratio:.0%}", name, *[""] * (len(columns) - 3), f"failed: {why}"])
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
