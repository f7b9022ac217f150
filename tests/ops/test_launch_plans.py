"""Launches of the couplings: looked up, correct for what they depend on, and compiled once for all sizes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from revkernels.triton import couple  # noqa: E402
from revkernels.triton.tiles import specialised_on_nothing  # noqa: E402
from tests.null_gpu import Unavailable, environment  # noqa: E402

ROOT = Path(__file__).parents[2]
CHILD = """
import json, torch
from unittest import mock
from triton import knobs
from triton.runtime.jit import JITFunction
from revkernels.triton import LAUNCHERS, couple
from tests.null_gpu import counts

compiled, ordinary, run = [], [], JITFunction.run
knobs.compilation.listener = lambda **event: compiled.append(event["src"].fn.__name__)

def counted(self, *args, **kwargs):
    if not kwargs["warmup"]:
        ordinary.append(self.__name__)
    return run(self, *args, **kwargs)

JITFunction.run = counted

def launch(factors, n=8, size=(56, 56), dtype=torch.float32, device="cuda", skew=0, c=4, subtract=False):
    def zeros(*shape):
        flat = torch.zeros(skew + torch.Size(shape).numel(), dtype=dtype, device=device)
        return flat[skew:].view(shape)
    h, w = size
    y, v = zeros(n, c, h, w), torch.zeros(c, device=device)
    p = [zeros(n, c, h // f, w // f) for f in factors]
    before = counts()["driver_launches"], len(compiled), len(ordinary)
    LAUNCHERS["couple_"](y, p, [v] * len(p), [v] * len(p), list(factors), "bilinear", subtract)
    LAUNCHERS["couple_adjoint"](y, p, [v] * len(p), list(factors), "bilinear")
    after = counts()["driver_launches"], len(compiled), len(ordinary)
    return [b - a for a, b in zip(before, after)]  # launches, compilations, ordinary launches
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Code in a process on two null GPUs, with an empty cache of Triton."""
    try:
        variables = environment(devices=2, kernels=False)
    except Unavailable as error:
        pytest.skip(str(error))
    variables |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}

    def call(code):
        command = [sys.executable, "-m", "tests.null_gpu", "--no-kernels", "-c", CHILD + code]
        done = subprocess.run(command, env=os.environ | variables, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return call


def test_the_same_call_again_is_launched_without_binding_arguments(run):
    first, again, subtracted = run("""
factors = (1, 2)
print(json.dumps([launch(factors), launch(factors), launch(factors, subtract=True)]))
""")
    assert first[0] == again[0] == subtracted[0] > 0
    assert first[1:] == [first[0] + 1, first[0]]  # for rows that 16 bytes do not divide, too
    assert again[1:] == [0, 0]
    assert subtracted[1:] == [0, 1]  # its sign is another constant of the same kernel


def test_another_batch_or_image_size_compiles_nothing(run):
    sizes = [(64, 72), (72, 80), (80, 64), (88, 104), (120, 64), (56, 200), (152, 56), (64, 328), (328, 64)]
    code = f"""
seen = [launch(factors)[1] for factors in ((1,), (1, 1), (2, 4, 8), (1, 2))]
later = [launch(factors, n=n)[1] for factors in ((1,), (1, 1), (2, 4, 8), (1, 2)) for n in (1, 5, 9, 16)]
later += [launch(factors, size=size)[1] for factors in ((1,), (1, 1), (2, 4, 8), (1, 2)) for size in {sizes}]
later += [launch(factors, size=size)[1] for factors, size in (((1,), (7, 7)), ((1, 1), (5, 3)), ((1, 2), (14, 14)))]
later += [launch((1,) * parts)[1] for parts in (2, 3)]
print(json.dumps([sum(seen), sum(later)]))
"""
    seen, later = run(code)
    assert seen > 0
    assert later == 0


def test_one_pixel_maps_and_one_channel_compile(run):
    found = run("print(json.dumps([launch((1,), n=1, size=(1, 1), c=c)[0] for c in (1, 3)]))")
    assert found == [2, 2]


def test_a_plan_is_for_its_device_and_its_alignment(run):
    found = run("""
torch.cuda.set_device(0)
launch((1,))
other = launch((1,), device="cuda:1")
here = counts(1)["driver_launches"]
skewed = launch((1,), skew=1)
print(json.dumps([other, here, skewed, torch.cuda.current_device()]))
""")
    other, there, skewed, device = found
    assert other[2] == other[0] == there  # not the plan of device 0, and launched on device 1
    assert skewed[2] == skewed[0]
    assert device == 0


def test_what_was_warmed_is_not_compiled_again(tmp_path, run):
    from revkernels import warm

    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    code = f"""
import torch
from revkernels import warm
op = torch.ops.revkernels
v = torch.zeros(4)
def step():
    for size in {warm.SIZES}:
        y, p = torch.zeros(2, 4, size, size), [torch.zeros(2, 4, size // f, size // f) for f in (1, 2)]
        op.couple_(y, p, [v, v], [v, v], [1, 2], "bilinear", False)
        op.couple_adjoint(y, p, [v, v], [1, 2], "bilinear")
print(warm.warm(step, [90]))
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0
    code = f"""
knobs.cache.dir = {str(tmp_path)!r}
hits = []
knobs.compilation.listener = lambda **event: hits.append(event["cache_hit"])
launch((1, 2))
launch((1, 2), n=3, size=(72, 104))
print(json.dumps(hits))
"""
    hits = run(code)
    assert hits and all(hits)


def test_integers_of_a_tuple_are_neither_one_nor_divisible_by_16():
    codes = specialised_on_nothing(range(4096))
    assert not any(code == 1 or code % 16 == 0 for code in codes)
    assert [(-1 - code) // 2 for code in codes] == list(range(4096))


def test_plans_are_bounded(monkeypatch):
    from triton.compiler import CompiledKernel

    from revkernels.triton import plan

    compiled = CompiledKernel.__new__(CompiledKernel)
    monkeypatch.setattr(CompiledKernel, "__getitem__", lambda self, grid: lambda *args: None)
    compiled.module = None  # nothing to unload
    monkeypatch.setattr(plan, "LIMIT", 3)
    kernel = type("Kernel", (), {"arg_names": [], "__getitem__": lambda self, grid: lambda *args, **options: compiled})
    planned = plan.Planned(kernel())
    for key in range(10):
        planned(key, lambda: plan.Plan(1, {}))
        assert len(planned.plans) <= 3


@pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="kernels are compiled in this process")
def test_the_interpreter_launches_without_a_plan():
    import torch

    y, p, v = (torch.ones(2, 3, 4, 4) for _ in range(3))
    couple.couple_(y, [p], [v[0, :, 0, 0]], [None], [1], "nearest", False)
    assert (y == 2).all()
    assert not couple._couple_identity.plans
