"""The cases of ``benchmarks/kernels.py`` under pytest-benchmark, S0 by default.

pytest benchmarks --benchmark-only
pytest benchmarks --benchmark-only -k 'depthwise_conv and cpp' --benchmark-compare
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import kernels
from benchmarks.harness.agreement import disagreement
from benchmarks.harness.cases import cases

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = {
    f"{case.op}-{name}-{case.label}": (case, name)
    for case in cases("s0", DEVICE)
    for name in kernels.contestants(case.op, DEVICE)
}


@pytest.mark.parametrize("key", CASES)
def test_kernel(benchmark, key):
    case, name = CASES[key]
    runs = kernels.contestants(case.op, DEVICE)
    assert not disagreement(case, runs, DEVICE)
    arguments = case.make(DEVICE)

    def call():
        runs[name](*arguments)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{case.op} {case.label}"
    benchmark(call)
