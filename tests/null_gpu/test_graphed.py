"""The real capture path on the GPU that does nothing: a step is captured by CUDA's rules and replayed in one launch."""

import json
import os
import subprocess
import sys

import pytest

from tests.null_gpu import ROOT, Unavailable, environment

COMMON = """
import json, threading, warnings
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel
from revbifpn import GraphedModule, GraphedStep, NotCapturableError, RevBlock, ReversibleSequence, fast
from revbifpn.streams import OverflowCounter, StreamFormat
from tests import null_gpu

def narrow(device="cuda", **options):
    levels = {"channels": (48, 16), "dwk": (3, 3), "dwkp": (0, 0), "expand_ratios": (1, 2), "se_ratios": (0.25, 0.25)}
    head = {"head_channels": (16, 16), "head_dwk": (3, 3), "head_dwkp": (0, 0), "head_expand_ratios": (1, 2)}
    rest = {"head_se_ratios": (0.25, 0), "inv_blk_rep": 1, "num_ext_layers": 0, "fc_features": 16, "classes": 10}
    model = fast.RevBiFPN(**(levels | head | rest | options)).to(device).train()
    model.rev_stack.self_check = False  # values are garbage
    return model

def batch(size=2, device="cuda"):
    return torch.randn(size, 3, 32, 32, device=device), torch.zeros(size, dtype=torch.long, device=device)

def counted(call):
    before = null_gpu.counts()
    call()
    return {k: v - before[k] for k, v in null_gpu.counts().items()}

def steps(step, calls, *inputs):
    step._observed = True  # it would look at counters, which are garbage here
    return [counted(lambda: step(*(inputs or batch()))) for _ in range(calls)]

"""


