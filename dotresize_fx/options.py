"""What a user may choose, checked in one place for the command line and for Python."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from dotresize_fx.errors import UsageError
from dotresize_fx.solvers import SOLVERS
from dotresize_fx.width_plan import MULTIPLE, check_ratio

REGION_KINDS = ("ffn", "residual")
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True, kw_only=True)
class Options:
    """``ratio`` is the share of block linear weights to remove. Lengths and counts are in tokens.

    ``device`` is where calibration and solving run; conversion and ONNX Runtime stay on the CPU.

    Raises:
        UsageError: an option has a value that cannot be used.
    """

    ratio: float = 0.2
    regions: tuple[str, ...] = ("ffn",)
    method: str = "dotresize"
    multiple: int = MULTIPLE
    calibration: tuple[Path, ...] = ()
    calibration_tokens: int = 24_576
    sequence_length: int = 512
    evaluation_tokens: int = 8_192
    latency_length: int = 128
    tolerance: float = 1e-3
    device: str = "auto"
    seed: int = 0
    check: bool = field(default=False)

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        if self.method not in SOLVERS:
            raise UsageError(f"--method {self.method}: choose one of {', '.join(sorted(SOLVERS))}")
        unknown = [kind for kind in self.regions if kind not in REGION_KINDS]
        if unknown or not self.regions:
            raise UsageError(f"--regions {','.join(self.regions)}: choose from {', '.join(REGION_KINDS)}")
        if len(set(self.regions)) < len(self.regions):
            raise UsageError(f"--regions {','.join(self.regions)}: names one twice")
        if self.method == "obs" and "residual" in self.regions:
            raise UsageError("--method obs eliminates neurons of FFNs: use it with --regions ffn")
        if self.method == "pca" and "ffn" in self.regions:
            raise UsageError("--method pca rotates, which an FFN does not allow: use it with --regions residual")
        if self.device not in DEVICES:
            raise UsageError(f"--device {self.device}: choose one of {', '.join(DEVICES)}")
        # A sequence of one token has no next token to predict.
        least = {"multiple": 1, "calibration_tokens": 1, "sequence_length": 2, "evaluation_tokens": 1}
        for name, smallest in (least | {"latency_length": 1, "seed": 0}).items():
            if getattr(self, name) < smallest:
                raise UsageError(f"--{name.replace('_', '-')} is {getattr(self, name)}: it must be at least {smallest}")
        if self.seed >= 2**63:
            raise UsageError(f"--seed is {self.seed}: it must be below 2**63")
