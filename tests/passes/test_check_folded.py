"""What a region's ends are once a map was folded, taken from the map alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dotresize_fx.errors import VerificationError
from dotresize_fx.passes.check_folded import check_folded, mapped_ends
from dotresize_fx.passes.cut_stream import apply_map
from dotresize_fx.passes.find_regions import find_regions
from dotresize_fx.region_map import random_admissible_map

KINDS = ("ffn", "value", "query_key", "kv_heads")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_map_folds_into_what_it_says(tiny_graph: Callable[[str], tuple[Any, Any]], kind: str) -> None:
    graph = tiny_graph("llama")[1]
    region = next(find_regions(graph).of_kind(kind))
    found = random_admissible_map(region, torch.Generator().manual_seed(0))
    ends = mapped_ends(graph, region, found)
    assert set(ends) == {*region.writers, *region.readers}
    apply_map(graph, region, found, check=True)
    check_folded(graph, region, ends)
    op = graph.op(region.writers[0])
    graph.set_weight(op, graph.weight(op) * 1.0001)
    with pytest.raises(VerificationError, match="was not folded into what was solved for"):
        check_folded(graph, region, ends)


def test_of_rows_that_were_left_out_nothing_agrees(tiny_graph: Callable[[str], tuple[Any, Any]]) -> None:
    graph = tiny_graph("llama")[1]
    region = next(find_regions(graph).of_kind("ffn"))
    found = random_admissible_map(region, torch.Generator().manual_seed(0))
    ends = mapped_ends(graph, region, found)
    with pytest.raises(VerificationError):
        check_folded(graph, region, {name: (weight[:, :-1], bias) for name, (weight, bias) in ends.items()})
