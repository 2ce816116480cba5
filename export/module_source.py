"""From a module and example inputs to a model ready for capture. The user's module stays as it is."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch

from dotresize_fx.errors import BadWeightsError, UsageError
from dotresize_fx.export.capture import no_fast_path
from dotresize_fx.export.model_source import LoadedModel
from dotresize_fx.export.quiet import quiet_libraries
from dotresize_fx.export.weight_files import first_line

Examples = Mapping[str, Any] | tuple[Any, ...] | list[Any] | torch.Tensor
"""Keyword arguments, positional arguments, or the only argument of a module's ``forward``."""

CONSTANTS = (bool, int, float, str, type(None))


def load_module(module: torch.nn.Module, example_inputs: Examples) -> LoadedModel:
    """A copy of the module in eval mode, float32 on the CPU, that shares what already is so; tried once.

    Numbers, flags and None among the example inputs become part of the program. A transformers model gives no cache.

    Raises:
        UsageError: the example inputs do not fit the module, or something else than tensors goes in or comes out.
        BadWeightsError: a weight is NaN or infinite.
    """
    name = type(module).__name__
    given = _bound(module, example_inputs)
    constants = {key: value for key, value in given.items() if isinstance(value, CONSTANTS)}
    sample = {key: value.detach().to("cpu") for key, value in given.items() if isinstance(value, torch.Tensor)}
    if strange := [key for key in given if key not in constants and key not in sample]:
        kind = type(given[strange[0]]).__name__
        raise UsageError(
            f"example inputs: {strange[0]} of {name} is a {kind}: give tensors and plain numbers, or wrap it in "
            "one that takes them"
        )
    if not sample or not any(value.ndim for value in sample.values()):
        raise UsageError(f"example inputs: {name} is given no tensor that has an axis")
    for key, value in sample.items():
        if value.is_floating_point() and value.isnan().any():
            raise UsageError(f"example inputs: {key} of {name} holds NaN")
    model = _copied(module)
    if _dtypes(module) != _dtypes(model):
        sample = {key: value.float() if value.is_floating_point() else value for key, value in sample.items()}
    if constants:
        model.forward = _with_constants(model.forward, constants)
    _try(model, sample)
    description = f"module {name}, as it was in memory"
    return LoadedModel(model, None, "a module has none", None, "outputs", description, {}, sample)


def _bound(module: torch.nn.Module, example_inputs: Examples) -> dict[str, Any]:
    """The example inputs by the names that ``forward`` gives them."""
    signature = inspect.signature(module.forward)
    named = isinstance(example_inputs, Mapping)
    args: Any = () if named else example_inputs if isinstance(example_inputs, (tuple, list)) else (example_inputs,)
    kwargs: Any = example_inputs if named else {}
    takes = f"{type(module).__name__}.forward({', '.join(signature.parameters)})"
    try:
        bound = signature.bind(*args, **kwargs).arguments
    except TypeError as error:
        raise UsageError(f"example inputs do not fit {takes}: {first_line(error)}") from error
    given: dict[str, Any] = {}
    for parameter in signature.parameters.values():
        if parameter.name not in bound:
            continue
        value = bound[parameter.name]
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            raise UsageError(f"example inputs: {takes} does not name {parameter.name}: wrap it in a module that does")
        if parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
            raise UsageError(f"example inputs: {takes} takes {parameter.name} by position alone: wrap it in a module")
        given |= value if parameter.kind is inspect.Parameter.VAR_KEYWORD else {parameter.name: value}
    return given


def _copied(module: torch.nn.Module) -> torch.nn.Module:
    name = type(module).__name__
    memo: dict[int, Any] = {}
    for key, tensor in [*module.named_parameters(), *module.named_buffers()]:
        parameter, moved = isinstance(tensor, torch.nn.Parameter), tensor.detach().to("cpu")
        if moved.is_floating_point():
            moved = moved.float()
            if moved.numel() and not torch.stack(moved.aminmax()).isfinite().all() and parameter:
                raise BadWeightsError(f"{name}: {key} holds NaN or infinity: the model is broken")
        memo[id(tensor)] = torch.nn.Parameter(moved, requires_grad=False) if parameter else moved
    try:
        model = copy.deepcopy(module, memo)
    except Exception as error:  # whatever its attributes raise
        raise UsageError(f"{name} cannot be copied, and is not to be changed: {first_line(error)}") from error
    model.eval()
    for part in model.modules():  # transformers' models, each part of which may have a configuration of its own
        if getattr(getattr(part, "config", None), "use_cache", False):
            part.config.use_cache = False  # type: ignore[union-attr]
    return model


def _dtypes(module: torch.nn.Module) -> set[torch.dtype]:
    return {parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()}


def _with_constants(forward: Any, constants: Mapping[str, Any]) -> Any:
    def call(**inputs: torch.Tensor) -> Any:
        return forward(**inputs, **constants)

    return call


@torch.no_grad()
def _try(model: torch.nn.Module, sample: Mapping[str, torch.Tensor]) -> None:
    name = type(model).__name__
    try:
        with no_fast_path(), quiet_libraries():
            found = model(**sample)
    except Exception as error:
        shapes = ", ".join(f"{key} {tuple(value.shape)}" for key, value in sample.items())
        raise UsageError(f"example inputs ({shapes}) do not fit {name}: {first_line(error)}") from error
    outputs = output_tensors(found)
    if not outputs or not outputs[0].is_floating_point() or not outputs[0].ndim:
        raise UsageError(f"{name} puts out no tensor of numbers first, which is what slimming keeps to")
    if not all(output.isfinite().all() for output in outputs):
        raise UsageError(f"{name} puts out NaN or infinity on its example inputs: the model or the inputs are broken")


def output_tensors(found: Any) -> list[torch.Tensor]:
    """The tensors of what a module returned, in the order in which its program puts them out."""
    from transformers.exporters.utils import get_leaf_tensors

    return list(get_leaf_tensors(found).values())
