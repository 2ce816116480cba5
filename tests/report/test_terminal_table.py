"""The terminal table: aligned, 100 columns at most, ASCII where it must be."""

from __future__ import annotations

import dataclasses
import io
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dotresize_fx.report.contents import (
    BlockRow,
    DecoderFidelity,
    EncoderFidelity,
    Figures,
    Latency,
    Machine,
    ModelSource,
    RankRow,
    Report,
    SideFigures,
    Verification,
)
from dotresize_fx.report.terminal_table import terminal_table

SLOW = Latency(
    median=0.1232,
    min=0.12,
    max=0.14,
    p25=0.1211,
    p75=0.1253,
    runs=20,
    batch=1,
    length=128,
    threads=2,
    provider="CPUExecutionProvider",
)
FAST = dataclasses.replace(SLOW, median=0.1018, min=0.1, p25=0.1, p75=0.1036, max=0.11)
REPORT = Report(
    tool_version="0.1.0",
    packages={},
    machine=Machine(cpu="a CPU", threads=2, platform="Linux"),
    model=ModelSource(name="tiny", description="random", task="decoder"),
    options={},
    seed=0,
    figures=Figures(
        dense=SideFigures(
            parameters=134_515_008,
            block_linear_weights=106_168_320,
            macs_per_token=136_740_864,
            block_macs_per_token=106_168_320,
            file_bytes=541_872_724,
            latency=SLOW,
        ),
        slim=SideFigures(
            parameters=113_279_040,
            block_linear_weights=84_934_656,
            macs_per_token=115_507_200,
            block_macs_per_token=84_934_656,
            file_bytes=456_900_000,
            latency=FAST,
        ),
        macs_length=128,
        fidelity=(
            DecoderFidelity(
                text="held-out text",
                tokens=16384,
                dense_perplexity=22.67,
                slim_perplexity=27.14,
                top1_agreement=0.8342,
                kl_to_dense=0.1632,
            ),
        ),
        verification=Verification(max_abs_difference=1.2e-4, tolerance=1e-3, max_abs_output=31.2),
        peak_export_bytes=2_610_000_000,
        peak_runtime_bytes=1_410_000_000,
    ),
    stage_seconds={"total": 346.2},
    notes=("Tied embedding kept tied.",),
)

EXPECTED = """\
tiny (decoder): 20.0 % of block weights removed, 1.21x faster, excess 0.180 nats, top-1 agreement
  83.4 %, verified to 1.2e-4
----------------------------------------------------------------------------------------------------
                                                   dense              slim                    change
----------------------------------------------------------------------------------------------------
parameters                                       134.5 M           113.3 M                   -15.8 %
block linear weights                             106.2 M            84.9 M                   -20.0 %
MACs per token at 128 tokens                     136.7 M           115.5 M                   -15.5 %
  head and attention included
MACs per token, block linears only               106.2 M            84.9 M                   -20.0 %
file size                                       541.9 MB          456.9 MB                   -15.7 %
  model.onnx and its external data
perplexity                                         22.67             27.14         0.180 nats excess
  held-out text, 16384 tokens
next-token top-1 agreement                             -            83.4 %                         -
KL to dense, nats per token                            -             0.163                         -
latency                                  123.2 +- 2.1 ms   101.8 +- 1.8 ms              1.21x faster
  ONNX Runtime, CPUExecutionProvider, 2 threads, batch 1 x 128 tokens, 20 interleaved runs each;
    median +- half the interquartile range
largest difference to slim program                     -            1.2e-4               within 1e-3
  largest output 31.20
----------------------------------------------------------------------------------------------------
0 of 0 regions narrowed; 0 of 0 linears matched.
Peak memory: export 2.6 GB, ONNX Runtime child 1.4 GB; took 5 min 46 s.
Note: Tied embedding kept tied."""


def test_ascii_table() -> None:
    assert terminal_table(REPORT, ascii_only=True) == EXPECTED


