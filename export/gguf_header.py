"""The header of a GGUF file: parsed once while a model is loaded, though each step of that asks for it anew."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt


class _PlainReader(gguf.GGUFReader):  # type: ignore[misc]
    """Over the same mapped memory as a plain array: a view of numpy's memmap, of which a vocabulary takes a million,
    costs several times as much.
    """

    @property
    def data(self) -> npt.NDArray[Any]:
        return self._plain

    @data.setter
    def data(self, mapped: npt.NDArray[Any]) -> None:
        self._plain = np.asarray(mapped)


@contextmanager
def parsed_once() -> Iterator[None]:
    """Inside, ``gguf`` gives what it made of a file or of a kind of model once more; nobody may write into it."""
    read = functools.cache(_PlainReader)
    once: dict[str, Callable[..., Any]] = {
        "GGUFReader": lambda path, mode="r": read(os.path.realpath(path), mode),
        "get_tensor_name_map": functools.cache(gguf.get_tensor_name_map),
    }
    before = {name: getattr(gguf, name) for name in once}
    try:
        for name, made in once.items():
            setattr(gguf, name, made)
        yield
    finally:
        for name, made in before.items():
            setattr(gguf, name, made)
