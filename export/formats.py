"""The slim program in other formats than ONNX: each written into a folder of its name, then run and compared."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dotresize_fx.errors import (
    DotresizeError,
    FormatError,
    MissingExtraError,
    OnnxRuntimeError,
    UsageError,
    VerificationError,
)
from dotresize_fx.export.capture import what_it_said
from dotresize_fx.export.checkpoint import FOLDER as CHECKPOINT
from dotresize_fx.export.onnx_runtime import compare_outputs
from dotresize_fx.export.trials import mask_name, verification_cases, verification_inputs
from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.report.contents import FormatFigures, Verification

if TYPE_CHECKING:
    from dotresize_fx.slim_result import SlimResult

Cases = Iterator[tuple[dict[str, Any], list[Any]]]
# By the format, the module that has to be there; of executorch all of the first name may be an empty folder.
NEEDED = {"pt2": "torch", "openvino": "openvino", "executorch": "executorch.exir", "genai": "onnxruntime_genai"}
RUNTIMES = {"pt2": "torch", "openvino": "openvino", "executorch": "executorch"}  # genai's is ONNX Runtime


def require_formats(formats: Iterable[str], given: bool) -> None:
    """Say before the long work what is wrong with these; imports none of the libraries.

    Raises:
        UsageError: a module or a program, whose inputs are ``given``, has no such format.
        MissingExtraError: a library is not installed.
    """
    for name in formats:
        if name == "executorch" and given:
            raise UsageError(
                "--format executorch plans memory for the largest sizes, which a module or a program does not state: "
                "leave it out"
            )
        if name in NEEDED and not _installed(NEEDED[name]):
            raise MissingExtraError(f"--format {name}: not installed; run: pip install 'dotresize-fx[{name}]'")


def _installed(module: str) -> bool:
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return False
    return spec is not None and spec.origin is not None  # without: an empty folder that an uninstall left behind


def write_formats(
    result: SlimResult, folder: Path, work: Path, tolerance: float
) -> tuple[tuple[FormatFigures, ...], tuple[str, ...]]:
    """Write, run and compare every format that the options name, and notes; none of them is left out in silence.

    Raises:
        FormatError: a library does not convert the program, or does not run what it made.
        VerificationError: what was written computes something else.
    """
    found, notes = [], []
    for name in (name for name in NEEDED if name in result.options.formats):
        (place := folder / name).mkdir()
        with result.progress.stage(f"write {name}"):
            path = _written(result, name, place, work)
        with result.progress.stage(f"verify {name}"):
            verification = _verified(result, name, path, work, tolerance)
        found.append(
            FormatFigures(
                format=name,
                folder=name,
                runtime=f"{RUNTIMES[name]} {version(RUNTIMES[name])}" if name in RUNTIMES else "ONNX Runtime",
                file_bytes=sum(file.stat().st_size for file in place.rglob("*") if file.is_file()),
                verification=verification,
            )
        )
        notes += _notes(result, name)
    if found and result.options.precision is not None:
        notes.append(f"{', '.join(row.format for row in found)} hold float32")
    return tuple(found), tuple(notes)


def _written(result: SlimResult, name: str, place: Path, work: Path) -> Path:
    model, captured, slim = result.loaded.model, result.captured, result.slim
    try:
        if name == "pt2":
            from dotresize_fx.export.emit_pt2 import emit_pt2

            return emit_pt2(captured, slim, place)
        if name == "openvino":
            from dotresize_fx.export.emit_openvino import emit_openvino

            return emit_openvino(model, captured, slim, place)
        if name == "executorch":
            from dotresize_fx.export.emit_executorch import emit_executorch

            return emit_executorch(model, captured, slim, place)
        from dotresize_fx.export.emit_genai import emit_genai

        checkpoint = place.parent / CHECKPOINT
        if not checkpoint.is_dir():
            raise UsageError("--format genai is built from the checkpoint: have it written too")
        return emit_genai(checkpoint, place, work)
    except (DotresizeError, OSError):
        raise
    except Exception as error:  # whatever the libraries' converters raise
        raise FormatError(f"--format {name}: it does not convert: {what_it_said(error)}; leave it out") from error


def _verified(result: SlimResult, name: str, path: Path, work: Path, tolerance: float) -> Verification:
    cases = _prompts(result) if name == "genai" else verification_cases(result)
    try:
        found = compare_outputs(path, cases, work, mask=mask_name(result), runtime=name)
    except OnnxRuntimeError as error:  # what a child says that has ended
        raise FormatError(f"--format {name}: what was written does not run: {error}; leave it out") from error
    verification = found.within(tolerance)
    if not verification.passed:
        raise VerificationError(
            f"--format {name}: it differs from the slim program by {found.max_abs_difference:.2e} (tolerance "
            f"{tolerance:.0e}): nothing was written; leave it out, and please report this model"
        )
    return verification


def _prompts(result: SlimResult) -> Cases:
    """Rows without padding, which the builder's graph takes on the right alone, and their logits."""
    execution = Execution(result.slim)
    for inputs in verification_inputs(result):
        whole = inputs["attention_mask"].bool().all(1)
        if whole.any():
            logits = execution.outputs(inputs)[0][whole].numpy()
            yield {name: inputs[name][whole].numpy() for name in ("input_ids", "attention_mask")}, [logits]


def _notes(result: SlimResult, name: str) -> list[str]:
    if name == "executorch":
        from dotresize_fx.export.emit_executorch import largest_sizes

        sizes = ", ".join(f"{axis} {size}" for axis, size in largest_sizes(result.captured).items())
        return [f"executorch: its memory is planned for at most {sizes}"]
    if name == "genai":
        return ["genai: no padding on the left, and a cache of the builder's own"]
    return []
