"""A model whose parameters stay in their files, traced: torch.export takes tensors of torch's own alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from dotresize_fx.offload.lazy_tensor import LazyTensor


@contextmanager
def stand_ins(model: torch.nn.Module) -> Iterator[Callable[[torch.export.ExportedProgram], None]]:
    """Inside, lazy parameters are zeros that take no memory as long as nobody writes to them; tied ones stay tied.

    Gives what puts the lazy ones into a program that was traced meanwhile.
    """
    made: dict[int, tuple[torch.nn.Parameter, torch.Tensor]] = {}
    owners: list[tuple[torch.nn.Module, str, Any]] = []
    for module in model.modules():
        held: dict[str, Any] = module._parameters
        for name, parameter in held.items():
            if isinstance(parameter, LazyTensor):
                # The system gives numpy's zeros a page of memory each only when it is written to.
                if id(parameter) not in made:
                    zeros = torch.from_numpy(np.zeros(tuple(parameter.shape), np.float32))
                    made[id(parameter)] = torch.nn.Parameter(zeros, requires_grad=False), parameter
                owners.append((module, name, parameter))

    def put_back(program: torch.export.ExportedProgram) -> None:
        lazy = {zeros.data_ptr(): parameter for zeros, parameter in made.values()}
        state: dict[str, Any] = program.state_dict
        for key, tensor in state.items():
            if (found := lazy.get(tensor.data_ptr())) is not None:
                state[key] = found

    try:
        for module, name, parameter in owners:
            module._parameters[name] = made[id(parameter)][0]
        yield put_back
    finally:
        for module, name, parameter in owners:
            module._parameters[name] = parameter
