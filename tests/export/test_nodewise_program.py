"""Decomposed op by op a program is what torch's own retrace makes of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dotresize_fx.export.nodewise_program import NodewiseProgram

aten = torch.ops.aten


class Norms(torch.nn.Module):
    """Two norms alike, the last of them the output, a cast, a comparison and a flattening."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.rand(8) + 0.5)
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.nn.functional.rms_norm(x, (8,), self.gain, 1e-5)
        mask = (y > 0) & (x > 0)
        z = self.linear(y) * mask.to(torch.float32)
        return torch.nn.functional.rms_norm(z, (8,), self.gain, 1e-5), z.flatten(1)


class Splits(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = torch.nn.functional.rms_norm(x, (8,)).chunk(2, -1)
        return left * right


def exported(module: torch.nn.Module) -> torch.export.ExportedProgram:
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    return torch.export.export(module, (torch.randn(2, 3, 8),), dynamic_shapes=(sizes,))


def table() -> dict[Any, Any]:
    """What a converter that knows linears as they are leaves to be decomposed."""
    found = dict(torch.export.default_decompositions())
    found.pop(aten.linear.default)
    return found


def kinds(program: torch.export.ExportedProgram) -> set[Any]:
    return {node.target for node in program.graph.nodes if node.op == "call_function"}


def whole(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Filled by one for each time that torch retraces."""
    seen: list[bool] = []
    original = torch.export.ExportedProgram.run_decompositions

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(True)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", run)
    return seen


def test_it_computes_the_same_in_the_ops_that_torch_decomposes_to(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module = Norms()
    wanted = kinds(exported(module).run_decompositions(table()))
    program, retraced = exported(module), whole(monkeypatch)
    done = NodewiseProgram.of(program).run_decompositions(table())
    assert not retraced
    assert kinds(done) - wanted <= {aten.add.Tensor}  # a norm is spelled as models spell it, which fusions look for
    assert [node.args[1] for node in done.graph.find_nodes(op="call_function", target=aten.mean.dim)] == [[-1], [-1]]
    assert aten.linear.default in wanted
    assert not wanted & {aten.to.dtype, aten.flatten.using_ints, aten.rms_norm.default}
    done.validate()
    x = torch.randn(4, 5, 8)
    for found, expected in zip(done.module()(x), module(x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)  # float32, the sums in another order


def test_what_cannot_be_taken_alone_torch_decomposes(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Splits()
    program, retraced = exported(module), whole(monkeypatch)
    done = NodewiseProgram.of(program).run_decompositions(table())
    assert retraced
    x = torch.randn(4, 5, 8)
    torch.testing.assert_close(done.module()(x), module(x), rtol=1e-6, atol=1e-6)


def test_what_an_exporter_put_in_without_its_value_is_given_one() -> None:
    program = NodewiseProgram.of(exported(Norms()))
    norm = next(node for node in program.graph.nodes if node.target == aten.rms_norm.default)
    with program.graph.inserting_before(norm):
        copy = program.graph.call_function(aten.clone.default, (norm.args[0],))
    norm.replace_input_with(norm.args[0], copy)
    decomposed = program.run_decompositions(table())
    assert aten.rms_norm.default not in kinds(decomposed)
    assert all("val" in node.meta for node in decomposed.graph.nodes if node.op == "call_function")
