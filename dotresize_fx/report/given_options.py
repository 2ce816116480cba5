"""The options of a run as a report has them: those that were given or settled, as a user would type them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def given_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Without those that say nothing (None, or none of several); of several values a list, of what is no JSON type,
    such as a path, its text.
    """
    return {name: _plain(value) for name, value in options.items() if value not in (None, (), [])}


def typed_options(options: Mapping[str, Any]) -> dict[str, str]:
    """As words: names as on the command line, several values parted by commas."""
    return {name.replace("_", "-"): _typed(value) for name, value in given_options(options).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (bool, int, float, str)) else str(value)


def _typed(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ",".join(_typed(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
