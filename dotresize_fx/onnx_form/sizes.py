"""Sizes of axes, by number or by name, and what they come to."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

import onnx_ir as ir

Size = int | str
Sizes = tuple[Size, ...]
_PRODUCT = re.compile(r"[^\s()*]+(\*[^\s()*]+)+")


def sizes_of(value: ir.Value | None) -> Sizes | None:
    """A value's shape, unnamed sizes named after it."""
    if value is None or value.shape is None:
        return None
    return tuple(
        size if isinstance(size, int) else size.value or f"{value.name}[{i}]" for i, size in enumerate(value.shape)
    )


def set_sizes(value: ir.Value, sizes: Sizes) -> None:
    """Give a value another shape, where it has that."""
    if sizes_of(value) != sizes:
        value.shape = ir.Shape(list(sizes))


def quotient(source: Sequence[Size], others: Sequence[Size]) -> Size:
    """The size that with ``others`` makes as many numbers as ``source``; a name where it is not known."""
    whole_source = [factor for size in source for factor in _factors(size)]
    whole_others = [factor for size in others for factor in _factors(size)]
    names = Counter(size for size in whole_source if isinstance(size, str))
    names.subtract(size for size in whole_others if isinstance(size, str))
    above = math.prod(size for size in whole_source if isinstance(size, int))
    below = math.prod(size for size in whole_others if isinstance(size, int))
    left = sorted(names.elements())
    if any(count < 0 for count in names.values()) or not below or above % below:
        return f"({'*'.join(map(str, source))})/({'*'.join(map(str, others))})"
    whole = above // below
    if not left:
        return whole
    return "*".join(left if whole == 1 else [*left, str(whole)])


def _factors(size: Size) -> list[Size]:
    """What a product's name is made of; any other name, or a number, is its only factor."""
    if isinstance(size, int) or not _PRODUCT.fullmatch(size):
        return [size]
    return [int(factor) if factor.isdigit() else factor for factor in size.split("*")]


def total(sizes: Iterable[Size]) -> Size:
    """Their sum."""
    given = tuple(sizes)
    names = sorted(name for size in given if isinstance(size, str) for name in size.split(" + "))
    number = sum(size for size in given if isinstance(size, int))
    return " + ".join([*names, *([str(number)] if number else [])]) if names else number


def broadcast(*shapes: Sizes) -> Sizes:
    """The shape that these are broadcast to; of two names the first one's, as a mask is broadcast to scores."""
    rank = max(map(len, shapes))
    found: list[Size] = []
    for place in range(-rank, 0):
        sizes = [shape[place] for shape in shapes if len(shape) >= -place]
        numbers = [size for size in sizes if isinstance(size, int) and size != 1]
        names = [size for size in sizes if isinstance(size, str)]
        found.append(numbers[0] if numbers else names[0] if names else 1)
    return tuple(found)
