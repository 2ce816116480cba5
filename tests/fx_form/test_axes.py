"""What ops do to axes, as the neutral view tells it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dotresize_fx.fx_form.graph import FxGraph

FORMS: dict[str, tuple[Callable[[Any, torch.Tensor], Any], dict[str, Any]]] = {
    "transpose": (lambda m, x: x.transpose(0, -1), {"form": "permute", "order": (2, 1, 0)}),
    "permute": (lambda m, x: x.permute(1, -1, 0), {"form": "permute", "order": (1, 2, 0)}),
    "view": (lambda m, x: x.view(-1, 2, 6), {"form": "view", "sizes": (-1, 2, 6)}),
    "view of a computed size": (lambda m, x: x.reshape(x.shape[0], 12), {"form": "view", "sizes": (None, 12)}),
    "expand": (lambda m, x: x[:, :, None].expand(-1, 3, 5, 4), {"form": "expand", "sizes": (-1, 3, 5, 4)}),
    "unsqueeze": (lambda m, x: x.unsqueeze(-2), {"form": "unsqueeze", "axis": 2}),
    "concatenation": (lambda m, x: torch.cat([x, x], -2), {"form": "concat", "axis": 1}),
    "concatenation of rows": (lambda m, x: torch.cat([x, x]), {"form": "concat", "axis": 0}),
    "slice": (lambda m, x: x[..., 1:3], {"form": "slice", "axis": 2, "start": 1, "stop": 3}),
    "slice to the end": (lambda m, x: x[:, 2:], {"form": "slice", "axis": 1, "start": 2, "stop": None}),
    "slice in steps": (lambda m, x: x[..., ::2], {"form": "strided", "axis": 2, "start": 0, "step": 2}),
    "choice": (lambda m, x: torch.where(x > 0, x, x.exp()), {"form": "where"}),
    "zeros": (lambda m, x: torch.zeros(2), {"form": "fill", "number": 0}),
    "ones": (lambda m, x: torch.full((2,), 1.0), {"form": "fill", "number": 1.0}),
    "a function": (lambda m, x: x.exp(), {}),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms(trace: Callable[..., FxGraph], name: str) -> None:
    forward, expected = FORMS[name]
    attributes = trace(forward, (2, 3, 4)).ops[-1].attributes
    known = ("form", "axis", "order", "sizes", "start", "stop", "step", *(("number",) if "number" in expected else ()))
    assert {key: attributes[key] for key in known if key in attributes} == expected


def test_parts_of_a_split(trace: Callable[..., FxGraph]) -> None:
    for forward, axis, sizes in (
        (lambda m, x: x.split([1, 3], -1), 2, (1, 3)),
        (lambda m, x: x.chunk(2, dim=2), 2, (2, 2)),
        (lambda m, x: x.split(2, 1), 1, (2, 1)),
    ):
        split, *parts = (op.attributes for op in trace(forward, (2, 3, 4)).ops if op.attributes.get("form") != "size")
        assert (split["form"], split["axis"], split["sizes"]) == ("split", axis, sizes)
        assert [(part["form"], part["index"]) for part in parts] == [("part", 0), ("part", 1)]


def test_inputs_that_stand_twice_are_given_twice(trace: Callable[..., FxGraph]) -> None:
    graph = trace(lambda m, x: torch.cat([x, x.exp(), x]), (2, 3))
    assert [value.name for value in graph.ops[-1].inputs] == ["x", "exp", "x"]
