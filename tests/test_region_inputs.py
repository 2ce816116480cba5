"""What is told of a rotary embedding from a run: how alike its pairs turn over what the mask lets attention see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.region_inputs import RegionInputs
from dotresize_fx.rotary_coherence import coherence

LENGTH, WIDTH, SIZE = 6, 6, 4
ANGLES = torch.tensor([1.0, 0.1])
WHOLE = torch.ones(LENGTH, LENGTH, dtype=torch.bool)


def rotate(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    return x * angle.cos() + torch.cat([-x[..., SIZE // 2 :], x[..., : SIZE // 2]], -1) * angle.sin()


def attention(mask: Callable[[Any], torch.Tensor | None], **options: bool) -> Callable[..., torch.Tensor]:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        query, key, value = (part(x).view(x.shape[0], LENGTH, -1, SIZE).transpose(1, 2) for part in (m.q, m.k, m.v))
        query, key = rotate(query, m.angle), rotate(key, m.angle)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask(m), **options)
        return m.o(mixed.transpose(1, 2).reshape(x.shape[0], LENGTH, 8))

    return forward


def told(trace: Any, forward: Callable[..., torch.Tensor], angle: torch.Tensor, mask: torch.Tensor) -> Any:
    """Of a run over two sequences, and of an attention mask for their tokens."""
    linears = {name: nn.Linear(WIDTH, 8) for name in "qkv"} | {"o": nn.Linear(8, 5)}
    buffers = {"angle": nn.Buffer(angle), "mask": nn.Buffer(mask)}
    graph: FxGraph = trace(forward, (2, LENGTH, WIDTH), **linears, **buffers)
    (region,) = find_regions(graph).of_kind("query_key")
    inputs, execution = RegionInputs(graph, region), Execution(graph)
    values = execution.run(execution.start({"x": torch.zeros(2, LENGTH, WIDTH)}), 0, len(execution.nodes), inputs.nodes)
    return lambda tokens=None: inputs.coherence(values, tokens)


def turns(length: int = LENGTH) -> torch.Tensor:
    return torch.polar(torch.ones(length, 2), torch.arange(length)[:, None] * ANGLES).to(torch.complex128)


TABLE = (torch.arange(LENGTH)[:, None] * ANGLES.repeat(2))[None, None]
MASKS: dict[str, tuple[Any, torch.Tensor]] = {
    "none": (attention(lambda m: None), WHOLE),
    "causal": (attention(lambda m: None, is_causal=True), WHOLE.tril()),
    "of bools": (attention(lambda m: m.mask > 0), WHOLE.tril().triu(-2)),
    "of numbers": (attention(lambda m: torch.where(m.mask > 0, 0.0, torch.finfo(torch.float32).min)), WHOLE.tril()),
}


@pytest.mark.parametrize("mask", MASKS)
def test_what_the_mask_lets_attention_see(trace: Any, mask: str) -> None:
    forward, allowed = MASKS[mask]
    found = told(trace, forward, TABLE, allowed.float()[None, None])
    # Tables are float32.
    torch.testing.assert_close(found(), coherence(turns(), allowed), rtol=0, atol=1e-6)


def test_padding_is_left_out(trace: Any) -> None:
    table = (torch.tensor([1, 1, 0, 1, 2, 3])[:, None] * ANGLES.repeat(2))[None, None]
    found = told(trace, MASKS["causal"][0], table, WHOLE.float()[None, None])
    tokens = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    torch.testing.assert_close(found(tokens), coherence(turns(4), WHOLE[:4, :4].tril()), rtol=0, atol=1e-6)
    assert found(torch.zeros(2, LENGTH)) is None


def test_numbers_that_do_not_turn_in_pairs(trace: Any) -> None:
    table = torch.arange(LENGTH)[:, None] * torch.tensor([1.0, 0.1, 0.5, 0.2])
    assert told(trace, MASKS["causal"][0], table[None, None], WHOLE.float()[None, None])() is None
