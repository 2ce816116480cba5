"""Options that change a model's structure instead of its widths: linears of a lower rank, and fewer blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dotresize_fx.depth.choice import DROPS, MERGES
from dotresize_fx.errors import UsageError

if TYPE_CHECKING:
    from dotresize_fx.options import Options

# LLM-ROM as published; and with means, targets of the dense stream.
RANK_METHODS = ("rom", "rank")
MERGE_METHODS = (*MERGES, *DROPS)


def changes_structure(options: Options) -> bool:
    """Whether linears are factorised or blocks go, and no width is planned."""
    return options.merge is not None or options.method in RANK_METHODS


def check_structure(options: Options) -> None:
    """
    Raises:
        UsageError: a value that cannot be used, or what only widths have.
    """
    if options.merge_method not in (None, *MERGE_METHODS):
        raise UsageError(f"--merge-method {options.merge_method}: choose one of {', '.join(MERGE_METHODS)}")
    if options.merge is None and options.merge_method is not None:
        raise UsageError(f"--merge-method {options.merge_method}: say with --merge how many blocks are to go")
    if not changes_structure(options):
        return
    said = f"--method {options.method}" if options.merge is None else "--merge"
    if options.merge is not None and options.merge < 1:
        raise UsageError(f"--merge {options.merge}: at least one block has to go")
    by_rank, widths = options.merge is None, "it changes no width"
    against = {
        f"--method {options.method}": options.merge is not None and options.method != "auto" and "choose one",
        "--plan": options.plan is not None and widths,
        f"--regions {','.join(options.regions)}": bool(options.regions) and widths,
        "--uniform": bool(options.uniform) and widths,
        "--allocation uniform": options.allocation == "uniform" and widths,
        "--head-sizes equal": options.head_sizes == "equal" and widths,
        "--multiple": options.multiple is not None and widths,
        "--target-latency and --profile": options.by_the_clock and widths,
        f"--basis {options.basis}": options.basis != "shared" and widths,
        f"--cost {options.cost}": options.cost not in (None, "weights") and "it is counted in weights",
        "--effort best": options.effort == "best"
        and (
            (by_rank and "its factors are not repaired: use heal")
            or (options.merge_method == "drop-last" and "the blocks that stay put out what they did: use heal")
        ),
        "--format executorch": by_rank
        and "executorch" in options.formats
        and "its converter does not take two linears behind an attention",
        "--checkpoint": by_rank and options.checkpoint and "no stock model has two linears in place of one",
    }
    for option, why in against.items():
        if why:
            raise UsageError(f"{said} and {option} do not go together: {why}")
