"""The torch.fx form of the neutral view: what it reads, and that every edit leaves a program that runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import Parameter
from torch.nn import functional as F

from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.graph import Kind, Op

Trace = Callable[..., FxGraph]
Run = Callable[..., list[torch.Tensor]]

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
# The same float32 arithmetic in another order.
ROUNDING = 1e-6


def ffn(trace: Trace) -> FxGraph:
    return trace(lambda m, x: m.down(torch.relu(m.up(x))), (2, 4), up=nn.Linear(4, 8), down=nn.Linear(8, 4))


def shared(trace: Trace) -> FxGraph:
    return trace(lambda m, x: m.layer(torch.relu(m.layer(x))), (2, 4), layer=nn.Linear(4, 4))


KINDS: dict[str, tuple[Callable[[Any, torch.Tensor], Any], Kind, str | None]] = {
    "linear": (lambda m, x: m.layer(x), Kind.LINEAR, None),
    "computed weight": (lambda m, x: F.linear(x, torch.relu(m.layer.weight)), Kind.OTHER, None),
    "add": (lambda m, x: x + x.relu(), Kind.ADD, None),
    "add a multiple": (lambda m, x: torch.add(x, x.relu(), alpha=2), Kind.OTHER, None),
    "add a number": (lambda m, x: x + 2, Kind.POINTWISE, "add 2"),
    "subtract a number": (lambda m, x: x - 2, Kind.POINTWISE, "add -2"),
    "subtract from a number": (lambda m, x: 2 - x, Kind.POINTWISE, "rsub 2"),
    "mul": (lambda m, x: x * x.relu(), Kind.MUL, None),
    "scale": (lambda m, x: x * 2, Kind.SCALE, " 2"),
    "divide by a number": (lambda m, x: x / 4, Kind.SCALE, " 0.25"),
    "negative": (lambda m, x: -x, Kind.SCALE, " -1"),
    "power": (lambda m, x: x**3, Kind.POINTWISE, "pow 3"),
    "gelu": (lambda m, x: F.gelu(x), Kind.POINTWISE, "gelu None"),
    "mean": (lambda m, x: x.mean(-1, keepdim=True), Kind.MEAN, None),
    "mean of the batch": (lambda m, x: x.mean(0), Kind.KEEP, None),
    "mean of all": (lambda m, x: x.mean(), Kind.OTHER, None),
    "joined rows": (lambda m, x: torch.cat([x, m.layer(x)]), Kind.KEEP, None),
    "joined widths": (lambda m, x: torch.cat([x, m.layer(x)], -1), Kind.OTHER, None),
    "repeated rows": (lambda m, x: x.repeat(2, 1), Kind.KEEP, None),
    "repeated width": (lambda m, x: x.repeat(1, 2), Kind.OTHER, None),
    "divide by a tensor": (lambda m, x: x / x.exp(), Kind.POINTWISE, "div None"),
    "rms norm": (lambda m, x: F.rms_norm(x, [4], m.norm.weight), Kind.RMS_NORM, None),
    "rms norm of a computed gain": (lambda m, x: F.rms_norm(x, [4], 1 + m.norm.weight), Kind.OTHER, None),
    "layer norm": (lambda m, x: m.norm(x), Kind.LAYER_NORM, None),
    "widening cast": (lambda m, x: x.to(torch.float64), Kind.KEEP, None),
    "cast to integers": (lambda m, x: x.to(torch.int64), Kind.OTHER, None),
    "slice of another dimension": (lambda m, x: torch.stack([x, x])[1:], Kind.KEEP, None),
    "slice of the width": (lambda m, x: x[:, 1:], Kind.OTHER, None),
    "unsqueeze before": (lambda m, x: x.unsqueeze(1), Kind.KEEP, None),
    "unsqueeze behind": (lambda m, x: x.unsqueeze(-1), Kind.OTHER, None),
    "reshape of the batch": (lambda m, x: x.view(-1, 1, 4), Kind.KEEP, None),
    "reshape of the width": (lambda m, x: x.view(-1, 2, 2), Kind.RESHAPE, None),
    "transpose": (lambda m, x: x.t(), Kind.RESHAPE, None),
    "softmax": (lambda m, x: x.softmax(-1), Kind.OTHER, None),
    "dropout in training": (lambda m, x: F.dropout(x, 0.5, True), Kind.OTHER, None),
}


@pytest.mark.parametrize("name", KINDS)
def test_kinds(trace: Trace, name: str) -> None:
    forward, kind, function = KINDS[name]
    last = trace(forward, (3, 4), layer=nn.Linear(4, 4), norm=nn.LayerNorm(4)).ops[-1]
    assert last.kind is kind
    if function is not None:
        assert f"{last.function} {last.attributes['number']}" == function


def test_epsilons(trace: Trace) -> None:
    norms = {"a": nn.RMSNorm(4), "b": nn.RMSNorm(4, eps=0.5), "c": nn.LayerNorm(4), "d": nn.LayerNorm(4, eps=0.25)}
    graph = trace(lambda m, x: m.d(m.c(m.b(m.a(x)))), (2, 4), **norms)
    epsilons = [op.attributes["epsilon"] for op in graph.ops]
    assert epsilons == [torch.finfo(torch.float32).eps, 0.5, 1e-5, 0.25]


def test_reads_ops_values_and_parameters(trace: Trace) -> None:
    graph = ffn(trace)
    up, relu, down = graph.ops
    assert (up.weight and graph.parameter_name(up.weight)) == "up.weight"
    assert graph.weight(up).shape == (8, 4)
    assert up.output.shape[1:] == (8,)
    assert isinstance(up.output.shape[0], str)
    assert (up.output.width, up.inputs[0].name, up.inputs[0].is_parameter) == (8, "x", False)
    assert graph.producer(relu.output) == relu
    assert graph.producer(up.inputs[0]) is None
    assert graph.users(up.output) == [relu]
    assert up.weight is not None
    assert graph.users(up.weight) == [up]
    assert graph.outputs == {down.output}
    assert graph.positions == {"linear": 0, "relu": 1, "linear_1": 2}
    with pytest.raises(ValueError, match="has no weight"):
        graph.weight(relu)


def test_a_shared_weight_is_forked_for_those_who_ask(trace: Trace, run: Run) -> None:
    graph = shared(trace)
    first, _, second = graph.ops
    old = graph.weight(first).clone()
    bias = graph.bias(first)
    graph.set_weight(first, torch.zeros(4, 4))
    assert torch.equal(graph.weight(graph.op(first.name)), torch.zeros(4, 4))
    assert torch.equal(graph.weight(graph.op(second.name)), old)
    expected = F.linear(torch.relu(bias.expand(3, 4)), old, bias)
    assert torch.allclose(run(graph, x=X)[0], expected, atol=ROUNDING)


def test_ops_that_change_a_weight_together_share_it(trace: Trace) -> None:
    graph = shared(trace)
    first, _, second = graph.ops
    graph.set_weight([first, second], torch.eye(4))
    assert graph.op(first.name).weight == graph.op(second.name).weight
    assert len(graph.program.state_dict) == 2


def test_biases_are_given_forked_and_taken(trace: Trace, run: Run) -> None:
    graph = shared(trace)
    first, _, second = graph.ops
    old = graph.bias(first)
    graph.set_bias(first, torch.ones(4))
    assert torch.equal(graph.bias(graph.op(first.name)), torch.ones(4))
    assert torch.equal(graph.bias(graph.op(second.name)), old)
    graph.set_bias(graph.op(second.name), None)
    assert graph.bias(graph.op(second.name)) is None
    hidden = torch.relu(F.linear(X, graph.weight(first), torch.ones(4)))
    assert torch.allclose(run(graph, x=X)[0], F.linear(hidden, graph.weight(second)), atol=ROUNDING)
    graph.set_bias(graph.op(second.name), torch.full((4,), 2.0))
    assert torch.allclose(run(graph, x=X)[0], F.linear(hidden, graph.weight(second)) + 2, atol=ROUNDING)


def test_a_layer_norm_can_lose_and_gain_a_bias(trace: Trace, run: Run) -> None:
    graph = trace(lambda m, x: m.norm(x), (2, 4), norm=nn.LayerNorm(4))
    norm = graph.ops[0]
    gain = graph.weight(norm)
    graph.set_bias(norm, None)
    assert torch.allclose(run(graph, x=X)[0], F.layer_norm(X, [4], gain), atol=ROUNDING)
    graph.set_bias(graph.op(norm.name), torch.ones(4))
    assert torch.allclose(run(graph, x=X)[0], F.layer_norm(X, [4], gain, torch.ones(4)), atol=ROUNDING)
    graph.drop_affine(graph.op(norm.name))
    assert torch.allclose(run(graph, x=X)[0], F.layer_norm(X, [4]), atol=ROUNDING)


def test_an_inserted_linear_serves_the_users_named(trace: Trace, run: Run) -> None:
    graph = trace(lambda m, x: (h := torch.relu(x)) + torch.tanh(h), (2, 4))
    tanh = graph.op("tanh")
    inserted = graph.insert_linear(graph.op("relu").output, torch.eye(4) * 2, torch.ones(4), users=[tanh], name="new")
    assert [op.name for op in graph.ops] == ["relu", "new", "tanh", "add"]
    assert graph.weight(inserted).shape == (4, 4)
    hidden = torch.relu(X)
    assert torch.allclose(run(graph, x=X)[0], hidden + torch.tanh(hidden * 2 + 1), atol=ROUNDING)


def test_parameter_names_stay_unique(trace: Trace) -> None:
    graph = ffn(trace)
    for _ in range(3):
        graph.insert_linear(graph.op("relu").output, torch.eye(8), name="new")
    assert {"new.weight", "new.weight_1", "new.weight_2"} <= set(graph.program.state_dict)


def test_bypassing_the_last_op_moves_the_output(trace: Trace, run: Run) -> None:
    graph = trace(lambda m, x: torch.tanh(torch.relu(x)), (2, 4))
    graph.bypass(graph.op("tanh"))
    assert {value.name for value in graph.outputs} == {"relu"}
    assert torch.equal(run(graph, x=X)[0], torch.relu(X))


def test_remove_dead_takes_ops_and_parameters(trace: Trace) -> None:
    graph = ffn(trace)
    graph.bypass(graph.op("linear_1"))
    assert graph.remove_dead() == 0
    assert set(graph.program.state_dict) == {"up.weight", "up.bias"}
    graph.bypass(graph.op("relu"))
    graph.bypass(graph.op("linear"))
    graph.remove_dead()
    assert graph.ops == []
    assert not graph.program.state_dict


def test_new_shapes_are_computed_symbols_included(trace: Trace) -> None:
    graph = ffn(trace)
    up, _, down = graph.ops
    batch = up.output.shape[0]
    graph.set_weight(up, torch.zeros(5, 4))
    graph.set_bias(graph.op(up.name), torch.zeros(5))
    graph.set_weight(graph.op(down.name), torch.zeros(3, 5))
    graph.set_bias(graph.op(down.name), torch.zeros(3))
    graph.refresh_shapes()
    assert [op.output.shape for op in graph.ops] == [(batch, 5), (batch, 5), (batch, 3)]


def test_copies_are_independent(trace: Trace, run: Run, text: Callable[[FxGraph], str]) -> None:
    graph = ffn(trace)
    before, listing = run(graph, x=X)[0], text(graph)
    copied = graph.copy()
    assert text(copied) == listing
    copied.set_weight(copied.op("linear"), torch.zeros(8, 4))
    copied.bypass(copied.op("relu"))
    copied.insert_linear(copied.op("linear_1").output, torch.eye(4))
    assert text(graph) == listing
    assert torch.equal(run(graph, x=X)[0], before)
    assert not torch.equal(run(copied, x=X)[0], before)


def test_a_copy_of_stale_shapes_is_stale_too(trace: Trace) -> None:
    graph = ffn(trace)
    graph.set_weight(graph.op("linear"), torch.zeros(5, 4))
    graph.set_bias(graph.op("linear"), torch.zeros(5))
    graph.set_weight(graph.op("linear_1"), torch.zeros(4, 5))
    copied = graph.copy()
    copied.refresh_shapes()
    assert copied.op("relu").output.width == 5


def test_an_edited_program_is_still_a_valid_export(trace: Trace, run: Run) -> None:
    """torch.export's own verifier accepts it, and its module computes the same: the ONNX converter relies on both."""
    graph = ffn(trace)
    graph.insert_linear(graph.op("linear").output, torch.eye(8), torch.ones(8))
    graph.refresh_shapes()
    graph.program.validate()
    module = graph.program.module()
    assert torch.allclose(module(X), run(graph, x=X)[0], atol=ROUNDING)


