"""Where healing stands, in one file: tensors as safetensors, the rest as JSON in its header. Nothing is pickled."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dotresize_fx.errors import UsageError
from dotresize_fx.fidelity import Inputs


class HealCheckpoint:
    """``heal.safetensors`` in ``folder``; without a folder nothing is written and nothing is found.

    Only a file with the same ``fingerprint`` is gone on from: another one is from other weights, options or data.
    """

    def __init__(self, folder: Path | None, fingerprint: str) -> None:
        self.file = None if folder is None else folder / "heal.safetensors"
        self.fingerprint = fingerprint

    def write(self, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        """Replace the file as a whole: a kill leaves the old one or the new one."""
        if self.file is None:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_suffix(".partial")
        whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        save_file(whole, partial, metadata={"fingerprint": self.fingerprint, "facts": json.dumps(dict(facts))})
        partial.replace(self.file)

    def read(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """(tensors on the CPU, facts) as they were written, or None where there is no file, or a damaged one.

        Raises:
            UsageError: the file has another fingerprint; writing would replace what another run has healed.
        """
        if self.file is None or not self.file.is_file():
            return None
        try:
            with safe_open(self.file, framework="pt") as opened:
                header = opened.metadata() or {}
                if header.get("fingerprint") != self.fingerprint:
                    raise UsageError(
                        f"--heal-checkpoint {self.file.parent}: heal.safetensors in it is of another run (other model, "
                        "options or data): choose another folder, or delete the file to start afresh"
                    )
                return {name: opened.get_tensor(name) for name in opened.keys()}, json.loads(header["facts"])  # noqa: SIM118
        except (OSError, SafetensorError, ValueError, KeyError):
            return None


def fingerprint(words: Iterable[str], tensors: Mapping[str, torch.Tensor], *batches: Sequence[Inputs]) -> str:
    """SHA-256 of the words, of the tensors with their names, dtypes and shapes, and of the batches."""
    found = hashlib.sha256()
    for word in words:
        found.update(word.encode() + b"\0")
    named = [*tensors.items(), *(item for part in batches for batch in part for item in sorted(batch.items()))]
    for name, tensor in named:
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
