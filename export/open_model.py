"""Whatever can be slimmed, opened: a name, a saved program, a module with example inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dotresize_fx.errors import UsageError
from dotresize_fx.export.model_source import LoadedModel, load_model
from dotresize_fx.export.module_source import Examples, load_module
from dotresize_fx.export.program_file import is_program_file, load_program, load_program_file
from dotresize_fx.memory import WHAT_IS_FREE, Memory
from dotresize_fx.task import reads_text

Model = str | Path | LoadedModel | torch.nn.Module | torch.export.ExportedProgram


def reads_given_inputs(model: Model) -> bool:
    """Whether it calibrates on inputs of its own, not on text; nothing is loaded for that."""
    if isinstance(model, LoadedModel):
        return not reads_text(model.task)
    return isinstance(model, (torch.nn.Module, torch.export.ExportedProgram)) or is_program_file(model)


def open_model(
    model: Model,
    example_inputs: Examples | None = None,
    *,
    trust_remote_code: bool = False,
    memory: Memory = WHAT_IS_FREE,
    reads: bool = True,
) -> LoadedModel:
    """``memory`` and ``reads``: see :func:`load_model`; what is no folder is read at once.

    Raises:
        UsageError: example inputs that are missing or not wanted, and what the sources say.
        ModelNotFoundError, BadWeightsError: see :func:`load_model`, :func:`load_module`, :func:`load_program_file`.
    """
    if isinstance(model, torch.nn.Module):
        if example_inputs is None:
            raise UsageError(f"{type(model).__name__} is a module: give the inputs to trace it with as example_inputs")
        return load_module(model, example_inputs)
    if example_inputs is not None:
        raise UsageError("example_inputs go with a module: a name or a saved program needs none")
    if isinstance(model, LoadedModel):
        return model
    if isinstance(model, torch.export.ExportedProgram):
        return load_program(model, "a program in memory")
    if is_program_file(model):
        return load_program_file(Path(model))
    return load_model(str(model), trust_remote_code=trust_remote_code, memory=memory, reads=reads)


def model_name(loaded: LoadedModel) -> str:
    """What a report calls it: its class, or the saved program's file."""
    found: Any = loaded.source.removeprefix("program ") if loaded.program is not None else type(loaded.model).__name__
    return str(found)
