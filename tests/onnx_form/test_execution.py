"""Pieces of an ONNX graph in ONNX Runtime against the same graph in torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn

from dotresize_fx.errors import OnnxRuntimeError
from dotresize_fx.onnx_form.execution import OnnxExecution
from dotresize_fx.onnx_form.gram_nodes import GramNodes
from dotresize_fx.onnx_form.graph import OnnxGraph
from dotresize_fx.onnx_form.runtime_values import from_runtime, to_numpy, to_runtime
from dotresize_fx.onnx_form.stream import OnnxStream

pytest.importorskip("onnxruntime")

VOCAB = 20
EXACT = 1e-5  # of the largest number: float32 sums in another order
Stream = Callable[..., tuple[nn.Module, OnnxGraph]]


def draw(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def test_a_whole_graph_and_any_pieces_of_it_give_the_same(stream: Stream, difference: Any) -> None:
    module, graph = stream()
    ids = draw(3, 7)
    expected = module(ids).detach()
    execution = OnnxExecution(graph)
    assert difference(execution.outputs({"ids": ids})[0], expected) <= EXACT
    for stride in (1, 4):
        walked = OnnxStream(execution, [execution.start({"ids": ids})], [None], held=["logits"])
        for stop in (*range(stride, len(execution.nodes), stride), len(execution.nodes)):
            walked.advance(stop)
        assert difference(from_runtime(walked.environments[0]["logits"]), expected) <= EXACT


def test_what_follows_from_constants_is_not_carried_along(stream: Stream) -> None:
    """A tied head's transposed table, which every batch would hold."""
    _, graph = stream()
    execution = OnnxExecution(graph)
    assert execution.is_static("t")
    assert {node.op_type for node in execution.nodes} & {"Transpose", "Constant"} == set()
    assert execution.needed_behind(execution.position("h") + 1) == ["x", "h"]


@pytest.mark.parametrize("padding", [0, 3])
def test_sums_are_those_of_the_real_rows(stream: Stream, padding: int) -> None:
    _, graph = stream()
    execution = OnnxExecution(graph)
    ids, mask = draw(3, 7), torch.ones(3, 7, dtype=torch.int64)
    mask[0, :padding] = 0
    nodes = GramNodes()
    nodes.add("read", "h", {"wanted": (("goal", 1.0), ("x2", -1.0), ("d", 1.0))}, ones=True)
    goal = torch.randn(3, 7, 8)
    piece = execution.piece(0, execution.position("x2") + 1, ["h", "x2", "d"], nodes)
    environment = execution.start({"ids": ids})
    values, sums = piece.run(environment, mask if padding else None, {"goal": to_runtime(goal)})
    h, x2, d = (from_runtime(values[name])[mask.bool()].double() for name in ("h", "x2", "d"))
    rows = torch.cat([h, torch.ones(len(h), 1, dtype=torch.float64)], 1)
    wanted = goal[mask.bool()].double() - x2 + d
    assert int(sums["read/tokens"]) == 21 - padding
    expected = {"gram": rows.T @ rows, "cross/wanted": rows.T @ wanted, "energy/wanted": wanted.square().sum()}
    for name, value in expected.items():
        assert np.abs(sums[f"read/{name}"] - value.numpy()).max() <= EXACT * value.abs().max(), name


def test_rows_that_do_not_count_may_hold_nan(onnx_graph: Any) -> None:
    graph = onnx_graph(
        """<ir_version: 10, opset_import: ["" : 20]>
        halves (float[batch, length, 8] x) => (float[batch, length, 12] y) { y = MatMul(x, "w") }""",
        {"w": torch.randn(12, 8)},
    )
    execution = OnnxExecution(graph)
    x, mask = torch.randn(2, 3, 8), torch.tensor([[0, 1, 1], [1, 1, 1]])
    x[0, 0] = torch.nan
    nodes = GramNodes()
    nodes.add("read", "y", {}, ones=False)
    _, sums = execution.piece(0, 1, [], nodes).run(execution.start({"x": x}), mask)
    assert np.isfinite(sums["read/gram"]).all()
    assert int(sums["read/tokens"]) == 5


def test_weights_that_stand_in_and_values_that_are_outputs_and_inputs(stream: Stream, difference: Any) -> None:
    module, graph = stream()
    ids, other = draw(2, 5), torch.randn(8, 12)
    overrides = {"down.weight": graph.as_stored(graph.op("d"), other), "down.bias": torch.zeros(8)}
    found = OnnxExecution(graph).outputs({"ids": ids}, overrides)[0]
    module.down.weight.data, module.down.bias.data = other, torch.zeros(8)
    assert difference(found, module(ids).detach()) <= EXACT
    execution = OnnxExecution(graph)
    values, _ = execution.piece(0, 2, ["ids"]).run(execution.start({"ids": ids}))
    assert torch.equal(from_runtime(values["ids"]), ids)


