"""What a program is called with and returns, once some of it is gone."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

from dotresize_fx.fx_form.call_shape import leave_out


class Cached(torch.nn.Module):
    def forward(self, x: torch.Tensor, past: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        present = {f"present.{i}": torch.cat([layer["key"], x], 0) for i, layer in enumerate(past)}
        return {"y": x + 1, **present}


def test_what_is_gone_is_neither_given_nor_returned() -> None:
    inputs: dict[str, Any] = {"x": torch.ones(2), "past": [{"key": torch.full((i,), i + 0.0)} for i in range(3)]}
    program = torch.export.export(Cached(), (), inputs)
    before = program.module_call_graph
    taken, given = program.graph_signature.user_inputs, program.graph_signature.user_outputs
    closed = {"present.2": "present.1"}
    leave_out(program, [taken[2]], [given[2]], lambda name: closed.get(name, name))
    assert program.call_spec.in_spec == pytree.tree_structure(((), {"x": 0, "past": [{"key": 0}, {"key": 0}]}))
    assert program.call_spec.out_spec == pytree.tree_structure({"y": 0, "present.0": 0, "present.1": 0})
    assert [len(layer["key"]) for layer in program.example_inputs[1]["past"]] == [0, 2]
    assert before[0].signature.in_spec.num_leaves == 4  # a program that shared it keeps its own
