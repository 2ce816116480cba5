"""report.json holds every figure; report.html is one safe, self-contained page that invents none."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dotresize_fx.errors import OutputError
from dotresize_fx.report.contents import (
    BlockRow,
    DecoderFidelity,
    EncoderFidelity,
    Figures,
    Latency,
    LinearRole,
    LinearRow,
    Machine,
    ModelSource,
    RankRow,
    RegionRow,
    Report,
    SideFigures,
    Verification,
)
from dotresize_fx.report.page import render_page
from dotresize_fx.report.write import write_report

EMPTY = Report(
    tool_version="0.1.0",
    packages={"torch": "2.13.0"},
    machine=Machine(cpu="a CPU", threads=2, platform="Linux"),
    model=ModelSource(name="tiny", description="random weights", task="decoder"),
    options={"ratio": 0.2, "calibration": Path("text.txt")},
    seed=7,
)


def latency(median: float, longest: float) -> Latency:
    return Latency(
        median=median,
        min=median * 0.9,
        max=longest,
        p25=median * 0.98,
        p75=median * 1.02,
        runs=20,
        batch=1,
        length=128,
        threads=2,
        provider="CPUExecutionProvider",
    )


FULL = dataclasses.replace(
    EMPTY,
    inputs_sha256={"model.safetensors": "a1" * 32},
    outputs_sha256={"model.onnx": "b2" * 32},
    regions=(
        RegionRow(
            name="layers.0.mlp",
            kind="ffn",
            symmetry="permutation",
            width_before=64,
            width_after=48,
            writers=("layers.0.up",),
            readers=("layers.0.down",),
            method="dotresize",
            error=0.0625,
            notes={"Sinkhorn iterations": 41},
        ),
        RegionRow(
            name="stream",
            kind="residual",
            symmetry="orthogonal",
            width_before=32,
            width_after=32,
            writers=("embedding",),
            readers=("layers.0.up",),
        ),
    ),
    linears=(
        LinearRow(
            name="layers.0.up",
            shape=(64, 32),
            roles=(
                LinearRole(region="stream", role="reader"),
                LinearRole(region="layers.0.mlp", role="writer"),
            ),
        ),
        LinearRow(name="layers.0.down", shape=(32, 64), roles=(LinearRole(region="layers.0.mlp", role="reader"),)),
        LinearRow(name="head", shape=(99, 32), reason="its width is an output of the graph"),
    ),
    figures=Figures(
        dense=SideFigures(parameters=1000, block_linear_weights=800, latency=latency(0.1, 0.12)),
        slim=SideFigures(parameters=840, block_linear_weights=640, latency=latency(0.08, 0.9)),
        macs_length=128,
        fidelity=(
            DecoderFidelity(text="held-out", tokens=512, dense_perplexity=20.0, slim_perplexity=24.0),
            EncoderFidelity(text="sentences", count=9, mean_cosine=0.9876),
        ),
        verification=Verification(max_abs_difference=1.2e-4, tolerance=1e-3, max_abs_output=30.0, cases=3),
        peak_export_bytes=2_000_000_000,
    ),
    stage_seconds={"capture": 3.0, "sweep": 6.0, "total": 9.5},
    notes=("Tied embedding kept tied.",),
)


class Page(HTMLParser):
    """Collects tags, attributes and text, and fails on a tag that does not close what is open."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "br"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data)


def test_json_holds_every_field_and_survives_json() -> None:
    content = json.loads(json.dumps(FULL.to_json(), allow_nan=False))
    assert content["schema_version"] == 3
    assert set(content) == {field.name for field in dataclasses.fields(Report)} | {
        "schema_version",
        "summary",
    }
    assert content["linears"][0]["roles"][1] == {"region": "layers.0.mlp", "role": "writer"}
    assert [row["status"] for row in content["linears"]] == ["matched", "matched", "skipped"]
    assert content["options"] == {"ratio": 0.2, "calibration": "text.txt"}
    assert content["figures"]["peak_runtime_bytes"] is None
    assert content["figures"]["fidelity"][0]["excess"] == pytest.approx(math.log(1.2))
    assert content["summary"]["block_weights_removed"] == pytest.approx(0.2)
    assert content["summary"]["speedup"] == pytest.approx(1.25)
    assert content["summary"]["verified"] is True


def test_json_of_nothing_measured_has_no_figure() -> None:
    content = EMPTY.to_json()
    assert set(content["summary"].values()) == {None}
    assert set(content["figures"]["dense"].values()) == {None}


@pytest.mark.parametrize(("value", "text"), [(math.inf, "inf"), (math.nan, "nan")])
def test_a_difference_that_is_no_number_is_not_verified(value: float, text: str) -> None:
    figures = Figures(verification=Verification(max_abs_difference=value, tolerance=1e-3))
    content = dataclasses.replace(EMPTY, figures=figures).to_json()
    assert content["figures"]["verification"]["max_abs_difference"] == text
    assert content["summary"]["verified"] is False
    json.dumps(content, allow_nan=False)


def test_no_linear_is_skipped_without_a_reason() -> None:
    with pytest.raises(ValueError, match="head: skipped without a reason"):
        LinearRow(name="head", shape=(2, 2))


def test_files_are_written_and_a_missing_folder_is_a_clear_error(tmp_path: Path) -> None:
    write_report(FULL, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]
    assert json.loads((tmp_path / "report.json").read_text("utf-8")) == FULL.to_json()
    assert (tmp_path / "report.html").read_text("utf-8") == render_page(FULL)
    with pytest.raises(OutputError, match=r"report\.json"):
        write_report(FULL, tmp_path / "missing")


