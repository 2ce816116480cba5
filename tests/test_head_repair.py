"""The matrix in front of a tied head is repaired by what the answers lose."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dotresize_fx.activation_stream import ActivationStream
from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.gram import padding_mask
from dotresize_fx.head_repair import HeadEntrance
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.passes.open_stream import open_stream
from dotresize_fx.repair import repair


def test_it_finds_the_answers_again(tiny_graph: Any, tiny_batch: Any) -> None:
    """The gain in front of the head is disturbed; the table is not touched."""
    _, dense = tiny_graph("llama")
    slim = dense.copy()
    stream, _ = open_stream(slim, next(find_regions(slim).of_kind("residual")))
    (name,) = (name for name in stream.normed_readers if name not in dense.positions)
    gain, head = slim.op(name), slim.users(slim.op(name).output)[0]
    noise = 0.1 * torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    slim.set_weight(gain, slim.weight(gain) + noise)
    batches = [tiny_batch(8, 32, 3, seed=seed) for seed in range(10)]
    execution, before = Execution(slim), Execution(dense)
    node = dense.node(dense.op(head.name).inputs[0].name)
    goals = [before.run(before.start(b), 0, before.index[node] + 1, keep=[node])[node] for b in batches]
    walked = ActivationStream(execution, [execution.start(batch) for batch in batches])
    walked.advance(execution.index[slim.node(name)])
    table = (slim.weight(head), None)
    masks = [padding_mask(batch) for batch in batches]
    entrance = HeadEntrance(walked, slim.node(name), goals, masks, table, table)

    # The loss is the KL of the programs' own answers on real tokens.
    answers = [Execution(graph).outputs(batches[0])[0][masks[0].bool()].log_softmax(-1) for graph in (slim, dense)]
    found = torch.nn.functional.kl_div(*answers, log_target=True, reduction="batchmean")
    assert float(entrance.loss(0, {}, training=False)) == pytest.approx(float(found), rel=1e-4)

    repaired = repair(entrance, [slim.node(slim.op(name).weight.name)], [8, 9], steps=60)
    assert repaired.after < 0.5 * repaired.before
    assert len(repaired.weights) == 1
