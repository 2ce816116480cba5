"""How much the model's answers suffer from a cut to each width of each region, from a few runs of the dense model.

The shape of a region's curve comes from its solver and the dense model's Gram matrices; its height from one probe:
the model is run on with that region alone cut, from where the cut is on, and the answers are compared with the dense
model's. A few hundred tokens do: every token says how far its whole distribution moved, not how one token's loss did.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch

from dotresize_fx.fidelity import Inputs, pooled
from dotresize_fx.fx_form.execution import Environment, Execution
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.gram import GramAccumulator, RegionStatistics, token_rows
from dotresize_fx.head_maps import at_dense_width, over_heads
from dotresize_fx.region_inputs import RegionInputs
from dotresize_fx.regions import Region, RegionKind, Symmetry
from dotresize_fx.solvers import CURVES, METHODS, SOLVERS

# The share of its width that a probe keeps; a KV head is the least that can go.
PROBED = {RegionKind.FFN: 0.6, RegionKind.VALUE: 0.75, RegionKind.QUERY_KEY: 0.75}
# Merging the first quarter of rotary pairs loses next to nothing, which says little of what the others lose.
PROBED_PAIRS = 0.5
# Tokens whose Gram matrices give the curves, and tokens that price the probes.
SHAPE_TOKENS = 4096
PRICE_TOKENS = 768
# Of a sequence that prices no more is run, so that few tokens are of several texts.
PRICE_LENGTH = 256
# Tokens that are run at once.
PIECE = 512
# A GPU takes so many times as many tokens, and so many times as many at once.
GPU_SCALE = 8
GPU_PIECE_SCALE = 4
# Of the mean square of what a reader reads: a probe fitted to few tokens is to be no better than one fitted to many.
RIDGE = 1e-3
# No token's chances grow by more than exp of it: beyond float32, and as bad as it gets.
LARGEST = 80.0


def probed_width(region: Region) -> int:
    """The width at which a region's curve is priced."""
    if region.kind is RegionKind.HEADS:
        return region.width - 1
    share = PROBED_PAIRS if region.symmetry is Symmetry.ROTARY_PAIRS else PROBED[region.kind]
    return max(2, int(region.width * share / 2) * 2)


def measure_curves(
    graph: FxGraph,
    regions: Sequence[Region],
    batches: Sequence[Inputs],
    *,
    task: str = "decoder",
    advanced: Callable[[], None] = lambda: None,
) -> dict[str, torch.Tensor]:
    """Region name -> (n + 1,) float64 on the CPU: the predicted loss at each width, in nats a token.

    For encoders (``task``) the loss is the cosine that pooled embeddings lose: errors of single tokens average out in
    them and those that a whole sequence shares do not. Regions come in graph order. ``advanced`` is called once a
    batch and once a region.
    """
    watched = [RegionInputs(graph, region) for region in regions]
    shaping, pricing = _disjoint(batches)
    statistics = _dense_statistics(graph, watched, shaping, advanced)
    curves, probes = {}, []
    for inputs in watched:
        region, found = inputs.region, statistics.pop(inputs.region.name)
        curves[region.name] = CURVES[region.kind](region, found)
        probes.append(_Probe(inputs, found))
        advanced()
    prices = _prices(graph, probes, pricing, task, advanced)
    for probe in probes:
        curve, n = curves[probe.region.name], probe.region.width
        height = float(curve[probe.width])
        if height <= 0:  # nothing is known of it: in proportion to what goes
            curve, height = torch.arange(n, -1, -1, dtype=torch.float64), float(n - probe.width)
        curves[probe.region.name] = (curve / height * prices[probe.region.name]).cpu()
    return curves


