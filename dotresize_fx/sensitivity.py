"""How much the model's answers suffer from a cut to each width of each region, from a few runs of the dense model.

The shape of a region's curve comes from its solver and the dense model's Gram matrices; its height from one probe.
For a probe the error d_t that a cut makes in the sublayer's output at token t is priced by the gradient g_t of the
log-likelihood of tokens drawn from the model itself: to second order the divergence of the cut model's answers from
the dense model's is half the Fisher information times the error squared, (g_t . d_t)² / 2 in nats, averaged over
tokens as if their errors were independent (the empirical Fisher of Theis et al. 2018, "Faster gaze prediction",
equation 7, on whole directions instead of single activations). One forward and one backward pass price every region.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import torch

from dotresize_fx.fidelity import Inputs
from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.gram import GramAccumulator, RegionStatistics, token_rows
from dotresize_fx.head_maps import over_heads
from dotresize_fx.pooled_prices import pooled_prices
from dotresize_fx.region_inputs import RegionInputs
from dotresize_fx.regions import Region, RegionKind
from dotresize_fx.solvers import CURVES, METHODS, SOLVERS

# The share of its width that a probe keeps; a KV head is the least that can go.
PROBED = {RegionKind.FFN: 0.6, RegionKind.VALUE: 0.75, RegionKind.QUERY_KEY: 0.75}
# Tokens whose Gram matrices give the curves, and tokens whose gradients price the probes.
SHAPE_TOKENS = 4096
PRICE_TOKENS = 2048
# Tokens that are run, and differentiated, at once.
PIECE = 512
# A GPU takes so many times as many in less time.
GPU_SCALE = 8
# Of the mean square of what a reader reads: a probe fitted to few tokens is to be no better than one fitted to many.
RIDGE = 1e-3


def probed_width(region: Region) -> int:
    """The width at which a region's curve is priced."""
    n = region.width
    return n - 1 if region.kind is RegionKind.HEADS else max(2, int(n * PROBED[region.kind] / 2) * 2)


def measure_curves(
    graph: FxGraph,
    regions: Sequence[Region],
    batches: Sequence[Inputs],
    *,
    task: str = "decoder",
    seed: int = 0,
    advanced: Callable[[], None] = lambda: None,
) -> dict[str, torch.Tensor]:
    """Region name -> (n + 1,) float64 on the CPU: the predicted loss at each width, in nats a token.

    For encoders (``task``) the loss is the cosine that pooled embeddings lose, and measured
    (:func:`dotresize_fx.pooled_prices.pooled_prices`). Regions come in graph order. ``advanced`` is called once a batch
    and once a region.
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
    if task == "encoder":
        prices = pooled_prices(graph, probes, pricing, advanced)
    else:
        prices = _prices(graph, probes, pricing, task, seed, advanced)
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
    pieces = [piece for batch in batches for piece in _pieces(batch)]
    pieces = [piece for piece in pieces if "attention_mask" not in piece or piece["attention_mask"].any()] or pieces
    if len(pieces) == 1:
        return pieces, pieces
    real = sum(piece["input_ids"].numel() for piece in pieces) / len(pieces)
    wanted = GPU_SCALE if pieces[0]["input_ids"].is_cuda else 1
    # One piece in three at most prices; all the others may shape.
    priced = max(1, min(len(pieces) // 3, round(wanted * PRICE_TOKENS / real)))
    chosen = {(2 * i + 1) * len(pieces) // (2 * priced) for i in range(priced)}
    others = [piece for i, piece in enumerate(pieces) if i not in chosen]
    count = min(len(others), max(1, round(wanted * SHAPE_TOKENS / real)))
    return [others[i * len(others) // count] for i in range(count)], [pieces[i] for i in sorted(chosen)]


def _pieces(batch: Inputs) -> Sequence[Inputs]:
    """The batch in pieces of at most PIECE tokens, or of one sequence."""
    count, length = batch["input_ids"].shape
    rows = max(1, PIECE // length)
    return [{name: value[i : i + rows] for name, value in batch.items()} for i in range(0, count, rows)]


def _dense_statistics(
    graph: FxGraph, watched: Sequence[RegionInputs], batches: Sequence[Inputs], advanced: Callable[[], None]
) -> dict[str, RegionStatistics]:
    """What readers read; for queries and keys, which nothing but the attention reads, what their writers do."""
    execution = Execution(graph)
    sums = {inputs.region.name: (GramAccumulator(), GramAccumulator()) for inputs in watched}
    at: dict[torch.fx.Node, list[RegionInputs]] = defaultdict(list)
    for inputs in watched:
        node = inputs.hidden or inputs.entry
        assert node is not None
        at[node].append(inputs)
    for batch in batches:
        mask, position = batch.get("attention_mask"), 0
        environment = execution.start(batch)
        # From one node to the next: what one region watches need not be kept for all.
        for node in sorted(at, key=execution.index.__getitem__):
            stop = execution.index[node] + 1
            values = execution.run(environment, position, stop, keep=[node])
            position = stop
            for inputs in at[node]:
                read, entered = sums[inputs.region.name]
                if inputs.hidden is not None:
                    read.add(inputs.read_rows(values, mask))
                elif (rows := inputs.entry_rows(values, mask)) is not None:
                    entered.add(rows)
        advanced()
    return {inputs.region.name: inputs.statistics(*sums.pop(inputs.region.name)) for inputs in watched}


class _Probe:
    """One region cut to its probed width, as what it changes in the reader's output.

    ``change`` (n, out) takes what the reader reads to the error; for queries and keys ``weights`` stand in for the
    query writers' own and the attention is run again.
    """

    def __init__(self, inputs: RegionInputs, statistics: RegionStatistics) -> None:
        self.inputs, self.region = inputs, inputs.region
        region = self.region
        self.width = probed_width(region)
        self.change = torch.zeros(0)
        self.weights: dict[torch.fx.Node, torch.Tensor] = {}
        solve = SOLVERS[METHODS["obs"][region.kind][0]]
        found = solve(region, statistics, self.width)
        graph = inputs.graph
        if region.kind is RegionKind.QUERY_KEY:
            self.output = graph.node(region.attention_reader)
            back = found.down if found.key_down is None else found.key_down
            for op in inputs.writers:
                if op.name not in region.key_writers:
                    project = over_heads(region, found.down @ back.mT, len(graph.weight(op)))
                    self.weights |= inputs.mapped(op, project)
            return
        assert inputs.output is not None
        assert statistics.reader_weight is not None
        self.output = inputs.output
        weight = statistics.reader_weight
        down = over_heads(region, found.down, weight.shape[1])
        kept = down.T @ statistics.gram @ down
        ridge = RIDGE * kept.diagonal().mean().clamp_min(torch.finfo(kept.dtype).tiny) * torch.eye(len(kept)).to(kept)
        self.change = down @ torch.linalg.solve(kept + ridge, down.T @ statistics.gram @ weight.T) - weight.T

    def error(self, values: Mapping[torch.fx.Node, torch.Tensor], mask: torch.Tensor | None) -> torch.Tensor:
        """(tokens, out): what the cut changes in the reader's output."""
        assert self.inputs.hidden is not None
        rows = token_rows(values[self.inputs.hidden].detach(), mask)
        return rows @ self.change.to(rows.dtype)


