"""The pages' templates, which lie beside this file."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import jinja2


def render(name: str, content: Mapping[str, Any]) -> str:
    """The template filled in; what ``content`` does not name is an error, and what it names is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda file: files(__package__).joinpath(file).read_text(encoding="utf-8")),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    page: str = environment.get_template(name).render(content)
    return page
