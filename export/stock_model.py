"""A slim graph as a model of transformers' own class, with a configuration of the slim widths."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dotresize_fx.errors import CheckpointError
from dotresize_fx.export.fit_stock import fit_stock
from dotresize_fx.export.model_source import LoadedModel
from dotresize_fx.export.quiet import quiet_libraries
from dotresize_fx.export.stock_config import Cut, StockConfig
from dotresize_fx.export.stock_layers import layers_of
from dotresize_fx.export.stock_weights import StockWeights
from dotresize_fx.export.weight_files import first_line
from dotresize_fx.fx_form.graph import FxGraph
from dotresize_fx.passes.find_blocks import find_blocks
from dotresize_fx.regions import Region, RegionKind, counted


@dataclass(frozen=True)
class StockModel:
    """``model`` may share memory with the graphs. ``changes``: fields of the configuration that say something else
    now, widths and whether the head is tied, (before, after) each.
    """

    model: Any
    config: Any
    changes: Mapping[str, tuple[Any, Any]]


def stock_model(
    loaded: LoadedModel,
    dense: FxGraph,
    slim: FxGraph,
    regions: Sequence[Region],
    widths: Mapping[str, int],
    gone: Sequence[int] = (),
) -> StockModel:
    """``slim``, made of ``dense`` by cutting its ``regions`` to ``widths`` (by name; others are whole), or without the
    blocks whose numbers are ``gone``.

    Raises:
        CheckpointError: no stock model has these widths or layers, or none has a place for a weight; the message says
            which.
    """
    require_stock_class(loaded)
    weights = StockWeights(loaded.model, dense)
    layers = layers_of(weights, find_blocks(dense), gone) if gone else None
    if layers is None:
        config, shapes = StockConfig(loaded.model, loaded.config).narrowed(cuts_of(regions, widths, weights))
    else:
        config, shapes = layers.shallow(type(loaded.model), loaded.config)
        weights.leave_out([key for key in loaded.model.state_dict() if layers.number(key) in layers.gone])
    graph = fit_stock(slim, dense)
    state = weights.of(graph)
    if layers is not None:
        state = {layers.renamed(key): tensor for key, tensor in state.items()}
    for key, shape in shapes.items():
        if key not in state or state[key].shape != shape:
            found = "is missing" if key not in state else f"is {list(state[key].shape)}"
            raise CheckpointError(f"--checkpoint: {key} {found}, and a stock model's {list(shape)}")
    if not weights.tied(graph):
        config = type(config).from_dict(config.to_dict() | {"tie_word_embeddings": False})
    model = _load(type(loaded.model), config, state)
    _fit_buffers(model, dict(loaded.model.named_buffers()) if layers is None else layers.buffers(loaded.model))
    before, after = loaded.config.to_dict(), config.to_dict()
    changes = {name: (before.get(name), value) for name, value in after.items() if before.get(name) != value}
    return StockModel(model, config, changes)


def require_stock_class(loaded: LoadedModel) -> None:
    """Raises CheckpointError where the model's code is not transformers' own, or it comes without a configuration."""
    if loaded.program is not None or loaded.config is None:
        what = "a module in memory" if loaded.program is None else "a program"
        raise CheckpointError(f"--checkpoint: {what} comes without what a stock model is made of: export its folder")
    if type(loaded.model).__module__.partition(".")[0] != "transformers":
        name = type(loaded.model).__name__
        raise CheckpointError(f"--checkpoint: {name} is code that came with the model, not a class of transformers")


def cuts_of(regions: Sequence[Region], widths: Mapping[str, int], weights: StockWeights) -> list[Cut]:
    """One cut for all regions of a kind and width.

    Raises:
        CheckpointError: they are cut to several widths.
    """
    groups: dict[tuple[RegionKind, int], list[Region]] = defaultdict(list)
    for region in regions:
        if widths.get(region.name, region.width) < region.width:
            groups[region.kind, region.width].append(region)
    cuts = []
    for (kind, width), cut in groups.items():
        narrow = sorted({widths[region.name] for region in cut})
        if len(narrow) > 1:
            many = counted(len(cut), f"{kind} width")
            raise CheckpointError(
                f"--checkpoint: {many} of {width} would be from {narrow[0]} to {narrow[-1]}, and "
                "a stock model has one for all layers: cut with --uniform"
            )
        cuts.append(Cut(kind, width, narrow[0], frozenset(key for region in cut for key in weights.keys(region))))
    return cuts


def _load(model_class: Any, config: Any, state: Mapping[str, torch.Tensor]) -> Any:
    with quiet_libraries():
        try:
            model, info = model_class.from_pretrained(
                None, config=config, state_dict=dict(state), dtype=torch.float32, output_loading_info=True
            )
        except Exception as error:  # transformers raises whatever its checks raise
            raise CheckpointError(f"--checkpoint: {model_class.__name__}: {first_line(error)}") from error
    if unfit := sorted({*info["missing_keys"], *info["unexpected_keys"]}, key=str):
        raise CheckpointError(f"--checkpoint: {model_class.__name__} of these widths does not take {unfit[0]} as it is")
    return model.eval().requires_grad_(False)


def _fit_buffers(model: torch.nn.Module, known: Mapping[str, torch.Tensor]) -> None:
    """What a model computes of its widths beside its shapes: a factor on embeddings goes into their table (Gemma)."""
    for name, buffer in model.named_buffers():
        before = known.get(name)
        if before is None or (before.shape == buffer.shape and torch.allclose(before, buffer, rtol=1e-7, atol=0)):
            continue
        module = model.get_submodule(name.rpartition(".")[0])
        alone = sum(parameter is getattr(module, "weight", None) for _, parameter in _every_parameter(model)) == 1
        if not isinstance(module, torch.nn.Embedding) or buffer.numel() != 1 or not alone:
            raise CheckpointError(f"--checkpoint: a stock model computes {name} of its widths, so it would be another")
        module.weight = torch.nn.Parameter(module.weight * (before / buffer), requires_grad=False)


def _every_parameter(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    return list(model.named_parameters(remove_duplicate=False))
