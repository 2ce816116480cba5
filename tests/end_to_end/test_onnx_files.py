"""A model that exists only as an ONNX file, slimmed by the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import dotresize_fx
from dotresize_fx import memory
from dotresize_fx.errors import UsageError, VerificationError
from dotresize_fx.export import prove_onnx
from dotresize_fx.export.onnx_session import OnnxModel
from dotresize_fx.passes import slim_onnx_graph
from dotresize_fx.passes.prove_exactness import redraw_parameters

VOCABULARY, WIDTH, INNER = 300, 16, 64
NAMES = ["input_ids", "attention_mask"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    """Two sublayers over running sums; a decoder in its answers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.blocks, self.norm = nn.Sequential(Block(), Block()), nn.LayerNorm(WIDTH)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids) * attention_mask[..., None].to(torch.float32)
        return self.head(self.norm(self.blocks(x + x.cumsum(1) * 0.1)))


def draw(rows: int, length: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, VOCABULARY, (rows, length))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model.onnx`` as the TorchScript exporter writes it, with metadata, and ``inputs.npz`` beside it."""
    folder = tmp_path_factory.mktemp("onnx")
    axes = {name: {0: "batch", 1: "length"} for name in (*NAMES, "logits")}
    sample = (torch.ones(2, 6, dtype=torch.int64), torch.ones(2, 6, dtype=torch.int64))
    torch.onnx.export(
        redraw_parameters(Model().eval()),
        sample,
        folder / "model.onnx",
        input_names=NAMES,
        output_names=["logits"],
        dynamic_axes=axes,
        dynamo=False,
    )
    proto = onnx.shape_inference.infer_shapes(onnx.load(folder / "model.onnx"))
    proto.metadata_props.add(key="author", value="somebody")
    proto.graph.doc_string = "a graph"
    onnx.save(proto, folder / "model.onnx")
    ids, mask = draw(48, 20), np.ones((48, 20), np.int64)
    mask[::5, :4] = 0
    np.savez(folder / "inputs.npz", input_ids=ids, attention_mask=mask)
    return folder / "model.onnx"


def read(path: Path) -> onnx.ModelProto:
    """The model without what says nothing: an empty domain, names of nodes' own constants, the order of value_info."""
    proto = onnx.load(path)
    for part in (*proto.opset_import, *proto.graph.node):
        if not part.domain:
            part.ClearField("domain")
    for node in proto.graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                attribute.t.ClearField("name")
    proto.graph.value_info.sort(key=lambda info: info.name)
    return proto


@pytest.fixture
def slim(here: Callable[..., Any], model: Path, tmp_path: Path) -> Callable[..., Any]:
    """``slim(path, *options)``: (how the command ended, OUT)."""

    def export(path: Path = model, *options: object) -> Any:
        data = ("--calibration-data", model.with_name("inputs.npz"))
        return here("export", path, tmp_path / "out", "--quiet", *(options or data)), tmp_path / "out"

    return export


def test_a_file_is_slimmed_in_place(slim: Callable[..., Any], model: Path) -> None:
    ended, out = slim(model, "--ratio", "0.25", "--calibration-data", model.with_name("inputs.npz"))
    assert ended.code == 0, ended.stderr
    assert sorted(file.name for file in out.iterdir()) == ["model.onnx", "plan.json", "report.html", "report.json"]
    report = json.loads((out / "report.json").read_text())
    assert report["model"]["task"] == "logits"
    assert report["summary"]["verified"]
    assert report["figures"]["verification"]["cases"] == 2  # one sample alone, and those that measure
    assert report["summary"]["block_weights_removed"] == pytest.approx(0.25, abs=0.04)  # widths come in steps
    assert report["figures"]["fidelity"][0]["tokens"] > 100
    assert report["inputs_sha256"].keys() == {"model.onnx", "calibration data", "evaluation data"}
    cut = [region for region in report["regions"] if region["width_after"] < region["width_before"]]
    assert cut
    before, after = read(model), read(out / "model.onnx")
    onnx.checker.check_model(after, full_check=True)
    for name in ("ir_version", "producer_name", "producer_version", "opset_import", "metadata_props", "functions"):
        assert getattr(before, name) == getattr(after, name), name
    for name in ("name", "doc_string", "input", "output"):
        assert getattr(before.graph, name) == getattr(after.graph, name), name
    assert [node.SerializeToString() for node in before.graph.node] == [
        node.SerializeToString() for node in after.graph.node
    ]
    weights = [{t.name: t for t in proto.graph.initializer} for proto in (before, after)]
    assert list(weights[0]) == list(weights[1])
    changed = {
        name for name in weights[0] if weights[0][name].SerializeToString() != weights[1][name].SerializeToString()
    }
    assert len(changed) == 4 * len(cut)  # weights and biases of a writer and a reader
    stated = [{info.name: info.SerializeToString() for info in proto.graph.value_info} for proto in (before, after)]
    assert stated[0].keys() == stated[1].keys()
    assert {name for name in stated[0] if stated[0][name] != stated[1][name]}  # the widths that were cut


