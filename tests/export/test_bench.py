"""The benchmark on real small graphs: with a cache and without, alike and unlike, sound and broken."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from dotresize_fx.cli import main
from dotresize_fx.errors import InputsDifferError
from dotresize_fx.export.bench import bench
from dotresize_fx.export.bench_model import open_models, sizes_told
from dotresize_fx.report.bench_tables import bench_table
from dotresize_fx.workload import Workload

pytest.importorskip("onnxruntime")

# One head of 8 over a cache. In the text form _0_ stands for the .0. of the names, which it does not have.
CACHED = """(int64[b, l] input_ids, int64[b, t] attention_mask, int64[b, l] position_ids,
  float[b, 1, p, 8] past_key_values_0_key, float[b, 1, p, 8] past_key_values_0_value)
  => (float[b, 1, l, 40] logits, float[b, 1, t, 8] present_0_key, float[b, 1, t, 8] present_0_value)
  <int64[1] one = {1}, int64[2] middle = {1, 2}>
{
  words = Gather(table, input_ids)
  places = Gather(positions, position_ids)
  flat = Add(words, places)
  x = Unsqueeze(flat, one)
  k = MatMul(x, w_k)
  present_0_key = Concat <axis = 2> (past_key_values_0_key, k)
  present_0_value = Concat <axis = 2> (past_key_values_0_value, x)
  turned = Transpose <perm = [0, 1, 3, 2]> (present_0_key)
  scores = MatMul(x, turned)
  mask = Cast <to = 1> (attention_mask)
  added = Unsqueeze(mask, middle)
  masked = Add(scores, added)
  shares = Softmax(masked)
  mixed = MatMul(shares, present_0_value)
  logits = MatMul(mixed, w_out)
}"""
# A product, which can be cut, in front of what takes all the time.
SLOW = """(float[b, 1] x) => (float[b] y) <int64[2] wide = {1, 300000}>
{ h = MatMul(x, a) z = MatMul(h, c) e = Expand(z, wide) s = Sin(e) t = Sin(s)
  y = ReduceSum <keepdims = 0> (t, axes) }"""
# Takes batch ** 40 bytes: for one sequence 1, for two a tebibyte.
HUGE = """(float[b, 4] x) => (bool[n] y) <int64[1] first = {0}, float[1] power = {40}>
{ shape = Shape <start = 0, end = 1> (x) f = Cast <to = 1> (shape) g = Pow(f, power) n = Cast <to = 7> (g)
  y = ConstantOfShape <value = bool[1] {0}> (n) }"""


def save(path: Path, text: str, **weights: np.ndarray) -> Path:
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]> g {text}')
    graph = model.graph
    for value in (*graph.input, *graph.output):
        value.name = value.name.replace("_0_", ".0.")
    for node in graph.node:
        node.input[:] = [name.replace("_0_", ".0.") for name in node.input]
        node.output[:] = [name.replace("_0_", ".0.") for name in node.output]
        node.name = f"node_{node.output[0]}"
    graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in weights.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return path


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def save_cached(path: Path) -> Path:
    # 12 positions: a workload that counted them wrong would fail on one that is not there.
    tables = {"table": normal(40, 8), "positions": normal(12, 8)}
    return save(path, CACHED, **tables, w_k=normal(8, 8), w_out=normal(8, 40))


def save_slow(path: Path, width: int) -> Path:
    return save(path, SLOW, a=normal(1, width), c=normal(width, 1), axes=np.array([1]))


class Page(HTMLParser):
    """Every tag that opens closes."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in {"meta", "br"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """A tag of its own."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_two_copies_of_a_cached_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save_cached(tmp_path / "one" / "model.onnx")
    arguments = ["bench", str(path.parent), str(path), "--workload", "prompt=6,decode=6,batch=2", "--runs", "15"]
    files = [tmp_path / "figures.json", tmp_path / "page.html"]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--threads", "1", "--json", str(files[0]), "--html", str(files[1]), "--quiet"])
    assert ended.value.code == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    figures = json.loads(files[0].read_text("utf-8"))
    assert [model["name"] for model in figures["models"]] == ["one", "one (2)"]
    assert all(model["cached"] and model["file_bytes"] == path.stat().st_size for model in figures["models"])
    (workload,) = figures["workloads"]
    assert (workload["prompt"], workload["decode"], workload["batch"], workload["notes"]) == (6, 6, 2, [])
    assert all(peak["rss_bytes"] is None or peak["rss_bytes"] > 10_000_000 for peak in workload["peaks"])
    prompt, token = workload["phases"]
    assert [phase["name"] for phase in (prompt, token)] == ["prompt", "output token"]
    for phase, length, keys in ((prompt, 6, 6), (token, 1, 6 + 3 + 1)):
        macs = 2 * length * (8 * 8 + 2 * 8 * keys + 8 * 40)
        # Both products whole, constants of shape arithmetic, and of both tables a row a token (of the positions 12).
        weights = 4 * (8 * 8 + 8 * 40) + 8 * 3 + 4 * 8 * (2 * length + min(2 * length, 12))
        cache = 4 * 2 * 8 * 2 * (keys - length + keys)
        for run in phase["runs"]:
            assert run["macs"] == macs
            assert (run["weight_bytes"], run["cache_bytes"]) == (weights, cache)
            assert run["bytes_moved"] == weights + cache
            assert run["gigabytes_per_second"] == pytest.approx((weights + cache) / run["latency"]["median"] / 1e9)
            assert (run["gpu_busy"], run["launching"]) == (None, None)  # no GPU, so nothing is said of one
            assert run["tokens_per_second"] == pytest.approx(2 * length / run["latency"]["median"])
            assert run["gflops"] == pytest.approx(2 * macs / run["latency"]["median"] / 1e9)
            assert run["latency"]["runs"] == 15
        first, second = phase["runs"]
        assert (first["ratio"], second["macs_ratio"], phase["findings"]) == (None, 1, [])
        assert (first["bytes_ratio"], second["bytes_ratio"]) == (None, 1)
        # Runs of some 20 microseconds: how a process lies in memory alone may make one faster.
        assert second["ratio"]["low"] <= 1.3
        assert second["ratio"]["high"] >= 0.7
    page = Page(files[1].read_text("utf-8"))
    for text in (printed.out, page.text):
        assert "Time per output token" in text
        assert "Bytes moved, output token" in text
        assert "GPU busy" not in text
        assert "one (2)" in text
        assert f"{second['ratio']['value']:.3f}" in text


