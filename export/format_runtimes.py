"""Other runtimes than ONNX Runtime for plain ONNX, in the child: a file as a callable on arrays by input name.

Nothing of them is imported before a file is opened.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dotresize_fx.cache_names import PAST
from dotresize_fx.export.onnx_session import OnnxModel

if TYPE_CHECKING:
    import torch

Array = np.ndarray[Any, Any]
GENAI_FILE = "genai_config.json"
Model = Callable[[Mapping[str, Array]], list[Array]]


class Pt2Model:
    """A .pt2 in torch, with the conditions on its inputs that come with it; ``inputs`` in the order of the program's.

    Raises what :func:`dotresize_fx.export.program_file.load_program_file` does, which unpickles nothing.
    """

    def __init__(self, path: Path, threads: int) -> None:
        import torch

        from dotresize_fx.export.program_file import load_program_file

        torch.set_num_threads(threads)
        program = load_program_file(path).program
        assert program is not None
        self._program, self._module = program, program.module()

    def __call__(self, inputs: Mapping[str, Array]) -> list[Array]:
        import torch
        from torch.utils import _pytree as pytree

        arrays = iter(inputs.values())
        leaves = [
            _tensor(next(arrays)) if isinstance(value, torch.Tensor) else value
            for value in pytree.tree_leaves(self._program.example_inputs)
        ]
        args, kwargs = pytree.tree_unflatten(leaves, self._program.call_spec.in_spec)
        with torch.no_grad():
            outputs = pytree.tree_leaves(self._module(*args, **kwargs))
        return [output.numpy() for output in outputs if isinstance(output, torch.Tensor)]


class OpenVinoModel:
    """An OpenVINO IR on the CPU, in float32 where the machine has something faster too."""

    def __init__(self, path: Path, threads: int) -> None:
        import openvino

        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
        self._model = openvino.Core().compile_model(str(path), "CPU", settings)
        # It drops inputs that nothing reads.
        self._taken = {name for port in self._model.inputs for name in port.get_names()}

    def __call__(self, inputs: Mapping[str, Array]) -> list[Array]:
        given = {name: np.ascontiguousarray(value) for name, value in inputs.items() if name in self._taken}
        found = self._model(given)
        return [found[index] for index in range(len(self._model.outputs))]


class ExecutorchModel:
    """A .pte; how many threads it takes is its own."""

    def __init__(self, path: Path, threads: int) -> None:
        from executorch.runtime import Runtime

        self._program = Runtime.get().load_program(path)
        self._method = self._program.load_method("forward")

    def __call__(self, inputs: Mapping[str, Array]) -> list[Array]:
        outputs = self._method.execute([_tensor(value) for value in inputs.values()])
        return [output.numpy().copy() for output in outputs]  # the next run writes where these lie


class GenaiModel:
    """An ONNX that ONNX Runtime GenAI's builder wrote: logits alone, the last token's behind the others' cache."""

    def __init__(self, path: Path, threads: int) -> None:
        self._model = OnnxModel(path, threads=threads)
        decoder = json.loads((path.parent / GENAI_FILE).read_text(encoding="utf-8"))["model"]["decoder"]
        self._heads, self._size = decoder["num_key_value_heads"], decoder["head_size"]

    def __call__(self, inputs: Mapping[str, Array]) -> list[Array]:
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        past = ids.shape[1] - 1
        names = [name for name in self._model.input_names if name.startswith(PAST)]
        empty = dict.fromkeys(names, np.empty((len(ids), self._heads, 0, self._size), np.float32))
        if not past:
            return [self._run(ids, mask, empty)[0]]
        before = self._run(ids[:, :past], mask[:, :past], empty)
        results = dict(zip(self._model.output_names, before, strict=True))
        cache = {name: results[name.replace(PAST, "present")] for name in names}
        behind = self._run(ids[:, past:], mask, cache)
        return [np.concatenate([before[0], behind[0]], 1)]

    def _run(self, ids: Array, mask: Array, cache: Mapping[str, Array]) -> list[Array]:
        first = mask.shape[1] - ids.shape[1]
        given = {"input_ids": ids, "attention_mask": mask, **cache}
        given["position_ids"] = np.broadcast_to(np.arange(first, mask.shape[1]), ids.shape)
        taken = {name: np.ascontiguousarray(value) for name, value in given.items() if name in self._model.input_names}
        return self._model(taken)


RUNTIMES: dict[str, Callable[[Path, int], Model]] = {
    "pt2": Pt2Model,
    "openvino": OpenVinoModel,
    "executorch": ExecutorchModel,
    "genai": GenaiModel,
}


def _tensor(array: Array) -> torch.Tensor:
    """Contiguous; of what is empty numpy has strides that no tensor has."""
    import torch

    dense = np.ascontiguousarray(array)
    tensor = torch.from_numpy(dense)
    return tensor if dense.size else torch.empty(dense.shape, dtype=tensor.dtype)
