"""The same seed on the same machine: is it the same width plan and the same weights, bit for bit?

    python benchmarks/same_bytes.py                                     # smollm2-135m at 20 %, fast and best
    python benchmarks/same_bytes.py --model DIR --efforts fast --text calibration.txt

Each effort slims twice in one process; hashes are SHA-256 over names, shapes and bytes.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from measure import spending

import dotresize_fx
from dotresize_fx.compiler import compute_device
from dotresize_fx.options import Options


def digest(result: dotresize_fx.SlimResult) -> tuple[str, str]:
    """(of the width plan, of the slim program's parameters and buffers)."""
    plan = hashlib.sha256(repr(sorted(result.slimmed.plan.widths.items())).encode())
    weights = hashlib.sha256()
    for name, tensor in sorted(result.slim.program.state_dict.items()):
        weights.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        weights.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return plan.hexdigest(), weights.hexdigest()


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--efforts", nargs="+", default=["fast", "best"], choices=("fast", "best"))
    parser.add_argument("--repair-steps", type=int, default=100)
    parser.add_argument("--text", type=Path, nargs="+", default=[], help="calibration; export's own without it")
    parser.add_argument("--calibration-tokens", type=int, default=24_576)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    return parser.parse_args(given)


def main() -> None:
    arguments = parse()
    device = compute_device(Options(device=arguments.device))
    print("| effort | run | width plan | weights | seconds |\n|---|---|---|---|---|")
    same = True
    for effort in arguments.efforts:
        found = []
        for run in (1, 2):
            with spending(device) as spent:
                result = dotresize_fx.slim(
                    arguments.model,
                    arguments.ratio,
                    calibration=arguments.text,
                    calibration_tokens=arguments.calibration_tokens,
                    repair_steps=arguments.repair_steps,
                    effort=effort,
                    device=device,
                )
            found.append(digest(result))
            plan, weights = (one[:16] for one in found[-1])
            print(f"| {effort} | {run} | {plan} | {weights} | {spent.seconds:.0f} |", flush=True)
        same = same and found[0] == found[1]
    print("\nThe same." if same else "\nNot the same.")
    raise SystemExit(not same)


if __name__ == "__main__":
    main()
