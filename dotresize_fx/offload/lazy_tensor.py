"""Tensors that are read from a file when something is computed with them, and are not kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch.utils._pytree import tree_map_only

from dotresize_fx.errors import UsageError
from dotresize_fx.offload.pinned_memory import on_gpu

Step = Callable[[torch.Tensor], torch.Tensor]

T: Any = torch.Tensor
# Of these no numbers are needed.
_TOLD: frozenset[Any] = frozenset(
    [
        *(
            getattr(T, name).__get__
            for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf")
        ),
        *(getattr(T, name).__get__ for name in ("grad", "grad_fn", "is_cuda", "is_meta", "is_sparse", "is_quantized")),
        *(getattr(T, name).__get__ for name in ("is_nested", "is_cpu", "itemsize", "nbytes", "_base", "output_nr")),
        *(T.size, T.dim, T.numel, T.nelement, T.stride, T.is_floating_point, T.is_complex, T.element_size, T.__len__),
        *(torch.is_floating_point, torch.is_complex, torch.numel, T.is_contiguous, T.storage_offset, T.__hash__),
    ]
)
# Done once the numbers are read, and known before by its shape alone.
_PUT_OFF: frozenset[Any] = frozenset(
    [
        *(T.t, T.transpose, T.permute, T.contiguous, T.clone, T.view, T.reshape, T.flatten, T.unsqueeze),
        *(T.mT.__get__, T.T.__get__, torch.t, torch.transpose, torch.permute),
    ]
)
_AS_IT_IS: frozenset[Any] = frozenset([T.detach, torch.detach, T.requires_grad_, T.data.__get__])
# What is read for them would be gone before they could be used.
_OF_MEMORY: frozenset[Any] = frozenset([T.data_ptr, T.untyped_storage])
_aten = torch.ops.aten
# Rows of a table, which are read alone; the table is the first argument, or the second.
_PICKS: frozenset[Any] = frozenset([_aten.embedding.default, T.index_select, torch.index_select])
_PICKS_SECOND: frozenset[Any] = frozenset([torch.nn.functional.embedding])
_LINEARS: frozenset[Any] = frozenset([_aten.linear.default, torch.nn.functional.linear])
# A linear of more bytes, the head over a large vocabulary, is computed in pieces of so many at most.
PIECE = 256 << 20
_JOINS: frozenset[Any] = frozenset([torch.stack, torch.cat])


class LazyTensor(torch.Tensor):
    """A tensor by its shape, dtype and device; its numbers come from ``source`` each time that they are needed.

    ``source()`` gives a tensor, often memory of a file; with ``dtype`` and on ``device``, ``steps``
    make of it what this tensor is. Transposes, slices, copies and moves to another device are put off. Nothing can be
    written to it.
    """

    source: Callable[[], torch.Tensor]
    steps: tuple[Step, ...]
    # Why nothing is to be read now, and once more for each read that was refused.
    refusals: ClassVar[list[str] | None] = None

    @staticmethod
    def __new__(
        cls,
        source: Callable[[], torch.Tensor],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: str | torch.device = "cpu",
        steps: tuple[Step, ...] = (),
    ) -> LazyTensor:
        where = torch.device(device)
        made: LazyTensor = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=where)
        made.source, made.steps = source, steps
        return made

    def read(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The numbers, as a tensor like any other, in ``dtype`` if given. It may be memory of a file: not to be written
        to.

        Raises:
            UsageError: inside :func:`no_reading`.
        """
        with torch.no_grad():
            stored = self._stored()
            as_stored = dtype is not None and dtype == stored.dtype  # steps change no number
            tensor = self._cast(stored, stored.dtype if as_stored else self.dtype)
            for step in self.steps:
                tensor = step(tensor)
        return tensor if dtype is None else tensor.to(dtype)

    def _stored(self) -> torch.Tensor:
        if (refusals := LazyTensor.refusals) is not None:
            refusals.append(refusals[0])
            raise UsageError(refusals[0])
        return self.source()

    def _cast(self, stored: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """On the device, in the dtype, its own unless given."""
        if self.device.type == "cuda" and stored.device.type == "cpu":
            stored = on_gpu(stored, self.device)
        return stored.to(self.device).to(dtype or self.dtype)

    def _rows(self, places: torch.Tensor) -> torch.Tensor:
        """Those of these numbers, in the shape of ``places``, of a tensor without steps."""
        return self._cast(self._stored()[places.cpu()])

    def _linear(self, func: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """What a linear makes of ``x`` with this weight, which has no steps: some of the outputs at a time."""
        stored, rows = self._stored(), max(1, PIECE // (self.shape[1] * self.itemsize))
        found = []
        for start in range(0, len(stored), rows):
            part = None if bias is None else in_memory(bias)[start : start + rows]
            found.append(func(x, self._cast(stored[start : start + rows]), part))
        return torch.cat(found, -1)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"LazyTensor({tuple(self.shape)}, {self.dtype}, {self.device})"

    def __deepcopy__(self, memo: dict[int, Any]) -> LazyTensor:
        return self

    def _then(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LazyTensor:
        shape = func(torch.empty(self.shape, dtype=self.dtype, device="meta"), *args, **kwargs).shape
        steps = (*self.steps, lambda tensor: func(tensor, *args, **kwargs))
        return LazyTensor(self.source, shape, self.dtype, self.device, steps)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in _TOLD:
                return func(*args, **kwargs)
            first: Any = args[0] if args else None
            if isinstance(first, LazyTensor):
                if func in _AS_IT_IS or (func is T.__getitem__ and _is_all(args[1])):
                    return first  # of a step nothing could be read in part
                if func in _OF_MEMORY:
                    raise TypeError(f"{func.__name__}: a tensor that is read when it is needed has no memory")
                if func is T.to:
                    device, dtype, *_ = torch._C._nn._parse_to(*args[1:], **kwargs)
                    if dtype in (None, first.dtype):
                        same = device is None or torch.device(device) == first.device
                        return (
                            first if same else LazyTensor(first.source, first.shape, first.dtype, device, first.steps)
                        )
                if func in _PUT_OFF or (func is T.__getitem__ and _is_plain(args[1])):
                    return first._then(func, args[1:], kwargs)
                name = getattr(func, "__name__", "")
                if name in ("__setitem__", "__set__") or (name.endswith("_") and not name.endswith("__")):
                    raise TypeError(f"{name}: what a file holds cannot be written to")
            if func in _PICKS or func in _PICKS_SECOND or func in _LINEARS:
                found = _in_part(func, args, kwargs)
                if found is not None:
                    return found
            if func in _JOINS and all(isinstance(part, LazyTensor) for part in first):
                return _joined(func, tuple(first), args[1:], kwargs)
            args, kwargs = tree_map_only(LazyTensor, LazyTensor.read, (tuple(args), kwargs))
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return args[0]
        args, kwargs = tree_map_only(LazyTensor, LazyTensor.read, (tuple(args), kwargs or {}))
        return func(*args, **kwargs)


def _in_part(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """What an op gives that needs no more than a part of its weight in memory at once; None where it takes it whole."""
    if func in _LINEARS:
        x, weight, *rest = args
        large = isinstance(weight, LazyTensor) and not weight.steps and weight.ndim == 2 and weight.nbytes > PIECE
        return weight._linear(func, in_memory(x), rest[0] if rest else kwargs.get("bias")) if large else None
    if func is torch.nn.functional.embedding or func is _aten.embedding.default:
        places, table = args[:2] if func in _PICKS_SECOND else (args[1], args[0])
        if kwargs.get("max_norm") is not None:
            return None
    else:
        table, axis, places = args[:3] if len(args) > 2 else (None, None, None)
        if axis != 0:
            return None
    return table._rows(in_memory(places)) if isinstance(table, LazyTensor) and not table.steps else None


def _joined(func: Any, parts: tuple[LazyTensor, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> LazyTensor:
    """Stacked or concatenated, once it is needed."""
    told = func([torch.empty(part.shape, dtype=part.dtype, device="meta") for part in parts], *args, **kwargs)
    device = parts[0].device
    return LazyTensor(lambda: func([p.read() for p in parts], *args, **kwargs), told.shape, told.dtype, device)


def _is_all(index: Any) -> bool:
    return index is ... or (isinstance(index, tuple) and len(index) == 1 and index[0] is ...)


def _is_plain(index: Any) -> bool:
    """Whether an index is of numbers and slices alone."""
    return all(
        part is ... or isinstance(part, (int, slice)) for part in (index if isinstance(index, tuple) else [index])
    )


def in_memory(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or what is read for one that is lazy."""
    return tensor.read() if isinstance(tensor, LazyTensor) else tensor


@contextmanager
def no_reading(why: str) -> Iterator[Callable[[], bool]]:
    """Inside, what asks a lazy tensor for its numbers is refused with this reason; gives whether something was."""
    refusals = [why]
    before, LazyTensor.refusals = LazyTensor.refusals, refusals
    try:
        yield lambda: len(refusals) > 1
    finally:
        LazyTensor.refusals = before
