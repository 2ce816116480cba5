"""Sessions of ONNX Runtime, opened past what breaks them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Of a bfloat16 norm it makes a node of no provider (1.31), which ends the start.
_FUSES_NORMS = "SimplifiedLayerNormFusion"


def session_of(runtime: Any, model: str | bytes, options: Any, providers: Sequence[Any]) -> Any:
    """A session; where ONNX Runtime's own fusion of norms breaks it, one without that."""
    try:
        return runtime.InferenceSession(model, options, providers=providers)
    except Exception as error:  # its exceptions share no base class but Exception
        if "SimplifiedLayerNormalization" not in str(error) or "rovider type" not in str(error):
            raise
        return runtime.InferenceSession(model, options, providers=providers, disabled_optimizers=[_FUSES_NORMS])
