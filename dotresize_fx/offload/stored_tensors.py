"""Files of tensors, mapped into memory: safetensors files, and files of our own that only this process reads."""

from __future__ import annotations

import json
import math
import mmap
import os
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from dotresize_fx.errors import BadWeightsError
from dotresize_fx.offload.held_weights import HeldWeights
from dotresize_fx.offload.lazy_tensor import LazyTensor, in_memory
from dotresize_fx.offload.pinned_memory import pieces_of, to_host
from dotresize_fx.offload.pinned_streams import PinnedStreams, PinnedTensor

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8}
DTYPES |= {"U8": torch.uint8, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool}
DTYPES |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def lazy_tensors(file: Path, dtype: torch.dtype | None = None, *, checked: bool = True) -> dict[str, LazyTensor]:
    """The tensors of a safetensors file by name, floats in ``dtype`` where it is given; only the header is read.

    ``checked``: a NaN or an infinity is reported, by the file's and the tensor's name, when the tensor is first read.

    Raises:
        BadWeightsError: the header does not fit the file, or has a dtype that is not known.
    """
    try:
        with file.open("rb") as stream:
            header: Mapping[str, dict[str, list[int]]] = json.loads(
                stream.read(int.from_bytes(stream.read(8), "little"))
            )
            data, size = stream.tell(), os.fstat(stream.fileno()).st_size
            held = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        found = {}
        for name, told in header.items():
            if name == "__metadata__":
                continue
            kind, shape, (begin, end) = DTYPES[str(told["dtype"])], tuple(told["shape"]), told["data_offsets"]
            if end - begin != math.prod(shape) * kind.itemsize or data + end > size:
                raise ValueError(f"{name} lies outside of it")
            source = _view(held, kind, shape, data + begin)
            source = _checked(source, f"{file}: {name}") if checked else source
            wanted = dtype if dtype is not None and kind.is_floating_point else kind
            found[name] = LazyTensor(source, shape, wanted)
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = " ".join(str(error).split())
        raise BadWeightsError(f"{file}: truncated, damaged or of an unknown dtype ({why}): fetch it again") from error
    return found


def write_tensors(file: Path, tensors: Mapping[str, torch.Tensor]) -> int:
    """A safetensors file; one tensor at a time is in memory for it, and none is copied that is there already, the same
    numbers under two names either. Returns the file's CRC-32.
    """
    # The largest numbers first, so that all stand at a multiple of their size.
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header, end = {}, 0
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.itemsize
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    crc = 0
    with file.open("wb") as stream:
        numbers = (part for name in order for part in _parts(in_memory(tensors[name])))
        for part in chain([memoryview(len(text).to_bytes(8, "little") + text)], numbers):
            stream.write(part)
            crc = zlib.crc32(part, crc)
    return crc


def file_crc32(file: Path) -> int:
    """That of all its bytes."""
    crc = 0
    with file.open("rb") as stream:
        while part := stream.read(1 << 22):
            crc = zlib.crc32(part, crc)
    return crc


def _parts(tensor: torch.Tensor) -> Iterator[memoryview]:
    """Its bytes, each part to be used before the next is asked for; from a GPU by way of pinned memory, at several
    times the speed.
    """
    for part in pieces_of(tensor):
        there = part
        if part.is_cuda:
            there = to_host(part)
            torch.cuda.current_stream(part.device).synchronize()
        yield there.numpy().data


def _view(held: mmap.mmap, dtype: torch.dtype, shape: tuple[int, ...], offset: int) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        if not math.prod(shape):
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(held, dtype=dtype, count=math.prod(shape), offset=offset).reshape(shape)

    return read


def _checked(source: Callable[[], torch.Tensor], where: str) -> Callable[[], torch.Tensor]:
    """The same, which looks at its numbers the first time."""
    looked = False

    def read() -> torch.Tensor:
        nonlocal looked
        tensor = source()
        if not looked and tensor.is_floating_point() and tensor.numel():
            # The extremes carry any NaN or infinity, without a mask as large as the tensor.
            numbers = tensor.float() if tensor.itemsize == 1 else tensor
            if not torch.stack(numbers.aminmax()).isfinite().all():
                raise BadWeightsError(f"{where} holds NaN or infinity: the model is broken, fetch it again")
            looked = True
        return tensor

    return read


class Spool:
    """Tensors that wait in files without a name in ``folder``, each of which goes with its tensor.

    ``streams`` says where those of the sweep's streams wait: "device", that is as they are, "pinned" memory of the host
    or "files". ``weights`` holds ``held`` bytes of weights that were read.
    """

    def __init__(self, folder: Path, *, streams: str = "device", held: int = 0) -> None:
        self._folder, self.streams = folder, streams
        self.weights = HeldWeights(held)
        self._pinned = PinnedStreams() if streams == "pinned" else None

    def put_activation(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same numbers, on the same device, where the streams wait."""
        if self.streams == "device":
            return tensor
        if self._pinned is not None:
            self._pinned.begin()
        return self.put_probe(tensor)

    def expect_activations(self, sizes: Iterable[int]) -> None:
        """Of each batch its bytes: they will be put here."""
        if self._pinned is not None:
            self._pinned.expect(sizes)

    def put_probe(self, tensor: torch.Tensor) -> LazyTensor:
        """The same, of what one probe has of its own: as large as a weight."""
        return self.put(tensor) if self._pinned is None else self._pinned.put(tensor)

    def put(self, tensor: torch.Tensor) -> LazyTensor:
        """The same numbers, on the same device, once they are needed."""
        with tempfile.TemporaryFile(dir=self._folder) as stream:
            for part in _parts(tensor):
                stream.write(part)  # which tells a full disk
            stream.flush()
            # Unlike an mmap of Python's it holds no descriptor, of which there are some thousand at most.
            held = torch.from_file(f"/dev/fd/{stream.fileno()}", shared=False, size=tensor.nbytes, dtype=torch.uint8)
        shape, dtype = tuple(tensor.shape), tensor.dtype
        return LazyTensor(lambda: held.view(dtype).reshape(shape), shape, dtype, tensor.device)

    def in_turn(self, count: int, needed: Callable[[int], Iterable[Any]]) -> Iterator[int]:
        """Numbers up to ``count``. What the next one is said to need is on its way while one is worked at."""
        coming = _pinned(needed(0)) if count else []
        for i in range(count):
            now, coming = coming, _pinned(needed(i + 1)) if i + 1 < count else []
            for tensor in (*now, *coming):
                tensor.waiting.start()
            try:
                yield i
            finally:
                for tensor in now:
                    tensor.waiting.drop()
            if self._pinned is not None:
                self._pinned.worked()


def _pinned(values: Iterable[Any]) -> list[PinnedTensor]:
    return [value for value in values if isinstance(value, PinnedTensor)]
