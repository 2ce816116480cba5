"""bench counts the MACs of whole files as torch counts those of the programs that they came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dotresize_fx.cost import count_cost
from dotresize_fx.export.bytes_moved import weight_bytes
from dotresize_fx.export.cached_runs import continued, onnx_inputs, prompt_inputs
from dotresize_fx.export.capture import Captured
from dotresize_fx.export.capture_cache import capture_with_cache
from dotresize_fx.export.emit_onnx import emit_onnx
from dotresize_fx.export.node_profile import ProfiledNode, profile_nodes
from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.fx_form.graph import FxGraph

pytest.importorskip("onnxruntime")
Given = Mapping[str, torch.Tensor]


def counted_by_torch(graph: FxGraph, inputs: Given, *, caches: bool) -> int:
    # torch counts no attention on the CPU, unless it is made of its products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        Execution(graph, caches=caches).outputs(inputs)
    return int(counter.get_total_flops()) // 2


def nodes_of(path: Path, graph: FxGraph, inputs: Given, work: Path) -> list[ProfiledNode]:
    how: dict[str, Any] = {"threads": 1, "provider": "CPUExecutionProvider", "equations": {}, "work": work}
    return profile_nodes(path, onnx_inputs(graph, inputs), runs=1, optimised=False, **how).nodes


def macs(nodes: list[ProfiledNode]) -> int:
    assert [node.op for node in nodes if node.macs is None] == []
    return sum(node.macs or 0 for node in nodes)


@pytest.fixture(scope="module")
def cached(tiny_model: Callable[..., Any]) -> tuple[Any, Captured]:
    model = tiny_model("llama")
    return model, capture_with_cache(model)


@pytest.mark.parametrize("target", ["any", "cpu", "cuda"])
def test_a_decoder_with_its_cache(
    cached: tuple[Any, Captured], tiny_batch: Callable[..., Given], tmp_path: Path, target: str
) -> None:
    """The prompt, and the last token behind it; fused ops are counted as what they are made of."""
    model, captured = cached
    graph = captured.graph
    path = emit_onnx(model, captured, graph, tmp_path, target)
    batch = tiny_batch(3, 29)
    prompt = prompt_inputs(captured.cache, batch["input_ids"], batch["attention_mask"])
    present = Execution(graph, caches=True).outputs(prompt)[1:]
    token = continued(graph, prompt, [value[:, :, :28] for value in present], 28)
    for inputs, length in ((prompt, 29), (token, 1)):
        nodes = nodes_of(path, graph, inputs, tmp_path)
        assert macs(nodes) == counted_by_torch(graph, inputs, caches=True)
        assert macs(nodes) == 3 * length * count_cost(graph, 29).macs_per_token
        # So small a tied table the converter stores a second time, transposed for the head: its rows count beside it.
        # There are constants too, of rotary angles, epsilons and shapes.
        least = 4 * (count_cost(graph, 1).parameters + 3 * length * 32)
        found = weight_bytes(onnx.load(path, load_external_data=False).graph).read(nodes)
        assert found is not None
        assert least <= found <= least + 1000


def test_an_encoder(tiny_captured: Callable[[str], tuple[Any, Captured]], tmp_path: Path) -> None:
    model, captured = tiny_captured("bert")
    graph = captured.graph
    path = emit_onnx(model, captured, graph, tmp_path)
    ids = torch.arange(2 * 21).reshape(2, 21)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    nodes = nodes_of(path, graph, inputs, tmp_path)
    assert macs(nodes) == counted_by_torch(graph, inputs, caches=False)
    tables = [node.picked for node in nodes if node.op == "Gather" and node.picked]
    assert max(count for count in tables if count is not None) == 2 * 21
