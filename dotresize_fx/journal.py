"""What a run has finished, in files: a later run of the same export goes on from there."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from dotresize_fx.calibration import CalibrationData
from dotresize_fx.errors import BadWeightsError
from dotresize_fx.offload.lazy_tensor import LazyTensor
from dotresize_fx.offload.stored_tensors import file_crc32, lazy_tensors, write_tensors
from dotresize_fx.options import Options
from dotresize_fx.region_map import RegionMap, pair_selection, selection
from dotresize_fx.regions import Region, counted
from dotresize_fx.sweep import SweptRegion
from dotresize_fx.width_plan import WidthPlan

FOLDER = "journal"
_WHOSE, _PLAN = "export.json", "plan.json"
_SWEPT, _MAPS, _CRC = "swept", "maps", "crc32"


@dataclass(frozen=True)
class FinishedSublayer:
    """What was swept, in order; by region the shape of the map that went in; every parameter that changed, by name."""

    swept: tuple[SweptRegion, ...]
    maps: Mapping[str, Mapping[str, Any]]
    parameters: Mapping[str, LazyTensor]


class Journal:
    """In ``folder``. ``export`` says of what it is, as JSON: what another one left there is not taken up, which
    ``other`` says in words, and goes once there is something to write. ``damaged`` counts sublayers that were finished
    and are no more as they were written.

    Every file appears whole: a process may be killed at any moment. A sublayer is finished once its numbers have what
    was swept beside them.
    """

    def __init__(self, folder: Path, export: Mapping[str, Any]) -> None:
        self.folder, self.other, self.damaged = folder, "", 0
        self._export = json.loads(json.dumps(export))
        before = _read_checked(folder / _WHOSE)
        self._begun = before == self._export
        if self._begun:
            os.utime(folder / _WHOSE)  # see taken_up
        elif count := count_finished(folder):
            why = "which export it was is damaged"
            if before is not None:
                why = f"another export: {', '.join(_differences(before, self._export))}"
            self.other = f"{counted(count, 'finished sublayer')} of an earlier run ({why})"

    def _begin(self) -> None:
        if not self._begun:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            _write_checked(self.folder / _WHOSE, self._export)
            self._begun = True

    @property
    def finished(self) -> int:
        """How many sublayers."""
        return count_finished(self.folder) if self._begun else 0

    def plan(self) -> tuple[WidthPlan, tuple[str, ...]] | None:
        """The width plan and the notes on it, if there are any yet."""
        found = _read_checked(self.folder / _PLAN) if self._begun else None
        if found is None:
            return None
        return WidthPlan(found["widths"], found["losses"]), tuple(found["notes"])

    def write_plan(self, plan: WidthPlan, notes: Sequence[str]) -> None:
        self._begin()
        told = {"widths": dict(plan.widths), "losses": dict(plan.losses), "notes": list(notes)}
        _write_checked(self.folder / _PLAN, told)

    def sublayer(self, number: int, regions: Sequence[Region]) -> FinishedSublayer | None:
        """That of this number, if it is finished; what was damaged since then goes (the power failed, say)."""
        file, row = self._file(number), self._row(number)
        if not self._begun or not row.exists():
            return None
        try:
            told = _read_checked(row, file_crc32(file))
            if told is None:
                raise ValueError(f"{file} is not as it was written")
            parameters = lazy_tensors(file, checked=False)
        except (OSError, ValueError, BadWeightsError):
            row.unlink(missing_ok=True)
            file.unlink(missing_ok=True)
            self.damaged += 1
            return None
        named = {region.name: region for region in regions}
        swept = tuple(
            SweptRegion(named[name], width, method, error, notes) for name, width, method, error, notes in told[_SWEPT]
        )
        return FinishedSublayer(swept, told[_MAPS], parameters)

    def write_sublayer(
        self,
        number: int,
        swept: Sequence[SweptRegion],
        maps: Mapping[str, Mapping[str, Any]],
        parameters: Mapping[str, torch.Tensor],
    ) -> Mapping[str, LazyTensor]:
        """Returns the parameters as they stand in the file now."""
        rows = [[s.region.name, s.width, s.method, s.error, dict(s.notes)] for s in swept]
        self._begin()
        partial, file = self.folder / "partial", self._file(number)
        try:
            crc = write_tensors(partial, parameters)
            partial.replace(file)
            _write_checked(self._row(number), {_SWEPT: rows, _MAPS: maps}, crc)
        except BaseException:  # a full disk, which has better use for the room, or a signal
            drop_half_written(self.folder)
            raise
        return lazy_tensors(file, checked=False)

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:05}.safetensors"

    def _row(self, number: int) -> Path:
        return self._file(number).with_suffix(".json")


def _crc(told: Mapping[str, Any], before: int = 0) -> int:
    """Of what is told, behind numbers whose CRC-32 is ``before``."""
    return zlib.crc32(json.dumps(told).encode(), before)


def drop_half_written(folder: Path) -> None:
    """Of a journal's folder: parts of files, and numbers without what was swept."""
    for part in folder.glob("*partial"):
        part.unlink(missing_ok=True)
    for numbers in folder.glob("*.safetensors"):
        if not numbers.with_suffix(".json").exists():
            numbers.unlink(missing_ok=True)


