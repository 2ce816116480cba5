"""An ONNX graph written back: what was not cut stays as the file had it, and the shapes it stated are right again."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from dotresize_fx.errors import VerificationError
from dotresize_fx.export.inline_weights import move_in, without_weights
from dotresize_fx.export.onnx_file import ONNX_FILE, WEIGHTS_FILE
from dotresize_fx.export.weight_files import first_line
from dotresize_fx.onnx_form.execution import OnnxExecution
from dotresize_fx.onnx_form.graph import OnnxGraph
from dotresize_fx.onnx_form.layers import closed_up
from dotresize_fx.onnx_form.start import is_cache
from dotresize_fx.passes.slim_onnx_graph import Inputs, SlimmedOnnx

# Weights of so many bytes inside a file are not held in memory.
LARGE = 2**26
# A protobuf message ends at 2 GiB; the graph itself needs some of it.
INLINE_AT_MOST = 2**31 - 2**27
# A norm before ONNX had one of that kind.
ONLY_ORT = "SimplifiedLayerNormalization"
# Constants that shape inference looks into are smaller.
LOOKED_INTO = 2048


@dataclass(frozen=True)
class Stated:
    """What a file said of its values before shapes were inferred: whose types and whose shapes it has, by name."""

    types: frozenset[str]
    shapes: frozenset[str]
    external: bool

    @classmethod
    def by(cls, path: Path) -> Stated:
        """What the file says."""
        graph = without_weights(path).graph
        kinds = {info.name: info.type for info in graph.value_info}
        return cls(
            frozenset(name for name, kind in kinds.items() if kind.WhichOneof("value")),
            frozenset(name for name, kind in kinds.items() if kind.tensor_type.HasField("shape")),
            any(_location(tensor) not in ("", path.name) for tensor in graph.initializer),
        )


def write_onnx(
    slimmed: SlimmedOnnx, stated: Stated, sample: Inputs, folder: Path, work: Path, device: str = "cpu"
) -> Path:
    """``model.onnx``, with its weights beside it where the file had that or where they are too large for one file.

    ``sample`` are small inputs, run on ``device`` to see which sizes are others now; ``work`` a folder for what is
    moved on.
    """
    _correct_shapes(slimmed, sample, device)
    model = slimmed.graph.copy().fused_model()  # of which what was fused is told no more
    tensors = [value.const_value for g in model.graphs() for value in g.initializers.values()]
    size = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    path = folder / ONNX_FILE
    beside = stated.external or size > INLINE_AT_MOST
    moved = size >= LARGE and not beside  # as one message it would be held twice
    if not (beside or moved):
        ir.external_data.load_to_model(model)
    if moved:
        (work / "written").mkdir()
    with _as_stated(model, stated):
        saved = work / "written" / ONNX_FILE if moved else path
        ir.save(model, saved, external_data=WEIGHTS_FILE if beside or moved else None)
    if moved:
        move_in(saved, path)
        shutil.rmtree(saved.parent)
    return path


def _location(tensor: onnx.TensorProto) -> str:
    """The file that a tensor's data is in; nothing where it holds that itself."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return ""
    return next((entry.value for entry in tensor.external_data if entry.key == "location"), "")


def _correct_shapes(slimmed: SlimmedOnnx, sample: Inputs, device: str) -> None:
    """Sizes that a run of the slim graph has others of than one of the dense graph are stated as it has them."""
    before, after = (_met_shapes(graph, sample, device) for graph in (slimmed.dense, slimmed.graph))
    for node in slimmed.graph.model.graph:
        for value in node.outputs:
            old, new = before.get(str(value.name)), after.get(str(value.name))
            if value.shape is None or old is None or new is None or len(new) != len(value.shape) or old == new:
                continue
            shape = value.shape.copy()
            for axis, (was, size) in enumerate(zip(old, new, strict=True)):
                if was != size and isinstance(shape[axis], int):
                    shape[axis] = size
            value.shape = shape


def _met_shapes(graph: OnnxGraph, sample: Inputs, device: str) -> dict[str, tuple[int, ...]]:
    """By name, of all that the graph computes."""
    execution = OnnxExecution(graph, device)
    names = [str(output.name) for node in execution.nodes for output in node.outputs if output.name]
    values, _ = execution.piece(0, len(execution.nodes), names).run(execution.start(sample))
    return {name: tuple(value.shape()) for name, value in values.items() if value.is_tensor()}


@contextmanager
def _as_stated(model: ir.Model, stated: Stated) -> Iterator[None]:
    """Inside, values have no shapes or types where the file states none; constants have their own."""
    kept = {*model.graph.inputs, *model.graph.outputs}
    computed = (value for node in model.graph for value in node.outputs)
    values = [value for value in (*model.graph.initializers.values(), *computed) if value not in kept]
    taken = [(value, value.shape, value.type) for value in values]
    for value in values:
        if value.name not in stated.shapes:
            value.shape = None
        if value.name not in stated.types:
            value.type = None
    try:
        yield
    finally:
        for value, shape, kind in taken:
            value.shape, value.type = shape, kind


def check_written(dense: Path, slim: Path, slimmed: SlimmedOnnx) -> tuple[str, ...]:
    """onnx.checker, shapes included, on the slim file; a note where it already refused the dense one.

    Of blocks that went the caches are gone, and the others' numbers closed up.

    Raises:
        VerificationError: it passes the dense file and not the slim one, or inputs or outputs are others than before.
    """
    said = _said_of(slim)
    before = _said_of(dense) if said else ""
    notes: tuple[str, ...] = ()
    if before:
        notes = (f"onnx.checker refuses the file as it came ({before}), so only ONNX Runtime checked the slim one",)
    elif ONLY_ORT in said:
        notes = (f"onnx.checker does not know {ONLY_ORT}, which ONNX Runtime has: it alone checked the slim file",)
    elif said:
        raise VerificationError(
            f"the slim ONNX does not pass onnx.checker: {said}: nothing was written; please report this model"
        )
    first, second = (without_weights(path).graph for path in (dense, slim))
    gone = slimmed.gone_caches
    caches = {name for pair in slimmed.dense.caches.items() for name in pair} - gone
    names = closed_up(caches, gone)
    for kind in ("input", "output"):
        kept = [value for value in getattr(first, kind) if value.name not in gone]
        old = [_declared(value, names.get(value.name, value.name)) for value in kept]
        if old != [_declared(value, value.name) for value in getattr(second, kind)]:
            raise VerificationError(
                f"the {kind}s of the slim ONNX are not the dense one's: nothing was written; please report this model"
            )
    return notes


def _declared(value: onnx.ValueInfoProto, name: str) -> bytes:
    """All of it, by this name, but of a cache the number and size of its heads."""
    copied = onnx.ValueInfoProto()
    copied.CopyFrom(value)
    copied.name = name
    sizes = copied.type.tensor_type.shape.dim
    if is_cache(value.name) and len(sizes) == 4:
        for axis in (1, 3):
            sizes[axis].Clear()
    written: bytes = copied.SerializeToString()
    return written


def _said_of(path: Path) -> str:
    """What onnx.checker has against a file; empty where nothing. Large weights are declared as inputs to it."""
    model = without_weights(path)
    kept = []
    named = {value.name for value in model.graph.input}
    for tensor in model.graph.initializer:
        if not _location(tensor) and tensor.ByteSize() <= LOOKED_INTO:
            kept.append(tensor)
        elif tensor.name not in named:
            model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # of the checker and of shape inference
        return first_line(error)
    return ""