def test_a_plan_is_followed_and_nothing_else_is_cut(slim: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    data = ("--calibration-data", model.with_name("inputs.npz"))
    ended, out = slim(model, "--ratio", "0.25", *data)
    plan = json.loads((out / "plan.json").read_text())
    name = next(iter(plan["widths"]))
    plan["widths"] = {name: 40}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    ended, out = slim(model, "--plan", tmp_path / "plan.json", "--force", *data)
    assert ended.code == 0, ended.stderr
    regions = {r["name"]: r for r in json.loads((out / "report.json").read_text())["regions"]}
    assert [(r["name"], r["width_after"]) for r in regions.values() if r["width_after"] < r["width_before"]] == [
        (name, 40)
    ]


def test_ratio_0_writes_the_same_bytes(slim: Callable[..., Any], model: Path) -> None:
    ended, out = slim(model, "--ratio", "0", "--calibration-data", model.with_name("inputs.npz"))
    assert ended.code == 0, ended.stderr
    assert read(out / "model.onnx") == read(model)


def test_weights_beside_the_file_stay_beside_it(slim: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    (folder := tmp_path / "external").mkdir()
    onnx.save(
        onnx.load(model), folder / "big.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0
    )
    ended, out = slim(folder / "big.onnx", "--ratio", "0.25", "--calibration-data", model.with_name("inputs.npz"))
    assert ended.code == 0, ended.stderr
    assert (out / "model.onnx.data").is_file()
    inputs = {"input_ids": draw(2, 9, 3), "attention_mask": np.ones((2, 9), np.int64)}
    found = OnnxModel(out / "model.onnx")(inputs)[0]
    assert np.isfinite(found).all()
    (folder / "weights.bin").write_bytes((folder / "weights.bin").read_bytes()[:-40])
    ended, _ = slim(folder / "big.onnx", "--force", "--calibration-data", model.with_name("inputs.npz"))
    assert (ended.code, "cut off" in ended.stderr) == (4, True)


@pytest.mark.parametrize("beside", [True, False])
def test_text_calibrates_where_there_is_a_tokenizer(
    slim: Callable[..., Any], model: Path, tmp_path: Path, tiny_tokenizer: Any, few_tokens: list[str], beside: bool
) -> None:
    (folder := tmp_path / "with tokenizer").mkdir()
    (folder / "model.onnx").write_bytes(model.read_bytes())
    tiny_tokenizer(folder)
    given = (folder / "model.onnx",) if beside else (model, "--tokenizer", folder)
    ended, out = slim(*given, "--ratio", "0.25", *few_tokens)
    assert ended.code == 0, ended.stderr
    report = json.loads((out / "report.json").read_text())
    assert report["model"]["task"] == "decoder"
    assert report["summary"]["verified"]
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        ((), 2, "give --calibration-data, or for text --tokenizer FOLDER"),
        (("--tokenizer", "nowhere"), 2, "--tokenizer nowhere: no folder with a tokenizer's files"),
        (("--effort", "best"), 2, "--effort best: not for an ONNX file"),
        (("--quantize", "int8"), 2, "--quantize int8: not for an ONNX file"),
        (("--regions", "residual", "--calibration-data", "DATA"), 2, "the residual stream of an ONNX file"),
        (("--calibration-data", "missing.npz"), 7, "missing.npz: cannot be read"),
        (("--ratio", "0.95", "--calibration-data", "DATA"), 6, "would make a region vanish"),
    ],
)
def test_what_cannot_be_is_one_line(
    here: Callable[..., Any], model: Path, tmp_path: Path, options: tuple[str, ...], code: int, said: str
) -> None:
    given = [model.with_name("inputs.npz") if option == "DATA" else option for option in options]
    ended = here("export", model, tmp_path / "out", "--quiet", *given)
    assert (ended.code, said in ended.stderr) == (code, True), ended.stderr
    assert ended.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_files_that_are_no_such_model(here: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    data = ("--calibration-data", model.with_name("inputs.npz"), "--quiet")
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(model.read_bytes()[:-100])
    outside = tmp_path / "outside" / "model.onnx"
    outside.parent.mkdir()
    proto = onnx.load(model)
    onnx.save(proto, outside, save_as_external_data=True, location="w.bin", size_threshold=0)
    for tensor in proto.graph.initializer:
        tensor.external_data[0].value = "../w.bin"
    outside.with_name("w.bin").rename(tmp_path / "w.bin")
    outside.write_bytes(proto.SerializeToString())
    for path, code, said in ((cut, 3, "cut off"), (outside, 3, "outside its folder"), (tmp_path / "no.onnx", 3, "no")):
        ended = here("export", path, tmp_path / "out", *data)
        assert (ended.code, said in ended.stderr, ended.stderr.count("\n")) == (code, True, 1), ended.stderr


def test_python_says_where_onnx_files_are_slimmed(model: Path) -> None:
    with pytest.raises(UsageError, match="dotresize-fx export"):
        dotresize_fx.slim(model, 0.2)


def test_half_precision_stays_so(slim: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    half = convert_float_to_float16(onnx.load(model), keep_io_types=True)
    onnx.save(half, tmp_path / "half.onnx")
    ended, out = slim(tmp_path / "half.onnx", "--ratio", "0.25", "--calibration-data", model.with_name("inputs.npz"))
    assert ended.code == 0, ended.stderr
    kinds = {tensor.name: tensor.data_type for tensor in half.graph.initializer}
    assert {t.name: t.data_type for t in onnx.load(out / "model.onnx").graph.initializer} == kinds
    assert onnx.TensorProto.FLOAT16 in kinds.values()


def test_a_network_without_a_region(here: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "cnn.onnx").write_bytes(
        onnx.parser.parse_model(
            """<ir_version: 10, opset_import: ["" : 20]>
            cnn (float[n, 3, 8, 8] x) => (float[n, 4, 8, 8] y) <float[4, 3, 1, 1] w = {
            1,2,3,4,5,6,7,8,9,10,11,12}> { c = Conv(x, w)  y = Relu(c) }"""
        ).SerializeToString()
    )
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).standard_normal((8, 3, 8, 8), np.float32))
    ended = here("export", tmp_path / "cnn.onnx", tmp_path / "out", "--calibration-data", tmp_path / "x.npz", "--quiet")
    assert (ended.code, "no region matched" in ended.stderr) == (6, True), ended.stderr


