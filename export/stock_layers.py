"""A model's configuration with fewer layers, and what its parameters are called then: layers close up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dotresize_fx.errors import CheckpointError
from dotresize_fx.export.stock_config import said
from dotresize_fx.export.stock_weights import StockWeights
from dotresize_fx.passes.find_blocks import Block

COUNT = "num_hidden_layers"
# Where layers of another kind begin; and lists of layers by number, not of something a layer.
STARTS = ("max_window_layers", "first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
NUMBERS = ("mlp_only_layers", "moe_layers", "full_attn_idxs", "attn_layer_indices", "cross_attention_layers")


@dataclass(frozen=True)
class StockLayers:
    """The layers ``prefix``N of a model, ``count`` of them, without those whose numbers are ``gone``."""

    prefix: str
    count: int
    gone: frozenset[int]

    @property
    def left(self) -> list[int]:
        """Numbers, counted in the dense model, of the layers that stay."""
        return [i for i in range(self.count) if i not in self.gone]

    def number(self, name: str) -> int | None:
        """Of the layer that a parameter or module is part of, if it is."""
        number = name.removeprefix(self.prefix).partition(".")[0]
        return int(number) if name.startswith(self.prefix) and number.isdecimal() else None

    def renamed(self, name: str) -> str:
        """What something that stays is called behind fewer layers."""
        number = self.number(name)
        if number is None:
            return name
        return f"{self.prefix}{self.left.index(number)}{name[len(f'{self.prefix}{number}') :]}"

    def buffers(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """The dense model's, by the names that they have then."""
        return {self.renamed(name): one for name, one in model.named_buffers() if self.number(name) not in self.gone}

    def config(self, config: Any) -> Any:
        """The configuration without the layers that are gone.

        Raises:
            CheckpointError: it has no field that says how many there are.
        """
        name = type(config).__name__
        counted = getattr(config, "attribute_map", {}).get(COUNT, COUNT)
        changed = self.closed_up(config.to_dict(), counted)
        if changed is None:
            raise CheckpointError(f"--checkpoint: {name} has no field that says {self.count} layers: leave it out")
        return said(lambda: type(config).from_dict(changed), name)

    def closed_up(self, fields: Mapping[str, Any], counted: str) -> dict[str, Any] | None:
        """A configuration's ``fields`` without the layers that are gone; None unless ``counted`` says how many there
        are.
        """
        if fields.get(counted) != self.count:
            return None
        changed = {field: self._closed_up(field, value) for field, value in fields.items()}
        changed[counted] = len(self.left)
        if "attention_types" in fields:  # GPT-Neo's other way to say its attention_layers
            kinds = [kind for several, times in fields["attention_types"] for kind in several * times]
            changed["attention_types"] = [[[kinds[i]], 1] for i in self.left]
        return changed

    def shallow(self, model_class: type[torch.nn.Module], config: Any) -> tuple[Any, dict[str, torch.Size]]:
        """The configuration without the layers that are gone, and the shapes of such a model's parameters.

        Raises:
            CheckpointError: it cannot say so, or a layer would compute something else under its new number.
        """
        found = self.config(config)
        dense, shallow = (_described(model_class, one) for one in (config, found))
        self._compare(dense, shallow, model_class.__name__)
        return found, {key: tensor.shape for key, tensor in shallow.state_dict().items()}

    def _closed_up(self, field: str, value: Any) -> Any:
        if field in STARTS and type(value) is int and value <= self.count:
            return sum(i < value for i in self.left)
        if not isinstance(value, (list, tuple)):
            return value
        if field in NUMBERS:
            return [self.left.index(i) for i in value if i in self.left]
        if len(value) == self.count and "token" not in field:
            return [value[i] for i in self.left]
        return value

    def _compare(self, dense: torch.nn.Module, shallow: torch.nn.Module, name: str) -> None:
        """Whether the layers that stay are what they were: parts, sizes, and numbers that they compute with."""
        there = dict(shallow.named_modules())
        for place, module in dense.named_modules():
            i = self.number(place)
            if i is None or i in self.gone:
                continue
            j = self.left.index(i)
            before, after = _told(module), _told(there.get(self.renamed(place)))
            for field, value in before.items():
                numbered = type(value) is int and (value, after.get(field)) == (i, j)
                if field not in after or (after[field] != value and not numbered):
                    raise CheckpointError(
                        f"--checkpoint: without layer {min(self.gone)} layer {i} would be layer {j} of a stock {name}, "
                        f"with {field} {after.get(field)} for {value}, which no configuration says"
                    )


def layers_of(weights: StockWeights, blocks: Sequence[Block], gone: Sequence[int]) -> StockLayers:
    """The model's list of layers that the ``blocks`` of its graph are, without those numbered ``gone``.

    Raises:
        CheckpointError: they are not the layers of one list, one each, in its order.
    """
    keys = [weights.keys_of(block.ops) for block in blocks]
    parts = min(keys[0], default="").split(".")
    for i, part in enumerate(parts):
        prefix = "".join(f"{before}." for before in parts[:i])
        if part == "0" and all(key.startswith(f"{prefix}{n}.") for n, own in enumerate(keys) for key in own):
            return StockLayers(prefix, len(blocks), frozenset(gone))
    raise CheckpointError("--checkpoint: the blocks are not one list of layers in the stock model: leave it out")


def _described(model_class: type[torch.nn.Module], config: Any) -> torch.nn.Module:
    def build() -> torch.nn.Module:
        with torch.device("meta"):
            return model_class(config)

    return said(build, model_class.__name__)


def _told(module: torch.nn.Module | None) -> Mapping[str, object]:
    """What a module is, in plain values."""
    if module is None:
        return {}
    kinds = (bool, int, float, str, tuple, type(None))
    plain = {name: value for name, value in vars(module).items() if isinstance(value, kinds) and name[0] != "_"}
    shapes = {name: tuple(value.shape) for name, value in module.named_parameters(recurse=False)}
    return {"class": type(module).__name__} | plain | shapes
