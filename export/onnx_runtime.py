"""ONNX Runtime in a process of its own: does the file compute what the program computes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dotresize_fx.errors import OutputError
from dotresize_fx.export.onnx_session import CPU, physical_cores, require_onnx_runtime
from dotresize_fx.export.runtime_child import RuntimeChild
from dotresize_fx.report.contents import Verification

Array = np.ndarray[Any, Any]
# Of an output that is nothing but zeros.
LEAST_SCALE = 1e-6


@dataclass(frozen=True, slots=True)
class CaseComparison:
    """One case: of each output the largest |actual - expected|, and its scale, the largest finite |expected|.

    A difference is infinite where either side holds a NaN or the shapes differ.
    """

    differences: tuple[float, ...]
    scales: tuple[float, ...]
    shapes: tuple[tuple[int, ...], ...]
    expected_shapes: tuple[tuple[int, ...], ...]

    @property
    def max_abs_difference(self) -> float:
        return max(self.differences)

    @property
    def max_abs_expected(self) -> float:
        return max(self.scales)

    @property
    def relative_differences(self) -> tuple[float, ...]:
        """Each output's, as a share of its scale where it has one."""
        return tuple(gap / scale if scale else gap for gap, scale in zip(self.differences, self.scales, strict=True))


@dataclass(frozen=True, slots=True)
class Comparison:
    """All cases (at least one), and the child's peak memory (bytes; None where the system does not tell)."""

    cases: tuple[CaseComparison, ...]
    threads: int
    provider: str
    peak_rss_bytes: int | None

    @property
    def max_abs_difference(self) -> float:
        return max(case.max_abs_difference for case in self.cases)

    @property
    def relative_differences(self) -> tuple[float, ...]:
        """Of each output the largest of all cases."""
        return tuple(map(max, zip(*(case.relative_differences for case in self.cases), strict=True)))

    @property
    def max_abs_expected(self) -> float:
        return max(case.max_abs_expected for case in self.cases)

    def within(self, tolerance: float) -> Verification:
        """What is reported of it where outputs may differ by so much."""
        return Verification(
            max_abs_difference=self.max_abs_difference,
            tolerance=tolerance,
            max_abs_output=self.max_abs_expected,
            cases=len(self.cases),
        )

    def within_shares(self, share: float) -> Verification:
        """What is reported where each output may differ by this share of its largest number of all cases: of the one
        that comes nearest to that.
        """
        columns = zip(
            *(zip(case.differences, case.scales, strict=True) for case in self.cases),
            strict=True,
        )
        outputs = [tuple(map(max, zip(*column, strict=True))) for column in columns]
        gap, scale = max(outputs, key=lambda output: output[0] / max(output[1], LEAST_SCALE))
        return Verification(
            max_abs_difference=gap,
            tolerance=share * max(scale, LEAST_SCALE),
            max_abs_output=scale,
            cases=len(self.cases),
        )


def compare_outputs(
    model_path: Path,
    cases: Iterable[tuple[Mapping[str, Array], Sequence[Array]]],
    work: Path,
    *,
    mask: str | None = None,
    threads: int | None = None,
    provider: str = CPU,
    runtime: str = "onnx",
) -> Comparison:
    """Run every case's inputs through the ONNX file and compare with its expected outputs, in graph order.

    ``mask`` names an input (batch, length): outputs that begin with these dimensions are compared where it is not
    0, since what a model puts out for padding means nothing and is not well-conditioned.
    ``runtime``: what opens the file, of RUNTIMES in :mod:`dotresize_fx.export.format_runtimes` or ONNX Runtime.
    ``cases`` may be a generator: each case is written to ``work`` before the next one is asked for. Raises
    ValueError without a case, MissingExtraError, ModelNotFoundError, BadWeightsError, OnnxRuntimeError and
    OutputError (no room for the arrays).
    """
    require_onnx_runtime()
    count = threads or physical_cores()
    with RuntimeChild(work) as child:
        listed = []
        for index, (inputs, expected) in enumerate(cases):
            listed.append({"file": f"{index}.npz", "inputs": list(inputs), "outputs": len(expected)})
            store_arrays(child.folder / f"{index}.npz", list(inputs.values()), expected)
        if not listed or not all(case["outputs"] for case in listed):
            raise ValueError("nothing to compare: no case, or a case without outputs")
        request = {"model": str(Path(model_path).resolve()), "cases": listed, "mask": mask, "runtime": runtime}
        answer = child.ask("compare", **request, threads=count, provider=provider)
    results = tuple(
        CaseComparison(
            tuple(case["differences"]),
            tuple(case["scales"]),
            tuple(tuple(shape) for shape in case["shapes"]),
            tuple(tuple(shape) for shape in case["expected_shapes"]),
        )
        for case in answer["cases"]
    )
    return Comparison(results, count, provider, answer["peak_rss_bytes"])


def store_arrays(path: Path, inputs: Sequence[Array], expected: Sequence[Array] = ()) -> None:
    """Write arrays where a child of the same folder reads them. Raises OutputError where there is no room."""
    arrays = {f"input_{index}": array for index, array in enumerate(inputs)}
    arrays |= {f"expected_{index}": array for index, array in enumerate(expected)}
    try:
        np.savez(path, allow_pickle=False, **arrays)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}; free space there") from error
