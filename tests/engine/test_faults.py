"""Faults: an exception anywhere in a step leaves the model, the gradients and PyTorch's modes fit for the next step.

Faults are raised at calls of Python functions of the engine, of kernels and of layers, counted through a whole forward
or backward, so that they hit every part of it: couplings, recomputes, pullbacks, neck and head.
"""

import copy
import gc
import inspect
import itertools
import os
import signal
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import revbifpn
import revkernels
from revbifpn import check_invertible, fused, monitor_drift, range_report
from revbifpn.mbconv import MBConv
from revbifpn.memory import PeakMemory
from revbifpn.reversible import is_recomputing
from revkernels import workspace
from tests import networks
from tests.marks import covering, mostly_slow, slow
from tests.networks import BOTH, F32, MOSTLY_FAST, TWO_LEVELS, identical

pytestmark = covering

ERRORS = (ValueError, KeyboardInterrupt, torch.OutOfMemoryError, MemoryError)
MESSAGE = "raised by the test"
MOMENTS = (0.0, 0.03, 0.25, 0.5, 0.75, 1.0)  # of all calls that may fail

STREAMS = pytest.mark.parametrize("stream", [None, "fixed16", *slow(["fixed32"])])
REVERSIBLE = pytest.mark.parametrize("reversible", mostly_slow([True, False]), ids=["reversible", "stored"])
# Plain float streams that are stored have PyTorch's own backward.
OWN_BACKWARD = pytest.mark.parametrize(
    ("module", "stream", "reversible"),
    [
        pytest.param(
            module,
            stream,
            reversible,
            id=f"{name}-{stream}-{'reversible' if reversible else 'stored'}",
            marks=() if (name == "fast" and stream != "fixed32") or stream is None else pytest.mark.slow,
        )
        for name, module in BOTH.items()
        for stream in (None, "fixed32", "fixed16")
        for reversible in (True, False)
        if name == "fast" or stream is not None or reversible
    ],
)

TINY = TWO_LEVELS | {
    "stem_downsampling": 1,
    "channels": [12, 8],
    "num_ext_layers": 1,
    "stochastic_depth": 0.3,
    "head_channels": [8, 8],
    "fc_features": 16,
    "head_dropout": 0.2,
    "classes": 5,
}


@pytest.fixture(autouse=True)
def chunks_of_one_sample():
    """So that a fault may come between two chunks."""
    with fused.chunks_of(1):
        yield


def network(module, **options):
    torch.manual_seed(0)
    model = module.RevBiFPN(**(TINY | options))
    model.rev_stack.self_check = False  # as after a first step; has its own test
    return after_a_call(model)


def after_a_call(model):
    """The model, with what it makes at its first calls, in either mode, with gradients and without."""
    training, state = model.training, copy.deepcopy(model.state_dict())
    for trains in (False, True):
        for mode in (torch.enable_grad, torch.no_grad):
            with mode(), reduced(model):
                model.train(trains)(image())
    model.load_state_dict(state)
    return model.train(training)


def image():
    return networks.image(F32, 3, 16, 16)


def reduced(model):
    """Autocast, where streams are of 16 bits."""
    enabled = model.stream is not None and model.stream.name == "fixed16"
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


def forward(model):
    """A loss, under autocast where streams are of 16 bits."""
    torch.manual_seed(2)
    with reduced(model):
        kept = modes(model)
        try:
            logits = model(image())
        finally:
            assert modes(model) == kept, "inside the user's own autocast too"
        return F.cross_entropy(logits.float(), torch.arange(3))


def gradients(model):
    return [p.grad for p in model.parameters()]


def step(model):
    """Loss and gradients of an ordinary step."""
    model.zero_grad(set_to_none=True)
    loss = forward(model)
    loss.backward()
    return [loss.detach(), *gradients(model)]


# Faults ----------------------------------------------------------------------------------------

PACKAGES = tuple(os.path.dirname(package.__file__) + os.sep for package in (revbifpn, revkernels))
LAYERS = os.path.dirname(nn.modules.__file__) + os.sep
OPS = inspect.getfile(type(torch.ops))


