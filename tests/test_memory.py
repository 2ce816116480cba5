"""Sizes as users write them, and what there is room for."""

from __future__ import annotations

import pytest

from dotresize_fx.errors import UsageError
from dotresize_fx.memory import Memory, available_memory, read_size, show_size
from dotresize_fx.options import Options


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GiB", 4 << 30), ("512MiB", 512 << 20), ("512 mib", 512 << 20), ("2GB", 2 * 10**9), ("1.5G", 1_500_000_000)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert read_size(text) == size
    assert Options(memory_budget=text).memory_budget == size


@pytest.mark.parametrize("text", ["", "much", "4 parsecs", "-4GiB", "4GiBs", "nan", "1e9", "GiB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="say a size such as 4GiB"):
        read_size(text)


def test_a_budget_that_nothing_fits_in_is_refused() -> None:
    for size in ("0GiB", 1000, "63MiB"):
        with pytest.raises(UsageError, match="at least 64 MiB"):
            Options(memory_budget=size)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"effort": "heal"}, "--effort heal"),
        ({"regions": ("residual",)}, "--regions residual"),
        ({"dtype": "float16"}, "--dtype float16"),
        ({"checkpoint": True, "uniform": True}, "--checkpoint"),
    ],
)
def test_what_takes_all_weights_does_not_go_with_a_budget(options: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=f"--memory-budget and {said} do not go together"):
        Options(memory_budget="4GiB", **options)  # type: ignore[arg-type]
    assert not Options(**options).memory.is_short_of(1 << 60)  # type: ignore[arg-type]


def test_weights_that_fit_stay_in_memory() -> None:
    memory = Memory(1 << 30)
    assert not memory.is_short_of(100 << 20)
    assert memory.is_short_of(500 << 20)
    assert Memory().is_short_of(1 << 60)
    assert Memory(1 << 30, gpu=1 << 27).is_short_of(100 << 20)
    assert not Memory(1 << 30, gpu=1 << 30).is_short_of(100 << 20)
    assert (available_memory() or 1) > 0
    assert (show_size(3 << 29), show_size(5 << 20)) == ("1.5 GiB", "5 MiB")
