"""Find the transformer blocks of a graph: what repeats along its residual stream. Reads only."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from dotresize_fx.cache_names import PAST
from dotresize_fx.errors import NothingToSlimError
from dotresize_fx.graph import Graph, Kind, Op, Value

_LAYER = re.compile(rf"^({PAST}[._])\d+([._])")


@dataclass(frozen=True)
class Block:
    """One block, between the stream's states ``start`` and ``end``.

    ``ops`` are the names of what lies between, in topological order, the op that puts out ``end`` the last. ``states``
    are the outputs that everything in it passes through, ``end`` among them. ``owned`` are, in the order of ops, the op
    names that have weights of their own. ``caches`` are the graph's outputs with its keys and values. Blocks with the
    same ``form`` compute the same but for their weights, and read the same from outside.
    """

    start: Value
    end: Value
    ops: tuple[str, ...]
    states: tuple[str, ...]
    owned: tuple[str, ...]
    caches: tuple[str, ...]
    form: tuple[object, ...]


def find_blocks(graph: Graph) -> list[Block]:
    """All blocks, in order: from before one attention to before the next.

    The stream's states are what every way from the embedding to the outputs passes through (post-dominators).

    Raises:
        NothingToSlimError: there are none, or they are no stack of blocks, each with weights of its own.
    """
    states = _states(graph)
    between = [_between(graph, *pair) for pair in itertools.pairwise(states)]
    starts = [i for i, ops in enumerate(between) if any(_is_attention(op) for op in ops)]
    if not starts:
        raise NothingToSlimError("no blocks found: no attention lies between two states of a residual stream")
    steps = {after - before for before, after in itertools.pairwise(starts)}
    if len(steps) > 1:
        raise NothingToSlimError("the blocks are not built alike: attention does not come at even steps of the stream")
    step = steps.pop() if steps else max(1, len(between) - starts[0] - 1)
    blocks = []
    for first in starts:
        if first + step > len(between):
            raise NothingToSlimError("the blocks are not built alike: the last one is shorter than the others")
        ops = [op for part in between[first : first + step] for op in part]
        blocks.append(_block(graph, states[first], ops, [state.name for state in states[first + 1 : first + step + 1]]))
    _check(graph, blocks)
    return blocks


def _is_attention(op: Op) -> bool:
    return op.kind is Kind.ATTENTION


def _carries(op: Op) -> bool:
    """Whether more of a value goes on than its sizes."""
    return op.attributes.get("form") != "size"


def _states(graph: Graph) -> list[Value]:
    """From the embedding on, or of a model without one from its input, the values that all ways to the outputs pass
    through.
    """
    order = [op for op in graph.ops if _carries(op)]
    place = {op.name: i for i, op in enumerate(order)}
    end = len(order)
    following: list[int | None] = [None] * len(order)  # the next op that all ways lead through; ``end`` is the outside
    depth = [0] * (len(order) + 1)
    for i in range(len(order) - 1, -1, -1):
        op = order[i]
        users = [place[user.name] for user in _readers(graph, op) if user.name in place]
        ways = [user for user in users if following[user] is not None]
        if op.output in graph.outputs and op.output.name not in graph.caches:
            ways.append(end)
        if not ways:
            continue
        met = ways[0]
        for way in ways[1:]:
            while met != way:
                deeper = met if depth[met] >= depth[way] else way
                above = following[deeper]
                assert above is not None
                met, way = (above, way) if deeper == met else (met, above)
        following[i], depth[i] = met, depth[met] + 1
    starts = [i for i, op in enumerate(order) if op.kind is Kind.EMBEDDING]
    if not starts and any("quantised" in op.attributes for op in order):
        raise NothingToSlimError("its table of tokens is quantised, which hides its blocks: give the model before that")
    if starts:  # not a table of distances, which enters with the first attention
        reached = {i: _linears_behind(graph, order[i]) for i in starts}
        starts = [i for i in starts if reached[i] == max(reached.values())]
    else:
        starts = [i for i, op in enumerate(order) if any(_is_given(graph, value) for value in op.inputs)]
    at: int | None = max(starts, key=lambda i: (depth[i], -i), default=None)
    found = []
    while at is not None and at != end:
        found.append(order[at].output)
        at = following[at]
    return found


def _linears_behind(graph: Graph, op: Op) -> int:
    seen, waiting, count = {op.name}, [op], 0
    while waiting:
        for user in _readers(graph, waiting.pop()):
            if user.name not in seen and _carries(user):
                seen.add(user.name)
                waiting.append(user)
                count += user.is_linear
    return count


def _readers(graph: Graph, op: Op) -> list[Op]:
    """Ops that read anything that the op puts out."""
    return [user for value in (op.output, *graph.beside(op)) for user in graph.users(value)]


def _is_given(graph: Graph, value: Value) -> bool:
    """Whether it is an input of the graph."""
    return not value.is_parameter and graph.producer(value) is None


def _between(graph: Graph, start: Value, end: Value) -> list[Op]:
    """The ops on the ways from one value to the other, the one that puts out ``end`` the last."""
    behind: dict[str, Op] = {}
    waiting = graph.users(start)
    while waiting:
        found_behind = [op for op in waiting if op.name not in behind and _carries(op)]
        behind |= {op.name: op for op in found_behind}
        waiting = [user for op in found_behind if op.output != end for user in _readers(graph, op)]
    wanted, found = {end.name}, []
    for op in sorted(behind.values(), key=lambda one: graph.positions[one.name], reverse=True):
        if wanted & {value.name for value in (op.output, *graph.beside(op))}:
            found.append(op)
            wanted.update(value.name for value in op.inputs)
    return found[::-1]


def _block(graph: Graph, start: Value, ops: Sequence[Op], states: Sequence[str]) -> Block:
    put_out = [(op.output, *graph.beside(op)) for op in ops]
    inside = {start.name: "start"}
    inside |= {value.name: f"{i}.{j}" for i, values in enumerate(put_out) for j, value in enumerate(values)}
    seen: dict[str, str] = {}
    form: list[object] = []
    for op in ops:
        tables = op.inputs[1:] if op.attributes.get("rotary") else ()
        inputs = tuple(
            inside[value.name]
            if value.name in inside
            else f"own {value.shape}"
            if value.is_parameter and not graph.is_buffer(value) and value not in tables
            else _spelled(graph, value, seen)
            for value in op.inputs
        )
        own = None if op.weight is None else tuple(graph.weight(op).shape)
        form.append((str(op.kind), op.spelling, _told(op.attributes), graph.details(op), inputs, own, op.bias is None))
    owned = tuple(op.name for op in ops if op.weight is not None or op.bias is not None)
    handed = [name for op in ops for name in (op.output.name, *op.attributes.get("cache", {}).values())]
    caches = tuple(name for name in handed if name in graph.caches)
    names = tuple(op.name for op in ops)
    return Block(start, graph.op(names[-1]).output, names, tuple(states), owned, caches, tuple(form))


def _told(attributes: Mapping[str, object]) -> str:
    return repr(sorted((name, repr(value)) for name, value in attributes.items() if name != "cache"))


def _spelled(graph: Graph, value: Value, seen: dict[str, str]) -> str:
    """How a value from outside is made, the same text for values made alike; of caches the layer is left out."""
    if value.name not in seen:
        op = graph.producer(value)
        if value.is_parameter:  # a layer may hold a copy of its own of the same table
            numbers = graph.parameter(value).detach().cpu().reshape(-1).contiguous().view(torch.uint8)
            seen[value.name] = f"{value.shape} {hash(numbers.numpy().tobytes()):x}"
        elif op is None:
            seen[value.name] = _LAYER.sub(r"\1N\2", value.name)
        else:
            seen[value.name] = f"value {len(seen)}"  # should a graph go in circles
            read = [_spelled(graph, one, seen) for one in (*op.inputs, op.weight, op.bias) if one is not None]
            made = repr((str(op.kind), op.spelling, _told(op.attributes), graph.details(op), read))
            seen[value.name] = f"{op.spelling} {hash(made):x}"
    return seen[value.name]


def _check(graph: Graph, blocks: Sequence[Block]) -> None:
    """Depth can change where each block has weights of its own and attends to the stream alone."""
    for block in blocks:
        inside = set(block.ops)
        for name in block.ops:
            op = graph.op(name)
            if any(not value.is_parameter and not _comes_from(graph, value, inside) for value in _attended(op)):
                raise NothingToSlimError(
                    "its blocks attend to another stack's output (an encoder-decoder model): their depth cannot change"
                )
            for value in (op.weight, op.bias):
                if value is not None and any(user.name not in inside for user in graph.users(value)):
                    raise NothingToSlimError(
                        f"{graph.parameter_name(value)}: blocks share one set of weights, so their depth cannot change"
                    )


def _attended(op: Op) -> tuple[Value, ...]:
    """An attention's queries, keys and values, or weights and values of one that only mixes; nothing of other ops."""
    if not _is_attention(op) or "scale" not in op.attributes:
        return ()
    return op.inputs[: 2 if op.attributes.get("mixes") else 3]


def _comes_from(graph: Graph, value: Value, inside: set[str]) -> bool:
    """Whether a value is made by one of these ops."""
    op = graph.producer(value)
    return op is not None and op.name in inside
