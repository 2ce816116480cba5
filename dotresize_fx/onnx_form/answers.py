"""An ONNX graph's answers, and what other runs of it lose of them; summed in ONNX Runtime, a number a batch."""

from __future__ import annotations

import numpy as np
import torch

from dotresize_fx.answers import SHORTLIST
from dotresize_fx.graph import Kind, Op
from dotresize_fx.onnx_form.execution import OnnxExecution
from dotresize_fx.onnx_form.gram_nodes import GramNodes
from dotresize_fx.onnx_form.piece import Environment
from dotresize_fx.onnx_form.runtime_values import to_runtime
from dotresize_fx.onnx_form.stream import OnnxStream
from dotresize_fx.task import predicts_tokens

_DENSE = "dotresize_fx.dense"
_HEAD = "dotresize_fx.head"


class OnnxAnswers:
    """The graph's first output, what it says of each batch, and how far another run is from that.

    Where a head makes a decoder's answers, ``name`` is what it reads, and only the SHORTLIST tokens that the dense
    graph finds likeliest on the batch are scored, as :mod:`dotresize_fx.prices` has it.
    """

    def __init__(self, execution: OnnxExecution, task: str) -> None:
        self.execution, self.task = execution, task
        self.answer = execution.results[0]
        self.head = _head(execution, self.answer) if predicts_tokens(task) else None
        self.name = self.answer if self.head is None else self.head.inputs[0].name

    def of(self, stream: OnnxStream) -> list[Environment]:
        """By batch, what :meth:`lost` reads of the dense graph; the stream stands at its start."""
        execution = self.execution
        end = len(execution.nodes)
        if self.head is None:
            whole = stream.piece(end, [self.answer])
            return [{_DENSE: whole.run(environment)[0][self.answer]} for environment in stream.environments]
        weight = execution.graph.weight(self.head).float()
        likely = GramNodes()
        rows, counted = likely.rows(self.answer)
        real = likely.node("Cast", [counted], to=1)
        chances = likely.node("Softmax", [rows], axis=1)
        likely.take("likely", likely.node("Gemm", [real, chances], transA=1))
        whole = stream.piece(end, [self.name], likely)
        scored = GramNodes()
        scored.take("dense", scored.node("MatMul", [scored.flat(self.name), scored.flat(_HEAD)]))
        products = execution.piece(end, end, [], scored)
        found: list[Environment] = []
        for environment, mask in zip(stream.environments, stream.masks, strict=True):
            values, sums = whole.run(environment, mask)
            chosen = torch.from_numpy(sums["likely"]).reshape(-1).topk(SHORTLIST).indices
            head = {_HEAD: to_runtime(weight[chosen].T, execution.device)}
            _, sums = products.run(values, None, head)
            found.append({**head, _DENSE: to_runtime(torch.from_numpy(sums["dense"]), execution.device)})
        return found

    def lost(self) -> GramNodes:
        """Sums ``lost`` and ``count`` of what a run loses against the dense one.

        Of a decoder KL(dense || cut), of an encoder 1 - cosine of the embeddings (of three axes: means over the
        tokens), of other outputs |cut - dense|² / |dense|² of all rows.
        """
        nodes = GramNodes()
        if self.task == "encoder":
            _cosine_lost(nodes, self.answer, pooled=len(self.execution.graph.shape_of(self.answer)) == 3)
            return nodes
        dense, counted = nodes.rows(_DENSE)
        cut, _ = nodes.rows(self.name)
        if self.head is not None:
            cut = nodes.node("MatMul", [cut, nodes.flat(_HEAD)])
        number = nodes.node("ReduceSum", [nodes.node("Cast", [counted], to=1)], keepdims=0)
        nodes.take("count", number)
        if predicts_tokens(self.task):
            first, second = (nodes.node("LogSoftmax", [rows], axis=1) for rows in (dense, cut))
            away = nodes.node("Mul", [nodes.node("Exp", [first]), nodes.node("Sub", [first, second])])
            nodes.take("lost", nodes.node("ReduceSum", [nodes.node("Cast", [away], to=11)], keepdims=0))
            return nodes
        error = nodes.square(nodes.node("Sub", [cut, dense]))
        share = nodes.node("Div", [error, nodes.node("Add", [nodes.square(dense), nodes.constant(np.float64(1e-300))])])
        nodes.take("lost", nodes.node("Mul", [share, nodes.node("Cast", [number], to=11)]))
        return nodes


def _head(execution: OnnxExecution, answer: str) -> Op | None:
    """The linear that gives the answer, where it has no bias and more rows than are scored."""
    graph = execution.graph
    op: Op = graph.op(answer)
    while op.kind is Kind.KEEP and (before := graph.producer(op.inputs[0])) is not None:
        op = before
    large = op.kind is Kind.LINEAR and op.bias is None and len(graph.weight(op)) > SHORTLIST
    return op if large else None


def _cosine_lost(nodes: GramNodes, answer: str, *, pooled: bool) -> None:
    """Products alone: sums along an axis are spelled in other ways from opset to opset."""
    embedded = [_embeddings(nodes, value) if pooled else nodes.flat(value) for value in (_DENSE, answer)]
    vectors = [nodes.node("Cast", [value], to=11) for value in embedded]
    first, second = (nodes.node("LpNormalization", [value], axis=-1, p=2) for value in vectors)
    together = nodes.node("ReduceSum", [nodes.node("Mul", [first, second])], keepdims=0)
    count = nodes.node("Gather", [nodes.node("Shape", [first]), nodes.constant(np.int64(0))], axis=0)
    count = nodes.node("Cast", [count], to=11)
    nodes.take("count", count)
    nodes.take("lost", nodes.node("Sub", [count, together]))


def _embeddings(nodes: GramNodes, value: str) -> str:
    """(batch, width): the sum over the real rows of each sequence, whose direction is the mean's."""
    rows, _ = nodes.rows(value)
    shaped = nodes.node("Reshape", [rows, nodes.node("Shape", [value])])
    length = nodes.node("Gather", [nodes.node("Shape", [value]), nodes.constant(np.array([1]))], axis=0)
    ones = nodes.node("Expand", [nodes.constant(np.ones((1, 1), np.float32)), _sizes(nodes, length)])
    return nodes.node("Flatten", [nodes.node("MatMul", [ones, shaped])], axis=1)


def _sizes(nodes: GramNodes, length: str) -> str:
    return nodes.node("Concat", [nodes.constant(np.array([1])), length], axis=0)
