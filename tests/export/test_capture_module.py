"""Capture by example inputs: which sizes are free is found by trying, and what is no function is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dotresize_fx.errors import CaptureError
from dotresize_fx.export.capture import Captured
from dotresize_fx.export.capture_module import capture_module, untraced_samples
from dotresize_fx.export.module_source import load_module
from dotresize_fx.fx_form.execution import Execution


class Around(nn.Module):
    """An FFN around which a test puts what it likes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def ffn(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x).relu())


def captured(module: nn.Module, *inputs: torch.Tensor) -> Captured:
    return capture_module(load_module(module, inputs))


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


class Plain(Around):
    def forward(self, input: torch.Tensor) -> torch.Tensor:  # a builtin's name, as many modules have it
        return self.ffn(input)


@pytest.mark.parametrize("rows", [1, 4])
def test_batch_and_length_are_free_and_widths_are_not(rows: int) -> None:
    found = captured(Plain(), draw(rows, 4, 4))  # sizes that happen to be equal are not taken for one
    assert found.inputs is not None
    (spec,) = found.inputs.specs
    batch, length, width = spec.sizes
    assert (spec.name, width) == ("input", 4)
    assert isinstance(batch, str)
    assert isinstance(length, str)
    assert batch != length
    assert (found.inputs.batch, found.inputs.batch_size, found.notes) == ({"input"}, None, ())
    # The module is compared on one row, and on half the length: none of that was traced.
    shapes = [tuple(one["input"].shape) for one in untraced_samples(found.sample, found.inputs)]
    assert shapes == [(max(2, rows), 4, 4), (1, 4, 4), (max(2, rows), 2, 4)]


class Fixed(Around):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.ffn(ids.float())


def test_what_is_fixed_is_told_with_the_reason() -> None:
    found = captured(Fixed(), torch.arange(12).view(3, 4))
    assert found.inputs is not None
    assert found.inputs.specs[0].sizes[1] == 4
    (note,) = found.notes
    assert note.startswith("sizes that are fixed: axis 1 of ids is 4")
    assert "torch.export said: " in note


class Attends(Around):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.ffn(x.mean(0, keepdim=True) + x)


def test_samples_that_act_on_each_other_stay_together() -> None:
    found = captured(Attends(), draw(3, 5, 4))
    assert found.inputs is not None
    assert not found.inputs.batch
    assert found.notes == ("the first axis of the inputs is no axis of samples: batches are kept whole",)


class Masked(Around):
    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return self.ffn(torch.nn.functional.scaled_dot_product_attention(x, x, x, bias))


def test_what_only_happens_to_be_as_long_is_no_batch() -> None:
    found = captured(Masked(), draw(5, 5, 4), draw(5, 5))
    assert found.inputs is not None
    assert found.inputs.batch == {"x"}
    first, second = found.inputs.specs
    assert second.sizes == (first.sizes[1], first.sizes[1])


class Table(Around):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)

    def forward(self, token_type: torch.Tensor) -> torch.Tensor:
        return self.ffn(self.table(token_type))


def test_ids_have_a_bound_and_are_no_answers() -> None:
    found = captured(Table(), torch.arange(6).view(2, 3))
    assert found.inputs is not None
    assert found.inputs.specs[0].below == 7
    assert found.predicts == ""


class Branches(Around):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.ffn(x) if x.sum() > 0 else x


class Remembers(Around):
    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        Remembers.calls += 1
        return self.ffn(x) * Remembers.calls


class Writes(Around):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.add_(1)
        return self.ffn(x) * self.seen


class Chance(Around):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(self.ffn(x), 0.5)


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (Branches, r"torch.export cannot capture Branches: Could not guard on data-dependent expression .* at test_"),
        (Remembers, "the program captured from Remembers does not compute what its forward pass does on x"),
        (Writes, "Writes writes into seen: its answers depend on what came before"),
        (Chance, "Chance does not compute what its forward pass does on x .*: it depends on Python state"),
    ],
)
def test_what_is_no_function_of_its_inputs(module: Any, said: str) -> None:
    with pytest.raises(CaptureError, match=said) as found:
        captured(module(), draw(3, 5, 4))
    assert "\n" not in str(found.value)
    assert len(str(found.value)) < 600


def test_a_saved_program_has_what_it_was_exported_with() -> None:
    from dotresize_fx.export.program_file import load_program

    module = Plain().eval()
    whole = load_program(torch.export.export(module, (draw(3, 5, 4),)), "a program")
    found = capture_module(whole)
    assert found.inputs is not None
    assert found.inputs.specs[0].sizes == (3, 5, 4)
    assert (found.inputs.batch, found.inputs.batch_size) == ({"input"}, 3)
    with torch.no_grad():
        expected = module(draw(3, 5, 4))
    assert torch.equal(Execution(found.graph).outputs({"input": draw(3, 5, 4)})[0], expected)
    noisy = torch.export.export(Chance(), (draw(3, 5, 4),))
    with pytest.raises(CaptureError, match="or on chance"):
        capture_module(load_program(noisy, "a program"))
