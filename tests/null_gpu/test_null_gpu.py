"""The GPU that does nothing: what it counts, what it refuses, and what it says of a call that it does not have."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.null_gpu import Unavailable, environment

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run():
    """``run(code, devices=1)``: a process on the null GPU; its ``report(value)`` is what comes back."""
    try:
        variables = {n: environment(devices=n, kernels=False) for n in (1, 2)}
    except Unavailable as error:
        pytest.skip(str(error))

    def call(code, devices=1, check=True):
        head = "import json, torch\nfrom tests.null_gpu import counts\nreport = lambda v: print(json.dumps(v))\n"
        command = [sys.executable, "-m", "tests.null_gpu", "--no-kernels", "-c", head + code]
        done = subprocess.run(command, env=os.environ | variables[devices], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 or not check, done.stderr
        return json.loads(done.stdout.splitlines()[-1]) if check else done

    return call


def test_launches_products_copies_and_synchronisations_are_counted(run):
    found = run("""
x = torch.ones(4, 4).cuda()
x @ x
before = counts()
y = (x @ x).add_(1)
y.cpu()
torch.cuda.synchronize()
report({k: n - before[k] for k, n in counts().items()})
""")
    assert (found["products"], found["launches"], found["copies"]) == (1, 1, 1)
    assert found["synchronisations"] == 2
    assert found["allocations"] == found["captured"] == 0


def test_work_is_counted_on_the_device_that_is_asked(run):
    code = "x = torch.zeros(4, device='cuda:1'); x += 1; report([counts(0)['launches'], counts(1)['launches']])"
    assert run(code, devices=2) == [0, 2]


def test_memory_ends_where_a_gpus_would(run):
    code = """
try:
    torch.empty(81 << 30, dtype=torch.uint8, device="cuda")
except torch.cuda.OutOfMemoryError:
    report(True)
"""
    assert run(code) is True


def test_a_captured_step_is_one_launch(run):
    found = run("""
x, w = torch.zeros(8, 8, device="cuda"), torch.zeros(8, 8, device="cuda")
side = torch.cuda.Stream()
def step():
    y = (x @ w).add_(1)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        y.mul_(2)
    torch.cuda.current_stream().wait_stream(side)
step()
graph = torch.cuda.CUDAGraph()
before = counts()
with torch.cuda.graph(graph):
    step()
captured = counts()
graph.replay()
replayed = counts()
report([{k: b[k] - a[k] for k in a} for a, b in ((before, captured), (captured, replayed))])
""")
    capture, replay = found
    assert capture["captured"] == 3 and capture["launches"] == capture["products"] == 0
    assert replay["graph_launches"] == 1 and replay["launches"] == replay["products"] == 0


@pytest.mark.parametrize("wrong", ["torch.cuda.synchronize()", "x.cpu()", "x.sum().item()"])
def test_waiting_in_a_capture_fails_and_ends_it(run, wrong):
    code = f"""
x = torch.zeros(8, device="cuda")
try:
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        x += 1
        {wrong}
except Exception as error:
    report(str(error))
x += 1
"""
    assert "capturing" in run(code) or "capture" in run(code)


def test_a_call_that_it_does_not_have_is_named(run):
    done = run("x = torch.zeros(4, 4, dtype=torch.complex64, device='cuda'); x @ x", check=False)
    assert done.returncode != 0
    assert "cublasCgemm" in done.stderr
