"""Every Triton kernel compiles for GPUs that are not here, without spills and with 16-byte loads."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

import revkernels  # noqa: E402
from revkernels.triton import INTERPRETED, LAUNCHERS  # noqa: E402
from tests.marks import slow  # noqa: E402

ROOT = Path(__file__).parents[2]
PACKAGES = Path(revkernels.__file__).parents[1]  # of the package under test, installed or not
ELEMENTWISE = {"couple_identity_kernel", "couple_upsampled_kernel"}
DUAL_RESIDUAL = {"dual_residual_kernel", "dual_residual_integer_kernel", "dual_residual_adjoint_kernel"}
REDUCTIONS = {"couple_adjoint_identity_kernel", "couple_adjoint_upsampled_kernel"}
SMALL = {"fold_kernel"}
COMPILE = """
import json
from dataclasses import asdict
from revkernels.triton.compile import report
wanted = lambda op, configuration: configuration.endswith(%r)
print(json.dumps([asdict(row) for row in report((%d,), wanted)]))
"""
WANTED = ("56x56",)  # the largest level of the smallest network


@pytest.fixture(scope="module", params=slow([90, 80]), ids="sm_{}".format)
def rows(request, pytestconfig):
    """What the wanted configurations take on an architecture, in a process that really compiles."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(pytestconfig.cache.mkdir("triton")), "PYTHONPATH": str(PACKAGES)}
    command = [sys.executable, "-c", COMPILE % (WANTED, request.param)]
    done = subprocess.run(command, env=environment, cwd=PACKAGES, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_op_compiles(rows):
    assert {r["op"] for r in rows} == LAUNCHERS.keys()
    assert {r["kernel"] for r in rows} <= ELEMENTWISE | REDUCTIONS | SMALL | DUAL_RESIDUAL


def test_couplings_compile_for_int16_streams(rows):
    kernels = {"couple_identity_kernel", "couple_upsampled_kernel"}
    int16 = {r["kernel"] for r in rows if r["configuration"].startswith("int16 stream")}
    assert {kernel for kernel in int16 if kernel.startswith("couple")} == kernels


def test_nothing_spills(rows):
    assert [r for r in rows if r["spill_bytes"] or r["registers"] > 128] == []


def test_kernels_bound_by_bandwidth_load_and_store_16_bytes_at_a_time(rows):
    bound = [r for r in rows if r["kernel"] in ELEMENTWISE | REDUCTIONS]
    assert {r["kernel"] for r in bound} == ELEMENTWISE | REDUCTIONS
    assert [r for r in bound if r["widest_load"] != 16] == []
    assert [r for r in bound if r["kernel"] in ELEMENTWISE and r["widest_store"] != 16] == []


def test_the_committed_table_is_of_these_kernels(rows):
    """The same launches; and the same resources, where the table was made by the Triton that is here."""
    with (ROOT / "benchmarks/results/triton_resources.csv").open(newline="") as file:
        table = [r for r in csv.DictReader(file) if r["configuration"].endswith(WANTED)]
    same_triton = {r["triton"] for r in table} == {triton.__version__}

    def resources(rows):
        names = rows[0].keys() if same_triton else ("op", "configuration", "kernel", "architecture", "num_warps")
        return sorted(tuple(str(r[name]) for name in names) for r in rows)

    (architecture,) = {r["architecture"] for r in rows}
    found = [{name: r[name] for name in rows[0]} for r in table if r["architecture"] == architecture]
    assert resources(found) == resources(rows), "python -m revkernels.triton.compile writes it anew"


@pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled in this process")
def test_the_interpreter_is_refused_with_the_way_out():
    from revkernels.triton.compile import report

    with pytest.raises(RuntimeError, match="unset it"):
        next(report())


@pytest.mark.slow
@pytest.mark.parametrize("options", ["float32", "bfloat16 --stream fixed16", "bfloat16 --stream float32"])
@pytest.mark.parametrize("scale", ["s0", "s3"])
def test_every_launch_of_a_step_compiles_down_to_one_pixel_maps(scale, options, tmp_path):
    """Images of 32 pixels have maps of one pixel: integers that are 1 must not become constants that cannot compile."""
    code = "from revkernels import warm; warm.SIZES = (32, 96); warm.main()"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(PACKAGES)}
    command = [sys.executable, "-c", code, "--scales", scale, "--dtype", *options.split()]
    done = subprocess.run(command, env=environment, cwd=PACKAGES, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "kernels are in Triton's cache for sm_90" in done.stdout
