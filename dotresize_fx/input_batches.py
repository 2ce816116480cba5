"""Batches of a program's own inputs for calibration and for measurement, from arrays in files or in memory."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dotresize_fx.calibration import BATCHES_AT_LEAST, GPU_TOKENS, CalibrationData
from dotresize_fx.errors import CalibrationError
from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.program_inputs import Inputs, ProgramInputs

# Positions that a run takes on a CPU, so that one block's activations stay small.
CPU_POSITIONS = 1024
MEASURES = 0.2
SPLIT = "the first 80 % calibrates, the last 20 % measures"

Given = Mapping[str, Any] | Sequence[Any] | torch.Tensor
"""A batch as a user has it: tensors by name, tensors in the order of the program's inputs, or its only input."""


def read_inputs(paths: Sequence[Path], inputs: ProgramInputs) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, arrays by input name) of every ``.npz`` file, folders' in the order of their names.

    A file whose only array has no name of its own (``arr_0``) gives a program its only input, and so does a ``.npy``.

    Raises:
        CalibrationError: a path is missing or no such file, or a folder holds none.
    """
    for path in paths:
        files = sorted(file for kind in ("*.npz", "*.npy") for file in path.glob(kind)) if path.is_dir() else [path]
        if not files:
            raise CalibrationError(f"{path}: holds no .npz file")
        for file in files:
            arrays = _read_file(file)
            if list(arrays) == ["arr_0"] and len(inputs.specs) == 1:
                arrays = {inputs.names[0]: arrays["arr_0"]}
            yield file.name, arrays


def _read_file(file: Path) -> dict[str, Any]:
    if file.suffix.lower() not in (".npz", ".npy"):
        raise CalibrationError(f"{file}: calibration data must be an .npz file, or a folder of them")
    try:
        with file.open("rb") as stream:
            found = np.load(stream, allow_pickle=False)
            whole = {"arr_0": found} if isinstance(found, np.ndarray) else found
            return {name: whole[name] for name in whole}
    except OSError as error:
        raise CalibrationError(f"{file}: cannot be read: {error.strerror or error}") from error
    except (ValueError, EOFError, zipfile.BadZipFile, NotImplementedError) as error:
        said = "it holds Python objects, which are never loaded" if "allow_pickle" in str(error) else "damaged"
        raise CalibrationError(f"{file}: not an .npz of arrays ({said}): write it with numpy.savez") from error


def named_inputs(batches: Iterable[Given], inputs: ProgramInputs) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(name, tensors by input name) of batches in memory.

    Raises:
        CalibrationError: a batch has more or fewer tensors than the program has inputs, or is of another kind.
    """
    for number, batch in enumerate(batches):
        where = f"calibration batch {number}"
        if isinstance(batch, Mapping):
            yield where, batch
            continue
        if isinstance(batch, (torch.Tensor, np.ndarray)):
            batch = [batch]
        if not isinstance(batch, Sequence) or isinstance(batch, (str, bytes)):
            raise CalibrationError(f"{where} is a {type(batch).__name__}: give tensors, by name or in order")
        if len(batch) != len(inputs.specs):
            raise CalibrationError(
                f"{where} has {len(batch)} inputs, the program reads {len(inputs.specs)}: {inputs.described()}"
            )
        yield where, dict(zip(inputs.names, batch, strict=True))


