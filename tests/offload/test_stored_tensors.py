"""Files of tensors: read when needed, checked when first read."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dotresize_fx.errors import BadWeightsError
from dotresize_fx.offload import pinned_memory
from dotresize_fx.offload.stored_tensors import Spool, file_crc32, lazy_tensors, write_tensors


def test_a_file_gives_what_was_saved(tmp_path: Path) -> None:
    saved = {
        "weight": torch.randn(5, 3).bfloat16(),
        "half": torch.randn(2, 2).half(),
        "ids": torch.arange(3),
        "nothing": torch.zeros(0, 4),
        "number": torch.tensor(2.5),
    }
    save_file(saved, tmp_path / "some.safetensors")
    found = lazy_tensors(tmp_path / "some.safetensors", torch.float32)
    assert found.keys() == saved.keys()
    for name, tensor in saved.items():
        wanted = tensor.float() if tensor.is_floating_point() else tensor
        assert torch.equal(found[name].read(), wanted)
        assert found[name].dtype is wanted.dtype


@pytest.mark.parametrize("piece", [16, 32 << 20])
def test_what_is_written_is_a_safetensors_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    """Of tensors of any layout, in memory or not, two of which share theirs."""
    monkeypatch.setattr(pinned_memory, "PINNED_PIECE", piece)
    weight = torch.randn(5, 3)
    tensors = {
        "weight": weight,
        "tied": weight,
        "transposed": weight.T,
        "parameter": torch.nn.Parameter(weight[1:].bfloat16()),
        "spooled": Spool(tmp_path).put(weight).T,
        "ids": torch.arange(3),
        "flags": torch.tensor([True, False, True]),
        "nothing": torch.zeros(0, 4),
        "number": torch.tensor(2.5, dtype=torch.float64),
    }
    crc = write_tensors(file := tmp_path / "some.safetensors", tensors)
    found, ours = load_file(file), lazy_tensors(file)
    assert found.keys() == ours.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor)
        assert torch.equal(ours[name].read(), tensor)
        assert found[name].dtype is ours[name].dtype is tensor.dtype
    assert crc == file_crc32(file) == zlib.crc32(file.read_bytes())


@pytest.mark.parametrize("kept", [4, 60, -1])
def test_a_truncated_file_is_found_by_its_header(tmp_path: Path, kept: int) -> None:
    file = tmp_path / "some.safetensors"
    save_file({"weight": torch.randn(50, 30)}, file)
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(BadWeightsError, match=r"some\.safetensors: truncated, damaged"):
        lazy_tensors(file)


def test_nan_is_found_when_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "some.safetensors"
    save_file({"good": torch.ones(3), "bad": torch.tensor([1.0, float("nan")])}, file)
    found = lazy_tensors(file)
    assert torch.equal(found["good"] + 1, torch.full((3,), 2.0))
    with pytest.raises(BadWeightsError, match="bad holds NaN or infinity"):
        _ = found["bad"] + 1
    assert len(lazy_tensors(file, checked=False)["bad"].read()) == 2


def test_a_spool_keeps_tensors_and_leaves_no_file(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    tensors = [torch.randn(7, 5).t(), torch.arange(4), torch.randn(3, dtype=torch.float64)]
    kept = [spool.put(tensor) for tensor in tensors]
    assert not list(tmp_path.iterdir())
    for one, other in zip(kept, tensors, strict=True):
        assert one.dtype is other.dtype
        assert torch.equal(one.read(), other)