def test_replacing_by_a_norm_keeps_the_gain_as_a_parameter(trace: Trace, run: Run) -> None:
    graph = trace(lambda m, x: m.gain * torch.tanh(x), (2, 4), gain=Parameter(torch.empty(4)))
    last: Op = graph.ops[-1]
    gain = last.inputs[0]
    graph.replace_with_rms_norm(last, graph.ops[0].inputs[0], gain, 0.5)
    graph.remove_dead()
    assert [op.kind for op in graph.ops] == [Kind.RMS_NORM]
    assert torch.allclose(run(graph, x=X)[0], F.rms_norm(X, [4], graph.parameter(gain), 0.5), atol=ROUNDING)


def test_stated_sizes_are_set_and_inferred_ones_stay(trace: Trace, run: Run) -> None:
    graph = trace(lambda m, x: m.up(x).view(-1, 2, 4).expand(-1, 2, 4), (2, 4), up=nn.Linear(4, 8))
    view, expand = (op for op in graph.ops if "sizes" in op.attributes)
    assert view.attributes["sizes"] == (-1, 2, 4)
    up = graph.op("linear")
    graph.set_weight(up, graph.weight(up)[:6])
    graph.set_bias(graph.op("linear"), graph.bias(graph.op("linear"))[:6])
    graph.resize_axes(graph.op(view.name), {0: 7, 2: 3})
    graph.resize_axes(graph.op(expand.name), {2: 3})
    assert graph.op(view.name).attributes["sizes"] == (-1, 2, 3)
    assert run(graph, x=X)[0].shape == (3, 2, 3)
    graph.refresh_shapes()
    assert [value.width for value in graph.outputs] == [3]