def prepare_given(
    batches: Sequence[Given] | None,
    files: Sequence[Path],
    inputs: ProgramInputs,
    graph: FxGraph,
    sample: Inputs,
    device: str = "cpu",
) -> CalibrationData:
    """Batches in memory, or else of files, as :func:`prepare_inputs` splits them; ``sample`` is what ``graph`` was
    traced with.

    Raises:
        CalibrationError: a batch is not what the program reads, or it cannot take one.
    """
    given = read_inputs(files, inputs) if batches is None else named_inputs(batches, inputs)
    names = ", ".join(path.name for path in files) or "calibration inputs"
    positions = graph.expected_rows(inputs.part(sample, 0, 1))
    data = prepare_inputs(given, inputs, positions, names, device)
    largest = max((*data.calibration, *data.evaluation), key=lambda batch: sum(v.numel() for v in batch.values()))
    try:
        answers = Execution(graph).outputs(largest)[0]
    except (RuntimeError, IndexError) as error:  # longer than its table of positions, say
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in largest.items())
        said = str(error).strip().partition("\n")[0]
        raise CalibrationError(f"{names}: the program does not take {shapes}: {said}") from error
    if answers.isnan().any():
        raise CalibrationError(f"{names}: the program puts out NaN on them: it overflows, or they are no inputs of it")
    return data


def prepare_inputs(
    batches: Iterable[tuple[str, Mapping[str, Any]]],
    inputs: ProgramInputs,
    positions: int,
    names: str,
    device: str = "cpu",
) -> CalibrationData:
    """The first 80 % of all samples calibrate and the last 20 % measure, in batches that a run takes.

    ``positions``: rows that a sample makes in the program, about. Where a batch is kept whole, whole batches are split.

    Raises:
        CalibrationError: what :meth:`ProgramInputs.checked` says, or there are fewer than two samples or batches.
    """
    given = [inputs.checked(batch, where) for where, batch in batches]
    counts = [inputs.samples(batch) for batch in given]
    size = inputs.batch_size if inputs.batch else None
    total, least = sum(counts), size or 1
    if total < 2 * least:
        unit = "samples" if inputs.batch else "batches"
        raise CalibrationError(
            f"{names}: {total} {unit}, at least {2 * least} are needed: {SPLIT}, and neither part may be empty"
        )
    boundary = min(max(round((1 - MEASURES) * total / least) * least, least), total - least)
    calibrating, measured = _split(given, counts, boundary, inputs)
    at_once = size or _samples_at_once(boundary, positions, device)
    data = CalibrationData(
        _pieces(calibrating, inputs, at_once, whole=size is not None),
        _pieces(measured, inputs, size or max(1, CPU_POSITIONS // max(positions, 1)), whole=size is not None),
        f"{names}: {SPLIT}",
        {"calibration data": _sha256(calibrating), "evaluation data": _sha256(measured)},
    )
    if not data.calibration or not data.evaluation:
        raise CalibrationError(f"{names}: the program takes {size} samples at once, and no batch has as many")
    return data


def _samples_at_once(samples: int, positions: int, device: str) -> int:
    most = (CPU_POSITIONS if device == "cpu" else GPU_TOKENS) // max(positions, 1)
    return max(1, min(most, samples // BATCHES_AT_LEAST))


def _split(
    batches: Sequence[Inputs], counts: Sequence[int], boundary: int, inputs: ProgramInputs
) -> tuple[list[Inputs], list[Inputs]]:
    """Before and behind a sample; the batch that it is in is cut."""
    before: list[Inputs] = []
    behind: list[Inputs] = []
    start = 0
    for batch, count in zip(batches, counts, strict=True):
        cut = min(max(boundary - start, 0), count)
        start += count
        for part, (first, last) in ((before, (0, cut)), (behind, (cut, count))):
            if first < last:
                part.append(inputs.part(batch, first, last))
    return before, behind


def _pieces(batches: Sequence[Inputs], inputs: ProgramInputs, size: int, *, whole: bool) -> list[Inputs]:
    """Batches of ``size`` samples; with ``whole`` what is left of a batch is dropped."""
    pieces: list[Inputs] = []
    for batch in batches:
        count = inputs.samples(batch)
        starts = range(0, count, size if inputs.batch else count)
        pieces += [inputs.part(batch, start, start + size) for start in starts if not whole or start + size <= count]
    return pieces


def _sha256(batches: Sequence[Inputs]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        for name, value in batch.items():
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()
