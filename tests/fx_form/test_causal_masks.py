"""Masks that only hide what comes later: told from others, shared, and left out of attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from dotresize_fx.fx_form import causal_masks
from dotresize_fx.fx_form.causal_masks import is_causal, mask_of
from dotresize_fx.fx_form.execution import Execution

LOWEST = torch.finfo(torch.float32).min
CAUSAL = torch.ones(5, 5, dtype=torch.bool).tril()
ADDED = torch.zeros(2, 1, 5, 5).masked_fill(~CAUSAL, LOWEST)


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (CAUSAL, True),
        (CAUSAL.expand(2, 1, 5, 5), True),
        (ADDED, True),
        (ADDED.bfloat16().clamp_min(torch.finfo(torch.bfloat16).min), True),
        (torch.zeros(5, 5).masked_fill(~CAUSAL, -float("inf")), True),
        (torch.ones(5, 5, dtype=torch.bool), False),
        (CAUSAL.tril().triu(-2), False),  # a sliding window
        (ADDED.index_fill(-1, torch.tensor([0]), LOWEST), False),  # padding on the left
        (torch.zeros(5, 5).masked_fill(~CAUSAL, -10.0), False),  # hides little
        (ADDED - torch.eye(5), False),  # with a bias
        (CAUSAL[-2:], False),  # behind a past
        (torch.ones(1, 1, dtype=torch.bool), False),
    ],
)
def test_what_is_causal(mask: torch.Tensor, expected: bool) -> None:
    assert is_causal(mask) is expected


@pytest.mark.parametrize("padding", [0, 3])
def test_a_model_computes_the_same_without_it(tiny_graph: Any, monkeypatch: pytest.MonkeyPatch, padding: int) -> None:
    """As on a GPU; where there is padding the mask stays."""
    _, graph = tiny_graph("llama")
    batch: Mapping[str, torch.Tensor] = {
        "input_ids": torch.arange(18).reshape(2, 9),
        "attention_mask": torch.ones(2, 9, dtype=torch.int64),
    }
    batch["attention_mask"][0, :padding] = 0
    (expected,) = Execution(graph).outputs(batch)
    monkeypatch.setattr(causal_masks, "DEVICES", ("cpu",))
    execution = Execution(graph)
    given: list[Any] = []
    attention = torch.ops.aten.scaled_dot_product_attention.default

    def called(*args: Any, **kwargs: Any) -> torch.Tensor:
        given.append(args)
        return attention(*args, **kwargs)

    execution._targets |= {node: called for node in execution.nodes if mask_of(node) is not None}
    (found,) = execution.outputs(batch)
    assert len(given) == 2
    assert all((args[3] is None) is (padding == 0) for args in given)
    real = batch["attention_mask"].bool()
    # Another kernel sums in another order.
    assert torch.allclose(found[real], expected[real], atol=1e-5)


def test_blocks_share_a_mask_also_where_the_graph_is_edited_on_the_way(
    tiny_graph: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two batches, and a run that begins and one that goes on behind an edit, as the sweep's: one mask for all."""
    _, graph = tiny_graph("llama")
    graph.causal_masks.clear()
    batch = {"input_ids": torch.arange(18).reshape(2, 9), "attention_mask": torch.ones(2, 9, dtype=torch.int64)}
    (expected,) = Execution(graph).outputs(batch)
    assert not graph.causal_masks
    monkeypatch.setattr(causal_masks, "DEVICES", ("cpu",))
    masks = []
    for _ in range(2):
        execution = Execution(graph)
        environment = execution.start(batch)
        for i, node in enumerate(execution.nodes):
            if (mask := mask_of(node)) is not None:
                masks.append(environment[mask])
                execution = Execution(graph)
            execution.run(environment, i, i + 1)
        assert torch.allclose(environment[execution.results[0]], expected, atol=1e-5)
    assert len(masks) == 4
    assert all(mask is masks[0] for mask in masks)
    graph.causal_masks.clear()


@pytest.mark.parametrize("kind", ["mixtral", "gpt2", "bert", "llama"])
@pytest.mark.parametrize("padding", [0, 3])
def test_what_is_no_causal_mask_is_left_alone(
    tiny_graph: Any, monkeypatch: pytest.MonkeyPatch, kind: str, padding: int
) -> None:
    """Blocks that write into tensors of their own, encoders and padding: what waits between blocks is what did."""
    _, graph = tiny_graph(kind)
    batch = {"input_ids": torch.arange(18).reshape(2, 9), "attention_mask": torch.ones(2, 9, dtype=torch.int64)}
    batch["attention_mask"][0, :padding] = 0

    def run() -> tuple[torch.Tensor, set[str]]:
        execution = Execution(graph)
        environment, names = execution.start(batch), set[str]()
        for i in range(len(execution.nodes)):
            execution.run(environment, i, i + 1)
            masks = {node.name for node in environment if node.name not in batch}
            names |= {f"{i} {name}" for name in masks}
        return environment[execution.results[0]], names

    expected, waited = run()
    monkeypatch.setattr(causal_masks, "DEVICES", ("cpu",))
    found, waits = run()
    graph.causal_masks.clear()
    real = batch["attention_mask"].bool()
    assert torch.allclose(found[real], expected[real], atol=1e-5)
    if padding or kind == "bert":
        assert torch.equal(found, expected)
        assert waits == waited
