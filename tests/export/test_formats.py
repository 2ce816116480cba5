"""Other formats than ONNX: each is run where its library is installed, computes what the slim program does, and a file
that does not is never delivered.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import dotresize_fx
from dotresize_fx.errors import FormatError, MissingExtraError, UsageError, VerificationError
from dotresize_fx.export import emit_openvino, emit_pt2, formats
from dotresize_fx.export.checkpoint import write_checkpoint
from dotresize_fx.export.formats import require_formats, write_formats
from dotresize_fx.export.program_file import load_program_file
from dotresize_fx.export.trials import text_inputs
from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.passes.prove_exactness import redraw_parameters
from dotresize_fx.slim_result import SlimResult

SMALL = {"calibration_tokens": 256, "sequence_length": 32, "evaluation_tokens": 64, "multiple": 4}
# Two float32 implementations of one function, whose outputs are of size 1.
TOLERANCE = 1e-5


@pytest.fixture
def slimmed(save_tiny_model: Callable[..., Path], tmp_path: Path) -> Callable[..., SlimResult]:
    """``slimmed(kind, *formats, sizes={}, **options)``: a model with weights of size 1, of which 30 % are cut, or
    ``ratio``.
    """

    def make(kind: str, *names: str, sizes: Mapping[str, int] | None = None, **options: Any) -> SlimResult:
        folder = save_tiny_model(tmp_path / "model", kind, **(sizes or {}))
        model = transformers.LlamaForCausalLM if kind == "llama" else transformers.BertModel
        redraw_parameters(model.from_pretrained(folder).requires_grad_(False)).save_pretrained(folder)
        (tmp_path / "out").mkdir()
        (tmp_path / "work").mkdir()
        return dotresize_fx.slim(str(folder), formats=names, **SMALL | {"ratio": 0.3} | options)

    return make


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_pt2(kind: str, slimmed: Callable[..., SlimResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = slimmed(kind, "pt2", sizes={"num_key_value_heads": 2} if kind == "llama" else None)
    (found,), notes = write_formats(result, tmp_path / "out", tmp_path / "work", TOLERANCE)
    assert found.verification.passed
    assert found.verification.cases == (10 if kind == "llama" else 4)  # with a cache also behind a past
    assert (found.format, found.folder, notes) == ("pt2", "pt2", ())
    path = tmp_path / "out" / "pt2" / "model.pt2"
    assert found.file_bytes == path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        assert b".py" not in archive.read("model/models/model.json")  # paths of the machine that wrote it
    program = load_program_file(path).program  # refuses what would have to be unpickled
    assert program is not None
    widths = {name: tuple(tensor.shape) for name, tensor in program.state_dict.items()}
    assert widths == {name: tuple(tensor.shape) for name, tensor in result.slim.program.state_dict.items()}
    # The example inputs fit it, so that it runs as it is.
    assert program.example_inputs is not None
    program.module()(*program.example_inputs[0], **program.example_inputs[1])

    dense = result.dense
    wrong = emit_pt2.emit_pt2
    monkeypatch.setattr(emit_pt2, "emit_pt2", lambda captured, _, folder: wrong(captured, dense, folder))
    if kind == "bert":  # a dense cache is of other sizes, which is another error
        (tmp_path / "again").mkdir()
        with pytest.raises(VerificationError, match="--format pt2: it differs from the slim program"):
            write_formats(result, tmp_path / "again", tmp_path / "work", TOLERANCE)


def test_queries_are_scaled_where_heads_were_cut(trace: Callable[..., FxGraph], text: Any, run: Any) -> None:
    def forward(module: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(x, x, x, scale=0.5)

    graph = trace(forward, (2, 1, 5, 9))
    x = torch.randn(2, 1, 5, 9, generator=torch.Generator().manual_seed(0))
    before = run(graph, x=x)[0]
    emit_openvino.scale_queries(graph)
    assert text(graph).splitlines()[0] == "scale_1: 9 = scale(x, 1.5)"
    (attention,) = (node for node in graph.nodes.nodes if "attention" in str(node.target))
    assert (attention.kwargs, attention.args[0].args[1]) == ({}, 0.5 * math.sqrt(9))
    # The same products in another order.
    assert torch.allclose(run(graph, x=x)[0], before, atol=1e-6)


def test_queries_of_a_usual_scale_are_left_alone(trace: Callable[..., FxGraph]) -> None:
    def forward(module: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(x, x, x, scale=0.5)

    graph = trace(forward, (2, 1, 5, 4))
    count = len(graph.nodes.nodes)
    emit_openvino.scale_queries(graph)
    assert len(graph.nodes.nodes) == count


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_openvino(
    kind: str, slimmed: Callable[..., SlimResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    heads = {"sizes": {"num_key_value_heads": 2}, "ratio": 0.05, "regions": ("query_key",)} if kind == "llama" else {}
    result = slimmed(kind, "openvino", **heads)
    (found,), _ = write_formats(result, tmp_path / "out", tmp_path / "work", TOLERANCE)
    assert found.verification.max_abs_difference < TOLERANCE
    assert sorted(file.suffix for file in (tmp_path / "out" / "openvino").iterdir()) == [".bin", ".xml"]
    if kind == "llama":  # whose heads keep the scale of their size before
        monkeypatch.setattr(emit_openvino, "scale_queries", lambda graph: None)
        (tmp_path / "again").mkdir()
        with pytest.raises(VerificationError, match="--format openvino: it differs"):
            write_formats(result, tmp_path / "again", tmp_path / "work", TOLERANCE)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_executorch(kind: str, slimmed: Callable[..., SlimResult], tmp_path: Path) -> None:
    pytest.importorskip("executorch.exir")
    result = slimmed(kind, "executorch", sizes={"num_key_value_heads": 2} if kind == "llama" else None)
    node = next(node for node in result.slim.nodes.nodes if node.name == "input_ids")
    known = node.meta["val"].fake_mode.shape_env.var_to_range
    before = dict(known)
    (found,), (note,) = write_formats(result, tmp_path / "out", tmp_path / "work", TOLERANCE)
    assert found.verification.max_abs_difference < TOLERANCE
    assert "batch 4, length 64" in note
    assert {symbol: known[symbol] for symbol in before} == before  # of what is converted next


def test_genai(slimmed: Callable[..., SlimResult], tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime_genai")
    sizes = {"hidden_size": 64, "num_key_value_heads": 2}  # heads of 16, the least that its attention takes
    result = slimmed("llama", "genai", sizes=sizes, regions=("ffn",), uniform=True, checkpoint=True)
    out = tmp_path / "out"
    write_checkpoint(result, out, text_inputs(result))
    (found,), _ = write_formats(result, out, tmp_path / "work", TOLERANCE)
    assert found.verification.max_abs_difference < TOLERANCE
    model = runtime.Model(str(out / "genai"))
    parameters = runtime.GeneratorParams(model)
    parameters.set_search_options(max_length=40, do_sample=False)
    generator = runtime.Generator(model, parameters)
    ids = torch.randint(3, 250, (1, 8), generator=torch.Generator().manual_seed(1))
    generator.append_tokens(ids[0].numpy().astype("int32"))
    execution = Execution(result.slim)
    for _ in range(16):
        generator.generate_next_token()
        expected = execution.outputs({"input_ids": ids, "attention_mask": torch.ones_like(ids)})[0][0, -1].argmax()
        assert int(generator.get_next_tokens()[0]) == int(expected)
        ids = torch.cat([ids, expected.view(1, 1)], 1)
        if generator.is_done():
            break


def test_what_the_builder_refuses_is_said(slimmed: Callable[..., SlimResult], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    result = slimmed("llama", "genai", regions=("ffn",), uniform=True, checkpoint=True)  # heads of 8
    write_checkpoint(result, tmp_path / "out", text_inputs(result))
    with pytest.raises(FormatError, match=r"--format genai: .* multiple of 16"):
        write_formats(result, tmp_path / "out", tmp_path / "work", TOLERANCE)


def test_what_is_missing_is_said_before_the_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(formats.NEEDED, "openvino", "no_such_module.at_all")
    with pytest.raises(MissingExtraError, match=r"^--format openvino: .* pip install 'dotresize-fx\[openvino\]'$"):
        dotresize_fx.slim(str(tmp_path / "no-such-model"), formats=("onnx", "openvino"))
    require_formats(("onnx", "pt2"), given=True)
    with pytest.raises(UsageError, match="--format executorch plans memory"):
        require_formats(("executorch",), given=True)
