"""Heads that kept some rotary pairs: turned by ONNX's own op, with the columns of the tables that they kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir
import pytest
from onnx.reference import ReferenceEvaluator

from dotresize_fx.export.cached_runs import onnx_inputs, prompt_inputs
from dotresize_fx.export.emit_onnx import emit_onnx
from dotresize_fx.export.fuse_rotary import fuse_rotary
from dotresize_fx.export.onnx_session import OnnxModel
from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.options import Options
from dotresize_fx.passes.canonicalise import canonicalise
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.slim_graph import slim_graph
from dotresize_fx.progress import Progress

# Tables of 8 columns, 4 angles that come twice; heads of 4 keep the pairs 2 and 1.
GRAPH = """<ir_version: 10, opset_import: ["" : 23]>
g (float[batch, length, 4] angles, float[batch, 3, length, 4] x) => (float[batch, 3, length, 4] y)
<int64[4] kept = {%s}, int64[1] one = {1}, int64[1] zero = {0}, int64[1] two = {2}, int64[1] three = {3},
 int64[1] far = {9223372036854775807}, float scale = {1.5}>
{
    twice = Concat<axis = -1>(angles, %s)
    bare = Cos(twice)
    cosines = Mul(bare, scale)
    sines = Sin(twice)
    wide_cosines = Unsqueeze(cosines, one)
    wide_sines = Unsqueeze(sines, one)
    cos = Gather<axis = 3>(wide_cosines, kept)
    sin = Gather<axis = 3>(wide_sines, kept)
    straight = Mul(x, cos)
    first = Slice(x, zero, two, three, one)
    second = Slice(x, two, far, three, one)
    negated = Neg(second)
    swapped = Concat<axis = -1>(negated, first)
    crossed = Mul(swapped, sin)
    y = Add(straight, crossed)
}"""


def read(text: str) -> onnx_ir.Model:
    return onnx_ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text)))


def test_picked_pairs_are_read_by_one_op() -> None:
    text = GRAPH % ("2, 1, 6, 5", "angles")
    model = read(text)
    assert fuse_rotary(model) == 1
    onnx_ir.passes.common.RemoveUnusedNodesPass()(model)
    assert [node.op_type for node in model.graph] == [
        "Concat",
        "Cos",
        "Mul",
        "Sin",
        "Gather",
        "Gather",
        "RotaryEmbedding",
    ]
    after = onnx_ir.serde.serialize_model(model)
    onnx.checker.check_model(after, full_check=True)
    draw = np.random.default_rng(0).standard_normal
    given = {"angles": draw((2, 5, 4)).astype(np.float32), "x": draw((2, 3, 5, 4)).astype(np.float32)}
    expected, found = (ReferenceEvaluator(each).run(None, given)[0] for each in (onnx.parser.parse_model(text), after))
    np.testing.assert_allclose(found, expected, atol=1e-6)  # the same products of float32


@pytest.mark.parametrize(
    ("kept", "again"),
    [
        ("2, 1, 5, 6", "angles"),  # the second half are other angles than the first
        ("0, 1, 2, 3", "angles"),
        ("2, 1, 6, 5", "bent"),  # the table's halves differ
    ],
)
def test_what_is_no_rotary_embedding_stays(kept: str, again: str) -> None:
    text = (GRAPH % (kept, again)).replace("    twice =", "    bent = Neg(angles)\n    twice =")
    model = read(text)
    before = [node.op_type for node in model.graph]
    assert fuse_rotary(model) == 0
    assert [node.op_type for node in model.graph] == before


def test_a_model_whose_pairs_were_cut(
    tiny_captured: Callable[[str], Any], tiny_batch: Callable[..., Any], tmp_path: Path
) -> None:
    model, captured = tiny_captured("llama")
    dense = captured.graph.copy()
    canonicalise(dense)
    options = Options(ratio=0.1, allocation="uniform", regions=("query_key",), multiple=2)
    batches = [tiny_batch(2, 32, seed=seed) for seed in range(2)]
    slim = slim_graph(dense, find_regions(dense), batches, options, Progress(quiet=True)).graph
    path = emit_onnx(model, captured, slim, tmp_path, "cpu")
    nodes = onnx.load(path, load_external_data=False).graph.node
    layers = sum(node.op_type == "Attention" for node in nodes)
    assert sum(node.op_type == "RotaryEmbedding" for node in nodes) == 2 * layers > 0
    inputs = prompt_inputs(captured.cache, *tiny_batch(3, 9).values())
    expected = Execution(slim, caches=captured.cache is not None).outputs(inputs)[0].numpy()
    found = OnnxModel(path)(onnx_inputs(slim, inputs))[0]
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())  # other sums of float32