def test_a_slice_takes_another_range(trace: Trace, run: Run) -> None:
    graph = trace(lambda m, x: x[:, 2:], (2, 4))
    for start, stop in ((1, 3), (3, None)):
        graph.resize_slice(graph.ops[-1], start, stop)
        assert (graph.ops[-1].attributes["start"], graph.ops[-1].attributes["stop"]) == (start, stop)
        assert torch.equal(run(graph, x=X)[0], X[:, start:stop])


def test_gathering_is_for_the_given_users(trace: Trace, run: Run) -> None:
    graph = trace(lambda m, x: (torch.relu(x), torch.exp(x)), (2, 4))
    source = graph.ops[0].inputs[0]
    exp = next(op for op in graph.ops if op.function == "exp")
    gather = graph.insert_gather(source, torch.tensor([3, 0]), users=[exp])
    places = gather.inputs[1]
    assert (graph.is_buffer(places), graph.parameter(places).tolist()) == (True, [3, 0])
    relu, exp_again = run(graph, x=X)
    assert torch.equal(relu, torch.relu(X))
    assert torch.equal(exp_again, torch.exp(X[:, [3, 0]]))
    graph.copy().refresh_shapes()
    assert torch.equal(graph.program.module()(X)[1], exp_again)


def test_the_scale_of_an_attention(trace: Trace, run: Run) -> None:
    graph = trace(lambda m, x: F.scaled_dot_product_attention(x, x, x), (2, 3, 4))
    (attention,) = graph.ops
    assert [value.name for value in attention.inputs] == ["x", "x", "x"]
    assert attention.attributes["scale"] is None
    graph.set_attention_scale(attention, 0.25)
    assert graph.ops[0].attributes["scale"] == 0.25
    x = X.view(3, 1, 4)
    assert torch.equal(run(graph, x=x)[0], F.scaled_dot_product_attention(x, x, x, scale=0.25))