NOT_CALLED_ALIKE = (inspect.getfile(PeakMemory), inspect.getfile(workspace))  # the latter remembers its results


def may_fail(code):
    """Any function of ours, any op, any layer. Generators are not called but continued, by ``with`` to clean up too."""
    if code.co_flags & inspect.CO_GENERATOR or code.co_filename in NOT_CALLED_ALIKE:
        return False
    ours = code.co_filename.startswith(PACKAGES)
    op = code.co_filename == OPS and code.co_name == "__call__"
    return ours or op or (code.co_filename.startswith(LAYERS) and code.co_name == "forward")


class Fault:
    """Count the calls that may fail inside the block, and raise ``error`` in the one after ``skip`` others."""

    def __init__(self, skip=None, error=None):
        self.skip, self.error, self.calls = skip, error, 0

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_):
        sys.settrace(self.before)

    def _trace(self, frame, event, _):
        if event == "call" and may_fail(frame.f_code):
            self.calls += 1
            if self.skip is not None and self.calls > self.skip:
                sys.settrace(None)
                raise self.error(MESSAGE)


def failure(function, *args):
    """Type and message of the exception that comes out, whose frames nothing keeps."""
    try:
        function(*args)
    except BaseException as error:
        return type(error), str(error)
    return None


def fails(function, *args, skip, error):
    """Call a function that is to fail after ``skip`` calls; what comes out is what was raised."""
    with Fault(skip, error):
        found = failure(function, *args)
    assert found == (error, MESSAGE)


def calls(function, *args):
    gc.collect()  # what is called where weak keys of earlier models go is none of them
    with Fault() as count:
        function(*args)
    assert count.calls > 50
    return count.calls


def faults(total):
    """``skip`` and ``error`` at all moments of that many calls."""
    return [
        {"skip": round(moment * (total - 1)), "error": error}
        for moment, error in zip(MOMENTS, itertools.cycle(ERRORS), strict=False)
    ]


def modes(model):
    """What a step may change for its duration only."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    devices = ("cpu", "cuda")
    return {
        "grad": torch.is_grad_enabled(),
        "anomaly": torch.is_anomaly_enabled(),
        "autocast": [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices],
        "autocast cache": torch.is_autocast_cache_enabled(),
        "recomputing": is_recomputing(),
        "training": [m.training for m in model.modules()],
        "tracking": [m.track_running_stats for m in norms],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
    }


def statistics(model):
    """Copies of every norm's buffers, by its name."""
    found = {}
    for name, buffer in model.named_buffers():
        found.setdefault(name.rpartition(".")[0], []).append(buffer.clone())
    return found


def alive(passes):
    assert passes, "something was recorded"
    return any(made() is not None for made in passes)


# Training --------------------------------------------------------------------------------------


@MOSTLY_FAST
@STREAMS
@REVERSIBLE
def test_failed_forward(module, stream, reversible, passes):
    """Norms that ran moved once, as in a good forward; the others, and all else, are as before."""
    model = network(module, stream=stream, reversible=reversible)
    twin = copy.deepcopy(model)
    total = calls(forward, after_a_call(copy.deepcopy(model)))
    moved = []
    for fault in faults(total):
        twin.load_state_dict(model.state_dict())
        before, kept, held = statistics(model), modes(model), gradients(model)
        fails(forward, model, **fault)
        assert modes(model) == kept
        assert all(a is b for a, b in zip(gradients(model), held, strict=True)), "no gradient is touched"
        assert not alive(passes)

        forward(twin)
        after, found = statistics(twin), statistics(model)
        moved.append(sum(identical(found[name], after[name]) for name in found))
        for name in found:
            assert identical(found[name], before[name]) or identical(found[name], after[name]), name

        twin.load_state_dict(model.state_dict())
        assert identical(step(model), step(twin))
        assert identical(model.buffers(), twin.buffers())
    assert moved[0] == 0 < moved[2] < moved[-2] <= moved[-1] == len(before), moved


