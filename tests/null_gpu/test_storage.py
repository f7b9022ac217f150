"""On a GPU too an op names the tensor whose storage was freed or is too short: every op, every tensor argument."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.null_gpu import Unavailable, environment

ROOT = Path(__file__).parents[2]
WALK = """
import json, re, torch
from revkernels.registry import OPS
from tests.ops.test_storage import EVERY_TENSOR, arguments_of, get, put

def moved(value):
    if isinstance(value, torch.Tensor):
        return value.cuda()
    return [moved(v) for v in value] if isinstance(value, list) else value

wrong = []
for op, name, position, index, _ in EVERY_TENSOR:
    for left in (0, 1):
        arguments = [moved(argument) for argument in arguments_of(op)]
        tensor = get(arguments, position, index).clone()
        storage = tensor.untyped_storage()
        storage.resize_(left * (storage.nbytes() - 1))
        put(arguments, position, index, tensor)
        try:
            OPS[op].overload(*arguments)
            message = "nothing is said"
        except RuntimeError as error:
            message = str(error)
        if not re.search(rf"\\\\b{name}: expected a storage of at least", message):
            wrong.append([op, name, left, message])
print(json.dumps(wrong))
"""


@pytest.mark.slow
def test_a_tensor_without_its_storage_is_refused_by_name():
    """Compiles the CUDA kernels where the cache does not have them."""
    try:
        variables = environment()
    except Unavailable as error:
        pytest.skip(str(error))
    command = [sys.executable, "-m", "tests.null_gpu", "-c", WALK.replace("\\\\", "\\")]
    done = subprocess.run(command, env=os.environ | variables, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []
