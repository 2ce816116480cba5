"""The slim program as an ONNX file that ONNX Runtime has been seen to run to the same outputs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dotresize_fx.errors import OnnxRuntimeError, VerificationError
from dotresize_fx.export.emit_onnx import emit_onnx
from dotresize_fx.export.fused_ops import count_fused_ops
from dotresize_fx.export.onnx_runtime import compare_outputs
from dotresize_fx.export.trials import mask_name, rounding_noise, verification_cases
from dotresize_fx.report.contents import Verification

if TYPE_CHECKING:
    from dotresize_fx.slim_result import SlimResult

# Two runtimes sum in other orders in every op, which is some roundings more than one in every weight.
ROUNDINGS = 4


@dataclass(frozen=True)
class VerifiedOnnx:
    """``target`` is whose ops the file holds. ``noise``: what rounding alone may do, 0 where the tolerance held."""

    path: Path
    target: str
    verification: Verification
    noise: float
    peak_rss_bytes: int | None
    notes: tuple[str, ...]


def write_verified(result: SlimResult, folder: Path, work: Path) -> VerifiedOnnx:
    """Convert the slim program into ``folder``, fused for the options' target.

    A fused graph that does not run, or computes something else, is written once more in standard ops.

    Raises:
        VerificationError: slim ONNX and slim program differ by more than the tolerance.
        OnnxRuntimeError: ONNX Runtime does not run it.
    """
    asked = result.options.target
    notes: tuple[str, ...] = ()
    for target in dict.fromkeys((asked, "any")):
        with result.progress.stage("convert slim to ONNX"):
            path = emit_onnx(result.loaded.model, result.captured, result.slim, folder, target)
        try:
            with result.progress.stage("verify in ONNX Runtime"):
                found = _verified(result, path, target, work)
        except (OnnxRuntimeError, VerificationError) as error:
            if target == "any":
                raise
            notes = (f"--target {asked}: the ONNX holds standard ops, since fused ({error})",)
            continue
        if asked != "any" and target == asked:
            notes += (count_fused_ops(path, asked),)
        return VerifiedOnnx(path, target, *found[:3], notes + found[3])
    raise AssertionError("standard ops are tried last")


def _verified(
    result: SlimResult, path: Path, target: str, work: Path
) -> tuple[Verification, float, int | None, tuple[str, ...]]:
    found = compare_outputs(path, verification_cases(result), work, mask=mask_name(result))
    allowed = result.options.tolerance
    notes: tuple[str, ...] = ()
    if found.max_abs_difference > allowed:
        noise = rounding_noise(result)
        allowed = max(allowed, ROUNDINGS * noise)
        notes = (
            f"the slim model amplifies rounding: weights moved by their last bit move its outputs by {noise:.1e}, "
            f"so {ROUNDINGS} times that is allowed between program and ONNX",
        )
    verification = found.within(allowed)
    if not verification.passed:
        raise VerificationError(
            f"the slim ONNX differs from the slim program by {found.max_abs_difference:.2e} "
            f"(tolerance {allowed:.0e}): nothing was written; please report this model"
        )
    return verification, allowed if notes else 0.0, found.peak_rss_bytes, notes
