"""The ratio-0 proof on whole models: random full-width maps of condition number at most 4, inserted and folded.

    python benchmarks/exactness.py                       # smollm2-135m and minilm-l6
    python benchmarks/exactness.py FOLDER ...            # models of your own

All parameters are re-drawn first. "difference" is the largest absolute output difference over the largest absolute
output, on a batch and length that were not traced, with padding (of padded positions nothing is asked). Each region
kind is also given maps that its symmetry does not admit, which must break the bound a hundredfold.
"""

from __future__ import annotations

import argparse

import torch

from dotresize_fx.compiler import analyse
from dotresize_fx.export.model_source import load_model
from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.prove_exactness import BOUND, BROKEN, map_regions, redraw_parameters
from dotresize_fx.progress import Progress
from dotresize_fx.region_map import random_admissible_map, random_wrong_map
from dotresize_fx.regions import ATTENTION_KINDS, RegionKind


def difference(graph: FxGraph, batch: dict[str, torch.Tensor], expected: torch.Tensor) -> float:
    """Largest difference of the first output at real positions, relative to the largest output."""
    found = Execution(graph).outputs(batch)[0]
    real = batch["attention_mask"].bool()
    return float((found - expected)[real].abs().max() / expected[real].abs().max())


def prove(name: str) -> bool:
    """Print one line per region kind; whether all bounds were met."""
    loaded = load_model(name)
    model = redraw_parameters(loaded.model)
    captured, graph, _ = analyse(loaded, Progress(quiet=True), check=True)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, captured.vocabulary, (3, 29), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        expected = model(**batch)[0]
    good = True
    matches = find_regions(graph)
    for kind in (RegionKind.FFN, RegionKind.RESIDUAL, *ATTENTION_KINDS):
        count = len(list(matches.of_kind(kind)))
        if not count:
            why = {reason for what, reason in matches.refused if what.endswith(kind)}
            if kind is RegionKind.RESIDUAL:
                why = {row.writes_reason for row in matches.linears if "norm" in row.writes_reason}
            print(f"| {name} | {kind} | 0 | refused: {min(why, default='none found')} | |", flush=True)
            continue
        right, wrong = graph.copy(), graph.copy()
        map_regions(right, (kind,), random_admissible_map)
        map_regions(wrong, (kind,), random_wrong_map)
        kept, broken = difference(right, batch, expected), difference(wrong, batch, expected)
        good &= kept <= BOUND and broken >= BROKEN
        print(f"| {name} | {kind} | {count} | {kept:.1e} | {broken:.1e} |", flush=True)
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="*", default=["smollm2-135m", "minilm-l6"])
    models = parser.parse_args().model
    print(f"bound {BOUND:.0e}; a wrong map must reach {BROKEN:.0e}\n")
    print("| model | regions | count | difference, admissible maps | difference, wrong maps |\n|---|---|---|---|---|")
    results = [prove(name) for name in models]
    if not all(results):
        raise SystemExit("the proof fails")


if __name__ == "__main__":
    main()
