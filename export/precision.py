"""model.onnx in another precision than float32: written, compared and measured, with the dense model's beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from dotresize_fx.errors import VerificationError
from dotresize_fx.export.cached_runs import onnx_inputs
from dotresize_fx.export.convert_dtype import HALF, convert_dtype
from dotresize_fx.export.onnx_file import onnx_size
from dotresize_fx.export.onnx_runtime import compare_outputs
from dotresize_fx.export.onnx_session import CPU, CUDA, OnnxModel, has_provider, require_provider
from dotresize_fx.export.quantize import Quantised, quantize
from dotresize_fx.export.trials import half_noise, ids_name, mask_name, measure_fidelity
from dotresize_fx.fidelity import Inputs, compare_decoders
from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.options import Options
from dotresize_fx.report.contents import Latency, PrecisionFigures, Verification
from dotresize_fx.task import predicts_tokens

if TYPE_CHECKING:
    from dotresize_fx.slim_result import SlimResult

Side = Literal["dense", "slim"]
Cases = Iterable[tuple[Mapping[str, Any], Any]]
# Of an output's largest number. bfloat16 rounds 8 times as coarsely, and what is delicate is float32 in both.
TOLERANCES = {"float16": 5e-3, "bfloat16": 4e-2}
# Keys and values are read before anything evens them out: they may be so many times as far off.
CACHED = 3
# Two ways of rounding the same differ by as much as either does from exact numbers, and as much again.
TIMES_NOISE = 2


def provider_of(options: Options) -> str:
    """Where files are timed, and those of half precision run: ONNX Runtime has hardly any op for bfloat16 on a CPU."""
    cuda = options.dtype == "bfloat16" or (options.target == "cuda" and has_provider(CUDA))
    return CUDA if cuda else CPU


def require_runtime(options: Options) -> None:
    """Raise MissingExtraError unless ONNX Runtime can run what the options ask for. Imports it only for CUDA."""
    if options.dtype == "bfloat16":
        require_provider(CUDA, "--dtype bfloat16 needs ONNX Runtime for CUDA, since on a CPU it computes none: ")


class Precision:
    """The dtype or the quantised weights that the options of ``result`` name; the slim model goes into ``folder``."""

    def __init__(self, result: SlimResult, name: str, folder: Path, work: Path) -> None:
        self.result, self.name, self.work = result, name, work
        self.provider = provider_of(result.options)
        dense = work / name
        dense.mkdir(exist_ok=True)
        self._folders: dict[Side, Path] = {"dense": dense, "slim": folder}
        self._written: dict[Side, Quantised | Path] = {}
        self._verified: Verification | None = None
        self._exact_stream = False
        self._said: tuple[str, ...] = ()

    @property
    def paths(self) -> dict[str, Path]:
        """What has been written, by the names that ``figures`` knows it by."""
        return {f"{side} {self.name}": _path(written) for side, written in self._written.items()}

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of it."""
        said = [f"model.onnx is {self.name}; the figures called dense and slim are those of float32"]
        if self.name == "float16" and self.provider == CPU:
            said.append("ONNX Runtime computes float16 on a CPU through casts, slower than float32: it is for GPUs")
        if self.result.options.checkpoint:
            said.append("the checkpoint is float32")
        slim = self._written.get("slim")
        if isinstance(slim, Quantised) and slim.quantised < slim.linears:
            said.append(f"{slim.linears - slim.quantised} of {slim.linears} products with weights stay float32")
        return (*said, *self._said)

    def write_slim(self, source: Path, cases: Callable[[], Cases]) -> None:
        """Write the slim side, whose float32 file is ``source``, and compare it with what the slim program gives.

        Some models amplify rounding: twice what PyTorch's products in this dtype do to the slim program's outputs is
        allowed too. What rounds more coarsely is written once more with its residual stream in float32, as standard
        ops have it. Quantised weights are another model: they are not compared.

        Raises:
            VerificationError: an output is further off than both.
        """
        self._write("slim", source)
        if self.name not in TOLERANCES:
            return
        allowed = TOLERANCES[self.name]
        departure, count = self._departure(cases())
        if departure > allowed:
            noise = self._largest_share(half_noise(self.result, getattr(torch, self.name)))
            coarse = max(allowed, TIMES_NOISE * noise) if math.isfinite(noise) else allowed
            if departure > coarse:
                self._exact_stream = True
                self._write("slim", source)
                departure, count = self._departure(cases())
                self._said += ("its residual stream stays float32, since a rounded one moved its outputs too far",)
            if departure > allowed:
                allowed = coarse
                self._said += (
                    f"the slim model amplifies rounding: PyTorch's products in {self.name} move its outputs by "
                    f"{noise:.1e} of their largest number, so {TIMES_NOISE} times that is allowed",
                )
        self._verified = Verification(max_abs_difference=departure, tolerance=allowed, max_abs_output=1.0, cases=count)
        if not self._verified.passed:
            raise VerificationError(
                f"the slim ONNX in {self.name} differs from the slim program by {departure:.2e} of an output's largest "
                f"number (tolerance {allowed:.1e}, and {CACHED} times that for keys and values): nothing was written; "
                "export it in float32"
            )

    def write_dense(self, source: Path) -> None:
        """Write the dense side, as the slim one is, from its float32 file."""
        self._write("dense", source)

    def _write(self, side: Side, source: Path) -> None:
        folder = self._folders[side]
        if self.name in HALF:
            self._written[side] = convert_dtype(source, folder, self.name, exact_stream=self._exact_stream)
        else:
            self._written[side] = quantize(source, folder, self.name, self.work)

    def _departure(self, cases: Cases) -> tuple[float, int]:
        """The largest difference of an output as a share of its largest number, of keys and values a part of it; and
        the number of cases.
        """
        path, mask = self.paths[f"slim {self.name}"], mask_name(self.result)
        found = compare_outputs(path, cases, self.work, mask=mask, provider=self.provider)
        return self._largest_share(found.relative_differences), len(found.cases)

    def _largest_share(self, shares: Sequence[float]) -> float:
        answers = 1 if self.result.captured.cache is not None else len(shares)
        return max(*shares[:answers], *(share / CACHED for share in shares[answers:]), 0.0)

    def figures(self, latencies: Mapping[str, Latency], step: Callable[[], None]) -> tuple[PrecisionFigures, ...]:
        """Both sides, measured on their files; ``step`` is called once a batch and side."""
        return tuple(self._side(side, latencies, step) for side in self._written)

    def _side(self, side: Side, latencies: Mapping[str, Latency], step: Callable[[], None]) -> PrecisionFigures:
        name = f"{side} {self.name}"
        written = self._written[side]
        run = _Compared(self.result, side, self.paths[name], self.provider)
        fidelity = measure_fidelity(self.result, step, run)
        counted = written if isinstance(written, Quantised) else None
        return PrecisionFigures(
            side=side,
            precision=self.name,
            file_bytes=onnx_size(self.paths[name]),
            latency=latencies[name],
            fidelity=fidelity,
            top1_agreement=run.top1_agreement,
            verification=self._verified if side == "slim" else None,
            linears=counted.linears if counted else None,
            quantised_linears=counted.quantised if counted else None,
        )


def _path(written: Quantised | Path) -> Path:
    return written.path if isinstance(written, Quantised) else written


class _Compared:
    """A file's first output of a batch; meanwhile counts where the program that it came from predicts the same."""

    def __init__(self, result: SlimResult, side: Side, path: Path, provider: str) -> None:
        self.result, self.graph = result, result.slim if side == "slim" else result.dense
        self._model = OnnxModel(path, provider=provider)
        self._program = Execution(self.graph) if predicts_tokens(result.task) else None
        self._agreements = self._tokens = 0

    def __call__(self, batch: Inputs) -> torch.Tensor:
        found = torch.from_numpy(self._model(onnx_inputs(self.graph, batch))[0]).float()
        if self._program is not None:
            own = self._program.outputs(batch)[0]
            part = compare_decoders(lambda _: own, lambda _: found, [batch], ids_name(self.result))
            self._agreements, self._tokens = self._agreements + part.agreements, self._tokens + part.tokens
        return found

    @property
    def top1_agreement(self) -> float | None:
        return self._agreements / self._tokens if self._tokens else None