def test_a_cut_in_vain_is_told_with_what_ate_it(tmp_path: Path) -> None:
    wide, narrow = save_slow(tmp_path / "wide.onnx", 64), save_slow(tmp_path / "narrow.onnx", 16)
    report = bench([wide, narrow], [Workload(prompt=1, decode=4, batch=2)], runs=15, threads=1)
    (workload,) = report.workloads
    (phase,) = workload.phases
    assert any("no input past_key_values" in note for note in workload.notes)
    dense, slim = phase.runs
    assert (dense.macs, slim.macs, slim.tokens_per_second) == (2 * 2 * 64, 2 * 2 * 16, None)
    (finding,) = phase.findings
    assert "75.0 % fewer MACs, moves" in finding.text
    assert finding.losses["op"][0].label == "Sin"
    assert sum(loss.after_macs for loss in finding.losses["op"]) == slim.macs
    for losses in finding.losses.values():
        assert sum(loss.eaten for loss in losses) == pytest.approx(
            sum(loss.after for loss in losses) - 0.25 * sum(loss.before for loss in losses)
        )
    printed = bench_table(report, ascii_only=True)
    assert printed.isascii()
    assert max(len(line) for line in printed.splitlines()) <= 100
    assert "! narrow has 75.0 % fewer MACs" in printed


def test_what_finds_no_room_runs_with_a_smaller_batch(tmp_path: Path) -> None:
    path = save(tmp_path / "huge.onnx", HUGE)
    report = bench([path], [Workload(prompt=4, decode=0, batch=2)], runs=1, threads=1)
    assert report.workloads[0].batch == 1
    assert "no memory for batch 2, so batch 1 was run" in report.workloads[0].notes[0]


