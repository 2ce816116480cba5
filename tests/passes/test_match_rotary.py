"""match_rotary: halves rotated against each other, and what only looks like it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.passes.match_rotary import Rotary, match_rotary

Trace = Callable[..., FxGraph]
Rotation = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def turn(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([-x[..., 4:], x[..., :4]], -1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return x * cos + turn(x) * sin


def matched(trace: Trace, rotation: Rotation, width: int = 8) -> tuple[FxGraph, Rotary | None]:
    def forward(m: Any, x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
        return rotation(x.exp(), angle.cos(), angle.sin())

    graph = trace(forward, (2, width), (2, 8))
    (result,) = graph.outputs
    return graph, match_rotary(graph, result)


SPELLINGS: dict[str, Rotation] = {
    "as it stands": rotate,
    "sine first": lambda x, cos, sin: turn(x) * sin + x * cos,
    "tables first": lambda x, cos, sin: cos * x + sin * turn(x),
    "halves by number": lambda x, cos, sin: x * cos + torch.cat([-x[..., 4:8], x[..., 0:4]], 1) * sin,
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(trace: Trace, name: str) -> None:
    graph, rotary = matched(trace, SPELLINGS[name])
    assert rotary is not None
    assert (rotary.source.name, rotary.partial) == ("exp", False)
    lower, upper = (graph.op(half).attributes["start"] for half in rotary.halves)
    assert (lower, upper) == (0, 4)
    assert [table.name for table, _ in rotary.tables] == ["cos", "sin"]
    for table, reader in rotary.tables:
        assert table in graph.op(reader).inputs
    assert len(rotary.ops) == 7


def test_a_part_of_the_head(trace: Trace) -> None:
    _, rotary = matched(trace, lambda x, c, s: torch.cat([rotate(x[..., :8], c, s), x[..., 8:]], -1), width=12)
    assert rotary is not None
    assert rotary.partial
    assert rotary.source.name == "exp"
    assert len(rotary.ops) == 10


OTHERS: dict[str, Rotation] = {
    "subtracted": lambda x, cos, sin: x * cos - turn(x) * sin,
    "the wrong half negative": lambda x, cos, sin: x * cos + torch.cat([x[..., 4:], -x[..., :4]], -1) * sin,
    "halves in place": lambda x, cos, sin: x * cos + torch.cat([-x[..., :4], x[..., 4:]], -1) * sin,
    "uneven parts": lambda x, cos, sin: x * cos + torch.cat([-x[..., 3:], x[..., :3]], -1) * sin,
    "doubled": lambda x, cos, sin: x * cos + torch.cat([-2 * x[..., 4:], x[..., :4]], -1) * sin,
    "another tensor turned": lambda x, cos, sin: x * cos + turn(2 * x) * sin,
    "neighbours paired": lambda x, cos, sin: x * cos + torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) * sin,
    "one angle for all": lambda x, cos, sin: x * cos[..., :1] + turn(x) * sin[..., :1],
    "a plain sum": lambda x, cos, sin: x + cos,
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_rotary_embedding(trace: Trace, name: str) -> None:
    assert matched(trace, OTHERS[name])[1] is None
