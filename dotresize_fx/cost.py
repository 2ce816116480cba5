"""What a graph costs: parameters, block linear weights, multiply-accumulates per token."""

from __future__ import annotations

from dataclasses import dataclass

from dotresize_fx.graph import Graph, Kind, Op
from dotresize_fx.regions import Region

_THROUGH = (Kind.KEEP, Kind.SCALE, Kind.POINTWISE, Kind.RMS_NORM, Kind.LAYER_NORM)


@dataclass(frozen=True)
class Cost:
    """``parameters`` counts every stored weight once, tied ones too. MACs count a multiply and its add as one.

    ``block_macs_per_token`` are the block linears alone; ``macs_per_token`` adds head and attention, the latter
    over ``length`` keys.
    """

    parameters: int
    block_linear_weights: int
    block_macs_per_token: int
    macs_per_token: int
    length: int


def count_cost(graph: Graph, length: int) -> Cost:
    """Count from shapes; nothing is run.

    Elementwise ops, norms, rotary embeddings and attention that is spelled without the fused op are not counted, nor
    are buffers parameters.
    """
    blocks = block_linears(graph)
    linears = [op for op in graph.ops if op.kind is Kind.LINEAR]
    weights = {op.weight: graph.weight(op).numel() for op in linears if op.weight is not None}
    block_weights = {op.weight: weights[op.weight] for op in blocks if op.weight is not None}
    owned = {v for op in graph.ops for v in (op.weight, op.bias) if v is not None}
    owned |= {v for op in graph.ops for v in op.inputs if v.is_parameter}
    parameters = sum(graph.parameter(v).numel() for v in owned if not graph.is_buffer(v))
    block_macs = sum(weights[op.weight] for op in blocks if op.weight is not None)
    linear_macs = sum(weights[op.weight] for op in linears if op.weight is not None)
    attention = sum(_attention_macs(op, length) for op in graph.ops if op.kind is Kind.ATTENTION)
    return Cost(parameters, sum(block_weights.values()), block_macs, linear_macs + attention, length)


def _attention_macs(op: Op, length: int) -> int:
    """Scores and mixing of one query position against ``length`` keys, all heads; no causal half is saved."""
    query, _, value = op.inputs[:3]
    heads = query.shape[-3]
    assert isinstance(heads, int)
    return heads * length * ((query.width or 0) + (value.width or 0))


def block_linears(graph: Graph) -> list[Op]:
    """The linears of the transformer blocks: all but those that lead straight to an output, as a head does.

    A linear in front of the head with nothing but the head behind it (a tied head's gain) belongs to the head.
    """
    outside: set[str] = set()
    linears = [op for op in graph.ops if op.kind is Kind.LINEAR]
    for op in reversed(linears):
        if _leads_out(graph, op, outside):
            outside.add(op.name)
    return [op for op in linears if op.name not in outside]


def _leads_out(graph: Graph, op: Op, outside: set[str]) -> bool:
    if op.output in graph.outputs:
        return True
    users = graph.users(op.output)
    return bool(users) and all(
        user.name in outside or (user.kind in _THROUGH and _leads_out(graph, user, outside)) for user in users
    )


def weights_per_unit(graph: Graph, region: Region) -> int:
    """Block linear weights that one unit of the region's width accounts for, over all heads where it has some."""
    blocks = {op.name for op in block_linears(graph)}
    names = [name for name in (*region.writers, *region.readers) if name in blocks]
    return sum(graph.weight(graph.op(name)).numel() // region.width for name in names)