def test_bodies_read_the_graph_around_them() -> None:
    proto = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["" : 20]>
    choice (float[n, 2] x, bool c) => (float[n, 2] y) {
        a = Relu(x)
        b = Neg(x)
        y = If (c) <then_branch = t () => (float[n, 2] p) { p = Identity(a) },
                    else_branch = e () => (float[n, 2] q) { q = Identity(b) }>
    }""")
    execution = OnnxExecution(OnnxGraph(ir.from_proto(proto)))
    x = torch.randn(3, 2)
    walked = OnnxStream(execution, [execution.start({"x": x, "c": torch.tensor(False)})], [None], held=["y"])
    walked.advance(2)
    assert set(walked.environments[0]) == {"a", "b", "c", "x"}
    walked.advance(3)
    assert torch.equal(from_runtime(walked.environments[0]["y"]), -x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    kind = {torch.float16: "float16", torch.bfloat16: "bfloat16"}[dtype]
    proto = onnx.parser.parse_model(f"""<ir_version: 10, opset_import: ["" : 20]>
    half ({kind}[batch, 4] x) => ({kind}[batch, 4] y) {{ y = Identity(x) }}""")
    execution = OnnxExecution(OnnxGraph(ir.from_proto(proto)))
    x = torch.randn(5, 4).to(dtype)
    nodes = GramNodes()
    nodes.add("read", "x", {}, ones=False)
    values, sums = execution.piece(0, 1, ["y"], nodes).run(execution.start({"x": x}))
    assert torch.equal(from_runtime(values["y"]), x)
    assert sums["read/gram"].dtype == np.float32
    assert torch.allclose(torch.from_numpy(sums["read/gram"]), x.float().T @ x.float())


def test_what_was_dropped_is_computed_anew(stream: Stream, difference: Any) -> None:
    """An edit may let nodes behind a stream's position read what nothing there read before."""
    module, graph = stream()
    ids = draw(2, 5)
    walked = OnnxStream(OnnxExecution(graph), [OnnxExecution(graph).start({"ids": ids})], [None])
    walked.advance(walked.execution.position("h") + 1)
    assert "z1" not in walked.environments[0]
    found, _ = walked.piece(len(walked.execution.nodes), ["logits", "z1"]).run(walked.environments[0])
    assert difference(from_runtime(found["z1"]), module.norm(module.embed(ids)).detach()) <= EXACT
    assert difference(from_runtime(found["logits"]), module(ids).detach()) <= EXACT


def test_a_run_that_fails_says_so_in_one_line(stream: Stream) -> None:
    _, graph = stream()
    with pytest.raises(OnnxRuntimeError, match="cannot run the model: ") as failed:
        OnnxExecution(graph).outputs({"ids": torch.full((1, 3), 99)})
    assert "\n" not in str(failed.value)


def test_a_cache_that_is_not_given_is_empty() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 20]>
    cached (int64[b, l] input_ids, int64[b, t] attention_mask, int64[b, l] position_ids,
            float[b, 2, p, 4] past_key_values.0.key)
        => (int64[b, l] y, float[b, 2, p, 4] z) {
        y = Identity(position_ids)
        z = Identity(past_key_values.0.key)
    }""".replace("past_key_values.0.key", "past_key_values_0_key")
    )
    execution = OnnxExecution(OnnxGraph(ir.from_proto(proto)))
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    positions, past = execution.outputs({"input_ids": draw(2, 4), "attention_mask": mask})
    assert positions.tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
    assert past.shape == (2, 2, 0, 4)


def test_a_weight_in_a_constant_node_is_fed_as_an_initializer_is(difference: Any) -> None:
    """Else each piece that reads it would hold a copy of it."""
    weight = torch.randn(40, 30)
    proto = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["" : 20]>
    fed (float[rows, 30] x) => (float[rows, 40] z) {
        one = Constant <value_floats = [1.0]> ()
        y = MatMul(x, w)
        z = Mul(y, one)
    }""")
    stored = onnx.numpy_helper.from_array(weight.T.contiguous().numpy())
    proto.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["w"], value=stored))
    execution = OnnxExecution(OnnxGraph(ir.from_proto(proto)))
    assert execution.feeds("w")
    assert not execution.is_static("w")
    assert execution.is_static("one")
    x = torch.randn(5, 30)
    assert difference(execution.outputs({"x": x})[0], x @ weight.T) <= EXACT
    other = torch.randn(30, 40)
    assert difference(execution.outputs({"x": x}, {"w": other})[0], x @ other) <= EXACT


def test_what_is_read_in_bfloat16_may_be_given_in_float32() -> None:
    proto = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["" : 20]>
    coarse (bfloat16[rows, 4] x) => (bfloat16[rows, 4] y) { y = Identity(x) }""")
    x = torch.randn(5, 4)
    (found,) = OnnxExecution(OnnxGraph(ir.from_proto(proto))).outputs({"x": x})
    assert torch.equal(found, x.bfloat16())
    assert np.array_equal(to_numpy(found), x.bfloat16().float().numpy())
