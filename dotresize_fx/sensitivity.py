"""How much the model's answers suffer from a cut to each width of each region, from a few runs of the dense model.

The shape of a region's curve comes from its solver and the dense model's Gram matrices; its height from one probe:
the model is run on with that region alone cut, from where the cut is on, and the answers are compared with the dense
model's. A few hundred tokens do: every token says how far its whole distribution moved, not how one token's loss did.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import torch

from dotresize_fx.fidelity import Inputs
from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.gram import GramAccumulator, RegionStatistics, padding_mask
from dotresize_fx.prices import price_probes
from dotresize_fx.probe import Probe
from dotresize_fx.ranks import Ranks
from dotresize_fx.region_inputs import RegionInputs
from dotresize_fx.regions import Region
from dotresize_fx.solvers import CURVES
from dotresize_fx.task import reads_text

# Tokens whose Gram matrices give the curves, and tokens that price the probes.
SHAPE_TOKENS = 4096
# An encoder has one answer a sequence.
PRICE_TOKENS = {"decoder": 528, "logits": 528, "encoder": 3072, "outputs": 3072}
# Of a decoder's sequence that prices no more is run, so that few tokens are of several texts.
PRICE_LENGTH = 176
# Tokens that are run at once.
PIECE = 512
# A GPU takes so many times as many tokens, and so many times as many at once; of those that shape the curves, whose
# answers are not computed, so many times as many again.
GPU_SCALE = 16
GPU_PIECE_SCALE = 4
GPU_SHAPING_SCALE = 4


def measure_curves(
    graph: FxGraph,
    regions: Sequence[Region],
    batches: Sequence[Inputs],
    *,
    task: str = "decoder",
    advanced: Callable[[], None] = lambda: None,
    ranks: Ranks | None = None,
) -> dict[str, torch.Tensor]:
    """Region name -> (n + 1,) float64 on the CPU: the predicted loss at each width, in nats a token.

    For encoders (``task``) the loss is the cosine that pooled embeddings lose: errors of single tokens average out in
    them and those that a whole sequence shares do not. For outputs of any other kind it is their squared error,
    relative. Regions come in graph order. ``advanced`` is called once a region and once a batch that prices. ``ranks``
    share the batches.
    """
    ranks = ranks or Ranks(alone=True)
    watched = [RegionInputs(graph, region) for region in regions]
    shaping, pricing = shaping_and_pricing(graph, batches, task)
    shapes: dict[str, torch.Tensor] = {}
    probes: list[Probe] = []
    at_once = GPU_SHAPING_SCALE if reads_text(task) and _on_gpu(batches) else 1
    for inputs, found in dense_statistics(graph, watched, shaping, ranks, at_once):
        region = inputs.region
        shapes[region.name] = CURVES[region.kind](region, found)
        probes.append(Probe(inputs, found))
        advanced()
    curves = {region.name: shapes[region.name] for region in regions}
    prices = price_probes(graph, probes, pricing, task, advanced, ranks)
    for probe in probes:
        name = probe.region.name
        curves[name] = priced(curves[name], probe.width, prices[name])
    return curves


def priced(curve: torch.Tensor, width: int, price: float) -> torch.Tensor:
    """(n + 1,) on the CPU: the curve in the unit of ``price``, which is what the cut to ``width`` loses."""
    n, height = len(curve) - 1, float(curve[width])
    if height <= 0:  # nothing is known of it: in proportion to what goes
        curve, height = torch.arange(n, -1, -1, dtype=torch.float64), float(n - width)
    return (curve / height * price).cpu()


def _ids(batch: Inputs) -> int:
    return batch["input_ids"].numel()


def shaping_and_pricing(
    graph: FxGraph, batches: Sequence[Inputs], task: str
) -> tuple[Sequence[Inputs], Sequence[Inputs]]:
    """:func:`disjoint`, of a graph that says how many rows inputs make that are no text."""
    return disjoint(batches, task, _ids if reads_text(task) else graph.expected_rows)


def disjoint(
    batches: Sequence[Inputs], task: str, tokens: Callable[[Inputs], int] = _ids
) -> tuple[Sequence[Inputs], Sequence[Inputs]]:
    """Batches that shape the curves and others that price the probes, spread evenly over the text.

    A probe has to be priced on text that it was not fitted to: what the first layers put out follows from the token
    alone, and of few tokens a cut learns each. Batches of inputs that are no text are taken as they are;
    ``tokens`` says how many one has.
    """
    on_gpu = _on_gpu(batches)
    pieces = batches
    if reads_text(task):
        pieces = [piece for batch in batches for piece in _pieces(batch, PIECE * (GPU_PIECE_SCALE if on_gpu else 1))]
        pieces = [piece for piece in pieces if "attention_mask" not in piece or piece["attention_mask"].any()] or pieces
    if len(pieces) == 1:
        return pieces, pieces
    scale = GPU_SCALE if on_gpu else 1
    short = [_cropped(piece, PRICE_LENGTH * scale) for piece in pieces] if task == "decoder" else pieces
    # One piece in three at most prices; all the others may shape.
    priced = max(1, min(len(pieces) // 3, round(scale * PRICE_TOKENS[task] / _mean(tokens, short))))
    chosen = {(2 * i + 1) * len(pieces) // (2 * priced) for i in range(priced)}
    others = [piece for i, piece in enumerate(pieces) if i not in chosen]
    count = min(len(others), max(1, round(scale * SHAPE_TOKENS / _mean(tokens, pieces))))
    return [others[i * len(others) // count] for i in range(count)], [short[i] for i in sorted(chosen)]


def joined(pieces: Sequence[Inputs], most: int) -> list[Inputs]:
    """As many neighbours of the same shapes as one, up to so many."""
    runs: list[list[Inputs]] = []
    for piece in pieces:
        last = runs[-1] if runs else []
        shapes = [{name: value.shape for name, value in one.items()} for one in (*last[:1], piece)]
        if last and len(last) < most and shapes[0] == shapes[1]:
            last.append(piece)
        else:
            runs.append([piece])
    return [
        run[0] if len(run) == 1 else {name: torch.cat([piece[name] for piece in run]) for name in run[0]}
        for run in runs
    ]


def _on_gpu(batches: Sequence[Inputs]) -> bool:
    return next(iter(batches[0].values())).is_cuda


def _pieces(batch: Inputs, tokens: int) -> Sequence[Inputs]:
    """The batch in pieces of at most so many tokens, or of one sequence."""
    count, length = batch["input_ids"].shape
    rows = max(1, tokens // length)
    return [{name: value[i : i + rows] for name, value in batch.items()} for i in range(0, count, rows)]


def _cropped(piece: Inputs, length: int) -> Inputs:
    """The beginnings of the sequences, where these have no padding."""
    return piece if padding_mask(piece) is not None else {name: value[:, :length] for name, value in piece.items()}


def _mean(tokens: Callable[[Inputs], int], pieces: Sequence[Inputs]) -> float:
    return sum(map(tokens, pieces)) / len(pieces)


def dense_statistics(
    graph: FxGraph, watched: Sequence[RegionInputs], batches: Sequence[Inputs], ranks: Ranks, at_once: int = 1
) -> Iterator[tuple[RegionInputs, RegionStatistics]]:
    """What readers read; for queries and keys, which nothing but the attention reads, what their writers do.

    All batches go from one watched place to the next together, so that the sums of few regions are held at once.
    ``at_once`` neighbours are joined.
    """
    execution = Execution(graph)
    at: dict[torch.fx.Node, list[RegionInputs]] = defaultdict(list)
    turning: dict[torch.fx.Node, list[RegionInputs]] = defaultdict(list)
    done: dict[torch.fx.Node, list[RegionInputs]] = defaultdict(list)
    for inputs in watched:
        node = inputs.hidden or inputs.entry
        assert node is not None
        at[node].append(inputs)
        last = node
        if inputs.turning:  # often behind the linears
            turned = max(inputs.turning, key=execution.position)
            turning[turned].append(inputs)
            last = max(node, turned, key=execution.position)
        done[last].append(inputs)
    execution.hold(way for inputs in watched for way in inputs.routing)
    sums = {inputs.region.name: (inputs.new_sums(), GramAccumulator()) for inputs in watched}
    near: dict[str, torch.Tensor | None] = {}
    batches = joined([batches[i] for i in ranks.mine(len(batches))], at_once)
    masks, environments = [padding_mask(batch) for batch in batches], [execution.start(batch) for batch in batches]
    position = 0
    for node in sorted({*at, *turning}, key=execution.position):
        keep = {node, *(table for inputs in turning[node] for table in inputs.turning)}
        keep |= {way for inputs in at[node] for way in inputs.routing}
        stop = execution.position(node) + 1
        for mask, environment in zip(masks, environments, strict=True):
            values = execution.run(environment, position, stop, keep=keep)
            for inputs in at[node]:
                read, entered = sums[inputs.region.name]
                if inputs.hidden is not None:
                    inputs.add_rows(read, values, mask)
                elif (rows := inputs.entry_rows(values, mask)) is not None:
                    entered.add(rows)
            for inputs in turning[node]:
                if near.get(inputs.region.name) is None:
                    near[inputs.region.name] = inputs.coherence(values, mask)
        position = stop
        for inputs in done[node]:
            name, device = inputs.region.name, graph.weight(inputs.writers[0]).device
            read, entered = sums.pop(name)
            read.add_up(ranks, device)
            entered.add_up(ranks, device)
            yield inputs, inputs.statistics(read, entered, ranks.first_matrix(near.get(name), device))
