"""What an ONNX file reads, and its batches for calibration and measurement: the user's arrays, or tokenised text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import to_torch_dtype

from dotresize_fx.calibration import CalibrationData, load_text, prepare_data
from dotresize_fx.errors import CalibrationError, DotresizeError, OnnxRuntimeError, UnknownOpError, UsageError
from dotresize_fx.export.capture_module import predicted_ids, samples_apart
from dotresize_fx.export.check_text import check_length
from dotresize_fx.export.onnx_session import UNKNOWN
from dotresize_fx.export.quiet import quiet_libraries
from dotresize_fx.export.text_lengths import IDS, longest, some_text, stated_positions
from dotresize_fx.export.weight_files import first_line
from dotresize_fx.graph import Kind
from dotresize_fx.input_batches import prepare_inputs, read_inputs
from dotresize_fx.onnx_form.execution import OnnxExecution
from dotresize_fx.onnx_form.graph import OnnxGraph
from dotresize_fx.onnx_form.start import MASK, follows, is_past
from dotresize_fx.options import SEQUENCE_LENGTH, Options
from dotresize_fx.program_inputs import Inputs, InputSpec, ProgramInputs
from dotresize_fx.task import Task

# What ONNX Runtime says of an op that it has no kernel for on this device.
NOT_HERE = "Could not find an implementation for"
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "tokenizer.model")


@dataclass(frozen=True)
class OnnxData:
    """Batches, what the model is for, and the input whose next tokens it predicts, if it does.

    ``inputs`` describe what the user gives: a cache, and what else follows from it, is none of that.
    """

    data: CalibrationData
    inputs: ProgramInputs
    task: Task
    predicts: str
    notes: tuple[str, ...] = ()


def prepare_onnx_data(graph: OnnxGraph, path: Path, options: Options, device: str = "cpu") -> OnnxData:
    """Arrays of ``--calibration-data``, or text for ``--tokenizer``, or one that lies beside the file.

    Raises:
        CalibrationError: the data is not what the model reads, or it does not take it, or puts out NaN on it.
        UsageError: neither data nor a tokenizer is there, or both data and text are given.
    """
    execution = OnnxExecution(graph, device)
    folder = options.tokenizer or path.parent
    has_tokenizer = any((folder / name).is_file() for name in TOKENIZERS)
    if options.tokenizer is not None and not has_tokenizer:
        raise UsageError(f"--tokenizer {folder}: no folder with a tokenizer's files: give one with a tokenizer.json")
    if options.calibration_data:
        if options.calibration or options.tokenizer:
            text = "--calibration" if options.calibration else "--tokenizer"
            raise UsageError(f"{text} and --calibration-data: text or arrays calibrate, give one of the two")
        prepared = _of_arrays(graph, execution, options, device)
    elif has_tokenizer:
        prepared = _of_text(graph, execution, path, folder, options, device)
    else:
        raise UsageError(
            f"{path.name} calibrates on inputs of its own: give --calibration-data, or for text --tokenizer FOLDER, or "
            "put its tokenizer beside it"
        )
    _try(execution, prepared)
    return prepared


def rows_of(graph: OnnxGraph, execution: OnnxExecution, batch: Inputs, value: str) -> int:
    """How many rows a batch makes of a value: all of its axes but the last."""
    piece = execution.piece(0, len(execution.nodes), [value])
    sizes = piece.run(execution.start(batch))[0][value].shape()
    count = 1
    for size in sizes[:-1]:
        count *= size
    return count


def _described(graph: OnnxGraph, given: Sequence[str] | None) -> ProgramInputs:
    """All inputs but a cache; of those that follow from others the ones that are ``given``."""
    model = graph.model
    constants = model.graph.initializers
    values = [value for value in model.graph.inputs if value.name not in constants and not is_past(str(value.name))]
    optional = [value for value in values if follows(str(value.name)) and len(values) > 1]
    values = [v for v in values if v not in optional or (given is not None and str(v.name) in given)]
    if not values:
        raise CalibrationError("the model takes no input to calibrate on")
    tables = {
        op.inputs[0].name: len(graph.parameter(op.weight))
        for op in graph.ops
        if op.kind is Kind.EMBEDDING and op.weight is not None and op.inputs
    }
    specs = tuple(_spec(value, tables.get(str(value.name))) for value in values)
    first = next((spec.sizes[0] for spec in specs if spec.sizes), None)
    if first is None:
        return ProgramInputs(specs)
    batch = frozenset(spec.name for spec in specs if spec.sizes[:1] == (first,))
    return ProgramInputs(specs, batch, first if isinstance(first, int) else None)


def _spec(value: ir.Value, below: int | None) -> InputSpec:
    name = str(value.name)
    if value.shape is None or value.dtype is None:
        raise CalibrationError(f"input {name} has no shape or type: export the model with one")
    try:
        # There are no arrays of bfloat16: what is read as that is given in float32.
        dtype = torch.float32 if value.dtype == ir.DataType.BFLOAT16 else to_torch_dtype(value.dtype)
    except (TypeError, ValueError) as error:
        raise CalibrationError(f"input {name} is no tensor of numbers: cut such a part off the model") from error
    sizes = tuple(
        size if isinstance(size, int) else size.value or ("batch" if axis == 0 else f"{name}[{axis}]")
        for axis, size in enumerate(value.shape)
    )
    return InputSpec(name, dtype, sizes, below)


def _of_arrays(graph: OnnxGraph, execution: OnnxExecution, options: Options, device: str) -> OnnxData:
    everything = _described(graph, None)
    files = list(read_inputs(options.calibration_data, everything))
    inputs = _described(graph, sorted(set.intersection(*(set(arrays) for _, arrays in files))))
    names = ", ".join(path.name for path in options.calibration_data)
    sample = inputs.part(inputs.checked(files[0][1], files[0][0]), 0, inputs.batch_size or 2)

    def run(batch: Inputs) -> list[torch.Tensor]:
        return execution.outputs(batch)[:1]

    notes: tuple[str, ...] = ()
    try:
        _check_numbers(run(sample)[0], names)
        if inputs.batch and not samples_apart(run, sample, inputs):
            notes = ("the first axis of the inputs is no axis of samples: batches are kept whole",)
            inputs = ProgramInputs(inputs.specs)
        predicts = predicted_ids(graph, run, sample)
        positions = _positions(graph, execution, inputs, sample)
    except OnnxRuntimeError as error:
        raise _refused(error, names, sample, execution) from error
    try:
        data = prepare_inputs(files, inputs, positions, names, device)
    except CalibrationError as error:
        raise CalibrationError("; ".join([str(error), *notes])) from error
    return OnnxData(data, inputs, "logits" if predicts else "outputs", predicts, notes)


def _positions(graph: OnnxGraph, execution: OnnxExecution, inputs: ProgramInputs, sample: Inputs) -> int:
    """Rows that a sample makes for the first of the graph's linears that has some."""
    linear = next((op for op in graph.ops if op.is_linear and op.inputs), None)
    if linear is None:
        return 1
    return max(1, rows_of(graph, execution, sample, linear.inputs[0].name) // inputs.samples(sample))


def _of_text(
    graph: OnnxGraph, execution: OnnxExecution, path: Path, folder: Path, options: Options, device: str
) -> OnnxData:
    import transformers

    inputs = _described(graph, None)
    free = IDS in inputs.names and all(isinstance(size, str) for spec in inputs.specs for size in spec.sizes)
    if not free or not {IDS, MASK} >= set(inputs.names):
        why = "with fixed sizes, which texts are not of" if IDS in inputs.names else "which text does not give"
        raise UsageError(f"{path.name} reads {inputs.described()}, {why}: give --calibration-data")
    text = load_text(options.calibration)
    try:
        with quiet_libraries():
            tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever its parsers raise
        raise UsageError(f"the tokenizer in {folder} cannot be read: {first_line(error)}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    sample = some_text(inputs, 2, 8)
    try:
        predicts = predicted_ids(graph, lambda batch: execution.outputs(batch)[:1], sample)
    except OnnxRuntimeError as error:
        raise _refused(error, "text", sample, execution) from error
    task: Task = "decoder" if predicts else "encoder"
    if task == "encoder" and MASK not in inputs.names:
        raise UsageError(f"{path.name} reads no {MASK}, so that padded text is not told: give --calibration-data")
    stated = min(int(tokenizer.model_max_length), stated_positions(path.parent))
    most = longest(execution, inputs, min(stated, max(options.sequence_length, 2)))
    check_length(options.sequence_length, most, SEQUENCE_LENGTH)
    options = replace(options, calibration_tokens=options.tokens_that_calibrate(task))
    data = prepare_data(text, options, tokenizer, task, most, device)
    calibration, evaluation = (
        [{spec.name: batch[spec.name].to(spec.dtype) for spec in inputs.specs} for batch in part]
        for part in (data.calibration, data.evaluation)
    )
    data = replace(data, calibration=calibration, evaluation=evaluation)
    return OnnxData(data, inputs, task, predicts)


def _try(execution: OnnxExecution, prepared: OnnxData) -> None:
    """The largest batch, which must come out as numbers."""
    batches = (*prepared.data.calibration, *prepared.data.evaluation)
    largest = max(batches, key=lambda batch: sum(value.numel() for value in batch.values()))
    try:
        answers = execution.outputs(largest)[0]
    except OnnxRuntimeError as error:
        raise _refused(error, "the data", largest, execution) from error
    _check_numbers(answers, prepared.data.description)


def _check_numbers(answers: torch.Tensor, names: str) -> None:
    if answers.isnan().any():
        raise CalibrationError(f"{names}: the model puts out NaN on it: it overflows, or this is no input of it")


def _refused(error: Exception, names: str, batch: Inputs, execution: OnnxExecution) -> DotresizeError:
    """What a failed run says: of the model, where this ONNX Runtime lacks what it is made of, or of the data."""
    if any(words in str(error) for words in (*UNKNOWN, NOT_HERE)):
        advice = "take a newer one, or convert what it lacks"
        if any(value.dtype == ir.DataType.BFLOAT16 for value in execution.constants.values()):
            there = "which a CPU hardly computes: take --device cuda" if execution.device == "cpu" else "which it lacks"
            advice = f"the model is in bfloat16, {there}, or convert it to float16"
        return UnknownOpError(
            f"this ONNX Runtime does not have all that the model is made of: {first_line(error)}; {advice}"
        )
    shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in batch.items())
    return CalibrationError(f"{names}: the model does not take {shapes}: {first_line(error)}")
