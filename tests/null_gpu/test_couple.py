"""``couple_`` launched from C++ on the GPU that does nothing: the driver gets what Triton's launcher gives it."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from tests.null_gpu import ROOT, Unavailable, environment  # noqa: E402

pytestmark = pytest.mark.slow  # the CUDA kernels are compiled where the cache does not have them

COMMON = """
import json, re, threading
from unittest import mock
import torch
from pathlib import Path
from triton import knobs
from revkernels import dispatch
from revkernels.triton import LAUNCHERS, couple, plan
from tests import null_gpu

op, by_triton, native = torch.ops.revkernels.couple_, LAUNCHERS["couple_"], dispatch.STATUS["cuda"].module
sizes, asked, launch = {}, [], couple._launch

def loaded(module, function, name, files, hash):
    cubin = next(Path(path) for path in files.values() if path.endswith(".cubin"))
    sizes[function] = null_gpu.parameter_sizes(cubin.read_bytes(), name)

def counted(*arguments):
    asked.append(1)
    return launch(*arguments)

knobs.runtime.kernel_load_end_hook.add(loaded)
couple._launch = counted

def python_calls(call, *arguments):
    before = len(asked)
    call(*arguments)
    return len(asked) - before

def watch(call, *arguments):
    with null_gpu.watched(sizes.__getitem__) as found:
        call(*arguments)
    return found

def tensor(shape, dtype=torch.float32, device="cuda", skew=0, of=None):
    if of:  # some channels of a map
        return torch.zeros(shape[0], of, *shape[2:], dtype=dtype, device=device)[:, 1 : 1 + shape[1]]
    return torch.zeros(skew + torch.Size(shape).numel(), dtype=dtype, device=device)[skew:].view(shape)

