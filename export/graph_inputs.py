"""What a graph wants fed: shapes in terms of batch, length and past, and arrays made for given ones."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dotresize_fx.errors import UsageError

if TYPE_CHECKING:  # the child that makes the arrays does without
    import onnx

Array = np.ndarray[Any, Any]
Dim = int | Literal["batch", "length", "past", "total"]
Fill = Literal["ids", "ones", "positions", "normal"]
_DTYPES = {1: "float32", 6: "int32", 7: "int64", 9: "bool", 10: "float16", 11: "float64"}
_PAST = re.compile(r"^past(_key_values)?(?=[._])")


@dataclass(frozen=True)
class InputPlan:
    """One input. ``dims`` are numbers, or ``batch``, ``length`` (of new tokens), ``past`` (tokens cached before) and
    ``total``, which is both. ``ids`` are below ``rows``. ``present`` is the output that a cache grows into, if any.
    """

    name: str
    dtype: str
    dims: tuple[Dim, ...]
    fill: Fill
    rows: int = 1
    cache: bool = False
    present: str | None = None

    def shape(self, batch: int, length: int, past: int) -> tuple[int, ...]:
        sizes = {"batch": batch, "length": length, "past": past, "total": past + length}
        return tuple(sizes[dim] if isinstance(dim, str) else dim for dim in self.dims)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> InputPlan:
        return cls(**{**content, "dims": tuple(content["dims"])})


def make_inputs(plans: Iterable[InputPlan], batch: int, length: int, past: int, seed: int = 0) -> dict[str, Array]:
    """Arrays for one run over ``length`` tokens behind ``past`` cached ones; the same for the same arguments."""
    generator = np.random.default_rng(seed)
    made: dict[str, Array] = {}
    for plan in plans:
        shape = plan.shape(batch, length, past)
        array: Array
        if plan.fill == "ids":
            array = generator.integers(0, plan.rows, shape)
        elif plan.fill == "positions":
            array = np.broadcast_to(np.arange(past, past + (shape[-1] if shape else 1)), shape)
        elif plan.fill == "ones":
            array = np.ones(shape)
        else:
            array = generator.standard_normal(shape, np.float32)
        made[plan.name] = np.ascontiguousarray(array.astype(plan.dtype))
    return made


def plan_inputs(graph: onnx.GraphProto, where: str) -> list[InputPlan]:
    """The inputs that ``graph`` has to be given, in its order; ``where`` names it in errors.

    Inputs called ``past...`` are a cache, and the output called ``present...`` alike is what it grows into. Of the
    others a free first axis is the batch, a free later one the length, the last one of a mask all tokens.

    Raises:
        UsageError: no input, or one without a declared shape or of a type that is not made here.
    """
    given = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in given]
    outputs = {value.name for value in graph.output}
    cached = any(_PAST.match(value.name) for value in inputs)
    if not inputs:
        raise UsageError(f"{where} takes no input, so that there is nothing to vary: give a model that reads something")
    plans = []
    for value in inputs:
        kind = value.type.tensor_type
        if not value.type.HasField("tensor_type") or not kind.HasField("shape") or kind.elem_type not in _DTYPES:
            raise UsageError(
                f"{where}: input {value.name} has no shape or a type that is not made here: float, int, bool"
            )
        dtype = _DTYPES[kind.elem_type]
        sizes = [dim.dim_value if dim.HasField("dim_value") else None for dim in kind.shape.dim]
        cache = bool(_PAST.match(value.name))
        dims = tuple(_dim(value.name, axis, sizes, cache, cached) for axis in range(len(sizes)))
        present = _PAST.sub("present", value.name)
        rows = _rows(graph, value.name)
        plans.append(
            InputPlan(
                name=value.name,
                dtype=dtype,
                dims=dims,
                fill=_fill(value.name, dtype, cache),
                rows=rows,
                cache=cache,
                present=present if cache and present in outputs else None,
            )
        )
    return plans


def _dim(name: str, axis: int, sizes: Sequence[int | None], cache: bool, cached: bool) -> Dim:
    size = sizes[axis]
    if size is not None:
        return size
    if axis == 0 and len(sizes) > 1:
        return "batch"
    if cache:
        return "past"
    return "total" if cached and "mask" in name and axis == len(sizes) - 1 else "length"


def _fill(name: str, dtype: str, cache: bool) -> Fill:
    if "mask" in name or dtype == "bool":
        return "ones"  # of a mask that is added too: scores that all rise by one change nothing
    if dtype.startswith("float") or cache:
        return "normal"
    return "positions" if "position" in name else "ids"


def _rows(graph: onnx.GraphProto, name: str) -> int:
    """Of the smallest table that ``name`` picks rows of; 1 where it picks none, which makes it zeros."""
    names = {name}
    sizes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    found = []
    for node in graph.node:  # in topological order
        if node.op_type in ("Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze") and node.input[0] in names:
            names.update(node.output)
        if node.op_type in ("Gather", "GatherBlockQuantized") and node.input[1] in names and node.input[0] in sizes:
            found.append(sizes[node.input[0]][0])
    return min(found, default=1)