@pytest.mark.parametrize(
    ("damage", "code", "said"),
    [
        ("", 0, ""),
        ("not a model", 3, "not an ONNX model"),
        ("missing", 3, "no ONNX model"),
        ("other inputs", 17, "takes an input attention_mask and"),
        ("no room", 18, "no memory left to run"),
        ("other sizes", 17, "give models of the same inputs"),
        ("--device=cuda", 9, r"dotresize-fx[gpu]"),
        ("--device=tpu", 2, "--device tpu"),
        ("--runs=0", 2, "--runs is 0"),
        ("--workload=prompt", 2, "--workload prompt"),
        ("--json=no/such/figures.json", 8, "no/such"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str, code: int, said: str
) -> None:
    import onnxruntime

    if damage == "--device=cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has it")
    first, second = (save_slow(tmp_path / f"{name}.onnx", 4) for name in ("first", "second"))
    if damage == "not a model":
        second.write_text("this is no model")
    elif damage == "missing":
        second.unlink()
    elif damage == "no room":  # 4 ** 20 bytes for one sequence
        for path in (first, second):
            save(path, HUGE.replace("start = 0, end = 1", "start = 1, end = 2").replace("{40}", "{20}"))
    elif damage == "other inputs":
        save_cached(second)
    elif damage == "other sizes":
        text = SLOW.replace("float[b, 1] x", "float[b, 2] x")
        save(second, text, a=normal(2, 4), c=normal(4, 1), axes=np.array([1]))
    options = ["--runs=1", "--threads=1", "--quiet", *([damage] if damage.startswith("--") else [])]
    with pytest.raises(SystemExit) as ended:
        main(["bench", str(first), str(second), *options])
    assert ended.value.code == code
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.err.count("\n") == (code != 0)


def test_fixed_sizes_are_run_and_told(tmp_path: Path) -> None:
    fixed = CACHED.replace("[b, l]", "[4, 6]").replace("[b,", "[4,")
    (model,) = open_models([save(tmp_path / "fixed.onnx", fixed)])
    workload, notes = sizes_told(model, Workload(prompt=9, decode=2, batch=1))
    assert workload == Workload(prompt=6, decode=2, batch=4)
    assert "fixed sizes: prompt=6,decode=2,batch=4 was run for prompt=9,decode=2,batch=1" in notes[0]
    assert not model.batch_is_free
    assert "of one fixed length" in model.why_no_tokens(workload)
    (free,) = open_models([save_cached(tmp_path / "free.onnx")])
    assert sizes_told(free, workload) == (workload, [])
    assert free.why_no_tokens(workload) == ""
    assert "decode=0" in free.why_no_tokens(Workload(6, 0, 4))
    lost = CACHED.replace("present_0_value)", "kept)").replace("present_0_value", "kept")
    (without,) = open_models([save(tmp_path / "without.onnx", lost)])
    assert "past_key_values.0.value has no output present" in without.why_no_tokens(workload)


def test_a_caches_sizes_may_differ(tmp_path: Path) -> None:
    """A slim model's heads are smaller; that is declared, and no other input than the dense model's."""
    wide = save_cached(tmp_path / "wide.onnx")
    model = onnx.load(wide)
    for value in model.graph.input:
        if value.name.startswith("past"):
            value.type.tensor_type.shape.dim[3].dim_value = 4
    onnx.save(model, tmp_path / "narrow.onnx")
    assert [found.name for found in open_models([wide, tmp_path / "narrow.onnx"])] == ["wide", "narrow"]
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.INT32
    onnx.save(model, tmp_path / "narrow.onnx")
    with pytest.raises(InputsDifferError, match="input_ids is int64"):
        open_models([wide, tmp_path / "narrow.onnx"])


def test_a_cache_of_fewer_layers(tmp_path: Path) -> None:
    """A block that went took its part of the cache with it; a model without any is another thing."""
    deep = save_cached(tmp_path / "deep.onnx")
    model = onnx.load(deep)
    for values in (model.graph.input, model.graph.output):
        for part in [value for value in values if value.name.endswith((".0.key", ".0.value"))]:
            another = type(part)()
            another.CopyFrom(part)
            another.name = part.name.replace(".0.", ".1.")
            values.append(another)
    for name in ("key", "value"):
        model.graph.node.add(op_type="Identity", input=[f"past_key_values.1.{name}"], output=[f"present.1.{name}"])
    onnx.save(model, tmp_path / "deeper.onnx")
    report = bench([tmp_path / "deeper.onnx", deep], [Workload(4, 2, 1)], runs=2)
    assert [found.name for found in report.models] == ["deeper", "deep"]
    (tmp_path / "bare").mkdir()
    whole = save(
        tmp_path / "bare" / "model.onnx", "(int64[b, l] input_ids) => (int64[b, l] y) { y = Identity(input_ids) }"
    )
    with pytest.raises(InputsDifferError, match="takes an input"):
        open_models([deep, whole])
