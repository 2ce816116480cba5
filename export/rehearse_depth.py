"""Find out before the long work whether a checkpoint can hold fewer blocks: drop some, and compare."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from dotresize_fx.depth.choice import DROPS, blocks_to_drop, check_count, pairs_to_merge
from dotresize_fx.errors import CheckpointError
from dotresize_fx.export.capture import Captured
from dotresize_fx.export.model_source import LoadedModel
from dotresize_fx.export.rehearse_checkpoint import compare
from dotresize_fx.export.stock_layers import StockLayers, layers_of
from dotresize_fx.export.stock_model import require_stock_class, stock_model
from dotresize_fx.export.stock_weights import StockWeights
from dotresize_fx.options import Options
from dotresize_fx.passes.drop_layers import DropLayers
from dotresize_fx.passes.find_blocks import Block, find_blocks


def rehearse_depth(loaded: LoadedModel, captured: Captured, options: Options) -> None:
    """A stock model without as many blocks must compute what the graph without them does.

    Which blocks go the calibration says, but for "drop-last": so the first that may go are left out, behind which every
    layer has another number; and the first and the last alone must be ones that a configuration can leave out.

    Raises:
        CheckpointError: it cannot be; the message says what stands in the way.
        UsageError: more blocks are to go than there are, or than are alike.
        NothingToSlimError: the model's depth cannot change.
    """
    require_stock_class(loaded)
    dense, method, count = captured.graph, options.merge_method or "mka", options.merge or 0
    blocks = find_blocks(dense)
    check_count(count, len(blocks))
    gone = _chosen(blocks, method, count, first=True)
    weights = StockWeights(loaded.model, dense)
    alone = [_chosen(blocks, method, 1, first=first) for first in (True, False)] if method != "drop-last" else []
    trials = [layers_of(weights, blocks, chosen) for chosen in (*alone, gone)]
    for layers in trials:
        if not (why := _why_not(loaded, layers)):
            continue
        last = layers_of(weights, blocks, _chosen(blocks, "drop-last", count, first=True))
        raise CheckpointError(
            why if _why_not(loaded, last) else f"{why}; --merge-method drop-last leaves the others be"
        )
    slim = dense.copy()
    DropLayers([blocks[i] for i in gone])(slim)
    model = stock_model(loaded, dense, slim, (), {}, gone).model
    compare(model, slim, captured, "with fewer layers", "it uses their numbers for more; leave --checkpoint out")


def _why_not(loaded: LoadedModel, layers: StockLayers) -> str:
    """Why no configuration says these layers; empty where one does."""
    try:
        layers.shallow(type(loaded.model), loaded.config)
    except CheckpointError as error:
        return str(error)
    return ""


def _chosen(blocks: Sequence[Block], method: str, count: int, *, first: bool) -> list[int]:
    """The first or last blocks that the method could choose."""
    places = [-float(i) if first else float(i) for i in range(len(blocks))]
    if method in DROPS:
        return blocks_to_drop(method, [-place for place in places], count)
    alike = [one.form == other.form for one, other in itertools.pairwise(blocks)]
    return pairs_to_merge(places[:-1], alike, count)
