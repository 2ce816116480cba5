"""An encoder at several ratios: cosine of pooled embeddings, slim against dense, on text that did not calibrate.

    python benchmarks/encoders.py                                   # minilm-l6 at 10, 20 and 30 %
    python benchmarks/encoders.py --rows fast best --calibration-tokens 98304
    python benchmarks/encoders.py --rows fast best --text DIR/*.txt  # first 80 % of each calibrates, last 20 % measures

The slim program is measured, with the code of export's report; seconds are calibration and solving alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from measure import runs, spending
from texts import Batches

from dotresize_fx.calibration import load_text, prepare_data
from dotresize_fx.compiler import analyse, compute_device
from dotresize_fx.cost import count_cost
from dotresize_fx.export.model_source import load_model
from dotresize_fx.fidelity import Run, pooled
from dotresize_fx.options import Options
from dotresize_fx.passes.slim_graph import slim_graph
from dotresize_fx.progress import Progress

ROWS: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude", "allocation": "uniform"},
    "uniform": {"allocation": "uniform"},
    "fast": {},
    "best": {"effort": "best"},
}


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="minilm-l6")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.1, 0.2, 0.3])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--text", type=Path, nargs="+", default=[], help="calibration; export's own without it")
    parser.add_argument("--calibration-tokens", type=int, help="those of export where not given")
    parser.add_argument("--repair-steps", type=int, help="those of export where not given")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    return parser.parse_args(given)


@torch.no_grad()
def embeddings(run: Run, batches: Batches) -> torch.Tensor:
    """(sequences, width) float64: pooled as the export's report pools them."""
    return torch.cat([pooled(run(batch), batch).double() for batch in batches])


def main() -> None:
    arguments = parse()
    device = compute_device(Options(device=arguments.device))
    loaded = load_model(arguments.model)
    captured, dense, matches = analyse(loaded, Progress())
    before = count_cost(dense, 1).block_linear_weights
    dense.to(device)
    options = Options(calibration_tokens=arguments.calibration_tokens)
    data = prepare_data(load_text(arguments.text), options, loaded.tokenizer, loaded.task, captured.longest, device)
    calibrating, measured = (
        [{name: value.to(device) for name, value in batch.items()} for batch in part]
        for part in (data.calibration, data.evaluation)
    )
    tokens = sum(int(batch["attention_mask"].sum()) for batch in calibrating)
    count = sum(len(batch["input_ids"]) for batch in measured)
    print(f"{loaded.source}; {tokens} calibration tokens of {data.description}; {count} embeddings; on {device}\n")
    expected = embeddings(runs(dense), measured)
    print("| weights off | row | mean cosine | 5th percentile | seconds |\n|---|---|---|---|---|")
    for ratio in arguments.ratios:
        for row in arguments.rows:
            chosen = Options(
                ratio=ratio,
                calibration_tokens=arguments.calibration_tokens,
                repair_steps=arguments.repair_steps,
                **ROWS[row],
            )
            with spending(device) as spent:
                slim = slim_graph(dense, matches, calibrating, chosen, Progress(quiet=True), task=loaded.task).graph
            found = torch.nn.functional.cosine_similarity(expected, embeddings(runs(slim), measured))
            off = 1 - count_cost(slim, 1).block_linear_weights / before
            cells = (f"{off:.1%}", row, f"{found.mean():.4f}", f"{found.quantile(0.05):.4f}", f"{spent.seconds:.0f}")
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
