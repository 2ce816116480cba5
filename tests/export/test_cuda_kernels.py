"""The model that times one product on a GPU: as many copies as fit, each with factors of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from dotresize_fx.errors import MissingExtraError
from dotresize_fx.export.cuda_kernels import MOST, cuda_device, timed_on_cuda, write_copies
from dotresize_fx.export.graph_inputs import make_inputs
from dotresize_fx.export.kernel_times import kernel_times
from dotresize_fx.export.onnx_session import CUDA
from dotresize_fx.export.peak_memory import CudaMemory
from dotresize_fx.export.region_kernels import Kernel
from dotresize_fx.progress import Progress


@pytest.mark.parametrize("kernel", [Kernel(3, 8, 5), Kernel(2, 4, 6, groups=3)])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_copy_is_multiplied(kernel: Kernel, dtype: str, tmp_path: Path) -> None:
    path, plans, copies = write_copies(kernel, dtype, tmp_path)
    onnx.checker.check_model(str(path), full_check=True)
    assert copies == MOST
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    inputs = make_inputs(plans, 1, 1, 0)
    outputs = session.run(None, inputs)
    front = (kernel.groups,) if kernel.groups else ()
    assert [output.shape for output in outputs] == [(*front, kernel.rows, kernel.columns)] * copies
    assert {output.dtype for output in outputs} == {np.dtype(dtype)}
    assert len({output.tobytes() for output in outputs}) == copies  # no two are one to the runtime


@pytest.mark.skipif(CudaMemory().name is not None, reason="there is a GPU")
def test_without_a_gpu_one_line_says_so() -> None:
    with pytest.raises(MissingExtraError, match="--target cpu"):
        cuda_device()


@pytest.mark.gpu
def test_a_larger_product_takes_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    small, large = Kernel(2048, 4096, 4096), Kernel(2048, 4096, 14336)
    found = timed_on_cuda([small, large], 1, "float16", tmp_path, lambda: None)
    assert found[str(large)] > 2 * found[str(small)]  # 3.5 times as much
    kept = kernel_times([small, large], 1, Progress(quiet=True), provider=CUDA, dtype="float16")
    assert kept[large] > 2 * kept[small]