def arguments(factors, mode="bilinear", stream=torch.float32, dtype=torch.float32, n=2, c=8, size=(16, 16), skew=0,
              of=None, vectors="both", per_sample=False, subtract=False, bits=None, count=False, device="cuda"):
    h, w = size
    y = tensor((n, c, h, w), stream, device, skew, of)
    p = [tensor((n, c, h // f, w // f), dtype, device, skew, of) for f in factors]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    vector = lambda which: [
        tensor((n, c) if per_sample else (c,), wide, device) if vectors in (which, "both") else None for _ in factors
    ]
    overflow = torch.zeros(1, dtype=torch.int64, device=device) if count else None
    return y, p, vector("scale"), vector("shift"), list(factors), mode, subtract, bits, overflow

"""


def on_null_gpu(code, devices=1, disable=""):
    """What ``code`` gives to ``print(json.dumps(...))`` last."""
    try:
        variables = environment(devices=devices)
    except Unavailable as error:
        pytest.skip(str(error))
    variables["REVKERNELS_DISABLE"] = disable
    command = [sys.executable, "-m", "tests.null_gpu", "-c", COMMON + code]
    done = subprocess.run(command, env=os.environ | variables, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_driver_gets_what_tritons_launcher_gives_it():
    """Kernel, grid, block, shared memory, stream, device and every byte of every parameter, in one process.

    Each call is made with tensors of its own after all the others: a shape, an alignment or a device that met the
    launch of another would be seen.
    """
    wrong, calls, parameters = on_null_gpu(
        """
half, exact = dict(stream=torch.bfloat16, dtype=torch.bfloat16), dict(stream=torch.int16, bits=8)
grid = dict(bits=12)
calls = [dict(factors=f) for f in (
    (1,), (2,), (4,), (8,), (1, 1), (1, 2), (2, 4), (1, 2, 4), (1, 1, 1, 1), (8, 4, 2, 1), (1, 1, 1, 1, 1),
    (1, 2, 4, 8, 1), (1, 1, 1, 1, 1, 1), (2, 1, 4, 2, 8, 1))]
for factors in ((1,), (1, 1), (1, 2)):
    variants = [dict(mode="nearest"), dict(subtract=True), dict(vectors=""), dict(vectors="scale"), dict(size=(8, 24)),
                dict(vectors="shift"), dict(per_sample=True), dict(n=1), dict(c=1), dict(of=11), dict(skew=1), half,
                dict(size=(64, 64)), dict(stream=torch.float16, dtype=torch.float16, skew=1), dict(device="cuda:1"),
                dict(device="cuda:1", subtract=True), dict(stream=torch.float64, dtype=torch.float64),
                exact, exact | dict(count=True), exact | dict(subtract=True, bits=0), grid, grid | dict(count=True),
                exact | dict(dtype=torch.bfloat16), dict(of=16, skew=0), dict(size=(2, 2)), dict(size=(2, 6), of=9)]
    calls += [dict(factors=factors) | variant for variant in variants]

wrong, parameters = [], 0
for call in calls:
    op(*arguments(**call))
for call in calls:
    given = arguments(**call)
    theirs, ours, entered = watch(by_triton, *given), [], len(asked)
    side = torch.cuda.Stream(given[0].device)
    with torch.cuda.stream(side), torch.cuda.device(0):
        aside = watch(by_triton, *given)
        entered = len(asked)
        ours = watch(op, *given)
        with torch.cuda.stream(torch.cuda.default_stream(given[0].device)), torch.cuda.device(0):
            ours = watch(op, *given) + ours
    if ours != theirs + aside or len(ours) != 2 or len(asked) != entered or ours[0].device != given[0].get_device():
        wrong.append([str(call), str(ours), str(theirs + aside), len(asked) - entered])
    parameters += sum(map(len, ours[0].parameters))
print(json.dumps([wrong, len(calls), parameters]))
""",
        devices=2,
    )
    assert wrong == []
    assert calls > 80 and parameters > 100 * calls  # bytes


def test_where_no_recipe_can_be_given_every_call_is_pythons():
    again, refused, launched, both = on_null_gpu(
        """
given = arguments((1, 2))
op(*given)
again = [python_calls(op, *given) for _ in range(2)]

def refuse(change, factors, **options):
    given = arguments(factors, **options)
    with change:
        counts = [python_calls(op, *given) for _ in range(2)]
    known = plan.Launch.recipe
    return counts, len(watch(op, *given))

compiled = next(iter(couple._couple_upsampled.plans.values())).compiled
more = mock.patch.dict(compiled.asm, ptx=compiled.asm["ptx"].replace(".param .u64 ", ".param .u32 a, .param .u64 ", 1))
scratch = mock.patch.object(compiled, "metadata", compiled.metadata._replace(global_scratch_size=16))
cluster = mock.patch.object(compiled, "packed_metadata", (2, 2, 0))
gaps = list(given)
gaps[2] = [torch.zeros(8, 2, device="cuda")[:, 0] for _ in given[1]]
refused = {
    "another Triton": refuse(mock.patch.object(plan, "READ", ("2.0",)), (1, 2), n=3),
    "another parameter": refuse(more, (1, 2), n=4),
    "scratch memory": refuse(scratch, (1, 2), n=5),
    "clusters": refuse(cluster, (1, 2), n=6),
    "a copy of a vector": [[python_calls(op, *gaps) for _ in range(2)], len(watch(op, *gaps))],
}

seen = []
hook = lambda metadata: seen.append(metadata.get()["name"])
knobs.runtime.launch_enter_hook.add(hook)
added = [python_calls(op, *given) for _ in range(2)], list(seen)
knobs.runtime.launch_enter_hook.remove(hook)
removed = python_calls(op, *given), len(seen)
seen.clear()
with mock.patch.object(knobs.runtime, "launch_exit_hook", hook):
    assigned = python_calls(op, *given), list(seen)
print(json.dumps([again, refused, [added, removed, assigned], python_calls(op, *given)]))
"""
    )
    assert again == [0, 0]
    for reason, (python_calls, launches) in refused.items():
        assert python_calls == [1, 1] and launches == 1, reason
    kernel = "_couple_upsampled_kernel"
    assert launched == [[[1, 1], [kernel, kernel]], [0, 2], [1, [kernel]]]
    assert both == 0


def test_errors_name_the_argument_and_say_what_python_says():
    storage, shared, others = on_null_gpu(
        """
def error(call, given):
    try:
        call(*given)
    except Exception as e:
        return str(e)

names = ["y", "p[1]", "scale[1]", "shift[1]", "overflow"]
take = [lambda g: g[0], lambda g: g[1][1], lambda g: g[2][1], lambda g: g[3][1], lambda g: g[8]]
counted = dict(stream=torch.int16, bits=8, count=True)
op(*arguments((1, 2), **counted))  # known
storage = {}
for name, of in zip(names, take):
    given = arguments((1, 2), **counted)
    of(given).untyped_storage().resize_(0)
    storage[name] = [error(op, given), error(by_triton, given)]
shared = {}
for name in ("p[0]", "scale[0]", "overflow"):
    y, p, scale, shift, *rest, overflow = arguments((1, 2), size=(16, 16))
    if name == "p[0]":
        p[0] = y
    elif name == "scale[0]":
        scale[0] = y.view(-1)[:8]
    else:
        overflow = y.view(-1)[:2].view(torch.int64)
    shared[name] = [error(call, (y, p, scale, shift, *rest, overflow)) for call in (op, by_triton)]

def changed(change):
    given = list(arguments((1, 2)))
    change(given)
    return [error(op, given), error(by_triton, given)]

op(*arguments((1, 2)))
others = {
    "a map of the host": changed(lambda g: g.__setitem__(1, [g[1][0].cpu(), g[1][1]])),
    "a vector of the host": changed(lambda g: g.__setitem__(2, [g[2][0].cpu(), g[2][1]])),
    "three dimensions": changed(lambda g: g.__setitem__(0, g[0][0])),
    "a dtype": changed(lambda g: g.__setitem__(0, g[0].to(torch.complex64))),
    "a factor": changed(lambda g: g.__setitem__(4, [1, 3])),
    "too few vectors": changed(lambda g: g.__setitem__(2, g[2][:1])),
}
print(json.dumps([storage, shared, others]))
"""
    )
    for name, (ours, theirs) in storage.items():
        assert theirs.startswith(f"{name}: expected a storage of at least") and ours.endswith(theirs)
    for name, (ours, theirs) in shared.items():
        assert theirs.endswith(f"shares some with {name}") or theirs.startswith(f"{name}: expected memory")
        assert ours.endswith(theirs)
    for name, (ours, theirs) in others.items():
        assert theirs and theirs in ours, name


def test_the_op_is_one_op_for_modes_profilers_compilers_graphs_and_threads():
    mode, profiled, graph, captured, thread, known = on_null_gpu(
        """
from torch.profiler import profile, ProfilerActivity
from torch.utils._python_dispatch import TorchDispatchMode

class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))

