"""Bytes of weights and caches, on graphs small enough to count by hand."""

from __future__ import annotations

import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper

from dotresize_fx.export.bytes_moved import cache_bytes, weight_bytes
from dotresize_fx.export.graph_inputs import InputPlan
from dotresize_fx.export.node_profile import ProfiledNode


def tensor(name: str, *dims: int, kind: int = TensorProto.FLOAT) -> TensorProto:
    return TensorProto(name=name, dims=dims, data_type=kind)


def graph(nodes: str, *tensors: TensorProto) -> onnx.GraphProto:
    made: onnx.GraphProto = onnx.parser.parse_graph(f"g (int64[n] ids, float[n, 8] x) => (float[n] y) {{ {nodes} }}")
    for node in made.node:
        node.name = node.output[0]
    made.initializer.extend(tensors)
    return made


def gathers(**rows: int | None) -> list[ProfiledNode]:
    return [ProfiledNode(name, "Gather", 0.0, 0, picked) for name, picked in rows.items()]


def test_a_weight_counts_once_however_many_read_it() -> None:
    found = weight_bytes(
        graph("a = MatMul(x, w) b = MatMul(x, w) y = Add(a, b)", tensor("w", 8, 4), tensor("idle", 99))
    )
    assert found.read([]) == 4 * 8 * 4


def test_of_a_table_the_rows_that_are_picked_count() -> None:
    found = weight_bytes(graph("a = Gather(t, ids) b = Gather(t, ids) y = Add(a, b)", tensor("t", 40, 8)))
    assert found.read(gathers(a=3, b=2)) == 5 * 8 * 4
    assert found.read(gathers(a=30, b=30)) == 40 * 8 * 4  # no more than there are
    assert found.read(gathers(a=3)) == 3 * 8 * 4  # the other one is in a branch that was not taken
    assert found.read(gathers(a=3, b=None)) is None


def test_a_tied_table_is_read_whole_and_once() -> None:
    found = weight_bytes(graph("e = Gather(t, ids) u = Transpose(t) y = MatMul(e, u)", tensor("t", 40, 8)))
    assert found.read(gathers(e=3)) == 40 * 8 * 4


def test_a_quantised_table_and_packed_types() -> None:
    nodes = "e = com.microsoft.GatherBlockQuantized <gather_axis = 0> (t, ids, s) y = MatMulNBits(e, w)"
    tensors = (tensor("t", 40, 64, kind=TensorProto.INT4), tensor("s", 40, 2), tensor("w", 10, kind=TensorProto.UINT4))
    found = weight_bytes(graph(nodes, *tensors))
    assert found.read([ProfiledNode("e", "GatherBlockQuantized", 0.0, 0, 3)]) == 3 * (32 + 2 * 4) + 5


def test_a_gather_without_a_name_is_not_guessed_at() -> None:
    made = graph("y = Gather(t, ids)", tensor("t", 40, 8))
    made.node[0].name = ""
    assert weight_bytes(made).read([]) is None


def test_weights_in_branches() -> None:
    inner = graph("y = MatMul(x, w)", tensor("w", 8, 4))
    outer = graph("y = Identity(x)")
    outer.node.append(helper.make_node("If", ["c"], ["z"], then_branch=inner, else_branch=inner))
    assert weight_bytes(outer).read([]) == 4 * 8 * 4


@pytest.mark.parametrize(("present", "expected"), [("present.0.key", 2 * 3 * 8 * (5 + 6)), (None, 2 * 3 * 8 * 5)])
def test_a_cache_goes_in_and_comes_out_longer(present: str | None, expected: int) -> None:
    cache = InputPlan("past", "float16", ("batch", 3, "past", 8), "normal", cache=True, present=present)
    ids = InputPlan("input_ids", "int64", ("batch", "length"), "ids")
    assert cache_bytes([ids, cache], batch=2, length=1, past=5) == 2 * expected
