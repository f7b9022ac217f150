"""What a training step compiles: nothing more for another batch or another size of image."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from tests.null_gpu import Unavailable, environment  # noqa: E402

ROOT = Path(__file__).parents[2]
SIZES = [64, 96, (64, 96), 128, (160, 32), (192, 64), (32, 224), (96, 32), (32, 256), (32, 352)]
FORMATS = {"float32": ("float32", None, 16), "bfloat16-fixed16": ("bfloat16", "fixed16", 20)}
STEPS = """
import sys
sys.path.append(sys.path.pop(0))  # an installed revbifpn comes first, the working directory after it
import json, torch
from revbifpn import fast

dtype, device = getattr(torch, {dtype!r}), {device!r}
torch.manual_seed(0)
model = fast.revbifpn_s0(stream={stream!r}).to(device).train()
model.rev_stack.self_check = False

def step(batch, size):
    height, width = size if isinstance(size, list) else (size, size)
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        out = model(torch.randn(batch, 3, height, width, device=device))
    out.float().sum().backward()
"""
RECORDED = """
from revkernels.triton.compile import specialisation
from revkernels.warm import launches_of
found = [{{specialisation(launch) for launch in launches_of(lambda: step(*one))}} for one in json.loads({steps!r})]
print(json.dumps([len(found[0]), [len(one - found[0]) for one in found[1:]]]))
"""
COMPILED = """
from triton import knobs
counts = []
def compiled(*, cache_hit, **event):
    counts[-1] += not cache_hit
knobs.compilation.listener = compiled
for one in json.loads({steps!r}):
    counts.append(0)
    step(*one)
print(json.dumps([counts[0], counts[1:]]))
"""


def _found(code, command, variables, *, name, device):
    dtype, stream, _ = FORMATS[name]
    steps = [(2, SIZES[0]), *((batch, SIZES[0]) for batch in (1, 3, 5)), *((2, size) for size in SIZES[1:])]
    values = dict(dtype=dtype, stream=stream, device=device, steps=json.dumps(steps))
    ours = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | variables
    command = [sys.executable, *command, "-c", (STEPS + code).format(**values)]
    done = subprocess.run(command, env=ours, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", FORMATS)
def test_another_batch_or_size_needs_no_further_specialisation(name):
    first, later = _found(RECORDED, [], {}, name=name, device="cpu")
    assert 0 < first <= FORMATS[name][2]
    assert not any(later)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_another_batch_or_size_compiles_nothing_on_a_gpu(name, tmp_path):
    try:
        variables = environment(kernels=False) | {"TRITON_CACHE_DIR": str(tmp_path)}
    except Unavailable as error:
        pytest.skip(str(error))
    command = ["-m", "tests.null_gpu", "--no-kernels"]
    first, later = _found(COMPILED, command, variables, name=name, device="cuda")
    assert 0 < first <= FORMATS[name][2]
    assert not any(later)
