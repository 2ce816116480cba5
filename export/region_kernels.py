"""The products that a region's width decides the size of, in a run of a workload."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from dotresize_fx.cost import query_heads
from dotresize_fx.errors import UsageError
from dotresize_fx.graph import Graph, Kind
from dotresize_fx.regions import Region, RegionKind
from dotresize_fx.workload import Workload


@dataclass(frozen=True, order=True)
class Kernel:
    """(rows, inner) @ (inner, columns); the second is a weight, or with ``groups`` there are so many products of two
    computed tensors, as in an attention.
    """

    rows: int
    inner: int
    columns: int
    groups: int = 0

    def __str__(self) -> str:
        size = f"{self.rows}x{self.inner}x{self.columns}"
        return f"{self.groups}*{size}" if self.groups else size


@dataclass(frozen=True)
class Step:
    """A run of the model: ``tokens`` new ones of each of ``batch`` sequences, which attend to ``keys``."""

    batch: int
    tokens: int
    keys: int


def steps_of(workload: Workload) -> list[tuple[Step, int]]:
    """The runs of a workload, and how often; of the tokens behind the prompt the one in the middle stands for all."""
    prompt = (Step(workload.batch, workload.prompt, workload.prompt), 1)
    decode = (Step(workload.batch, 1, workload.prompt + workload.decode // 2 + 1), workload.decode)
    return [prompt, decode] if workload.decode else [prompt]


def kernels_of(graph: Graph, region: Region, width: int, step: Step) -> Counter[Kernel]:
    """What a run multiplies where the region is ``width`` wide. Biases, norms and functions between are not counted.

    Raises:
        UsageError: experts, whose rows are as many as are routed to them.
    """
    found: Counter[Kernel] = Counter()
    rows = step.batch * step.tokens
    for name in (*region.writers, *region.readers):
        op = graph.op(name)
        if op.kind is not Kind.LINEAR:
            raise UsageError(
                f"{region.name}: experts cannot be timed alone, as their tokens are routed: plan them by --ratio"
            )
        columns, inner = graph.weight(op).shape
        if name in region.writers:
            found[Kernel(rows, inner, columns * width // region.width)] += 1
        else:
            found[Kernel(rows, inner * width // region.width, columns)] += 1
    if (
        region.attention
        and (op := graph.op(region.attention)).kind is Kind.ATTENTION
        and not op.attributes.get("mixes")
    ):
        query, _, value = op.inputs[:3]
        groups, score, mixed = step.batch * query_heads(op), query.width or 0, value.width or 0
        if region.kind is RegionKind.HEADS:
            groups = groups * width // region.width
        if region.kind is RegionKind.QUERY_KEY:
            score = score * width // region.width
        if region.kind is RegionKind.VALUE:
            mixed = mixed * width // region.width
        if region.kind is not RegionKind.VALUE and groups and score:
            found[Kernel(step.tokens, score, step.keys, groups)] += 1
        if region.kind is not RegionKind.QUERY_KEY and groups and mixed:
            found[Kernel(step.tokens, step.keys, mixed, groups)] += 1
    return found
