"""What options may be, and that every refusal names the option as it is written on the command line."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dotresize_fx.errors import UsageError
from dotresize_fx.options import Options
from dotresize_fx.solvers import SOLVERS


def refusal(**options: Any) -> str:
    with pytest.raises(UsageError) as caught:
        Options(**options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_defaults_are_allowed() -> None:
    options = Options()
    assert (options.ratio, options.regions, options.method, options.seed) == (0.2, ("ffn",), "dotresize", 0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.ratio = 0.5  # type: ignore[misc]


@given(st.floats(allow_nan=True))
def test_a_ratio_is_a_share(ratio: float) -> None:
    if 0 <= ratio < 1:
        assert Options(ratio=ratio).ratio == ratio
    else:
        assert refusal(ratio=ratio) == f"--ratio is {ratio}: it is a share of the block weights, at least 0 and below 1"


@pytest.mark.parametrize("regions", [("ffn",), ("residual",), ("ffn", "residual"), ("residual", "ffn")])
def test_regions(regions: tuple[str, ...]) -> None:
    assert Options(regions=regions).regions == regions


@pytest.mark.parametrize("regions", [(), ("heads",), ("ffn", "heads"), ("ffn", "ffn"), ("residual", "ffn", "residual")])
def test_regions_that_are_none_or_named_twice(regions: tuple[str, ...]) -> None:
    assert refusal(regions=regions).startswith(f"--regions {','.join(regions)}: ")


def test_methods() -> None:
    for method in SOLVERS:
        assert Options(method=method, regions=("ffn",) if method != "pca" else ("residual",)).method == method
    assert refusal(method="magic") == f"--method magic: choose one of {', '.join(sorted(SOLVERS))}"
    assert refusal(method="pca", regions=("ffn", "residual")).endswith("use it with --regions residual")


def test_devices() -> None:
    assert [Options(device=device).device for device in ("auto", "cpu", "cuda")] == ["auto", "cpu", "cuda"]
    assert refusal(device="tpu") == "--device tpu: choose one of auto, cpu, cuda"


SMALLEST = {"multiple": 1, "calibration_tokens": 1, "evaluation_tokens": 1, "latency_length": 1}
SMALLEST |= {"sequence_length": 2, "seed": 0}


@given(st.sampled_from(sorted(SMALLEST)), st.integers(-5, 5))
def test_counts_have_a_smallest_value(name: str, value: int) -> None:
    if value >= SMALLEST[name]:
        assert getattr(Options(**{name: value}), name) == value
    else:
        option = f"--{name.replace('_', '-')}"
        assert refusal(**{name: value}) == f"{option} is {value}: it must be at least {SMALLEST[name]}"


def test_a_seed_that_torch_does_not_take() -> None:
    assert Options(seed=2**63 - 1).seed == 2**63 - 1
    assert refusal(seed=2**63).startswith("--seed is 9223372036854775808: it must be below")


def test_elimination_is_for_ffns() -> None:
    with pytest.raises(UsageError, match="--method obs eliminates neurons of FFNs"):
        Options(method="obs", regions=("residual",))
