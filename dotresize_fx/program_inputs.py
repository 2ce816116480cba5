"""What a program reads, and whether a batch of arrays is that: one clear line where it is not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from dotresize_fx.errors import CalibrationError

Inputs = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class InputSpec:
    """One input: ``sizes`` are numbers where fixed and names where free; inputs that share a name share the size.

    ``below`` is what its integers must stay under, the rows of the table that they look up.
    """

    name: str
    dtype: torch.dtype
    sizes: tuple[int | str, ...]
    below: int | None = None

    def __str__(self) -> str:
        shape = ", ".join(str(size) for size in self.sizes)
        return f"{self.name} {str(self.dtype).removeprefix('torch.')} ({shape})"


@dataclass(frozen=True)
class ProgramInputs:
    """All inputs of a program, in its order.

    ``batch`` names those whose first axis is samples, each of which has its own answer; where that is not so (no input
    has such an axis, or samples act on each other) it is empty, and a batch is kept whole. ``batch_size`` is how many
    samples a batch must have, None for any. ``largest`` bounds free sizes by their names.
    """

    specs: tuple[InputSpec, ...]
    batch: frozenset[str] = frozenset()
    batch_size: int | None = None
    largest: Mapping[str, int] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(spec.name for spec in self.specs)

    def described(self) -> str:
        """All in one line."""
        return ", ".join(str(spec) for spec in self.specs)

    def samples(self, batch: Inputs) -> int:
        """How many samples a batch has; 1 where it is kept whole."""
        return next((len(batch[name]) for name in self.names if name in self.batch), 1)

    def part(self, batch: Inputs, start: int, stop: int) -> dict[str, torch.Tensor]:
        """Samples ``start`` to ``stop`` of a batch; what belongs to no sample goes with all."""
        return {name: value[start:stop] if name in self.batch else value for name, value in batch.items()}

    def checked(self, given: Mapping[str, Any], where: str) -> dict[str, torch.Tensor]:
        """``given``, tensors or arrays by name, as a batch of the program on the CPU, in its order.

        A batch may hold any number of samples here; how many a run takes is for the caller to keep to.

        Raises:
            CalibrationError: an input is missing, unknown, of another dtype or shape, holds NaN or an id that the
                program's table lacks, or inputs do not fit each other. ``where`` names the batch.
        """
        if missing := [name for name in self.names if name not in given]:
            raise CalibrationError(f"{where}: lacks {', '.join(missing)}: the program reads {self.described()}")
        if unknown := [str(name) for name in given if name not in self.names]:
            raise CalibrationError(f"{where}: holds {', '.join(unknown)}: the program reads {self.described()} alone")
        batch = {spec.name: _tensor(given[spec.name], f"{where}: {spec.name}") for spec in self.specs}
        sizes: dict[str, tuple[int, str]] = {}
        for spec in self.specs:
            self._check(spec, batch[spec.name], where, sizes)
        return batch

    def _check(self, spec: InputSpec, value: torch.Tensor, where: str, sizes: dict[str, tuple[int, str]]) -> None:
        found = f"{where}: {spec.name}"
        if value.dtype != spec.dtype:
            names = [str(dtype).removeprefix("torch.") for dtype in (value.dtype, spec.dtype)]
            raise CalibrationError(f"{found} is {names[0]}, the program reads {names[1]}: convert it")
        if value.ndim != len(spec.sizes):
            raise CalibrationError(f"{found} has shape {tuple(value.shape)}, the program reads {spec}")
        if not value.numel():
            raise CalibrationError(f"{found} is empty: it has shape {tuple(value.shape)}")
        for axis, (size, wanted) in enumerate(zip(value.shape, spec.sizes, strict=True)):
            if axis == 0 and spec.name in self.batch and isinstance(wanted, int):
                continue  # a batch of another size is cut to what a run takes
            if isinstance(wanted, int) and size != wanted:
                raise CalibrationError(f"{found} has shape {tuple(value.shape)}, the program reads {spec}")
            if isinstance(wanted, str):
                if size > self.largest.get(wanted, size):
                    raise CalibrationError(
                        f"{found} has shape {tuple(value.shape)}, the program takes at most {self.largest[wanted]} "
                        f"along axis {axis}"
                    )
                other, name = sizes.setdefault(wanted, (size, spec.name))
                if size != other:
                    raise CalibrationError(
                        f"{found} has shape {tuple(value.shape)}, which does not fit {name}: axis {axis} must be "
                        f"{other}"
                    )
        if spec.name in self.batch:
            count, name = sizes.setdefault("", (len(value), spec.name))
            if len(value) != count:
                raise CalibrationError(f"{found} has {len(value)} samples, {name} has {count}")
        if value.is_floating_point() and value.isnan().any():
            raise CalibrationError(f"{found} holds NaN")
        if spec.below is not None and not (int(value.min()) >= 0 and int(value.max()) < spec.below):
            raise CalibrationError(
                f"{found} holds {int(value.min())} to {int(value.max())}: ids are 0 to {spec.below - 1}"
            )


def _tensor(value: Any, found: str) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu")
    try:
        return torch.from_numpy(np.array(value))
    except (TypeError, ValueError) as error:
        raise CalibrationError(f"{found} is no array of numbers ({type(value).__name__})") from error
