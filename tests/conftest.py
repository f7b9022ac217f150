"""Before anything imports revkernels: without a GPU, Triton's kernels run under its interpreter on CPU tensors."""

import gc
import os
import sys
import weakref
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)  # the tests' maps are tiny, and runners are shared

sys.path.append(str(Path(__file__).parents[1]))  # benchmarks/ is not installed; what is installed comes first

from tests.marks import leave_out  # noqa: E402


def pytest_configure(config):
    """Hypothesis tries more examples where slow tests are asked for."""
    if config.pluginmanager.has_plugin("hypothesispytest"):
        from hypothesis import settings

        settings.register_profile("default run", max_examples=5, deadline=None)
        settings.register_profile("full run", max_examples=60, deadline=None)
        settings.load_profile("default run" if config.option.markexpr == "not slow" else "full run")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks
def pytest_cmdline_main(config):
    """The whole suite runs in one process per core, where pytest-xdist is installed; ``-n 0`` for one process."""
    whole = config.args == config.getini("testpaths") and "PYTEST_XDIST_WORKER" not in os.environ
    if whole and getattr(config.option, "numprocesses", 0) is None:
        config.option.numprocesses = "auto"


@pytest.hookimpl(tryfirst=True)  # before ``-m`` selects
def pytest_collection_modifyitems(config, items):
    if dropped := set(leave_out(items)):
        config.hook.pytest_deselected(items=list(dropped))
        items[:] = [item for item in items if item not in dropped]


@pytest.fixture
def passes(monkeypatch):
    """Weak references to what owns the streams of each pass, reversible or stored; the cycle collector is off."""
    from revbifpn.engine.state import State
    from revbifpn.engine.tape import Stored

    made = []

    def recorded(init):
        def run(self, *args, **kwargs):
            init(self, *args, **kwargs)
            made.append(weakref.ref(self))

        return run

    for owner in (State, Stored):
        monkeypatch.setattr(owner, "__init__", recorded(owner.__init__))
    gc.collect()
    gc.disable()
    yield made
    gc.enable()
