"""Methods on the residual stream side by side, each in one basis for all layers and in one a sublayer with adapters.

    python benchmarks/methods.py --text-dir DIR                      # smollm2-135m, a tenth and a fifth of its channels
    python benchmarks/methods.py --text-dir DIR --width 504 --methods pca --bases shared --efforts fast best --json FILE

Text: see texts.py. Everything is measured in one run, dense included; excess is ln(perplexity slim / perplexity dense)
in nats, a mean over texts; the file size is 4 bytes a parameter. The basis of magnitude are the channels of the largest
norm, that of dotresize the Q of a transport plan T = QR, that of pca principal components. Efforts:

published   the maps inserted and folded, nothing refitted, as the methods were published
fast, best  the compiler's: all that reads the stream refitted; and every sublayer repaired (fast refits magnitude too)

FFNs and attention are in fidelity.py.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from bench import Setup, append, line, said
from measure import free_memory, means, runs, spending

from dotresize_fx.cost import count_cost
from dotresize_fx.options import BASES, Options
from dotresize_fx.passes.choose_regions import choose_regions
from dotresize_fx.passes.cut_stream import widest_stream
from dotresize_fx.passes.slim_graph import slim_graph
from dotresize_fx.progress import Progress
from dotresize_fx.regions import RegionKind
from dotresize_fx.width_plan import WidthPlan

STREAM_METHODS = ("magnitude", "dotresize", "pca")
STREAM_EFFORTS = ("published", "fast", "best")
COLUMNS = ["width", "method", "basis", "effort", "same source", "other source", "agreement", "weights off"]
COLUMNS += ["parameters", "file, MB", "seconds"]
# What is kept of the channels where no width is given, and the grid of such widths.
KEPT = (0.9, 0.8)
GRID = 8


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text-dir", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--width", type=int, nargs="+", help="of the stream (90 and 80 %% of it)")
    parser.add_argument("--methods", nargs="+", default=list(STREAM_METHODS), choices=STREAM_METHODS)
    parser.add_argument("--bases", nargs="+", default=list(BASES), choices=BASES)
    parser.add_argument("--efforts", nargs="+", default=["published", "fast"], choices=STREAM_EFFORTS)
    parser.add_argument("--repair-steps", type=int)
    parser.add_argument("--json", type=Path, metavar="FILE", help="append one object a row")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--calibration-tokens", type=int, default=24_576)
    parser.add_argument("--tokens-per-text", type=int, default=4_096)
    return parser.parse_args(given)


class Rows:
    """Cuts the stream of one dense model, one row at a time."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.setup = Setup(arguments)
        self.stream = widest_stream(self.setup.dense, self.setup.matches)
        self.refitted = choose_regions(
            self.setup.dense, self.setup.matches.regions, (RegionKind.VALUE, RegionKind.FFN)
        )[0]

    @property
    def widths(self) -> list[int]:
        """Those asked for."""
        whole = self.stream.width
        asked: list[int] | None = self.arguments.width
        return asked or [round(whole * kept / GRID) * GRID for kept in KEPT]

    def measure(self, width: int, method: str, basis: str, effort: str) -> dict[str, Any]:
        """One row: what it is, what it lost, what it costs."""
        setup = self.setup
        refit = effort != "published"
        chosen = [self.stream, *(self.refitted if refit else [])]
        plan = WidthPlan({region.name: region.width for region in chosen} | {self.stream.name: width})
        options = Options(
            plan=Path("methods.py"),
            method=method,
            basis=basis,
            effort=effort if refit else "fast",
            repair_steps=self.arguments.repair_steps,
        )
        torch.manual_seed(0)
        quiet = Progress(quiet=True)
        with spending(setup.device) as spent:
            slimmed = slim_graph(setup.dense, setup.matches, setup.calibrating, options, quiet, plan=plan, refit=refit)
        found = setup.fidelity.compare(runs(slimmed.graph))
        mean, cost = means(found, setup.texts), count_cost(slimmed.graph, setup.length)
        return {
            "width": width,
            "method": method,
            "basis": basis,
            "effort": effort,
            "perplexity": {text: one.slim_perplexity for text, one in found.items()},
            "same_source": mean.same,
            "other_source": mean.other,
            "agreement": mean.agreement,
            "kl_to_dense": mean.divergence,
            "weights_off": 1 - cost.block_linear_weights / setup.cost.block_linear_weights,
            "parameters": cost.parameters,
            "parameters_change": cost.parameters / setup.cost.parameters - 1,
            "bytes": 4 * cost.parameters,
            "macs_per_token": cost.macs_per_token,
            "seconds": spent.seconds,
            "notes": list(slimmed.notes),
            "regions": {
                one.region.name: {"method": one.method, "error": one.error, **one.notes} for one in slimmed.swept
            },
        }


def main() -> None:
    arguments = parse()
    rows = Rows(arguments)
    setup = rows.setup
    print(setup.texts.table())
    tokens = f"{setup.calibration_tokens} calibration tokens in sequences of {setup.length}"
    print(f"\n{setup.loaded.source}; {tokens}, on {setup.where}; stream {rows.stream.width} wide")
    print(f"parameters {setup.cost.parameters}, block linear weights {setup.cost.block_linear_weights}\n")
    found = setup.fidelity.compare(setup.fidelity.dense)
    dense = {text: one.dense_perplexity for text, one in found.items()}
    print("dense: " + ", ".join(f"{text} {value:.2f}" for text, value in dense.items()) + "\n")
    append(arguments.json, {"kind": "run", "arguments": said(arguments), "device": setup.where, "dense": dense})
    line(COLUMNS)
    line(["---"] * len(COLUMNS))
    for width, effort, basis, method in itertools.product(
        rows.widths, arguments.efforts, arguments.bases, arguments.methods
    ):
        try:
            row = rows.measure(width, method, basis, effort)
        except Exception as error:  # a width that cannot go, or no memory: the other rows still count
            line([str(width), method, basis, effort, f"failed: {type(error).__name__}: {error}"])
            append(
                arguments.json, {"kind": "failed", "width": width, "method": method, "basis": basis, "effort": effort}
            )
            free_memory(setup.device)
            continue
        append(arguments.json, {"kind": "row", **row})
        cells = [str(width), method, basis, effort, f"**{row['same_source']:.3f}**", f"{row['other_source']:.3f}"]
        cells += [f"{row['agreement']:.1%}", f"{row['weights_off']:.2%}"]
        cells += [f"{row['parameters'] / 1e6:.1f} M ({row['parameters_change']:+.2%})"]
        line([*cells, f"{row['bytes'] / 1e6:.0f}", f"{row['seconds']:.0f}"])
        free_memory(setup.device)


if __name__ == "__main__":
    main()
