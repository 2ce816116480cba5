"""Options as a user would type them, in the page and in the JSON."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from dotresize_fx.options import Options
from dotresize_fx.report.given_options import given_options, typed_options


def test_what_says_nothing_is_left_out_and_the_rest_is_readable() -> None:
    texts = (Path("a.txt"), Path("b.jsonl"))
    options = asdict(Options(ratio=0.2, regions=("ffn", "value"), calibration=texts))
    given = given_options(options)
    assert given["regions"] == ["ffn", "value"]
    assert given["calibration"] == ["a.txt", "b.jsonl"]
    assert (given["ratio"], given["cache"], given["seed"]) == (0.2, True, 0)
    assert not {"plan", "heal_steps", "multiple", "calibration_data", "heal_checkpoint"} & given.keys()
    typed = typed_options(options)
    assert typed["regions"] == "ffn,value"
    assert typed["calibration"] == "a.txt,b.jsonl"
    assert (typed["ratio"], typed["heal-minutes"], typed["cache"], typed["checkpoint"]) == ("0.2", "5", "yes", "no")
    assert not [name for name, words in typed.items() if "_" in name or "Path" in words or words in ("None", "", "()")]


def test_a_plan_settles_what_is_not_given() -> None:
    given = given_options(asdict(Options(plan=Path("plan.json"))))
    assert given["plan"] == "plan.json"
    assert not {"ratio", "regions", "allocation", "cost", "uniform"} & given.keys()
