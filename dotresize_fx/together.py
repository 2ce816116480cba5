"""Steps of the pipeline that the processes that torchrun started take together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from dotresize_fx.device import compute_device
from dotresize_fx.errors import RanksError
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.hand_out import Handed, take
from dotresize_fx.healing import PROGRESS_STEPS, HealOptions, heal
from dotresize_fx.launched import Launched
from dotresize_fx.options import Options
from dotresize_fx.progress import Progress
from dotresize_fx.ranks import Ranks
from dotresize_fx.sweep import is_held_out

# A step of healing on a CPU, which has neither the memory nor the time for a GPU's.
CPU_TOKENS = 1024
# Of the sum of all weights: the same sums, solved for on each rank.
ALIKE = 1e-6


@contextmanager
def together(
    options: Options, progress: Progress, help_out: Callable[[Handed, Options, Progress], object]
) -> Iterator[Launched]:
    """Rank 0 goes on with the block; other ranks help it out and end here, with SystemExit(0)."""
    device = compute_device(options)
    with Launched(device, options.helped, progress.show) as launched:
        if launched.rank > 0:
            if launched.wait(progress.check):
                with launched.called():
                    help_out(take(device), options, Progress(quiet=True, check=progress.check))
            raise SystemExit(0)
        yield launched


def check_alike(graph: FxGraph) -> None:
    """
    Raises:
        RanksError: the ranks found different weights, of other hardware or versions.
    """
    ranks = Ranks()
    tensors = [tensor for tensor in graph.program.state_dict.values() if tensor.is_floating_point()]
    size = torch.stack([tensor.double().abs().sum() for tensor in tensors]).sum()
    most, least = ranks.largest(size.clone()), -ranks.largest(-size)
    if most - least > ALIKE * most:
        raise RanksError("the processes found different weights: give them the same hardware and versions of torch")


def heal_handed(handed: Handed, options: Options, progress: Progress) -> tuple[str, ...]:
    """Distil end to end, measured on every eighth batch of each source; notes for the report."""
    held_out = [batch for source in handed.sources for i, batch in enumerate(source) if is_held_out(i)]
    training = [batch for source in handed.sources for i, batch in enumerate(source) if not is_held_out(i)]
    at_once = HealOptions.pass_tokens if training[0]["input_ids"].is_cuda else CPU_TOKENS
    chosen = HealOptions(
        seconds=60 * options.heal_minutes,
        steps=options.heal_steps,
        seed=options.seed,
        step_tokens=at_once,
        pass_tokens=at_once,
    )
    with progress.stage("heal", PROGRESS_STEPS) as step:
        found = heal(
            handed.dense,
            handed.slim,
            training,
            held_out or training,
            chosen,
            task=handed.task,
            checkpoint=options.heal_checkpoint,
            advanced=step,
        )
    together = f" in {count} processes" if (count := Ranks().count) > 1 else ""
    return (
        f"healed for {found.steps} steps in {found.seconds:.0f} s{together}: held-out divergence {found.before:.4f} -> "
        f"{found.after:.4f}; stopped because: {found.stopped}",
        *found.notes,
    )