def _prices(
    graph: FxGraph,
    probes: Sequence[_Probe],
    batches: Sequence[Inputs],
    task: str,
    seed: int,
    advanced: Callable[[], None],
) -> dict[str, float]:
    execution = Execution(graph)
    generator = torch.Generator().manual_seed(seed)
    total = {probe.region.name: 0.0 for probe in probes}
    tokens = 0
    # The run halts before an attention whose scores a probe changes; autograd follows from the first region on.
    halts = {min(execution.index[graph.node(n)] for n in p.region.writers): p for p in probes if p.weights}
    first = min(execution.index[graph.node(name)] for probe in probes for name in probe.region.writers)
    kept = {node for probe in probes for node in (probe.inputs.hidden, probe.output) if node is not None}
    for batch in batches:
        mask = batch.get("attention_mask")
        environment = execution.start(batch)
        execution.run(environment, 0, first)
        values: dict[torch.fx.Node, torch.Tensor] = {}
        for node, value in environment.items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                environment[node] = value.detach().requires_grad_()
        errors: dict[str, torch.Tensor] = {}
        position = first
        ends = [*sorted(halt for halt in halts if halt >= first), len(execution.nodes)]
        for end in ends:
            wanted = [*kept, execution.results[0]] if end == ends[-1] else [*kept]
            values |= execution.run(environment, position, end, keep=wanted, gradients=True)
            position = end
            if end in halts:
                probe = halts[end]
                stop = execution.index[probe.output] + 1
                changed = execution.run(dict(environment), end, stop, keep=[probe.output], parameters=probe.weights)
                errors[probe.region.name] = changed[probe.output]
        outputs = list(dict.fromkeys(probe.output for probe in probes))
        loss = _sampled_loss(values[execution.results[0]], mask, task, generator)
        slopes = dict(zip(outputs, torch.autograd.grad(loss, [values[node] for node in outputs]), strict=True))
        for probe in probes:
            slope = token_rows(slopes[probe.output], mask)
            if probe.weights:
                error = token_rows(errors[probe.region.name] - values[probe.output].detach(), mask)
            else:
                error = probe.error(values, mask)
            total[probe.region.name] += float((slope.double() * error.double()).sum(-1).square().sum()) / 2
        tokens += int(mask.sum()) if mask is not None else batch["input_ids"].numel()
        advanced()
    return {name: value / max(tokens, 1) for name, value in total.items()}


def _sampled_loss(
    output: torch.Tensor, mask: torch.Tensor | None, task: str, generator: torch.Generator
) -> torch.Tensor:
    """The scalar whose gradients' outer products are, in the mean, the Fisher information of the first output.

    A decoder's: minus the log-likelihood of one token a position, drawn from the model. An encoder's: the output
    along a random direction, in units of its root mean square, since a Gaussian's information is the identity.
    """
    rows = token_rows(output, mask)
    if task == "encoder":
        noise = torch.randn(rows.shape, generator=generator).to(rows)
        # Twice the squared error is what a Gaussian's divergence halves.
        return (rows * noise).sum() * (2.0 / rows.detach().square().sum(-1).mean()).sqrt()
    logs = rows.float().log_softmax(-1)
    # By the inverse of the distribution function, from numbers drawn on the CPU: the same on every device.
    with torch.no_grad():
        uniform = torch.rand(len(rows), 1, generator=generator).to(logs.device)
        drawn = (logs.exp().cumsum(-1) < uniform).sum(-1, keepdim=True).clamp_max(logs.shape[-1] - 1)
    return -logs.gather(1, drawn).sum()
