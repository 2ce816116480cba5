"""What repair of one cut FFN reaches, by its steps and the tokens that each takes.

    python benchmarks/repair_tokens.py smollm2-135m --text FILE ... --layers 1 7 --steps 400 200 --at-once 16 8 2

Models are those of ``dotresize-fx export``. FFNs are cut to ``--share`` of their width in closed form, one after the
other up to the last one wanted; those wanted are repaired as often as there are steps and counts of sequences at once,
and what stands behind sees none of it. Loss is :mod:`dotresize_fx.repair`'s, on every eighth batch, before and after.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from bench import line

from dotresize_fx.calibration import load_text, prepare_data
from dotresize_fx.compiler import analyse, compute_device
from dotresize_fx.export.open_model import open_model
from dotresize_fx.graph import Op
from dotresize_fx.options import Options
from dotresize_fx.passes.cut_stream import apply_map
from dotresize_fx.progress import Progress
from dotresize_fx.regions import RegionKind
from dotresize_fx.repair import Sublayer
from dotresize_fx.solvers import solvers_for
from dotresize_fx.sweep import Sweep


class Tried(Sweep):
    """Repairs with each of ``steps`` and keeps nothing of it."""

    steps: Sequence[int] = ()
    told: tuple[str, ...] = ()

    def _refine(self, piece: Sublayer, ops: Sequence[Op]) -> dict[str, float | str]:
        state = self.slim_graph.program.state_dict
        before = dict(state)
        for steps in self.steps:
            self.repair_steps = steps
            started = time.perf_counter()
            notes = super()._refine(piece, ops)
            state.clear()
            state.update(before)
            losses = (f"{notes[f'loss {when} repair']:.5f}" for when in ("before", "after"))
            line([*self.told, str(steps), *losses, f"{time.perf_counter() - started:.0f}"])
        return {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, nargs="+", default=[])
    parser.add_argument("--layers", type=int, nargs="+", default=[1])
    parser.add_argument("--steps", type=int, nargs="+", default=[400])
    parser.add_argument("--at-once", type=int, nargs="+", default=[8, 4, 2])
    parser.add_argument("--share", type=float, default=0.74)
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    options = Options(calibration_tokens=arguments.tokens, sequence_length=arguments.length, device=arguments.device)
    device = compute_device(options)
    loaded = open_model(arguments.model)
    captured, dense, matches = analyse(loaded, Progress())
    data = prepare_data(load_text(arguments.text), options, loaded.tokenizer, loaded.task, captured.longest, device)
    dense.to(device)
    regions = [region for region in matches.regions if region.kind is RegionKind.FFN]
    line(["FFN", "tokens a step", "steps", "loss before", "after", "seconds"])
    line(["---"] * 6)
    for at_once in arguments.at_once:
        slim = dense.copy()

        def apply(region: Any, found: Any, slim: Any = slim) -> None:
            apply_map(slim, region, found, check=False)

        rows = {name: torch.cat([batch[name] for batch in data.calibration]) for name in data.calibration[0]}
        parts = {name: value.split(at_once) for name, value in rows.items()}
        batches = [dict(zip(parts, part, strict=True)) for part in zip(*parts.values(), strict=True)]
        sweep = Tried(dense, slim, batches, apply)
        sweep.steps = arguments.steps
        for layer in range(max(arguments.layers) + 1):
            sweep.repair_steps = int(layer in arguments.layers)
            sweep.told = str(layer), str(at_once * arguments.length)
            width = 16 * round(arguments.share * regions[layer].width / 16)
            sweep.slim_sublayer([(regions[layer], width)], lambda region: solvers_for("auto", region.kind))


if __name__ == "__main__":
    main()