@pytest.mark.parametrize(("encoding", "sign"), [("utf-8", "±"), ("latin-1", "+-"), ("ascii", "+-")])
def test_table_follows_the_terminals_encoding(encoding: str, sign: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    table = terminal_table(REPORT)
    assert f"123.2 {sign} 2.1 ms" in table
    table.encode(encoding)


def test_what_went_beside_widths_is_counted() -> None:
    blocks = (BlockRow(index=0), BlockRow(index=3))
    ranks = (RankRow(name="up", d_in=8, d_out=8, rank=2),)
    table = terminal_table(dataclasses.replace(REPORT, removed_blocks=blocks, low_rank_linears=ranks), ascii_only=True)
    assert "\n2 blocks went; 1 linear of a lower rank; 0 of 0 regions narrowed; 0 of 0 linears matched.\n" in table


def test_an_agreement_that_was_not_measured_is_left_out() -> None:
    (found,) = REPORT.figures.fidelity
    fidelity = (dataclasses.replace(found, top1_agreement=None),)
    report = dataclasses.replace(REPORT, figures=dataclasses.replace(REPORT.figures, fidelity=fidelity))
    assert "excess 0.180 nats, verified" in terminal_table(report, ascii_only=True)


def test_nothing_measured_is_said_for_every_figure() -> None:
    table = terminal_table(dataclasses.replace(REPORT, figures=Figures(), stage_seconds={}), ascii_only=True)
    assert "latency not measured, fidelity not measured, not verified" in table
    for label in ("parameters", "file size", "perplexity", "latency", "largest difference"):
        (line,) = [line for line in table.splitlines() if line.startswith(label)]
        assert "not measured" in line


def test_failed_verification_leads_the_verdict() -> None:
    figures = dataclasses.replace(
        REPORT.figures, verification=Verification(max_abs_difference=float("inf"), tolerance=1e-3)
    )
    table = terminal_table(dataclasses.replace(REPORT, figures=figures), ascii_only=True)
    assert "VERIFICATION FAILED: off by infinite, allowed 1e-3" in " ".join(table.split())
    assert "over 1e-3" in table


def test_encoders_show_their_cosine() -> None:
    model = dataclasses.replace(REPORT.model, task="encoder")
    for cosine, shown in ((0.98765, "0.9877"), (None, "not measured")):
        fidelity = (EncoderFidelity(text="sentences", count=64, mean_cosine=cosine),)
        figures = dataclasses.replace(REPORT.figures, fidelity=fidelity)
        table = terminal_table(dataclasses.replace(REPORT, model=model, figures=figures), ascii_only=True)
        (line,) = [line for line in table.splitlines() if line.startswith("cosine")]
        assert shown in line
        assert "perplexity" not in table


amounts = st.none() | st.integers(0, 10**16)
times = st.floats(1e-7, 9e3)


@settings(deadline=None)
@given(name=st.text(), before=amounts, after=amounts, median=times, wide=times, perplexity=st.floats(1, 1e300))
def test_no_line_is_too_long_and_none_steers_the_terminal(
    name: str, before: int | None, after: int | None, median: float, wide: float, perplexity: float
) -> None:
    item = dataclasses.replace(SLOW, median=median, p25=max(median - wide, 0.0), p75=median + wide)
    fidelity = DecoderFidelity(text=name, tokens=1, dense_perplexity=2.0, slim_perplexity=perplexity)
    figures = Figures(
        dense=SideFigures(parameters=before, file_bytes=before, latency=item),
        slim=SideFigures(parameters=after, file_bytes=after, latency=FAST),
        fidelity=(fidelity,),
    )
    model = ModelSource(name=name, description="", task="decoder")
    report = dataclasses.replace(REPORT, model=model, figures=figures, notes=(name,))
    for ascii_only in (True, False):
        lines = terminal_table(report, ascii_only=ascii_only).split("\n")
        assert max(len(line) for line in lines) <= 100
        assert all(line.isprintable() for line in lines)
        if ascii_only:
            assert all(line.isascii() for line in lines)
