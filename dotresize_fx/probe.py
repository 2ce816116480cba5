"""What one moderate cut of one region costs: the dense model is run on with it, and its answers are compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from dotresize_fx.expert_statistics import refit_experts
from dotresize_fx.fidelity import Inputs, answer_rows, pooled
from dotresize_fx.fx_form.execution import Environment, Execution
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.gram import RegionStatistics, padding_mask, token_rows
from dotresize_fx.graph import Kind
from dotresize_fx.head_maps import at_dense_width, over_heads
from dotresize_fx.region_inputs import RegionInputs
from dotresize_fx.region_map import RegionMap
from dotresize_fx.regions import Region, RegionKind, Symmetry
from dotresize_fx.solvers import solvers_for
from dotresize_fx.task import predicts_tokens

# The share of its width that a probe keeps; a KV head is the least that can go.
PROBED = {RegionKind.FFN: 0.6, RegionKind.EXPERTS: 0.6, RegionKind.VALUE: 0.75, RegionKind.QUERY_KEY: 0.75}
# Merging the first quarter of rotary pairs loses next to nothing, which says little of what the others lose.
PROBED_PAIRS = 0.5
# Of the mean square of what a reader reads: a probe fitted to few tokens is to be no better than one fitted to many.
RIDGE = 1e-3
# No token's chances grow by more than exp of it: beyond float32, and as bad as it gets.
LARGEST = 80.0
# Of a vocabulary so many tokens are scored.
SHORTLIST = 8192


def probed_width(region: Region) -> int:
    """The width at which a region's curve is priced."""
    if region.kind is RegionKind.HEADS:
        return region.width - 1
    share = PROBED_PAIRS if region.symmetry is Symmetry.ROTARY_PAIRS else PROBED[region.kind]
    return max(2, int(region.width * share / 2) * 2)


def reader_change(region: Region, statistics: RegionStatistics, found: RegionMap) -> torch.Tensor:
    """(n, out): from what the reader reads to the error in what it puts out, fitted to what the map leaves."""
    weight = statistics.reader_weight
    assert weight is not None
    down = over_heads(region, found.down, weight.shape[1])
    kept = down.T @ statistics.gram @ down
    ridge = RIDGE * kept.diagonal().mean().clamp_min(torch.finfo(kept.dtype).tiny) * torch.eye(len(kept)).to(kept)
    fitted: torch.Tensor = torch.linalg.solve(kept + ridge, down.T @ statistics.gram @ weight.T)
    return down @ fitted - weight.T


class Probe:
    """One region cut to its probed width, as what it changes in a run of the dense model.

    ``change`` (n, out) takes what the reader reads to the error in what it puts out; for queries and keys ``weights``
    stand in for the writers' own: what is left of them, written at the dense width.
    """

    def __init__(self, inputs: RegionInputs, statistics: RegionStatistics) -> None:
        self.inputs, self.region = inputs, inputs.region
        region, graph = self.region, inputs.graph
        self.width = probed_width(region)
        self.change = torch.zeros(0)
        self.weights: dict[torch.fx.Node, torch.Tensor] = {}
        ((_, solve),) = solvers_for("obs", region.kind)
        found = solve(region, statistics, self.width)
        if region.kind is RegionKind.QUERY_KEY:
            for op in inputs.writers:
                kept = at_dense_width(region, found, found.down_of(region, op.name))
                written = over_heads(region, kept, len(graph.weight(op)))
                self.weights |= inputs.mapped(op, written)
            self.departs = [graph.node(name) for name in region.writers]
            return
        assert inputs.output is not None
        assert statistics.reader_weight is not None
        self.departs = [inputs.output]
        weight = statistics.reader_weight
        if region.kind is RegionKind.EXPERTS:
            assert inputs.reader is not None
            kept = refit_experts(found, statistics.gram, weight, ridge=RIDGE) @ found.down.mT
            parameter, stored = graph.stored_expert_weight(inputs.reader, kept)
            self.weights, self.departs = {parameter: stored}, list(parameter.users)
            return
        self.change = reader_change(region, statistics, found)

    def run(self, execution: Execution, environment: Environment, start: int, wanted: torch.fx.Node) -> torch.Tensor:
        """What ``wanted`` is with the region cut; ``environment`` was run up to ``start`` and is used up."""
        node, hidden = self.inputs.output, self.inputs.hidden
        if node is not None and hidden is not None and not self.weights:
            rows = environment[hidden]
            values = execution.run(environment, start, stop := execution.index[node] + 1, keep=[node])
            environment[node] = values[node] + rows @ self.change.to(rows.dtype)
            start = stop
        stop = execution.index[wanted] + 1
        found: torch.Tensor = execution.run(environment, start, stop, keep=[wanted], parameters=self.weights)[wanted]
        return found