def test_redirecting_moves_users_and_outputs(trace: Trace) -> None:
    graph = trace(lambda m, x: (x.sin() + 1, (y := torch.relu(x)), y.exp()), (2, 4))
    sine, _, relu, _ = graph.ops
    graph.redirect(relu, sine.output)
    assert graph.remove_dead() == 1
    assert [op.spelling for op in graph.ops] == ["sin.default", "add.Tensor", "exp.default"]
    found = graph.program.module()(X)
    for tensor, expected in zip(found, (X.sin() + 1, X.sin(), X.sin().exp()), strict=True):
        assert torch.equal(tensor, expected)


def test_rows_looked_up_by_index_are_an_embedding(trace: Callable[..., FxGraph]) -> None:
    """So the bias of the expert that a row was routed to is spelled."""
    graph = trace(lambda m, ids: m.table[ids] + m.square[:, ids].T, (4,), dtype=torch.int64, **tables())
    lookups = [op for op in graph.ops if op.kind is Kind.EMBEDDING]
    assert [(graph.parameter_name(op.weight), op.inputs[0].name) for op in lookups] == [("table", "ids")]  # type: ignore[arg-type]


def tables() -> dict[str, torch.nn.Parameter]:
    return {"table": torch.nn.Parameter(torch.empty(5, 3)), "square": torch.nn.Parameter(torch.empty(3, 3))}
