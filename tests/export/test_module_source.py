"""A module and its example inputs: what fits, what does not, and that the user's module stays as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dotresize_fx.errors import BadWeightsError, UsageError
from dotresize_fx.export.module_source import load_module
from dotresize_fx.export.open_model import open_model


class Scorer(nn.Module):
    """Takes tensors, a number, a flag, and what has a default."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.drop = nn.Linear(4, 4), nn.Dropout(0.5)
        self.register_buffer("shift", torch.full((4,), float("-inf")).exp())

    def forward(self, x: torch.Tensor, scale: float = 1.0, extra: torch.Tensor | None = None) -> Any:
        found = self.drop(self.inner(x)) * scale + self.shift
        return found if extra is None else found + extra


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("given", [X, (X,), [X, 2.0], {"x": X}, {"x": X, "scale": 2.0, "extra": None}])
def test_example_inputs_are_bound_as_a_call_binds_them(given: Any) -> None:
    module = Scorer().train()
    loaded = load_module(module, given)
    assert list(loaded.sample) == ["x"]
    scale = 2.0 if len(given) > 1 and not isinstance(given, torch.Tensor) else 1.0
    torch.testing.assert_close(loaded.model(**loaded.sample), module.eval()(X, scale))


def test_the_users_module_stays_as_it_is() -> None:
    module = Scorer().train()
    loaded = load_module(module, X)
    assert module.training
    assert module.inner.weight.requires_grad
    assert not loaded.model.training
    assert loaded.model.inner.weight.data_ptr() == module.inner.weight.data_ptr()  # no memory is spent on it


def test_other_floats_become_float32() -> None:
    module = Scorer().double()
    loaded = load_module(module, X.double())
    assert loaded.model.inner.weight.dtype == loaded.sample["x"].dtype == torch.float32
    assert module.inner.weight.dtype == torch.float64


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "do not fit Scorer.forward(x, scale, extra): missing a required argument: 'x'"),
        ({"y": X}, "do not fit Scorer.forward(x, scale, extra): missing a required argument: 'x'"),
        ({"x": X, "y": X}, "do not fit Scorer.forward(x, scale, extra): got an unexpected keyword argument 'y'"),
        ((X, 1.0, X, X), "do not fit Scorer.forward(x, scale, extra): too many positional arguments"),
        ((X[:, :3],), "example inputs (x (3, 3)) do not fit Scorer: mat1 and mat2 shapes cannot be multiplied"),
        ({"x": X, "extra": {"deep": X}}, "extra of Scorer is a dict: give tensors and plain numbers"),
        ((torch.tensor(1.0),), "Scorer is given no tensor that has an axis"),
        ((X * float("nan"),), "x of Scorer holds NaN"),
        ((X * float("inf"),), "Scorer puts out NaN or infinity on its example inputs"),
    ],
)
def test_example_inputs_that_do_not_fit(given: Any, said: str) -> None:
    with pytest.raises(UsageError) as found:
        load_module(Scorer(), given)
    assert said in str(found.value)
    assert "\n" not in str(found.value)


def test_weights_that_are_broken() -> None:
    module = Scorer()
    module.inner.bias.data[1] = float("nan")
    with pytest.raises(BadWeightsError, match=r"Scorer: inner.bias holds NaN or infinity"):
        load_module(module, X)


class Counts(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.argmax(-1)


def test_what_comes_out_must_be_numbers() -> None:
    with pytest.raises(UsageError, match="Counts puts out no tensor of numbers first"):
        load_module(Counts(), X)


def test_example_inputs_go_with_a_module_alone() -> None:
    with pytest.raises(UsageError, match="Scorer is a module: give the inputs to trace it with as example_inputs"):
        open_model(Scorer())
    with pytest.raises(UsageError, match="example_inputs go with a module"):
        open_model("minilm-l6", X)
