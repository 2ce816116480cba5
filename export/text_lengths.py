"""How many tokens an ONNX file that reads text takes at once: as its configuration says, and as runs show."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from dotresize_fx.errors import OnnxRuntimeError
from dotresize_fx.export.quiet import quiet_libraries
from dotresize_fx.onnx_form.execution import OnnxExecution
from dotresize_fx.program_inputs import ProgramInputs

IDS = "input_ids"


def some_text(inputs: ProgramInputs, rows: int, length: int) -> dict[str, torch.Tensor]:
    """Random ids of the table that they look up, and a mask of ones."""
    below = next((spec.below for spec in inputs.specs if spec.name == IDS), None) or 2
    ids = torch.randint(0, below, (rows, length), generator=torch.Generator().manual_seed(0))
    return {spec.name: (ids if spec.name == IDS else torch.ones_like(ids)).to(spec.dtype) for spec in inputs.specs}


def stated_positions(folder: Path) -> int:
    """How many tokens the configuration beside a file gives a sequence; what is rotated takes more and makes less of
    them.
    """
    import transformers

    if not (folder / "config.json").is_file():
        return sys.maxsize
    try:
        with quiet_libraries():
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception:  # whatever reading it raises: an unknown model type, say, whose file runs all the same
        return sys.maxsize
    positions = int(getattr(config.get_text_config(), "max_position_embeddings", None) or 0)
    return positions if positions > 0 else sys.maxsize


def longest(execution: OnnxExecution, inputs: ProgramInputs, wanted: int) -> int:
    """The most tokens that a sequence may have, up to ``wanted``: tables of positions end somewhere."""

    def takes(length: int) -> bool:
        try:
            execution.outputs(some_text(inputs, 1, length))
        except OnnxRuntimeError:
            return False
        return True

    if takes(wanted):
        return wanted
    least, most = 1, wanted
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if takes(middle) else (least, middle)
    return least
