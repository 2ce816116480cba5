"""What options may be, and that every refusal names the option as it is written on the command line."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dotresize_fx.cost import COSTS
from dotresize_fx.errors import UsageError
from dotresize_fx.options import (
    ALLOCATIONS,
    CALIBRATION_TOKENS,
    EFFORTS,
    HEAD_SIZES,
    PLANNED,
    REGION_NAMES,
    REPAIR_STEPS,
    SELF_TOKENS,
    Options,
)
from dotresize_fx.regions import ATTENTION_KINDS, RegionKind
from dotresize_fx.solvers import METHODS
from dotresize_fx.structure_options import RANK_METHODS


def refusal(**options: Any) -> str:
    with pytest.raises(UsageError) as caught:
        Options(**options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_defaults_are_allowed() -> None:
    options = Options()
    assert (options.ratio, options.regions, options.method, options.seed) == (0.2, (), "auto", 0)
    assert (options.effort, options.allocation, options.plan) == ("fast", "measured", None)
    assert options.basis == "shared"
    assert (options.cost, options.head_sizes, options.multiple) == ("weights", "free", None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.ratio = 0.5  # type: ignore[misc]


@given(st.floats(allow_nan=True))
def test_a_ratio_is_a_share(ratio: float) -> None:
    if 0 <= ratio < 1:
        assert Options(ratio=ratio).ratio == ratio
    else:
        assert refusal(ratio=ratio) == f"--ratio is {ratio}: it is a share, at least 0 and below 1"


FFNS = (RegionKind.FFN, RegionKind.EXPERTS)


@pytest.mark.parametrize("regions", [("ffn",), ("residual",), ("ffn", "residual"), ("residual", "ffn")])
def test_regions(regions: tuple[str, ...]) -> None:
    options = Options(regions=regions)
    assert options.regions == regions
    found = {"ffn": FFNS, "residual": (RegionKind.RESIDUAL,)}
    assert options.kinds == tuple(kind for name in regions for kind in found[name])


def test_every_kind_of_a_head_can_be_asked_for_alone() -> None:
    assert Options(regions=("attention",)).kinds == ATTENTION_KINDS
    for kind in ATTENTION_KINDS:
        assert Options(regions=(kind.value,)).kinds == (kind,)


@pytest.mark.parametrize(
    "regions", [("heads",), ("plain",), ("ffn", "heads"), ("ffn", "ffn"), ("residual", "ffn", "residual")]
)
def test_regions_that_are_none_or_named_twice(regions: tuple[str, ...]) -> None:
    assert refusal(regions=regions).startswith(f"--regions {','.join(regions)}: ")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", REGION_NAMES)
def test_a_method_and_the_regions_it_cuts(method: str, name: str) -> None:
    cut = [kind for kind in REGION_NAMES[name] if kind in METHODS[method]]
    if cut:
        assert Options(method=method, regions=(name,)).kinds == tuple(cut)
    else:
        said = refusal(method=method, regions=(name,))
        assert said.startswith(f"--method {method} does not cut {name}: choose --regions from ")
        for offered in said.partition("--regions from ")[2].split(", "):
            assert Options(method=method, regions=(offered,)).kinds


def test_without_regions_a_method_cuts_what_it_can_of_the_default() -> None:
    assert Options().kinds == Options(method="obs").kinds == (*FFNS, *ATTENTION_KINDS)
    assert Options(method="magnitude").kinds == FFNS
    assert refusal(method="pca").endswith("does not cut what is cut by default: choose --regions from residual")


def test_one_region_that_a_method_does_not_cut_is_enough_to_refuse() -> None:
    assert "does not cut ffn:" in refusal(method="pca", regions=("ffn", "residual"))
    assert "does not cut attention or kv_heads:" in refusal(method="magnitude", regions=("attention", "kv_heads"))


def test_methods_that_are_none() -> None:
    assert refusal(method="magic") == f"--method magic: choose one of {', '.join(sorted((*METHODS, *RANK_METHODS)))}"


def test_efforts_and_allocations() -> None:
    assert [Options(effort=effort).effort for effort in EFFORTS] == ["fast", "best", "heal"]
    assert [Options(allocation=name).allocation for name in ALLOCATIONS] == ["measured", "uniform"]
    assert refusal(effort="utmost") == "--effort utmost: choose one of best, fast, heal"
    assert refusal(allocation="even") == "--allocation even: choose one of measured, uniform"


def test_costs_and_head_sizes() -> None:
    assert [Options(cost=cost).cost for cost in COSTS] == ["weights", "macs"]
    assert [Options(head_sizes=sizes).head_sizes for sizes in HEAD_SIZES] == ["free", "equal"]
    assert refusal(cost="watts") == "--cost watts: choose one of macs, weights"
    assert refusal(basis="each") == "--basis each: choose one of shared, sublayer"
    assert refusal(head_sizes="odd") == "--head-sizes odd: choose one of equal, free"


def test_head_sizes_of_cuda_are_equal_where_both_are_cut() -> None:
    assert Options(target="cuda").head_sizes == "equal"
    assert Options(target="cuda", head_sizes="free").head_sizes == "free"
    assert Options(target="cuda", regions=("ffn",)).head_sizes == "free"
    assert Options(target="cuda", regions=("value",)).head_sizes == "free"


def test_equal_head_sizes_need_both_widths_of_a_head() -> None:
    for regions in ((), ("attention",), ("value", "query_key"), ("kv_heads",), ("ffn", "residual")):
        assert Options(head_sizes="equal", regions=regions).regions == regions
    assert refusal(head_sizes="equal", regions=("value", "kv_heads")) == (
        "--regions value,kv_heads: --head-sizes equal cuts query_key and value together: name both"
    )
    assert "name both" in refusal(head_sizes="equal", regions=("query_key",))


# What a plan settles, each as a user may say it: also where that is the default.
SAID = {"ratio": 0.2, "regions": ("ffn",), "allocation": "measured", "cost": "weights", "head_sizes": "free"}
SAID |= {"uniform": True, "multiple": 16}


@pytest.mark.parametrize("name", SAID)
def test_what_a_plan_settles_cannot_be_given_beside_it(name: str) -> None:
    assert PLANNED.keys() == SAID.keys()
    option = f"--{name.replace('_', '-')}"
    said = f"--plan says all widths, so {option} cannot be given beside it: leave out one of the two"
    assert refusal(plan=Path("plan.json"), **{name: SAID[name]}) == said


def test_a_checkpoint_has_one_width_for_all_layers() -> None:
    assert refusal(checkpoint=True).endswith("one width for all layers: say --uniform too")
    assert Options(checkpoint=True, uniform=True).uniform
    assert Options(checkpoint=True, regions=("residual",)).uniform is False
    assert Options(checkpoint=True, plan=Path("plan.json")).checkpoint


def test_a_ratio_of_zero_is_one_that_was_given() -> None:
    assert "so --ratio, --multiple cannot" in refusal(plan=Path("plan.json"), ratio=0.0, multiple=1)


@pytest.mark.parametrize("method", METHODS)
def test_with_a_plan_nothing_else_decides_the_widths(method: str) -> None:
    options = Options(plan=Path("plan.json"), method=method)
    assert {name: getattr(options, name) for name in PLANNED} == {**dict.fromkeys(PLANNED), "regions": ()}
    assert options.kinds == tuple(METHODS[method])


@given(st.floats(allow_nan=True))
def test_healing_takes_some_time(minutes: float) -> None:
    if 0 < minutes < float("inf"):
        assert Options(heal_minutes=minutes).heal_minutes == minutes
    else:
        assert refusal(heal_minutes=minutes) == f"--heal-minutes is {minutes}: it must be above 0"


def test_text_that_the_model_writes_itself() -> None:
    healing = Options(effort="heal")
    assert (healing.own_tokens("decoder", "cuda"), healing.own_tokens("decoder", "cpu")) == (SELF_TOKENS, 0)
    assert Options(effort="heal", self_tokens=99).own_tokens("decoder", "cpu") == 99
    assert healing.own_tokens("encoder", "cuda") == 0
    assert Options(effort="best", self_tokens=99).own_tokens("decoder", "cuda") == 0


@pytest.mark.parametrize("task", ["decoder", "encoder"])
def test_how_much_calibrates_and_repairs_depends_on_the_task_unless_it_is_said(task: str) -> None:
    usual, said = Options(), Options(calibration_tokens=7, repair_steps=8)
    assert usual.tokens_that_calibrate(task) == CALIBRATION_TOKENS[task]
    assert usual.steps_that_repair(task) == REPAIR_STEPS[task]
    assert (said.tokens_that_calibrate(task), said.steps_that_repair(task)) == (7, 8)


def test_devices() -> None:
    assert [Options(device=device).device for device in ("auto", "cpu", "cuda")] == ["auto", "cpu", "cuda"]
    assert refusal(device="tpu") == "--device tpu: choose one of auto, cpu, cuda"


SMALLEST = {"multiple": 1, "calibration_tokens": 1, "evaluation_tokens": 1, "latency_length": 1}
SMALLEST |= {"sequence_length": 2, "seed": 0, "repair_steps": 1, "self_tokens": 0}


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


def test_a_target_that_is_not_known() -> None:
    with pytest.raises(UsageError, match="--target gpu: choose one of any, cpu, cuda"):
        Options(target="gpu")


def test_formats_are_known_and_genai_has_what_it_is_built_from() -> None:
    assert refusal(formats=("pt2", "tflite")) == "--format tflite: choose from onnx, pt2, openvino, executorch, genai"
    assert "--checkpoint" in refusal(formats=("genai",))
    assert Options(formats=("onnx", "pt2", "openvino", "executorch")).formats[1] == "pt2"


@pytest.mark.parametrize("target", [0.0, 1.0, -0.5, 1.2, float("nan")])
def test_a_target_latency_is_a_share(target: float) -> None:
    said = refusal(target_latency=target)
    assert said == f"--target-latency is {target}: it is a share of the dense latency, above 0 and below 1"


@pytest.mark.parametrize(
    ("given", "other"),
    [
        ({"ratio": 0.2}, "--ratio"),
        ({"cost": "macs"}, "--cost"),
        ({"allocation": "uniform"}, "--allocation uniform"),
        ({"dtype": "float16"}, "--dtype float16"),
        ({"quantize": "int8"}, "--quantize int8"),
        ({"regions": ("ffn", "residual")}, "--regions residual"),
        ({"plan": Path("plan.json")}, "--plan"),
    ],
)
def test_what_does_not_go_with_a_target_latency(given: dict[str, Any], other: str) -> None:
    said = refusal(target_latency=0.8, **given)
    assert said.startswith("--target-latency")
    assert other in said


def test_half_precision_is_timed_on_a_gpu() -> None:
    assert Options(target_latency=0.8, dtype="float16", target="cuda").by_the_clock


def test_a_target_latency_stands_for_the_ratio() -> None:
    options = Options(target_latency=0.8, workload="prompt=512")
    assert options.ratio is None
    assert options.by_the_clock
    assert str(options.timed_workload) == "prompt=512,decode=64,batch=1"
    again = dataclasses.replace(options, repair_steps=3)
    assert (again.ratio, again.target_latency) == (None, 0.8)


def test_a_workload_is_of_the_clock_alone() -> None:
    assert "only --target-latency and --profile run one" in refusal(workload="prompt=128")
    assert "must be at least 1" in refusal(profile=True, workload="prompt=0")
    options = Options(profile=True)
    assert (options.ratio, options.by_the_clock) == (0.2, True)


@pytest.mark.parametrize(
    ("given", "step"),
    [({}, 1), ({"target": "cpu"}, 1), ({"target": "cuda"}, 4), ({"dtype": "float16"}, 8), ({"dtype": "bfloat16"}, 8)],
)
def test_the_grid_of_a_gpu_is_rows_of_16_bytes(given: dict[str, Any], step: int) -> None:
    assert Options(**given).finest_step == step
