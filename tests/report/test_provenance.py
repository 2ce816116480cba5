"""Versions and machine are those of this very process."""

from __future__ import annotations

import platform

import numpy
import torch

from dotresize_fx.report.provenance import package_versions, this_machine


def test_versions_are_the_imported_ones() -> None:
    versions = package_versions()
    assert list(versions) == ["python", "torch", "transformers", "onnx", "onnxruntime", "numpy"]
    assert versions["python"] == platform.python_version()
    assert versions["numpy"] == numpy.__version__
    # The installed distribution may leave out the local part, "+cpu".
    assert torch.__version__.startswith(versions["torch"].partition("+")[0])


def test_machine_names_a_cpu() -> None:
    machine = this_machine(3)
    assert machine.threads == 3
    assert machine.cpu.strip()
    assert machine.platform == platform.platform()
