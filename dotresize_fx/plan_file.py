"""plan.json: a width plan as a file that people read, edit and use again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dotresize_fx.errors import UsageError
from dotresize_fx.width_plan import WidthPlan

SCHEMA_VERSION = 1


def write_plan(plan: WidthPlan, path: Path) -> None:
    """One line a width, and the predicted losses, where there are any, under them."""
    content: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "widths": dict(plan.widths)}
    if plan.losses:
        content["predicted_losses"] = {name: round(loss, 8) for name, loss in plan.losses.items()}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_plan(path: Path) -> WidthPlan:
    """The widths of a file that :func:`write_plan` wrote, edited or not; its losses are not read.

    Raises:
        UsageError: there is no such file, it is no width plan, or names no width.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--plan {path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"--plan {path}: not valid JSON ({error})") from error
    widths = content.get("widths") if isinstance(content, dict) else None
    if not isinstance(widths, dict) or content.get("schema_version") != SCHEMA_VERSION:
        raise UsageError(
            f'--plan {path}: not a width plan: it must hold "schema_version": {SCHEMA_VERSION} and "widths"'
        )
    if not widths:
        raise UsageError(
            f"--plan {path}: it names no width, so it cuts nothing: take the plan of a run that cut widths, or --ratio"
        )
    for name, width in widths.items():
        if not isinstance(width, int) or isinstance(width, bool):
            raise UsageError(f"--plan {path}: the width of {name!r} must be a whole number, not {width!r}")
    return WidthPlan(widths)
