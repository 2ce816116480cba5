"""Heads cut for real: leaving numbers, pairs or whole heads out is what zeroing them in the dense model is.

And the graph that is left runs on shapes that were not traced, here and in ONNX Runtime, with nothing of the old
sizes in it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from dotresize_fx.export.emit_onnx import emit_onnx
from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.graph import Kind
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.fold_linears import FoldLinears
from dotresize_fx.passes.insert_maps import InsertMaps
from dotresize_fx.passes.prove_exactness import BOUND, BROKEN
from dotresize_fx.region_map import RegionMap, pair_selection, selection
from dotresize_fx.regions import Region, RegionKind

SIZE, HEADS, SHARED = 8, 4, 2  # of a head; query heads; query heads that share a KV head
KEPT = {
    "value": torch.tensor([1, 2, 5, 6]),
    "query_key": torch.tensor([0, 3]),  # pairs
    "kv_heads": torch.tensor([1]),
}
KINDS = tuple(KEPT)


def cut(graph: FxGraph, kinds: tuple[str, ...]) -> list[Region]:
    """Keep what KEPT says in every layer; regions are found anew for each kind."""
    done = []
    for kind in kinds:
        graph.refresh_shapes()
        for region in find_regions(graph).of_kind(kind):
            down = selection(KEPT[kind], region.width)
            chosen = pair_selection(KEPT[kind], region.width) if kind == "query_key" else RegionMap(down, down.T)
            insert = InsertMaps(region, chosen)
            insert(graph)
            FoldLinears(insert.downs, insert.ups)(graph)
            done.append(region)
    return done


@torch.no_grad()
def zeroed(model: Any, kinds: tuple[str, ...]) -> Any:
    """The dense llama with zeros where ``cut`` leaves something out."""
    model = copy.deepcopy(model)
    for layer in model.model.layers:
        attention = layer.self_attn
        mixed = attention.o_proj.weight.view(-1, HEADS, SIZE)
        if "value" in kinds:
            mixed[:, :, [i for i in range(SIZE) if i not in KEPT["value"]]] = 0
        if "kv_heads" in kinds:
            mixed[:, :SHARED] = 0
        if "query_key" in kinds:
            dropped = [i for i in range(SIZE) if i % (SIZE // 2) not in KEPT["query_key"]]
            attention.q_proj.weight.view(HEADS, SIZE, -1)[:, dropped] = 0
    return model


def expected(model: Any, batch: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(**batch).logits]


@pytest.mark.parametrize("kinds", [*((kind,) for kind in KINDS), KINDS, KINDS[::-1]], ids="+".join)
def test_cutting_is_zeroing(
    tiny_graph: Any, run: Any, difference: Callable[..., float], tiny_batch: Any, kinds: tuple[str, ...]
) -> None:
    model, graph = tiny_graph("llama")
    assert len(cut(graph, kinds)) == 2 * len(kinds)
    graph.refresh_shapes()
    for rows, length, padding in ((3, 11, 4), (1, 29, 0)):
        batch = tiny_batch(rows, length, padding)
        found = run(graph, **batch)
        assert difference(found, expected(zeroed(model, kinds), batch)) <= BOUND
        assert difference(found, expected(model, batch)) >= BROKEN


def test_regions_of_a_cut_model(tiny_graph: Any) -> None:
    _, graph = tiny_graph("llama")
    cut(graph, ("query_key", "kv_heads"))
    graph.refresh_shapes()
    report = find_regions(graph)
    assert [(region.kind, region.width) for region in report.of_kind(*KINDS)] == [("query_key", 4), ("value", 8)] * 2
    for op in graph.ops:
        if op.kind is Kind.ATTENTION:
            assert op.attributes["scale"] == SIZE**-0.5
            assert [value.shape[1::2] for value in op.inputs[:3]] == [(2, 4), (2, 4), (2, 8)]
    weights = {graph.weight(graph.op(row.op)).shape for row in report.linears if "self_attn.k" in row.parameter}
    assert weights == {(4, 32)}


def test_regions_found_before_heads_were_cut_are_refused(tiny_graph: Any) -> None:
    _, graph = tiny_graph("llama")
    stale = next(find_regions(graph).of_kind(RegionKind.VALUE))
    cut(graph, ("kv_heads",))
    full = torch.eye(SIZE, dtype=torch.float64)
    with pytest.raises(ValueError, match="1 heads over 2 KV heads"):
        InsertMaps(stale, RegionMap(full, full))(graph)


def test_onnx_runtime_runs_what_is_left(tiny_captured: Any, tiny_graph: Any, tiny_batch: Any, tmp_path: Path) -> None:
    model, captured = tiny_captured("llama")
    _, graph = tiny_graph("llama")
    cut(graph, KINDS)
    path = emit_onnx(model, captured, graph, tmp_path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for rows, length, padding in ((1, 1, 0), (3, 29, 7)):
        batch = tiny_batch(rows, length, padding)
        real = batch["attention_mask"].bool().numpy()
        (found,) = session.run(["logits"], {name: value.numpy() for name, value in batch.items()})
        slim = Execution(graph).outputs(batch)[0].numpy()
        assert np.abs(found - slim)[real].max() / np.abs(slim).max() <= BOUND