given = arguments((1, 2))
with Names() as mode:
    op(*given)  # unknown as yet
    op(*given)
with profile(activities=[ProfilerActivity.CPU]) as profiler:
    op(*given)
profiled = [event.name for event in profiler.events() if "couple" in event.name]

graphs = []
def backend(module, inputs):
    graphs.append([str(node.target) for node in module.graph.nodes if node.op == "call_function"])
    return module

compiled = torch.compile(lambda *arguments: op(*arguments), backend=backend, fullgraph=True)
in_graph = [python_calls(compiled, *given) for _ in range(2)]

cuda_graph = torch.cuda.CUDAGraph()
before = null_gpu.counts()
with torch.cuda.graph(cuda_graph):
    op(*given)
captured = null_gpu.counts()["captured"] - before["captured"]

launches = []
thread = threading.Thread(target=lambda: launches.extend(watch(op, *given)))
thread.start()
thread.join()
same = launches == watch(op, *given)

for i in range(4200):
    op(*arguments((1,), n=1, c=1, size=(1, 1 + i)))
print(json.dumps([mode.names, profiled, [graphs, in_graph], captured, [len(launches), same],
                  native.remembered_launches()]))
"""
    )
    assert mode == ["revkernels::couple_"] * 2
    assert profiled == ["revkernels::couple_"]
    assert graph == [[["revkernels.couple_.default"]], [0, 0]] or graph == [[["revkernels.couple_"]], [0, 0]]
    assert captured == 1
    assert thread == [1, True]
    assert 100 < known <= 4096


def test_a_training_step_asks_python_for_nothing_the_second_time():
    steps = on_null_gpu(
        """
import torch.nn.functional as F
from revbifpn import fast
found = []
for stream in ("float32", "fixed16"):
    model = fast.RevBiFPN(channels=(48, 16), dwk=(3, 3), dwkp=(0, 0), expand_ratios=(1, 2), se_ratios=(0.25, 0.25),
        head_channels=(16, 16), head_dwk=(3, 3), head_dwkp=(0, 0), head_expand_ratios=(1, 2), head_se_ratios=(0.25, 0),
        inv_blk_rep=1, num_ext_layers=0, fc_features=16, classes=10, stream=stream).cuda().train()
    model.rev_stack.self_check = False  # values are garbage
    images, labels = torch.randn(2, 3, 32, 32, device="cuda"), torch.zeros(2, dtype=torch.long, device="cuda")
    step = lambda: F.cross_entropy(model(images), labels).backward()
    found += [[python_calls(step), python_calls(step)]]
print(json.dumps(found))
"""
    )
    for first, second in steps:
        assert first > 0 and second == 0


@pytest.mark.parametrize(("disable", "serves", "launches"), [("triton", "reference", 0), ("cuda", "triton", 1)])
def test_without_one_of_the_two_it_is_served_as_ever(disable, serves, launches):
    found = on_null_gpu(
        """
given = arguments((1, 2))
counted = []
for _ in range(2):
    before = null_gpu.counts()["driver_launches"]
    op(*given)
    counted.append(null_gpu.counts()["driver_launches"] - before)
print(json.dumps([dispatch.in_use("couple_", "cuda"), counted, len(asked)]))
""",
        disable=disable,
    )
    assert found == [serves, [launches] * 2, 2 * launches]
