"""config.json beside an ONNX with fewer blocks: as many layers, and lists with an entry for each of them."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

from dotresize_fx.errors import CheckpointError
from dotresize_fx.export.stock_layers import COUNT, StockLayers

CONFIG_FILE = "config.json"


def shallow_config(config: Any, count: int, gone: Collection[int]) -> tuple[Any, str]:
    """The configuration of ``count`` layers without those that are ``gone``; or the dense model's, and why."""
    try:
        return StockLayers("", count, frozenset(gone)).config(config), ""
    except CheckpointError as error:
        return config, _dense(str(error).removeprefix("--checkpoint: ").removesuffix(": leave it out"))


def follow_depth(file: Path, count: int, gone: Collection[int]) -> str:
    """Write the same into a copied config.json in place; returns why it stays the dense model's, else empty."""
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        kind = fields.get("model_type")
        counted = CONFIG_MAPPING[kind].attribute_map.get(COUNT, COUNT) if kind in CONFIG_MAPPING else COUNT
        changed = StockLayers("", count, frozenset(gone)).closed_up(fields, counted)
    except (ValueError, AttributeError, TypeError, LookupError):
        return _dense("it is not what transformers writes")
    if changed is None:
        return _dense(f"it has no {counted} of {count}")
    file.write_text(json.dumps(changed, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return ""


def _dense(why: str) -> str:
    return f"{CONFIG_FILE} is the dense model's, with its layers: {why}"
