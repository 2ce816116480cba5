"""What a graph is fed follows from its inputs' names and shapes."""

from __future__ import annotations

import numpy as np
import onnx.parser
import pytest

from dotresize_fx.errors import UsageError
from dotresize_fx.export.graph_inputs import InputPlan, make_inputs, plan_inputs

# The text form has no dots in names: what is written _0_ is .0. in the model.
CACHED = """(int64[b, l] input_ids, int64[b, t] attention_mask, int64[b, l] position_ids,
  float[b, 2, p, 8] past_key_values_0_key, float16[b, 2, p, 4] past_key_values_0_value)
  => (float[b, l, 3] logits, float[b, 2, t, 8] present_0_key)
  <float[7, 3] table = {0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0}>
{ logits = Gather(table, input_ids)  present_0_key = Identity(past_key_values_0_key) }"""


def plans(text: str) -> dict[str, InputPlan]:
    graph = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]> g {text}').graph
    for value in (*graph.input, *graph.output):
        value.name = value.name.replace("_0_", ".0.")
    return {plan.name: plan for plan in plan_inputs(graph, "file")}


def test_a_cached_graph() -> None:
    found = plans(CACHED)
    assert {name: plan.dims for name, plan in found.items()} == {
        "input_ids": ("batch", "length"),
        "attention_mask": ("batch", "total"),
        "position_ids": ("batch", "length"),
        "past_key_values.0.key": ("batch", 2, "past", 8),
        "past_key_values.0.value": ("batch", 2, "past", 4),
    }
    assert [found[f"past_key_values.0.{name}"].present for name in ("key", "value")] == ["present.0.key", None]
    made = make_inputs(found.values(), batch=2, length=3, past=5)
    assert made["past_key_values.0.key"].shape == (2, 2, 5, 8)
    assert made["past_key_values.0.value"].dtype == np.float16
    np.testing.assert_array_equal(made["attention_mask"], np.ones((2, 8)))
    np.testing.assert_array_equal(made["position_ids"], [[5, 6, 7]] * 2)
    assert set(np.unique(made["input_ids"])) <= set(range(7))  # rows of the table
    again = make_inputs(found.values(), batch=2, length=3, past=5)
    np.testing.assert_array_equal(made["input_ids"], again["input_ids"])
    assert make_inputs(found.values(), batch=1, length=3, past=0)["past_key_values.0.key"].shape == (1, 2, 0, 8)


def test_other_graphs() -> None:
    ids = "(int64[b, l] input_ids, int64[b, l] attention_mask) => (int64[b, l] y) { y = Identity(input_ids) }"
    found = plans(ids)
    assert found["attention_mask"].dims == ("batch", "length")
    assert found["input_ids"].rows == 1  # picks no row: zeros
    found = plans("(float[b, 3, 32, 32] pixel_values) => (float[b, 3, 32, 32] y) { y = Identity(pixel_values) }")
    assert found["pixel_values"] == InputPlan("pixel_values", "float32", ("batch", 3, 32, 32), "normal")
    assert InputPlan.from_json(found["pixel_values"].as_json()) == found["pixel_values"]


@pytest.mark.parametrize(
    "graph",
    [
        "(string[n] x) => (string[n] y) { y = Identity(x) }",
        "() => (float[1] y) { y = Constant <value_float: float = 1.0> () }",
    ],
)
def test_what_cannot_be_fed(graph: str) -> None:
    with pytest.raises(UsageError, match="file"):
        plans(graph)