def test_a_file_that_is_not_what_was_solved_for_is_found_out(
    monkeypatch: pytest.MonkeyPatch, slim: Callable[..., Any], model: Path
) -> None:
    """The proof must fail where a weight of the file is not the one that the graph was left with."""
    write = prove_onnx.padded_twin

    def spoilt(slimmed: Any) -> Any:
        found = write(slimmed)
        op = found.graph.op(slimmed.swept[0].region.readers[0])
        found.graph.set_weight(op, found.graph.weight(op) * 1.01)
        return found

    monkeypatch.setattr(prove_onnx, "padded_twin", spoilt)
    ended, out = slim(model)
    assert ended.code == VerificationError.exit_code
    assert not out.exists()


@pytest.mark.parametrize("side", ["writers", "readers"])
def test_a_wrong_fold_is_found_out(
    monkeypatch: pytest.MonkeyPatch, slim: Callable[..., Any], model: Path, side: str
) -> None:
    """The graph's weights have to be the products of the file's and of the maps that were solved for."""
    fold = slim_onnx_graph.apply_map

    def spoilt(graph: Any, region: Any, *rest: Any) -> None:
        fold(graph, region, *rest)
        op = graph.op(getattr(region, side)[-1])
        graph.set_weight(op, graph.weight(op) * 1.001)

    monkeypatch.setattr(slim_onnx_graph, "apply_map", spoilt)
    ended, out = slim(model)
    assert (ended.code, "was not folded into what was solved for" in ended.stderr) == (10, True), ended.stderr
    assert not out.exists()


def test_streams_that_do_not_fit_are_told_of(
    monkeypatch: pytest.MonkeyPatch, slim: Callable[..., Any], model: Path
) -> None:
    monkeypatch.setattr(memory, "KEPT_STREAMS_SHARE", 0.0)
    ended, out = slim(model, "--ratio", "0.25", "--calibration-data", model.with_name("inputs.npz"))
    assert ended.code == 0, ended.stderr
    report = json.loads((out / "report.json").read_text())
    assert report["summary"]["verified"]
    assert [note for note in report["notes"] if "calibrated in one shot" in note and "none was kept" in note]


def test_a_configuration_says_how_long_a_sequence_is(
    slim: Callable[..., Any], model: Path, tmp_path: Path, tiny_tokenizer: Any, few_tokens: list[str]
) -> None:
    """The graph itself takes more."""
    (folder := tmp_path / "short").mkdir()
    (folder / "model.onnx").write_bytes(model.read_bytes())
    tiny_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 24}))
    ended, _ = slim(folder / "model.onnx", *few_tokens)
    assert (ended.code, "the model takes 24 tokens at most" in ended.stderr) == (2, True), ended.stderr
