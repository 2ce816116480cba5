"""Rows of the report: widths and roles of blocks that went are none."""

from __future__ import annotations

from typing import Any

from dotresize_fx.export.match_rows import WENT, block_rows, linear_rows, region_rows
from dotresize_fx.options import Options
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.reduce_graph import reduce_graph
from dotresize_fx.progress import Progress


def test_regions_of_a_block_that_went_are_not_listed(tiny_graph: Any, tiny_batch: Any) -> None:
    _, dense = tiny_graph("llama")
    matches = find_regions(dense)
    batches = [tiny_batch(4, 24, seed=seed) for seed in range(4)]
    found = reduce_graph(dense, batches, Options(merge=1), Progress(quiet=True))
    gone = {op for block in found.gone for op in block.ops}
    rows = region_rows(matches, (), gone)
    assert {row.name for row in rows} == {
        region.name for region in matches.regions if not region.name.startswith("model.layers.0")
    }
    (stream,) = [row for row in rows if row.kind == "residual"]
    ends = {*stream.writers, *stream.readers}
    assert any(name.startswith("model.layers.1.") for name in ends)
    assert not any(name.startswith("model.layers.0.") for name in ends)
    linears = {row.name: row for row in linear_rows(matches, gone)}
    assert len(linears) == len(matches.linears)
    assert linears["model.layers.0.mlp.up_proj"].reason == WENT
    assert linears["model.layers.0.mlp.up_proj"].roles == ()
    assert linears["model.layers.1.mlp.up_proj"].status == "matched"
    (block,) = block_rows(found.gone)
    assert (block.index, block.name, block.merged_into) == (0, "model.layers.0", 1)


def test_all_regions_are_listed_where_nothing_went(tiny_graph: Any) -> None:
    matches = find_regions(tiny_graph("gpt2")[1])
    assert [row.name for row in region_rows(matches, ())] == [region.name for region in matches.regions]
