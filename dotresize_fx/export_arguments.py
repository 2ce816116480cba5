"""Options of the export command that go together."""

from __future__ import annotations

import argparse

from dotresize_fx.workload import Workload


def latency_options(export: argparse.ArgumentParser) -> None:
    """Add what plans widths by the clock."""
    export.add_argument(
        "--target-latency",
        type=float,
        metavar="X",
        help="instead of --ratio: cut until the workload takes X of the dense model's time, as measured here",
    )
    export.add_argument(
        "--profile",
        action="store_true",
        help="time the kernels of the widths on this machine, and split --ratio by loss per second saved",
    )
    export.add_argument(
        "--workload", metavar="SIZES", help=f"of --target-latency and --profile, as bench takes it ({Workload()})"
    )
