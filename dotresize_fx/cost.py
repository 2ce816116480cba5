"""What a graph costs: parameters, block linear weights, multiply-accumulates per token; and what a width costs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass

from dotresize_fx.graph import Graph, Kind, Op, Value
from dotresize_fx.regions import Region, RegionKind

COSTS = ("weights", "macs")
_THROUGH = (Kind.KEEP, Kind.SCALE, Kind.POINTWISE, Kind.RMS_NORM, Kind.LAYER_NORM)


@dataclass(frozen=True)
class Cost:
    """``parameters`` counts every stored weight once, tied ones too. MACs count a multiply and its add as one.

    ``block_macs_per_token`` are the block linears alone, ``attention_macs_per_token`` scores and mixing over ``length``
    keys; ``macs_per_token`` has both and the head.
    """

    parameters: int
    block_linear_weights: int
    block_macs_per_token: int
    attention_macs_per_token: int
    macs_per_token: int
    length: int


def count_cost(graph: Graph, length: int) -> Cost:
    """Count from shapes; nothing is run. Experts' weights all count, their MACs as often as a token is routed.

    Elementwise ops, norms, rotary embeddings and attention that is spelled without the fused op are not counted, nor
    are buffers parameters.
    """
    blocks = block_linears(graph)
    linears = [op for op in graph.ops if op.is_linear]
    weights = {op.weight: graph.weight(op).numel() for op in linears if op.weight is not None}
    block_weights = {op.weight: weights[op.weight] for op in blocks if op.weight is not None}
    owned = {v for op in graph.ops for v in (op.weight, op.bias) if v is not None}
    owned |= {v for op in graph.ops for v in op.inputs if v.is_parameter}
    parameters = sum(graph.parameter(v).numel() for v in owned if not graph.is_buffer(v))
    block_macs = sum(_linear_macs(graph, op) for op in blocks)
    linear_macs = sum(_linear_macs(graph, op) for op in linears)
    attention = sum(_attention_macs(op, length) for op in graph.ops if op.kind is Kind.ATTENTION)
    return Cost(parameters, sum(block_weights.values()), block_macs, attention, linear_macs + attention, length)


def _linear_macs(graph: Graph, op: Op) -> int:
    """Per token. Of experts those count that a token is routed to."""
    weight = graph.weight(op)
    if op.kind is not Kind.EXPERTS:
        return weight.numel()
    return round(weight[0].numel() * float(op.attributes.get("rows_per_token", len(weight))))


def _attention_macs(op: Op, length: int) -> int:
    """Scores and mixing of one query position against ``length`` keys, all heads; no causal half is saved."""
    if op.attributes.get("mixes"):  # of its scores nothing is known here; they are taken to cost what mixing does
        return 2 * query_heads(op) * length * (op.inputs[1].width or 0)
    if len(op.inputs) < 3:  # it has projections of its own, or all three in one
        return 0
    query, _, value = op.inputs[:3]
    return query_heads(op) * length * ((query.width or 0) + (value.width or 0))


def query_heads(op: Op) -> int:
    """Of an attention op; 0 where its query's shape does not tell."""
    shape = op.inputs[0].shape
    heads = shape[-3] if len(shape) > 2 else None
    return heads if isinstance(heads, int) else 0  # not told: its products are not counted


def block_linears(graph: Graph) -> list[Op]:
    """The linears of the transformer blocks: all but those that lead straight to an output, as a head does.

    A linear in front of the head with nothing but the head behind it (a tied head's gain) belongs to the head.
    """
    users: dict[Value, list[Op]] = defaultdict(list)
    for op in graph.ops:
        for value in op.inputs:
            users[value].append(op)
    outside: set[str] = set()

    def leads_out(op: Op) -> bool:
        return op.output in graph.outputs or (
            bool(users[op.output])
            and all(user.name in outside or (user.kind in _THROUGH and leads_out(user)) for user in users[op.output])
        )

    linears = [op for op in graph.ops if op.is_linear]
    for op in reversed(linears):
        if leads_out(op):
            outside.add(op.name)
    return [op for op in linears if op.name not in outside]


def one_stream(graph: Graph, tokens: int) -> int:
    """Bytes of the residual stream over so many tokens, in float32."""
    return 4 * tokens * stream_width(graph)


def stream_width(graph: Graph) -> int:
    """Width of what the first block linear reads; 0 without any."""
    linears = block_linears(graph)
    return int(graph.weight(linears[0]).shape[-1]) if linears else 0


def weights_per_unit(graph: Graph, region: Region) -> int:
    """Block linear weights that one unit of the region's width accounts for, over all heads where it has some."""
    blocks = {op.name for op in block_linears(graph)}
    names = [name for name in (*region.writers, *region.readers) if name in blocks]
    return sum(graph.weight(graph.op(name)).numel() // region.width for name in names)


def macs_per_unit(graph: Graph, region: Region, length: int) -> int:
    """MACs per token that one unit of the region's width accounts for: in block linears, and in the scores or the
    mixing of ``length`` keys.
    """
    blocks = {op.name for op in block_linears(graph)}
    ends = [graph.op(name) for name in (*region.writers, *region.readers) if name in blocks]
    linears = sum(_linear_macs(graph, op) // region.width for op in ends)
    if not region.attention or (op := graph.op(region.attention)).kind is not Kind.ATTENTION:
        return linears
    if region.kind is RegionKind.HEADS:
        return linears + _attention_macs(op, length) // region.width
    return linears + query_heads(op) * length


@dataclass(frozen=True)
class CostModel:
    """What a ratio is a share of. ``kind`` is of COSTS: the block linear weights, or the blocks' MACs per token, which
    are those of their linears and of attention over ``length`` keys.
    """

    kind: str = "weights"
    length: int = 1

    @property
    def name(self) -> str:
        """In words, to be read behind "of the"."""
        if self.kind == "weights":
            return "block weights"
        return f"blocks' MACs per token (attention over {self.length} tokens)"

    def total(self, graph: Graph) -> int:
        """Of the whole graph."""
        cost = count_cost(graph, self.length)
        if self.kind == "weights":
            return cost.block_linear_weights
        return cost.block_macs_per_token + cost.attention_macs_per_token

    def of(self, graph: Graph, names: Collection[str]) -> int:
        """Of the ops of these names."""
        linears = [op for op in block_linears(graph) if op.name in names]
        if self.kind == "weights":
            return sum(weight.numel() for weight in {op.weight: graph.weight(op) for op in linears}.values())
        attention = [op for op in graph.ops if op.name in names and op.kind is Kind.ATTENTION]
        macs = sum(_linear_macs(graph, op) for op in linears)
        return macs + sum(_attention_macs(op, self.length) for op in attention)

    def per_unit(self, graph: Graph, region: Region) -> int:
        """Of one unit of a region's width, over all heads where it has some."""
        if self.kind == "weights":
            return weights_per_unit(graph, region)
        return macs_per_unit(graph, region, self.length)
