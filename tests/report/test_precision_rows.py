"""The rows of model.onnx in another precision."""

from __future__ import annotations

import dataclasses
from typing import Any

from dotresize_fx.report.contents import (
    DecoderFidelity,
    EncoderFidelity,
    Figures,
    Latency,
    Machine,
    ModelSource,
    PrecisionFigures,
    Report,
    SideFigures,
    Verification,
)
from dotresize_fx.report.page import render_page
from dotresize_fx.report.precision_rows import precision_rows
from dotresize_fx.report.terminal_table import WIDTH, terminal_table

PLAIN = Report(
    tool_version="0.1.0",
    packages={},
    machine=Machine(cpu="a CPU", threads=2, platform="Linux"),
    model=ModelSource(name="tiny", description="random weights", task="decoder"),
    options={},
    seed=0,
)


def latency(median: float) -> Latency:
    spread = {"min": median, "max": median, "p25": median, "p75": median}
    where = {"batch": 1, "length": 128, "threads": 2, "provider": "CPUExecutionProvider"}
    return Latency(median=median, runs=20, **spread, **where)


def decoder(perplexity: float) -> DecoderFidelity:
    found = {"dense_perplexity": 10.0, "slim_perplexity": perplexity, "top1_agreement": 0.8, "kl_to_dense": 0.1}
    return DecoderFidelity(text="a text", tokens=100, **found)


def report(*rows: PrecisionFigures) -> Report:
    figures = Figures(
        dense=SideFigures(file_bytes=400_000_000, latency=latency(0.2)),
        slim=SideFigures(file_bytes=300_000_000, latency=latency(0.15)),
        precisions=rows,
    )
    return dataclasses.replace(PLAIN, figures=figures)


def side(which: Any, precision: str, **found: Any) -> PrecisionFigures:
    return PrecisionFigures(side=which, precision=precision, **found)


QUANTISED = report(
    side("slim", "int4", file_bytes=80_000_000, latency=latency(0.05), fidelity=decoder(20.0), top1_agreement=0.9,
         linears=8, quantised_linears=7),
    side("dense", "int4", file_bytes=100_000_000, latency=latency(0.1), fidelity=decoder(12.0), top1_agreement=0.95),
)  # fmt: skip


def test_dense_and_slim_stand_beside_dense_float32() -> None:
    rows = {row.label: row for row in precision_rows(QUANTISED)}
    size = rows["file size, int4"]
    assert (size.dense, size.slim, size.change, size.better) == ("100.0 MB", "80.0 MB", "−20.0 %", True)
    assert size.detail == "−80.0 % beside dense float32, 7 of 8 products quantised"
    excess = rows["excess in nats, int4"]
    assert (excess.dense, excess.slim) == ("0.182", "0.693")
    own = rows["agreement with own float32, int4"]
    assert (own.dense, own.slim) == ("95.0 %", "90.0 %")
    speed = rows["latency, int4"]
    assert (speed.change, speed.better) == ("2.00× faster", True)
    assert speed.detail == "slim int4 beside dense float32: 4.00× faster"
    assert not any("difference" in label for label in rows)


def test_a_dtype_has_its_tolerance_and_an_encoder_its_cosine() -> None:
    cosine = EncoderFidelity(text="a text", count=9, mean_cosine=0.9871)
    check = Verification(max_abs_difference=2e-3, tolerance=5e-3)
    given = report(
        side("slim", "bfloat16", fidelity=cosine, verification=check), side("dense", "bfloat16", fidelity=cosine)
    )
    rows = {row.label: row for row in precision_rows(given)}
    difference = rows["difference to slim program, bfloat16"]
    assert (difference.slim, difference.change, difference.better) == ("2e-3", "within 5e-3", True)
    assert rows["cosine to dense, bfloat16"].slim == "0.987"
    assert rows["latency, bfloat16"].slim == rows["file size, bfloat16"].dense == "not measured"
    assert max(map(len, terminal_table(given).splitlines())) <= WIDTH


def test_terminal_page_and_json_have_them_and_float32_has_none() -> None:
    assert precision_rows(PLAIN) == []
    table = terminal_table(QUANTISED)
    assert "excess in nats, int4" in table
    assert max(map(len, table.splitlines())) <= WIDTH
    assert "KL to dense float32, int4" in render_page(QUANTISED)
    slim, dense = QUANTISED.to_json()["figures"]["precisions"]
    assert (slim["side"], slim["quantised_linears"]) == ("slim", 7)
    assert round(dense["fidelity"]["excess"], 3) == 0.182
