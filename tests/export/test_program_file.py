"""A .pt2 is read without running anything it holds: pickles, compiled code, foreign calls and sizes that are code."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dotresize_fx.errors import BadWeightsError, ModelNotFoundError, UsageError
from dotresize_fx.export.program_file import load_program, load_program_file

TOUCHED = "touched by a program file"


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": x + self.down(self.up(x).relu()).view(x.shape[0], x.shape[1], 4)}


class Evil:
    def __reduce__(self) -> Any:
        return (open, (TOUCHED, "w"))


def exported(module: nn.Module | None = None) -> torch.export.ExportedProgram:
    free = torch.export.Dim.AUTO
    return torch.export.export((module or Small()).eval(), (torch.ones(2, 3, 4),), dynamic_shapes=({0: free, 1: free},))


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    torch.export.save(exported(), tmp_path / "small.pt2")
    return tmp_path / "small.pt2"


def rewritten(file: Path, change: Callable[[str, bytes], bytes], **added: bytes) -> Path:
    """The archive with its members changed: ``change(name without the top folder, content)``."""
    other = file.with_name("other.pt2")
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(other, "w") as target:
        for name in source.namelist():
            target.writestr(name, change(name.partition("/")[2], source.read(name)))
        for name, content in added.items():
            target.writestr(f"small/{name.replace('__', '/')}", content)
    return other


def edited(file: Path, change: Callable[[Any], None], member: str = "models/model.json") -> Path:
    """The archive with one of its JSON members changed in place."""

    def edit(name: str, content: bytes) -> bytes:
        if name != member:
            return content
        change(found := json.loads(content))
        return json.dumps(found).encode()

    return rewritten(file, edit)


def test_a_program_is_read(file: Path) -> None:
    loaded = load_program_file(rewritten(file, lambda name, content: content))
    assert loaded.source == "program other.pt2"
    assert {name: tuple(value.shape) for name, value in loaded.sample.items()} == {"x": (2, 3, 4)}
    assert loaded.model(**loaded.sample).keys() == {"y"}  # its outputs as the module gave them


def pickled() -> bytes:
    content = io.BytesIO()
    torch.save(Evil(), content)
    return content.getvalue()


def test_what_would_run_code_is_refused(file: Path) -> None:
    def payloads(config: Any) -> None:
        next(iter(config["config"].values()))["use_pickle"] = True

    def objects(config: Any) -> None:
        config["config"]["evil"] = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": False}

    def call(target: str) -> Callable[[Any], None]:
        return lambda model: model["graph_module"]["graph"]["nodes"][0].update(target=target)

    def size(text: str) -> Callable[[Any], None]:
        def change(model: Any) -> None:
            values = model["graph_module"]["graph"]["tensor_values"]
            values["x"]["sizes"][0]["as_expr"]["expr_str"] = text

        return change

    def outputs(model: Any) -> None:
        model["graph_module"]["module_call_graph"][0]["signature"]["out_spec"] = '{"type": "collections.defaultdict"}'

    weights, constants = "data/weights/model_weights_config.json", "data/constants/model_constants_config.json"
    evil = pickled()
    inputs = rewritten(file, lambda name, content: evil if name.startswith("data/sample_inputs") else content)
    with pytest.raises(ModelNotFoundError, match=r"holds a pickle \(data/sample_inputs/model.pt\)"):
        load_program_file(inputs)
    for member, change, said in [(weights, payloads, "up.weight"), (constants, objects, "evil")]:
        with pytest.raises(ModelNotFoundError, match=rf"holds a pickle \({said}\)"):
            load_program_file(edited(file, change, member))
    for change, said in [
        (call("torch.load"), "a call of torch.load"),
        (call("torch.ops.aten.from_file.default"), "a call of torch.ops.aten.from_file.default"),
        (call("_operator.call"), "a call of _operator.call"),
        (size("__import__('os').getcwd()"), "a size that is none (__import__('os').getcwd())"),
        (size("Symbol('s0').__class__"), "a size that is none (Symbol('s0').__class__)"),
        (size("open('touched', 'w')"), "a size that is none (open('touched', 'w'))"),
        (outputs, "inputs or outputs of a kind that would be imported"),
    ]:
        with pytest.raises(ModelNotFoundError) as found:
            load_program_file(edited(file, change))
        assert f"holds {said}" in str(found.value)
    with pytest.raises(ModelNotFoundError, match="holds compiled code"):
        load_program_file(rewritten(file, lambda n, c: c, data__aotinductor__model__x=b"code"))
    assert not (file.parent / TOUCHED).exists()


def test_files_that_are_no_programs(file: Path) -> None:
    text, weights, cut = (file.with_name(f"{name}.pt2") for name in ("text", "weights", "cut"))
    text.write_text("hello")
    torch.save({"a": torch.ones(3)}, weights)
    cut.write_bytes(file.read_bytes()[:4000])
    for path, said in [
        (text, "not a program"),
        (weights, "not a program"),
        (file.with_name("none.pt2"), "no such file"),
    ]:
        with pytest.raises(ModelNotFoundError, match=said):
            load_program_file(path)
    with pytest.raises(BadWeightsError, match=r"cut.pt2: truncated: fetch it again"):
        load_program_file(cut)
    broken = edited(file, lambda model: model.pop("graph_module"))
    with pytest.raises(BadWeightsError, match=r"other.pt2: damaged, or of another torch \("):
        load_program_file(broken)


def test_programs_that_cannot_be_slimmed() -> None:
    with pytest.raises(UsageError, match=r"a program: up.weight is float64: export the module in float32"):
        load_program(torch.export.export(Small().double(), (torch.ones(2, 3, 4).double(),)), "a program")
    broken = Small()
    broken.up.weight.data[0, 0] = float("nan")
    with pytest.raises(BadWeightsError, match=r"a program: up.weight holds NaN or infinity"):
        load_program(exported(broken), "a program")
