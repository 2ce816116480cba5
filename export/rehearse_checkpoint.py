"""Find out before the long work whether a checkpoint can hold what will be cut: cut rows alone, and compare."""

from __future__ import annotations

import torch

from dotresize_fx.errors import CheckpointError, NothingToSlimError
from dotresize_fx.export.capture import Captured
from dotresize_fx.export.fit_stock import CENTRED
from dotresize_fx.export.model_source import LoadedModel
from dotresize_fx.export.stock_config import StockConfig
from dotresize_fx.export.stock_model import cuts_of, require_stock_class, stock_model
from dotresize_fx.export.stock_weights import StockWeights
from dotresize_fx.fx_form.execution import Execution
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.graph import Kind
from dotresize_fx.options import Options
from dotresize_fx.passes.choose_regions import choose_regions
from dotresize_fx.passes.cut_stream import widest_stream
from dotresize_fx.passes.follow_plan import check_plan
from dotresize_fx.passes.truncate_regions import truncate_regions
from dotresize_fx.regions import MatchReport, Region, RegionKind, Symmetry
from dotresize_fx.width_plan import WidthPlan, step_of

# Rounding is far below, a wrong model far above.
TOLERANCE = 1e-3
UNTRACED_LENGTH = 7


def rehearse_checkpoint(
    loaded: LoadedModel, captured: Captured, matches: MatchReport, options: Options, plan: WidthPlan | None
) -> dict[str, int]:
    """What widths must be multiples of, by kind.

    Every region that may be cut, or that ``plan`` cuts, loses its last rows, one step's or as many as the plan says; a
    stock model of these widths must compute the same. All of it is exact, so nothing has to be calibrated.

    Raises:
        CheckpointError: it cannot; the message says what stands in the way.
    """
    require_stock_class(loaded)
    dense = captured.graph
    if plan is not None:
        check_plan(plan, matches, options.method)
    regions = _cut_regions(dense, matches, options, plan)
    stock = StockConfig(loaded.model, loaded.config)
    factors = {region.kind: stock.factor(region.kind, region.width) for region in regions}
    widths: dict[str, int] = {} if plan is None else dict(plan.widths)
    for region in regions if plan is None else ():
        _why_never(dense, region)
        step = step_of(region, options.multiple, factors[region.kind], options.finest_step)
        if step < region.width:
            widths[region.name] = (region.width - 1) // step * step
    for kind in dict.fromkeys(region.kind for region in regions):  # one at a time: whole heads and their sizes exclude
        chosen = [region for region in regions if region.kind is kind]
        if not any(widths.get(region.name, region.width) < region.width for region in chosen):
            continue
        slim = truncate_regions(dense, chosen, widths)
        model = stock_model(loaded, dense, slim, chosen, widths).model
        why = "it uses the width for more than shapes; leave it alone"
        compare(model, slim, captured, f"whose {kind} width is cut", why)
    cuts = cuts_of(regions, widths, StockWeights(loaded.model, dense))
    stock.narrowed(cuts)  # one by one they are fine; the configuration may not take them together
    return {str(kind): factor for kind, factor in factors.items()}


def _cut_regions(dense: FxGraph, matches: MatchReport, options: Options, plan: WidthPlan | None) -> list[Region]:
    streams = list(matches.of_kind(RegionKind.RESIDUAL))
    if plan is not None:
        cut = [region for region in matches.regions if plan.widths.get(region.name, region.width) < region.width]
        for region in cut:
            _why_never(dense, region)
        return cut
    regions = [widest_stream(dense, matches)] if RegionKind.RESIDUAL in options.kinds and streams else []
    rest = [kind for kind in options.kinds if kind is not RegionKind.RESIDUAL]
    try:
        return regions + choose_regions(dense, matches.regions, rest)[0]
    except NothingToSlimError:
        return regions  # slimming says it


def _why_never(dense: FxGraph, region: Region) -> None:
    if any(dense.op(name).kind is Kind.LAYER_NORM for name in region.norms):
        raise CheckpointError(f"--checkpoint: {CENTRED}")
    if region.kind is RegionKind.QUERY_KEY and region.symmetry is Symmetry.ROTARY_PAIRS:
        raise CheckpointError(
            f"--checkpoint: no stock model has a query_key width below {region.width}: it would turn a narrower head "
            "by other angles than those of the rotary pairs that are kept; leave the sizes of heads alone: "
            "--regions ffn or ffn,kv_heads"
        )


@torch.no_grad()
def compare(model: torch.nn.Module, slim: FxGraph, captured: Captured, said: str, why: str) -> None:
    """Raises CheckpointError, which calls the model ``said``, unless it computes what ``slim`` does."""
    inputs = {name: value[1:, :UNTRACED_LENGTH] for name, value in captured.sample.items()}
    found, expected = model(**inputs)[0], Execution(slim).outputs(inputs)[0]
    difference, scale = float((found - expected).abs().max()), float(expected.abs().max())
    if not difference <= TOLERANCE * scale:
        raise CheckpointError(
            f"--checkpoint: a {type(model).__name__} {said} computes something else than the slim program (by "
            f"{difference:.1e} of {scale:.1e}): {why}"
        )
