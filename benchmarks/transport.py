"""Our Sinkhorn beside POT's batched one: same problems, same device, at equal marginal error.

    python benchmarks/transport.py            # CUDA if there is one
    python benchmarks/transport.py --small    # sizes for a CPU

POT stops on the L2 norm of the worst item's row marginal. So POT runs first, at ``--tolerance``; the L1 error
of its plans is measured, and ours runs to that error: ours is never the less accurate. The "error" column is
one function applied to all. Times are of the whole call, input to plans, the runs of all solvers interleaved.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from dotresize_fx.transport.sinkhorn import sinkhorn

try:
    import ot
except ImportError as missing:
    raise SystemExit("benchmarks/transport.py needs POT to compare with: pip install 'POT>=0.9.6'") from missing

SIZES = [(32, 1536, 1075), (1, 14336, 10035)]
SMALL_SIZES = [(4, 512, 384), (1, 1024, 768)]
FEATURES = 32
MAX_ITERATIONS = 100_000


@dataclass
class Row:
    """One solver on one problem: how to run it (-> plans, iterations), and what came of it."""

    name: str
    run: Callable[[], tuple[torch.Tensor, int]]
    seconds: list[float] = field(default_factory=list)
    iterations: int = 0
    error: float = 0.0


def make_problem(size: tuple[int, int, int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Neurons onto a subset of themselves: L1 costs of median 1 (B, n, k), masses (B, n) and (B, k)."""
    batch, rows, columns = size
    generator = torch.Generator().manual_seed(0)
    neurons = torch.randn(batch, rows, FEATURES, generator=generator, dtype=torch.float64)
    source = torch.rand(batch, rows, generator=generator, dtype=torch.float64) + 0.5
    target = torch.rand(batch, columns, generator=generator, dtype=torch.float64) + 0.5
    neurons = neurons.to(device)
    cost = torch.cdist(neurons, neurons[:, :columns], p=1)
    cost /= cost[0].median()
    source, target = source.to(device), target.to(device)
    return cost, source / source.sum(-1, keepdim=True), target / target.sum(-1, keepdim=True)


def marginal_error(plan: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> float:
    """The larger L1 violation of the two marginals, worst item of the batch."""
    rows = (plan.sum(-1) - source).abs().sum(-1)
    columns = (plan.sum(-2) - target).abs().sum(-1)
    return torch.maximum(rows, columns).max().item()


def time_once(row: Row, device: torch.device) -> None:
    """Run it once more and add the time to the row."""
    _wait(device)
    start = time.perf_counter()
    _, row.iterations = row.run()
    _wait(device)
    row.seconds.append(time.perf_counter() - start)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compare(size: tuple[int, int, int], device: torch.device, options: argparse.Namespace) -> None:
    """Print one problem's lines of the table."""
    cost, source, target = make_problem(size, device)

    def pot(method: str) -> tuple[torch.Tensor, int]:
        result = ot.solve_batch(
            cost,
            options.epsilon,
            source,
            target,
            max_iter=MAX_ITERATIONS,
            tol=options.tolerance,
            method=method,
            grad="detach",
        )
        return result.plan, result.log["n_iter"] + 1

    # Warm-up runs; they also say which error to meet, and which of POT's methods work on this device.
    rows: list[Row] = []
    for method in ("log_sinkhorn", "sinkhorn"):
        row = Row(f"POT {method}", partial(pot, method))
        try:
            row.error = marginal_error(row.run()[0], source, target)
        except RuntimeError as error:  # POT 0.9.7's plain sinkhorn makes its start on the CPU
            print(f"| {_label(size)} | {row.name} | failed: {str(error).splitlines()[0]} | | | | |")
            continue
        rows.append(row)

    goal = min(row.error for row in rows)

    def ours() -> tuple[torch.Tensor, int]:
        result = sinkhorn(cost, source, target, epsilon=options.epsilon, tolerance=goal, max_iterations=MAX_ITERATIONS)
        return result.plan, int(result.iterations.max())

    rows.insert(0, Row("dotresize-fx", ours))
    rows[0].error = marginal_error(ours()[0], source, target)
    for _ in range(options.runs):
        for row in rows:
            time_once(row, device)

    fastest_pot = min(statistics.median(row.seconds) for row in rows[1:])
    for row in rows:
        median = statistics.median(row.seconds)
        print(
            f"| {_label(size)} | {row.name} | {row.error:.2e} | {row.iterations} | {median * 1e3:.1f} |"
            f" {min(row.seconds) * 1e3:.1f} to {max(row.seconds) * 1e3:.1f} | {median / fastest_pot:.2f} |"
        )


def _label(size: tuple[int, int, int]) -> str:
    return f"{size[0]} x {size[1]} x {size[2]}"


def main() -> None:
    """Parse the options, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="sizes that a CPU solves in seconds")
    parser.add_argument("--runs", type=int, default=7, help="timed runs of each solver (default 7)")
    parser.add_argument("--epsilon", type=float, default=0.1, help="in median costs (default 0.1)")
    parser.add_argument("--tolerance", type=float, default=1e-8, help="POT's tol, an L2 norm (default 1e-8)")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(
        f"{device.type} ({name}), torch {torch.__version__}, POT {ot.__version__}, float64,"
        f" epsilon {options.epsilon} of the median cost, {options.runs} interleaved runs\n"
    )
    print("| problem | solver | L1 error | iterations | ms (median) | ms (min to max) | / best POT |")
    print("|---|---|---|---|---|---|---|")
    for size in SMALL_SIZES if options.small else SIZES:
        compare(size, device, options)


if __name__ == "__main__":
    main()
