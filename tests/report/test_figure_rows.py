"""Figures as words."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dotresize_fx.report import figure_rows as words
from dotresize_fx.report.contents import CheckpointFigures, Figures, Latency, LatencyTarget, SideFigures


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (words.count(134_515_008), "134.5 M"),
        (words.count(999_960), "1.0 M"),
        (words.count(999), "999"),
        (words.count(999.5), "1.0 k"),
        (words.size(999.4), "999 B"),
        (words.count(None), "not measured"),
        (words.size(538_060_032), "538.1 MB"),
        (words.size(12), "12 B"),
        (words.duration(0.0123), "12.3 ms"),
        (words.duration(0.00999999), "10.0 ms"),
        (words.duration(4.2e-6), "4.20 µs"),
        (words.duration(0), "0.00 µs"),
        (words.duration(59.96), "60.0 s"),
        (words.duration(134.2), "2 min 14 s"),
        (words.duration(119.7), "2 min 00 s"),
        (words.number(0.000123), "1.2e-4"),
        (words.number(1e-3), "1e-3"),
        (words.number(0), "0"),
        (words.number(-0.0123), "-0.012"),
        (words.number(26.3), "26.30"),
        (words.number(1.2e9), "1.2e9"),
        (words.number(math.inf), "infinite"),
        (words.number(math.nan), "not a number"),
        (words.share(0.2), "20.0 %"),
        (words.change(100, 80), "−20.0 %"),
        (words.change(100, 105.9), "+5.9 %"),
        (words.change(100, 99.99), "0.0 %"),
        (words.change(0, 5), "–"),
        (words.change(None, 5), "–"),
    ],
)
def test_units(said: str, expected: str) -> None:
    assert said == expected


@given(st.floats(min_value=0, max_value=9e14))
def test_no_unit_holds_a_thousand(value: float) -> None:
    for said in (words.count(value), words.size(value)):
        assert float(said.split()[0]) < 1000


@given(st.floats(min_value=1e-6, max_value=0.5))
def test_a_duration_is_right_to_three_digits(value: float) -> None:
    amount, unit = words.duration(value).split()
    # Half a unit of the third digit: 0.5 % of a leading 1.
    assert float(amount) * {"s": 1, "ms": 1e-3, "µs": 1e-6}[unit] == pytest.approx(value, rel=5e-3)


def timed(median: float, half_width: float) -> SideFigures:
    item = Latency(
        median=median,
        min=median - half_width,
        max=median + half_width,
        p25=median - half_width,
        p75=median + half_width,
        runs=9,
        batch=2,
        length=None,
        threads=1,
        provider="P",
    )
    return SideFigures(latency=item)


@pytest.mark.parametrize(
    ("dense", "slim", "expected"),
    [
        (timed(0.12, 0.001), timed(0.1, 0.001), ("1.20× faster", True)),
        (timed(0.1, 0.001), timed(0.12, 0.001), ("1.20× slower", False)),
        (timed(0.12, 0.01), timed(0.11, 0.01), ("1.09× (within spread)", None)),
        (timed(0.12, 0.01), SideFigures(), ("–", None)),
    ],
)
def test_speed_is_claimed_only_beyond_the_spread(
    dense: SideFigures, slim: SideFigures, expected: tuple[str, bool | None]
) -> None:
    assert words.speed(Figures(dense=dense, slim=slim)) == expected


def test_conditions_and_spread() -> None:
    item = timed(0.1232, 0.0021).latency
    assert item is not None
    assert words.conditions(item) == "ONNX Runtime, P, 1 thread, batch 2, 9 interleaved runs each"
    assert words.spread(item) == "123.2 ± 2.1 ms"


def test_a_checkpoint_is_shown_with_what_its_configuration_says() -> None:
    found = CheckpointFigures(
        folder="checkpoint",
        config_changes={"intermediate_size": [64, 48], "tie_word_embeddings": [True, False]},
        parameters=1_200_000,
        file_bytes=4_800_000,
        max_abs_difference=3e-5,
        tolerance=1e-3,
        max_abs_output=12.0,
        cases=6,
        tokens_generated=32,
        tokens_equal=31,
    )
    assert words._checkpoint_rows(Figures()) == []
    size, files, difference = words._checkpoint_rows(Figures(checkpoint=found))
    assert (size.slim, size.detail) == ("1.2 M", "intermediate_size 64 → 48, tie_word_embeddings True → False")
    assert (files.slim, files.detail) == ("4.8 MB", "checkpoint/, safetensors")
    assert (difference.slim, difference.change) == ("3e-5", "within 1e-3")
    assert difference.detail == "largest output 12.00, loaded with from_pretrained; 31 of 32 greedy tokens equal"


def test_a_target_latency_is_shown_with_what_was_asked_predicted_and_measured() -> None:
    found = LatencyTarget(
        workload="prompt=8,decode=2,batch=1",
        target=0.8,
        predicted=0.77,
        measured=0.79,
        low=0.78,
        high=0.81,
        rehearsals=(0.85, 0.795),
    )
    assert words._target_rows(Figures()) == []
    (row,) = words._target_rows(Figures(latency_target=found))
    assert (row.slim, row.change, row.better) == ("0.790", "asked for 0.800", True)
    said = "prompt=8,decode=2,batch=1: 95 % interval 0.780 to 0.810, kernels predicted 0.770, rehearsed 0.850, 0.795"
    assert row.detail == said
    (row,) = words._target_rows(Figures(latency_target=replace(found, target=None, rehearsals=())))
    assert (row.change, row.better) == ("–", None)
    assert "rehearsed" not in row.detail
