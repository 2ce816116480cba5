"""What elimination in groups loses beside elimination one by one, on the Gram matrices of a model's FFNs.

    python benchmarks/elimination.py smollm2-135m --at-once 3 6 12

Models are those of ``dotresize-fx export``; text is the built-in one. Each figure is the squared output error after a
share of the neurons went, divided by what it is one by one, where the same is done in blocks of 32 among 128: the worst
and the median of all FFNs.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

from bench import line

from dotresize_fx.calibration import load_text, prepare_data
from dotresize_fx.compiler import analyse, compute_device
from dotresize_fx.export.open_model import open_model
from dotresize_fx.options import Options
from dotresize_fx.progress import Progress
from dotresize_fx.ranks import Ranks
from dotresize_fx.region_inputs import RegionInputs
from dotresize_fx.regions import RegionKind
from dotresize_fx.sensitivity import dense_statistics
from dotresize_fx.solvers import obs

SHARES = (0.1, 0.2, 0.4, 0.6, 0.8)


def errors(found: obs.Elimination, width: int) -> list[float]:
    return [float(found.error[int(width * share) - 1]) for share in SHARES]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--at-once", type=int, nargs="+", default=[3, 6, 12])
    parser.add_argument("--tokens", type=int, default=8192)
    arguments = parser.parse_args()
    options = Options(calibration_tokens=arguments.tokens)
    device = compute_device(options)
    loaded = open_model(arguments.model)
    captured, dense, matches = analyse(loaded, Progress())
    data = prepare_data(load_text(()), options, loaded.tokenizer, loaded.task, captured.longest, device)
    dense.to(device)
    regions = [region for region in matches.regions if region.kind is RegionKind.FFN]
    ratios: dict[int, list[list[float]]] = {count: [] for count in arguments.at_once}
    seconds: dict[int, float] = dict.fromkeys((1, *arguments.at_once), 0.0)
    watched = [RegionInputs(dense, region) for region in regions]
    for inputs, seen in dense_statistics(dense, watched, data.calibration, Ranks(alone=True)):
        weight, width = seen.reader_weight, inputs.region.width
        assert weight is not None
        one_by_one: list[float] = []
        for at_once in seconds:
            obs.WIDE, obs.GROUPS = (width + 1, 1) if at_once == 1 else (0, width // at_once)
            started = time.perf_counter()
            found = errors(obs.eliminate(seen.gram, weight, width - width // obs.EIGHTH), width)
            seconds[at_once] += time.perf_counter() - started
            if at_once == 1:
                one_by_one = found
            else:
                ratios[at_once].append([new / old for new, old in zip(found, one_by_one, strict=True)])
    line(["at once", *(f"{share:.0%} gone: worst (median)" for share in SHARES), "seconds an FFN"])
    line(["---"] * (len(SHARES) + 2))
    line(["1", *["1"] * len(SHARES), f"{seconds[1] / len(regions):.2f}"])
    for at_once, rows in ratios.items():
        told = [f"{max(column):.4f} ({median(column):.4f})" for column in zip(*rows, strict=True)]
        line([str(at_once), *told, f"{seconds[at_once] / len(regions):.2f}"])


if __name__ == "__main__":
    main()
