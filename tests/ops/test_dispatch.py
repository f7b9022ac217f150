"""Which GPUs the CUDA kernels have code for."""

import pytest

from revkernels import dispatch

BUILT = "7.5;8.0;8.6;9.0a+PTX"


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 1)])
def test_a_gpu_runs_its_own_major_version_and_newer_ones_run_ptx(capability):
    assert dispatch.why_no_code(BUILT, capability) == ""


@pytest.mark.parametrize(("built", "capability"), [(BUILT, (7, 0)), ("8.6;9.0", (8, 0)), ("8.0;9.0", (12, 0))])
def test_other_gpus_are_refused_with_what_to_do(built, capability):
    version = ".".join(map(str, capability))
    reason = dispatch.why_no_code(built, capability)
    assert f"capability {version}" in reason and f"TORCH_CUDA_ARCH_LIST={version}" in reason and built in reason
