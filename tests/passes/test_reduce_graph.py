"""What the options ask of a structure: how far each effort goes with what is left."""

from __future__ import annotations

from typing import Any

import pytest

from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.options import Options
from dotresize_fx.passes.find_blocks import find_blocks
from dotresize_fx.passes.reduce_graph import reduce_graph
from dotresize_fx.progress import Progress


def test_more_effort_refits_and_refines_what_is_left(tiny_graph: Any, tiny_batch: Any) -> None:
    _, dense = tiny_graph("llama")
    batches = [tiny_batch(4, 24, 5, seed=seed) for seed in range(9)]
    expected = Execution(dense).outputs(batches[8])[0]
    lost = []
    for options in (Options(merge=1), Options(merge=1, effort="best", repair_steps=30)):
        found = reduce_graph(dense, batches[:8], options, Progress(quiet=True))
        (block,) = found.gone
        assert (block.number, block.name, block.into) == (0, "model.layers.0", 1)
        assert block.alpha is not None
        assert 0 < block.alpha < 1
        lost.append(float((Execution(found.graph).outputs(batches[8])[0] - expected).norm() / expected.norm()))
    assert found.notes[1:] == ("2 sublayers refitted and refined for 30 steps each",)
    assert lost[1] < 0.9 * lost[0]


def test_what_stays_before_the_last_blocks_is_not_refitted(tiny_graph: Any, tiny_batch: Any) -> None:
    _, dense = tiny_graph("llama")
    options = Options(merge=1, merge_method="drop-last", effort="heal")
    found = reduce_graph(dense, [tiny_batch(4, 24)], options, Progress(quiet=True))
    (block,) = found.gone
    assert (block.number, block.into, block.alpha, len(found.notes)) == (1, None, None, 1)
    assert block.ops == set(find_blocks(dense)[1].ops)


@pytest.mark.parametrize("method", ["rom", "rank"])
def test_linears_of_a_lower_rank_are_named(
    tiny_graph: Any, tiny_batch: Any, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, dense = tiny_graph("llama")
    batches = [tiny_batch(4, 24, seed=seed) for seed in range(8)]
    found = reduce_graph(dense, batches, Options(method=method, ratio=0.2), Progress())
    told = {one.name: one for one in found.factorized}
    last = told["model.layers.1.mlp.down_proj"]
    assert (last.rows, last.columns, len(told)) == (32, 64, 7)
    assert found.graph.weight(found.graph.op(last.op)).shape == (32, last.rank)
    assert last.error is not None
    assert f"32 -> {last.rank}\n" in capsys.readouterr().err
