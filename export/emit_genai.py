"""Emit: ONNX Runtime GenAI's own model builder on the checkpoint, for its fused ops; float32, CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from dotresize_fx.errors import FormatError
from dotresize_fx.export.onnx_file import ONNX_FILE

BUILDER = "onnxruntime_genai.models.builder"


def emit_genai(checkpoint: Path, folder: Path, work: Path) -> Path:
    """Build from ``checkpoint`` into ``folder``; returns model.onnx's path, beside its genai_config.json.

    In a process of its own: the builder prints, and adds folders to where Python imports from.

    Raises:
        FormatError: the builder knows no such model, or failed; the message ends in its last line.
    """
    options = {"-i": checkpoint, "-o": folder, "-p": "fp32", "-e": "cpu", "-c": work / "genai-cache"}
    command = [sys.executable, "-P", "-m", BUILDER, *(str(word) for pair in options.items() for word in pair)]
    # Nothing is fetched: all is in the checkpoint.
    surroundings = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=surroundings, check=False)
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
        raise FormatError(f"--format genai: the model builder failed: {lines[-1]}; leave it out")
    return folder / ONNX_FILE
