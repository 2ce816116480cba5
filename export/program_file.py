"""A program that torch.export saved (``.pt2``), read without running anything that the file holds.

``torch.export.load`` of torch 2.13 does not read such a file safely: payloads that say so are unpickled, example inputs
are unpickled where reading them as plain tensors fails, compiled code is loaded, sizes go through sympy's parser, which
is ``eval``, and the target of a call may be any function below ``torch``. All of it is looked at before, and a file
that holds more than aten ops on plain tensors is refused.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from dotresize_fx.errors import BadWeightsError, ModelNotFoundError, UsageError
from dotresize_fx.export.model_source import LoadedModel
from dotresize_fx.export.quiet import quiet_libraries
from dotresize_fx.export.weight_files import file_sha256, first_line
from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.fx_form.graph import FxGraph

SUFFIX = ".pt2"
_TARGET = re.compile(
    r"torch\.ops\.(aten|prims|transformers)\.(?!from_file)\w+\.\w+"
    r"|_operator\.(getitem|add|sub|mul|floordiv|truediv|mod|neg|pow|eq|ne|lt|le|gt|ge|and_|or_)"
    r"|math\.(ceil|floor|trunc|sqrt)|torch\.sym_(int|float|max|min|not|ite|sqrt|sum)"
)
# Sizes: symbols, numbers and sympy's functions of them.
_SIZE = re.compile(r"[\w\s+\-*/%(),<>=!&|~.]*")
_QUOTED = re.compile(r"'([a-z]+\d+|[\d.eE+-]+)'")
_NAMES = re.compile(r"[A-Za-z_]\w*|\.\s*[A-Za-z_]")
_SYMBOL = re.compile(r"[a-z]+\d+")
_KNOWN = {
    "Symbol", "Integer", "Float", "Rational", "Mul", "Add", "Pow", "Mod", "Max", "Min", "PythonMod", "FloorDiv",
    "CleanDiv", "CeilDiv", "CeilToInt", "FloorToInt", "IntTrueDiv", "FloatTrueDiv", "TruncToInt", "RoundToInt",
    "ToFloat", "TruncToFloat", "ModularIndexing", "Where", "PowByNatural", "FloatPow", "LShift", "RShift", "Identity",
    "Equality", "Unequality", "StrictLessThan", "LessThan", "StrictGreaterThan", "GreaterThan", "Eq", "Ne", "Lt", "Le",
    "Gt", "Ge", "And", "Or", "Not", "int_oo", "oo", "true", "false", "True", "False", "None", "positive", "negative",
    "nonnegative", "nonpositive", "integer", "real", "zero", "nonzero", "precision",
}  # fmt: skip


def is_program_file(name: object) -> bool:
    """Whether the name is one of a saved program."""
    return str(name).lower().endswith(SUFFIX)


def load_program_file(path: Path) -> LoadedModel:
    """The program in a file, float32 on the CPU.

    Raises:
        ModelNotFoundError: there is no such file, or it holds no program, or more than is read.
        BadWeightsError: the file is damaged, or a weight is NaN or infinite.
        UsageError: as :func:`load_program` says.
    """
    if not path.is_file():
        raise ModelNotFoundError(f"{path}: no such file")
    with path.open("rb") as stream:
        is_archive = stream.read(4) == b"PK\x03\x04"
    if is_archive and not zipfile.is_zipfile(path):
        raise BadWeightsError(f"{path}: truncated: fetch it again")
    from torch.export.pt2_archive._package import PT2ArchiveReader

    try:
        reader = PT2ArchiveReader(str(path))
        names = set(reader.get_file_names())
    except Exception as error:  # torch says of any other file what its reader of archives says
        raise ModelNotFoundError(f"{path}: not a program: give a file that torch.export.save wrote") from error
    models = [name for name in names if name.startswith("models/")]
    if models != ["models/model.json"]:
        held = "no program" if not models else "several programs"
        raise ModelNotFoundError(f"{path}: holds {held}: give a file that torch.export.save wrote")
    try:
        _refuse_code(reader, names, path)
        with quiet_libraries():
            program = torch.export.load(str(path))
    except ModelNotFoundError:
        raise
    except Exception as error:  # whatever its parsers raise
        raise BadWeightsError(f"{path}: damaged, or of another torch ({first_line(error)}): export it again") from error
    return load_program(program, f"program {path.name}", {path.name: file_sha256(path)})


def load_program(
    program: torch.export.ExportedProgram, source: str, sha256: dict[str, str] | None = None
) -> LoadedModel:
    """A program ready for slimming, which is not changed.

    Raises:
        UsageError: it has no example inputs, is not of float32, or takes something else than tensors.
        BadWeightsError: a weight is NaN or infinite.
    """
    for key, tensor in program.state_dict.items():
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise UsageError(f"{source}: {key} is {str(tensor.dtype)[6:]}: export the module in float32")
        whole = not isinstance(tensor, torch.nn.Parameter) or not tensor.numel()
        if not whole and tensor.is_floating_point() and not torch.stack(tensor.aminmax()).isfinite().all():
            raise BadWeightsError(f"{source}: {key} holds NaN or infinity: the program is broken")
    if program.example_inputs is None:
        raise UsageError(f"{source}: holds no example inputs: save it as torch.export gave it")
    graph = FxGraph(program)
    if any(tensor.device.type != "cpu" for tensor in program.state_dict.values()):
        graph.to("cpu")
    specs = [spec for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
    values = pytree.tree_leaves(program.example_inputs)
    sample = {
        spec.arg.name: value.detach().to("cpu")
        for spec, value in zip(specs, values, strict=True)
        if isinstance(value, torch.Tensor)
    }
    model = _StandIn(graph.copy(), program.call_spec.out_spec)
    return LoadedModel(model, None, "a program has none", None, "outputs", source, sha256 or {}, sample, graph.program)


class _StandIn(torch.nn.Module):
    """A program as a module: its inputs by name, and its outputs as the exported module gave them."""

    def __init__(self, graph: FxGraph, structure: Any) -> None:
        super().__init__()
        self._execution, self._structure = Execution(graph), structure

    def forward(self, **inputs: torch.Tensor) -> Any:
        outputs = list(self._execution.outputs(inputs))
        try:
            return pytree.tree_unflatten(outputs, self._structure)
        except ValueError:  # it also gave numbers, which are no outputs of a graph
            return tuple(outputs)


# -- what a file must not hold -------------------------------------------------------------------------


def _refuse_code(reader: Any, names: set[str], path: Path) -> None:
    """
    Raises:
        ModelNotFoundError: the file holds code, pickles or more than plain ops.
    """
    if compiled := sorted(name for name in names if name.startswith("data/aotinductor/")):
        raise _refused(path, f"compiled code ({compiled[0]})")
    for name in sorted(names):
        if name.startswith("data/") and name.endswith("_config.json"):
            for key, entry in json.loads(reader.read_string(name))["config"].items():
                stored = str(entry["path_name"])
                if entry["use_pickle"] or not re.fullmatch(r"(weight|tensor)_\d+", stored):
                    raise _refused(path, f"a pickle ({key})")
        if name.startswith("data/") and name.endswith(".pt"):
            try:
                torch.load(io.BytesIO(reader.read_bytes(name)), weights_only=True)
            except Exception as error:
                raise _refused(path, f"a pickle ({name})") from error
    for key, value in _strings(json.loads(reader.read_string("models/model.json"))):
        if key == "target" and not _TARGET.fullmatch(value):
            raise _refused(path, f"a call of {value[:80]}")
        if key == "expr_str" and not _is_size(value):
            raise _refused(path, f"a size that is none ({value[:80]})")
        if key in ("in_spec", "out_spec") and ("defaultdict" in value or "__enum__" in value):
            raise _refused(path, "inputs or outputs of a kind that would be imported")


def _refused(path: Path, what: str) -> ModelNotFoundError:
    return ModelNotFoundError(f"{path}: holds {what}, which is never loaded: only plain ops on plain tensors are")


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every string below, with the name of the field that it is in."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _strings(item, name)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item, key)


def _is_size(text: str) -> bool:
    bare = _QUOTED.sub("0", text)
    names = _NAMES.findall(bare)
    return bool(_SIZE.fullmatch(bare)) and all(name in _KNOWN or _SYMBOL.fullmatch(name) for name in names)
