"""Refit what reads a cut stream behind a norm, so that it puts out what the dense model's reader does.

What a cut leaves out of the stream is correlated with what it keeps, and the norm of k channels is not that of d: both
is made good by least squares, reader by reader.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

import torch

from dotresize_fx.activation_stream import ActivationStream
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.gram import GramAccumulator, token_rows, with_ones
from dotresize_fx.graph import Kind
from dotresize_fx.least_squares import refit_reader

# Tokens that say which directions of the logits matter, and the ridge of their metric, relative to its mean.
METRIC_TOKENS = 8192
METRIC_RIDGE = 1e-4


@dataclass(frozen=True)
class Entry:
    """``reader`` names a linear of the slim graph. It should put out ``weight`` (out, n + 1; float64) times what the
    dense model has at the node ``dense`` (tokens, n) and a constant one. ``head`` names the linear behind it where that
    is a head whose table is not refitted.
    """

    reader: str
    dense: torch.fx.Node
    weight: torch.Tensor
    head: str = ""

    @classmethod
    def of(cls, slim: FxGraph, dense: FxGraph, name: str) -> Entry | None:
        """Of a linear that both graphs have; None where the dense one has none, or something shares the weight."""
        shared = slim.op(name).weight
        if name not in dense.positions or shared is None or len(slim.users(shared)) > 1:
            return None
        op = dense.op(name)
        if op.kind is not Kind.LINEAR:
            return None
        weight, bias = dense.weight(op).double(), dense.bias(op)
        column = weight.new_zeros(len(weight)) if bias is None else bias.double()
        return cls(name, dense.node(op.inputs[0].name), torch.cat([weight, column[:, None]], 1))


def refit_entries(
    stream: ActivationStream,
    entries: Sequence[Entry],
    seen: Mapping[torch.fx.Node, Sequence[torch.Tensor]],
    masks: Sequence[torch.Tensor | None],
    measuring: Container[int],
    pull: float,
) -> bool:
    """Refit them in place, each where held-out batches say that it helps; returns whether any was.

    seen: by the entries' dense nodes one value per batch. measuring: which batches are held out. ``pull`` is that of
    :func:`dotresize_fx.least_squares.refit_reader`.
    """
    graph = stream.execution.graph
    groups: dict[tuple[torch.fx.Node, torch.fx.Node], list[Entry]] = defaultdict(list)
    for entry in entries:
        groups[graph.node(graph.op(entry.reader).inputs[0].name), entry.dense].append(entry)
    changed = False
    for (hidden, dense), group in groups.items():
        fitting, held_out = GramAccumulator(), GramAccumulator()
        stop = max(stream.position, stream.execution.position(hidden) + 1)
        for i, environment in enumerate(stream.environments):
            value = stream.execution.run(dict(environment), stream.position, stop, keep=[hidden])[hidden]
            rows = with_ones(token_rows(value, masks[i]))
            (held_out if i in measuring else fitting).add(rows, dense=with_ones(token_rows(seen[dense][i], masks[i])))
        for entry in group:
            changed |= _refit(graph, entry, fitting, held_out, pull)
    return changed


def _refit(graph: FxGraph, entry: Entry, fitting: GramAccumulator, held_out: GramAccumulator, pull: float) -> bool:
    op = graph.op(entry.reader)
    weight, bias = graph.weight(op).double(), graph.bias(op)
    old = weight if bias is None else torch.cat([weight, bias.double()[:, None]], 1)
    kept = slice(None, old.shape[1])  # without the constant one where there is no bias
    gram, wanted = fitting.gram[kept, kept], fitting.cross["dense"][kept] @ entry.weight.T
    found = refit_reader(gram, wanted, gram @ old.T, with_bias=bias is not None, pull=pull)
    new = found.weight if found.bias is None else torch.cat([found.weight, found.bias[:, None]], 1)
    if held_out.tokens:
        gram, wanted = held_out.gram[kept, kept], held_out.cross["dense"][kept] @ entry.weight.T
        if _error(new, gram, wanted) >= _error(old, gram, wanted):
            return False
    graph.set_weight(op, found.weight.to(graph.weight(op).dtype))
    if found.bias is not None and bias is not None:
        graph.set_bias(graph.op(op.name), found.bias.to(bias.dtype))
    return True


def _error(weight: torch.Tensor, gram: torch.Tensor, wanted: torch.Tensor) -> float:
    """||X W.T - Y||² - ||Y||², of X.T X and X.T Y."""
    return float(((gram @ weight.T) * weight.T).sum() - 2 * (wanted * weight.T).sum())


def head_entry(slim: FxGraph, dense: ActivationStream, name: str, masks: Sequence[torch.Tensor | None]) -> Entry | None:
    """Of a linear of the slim graph alone that stands in front of an output, or of a head whose table is not refitted.

    What the head's logits miss is least, in the metric in which the dense model's answers feel it (F, the Fisher
    information of its softmax, a mean over tokens), where the linear puts out T times what the dense head reads,
    T = (E'.T F E')^-1 E'.T F E of the tables E' (slim) and E.
    """
    graph = dense.execution.graph
    if name in graph.positions:
        return None
    results = list(slim.nodes.output_node().all_input_nodes)
    if slim.node(name) in results:  # it undoes the basis in front of an output
        node = dense.execution.results[results.index(slim.node(name))]
        width = slim.weight(slim.op(name)).shape[0]
        identity = torch.eye(width, width + 1, dtype=torch.float64, device=slim.weight(slim.op(name)).device)
        return Entry(name, node, identity)
    users = slim.users(slim.op(name).output)
    if len(users) != 1 or users[0].kind is not Kind.LINEAR or users[0].name not in graph.positions:
        return None
    head = graph.op(users[0].name)
    narrow, wide = slim.weight(users[0]), graph.weight(head)
    metric = _metric(dense, torch.cat([narrow, wide], 1), masks)
    if metric is None:
        return None
    k = narrow.shape[1]
    square = metric[:k, :k]
    ridge = METRIC_RIDGE * square.diagonal().mean() * torch.eye(k, dtype=square.dtype, device=square.device)
    target = torch.linalg.solve(square + ridge, metric[:k, k:])
    return Entry(name, graph.node(head.inputs[0].name), torch.cat([target, target.new_zeros(k, 1)], 1), head.name)


@torch.no_grad()
def _metric(dense: ActivationStream, tables: torch.Tensor, masks: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """(m, m) float64: tables.T (diag p - p p.T) tables, a mean over tokens; tables (vocabulary, m). None where the
    program's first output is no row of logits over the vocabulary.
    """
    execution = dense.execution
    result = execution.results[0]
    tokens = 0
    probability = torch.zeros(len(tables), dtype=torch.float64, device=tables.device)
    seen = torch.zeros(tables.shape[1], tables.shape[1], dtype=torch.float64, device=tables.device)
    for i in _spread(len(dense.environments)):
        value = execution.run(dict(dense.environments[i]), dense.position, len(execution.nodes), keep=[result])[result]
        if value.shape[-1] != len(tables):
            return None
        share = token_rows(value, masks[i]).float().softmax(-1)
        means = share @ tables.float()
        seen += means.T @ means
        probability += share.sum(0)
        tokens += len(share)
        if tokens >= METRIC_TOKENS:
            break
    weighted = torch.zeros_like(seen)
    for part, mass in zip(torch.split(tables, 16384), torch.split(probability, 16384), strict=True):
        weighted += part.double().T @ (part.double() * mass[:, None])
    return (weighted - seen) / max(tokens, 1)


def _spread(count: int) -> list[int]:
    """All of 0 to count - 1, any first few of them spread over the whole."""
    generator = torch.Generator().manual_seed(0)
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order
