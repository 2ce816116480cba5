"""Hold back what the libraries under us say while they work; exceptions still come through."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

from transformers.utils import logging as transformers_logging

LOGGERS = (
    "torch.onnx",
    "torch.export",
    "torch.fx",
    "onnxscript",
    "onnx_ir",
    "torch.onnx._internal.exporter._registration",
)


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """No progress bars, notes, warnings or prints of transformers, torch and onnxscript inside the block."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        # Some print, or have a bar of their own, which only goes where the streams go.
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
        for name, old in levels.items():
            logging.getLogger(name).setLevel(old)