@pytest.mark.slow
@MOSTLY_FAST
def test_statistics_of_a_norm_move_as_one(module):
    """Faults at every call of the first branches."""
    model = network(module)
    state, before = copy.deepcopy(model.state_dict()), statistics(model)
    total, after = calls(forward, model), statistics(model)
    for skip in range(total // 6):
        model.load_state_dict(state)
        fails(forward, model, skip=skip, error=KeyboardInterrupt)
        found = statistics(model)
        for name in found:
            assert identical(found[name], before[name]) or identical(found[name], after[name]), name
    assert any(identical(found[name], after[name]) for name in found)


@OWN_BACKWARD
def test_failed_backward(module, stream, reversible, passes):
    """Parameters have the whole gradient added, or nothing yet; a second try is refused; the next step is right."""
    model = network(module, stream=stream, reversible=reversible)
    twin = copy.deepcopy(model)
    total = calls(forward(after_a_call(copy.deepcopy(model))).backward)
    delivered = []
    for fault in faults(total):
        twin.load_state_dict(model.state_dict())
        for p in itertools.chain(model.parameters(), twin.parameters()):
            p.grad = torch.ones_like(p)  # of an earlier backward
        forward(twin).backward()

        loss = forward(model)
        kept, random = modes(model), torch.get_rng_state()
        fails(loss.backward, **fault)
        assert modes(model) == kept
        assert torch.equal(torch.get_rng_state(), random)
        assert identical(model.buffers(), twin.buffers()), "the forward's, once"
        delivered.append(0)
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            whole = torch.equal(p.grad, q.grad)
            assert whole or torch.equal(p.grad, torch.ones_like(p)), name
            delivered[-1] += whole

        found = [p.grad.clone() for p in model.parameters()]
        with pytest.raises(RuntimeError, match="second time|second backward"):
            loss.backward()
        assert identical(gradients(model), found)

        del loss
        assert identical(step(model), step(twin))
        assert identical(model.buffers(), twin.buffers())
        assert not alive(passes)
    assert delivered[0] < len(found) // 2 < delivered[-1], delivered


@OWN_BACKWARD
def test_second_backward_through_a_retained_graph(module, stream, reversible):
    """After a fault it gives the right gradients or a clear error, never others."""
    model = network(module, stream=stream, reversible=reversible)
    parameters = list(model.parameters())
    twin = copy.deepcopy(model)
    wanted = torch.autograd.grad(forward(twin), list(twin.parameters()))
    state = copy.deepcopy(model.state_dict())
    total = calls(forward(after_a_call(copy.deepcopy(model))).backward)
    refused = 0
    for fault in faults(total) + faults(total // 4)[1:]:  # neck and head come first
        model.load_state_dict(state)
        loss = forward(model)
        fails(torch.autograd.grad, loss, parameters, None, True, **fault)
        try:
            found = torch.autograd.grad(loss, parameters, retain_graph=True)
        except RuntimeError as error:
            assert "a second backward" in str(error)
            refused += 1
        else:
            assert identical(found, wanted), fault
    assert refused > 0 or (stream is None and not reversible)


@MOSTLY_FAST
@STREAMS
def test_failed_forward_frees_its_tensors(module, stream):
    """At once, without the cycle collector."""
    model = network(module, stream=stream)
    for fault in faults(calls(forward, model))[1:4:2]:
        with PeakMemory() as meter:
            fails(forward, model, **fault)
            assert meter.live_bytes == 0
        assert meter.peak_bytes > 0


@OWN_BACKWARD
def test_failed_backward_frees_its_tensors(module, stream, reversible):
    """With the next step: PyTorch's queue holds nodes that were ready when another failed until the next backward."""
    model = network(module, stream=stream, reversible=reversible)
    for fault in faults(calls(forward(model).backward))[1:4:2]:
        model.zero_grad(set_to_none=True)
        with PeakMemory() as meter:
            loss = forward(model)
            fails(loss.backward, **fault)
            del loss
            step(model)
            model.zero_grad(set_to_none=True)
            assert meter.live_bytes == 0
        assert meter.peak_bytes > 0


@OWN_BACKWARD
def test_forward_without_backward_frees_its_tensors(module, stream, reversible):
    model = network(module, stream=stream, reversible=reversible)
    with PeakMemory() as meter:
        forward(model)
        assert meter.live_bytes == 0


@OWN_BACKWARD
@pytest.mark.parametrize("disable_recomp", mostly_slow([False, True]))
def test_some_gradients_first(module, stream, reversible, disable_recomp):
    """A backward that stops at the head leaves the streams as they are; one through everything is right or refused."""
    model = network(module, stream=stream, reversible=reversible)
    model.disable_recomp = disable_recomp
    twin = copy.deepcopy(model)
    wanted = torch.autograd.grad(forward(twin), list(twin.parameters()))
    loss = forward(model)
    torch.autograd.grad(loss, list(model.head.parameters()), retain_graph=True)
    try:
        found = torch.autograd.grad(loss, list(model.parameters()))
    except RuntimeError as error:
        assert "a second backward" in str(error)
    else:
        assert identical(found, wanted)


@pytest.mark.parametrize("stream", ["fixed16", *slow(["fixed32"])])
@MOSTLY_FAST
def test_self_check_goes_on_after_a_fault(module, stream):
    model = network(module, stream=stream)
    model.rev_stack.self_check = True
    twin = copy.deepcopy(model)
    for fault in faults(calls(forward(after_a_call(copy.deepcopy(model))).backward)):
        loss = forward(model)
        fails(loss.backward, **fault)
        assert model.rev_stack.self_check, "no step has passed"
        forward(twin)
    assert identical(step(model), step(twin))
    assert not model.rev_stack.self_check


@pytest.fixture
def interruptible():
    """Python's own handler of SIGINT: a process in the background ignores the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@MOSTLY_FAST
@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("stream", [None, "fixed32"])
@pytest.mark.parametrize("recompute", [False, True], ids=["forward", "recompute"])
def test_interrupt_in_a_hook_of_the_user(module, stream, recompute, passes):
    """Ctrl-C, in a transform that the user's hook keeps from being fused."""
    model = network(module, stream=stream)
    armed = []

    def interrupt(*_):
        if armed and is_recomputing() == recompute:
            armed.clear()
            signal.raise_signal(signal.SIGINT)

    twin = copy.deepcopy(model)
    couplings = [list(m.rev_stack.couplings()) for m in (model, twin)]
    for transform in (c[len(c) // 2].terms[0][1] for c in couplings):
        next(m for m in transform.modules() if isinstance(m, nn.BatchNorm2d)).register_forward_pre_hook(interrupt)
    kept = modes(model)
    armed.append(True)
    assert failure(step, model) == (KeyboardInterrupt, "")
    assert not armed and modes(model) == kept
    twin.load_state_dict(model.state_dict())
    assert identical(step(model), step(twin))
    assert not alive(passes)


@MOSTLY_FAST
def test_fault_while_streams_are_observed(module):
    model = network(module)
    twin = copy.deepcopy(model)
    total = calls(step, after_a_call(copy.deepcopy(model)))

    def observe():
        nonlocal drift
        with monitor_drift(model) as drift:
            step(model)

    def report():
        range_report(model, image())

    for fault in faults(total)[1:-1]:
        drift = None
        fails(observe, **fault)
        assert model.rev_stack.observer is None
        assert not drift._inputs, "copies of streams are let go"
        kept, buffers, random = modes(model), [b.clone() for b in model.buffers()], torch.get_rng_state()
        fails(report, skip=fault["skip"] // 4, error=fault["error"])
        assert modes(model) == kept and identical(model.buffers(), buffers)
        assert torch.equal(torch.get_rng_state(), random)
        assert model.rev_stack.observer is None and model.stream is None
    twin.load_state_dict(model.state_dict())
    assert identical(step(model), step(twin))


# Inference -------------------------------------------------------------------------------------


@MOSTLY_FAST
@STREAMS
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_failed_inference(module, stream, training, passes):
    model = network(module, stream=stream)
    step(model)
    model.train(training)
    infer = torch.no_grad()(forward)
    wanted = infer(copy.deepcopy(model).eval())
    for fault in faults(calls(infer, after_a_call(copy.deepcopy(model))))[1::3]:
        before, kept = statistics(model), modes(model)
        fails(infer, model, **fault)
        assert modes(model) == kept
        assert not alive(passes)
        if not training:
            assert all(identical(found, before[name]) for name, found in statistics(model).items())
            assert torch.equal(infer(model), wanted)
        twin = copy.deepcopy(model).train()
        twin.zero_grad()
        assert identical(step(twin), step(copy.deepcopy(model).train()))


@MOSTLY_FAST
@STREAMS
@pytest.mark.parametrize("name", ["inverse", "check_invertible"])
def test_failed_inverse(module, stream, name, passes):
    """Streams that were given, buffers and flags are as before."""
    model = network(module, stream=stream, stochastic_depth=0.0, head_dropout=0.0)
    step(model)
    with torch.no_grad():
        streams = model.forward_streams(image())
    given = [y.clone() for y in streams]
    stem = model.stem(image())

    def run():
        if name == "inverse":
            return model.inverse(streams)
        return check_invertible(model.rev_stack, stem)

    def same(found):
        return torch.equal(found, wanted) if name == "inverse" else found == wanted

    total, wanted = calls(run), run()
    buffers = [b.clone() for b in model.buffers()]
    for fault in faults(total)[::2]:
        kept, random = modes(model), torch.get_rng_state()
        fails(run, **fault)
        assert modes(model) == kept
        assert torch.equal(torch.get_rng_state(), random)
        assert identical(streams, given)
        assert name != "inverse" or identical(model.buffers(), buffers)
        assert not alive(passes)
        assert same(run())


# Anomaly mode ----------------------------------------------------------------------------------


def places(model):
    """Names of MBConvs, by part."""
    names = [name for name, m in model.named_modules() if isinstance(m, MBConv)]
    neck = [name for name in names if "recomp_op" in name]
    head = [name for name in names if name.startswith("head.")]
    stack = [name for name in names if name not in neck and name not in head]
    return {"stack": [stack[0], stack[len(stack) // 2], stack[-1]], "neck": neck, "head": head}


@MOSTLY_FAST
@STREAMS
@REVERSIBLE
@pytest.mark.parametrize("part", ["stack", "neck", "head"])
@pytest.mark.filterwarnings("ignore::revbifpn.StreamOverflowWarning", "ignore:Anomaly Detection")
def test_anomaly_mode_names_the_block(module, stream, reversible, part):
    """Where values that are not finite come from; without anomaly mode nothing is said."""
    model = network(module, stream=stream, reversible=reversible, stochastic_depth=0.0)
    twin = copy.deepcopy(model)
    for name, value, check_nan in zip(
        places(model)[part], (float("nan"), float("inf"), -float("inf")), (True, False, True), strict=False
    ):
        weight = model.get_submodule(name).project_conv.norm.weight
        state = copy.deepcopy(model.state_dict())
        with torch.no_grad():
            weight[0] = value
        kept = modes(model)
        with torch.autograd.detect_anomaly(check_nan=check_nan):
            found = failure(forward, model)
        assert found is not None and issubclass(found[0], RuntimeError), name
        assert name.removeprefix("rev_stack.").removesuffix(".0") in found[1] and "not finite" in found[1]
        assert modes(model) == kept
        loss = forward(model)
        assert stream == "fixed16" or not loss.isfinite(), "integers are finite"

        model.load_state_dict(state)
        twin.load_state_dict(state)
        assert identical(step(model), step(twin))


@MOSTLY_FAST
@STREAMS
@REVERSIBLE
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_anomaly_mode_changes_nothing_where_values_are_finite(module, stream, reversible):
    model = network(module, stream=stream, reversible=reversible)
    twin = copy.deepcopy(model)
    with torch.autograd.set_detect_anomaly(True):
        found = step(model)
    assert identical(found, step(twin))
    assert identical(model.buffers(), twin.buffers())
