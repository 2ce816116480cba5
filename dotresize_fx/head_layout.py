"""Where the ops between an attention and its linears state the sizes of heads."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HeadLayout:
    """What has to follow when a region of an attention gets another size.

    ``sizes`` are (op name, axis) of views and expands whose stated size there is a multiple of the region's width;
    it scales with it. ``lower_halves`` and ``upper_halves`` are the slices with which a rotary embedding takes a
    head's halves. ``tables`` are its cosines and sines, (value name, names of this attention's ops that read it),
    with the head's size as last dimension. ``cache`` are the outputs of the graph that change with it: keys or
    values for a cache.
    """

    sizes: tuple[tuple[str, int], ...] = ()
    lower_halves: tuple[str, ...] = ()
    upper_halves: tuple[str, ...] = ()
    tables: tuple[tuple[str, tuple[str, ...]], ...] = ()
    cache: tuple[str, ...] = ()
