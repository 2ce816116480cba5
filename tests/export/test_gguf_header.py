"""A GGUF file's header is parsed once, to what gguf itself makes of it."""

from __future__ import annotations

import os
from pathlib import Path

import gguf
import numpy as np
import pytest

from dotresize_fx.export.gguf_header import parsed_once


@pytest.fixture
def file(tmp_path: Path) -> Path:
    writer = gguf.GGUFWriter(tmp_path / "some.gguf", "llama")
    writer.add_token_list(["<s>", "wörd", ""])
    writer.add_context_length(7)
    writer.add_tensor("some.weight", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "some.gguf"


def test_it_is_what_gguf_reads(file: Path) -> None:
    plain = gguf.GGUFReader(file)
    with parsed_once():
        found = gguf.GGUFReader(file)
    assert found.fields.keys() == plain.fields.keys()
    for name, field in plain.fields.items():
        assert [part.tolist() for part in found.fields[name].parts] == [part.tolist() for part in field.parts]
    assert [tensor.name for tensor in found.tensors] == ["some.weight"]
    assert np.array_equal(found.tensors[0].data, plain.tensors[0].data)


def test_once_for_a_file_and_no_longer_than_the_block(file: Path, tmp_path: Path) -> None:
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    (tmp_path / "link.gguf").symlink_to(file)
    kind = gguf.MODEL_ARCH.LLAMA
    with parsed_once():
        assert gguf.GGUFReader(file) is gguf.GGUFReader(os.fspath(tmp_path / "link.gguf"), "r")
        assert gguf.get_tensor_name_map(kind, 2) is gguf.get_tensor_name_map(kind, 2)
        assert gguf.get_tensor_name_map(kind, 3) is not gguf.get_tensor_name_map(kind, 2)
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before
