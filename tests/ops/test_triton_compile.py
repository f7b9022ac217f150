"""Every Triton kernel compiles for GPUs that are not here, without spills and with 16-byte loads."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

import revkernels  # noqa: E402
from revkernels.triton import COMPOSED, INTERPRETED, LAUNCHERS  # noqa: E402

ROOT = Path(__file__).parents[2]
PACKAGES = Path(revkernels.__file__).parents[1]  # of the package under test, installed or not
ELEMENTWISE = {"couple_identity_kernel", "couple_upsampled_kernel", "dequantize_kernel"}
ELEMENTWISE |= {"bn_act_kernel", "bn_act_grad_kernel"}
REDUCTIONS = {"couple_adjoint_identity_kernel", "couple_adjoint_upsampled_kernel", "bn_stats_kernel"}
REDUCTIONS |= {"bn_act_squeeze_kernel", "bn_act_grad_sums_kernel"}
SMALL = {"product_kernel", "fold_kernel", "bn_stats_merge_kernel", "bn_fold_kernel", "bn_fold_grad_kernel"}
COMPILE = """
import json
from dataclasses import asdict
from revkernels.triton.compile import report
wanted = lambda op, configuration: configuration.endswith(("56x56", "48-12", "fp32 48"))
print(json.dumps([asdict(row) for row in report(wanted=wanted)]))
"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The largest level of the smallest network, and its squeeze-excite; in a process that really compiles."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "PYTHONPATH": str(PACKAGES)}
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, env=environment, cwd=PACKAGES, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_op_compiles_for_both_architectures(rows):
    ops = LAUNCHERS.keys() - COMPOSED
    assert {(r["op"], r["architecture"]) for r in rows} == {(op, a) for op in ops for a in ("sm_80", "sm_90")}
    assert {r["kernel"] for r in rows} <= ELEMENTWISE | REDUCTIONS | SMALL


def test_couplings_compile_for_int16_streams(rows):
    kernels = {"couple_identity_kernel", "couple_upsampled_kernel"}
    assert {r["kernel"] for r in rows if r["configuration"].startswith("int16 stream")} == kernels


def test_nothing_spills(rows):
    assert [r for r in rows if r["spill_bytes"] or r["registers"] > 128] == []


def test_kernels_bound_by_bandwidth_load_and_store_16_bytes_at_a_time(rows):
    bound = [r for r in rows if r["kernel"] in ELEMENTWISE | REDUCTIONS]
    assert {r["kernel"] for r in bound} == ELEMENTWISE | REDUCTIONS
    assert [r for r in bound if r["widest_load"] != 16] == []
    assert [r for r in bound if r["kernel"] in ELEMENTWISE and r["widest_store"] != 16] == []


def test_the_committed_table_covers_every_op_and_has_no_spill():
    with (ROOT / "benchmarks/results/triton_resources.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert {r["op"] for r in table} == LAUNCHERS.keys() - COMPOSED
    assert {r["architecture"] for r in table} == {"sm_80", "sm_90"}
    assert [r for r in table if int(r["spill_bytes"])] == []


@pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled in this process")
def test_the_interpreter_is_refused_with_the_way_out():
    from revkernels.triton.compile import report

    with pytest.raises(RuntimeError, match="unset it"):
        next(report())
