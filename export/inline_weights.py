"""Weights inside an ONNX file, moved beside it and back as a stream: parsed as one message they would be held twice.

Of protobuf's wire format this knows as much as it needs: a message is a row of fields, each a tag (number and kind) and
a value; that of kind 2 is a length and so many bytes (https://protobuf.dev/programming-guides/encoding/).
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import onnx

# Fields by number, of ModelProto, GraphProto and TensorProto in onnx.proto3.
GRAPH, INITIALIZER, RAW_DATA, EXTERNAL = 7, 5, 9, 13
# Kinds of fields: a number, bytes with their length, and such of fixed size.
_NUMBER, _BYTES, _FIXED = 0, 2, {1: 8, 5: 4}
# Weights of fewer bytes stay where they are.
MOVED = 2048
_ALIGNED = 64
DATA = ".data"
_Held = mmap.mmap | bytes


def move_out(path: Path, folder: Path) -> Path:
    """A copy of the file in ``folder`` with the weights that it holds itself beside it.

    Raises:
        ValueError: it is no ONNX file, or cut off, or has weights beside it already.
    """
    moved = folder / path.name
    with (folder / f"{path.name}{DATA}").open("wb") as data:
        small = _small(path, data)
    moved.write_bytes(small)
    return moved


def without_weights(path: Path) -> onnx.ModelProto:
    """The model of a file; of the weights that it holds itself it says where in the file they are.

    Raises:
        ValueError: it is no ONNX file, or cut off.
    """
    model: onnx.ModelProto = onnx.ModelProto.FromString(_small(path, None))
    return model


def move_in(path: Path, target: Path) -> None:
    """Write the model at ``path``, whose weights lie beside it, with them inside, as one message would be written."""
    before, (graph, *_), after = _around(path.read_bytes(), GRAPH)
    first, tensors, last = _around(graph, INITIALIZER)
    parts = [_raw_last(tensor) for tensor in tensors]
    sizes = [len(head) + _field_size(place[2]) + len(tail) for head, place, tail in parts]
    whole = len(first) + sum(len(_tag(INITIALIZER, size)) + size for size in sizes) + len(last)
    with target.open("wb") as file:
        file.write(before + _tag(GRAPH, whole) + first)
        for (head, (location, offset, length), tail), size in zip(parts, sizes, strict=True):
            file.write(_tag(INITIALIZER, size) + head)
            if length:
                file.write(_tag(RAW_DATA, length))
                with _mapped(path.parent / location) as held:
                    _copy(held, offset, offset + length, file)
            file.write(tail)
        file.write(last + after)


def _small(path: Path, data: BinaryIO | None) -> bytes:
    """The file without the weights inside it, which go to ``data``; where that is None, they stay."""
    small = bytearray()
    with _mapped(path) as held:
        for number, first, begin, end in _fields(held, 0, len(held)):
            if number != GRAPH:
                small += held[first:end]
                continue
            graph = bytearray()
            for inner, start, content, stop in _fields(held, begin, end):
                graph += _moved(held, content, stop, path, data) if inner == INITIALIZER else held[start:stop]
            small += _tag(GRAPH, len(graph)) + graph
    return bytes(small)


def _moved(held: mmap.mmap, start: int, end: int, path: Path, data: BinaryIO | None) -> bytes:
    """The initializer of these bytes, as a field of the graph."""
    tensor, raw = bytearray(), None
    for number, first, begin, stop in _fields(held, start, end):
        if number == EXTERNAL and data is not None:
            raise ValueError("weights beside the file too")
        if number == RAW_DATA and stop - begin >= MOVED:
            raw = begin, stop
        else:
            tensor += held[first:stop]
    if raw is not None:
        offset, location = raw[0], path.name
        if data is not None:
            data.write(bytes(-data.tell() % _ALIGNED))
            offset, location = data.tell(), f"{path.name}{DATA}"
            _copy(held, *raw, data)
        proto = onnx.TensorProto.FromString(bytes(tensor))
        proto.data_location = onnx.TensorProto.EXTERNAL
        for key, value in {"location": location, "offset": offset, "length": raw[1] - raw[0]}.items():
            proto.external_data.add(key=key, value=str(value))
        tensor = bytearray(proto.SerializeToString())
    return _tag(INITIALIZER, len(tensor)) + tensor


def _raw_last(tensor: bytes) -> tuple[bytes, tuple[str, int, int], bytes]:
    """(its fields in front of raw data, the place of that in a file beside: name, offset and length, those behind)."""
    proto = onnx.TensorProto.FromString(tensor)
    if proto.data_location != onnx.TensorProto.EXTERNAL:
        return tensor, ("", 0, 0), b""
    told = {entry.key: entry.value for entry in proto.external_data}
    proto.ClearField("external_data")
    proto.ClearField("data_location")
    proto.raw_data = b"-"  # parts what is in front of it from what is behind
    head, _, tail = _around(proto.SerializeToString(), RAW_DATA)
    return head, (told["location"], int(told.get("offset", 0)), int(told["length"])), tail


def _around(message: bytes, number: int) -> tuple[bytes, list[bytes], bytes]:
    """(what is in front of the fields of this number, their values, what is behind)."""
    found = [(first, begin, end) for other, first, begin, end in _fields(message, 0, len(message)) if other == number]
    values = [message[begin:end] for _, begin, end in found]
    if not found:  # fields are written in the order of their numbers
        behind = [first for other, first, _, _ in _fields(message, 0, len(message)) if other > number]
        cut = min(behind, default=len(message))
        return message[:cut], values, message[cut:]
    return message[: found[0][0]], values, message[found[-1][2] :]


@contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as held:
        yield held


def _copy(held: mmap.mmap, start: int, end: int, file: BinaryIO) -> None:
    with memoryview(held) as view, view[start:end] as part:
        file.write(part)


def _fields(held: _Held, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """(number, where it starts, where its value starts, where it ends) of each field of a message."""
    at = start
    while at < end:
        first = at
        tag, at = _number(held, at, end)
        begin, kind = at, tag & 7
        if kind == _NUMBER:
            _, at = _number(held, at, end)
        elif kind == _BYTES:
            length, begin = _number(held, at, end)
            at = begin + length
        elif kind in _FIXED:
            at += _FIXED[kind]
        else:
            raise ValueError("a field of no known kind")
        if at > end:
            raise ValueError("a field that ends behind its message")
        yield tag >> 3, first, begin, at


def _number(held: _Held, at: int, end: int) -> tuple[int, int]:
    """(a number of 7 bits a byte, the lowest first, the position behind it)."""
    number = shift = 0
    while at < end and shift < 64:
        byte = held[at]
        number |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return number, at
    raise ValueError("a number that does not end")


def _field_size(length: int) -> int:
    """Of raw data as a field; nothing where there is none."""
    return len(_tag(RAW_DATA, length)) + length if length else 0


def _tag(number: int, length: int) -> bytes:
    return _spelled(number << 3 | _BYTES) + _spelled(length)


def _spelled(number: int) -> bytes:
    spelled = bytearray()
    while number >= 128:
        spelled.append(number & 127 | 128)
        number >>= 7
    return bytes([*spelled, number])
