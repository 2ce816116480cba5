"""What the export command takes beside a model and a folder."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from dotresize_fx.workload import Workload

if TYPE_CHECKING:
    from dotresize_fx.options import Options


def export_options(export: argparse.ArgumentParser) -> None:
    """Add these options; the defaults are those of :class:`dotresize_fx.options.Options`."""
    # What a plan settles has no default here: beside --plan it must not be given.
    export.add_argument("--ratio", type=float, help="share of the blocks' cost to remove (0.2)")
    _latency_options(export)
    export.add_argument("--cost", help="what the ratio is a share of: weights, or macs per token (weights)")
    export.add_argument("--effort", default="fast", help="fast, best (+ local repair) or heal (+ distillation) (fast)")
    export.add_argument(
        "--regions",
        metavar="LIST",
        help="of ffn, attention (value, query_key, kv_heads), residual (ffn,attention)",
    )
    export.add_argument(
        "--method",
        default="auto",
        help="auto, obs, dotresize, pca (residual only), magnitude; rom, rank: linears of a lower rank (auto)",
    )
    export.add_argument(
        "--methods", type=_names, default=(), metavar="A,B", help="of width, rank, depth: spend --ratio on all of them"
    )
    export.add_argument("--merge", type=int, metavar="K", help="instead of --ratio: so many blocks less")
    export.add_argument("--merge-method", help="mka, aligned, drop-last or drop-least (mka)")
    export.add_argument("--plan", type=Path, metavar="FILE", help="follow the widths of a plan.json instead of --ratio")
    export.add_argument("--allocation", help="measured, or uniform over the regions (measured)")
    export.add_argument(
        "--basis", default="shared", help="of the residual stream: shared, or one a sublayer with adapters (shared)"
    )
    export.add_argument(
        "--compute-dtype",
        help="of calibration's products: float32 or bfloat16 (float32; on a GPU, of a model stored so, bfloat16)",
    )
    export.add_argument(
        "--head-sizes",
        help="free, or equal: query, key and value heads of one size, as CUDA's want (free)",
    )
    export.add_argument(
        "--uniform", action="store_true", default=None, help="one width in all layers for what is cut of a kind"
    )
    export.add_argument(
        "--checkpoint", action="store_true", help="also write OUT/checkpoint, which stock from_pretrained loads"
    )
    export.add_argument(
        "--format",
        metavar="LIST",
        action="append",
        default=[],
        help="beside model.onnx: pt2, openvino, executorch, genai (with --checkpoint), each verified; repeatable",
    )
    export.add_argument(
        "--no-cache",
        dest="cache",
        action="store_false",
        help="a decoder's ONNX without past keys and values: it reads whole sequences alone",
    )
    export.add_argument(
        "--dtype",
        default="float32",
        help="of model.onnx: float32, float16, or bfloat16 with ONNX Runtime for CUDA (float32)",
    )
    export.add_argument("--quantize", help="weights of model.onnx, by ONNX Runtime's quantisers: int8 or int4 (no)")
    export.add_argument(
        "--repair-steps", type=int, metavar="N", help="of best and heal, a sublayer (400; 1200 for an encoder)"
    )
    export.add_argument("--heal-minutes", type=float, default=5.0, metavar="M", help="of distillation (5)")
    export.add_argument("--heal-steps", type=int, metavar="N", help="a count instead of minutes: the same bytes again")
    export.add_argument("--heal-checkpoint", type=Path, metavar="DIR", help="where healing is kept, to go on from")
    export.add_argument(
        "--self-tokens", type=int, metavar="N", help="that the model writes itself, for heal on a GPU (393216)"
    )
    export.add_argument(
        "--multiple",
        type=int,
        help="cut widths are multiples of this, KV heads are counted (16, finer below 128: 8 for heads of 64)",
    )
    export.add_argument(
        "--calibration",
        metavar="FILE",
        type=Path,
        action="append",
        default=[],
        help=".txt or .jsonl, repeatable; 80 %% calibrates, 20 %% measures (default: a text that Python carries)",
    )
    export.add_argument(
        "--calibration-data",
        metavar="PATH",
        type=Path,
        action="append",
        default=[],
        help="for a .pt2 or .onnx: an .npz of arrays named as the model's inputs, samples along the first axis, or a "
        "folder of such files, repeatable; 80 %% of the samples calibrate, the last 20 %% measure",
    )
    export.add_argument(
        "--tokenizer",
        metavar="FOLDER",
        type=Path,
        help="for an .onnx that reads text: where its tokenizer is (beside it)",
    )
    export.add_argument("--calibration-tokens", type=int, metavar="N", help="(24576; 98304 for an encoder)")
    export.add_argument("--sequence-length", type=int, default=512, metavar="N", help="of calibration (512)")
    export.add_argument("--evaluation-tokens", type=int, default=8_192, metavar="N", help="(8192)")
    export.add_argument(
        "--target", default="any", help="any: standard ops; cpu, cuda: and ONNX Runtime's fused ops for it (any)"
    )
    export.add_argument(
        "--memory-budget",
        metavar="SIZE",
        help="4GiB, 512MiB: what the process may take; weights stay in their files where they would be too much of it "
        "(of what is free)",
    )
    export.add_argument("--device", default="auto", help="where to calibrate and solve: auto, cpu, cuda (auto)")
    export.add_argument(
        "--dry-run",
        action="store_true",
        help="say what would be matched and cut, the memory and the time, from shapes alone: weights are not read, "
        "nothing is written",
    )
    export.add_argument("--seed", type=int, default=0)
    export.add_argument("--force", action="store_true", help="replace an OUT that an earlier export wrote")
    export.add_argument("--check", action="store_true", help="run every pass's pre- and postconditions")


def chosen_options(arguments: argparse.Namespace) -> Options:
    """What was given.

    Raises:
        UsageError: see :class:`dotresize_fx.options.Options`.
    """
    from dotresize_fx.options import Options

    given = {f.name: getattr(arguments, f.name) for f in fields(Options) if hasattr(arguments, f.name)}
    given["regions"] = tuple(arguments.regions.split(",")) if arguments.regions else ()
    given["calibration"], given["calibration_data"] = tuple(arguments.calibration), tuple(arguments.calibration_data)
    given["formats"] = tuple(name for names in arguments.format for name in names.split(","))
    return Options(**given)


def _names(listed: str) -> tuple[str, ...]:
    return tuple(listed.split(","))


def _latency_options(export: argparse.ArgumentParser) -> None:
    """Add what plans widths by the clock."""
    export.add_argument(
        "--target-latency",
        type=float,
        metavar="X",
        help="instead of --ratio: cut until the workload takes X of the dense model's time, as measured here",
    )
    export.add_argument(
        "--profile",
        action="store_true",
        help="time the kernels of the widths on this machine, and split --ratio by loss per second saved",
    )
    export.add_argument(
        "--workload", metavar="SIZES", help=f"of --target-latency and --profile, as bench takes it ({Workload()})"
    )
