"""A model's configuration with narrower widths: which field says which width is found by trial, not by a list."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from dotresize_fx.errors import CheckpointError
from dotresize_fx.export.quiet import quiet_libraries
from dotresize_fx.export.weight_files import first_line
from dotresize_fx.regions import RegionKind

Changes = Mapping[str, Any]
T = TypeVar("T")
# Left empty, these follow from the hidden size.
_IMPLIED_WIDTHS = ("n_inner", "intermediate_size", "ffn_dim", "d_inner", "hidden_dim")
# Below the dense width only so many candidates for a step are tried: what a configuration refuses recurs.
_TRIED = 8
_HINTS = {
    RegionKind.VALUE: "leave the sizes of heads alone: --regions ffn or ffn,kv_heads",
    RegionKind.QUERY_KEY: "leave the sizes of heads alone: --regions ffn or ffn,kv_heads",
    RegionKind.HEADS: "leave attention alone: --regions ffn",
    RegionKind.RESIDUAL: "leave the stream alone: --regions ffn",
}


@dataclass(frozen=True)
class Cut:
    """``width`` becomes ``narrow`` in all layers; ``keys`` are the names of parameters that change shape."""

    kind: RegionKind
    width: int
    narrow: int
    keys: frozenset[str]


class StockConfig:
    """What a model's class can be configured to. ``config`` is as the model was loaded with."""

    def __init__(self, model: torch.nn.Module, config: Any) -> None:
        self._class, self._config = type(model), config
        self._fields: dict[str, Any] = config.to_dict()
        self._dense = self._shapes({})

    def narrowed(self, cuts: Sequence[Cut]) -> tuple[Any, dict[str, torch.Size]]:
        """The configuration of a model with these widths, and the shapes of its parameters.

        Raises:
            CheckpointError: the class has no field for a width, or refuses it; the message says which and why.
        """
        changes: dict[str, Any] = {}
        for cut in cuts:
            changes |= self._field(cut)
        return self._config_of(changes), self._shapes(changes)

    def factor(self, kind: RegionKind, width: int) -> int:
        """What a width of this kind must be a multiple of: the class may refuse others."""
        if kind not in (RegionKind.RESIDUAL, RegionKind.HEADS):
            return 1
        for factor in range(1, width):
            below = range((width - 1) // factor * factor, 0, -factor)[:_TRIED]
            if all(self._accepts(self._candidates(kind, width, narrow)) for narrow in below):
                return factor
        return width

    def _accepts(self, candidates: Sequence[Changes]) -> bool:
        for changes in candidates:
            try:
                self._config_of(changes)
            except CheckpointError:
                continue
            return True
        return False

    def _field(self, cut: Cut) -> Changes:
        refusal = ""
        candidates = self._candidates(cut.kind, cut.width, cut.narrow)
        for changes in candidates:
            try:
                shapes = self._shapes(changes)
            except CheckpointError as error:
                refusal = str(error)
                continue
            changed = {key for key in self._dense.keys() | shapes.keys() if self._dense.get(key) != shapes.get(key)}
            if changed == cut.keys:
                return changes
        name = type(self._config).__name__
        tried = ", ".join(sorted({field for changes in candidates for field in changes}))
        why = refusal or (f"{tried} does not say it alone" if tried else f"{name} has no field for it")
        hint = _HINTS.get(cut.kind, "leave out --checkpoint")
        raise CheckpointError(
            f"--checkpoint: no {self._class.__name__} has a {cut.kind} width of {cut.narrow} for {cut.width}: {why}; "
            f"{hint}"
        )

    def _candidates(self, kind: RegionKind, width: int, narrow: int) -> list[Changes]:
        same = [name for name, value in self._fields.items() if type(value) is int and value == width]
        if kind is RegionKind.HEADS:
            named = {self._name("num_attention_heads"), self._name("num_key_value_heads")}
            shared = [name for name in same if name in named or "kv" in name]
            queries, rest = divmod(self._fields.get(self._name("num_attention_heads"), 0) * narrow, width)
            counts = dict.fromkeys(shared, narrow) | {self._name("num_attention_heads"): queries}
            return [] if rest else [counts | self._head_size()]
        pinned = self._head_size() if kind is RegionKind.RESIDUAL else {}
        implied = [name for name in _IMPLIED_WIDTHS if name in self._fields and self._fields[name] is None]
        return [{name: narrow} | pinned for name in (*same, *implied)]

    def _head_size(self) -> dict[str, Any]:
        """The size of a head, where it is not said and would follow from what is changed."""
        heads, hidden = self._fields.get(self._name("num_attention_heads")), self._fields.get(self._name("hidden_size"))
        if self._fields.get("head_dim") is not None or not heads or not hidden:
            return {}
        return {"head_dim": hidden // heads}

    def _name(self, common: str) -> str:
        return str(getattr(self._config, "attribute_map", {}).get(common, common))

    def _config_of(self, changes: Changes) -> Any:
        return said(lambda: type(self._config).from_dict(self._fields | dict(changes)), type(self._config).__name__)

    def _shapes(self, changes: Changes) -> dict[str, torch.Size]:
        config = self._config_of(changes)

        def build() -> dict[str, torch.Size]:
            with torch.device("meta"):
                return {key: tensor.shape for key, tensor in self._class(config).state_dict().items()}

        return said(build, self._class.__name__)


def said(attempt: Callable[[], T], name: str) -> T:
    """What an attempt gives; whatever transformers says against it is a CheckpointError of one line."""
    try:
        with quiet_libraries():
            return attempt()
    except Exception as error:  # transformers raises whatever its checks raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise CheckpointError(f"{name}: {lines[-1] if lines else first_line(error)}") from error
