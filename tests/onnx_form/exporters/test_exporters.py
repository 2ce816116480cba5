"""What each exporter writes: the regions found in it, and the ratio-0 proof in ONNX Runtime."""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch

from dotresize_fx.export.capture import capture
from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.onnx_form.graph import OnnxGraph
from dotresize_fx.passes.canonicalise import canonicalise
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.prove_exactness import BOUND, BROKEN, map_regions
from dotresize_fx.passes.truncate_regions import truncate_regions
from dotresize_fx.region_map import random_admissible_map, random_wrong_map

pytest.importorskip("onnxruntime")

HEADS = {"value": 1, "query_key": 1, "kv_heads": 1}
ALL = {"ffn": 1, "residual": 1, **HEADS}
# In half precision a map's own rounding is seen: a few units of the last place (1e-3), through a layer or two.
HALF_BOUND = 5e-3
CASES: dict[tuple[str, str], dict[str, int]] = {
    ("bert", "script"): {"ffn": 1, **HEADS},
    ("roberta", "script"): {"ffn": 1, **HEADS},
    ("distilbert", "script"): {"ffn": 1, **HEADS},
    ("vit", "script"): {"ffn": 1, **HEADS},
    ("gpt2", "script"): ALL,
    ("llama", "script"): ALL,
    ("qwen3", "script"): {"ffn": 1, "residual": 1, "value": 1, "kv_heads": 1},  # a norm acts on query and key
    ("t5", "script"): {"ffn": 1, "value": 1},  # the first layer's key also sizes its bias, one a head
    ("bert", "dynamo"): {"ffn": 1, **HEADS},
    ("llama", "dynamo"): ALL,
    ("gpt2", "any"): ALL,
    ("llama", "cpu"): ALL,
    ("bert", "cpu"): {"ffn": 1, **HEADS},
    ("bert", "ort"): {"ffn": 1, **HEADS},
    ("gpt2", "ort"): ALL,
    ("llama", "ort"): ALL,
    ("bert", "ort-half"): {"ffn": 1, **HEADS},
    ("gpt2", "ort-half"): ALL,
    ("llama", "half"): ALL,
    ("gpt2", "hf"): ALL,
    ("bert", "hf-fused"): {"ffn": 1, **HEADS},
    ("llama", "hf-fused"): ALL,
    ("llama", "genai"): {"ffn": 1, "residual": 1, "kv_heads": 1},  # its attention wants heads of one size
}


def opened(path: Path) -> OnnxGraph:
    graph = OnnxGraph(ir.load(path))
    canonicalise(graph)
    return graph


@pytest.mark.parametrize(("kind", "way"), CASES)
def test_maps_that_the_regions_admit_change_nothing(
    exported: Any, first_output: Any, difference: Any, kind: str, way: str
) -> None:
    path = exported(kind, way)
    expected = first_output(ir.load(path))
    graph = opened(path)
    found = Counter(str(region.kind) for region in find_regions(graph).regions)
    assert dict(found) == CASES[kind, way]
    bound, broken = (HALF_BOUND, 10 * HALF_BOUND) if "half" in way else (BOUND, BROKEN)
    mapped = graph.copy()
    assert map_regions(mapped, tuple(found), random_admissible_map) == found.total()
    assert difference(first_output(mapped.fused_model()), expected) <= bound
    for region in found:
        wrong = graph.copy()
        map_regions(wrong, (region,), random_wrong_map)
        assert difference(first_output(wrong.fused_model()), expected) >= broken, region


FUSED = [
    ("bert", "ort"),
    ("llama", "ort"),
    ("llama", "cpu"),
    ("bert", "cpu"),
    ("llama", "hf-fused"),
    ("llama", "genai"),
]


@pytest.mark.parametrize(("kind", "way"), FUSED)
def test_fused_ops_are_put_together_as_they_were(exported: Any, kind: str, way: str) -> None:
    def listed(model: ir.Model) -> list[Any]:
        return [
            (node.domain, node.op_type, node.name, [v and v.name for v in (*node.inputs, *node.outputs)])
            for node in model.graph
        ]

    path = exported(kind, way)
    assert listed(OnnxGraph(ir.load(path)).fused_model()) == listed(ir.load(path))


CUT = [("llama", "script"), ("gpt2", "script"), ("bert", "ort"), ("llama", "cpu"), ("llama", "dynamo")]
IDS = torch.randint(0, 97, (3, 7), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


@cache
def fx_twin(kind: str, tiny_model: Any) -> FxGraph:
    graph = capture(tiny_model(kind, layers=1)).graph
    canonicalise(graph)
    return graph


@pytest.mark.parametrize(("kind", "way", "cut"), [(*case, cut) for case in CUT for cut in CASES[case]])
def test_a_cut_computes_what_it_does_in_the_fx_form(
    exported: Any, tiny_model: Any, first_output: Any, difference: Any, kind: str, way: str, cut: str
) -> None:
    path = exported(kind, way)
    cuts: list[Any] = []
    graphs: list[Any] = [fx_twin(kind, tiny_model), opened(path)]
    for graph in graphs:
        (region,) = find_regions(graph).of_kind(cut)
        cuts.append(truncate_regions(graph, [region], {region.name: region.width // 2}))
    expected = Execution(cuts[0]).outputs(BATCH)[0].double()
    slim = cuts[1].fused_model()
    assert numbers(slim) < numbers(ir.load(path))
    assert difference(first_output(slim, **BATCH), expected) <= BOUND


def numbers(model: ir.Model) -> int:
    """How many numbers its floating-point weights are."""
    stored = (value.const_value for value in model.graph.initializers.values())
    return sum(tensor.size for tensor in stored if tensor is not None and tensor.dtype.is_floating_point())