def _disjoint(batches: Sequence[Inputs]) -> tuple[Sequence[Inputs], Sequence[Inputs]]:
    """Batches that shape the curves and others that price the probes, spread evenly over the text.

    A probe has to be priced on text that it was not fitted to: what the first layers put out follows from the token
    alone, and of few tokens a cut learns each.
    """
    on_gpu = batches[0]["input_ids"].is_cuda
    pieces = [piece for batch in batches for piece in _pieces(batch, PIECE * (GPU_PIECE_SCALE if on_gpu else 1))]
    pieces = [piece for piece in pieces if "attention_mask" not in piece or piece["attention_mask"].any()] or pieces
    if len(pieces) == 1:
        return pieces, pieces
    scale = GPU_SCALE if on_gpu else 1
    short = [_cropped(piece, PRICE_LENGTH * scale) for piece in pieces]
    # One piece in three at most prices; all the others may shape.
    priced = max(1, min(len(pieces) // 3, round(scale * PRICE_TOKENS / _mean_tokens(short))))
    chosen = {(2 * i + 1) * len(pieces) // (2 * priced) for i in range(priced)}
    others = [piece for i, piece in enumerate(pieces) if i not in chosen]
    count = min(len(others), max(1, round(scale * SHAPE_TOKENS / _mean_tokens(pieces))))
    return [others[i * len(others) // count] for i in range(count)], [short[i] for i in sorted(chosen)]


def _pieces(batch: Inputs, tokens: int) -> Sequence[Inputs]:
    """The batch in pieces of at most so many tokens, or of one sequence."""
    count, length = batch["input_ids"].shape
    rows = max(1, tokens // length)
    return [{name: value[i : i + rows] for name, value in batch.items()} for i in range(0, count, rows)]


def _cropped(piece: Inputs, length: int) -> Inputs:
    """The beginnings of the sequences, where these have no padding."""
    if "attention_mask" in piece and not piece["attention_mask"].all():
        return piece
    return {name: value[:, :length] for name, value in piece.items()}


def _mean_tokens(pieces: Sequence[Inputs]) -> float:
    return sum(piece["input_ids"].numel() for piece in pieces) / len(pieces)


def _dense_statistics(
    graph: FxGraph, watched: Sequence[RegionInputs], batches: Sequence[Inputs], advanced: Callable[[], None]
) -> dict[str, RegionStatistics]:
    """What readers read; for queries and keys, which nothing but the attention reads, what their writers do."""
    execution = Execution(graph)
    sums = {inputs.region.name: (GramAccumulator(), GramAccumulator()) for inputs in watched}
    at: dict[torch.fx.Node, list[RegionInputs]] = defaultdict(list)
    turning: dict[torch.fx.Node, list[RegionInputs]] = defaultdict(list)
    for inputs in watched:
        node = inputs.hidden or inputs.entry
        assert node is not None
        at[node].append(inputs)
        if inputs.turning:  # often behind the linears
            turning[max(inputs.turning, key=execution.position)].append(inputs)
    near: dict[str, torch.Tensor | None] = {}
    for batch in batches:
        mask, position = batch.get("attention_mask"), 0
        environment = execution.start(batch)
        # From one node to the next: what one region watches need not be kept for all.
        for node in sorted({*at, *turning}, key=execution.position):
            keep = {node, *(table for inputs in turning.get(node, ()) for table in inputs.turning)}
            values = execution.run(environment, position, execution.position(node) + 1, keep=keep)
            position = execution.position(node) + 1
            for inputs in at.get(node, ()):
                read, entered = sums[inputs.region.name]
                if inputs.hidden is not None:
                    read.add(inputs.read_rows(values, mask))
                elif (rows := inputs.entry_rows(values, mask)) is not None:
                    entered.add(rows)
            for inputs in turning.get(node, ()):
                if near.get(inputs.region.name) is None:
                    near[inputs.region.name] = inputs.coherence(values, mask)
        advanced()
    return {r.region.name: r.statistics(*sums.pop(r.region.name), near.get(r.region.name)) for r in watched}


class _Probe:
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
        solve = SOLVERS[METHODS["obs"][region.kind][0]]
        found = solve(region, statistics, self.width)
        if region.kind is RegionKind.QUERY_KEY:
            for op in inputs.writers:
                down = found.key_down if found.key_down is not None and op.name in region.key_writers else found.down
                written = over_heads(region, at_dense_width(region, found, down), len(graph.weight(op)))
                self.weights |= inputs.mapped(op, written)
            self.departs = [graph.node(name) for name in region.writers]
            return
        assert inputs.output is not None
        assert statistics.reader_weight is not None
        self.departs = [inputs.output]
        weight = statistics.reader_weight
        down = over_heads(region, found.down, weight.shape[1])
        kept = down.T @ statistics.gram @ down
        ridge = RIDGE * kept.diagonal().mean().clamp_min(torch.finfo(kept.dtype).tiny) * torch.eye(len(kept)).to(kept)
        self.change = down @ torch.linalg.solve(kept + ridge, down.T @ statistics.gram @ weight.T) - weight.T

    def outputs(self, execution: Execution, environment: Environment, start: int) -> torch.Tensor:
        """The program's first output with the region cut; ``environment`` was run up to ``start`` and is used up."""
        node, hidden = self.inputs.output, self.inputs.hidden
        if node is not None and hidden is not None:
            rows = environment[hidden]
            values = execution.run(environment, start, stop := execution.index[node] + 1, keep=[node])
            environment[node] = values[node] + rows @ self.change.to(rows.dtype)
            start = stop
        result = execution.results[0]
        found: torch.Tensor = execution.run(
            environment, start, len(execution.nodes), keep=[result], parameters=self.weights
        )[result]
        return found


def _prices(
    graph: FxGraph,
    probes: Sequence[_Probe],
    batches: Sequence[Inputs],
    task: str,
    advanced: Callable[[], None],
) -> dict[str, float]:
    """Loss an answer by region name. The dense model is run once more a batch; each probe departs from that run."""
    execution = Execution(graph)
    total = {probe.region.name: 0.0 for probe in probes}
    count = 0
    departures = [(min(execution.index[node] for node in probe.departs), probe) for probe in probes]
    departures.sort(key=lambda pair: pair[0])
    for batch in batches:
        answers = _Answers(execution.outputs(batch)[0], batch, task)
        environment, position = execution.start(batch), 0
        for start, probe in departures:
            execution.run(environment, position, start)
            position = start
            total[probe.region.name] += answers.lost(probe.outputs(execution, dict(environment), start))
        count += answers.count
        advanced()
    return {name: value / max(count, 1) for name, value in total.items()}


class _Answers:
    """The dense model's first output on a batch, and what another run of it loses."""

    def __init__(self, output: torch.Tensor, batch: Inputs, task: str) -> None:
        self.batch, self.embeds = batch, task == "encoder"
        self.rows = self._rows(output)
        # An encoder has one answer a sequence.
        self.count = len(self.rows)
        self.chances = self.rows if self.embeds else self.rows.softmax(-1)

    def _rows(self, output: torch.Tensor) -> torch.Tensor:
        # Of nearly equal directions float32 leaves no more than rounding.
        return pooled(output, self.batch).double() if self.embeds else token_rows(output, self.mask).float()

    @property
    def mask(self) -> torch.Tensor | None:
        return self.batch.get("attention_mask")

    def lost(self, output: torch.Tensor) -> float:
        """Sum over tokens of KL(dense || cut); for an encoder over sequences of 1 - cosine of the embeddings."""
        rows = self._rows(output)
        if self.embeds:
            return float((1 - torch.nn.functional.cosine_similarity(self.rows, rows)).clamp_min(0).sum())
        # ln of the mean of exp under the dense model's chances, less the mean: exact where the difference is small.
        away = rows - self.rows
        away -= torch.linalg.vecdot(self.chances, away)[:, None]
        return float(torch.linalg.vecdot(self.chances, away.clamp_max_(LARGEST).expm1_()).log1p().double().sum())
