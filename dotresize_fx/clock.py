"""What widths cost by the clock, and the search for widths that meet a target latency."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from operator import attrgetter

import torch

from dotresize_fx.errors import TargetLatencyError
from dotresize_fx.regions import Region, RegionKind
from dotresize_fx.width_plan import WidthPlan
from dotresize_fx.workload import Workload

# Plans that are tried on the clock: what the kernels alone predict, and others that are corrected by what was measured.
TRIALS = 5
# A plan that is faster than asked for by no more than this share of the dense latency loses little for it.
CLOSE = 0.02
# (share of the dense latency, and the ends of its 95 % interval)
Measured = tuple[float, float, float]


@dataclass(frozen=True)
class Trial:
    """A plan, the share of the dense latency that it was to be predicted at, and is, and the measured one."""

    plan: WidthPlan
    aim: float
    predicted: float
    measured: Measured


@dataclass
class Clock:
    """``seconds`` by region name: (n + 1,) what the region's kernels take in one run of the workload at each width.

    ``dense`` are those of all of the dense model's ops; what is in no region is taken to stay as it is.
    ``target`` is the share of them to reach, None where a ratio says how much goes. ``rehearse`` measures a model of
    given widths end to end.
    """

    workload: Workload
    seconds: Mapping[str, torch.Tensor]
    dense: float
    rehearse: Callable[[Mapping[str, int]], Measured]
    target: float | None = None
    trials: list[Trial] = field(default_factory=list)

    def predicted(self, widths: Mapping[str, int]) -> float:
        """The share of the dense latency that is left at these widths; a region without seconds costs nothing."""
        saved = sum(float(s[-1] - s[widths[name]]) for name, s in self.seconds.items() if name in widths)
        return 1 - saved / self.dense

    def check_reach(
        self, regions: Sequence[Region], seconds: Mapping[str, torch.Tensor], steps: Mapping[str, int]
    ) -> None:
        """Raises TargetLatencyError where even the narrowest widths on the grid are predicted above the target."""
        assert self.target is not None
        alone = 0.0
        shared: dict[str, dict[bool, float]] = {}
        for region in regions:
            curve = seconds[region.name]
            most = max(
                (float(curve[-1] - curve[w]) for w in range(steps[region.name], region.width, steps[region.name])),
                default=0.0,
            )
            if not region.attention:
                alone += most
                continue
            sides = shared.setdefault(region.attention, {True: 0.0, False: 0.0})
            sides[region.kind is RegionKind.HEADS] += most  # whole heads go, or their widths
        least = 1 - (alone + sum(max(sides.values()) for sides in shared.values())) / self.dense
        if least > self.target:
            raise self.missed(least)

    def refused(self, saved: float) -> TargetLatencyError:
        """:meth:`missed`, where a share ``saved`` of the dense latency is the most that can go."""
        return self.missed(1 - saved)

    def missed(self, best: float) -> TargetLatencyError:
        """What to raise where the kernels predict no less than ``best``."""
        return TargetLatencyError(
            f"--target-latency {self.target}: no plan reaches it: the narrowest widths of the chosen regions are "
            f"predicted at {best:.3f} of the dense latency ({self.workload}); choose a higher one or more --regions"
        )

    def settle(self, plan: Callable[[float], WidthPlan]) -> WidthPlan:
        """The plan of the least loss that meets the target when it is measured.

        ``plan`` gives the widths whose predicted share of the dense latency is at most what it is asked for, its aim.
        What a plan really saves is a part of what its kernels predict; the next one is asked for accordingly more, or
        less, and once one met the target and one missed it for what lies between the two.

        Raises:
            TargetLatencyError: none was measured at the target, not within noise either.
        """
        assert self.target is not None
        aim = self.target
        for _ in range(TRIALS):
            try:
                found = plan(aim)
            except TargetLatencyError:
                if not self.trials:
                    raise
                break
            if any(trial.plan.widths == found.widths for trial in self.trials):
                break
            self.trials.append(Trial(found, aim, self.predicted(found.widths), self.rehearse(found.widths)))
            value, _, high = self.trials[-1].measured
            if value <= self.target <= max(high, value + CLOSE):
                break
            if (following := self._next_aim()) is None:
                break
            aim = following
        met = [trial for trial in self.trials if trial.measured[1] <= self.target]
        if not met:
            value, low, high = min(trial.measured for trial in self.trials)
            raise TargetLatencyError(
                f"--target-latency {self.target}: no plan reaches it: the best of {len(self.trials)} found takes "
                f"{value:.3f} of the dense latency ({low:.3f} to {high:.3f}, {self.workload}); choose a higher one"
            )
        under = [trial for trial in met if trial.measured[0] <= self.target]
        if not under:
            return min(met, key=lambda trial: trial.measured[0]).plan
        # The slowest of them lost least.
        return max(under, key=lambda trial: trial.measured[0]).plan

    def _next_aim(self) -> float | None:
        """What the next plan is to be predicted at; None where no other could be better."""
        assert self.target is not None
        last = self.trials[-1]
        by_aim = attrgetter("aim")
        missed = min((trial for trial in self.trials if trial.measured[0] > self.target), key=by_aim, default=None)
        slow = missed.aim if missed else 1.0
        met = max(
            (trial for trial in self.trials if trial.measured[0] <= self.target and trial.aim < slow),
            key=by_aim,
            default=None,
        )
        if missed and met:
            share = (self.target - met.measured[0]) / (missed.measured[0] - met.measured[0])
            return met.aim + min(max(share, 0.25), 0.6) * (missed.aim - met.aim)
        if last.measured[0] >= 1 or last.predicted >= 1:
            return None
        aim = 1 - (1 - self.target) * (1 - last.predicted) / (1 - last.measured[0])
        return aim if 0 < aim < 1 else None


def rising(values: Sequence[float]) -> list[float]:
    """The nearest sequence that never falls, in least squares (pool adjacent violators; Ayer et al. 1955)."""
    pools: list[tuple[float, int]] = []
    for value in values:
        pools.append((value, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (first, n), (second, m) = pools[-2:]
            pools[-2:] = [((first * n + second * m) / (n + m), n + m)]
    return [value for value, count in pools for _ in range(count)]


def between(samples: Mapping[int, float], width: int) -> torch.Tensor:
    """(width + 1,) float64 from values at some widths, ``width`` among them: never falling, straight between them.

    Below the smallest sample it is as that.
    """
    widths = sorted(samples)
    values = rising([samples[at] for at in widths])
    curve = torch.full((width + 1,), values[0], dtype=torch.float64)
    for (start, low), (stop, high) in pairwise(zip(widths, values, strict=True)):
        curve[start : stop + 1] = torch.linspace(low, high, stop - start + 1, dtype=torch.float64)
    return curve