def taken_up(folder: Path) -> int:
    """A number that changes when a run takes up the journal in this folder, or makes one there."""
    try:
        return (folder / _WHOSE).stat().st_mtime_ns
    except OSError:
        return 0


def count_finished(folder: Path) -> int:
    """How many sublayers a journal's folder has, 0 where there is none."""
    return sum(1 for _ in folder.glob("[0-9]*.json"))


# What a run may take, or writes beside the model, decides on no number.
_ASIDE = ("memory_budget", "formats", "quantize", "latency_length", "tolerance", "plan", "compute_dtype")


def export_of(
    options: Options,
    sha256: Mapping[str, str],
    data: CalibrationData,
    plan: WidthPlan | None,
    device: str,
    *,
    half: bool,
) -> dict[str, Any]:
    """What decides on every number that a run computes: two runs of which all of it is the same give the same bytes.

    ``sha256`` are those of the model's files, ``plan`` what the options' plan says. ``half``: products are bfloat16's.
    """
    given = hashlib.sha256()
    for batch in data.calibration:
        for name, value in batch.items():
            given.update(name.encode() + value.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return {
        "versions": [version("dotresize-fx"), torch.__version__],
        "options": {name: str(value) for name, value in vars(options).items() if name not in _ASIDE},
        "plan": None if plan is None else dict(plan.widths),
        "half": half,
        "model": dict(sha256),
        "calibration text": given.hexdigest(),
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{device}, {torch.get_num_threads()} threads",
    }


def _differences(before: Mapping[str, Any], told: Mapping[str, Any]) -> Iterator[str]:
    """What differs, options by their names on the command line."""
    for name in dict.fromkeys([*told, *before]):
        one, other = before.get(name), told.get(name)
        if name == "options" and one and other:
            keys = [key for key in dict.fromkeys([*other, *one]) if one.get(key) != other.get(key)]
            yield from (f"--{'no-' * (key == 'cache')}{key.replace('_', '-')}" for key in keys)
        elif one != other:
            yield name


def map_shape(found: RegionMap) -> dict[str, Any]:
    """What of a map decides on the ops that it makes: what it holds, in which shape, and the rotary pairs."""
    matrices = {name: getattr(found, name) for name in ("down", "up", "branch_down", "key_down")}
    return {
        "matrices": {name: list(matrix.shape) for name, matrix in matrices.items() if matrix is not None},
        "pairs": None if found.pairs is None else found.pairs.tolist(),
        "weights": {name: list(weight.shape) for name, weight in found.reader_weights.items()},
        "biases": {name: list(bias.shape) for name, bias in found.reader_biases.items()},
    }


def of_shape(told: Mapping[str, Any], device: torch.device) -> RegionMap:
    """A map that makes the same ops; the parameters that it makes are for others to replace."""

    def matrix(shape: Sequence[int]) -> torch.Tensor:
        narrow, wide = sorted(shape[-2:])
        chosen = selection(torch.arange(narrow, device=device), wide)
        if told["pairs"] is not None:
            chosen = pair_selection(torch.tensor(told["pairs"], device=device), wide).down
        return (chosen if shape[-2] == wide else chosen.T).expand(*shape).contiguous()

    def zeros(shapes: Mapping[str, Sequence[int]]) -> dict[str, torch.Tensor]:
        return {name: torch.zeros(*shape, dtype=torch.float64, device=device) for name, shape in shapes.items()}

    matrices = {name: matrix(shape) for name, shape in told["matrices"].items()}
    return RegionMap(
        matrices["down"],
        matrices.get("up"),
        matrices.get("branch_down"),
        matrices.get("key_down"),
        pairs=None if told["pairs"] is None else torch.tensor(told["pairs"], device=device),
        reader_weights=zeros(told["weights"]),
        reader_biases=zeros(told["biases"]),
    )


def _read_checked(file: Path, before: int = 0) -> dict[str, Any] | None:
    """What was written there, behind numbers whose CRC-32 is ``before``; None if it is not as it was."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.pop(_CRC, None) == _crc(found, before) else None


def _write_checked(file: Path, told: Mapping[str, Any], before: int = 0) -> None:
    text = json.dumps({**told, _CRC: _crc(told, before)})
    (partial := file.with_suffix(".partial")).write_text(text, encoding="utf-8")
    partial.replace(file)