def test_page_shows_what_the_report_holds() -> None:
    text = Page(render_page(FULL)).text
    for shown in (
        "20.0 % of block weights removed",
        "1.25× faster",
        "excess 0.182 nats",
        "verified to 1.2e-4",
        "64 → 48",
        "its width is an output of the graph",
        "reader of stream",
        "writer of layers.0.mlp",
        "a1" * 32,
        "b2" * 32,
        "0.9876",
        "Tied embedding kept tied.",
        "Sinkhorn iterations 41",
        "slowest 900 ms",
        "ONNX Runtime child not measured",
    ):
        assert shown in text, shown


STRUCTURE = dataclasses.replace(
    EMPTY,
    removed_blocks=(BlockRow(index=2, name="layers.2", merged_into=3, alpha=0.4375), BlockRow(index=5)),
    low_rank_linears=(RankRow(name="layers.7.up", d_in=32, d_out=64, rank=8, error=0.0625),),
)


def test_blocks_that_went_and_ranks_are_fields_and_tables() -> None:
    content = STRUCTURE.to_json()
    assert content["removed_blocks"] == [
        {"index": 2, "name": "layers.2", "merged_into": 3, "alpha": 0.4375},
        {"index": 5, "name": "", "merged_into": None, "alpha": None},
    ]
    assert content["low_rank_linears"] == [{"name": "layers.7.up", "d_in": 32, "d_out": 64, "rank": 8, "error": 0.0625}]
    text = Page(render_page(STRUCTURE)).text
    assert "layers.2 2 merged into 3 43.8 %" in text
    assert "block 5 5 dropped –" in text
    assert "layers.7.up 64 × 32 8 −62.5 % 6.2 %" in text
    assert "Depth and rank" not in render_page(FULL)


def test_page_of_nothing_measured_says_so_and_shows_no_figure() -> None:
    page = render_page(EMPTY)
    text = Page(page).text
    assert "Latency not measured, fidelity not measured, not verified" in text
    table = text[text.index("side by side") : text.index("Widths")]
    assert table.count("not measured") == 15
    assert not re.search(r"\d", table.replace("top-1", ""))


def test_page_needs_nothing_from_elsewhere() -> None:
    page = render_page(FULL)
    parsed = Page(page)
    assert {tag for tag, _ in parsed.tags} & {
        "script",
        "link",
        "img",
        "iframe",
        "object",
        "a",
        "base",
    } == set()
    assert not [key for _, attributes in parsed.tags for key in attributes if key in {"src", "href"}]
    assert not re.search(r"https?:|url\(|@import", page)
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page


def test_names_out_of_model_files_cannot_become_markup() -> None:
    evil = "</style><script>alert('x')</script>\"onload=\"x"
    region = dataclasses.replace(FULL.regions[0], name=evil, notes={evil: evil}, writers=(evil,), kind=evil)
    linear = LinearRow(name=evil, shape=(1, 1), reason=evil)
    model = ModelSource(name=evil, description=evil, task="encoder")
    structure = {
        "removed_blocks": (BlockRow(index=0, name=evil),),
        "low_rank_linears": (RankRow(name=evil, d_in=4, d_out=4, rank=1),),
    }
    report = dataclasses.replace(
        FULL, regions=(region,), linears=(linear,), model=model, options={evil: evil}, notes=(evil,), **structure
    )
    parsed = Page(render_page(report))
    assert "script" not in {tag for tag, _ in parsed.tags}
    assert not [attributes for _, attributes in parsed.tags if "onload" in attributes]
    assert evil in parsed.text


def test_bars_are_as_long_as_the_widths() -> None:
    rects = [a for tag, a in Page(render_page(FULL)).tags if tag == "rect" and a.get("height") == "13"]
    widths = [(rect["class"], rect["width"]) for rect in rects]
    assert widths == [
        ("f-dense", "100.00%"),
        ("f-slim", "75.00%"),
        ("f-dense", "100.00%"),
        ("f-slim", "100.00%"),
    ]


def test_a_disturbed_run_does_not_press_the_latency_plot_flat() -> None:
    bars = [a for tag, a in Page(render_page(FULL)).tags if tag == "rect" and a.get("height") == "20"]
    dense, slim = (float((bar["width"] or "").rstrip("%")) for bar in bars)
    # The slowest run took 900 ms, 9 dense medians; the plot still gives the medians most of its room.
    assert dense > 50
    assert slim / dense == pytest.approx(0.8, abs=0.01)


seconds = st.floats(min_value=1e-7, max_value=1e4)


@settings(max_examples=25, deadline=None)
@given(name=st.text(min_size=1), times=st.lists(seconds, min_size=5, max_size=5), width=st.integers(1, 10**6))
def test_any_names_and_times_make_a_page(name: str, times: list[float], width: int) -> None:
    low, quarter, middle, three, high = sorted(times)
    item = dataclasses.replace(latency(1.0, 1.0), min=low, p25=quarter, median=middle, p75=three, max=high, batch=None)
    figures = Figures(dense=SideFigures(latency=item), slim=SideFigures(latency=item))
    region = dataclasses.replace(FULL.regions[0], name=name, width_before=width, width_after=1, error=None)
    parsed = Page(render_page(dataclasses.replace(FULL, regions=(region,), figures=figures)))
    for tag, attributes in parsed.tags:
        for key in ("x", "x1", "x2", "width"):
            place = attributes.get(key)
            if tag in {"rect", "line", "text"} and place is not None and place.endswith("%"):
                assert 0 <= float(place[:-1]) <= 100
