"""Options for rank and depth: what goes together, and what is refused in one line."""

from __future__ import annotations

from typing import Any

import pytest

from dotresize_fx.errors import UsageError
from dotresize_fx.options import Options


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"merge": 0}, "--merge 0: at least one block has to go"),
        ({"merge": 1, "ratio": 0.2}, "--ratio cannot be given beside it"),
        ({"merge": 1, "merge_method": "best"}, "choose one of mka, aligned, drop-last, drop-least"),
        ({"merge_method": "mka"}, "say with --merge how many"),
        ({"merge": 1, "method": "rom"}, "--merge and --method rom do not go together"),
        ({"method": "rank", "effort": "best"}, "--method rank and --effort best do not go together"),
        ({"merge": 1, "merge_method": "drop-last", "effort": "best"}, "the blocks that stay put out what they did"),
        ({"merge": 1, "formats": ("genai",)}, "--format genai is built from the checkpoint"),
        ({"method": "rom", "checkpoint": True, "uniform": True}, "--method rom and --uniform do not go together"),
        ({"method": "rank", "checkpoint": True}, "--method rank and --checkpoint do not go together"),
        ({"method": "rom", "formats": ("executorch",)}, "--method rom and --format executorch do not go together"),
        ({"method": "rom", "regions": ("ffn",)}, "--method rom and --regions ffn do not go together"),
        ({"method": "rom", "cost": "macs"}, "it is counted in weights"),
        ({"method": "rom", "profile": True}, "it changes no width"),
        ({"method": "svd"}, "choose one of"),
    ],
)
def test_what_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        Options(**given)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_defaults() -> None:
    assert Options(method="rom").ratio == 0.2
    assert Options(method="rank", ratio=0.1).kinds == ()
    merged = Options(merge=3)
    assert (merged.ratio, merged.kinds, merged.merge_method) == (None, (), None)
    assert Options().merge is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"methods": ("width", "speed")}, "--methods width,speed: choose from width, rank, depth"),
        ({"methods": ("rank", "rank")}, "--methods rank,rank: names one twice"),
        ({"methods": ("rank", "depth"), "merge": 1}, "--methods rank,depth and --merge do not go together"),
        ({"methods": ("rank",), "method": "rom"}, "--methods rank and --method rom do not go together"),
        ({"methods": ("rank",), "regions": ("ffn",)}, "it changes no width"),
        ({"methods": ("width",), "regions": ("residual",)}, "the residual stream is one width for all blocks"),
        ({"methods": ("width", "depth"), "effort": "best"}, "is not repaired or healed yet"),
        ({"methods": ("width", "depth"), "uniform": True}, "its plan has one size for each place"),
    ],
)
def test_what_does_not_go_with_a_mixed_plan(given: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError) as error:
        Options(**given)  # type: ignore[arg-type]
    assert said in str(error.value)


def test_without_widths_no_kind_is_cut() -> None:
    assert Options(methods=("rank", "depth")).kinds == ()
    assert Options(methods=("width", "depth")).kinds == Options().kinds


def test_what_goes_together() -> None:
    assert Options(merge=1, checkpoint=True, formats=("genai", "pt2"), effort="heal").checkpoint
    assert Options(method="rank", effort="heal", formats=("openvino",)).effort == "heal"