def price_probes(
    graph: FxGraph,
    probes: Sequence[Probe],
    batches: Sequence[Inputs],
    task: str,
    advanced: Callable[[], None],
) -> dict[str, float]:
    """Loss an answer by region name. The dense model is run once more a batch; each probe departs from that run.

    Whole KV heads, which seldom go, are run on the first batch alone, and their loss grows as that of the others does.
    """
    execution = Execution(graph)
    total = {probe.region.name: 0.0 for probe in probes}
    always = {probe.region.name for probe in probes if probe.region.kind is not RegionKind.HEADS} or set(total)
    count, first = 0, 0.0
    departures = [(min(execution.index[node] for node in probe.departs), probe) for probe in probes]
    departures.sort(key=lambda pair: pair[0])
    for i, batch in enumerate(batches):
        answers = _Answers(execution, batch, task)
        environment, position = execution.start(batch), 0
        for start, probe in departures:
            if i > 0 and probe.region.name not in always:
                continue
            execution.run(environment, position, start)
            position = start
            found = probe.run(execution, dict(environment), start, answers.node)
            total[probe.region.name] += answers.lost(found)
        count += answers.count
        first = first or sum(total[name] for name in always)
        advanced()
    growth = sum(total[name] for name in always) / first if first > 0 else 1.0
    return {name: value * (1 if name in always else growth) / max(count, 1) for name, value in total.items()}


class _Answers:
    """The dense model's first output on a batch, and what another run of it loses.

    Where a head makes a decoder's answers, ``node`` is what it reads, and only the SHORTLIST tokens that the dense
    model finds likeliest on the batch are scored: the whole head costs a small model more than half of its layers.
    """

    def __init__(self, execution: Execution, batch: Inputs, task: str) -> None:
        self.batch, self.mask, self.task = batch, padding_mask(batch), task
        self.node, self.head = execution.results[0], None
        graph, last = execution.graph, execution.results[0]
        op = graph.op(last.name)
        large = op.kind is Kind.LINEAR and len(graph.weight(op)) > SHORTLIST and graph.bias(op) is None
        if large and predicts_tokens(task):
            self.node = graph.node(op.inputs[0].name)
        values = execution.run(execution.start(batch), 0, len(execution.nodes), keep=[self.node, last])
        if self.node is not last:
            likely = token_rows(values[last], self.mask).float().softmax(-1).sum(0).topk(SHORTLIST).indices
            self.head = graph.weight(op).index_select(0, likely)
        self.rows = self._rows(values[self.node])
        # An encoder has one answer a sequence.
        self.count = len(self.rows)
        self.chances = self.rows.softmax(-1) if predicts_tokens(task) else self.rows

    def _rows(self, value: torch.Tensor) -> torch.Tensor:
        if self.task == "encoder":  # of nearly equal directions float32 leaves no more than rounding
            return pooled(value, self.batch).double()
        if self.task == "outputs":
            return answer_rows(value, self.mask).double()
        rows = token_rows(value, self.mask)
        return (rows if self.head is None else rows @ self.head.T).float()

    def lost(self, value: torch.Tensor) -> float:
        """Sum over tokens of KL(dense || cut); for an encoder over sequences of 1 - cosine of the embeddings, for other
        outputs over their rows of |cut - dense|² / |dense|², the mean row's.

        value: what another run has at ``node``.
        """
        rows = self._rows(value)
        if self.task == "encoder":
            return float((1 - torch.nn.functional.cosine_similarity(self.rows, rows)).clamp_min(0).sum())
        away = rows - self.rows
        if self.task == "outputs":
            size = self.rows.square().sum().clamp_min(torch.finfo(rows.dtype).tiny)
            return float(self.count * away.square().sum() / size)
        # ln of the mean of exp under the dense model's chances, less the mean: exact where the difference is small.
        away -= torch.linalg.vecdot(self.chances, away)[:, None]
        return float(torch.linalg.vecdot(self.chances, away.clamp_max_(LARGEST).expm1_()).log1p().double().sum())
