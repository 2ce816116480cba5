"""What is left of names tells which part of a model a node belongs to."""

from __future__ import annotations

import onnx
import pytest
from onnx import helper

from dotresize_fx.export.latency_losses import latency_losses
from dotresize_fx.export.node_profile import ProfiledNode
from dotresize_fx.export.node_regions import ELSEWHERE, layer, node_modules, original_name, role

SCOPES = "pkg.torch.onnx.name_scopes"


def node(name: str, *inputs: str, scopes: str = "") -> onnx.NodeProto:
    made = helper.make_node("MatMul", [*inputs], [f"{name}_out"], name=name)
    if scopes:
        made.metadata_props.add(key=SCOPES, value=scopes)
    return made


def test_modules_are_told_by_scope_weight_or_path() -> None:
    nodes = [
        node("a", "x", "val_1", scopes="['', 'model', 'model.layers.0.mlp', 'linear_3']"),
        node("b", "x", "model.layers.1.mlp.up_proj.weight"),
        node("/model/layers.2/attn/MatMul", "x", "y"),
        node("c", "x", "y", scopes="['pow_1']"),
        node("d", "x", "y", scopes="['_empty_nn_module_stack_from_metadata_hook', 'sym_size']"),
        node("e", "x", "y", scopes="not a list"),
    ]
    weight = onnx.TensorProto(name="model.layers.1.mlp.up_proj.weight")
    graph = helper.make_graph(nodes, "g", [], [], [weight])
    assert node_modules(graph) == {
        "a": "model.layers.0.mlp",
        "b": "model.layers.1.mlp.up_proj",
        "/model/layers.2/attn/MatMul": "model.layers.2.attn",
    }


def test_roles_and_layers() -> None:
    assert role("model.layers.12.mlp.up_proj") == role("model.layers.3.mlp.up_proj") == "model.layers.*.mlp.up_proj"
    assert (layer("model.layers.12.mlp.experts.0"), layer("lm_head"), role("")) == (
        "model.layers.12",
        ELSEWHERE,
        ELSEWHERE,
    )


def test_fused_nodes_have_the_name_of_one_of_theirs() -> None:
    known = dict.fromkeys(["node_silu", "node_silu_1", "node_linear"])
    assert original_name("node_silu_1/QuickGeluFusion/", known) == "node_silu_1"
    assert original_name("node_silu", known) == "node_silu"
    assert original_name("node_linear_token_3", known) == "node_linear"
    assert original_name("SkipLayerNorm_AddBias_3", known) == "SkipLayerNorm_AddBias_3"


def test_what_ate_a_cut() -> None:
    """MACs halve. The product halves too; the norm does not, and eats half of its time."""

    def side(macs: int, product: float) -> tuple[list[ProfiledNode], list[ProfiledNode], dict[str, str]]:
        ran = [ProfiledNode("p/Fused/", "FusedMatMul", product, None), ProfiledNode("n", "Norm", 3.0, 0)]
        file = [ProfiledNode("p", "MatMul", 9.0, macs), ProfiledNode("n", "Norm", 9.0, 0)]
        return ran, file, {"p": "model.layers.0.mlp"}

    found = latency_losses(side(100, 8.0), side(50, 4.0))
    assert [(loss.label, loss.eaten, loss.after_macs) for loss in found["op"]] == [
        ("Norm", pytest.approx(1.5), 0),
        ("FusedMatMul", pytest.approx(0), 50),
    ]
    assert [loss.label for loss in found["region"]] == [ELSEWHERE, "model.layers.*.mlp"]
    assert [loss.label for loss in found["layer"]] == [ELSEWHERE, "model.layers.0"]


def test_what_a_rewrite_made_belongs_where_it_is_used() -> None:
    """A packed product and a norm with a skip; the gain, alike in all layers and so one, tells nothing."""
    scope = "['', 'model', 'model.layers.{}', 'op']"
    nodes = [
        node("norm", "x", "model.layers.0.norm.weight"),
        node("packed", "norm_out"),
        node("gate", "packed_out", scopes=scope.format("0.mlp.gate")),
        node("up", "packed_out", scopes=scope.format("0.mlp.up")),
        node("skip", "gate_out", "model.layers.0.norm.weight"),
        node("q", "skip_out", scopes=scope.format("1.attn.q")),
        node("last", "skip_sum", "q_out"),
    ]
    nodes[4].output.append("skip_sum")
    graph = helper.make_graph(nodes, "g", [], [], [onnx.TensorProto(name="model.layers.0.norm.weight")])
    found = node_modules(graph)
    assert found["norm"] == found["packed"] == "model.layers.0.mlp"
    assert found["skip"] == "model.layers.1.attn.q"
    assert found["last"] == "model.layers.1.attn.q"
