"""dotresize-fx: a compiler that makes transformers narrower.

>>> import dotresize_fx
>>> result = dotresize_fx.slim("smollm2-135m", ratio=0.2)  # doctest: +SKIP
>>> result.save("smollm2-slim")  # doctest: +SKIP
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dotresize_fx.errors import DotresizeError

if TYPE_CHECKING:
    from dotresize_fx.compiler import slim
    from dotresize_fx.slim_result import SlimResult

__all__ = ["DotresizeError", "SlimResult", "slim"]


# In a checkout passes/ and export/ stand beside this folder, which shadows an installed package wherever Python looks
# into the current folder first: they are found there too.
if not (Path(__file__).parent / "passes").is_dir():
    __path__.append(str(Path(__file__).parent.parent))


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import; errors and the command line's help need neither.
    if name in ("SlimResult", "slim"):
        from dotresize_fx import compiler

        return getattr(compiler, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
