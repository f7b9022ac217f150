"""Frameworks beside whatever torch is here; a file of tests is skipped where one is missing or cannot run."""

import importlib.util
from types import ModuleType

import pytest

from benchmarks.harness import rivals


def on_torchvision(module: str) -> ModuleType:
    """A module that imports torchvision, also where its compiled ops do not load (PyPI's, beside a CPU torch)."""
    if importlib.util.find_spec("timm") is not None:
        rivals.import_timm()
    return pytest.importorskip(module)


def torchvision(module: str) -> ModuleType:
    """A module of torchvision, whose compiled ops detectors call."""
    try:
        extension = pytest.importorskip("torchvision.extension")
    except RuntimeError as error:  # compiled for another torch
        pytest.skip(str(error), allow_module_level=True)
    if not extension._has_ops():
        pytest.skip("torchvision's compiled ops are for another torch", allow_module_level=True)
    return pytest.importorskip(module)
