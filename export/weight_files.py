"""Which files of a Hugging Face folder hold its weights, and whether they are whole: only safetensors."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from dotresize_fx.errors import BadWeightsError, ModelNotFoundError, UsageError
from dotresize_fx.offload.lazy_tensor import LazyTensor
from dotresize_fx.offload.stored_tensors import lazy_tensors

_INDEX = "model.safetensors.index.json"


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers will read from ``folder``, after the index where there is one.

    Each has a header that fits its size, so a truncated file is found before anything is loaded.

    Raises:
        BadWeightsError: a file is truncated, damaged or missing, or the index names one that it must not.
        ModelNotFoundError: no safetensors file; where the weights are pickles, the message says what to do.
        UsageError: a distributed checkpoint.
    """
    single, index = folder / "model.safetensors", folder / _INDEX
    if any(re.match(r"shard-\d{5}-model-", file.name) for file in folder.glob("*.safetensors")):
        raise UsageError(f"{folder}: a distributed checkpoint is not supported: save the model with save_pretrained")
    if single.is_file():
        files = [single]
    elif index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            files = [folder / name for name in names]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadWeightsError(f"{index}: not an index of weight files ({first_line(error)})") from error
        for name, file in zip(names, files, strict=True):
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise BadWeightsError(f"{index}: names {name!r}, which is not a safetensors file of this folder")
            if not file.is_file():
                raise BadWeightsError(f"{file}: missing, though {_INDEX} names it: fetch it again")
    elif pickled := sorted(file.name for kind in ("*.bin", "*.pt", "*.pth") for file in folder.glob(kind)):
        raise ModelNotFoundError(
            f"{folder}: its weights are in {pickled[0]}, a pickle, which is never loaded: "
            "convert them to safetensors (if you trust the file, from_pretrained and save_pretrained do it)"
        )
    else:
        raise ModelNotFoundError(f"{folder}: holds no weights (model.safetensors)")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise BadWeightsError(f"{file}: truncated or damaged ({first_line(error)}): fetch it again") from error
    return files if single.is_file() else [index, *files]


def lazy_state(files: Iterable[Path]) -> dict[str, LazyTensor]:
    """The tensors of these safetensors files (others are left out), floats in float32; only headers are read.

    Raises:
        BadWeightsError: a header does not fit its file.
    """
    return {
        name: tensor
        for file in files
        if file.suffix == ".safetensors"
        for name, tensor in lazy_tensors(file, torch.float32).items()
    }


def float32_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """What they take in memory, in float32 throughout."""
    return sum(tensor.numel() * 4 for tensor in tensors.values())


def file_sha256(file: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def files_sha256(files: Sequence[Path]) -> dict[str, str]:
    """By name, several files at a time."""
    with ThreadPoolExecutor() as pool:
        return dict(zip((file.name for file in files), pool.map(file_sha256, files), strict=True))


def first_line(error: BaseException) -> str:
    """The first line of an error's text that says something, or the name of its class."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
