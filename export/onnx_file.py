"""An ONNX file read without its weights: is it one, is its external data whole, how large is it."""

from __future__ import annotations

import json
from pathlib import Path

import onnx

from dotresize_fx.errors import BadWeightsError, ModelNotFoundError, UsageError
from dotresize_fx.export.inline_weights import without_weights
from dotresize_fx.export.weight_files import file_sha256
from dotresize_fx.report.contents import REPORT_FILE

ONNX_FILE = "model.onnx"
WEIGHTS_FILE = "model.onnx.data"


def find_onnx(name: Path) -> Path:
    """The .onnx file that ``name`` is, or holds where it is a folder. Raises ModelNotFoundError."""
    path = name / ONNX_FILE if name.is_dir() else name
    if not path.is_file():
        raise ModelNotFoundError(
            f"no ONNX model at {path}; give an .onnx file or a folder that export wrote (with --ratio 0 it writes the "
            "dense model)"
        )
    return path


def read_onnx(path: Path) -> onnx.ModelProto:
    """The model without external data, which is only looked at.

    Raises:
        ModelNotFoundError: the file is no ONNX model.
        BadWeightsError: external data is missing or cut off, or is not what a report.json beside it says.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf has a class of its own for what it cannot parse
        raise ModelNotFoundError(f"{path} is not an ONNX model; give a file that an exporter wrote") from error
    if not model.ir_version or not model.graph.node:  # other bytes can look like a message with nothing known in it
        raise ModelNotFoundError(f"{path} is not an ONNX model, or an empty one; give a file that an exporter wrote")
    for file, size in _external_sizes(path, model).items():
        if not file.is_file():
            raise BadWeightsError(f"{path} wants {file.name} beside it, which is missing; copy it there too")
        if (found := file.stat().st_size) < size:
            raise BadWeightsError(f"{file} is cut off: {found} bytes of {size}; copy or export it again")
    _check_sums(path, model)
    return model


def task_of(folder: Path) -> str:
    """What the report of an exported folder says that its model is for; "decoder" where there is no report.

    Raises:
        UsageError: there is a file of that name that is no report.
    """
    report = folder / REPORT_FILE
    if not report.is_file():
        return "decoder"
    try:
        return str(json.loads(report.read_text(encoding="utf-8"))["model"]["task"])
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{report} is not a report that export wrote; export the model again") from error


def onnx_size(path: Path) -> int:
    """Bytes of the .onnx file and its external data."""
    model = without_weights(path)
    return sum(file.stat().st_size for file in {path, *_external_sizes(path, model)})


def _external_sizes(path: Path, model: onnx.ModelProto) -> dict[Path, int]:
    """By file of external data how far the model reads in it."""
    sizes: dict[Path, int] = {}
    for tensor in model.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        file = path.parent / entries.get("location", "")
        end = int(entries.get("offset", 0)) + int(entries.get("length", 0))
        sizes[file] = max(sizes.get(file, 0), end)
    return sizes


def _check_sums(path: Path, model: onnx.ModelProto) -> None:
    report = path.with_name(REPORT_FILE)
    try:
        sums = dict(json.loads(report.read_text(encoding="utf-8"))["outputs_sha256"])
    except (OSError, ValueError, KeyError, TypeError):  # no export's folder
        return
    for file in (path, *_external_sizes(path, model)):
        wanted = sums.get(file.name)
        if wanted is not None and wanted != file_sha256(file):
            raise BadWeightsError(f"{file} is not what {report.name} beside it was written for; export it again")