def on_null_gpu(code, devices=1, disable="triton,cuda"):
    """What ``code`` gives to ``print(json.dumps(...))`` last; the ops run their references, which compile nothing."""
    try:
        environment(kernels=False)
    except Unavailable as error:
        pytest.skip(str(error))
    command = [sys.executable, "-m", "tests.null_gpu", "--no-kernels", "--devices", str(devices), "-c", COMMON + code]
    paths = {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "REVKERNELS_DISABLE": disable}
    run = subprocess.run(command, cwd=ROOT, env=os.environ | paths, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def training():
    """What the null GPU was asked for by six calls of different steps."""
    return on_null_gpu(
        """
def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, fused=True)

def adamw(model):
    return torch.optim.AdamW(model.parameters(), 0.1, capturable=True)

def counts(make, **options):
    model = narrow(stream="fixed16", stochastic_depth=0.2)
    step = make(model)
    with torch.autocast("cuda", torch.bfloat16):
        return steps(step, 6, *batch())

print(json.dumps({
    "SGD": counts(lambda m: GraphedStep(m, F.cross_entropy, sgd(m))),
    "AdamW": counts(lambda m: GraphedStep(m, F.cross_entropy, adamw(m), ema=AveragedModel(m), clip_norm=1.0)),
    "scaler": counts(lambda m: GraphedStep(m, F.cross_entropy, sgd(m), torch.amp.GradScaler("cuda"))),
}))
"""
    )


@pytest.mark.parametrize("name", ["SGD", "AdamW", "scaler"])
def test_a_replay_is_one_launch_that_waits_for_nothing(training, name):
    *_, rehearsal, captured, first, second = training[name]
    launches = sum(rehearsal[kind] for kind in ("launches", "products", "copies", "fills"))
    assert launches > 500 and rehearsal["synchronisations"] == 0
    assert captured["captured"] > 0.9 * launches and captured["graph_launches"] == 1
    assert first == second
    assert first["graph_launches"] == 1 and first["captured"] == 0
    assert first["synchronisations"] == first["allocations"] == 0
    assert first["launches"] + first["copies"] + first["fills"] < 15  # inputs, generator, loss, overflow counts


def test_shapes_inference_and_accumulation_are_captured():
    facts = on_null_gpu(
        """
model = narrow()
optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, fused=True)
shapes = GraphedStep(model, F.cross_entropy, optimizer, max_shapes=2)
replays = {size: steps(shapes, 5, *batch(size))[-1]["graph_launches"] for size in (2, 3, 4)}
accumulated = GraphedStep(model, F.cross_entropy, optimizer, accumulate=2)
updates = [c["graph_launches"] for c in steps(accumulated, 10)]
module = GraphedModule(model.eval())
inference = [c["graph_launches"] for c in steps(module, 4, batch()[0])]
print(json.dumps([replays, shapes.captured, updates, accumulated.captured, inference]))
"""
    )
    assert facts == [{"2": 1, "3": 1, "4": 1}, 2, [0] * 6 + [1] * 4, 2, [0, 0, 1, 1]]


def test_inputs_may_come_from_the_host():
    first, last = on_null_gpu(
        """
model = narrow()
step = GraphedStep(model, F.cross_entropy, torch.optim.SGD(model.parameters(), 0.1, fused=True))
images, labels = (x.pin_memory() for x in batch(device="cpu"))
counts = steps(step, 5, images, labels)
print(json.dumps([counts[1], counts[-1]]))
"""
    )
    assert first["synchronisations"] == last["synchronisations"] == 0 and last["graph_launches"] == 1


def test_what_the_rehearsal_cannot_know_fails_in_the_capture_with_its_line():
    """A wait in C++, and Python that does in the capture what it did not do before."""
    message, cause, after, aside = on_null_gpu(
        """
model = narrow()
calls = []

def loss_fn(logits, labels):
    calls.append(1)
    if len(calls) == 4:
        logits.sum().item()
    return F.cross_entropy(logits, labels)

step = GraphedStep(model, loss_fn, torch.optim.SGD(model.parameters(), 0.1, fused=True))
steps(step, 3)
try:
    step(*batch())
except NotCapturableError as error:
    message, cause = str(error), type(error.__cause__).__name__
side = step._side.stream
torch.rand(1, device="cuda")
after = steps(step, 2)[-1]["graph_launches"]  # the capture is tried again, and succeeds
print(json.dumps([message, cause, after, torch.cuda.current_stream() == side]))
"""
    )
    assert "could not be captured" in message and "capturing" in message and cause != "NoneType"
    assert after == 1 and not aside


def test_a_first_step_with_an_exact_stream_is_captured_by_hand():
    captured, check = on_null_gpu(
        """
model = narrow(stream="fixed32")
model.rev_stack.self_check = True
images, labels = batch()
graph = torch.cuda.CUDAGraph()

def capture():
    with torch.cuda.graph(graph):
        F.cross_entropy(model(images), labels).backward()

print(json.dumps([counted(capture)["captured"], model.rev_stack.self_check]))
"""
    )
    assert captured > 500 and check


def test_overflow_is_counted_on_the_device_that_has_the_streams():
    events, captured, deferred = on_null_gpu(
        """
device = torch.device("cuda:1")
counter = OverflowCounter(StreamFormat("fixed32"))
counter.of(0, device)
record = torch.cuda.Event.record
on = []

def spy(event, stream=None):
    record(event, stream)
    on.append(event.device.index)

torch.cuda.Event.record = spy
counter.report()
before = len(OverflowCounter._on_their_way)
graph = torch.cuda.CUDAGraph()
with torch.cuda.device(1):
    with torch.cuda.graph(graph), torch.cuda.device(0):  # the current device captures nothing
        counter.report()
print(json.dumps([on, torch.cuda.current_device(), len(OverflowCounter._on_their_way) - before]))
""",
        devices=2,
    )
    assert (events, captured, deferred) == ([1], 0, 0)


def test_counts_of_passes_in_several_threads_are_reported_once_each():
    reported, waiting, passes = on_null_gpu(
        """
import time
from revbifpn import streams
reported = []
streams._warn = lambda stream, counts, steps: reported.append(id(counts))

class Slow(list):
    def __iter__(self):
        yield from list(super().__iter__())
        time.sleep(0.002)  # other threads run

OverflowCounter._on_their_way = Slow()
asked = set()
torch.cuda.Event.query = lambda event: id(event) in asked or asked.add(id(event))  # not there when first asked
keep = []

def passes():
    for _ in range(10):
        counter = OverflowCounter(StreamFormat("fixed32"))
        counter.of(0, torch.device("cuda"))
        counter.report()
        keep.extend(list.copy(OverflowCounter._on_their_way))  # so that ids stay their events'

threads = [threading.Thread(target=passes) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(json.dumps([len(reported), len(OverflowCounter._on_their_way), 8 * 10]))
"""
    )
    assert reported + waiting == passes


def test_a_model_on_another_device_is_captured_there():
    launches = on_null_gpu(
        """
model = narrow("cuda:1")
step = GraphedStep(model, F.cross_entropy, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, fused=True))
inputs = batch(device="cuda:1")
steps(step, 4, *inputs)
before = null_gpu.counts(device=0)
steps(step, 2, *inputs)
print(json.dumps([null_gpu.counts(device=1)["graph_launches"], null_gpu.counts(device=0) == before]))
""",
        devices=2,
    )
    assert launches == [3, True]


@pytest.mark.slow
def test_triton_kernels_are_compiled_before_the_capture():
    """The published S0 in float32 and under autocast: thousands of kernels, then one launch."""
    for dtype, stream in (("float32", "float32"), ("bfloat16", "fixed16")):
        counts = on_null_gpu(
            f"""
model = fast.revbifpn_s0(classes=10, stream="{stream}").cuda().train()
model.rev_stack.self_check = False
step = GraphedStep(model, F.cross_entropy, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, fused=True))
with torch.autocast("cuda", torch.{dtype}, enabled="{dtype}" != "float32"):
    print(json.dumps(steps(step, 5)))
""",
            disable="cuda",
        )
        assert counts[2]["driver_launches"] > 100
        assert counts[3]["captured"] > 100 and counts[3]["driver_launches"] == 0
        assert counts[4]["graph_launches"] == 1 and counts[4]["driver_launches"] == 0
