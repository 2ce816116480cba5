"""A model that exists only as an ONNX file, opened for its graph; its weights stay on disk until one is read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx_ir

from dotresize_fx.errors import BadWeightsError, ModelNotFoundError, UsageError
from dotresize_fx.export.inline_functions import inline_crossed
from dotresize_fx.export.onnx_file import ONNX_FILE
from dotresize_fx.onnx_form.graph import OnnxGraph
from dotresize_fx.passes.canonicalise import canonicalise
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.progress import Progress
from dotresize_fx.regions import MatchReport

SUFFIX = ".onnx"
# Of older ones axes are attributes, which what is put in for the calibration does not have.
LEAST_OPSET = 13


def is_onnx_source(name: object) -> bool:
    """Whether the name is one of an ONNX file, or of a folder with one and no Hugging Face model."""
    path = Path(str(name))
    return path.suffix.lower() == SUFFIX or ((path / ONNX_FILE).is_file() and not (path / "config.json").exists())


def analyse_onnx(name: Path | str, progress: Progress, *, check: bool = False) -> tuple[OnnxGraph, MatchReport]:
    """Load, canonicalise and find regions.

    Raises:
        ModelNotFoundError, BadWeightsError: see :func:`load_onnx`.
    """
    with progress.stage("load"):
        model = load_onnx(name)
    with progress.stage("find regions"):
        graph = OnnxGraph(inline_crossed(model)[0])
        canonicalise(graph, check=check)
        return graph, find_regions(graph)


def load_onnx(name: Path | str) -> onnx_ir.Model:
    """The model in a file or folder, its nodes in order. External data is looked at, not read, and not looked for
    elsewhere.

    Raises:
        ModelNotFoundError: there is no such file, it is no ONNX model or cut off, or its data lies outside its folder.
        BadWeightsError: external data is missing or cut off.
        UsageError: an opset below LEAST_OPSET.
    """
    path = Path(name)
    path = path / ONNX_FILE if path.is_dir() else path
    if not path.is_file():
        raise ModelNotFoundError(f"{path}: no such file")
    try:
        model = onnx_ir.load(path)
    except Exception as error:  # protobuf has a class of its own for what it cannot parse
        raise ModelNotFoundError(f"{path} is no ONNX model, or is cut off: fetch or export it again") from error
    if not model.ir_version or not len(model.graph):  # other bytes can look like a message with nothing known in it
        raise ModelNotFoundError(f"{path} is no ONNX model, or an empty one: give a file that an exporter wrote")
    if 0 < (opset := model.graph.opset_imports.get("", 0)) < LEAST_OPSET:
        raise UsageError(
            f"{path}: opset {opset} is too old, {LEAST_OPSET} is the least: export it again, or convert it with "
            "onnx.version_converter"
        )
    for tensor in _external(model):
        _check(path, tensor)
    if not _is_sorted(model):  # as ONNX Runtime's own converter to float16 leaves it, which ONNX does not allow
        model.graph.sort()
    return model


def _is_sorted(model: onnx_ir.Model) -> bool:
    """Whether every node comes behind those that it reads."""
    seen: set[onnx_ir.Node] = set()
    for node in model.graph:
        before = (value.producer() for value in node.inputs if value is not None)
        if any(other is not None and other.graph is model.graph and other not in seen for other in before):
            return False
        seen.add(node)
    return True


def _external(model: onnx_ir.Model) -> Iterator[onnx_ir.ExternalTensor]:
    """Every tensor whose data is in another file: of initializers, and of nodes' attributes, however deep."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, onnx_ir.ExternalTensor):
                yield value.const_value
        for node in graph:
            for given in node.attributes.values():
                tensors = given.as_tensors() if given.type == onnx_ir.AttributeType.TENSORS else ()
                held = (given.as_tensor(),) if given.type == onnx_ir.AttributeType.TENSOR else tensors
                yield from (tensor for tensor in held if isinstance(tensor, onnx_ir.ExternalTensor))


def _check(path: Path, tensor: onnx_ir.ExternalTensor) -> None:
    folder = path.parent.resolve()
    file = folder / tensor.location
    if Path(tensor.location).is_absolute() or not file.resolve().is_relative_to(folder):
        raise ModelNotFoundError(
            f"{path} keeps {tensor.name} in {tensor.location}, outside its folder or a whole path, which is not read: "
            "save it with its data beside it"
        )
    if not file.is_file():
        raise BadWeightsError(f"{path} wants {tensor.location} beside it, which is missing: copy it there too")
    end, found = (tensor.offset or 0) + tensor.nbytes, file.stat().st_size
    if found < end:
        raise BadWeightsError(f"{file.name} is cut off: {found} bytes of {end}: copy or export it again")
