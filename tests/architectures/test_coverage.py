"""Tiny models of many architectures, as benchmarks/architectures.py examines all of them: a choice for variety.

What each must have in every layer is written down: fewer would be a match lost. The proof's bound is the design's.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dotresize_fx.graph import Kind
from dotresize_fx.options import Options
from dotresize_fx.passes.prove_exactness import BOUND, BROKEN
from dotresize_fx.passes.slim_graph import slim_graph
from dotresize_fx.progress import Progress

FFN, EXPERTS = {"ffn": 2}, {"experts": 2}
VALUE, QUERY_KEY, KV_HEADS = {"value": 2}, {"query_key": 2}, {"kv_heads": 2}
HEADS = VALUE | QUERY_KEY | KV_HEADS
STREAM = {"residual": 1}
# Behind a sandwich norm, or a norm of latent attention, lie streams of their own.
MATCHED: dict[str, dict[str, int]] = {
    "causal:afmoe": FFN | {"experts": 1} | VALUE | KV_HEADS | STREAM,  # mixed values behind a gate
    "causal:apertus": FFN | VALUE | KV_HEADS | STREAM,  # an activation spelled with comparisons and a choice
    "causal:bitnet": FFN | STREAM,  # a norm between a gate product and its reader
    "causal:bloom": FFN | VALUE | STREAM,  # batch and heads one axis; a norm behind the embedding is added on
    "causal:cohere": FFN | VALUE | STREAM,  # layer norms spelled out, attention beside the FFN
    "causal:deepseek_v3": FFN | {"experts": 1} | VALUE | {"residual": 5},  # latent attention
    "causal:falcon": FFN | STREAM,  # products with a transposed weight, sums in place
    "causal:gemma": FFN | HEADS | STREAM,  # gains of one plus a weight
    "causal:gemma2": FFN | VALUE | STREAM,  # sandwich norms, soft-capped scores
    "causal:gpt2": FFN | HEADS | STREAM,
    "causal:gpt_bigcode": FFN | VALUE | QUERY_KEY | STREAM,  # one KV head, packed behind an axis of one
    "causal:gpt_neo": FFN | VALUE | STREAM,  # attention spelled op by op
    "causal:gpt_neox": FFN | VALUE | KV_HEADS | STREAM,  # packed head by head, partial rotary embedding
    "causal:musicgen": FFN | HEADS | STREAM,  # positions taken from a table without an embedding
    "causal:gpt_oss": EXPERTS | VALUE | STREAM,  # experts with biases, gate and up by turns
    "causal:granite_swa": FFN | VALUE | STREAM,  # a factor a head on what is mixed
    "causal:llama": FFN | HEADS | STREAM,
    "causal:mixtral": EXPERTS | HEADS | STREAM,
    "causal:opt": FFN | HEADS | STREAM,
    "causal:phi": FFN | VALUE | KV_HEADS | STREAM,  # partial rotary embedding
    "causal:phi3": FFN | HEADS | STREAM,
    "causal:qwen3": FFN | VALUE | KV_HEADS | STREAM,  # QK-norm
    "masked:bert": FFN | HEADS | STREAM,  # post-norm: permutations
    "masked:deberta": FFN | STREAM,  # norms spelled out, with divisions
    "masked:distilbert": FFN | HEADS | STREAM,
    "image:convnext": FFN,
    "image:dinov2": FFN | HEADS,
    "image:pvt_v2": FFN | VALUE | STREAM,  # a depthwise convolution between up and down
    "image:swiftformer": {"ffn": 6},  # convolutions of single pixels
    "image:vit": FFN | HEADS | STREAM,  # patches, class token and positions write it
}
RUN = ("causal:afmoe", "causal:deepseek_v3", "causal:gpt_oss", "causal:mixtral", "image:pvt_v2", "image:vit")


@pytest.fixture(scope="module")
def architectures() -> ModuleType:
    """benchmarks/architectures.py, which is no part of the installed package."""
    folder = str(Path(__file__).parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module("architectures")
    finally:
        sys.path.remove(folder)


@pytest.fixture(scope="module")
def examined(architectures: ModuleType) -> Callable[..., dict[str, Any]]:
    """``examined(key, *stages)``: the row; of those in RUN, no stage is done twice."""
    kept: dict[str, tuple[Any, set[str]]] = {}

    def run(key: str, *stages: str) -> dict[str, Any]:
        if key in kept:
            examination, done = kept[key]
        else:
            (architecture,) = (a for a in architectures.architectures() if a.key == key)
            examination, done = architectures.Examination(architecture, 0.25), set()
            if key in RUN:
                kept[key] = examination, done
        row: dict[str, Any] = examination.run([stage for stage in stages if stage not in done])
        done.update(stages)
        assert "failed" not in row, row
        return row

    return run


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("mlp.down_proj.weight", True),
        ("feed_forward.gate_up_proj_adapter_list.0.1.weight", True),
        ("feed_forward.gate_up_proj_adapter_list.0.0.weight", False),  # its width is the adapter's rank
        ("mlp.gate.down_proj.weight", False),  # a router of several layers
        ("ffn_hc.fn", False),  # mixes hyper-connections
    ],
)
def test_which_names_are_a_feed_forward_part(architectures: ModuleType, name: str, counts: bool) -> None:
    assert architectures._is_ffn(name) is counts


@pytest.mark.parametrize("key", MATCHED)
def test_what_is_matched_and_proved(examined: Callable[..., dict[str, Any]], key: str) -> None:
    row = examined(key, "build", "capture", "match", "prove")
    assert row["regions"] == MATCHED[key]
    assert row["ffn_found"] == row["ffn_layers"]
    assert not row["unproved"]
    assert set(row["proof"]) == set(row["wrong"]) == set(MATCHED[key])
    assert max(row["proof"].values()) <= BOUND
    assert min(row["wrong"].values()) >= BROKEN


def test_experts_that_are_stored_the_other_way_round_are_repaired(architectures: ModuleType) -> None:
    """What was trained is as it is stored; the view has it turned."""
    (architecture,) = (a for a in architectures.architectures() if a.key == "causal:aria_text")
    examination = architectures.Examination(architecture, 0.25)
    assert "failed" not in examination.run(("build", "capture", "match"))
    options = Options(ratio=0.25, regions=("ffn",), effort="best", repair_steps=20, allocation="uniform")
    calibrating = architectures.batches(architecture, 9, seed=2)
    found = slim_graph(examination.dense, examination.matches, calibrating, options, Progress(quiet=True))
    experts = [op for op in found.graph.ops if op.kind is Kind.EXPERTS]
    assert any(found.graph.stored_weight(op).op == "placeholder" for op in experts)
    for op in experts:
        assert found.graph.weight(op).shape[1:] == (op.output.width, op.inputs[0].width)
    losses = [one.notes for one in found.swept if "loss after repair" in one.notes]
    assert losses
    assert all(note["loss after repair"] < note["loss before repair"] for note in losses)
    assert examination.error(found.graph) < 1


@pytest.mark.parametrize("key", RUN)
def test_a_quarter_goes_and_onnx_runtime_agrees(examined: Callable[..., dict[str, Any]], key: str) -> None:
    row = examined(key, "build", "capture", "match", "slim", "onnx")
    assert row["cut"]
    assert row["slim"] > 1e-3  # something went
    assert row["onnx"] <= 1e-5  # float32, two layers
