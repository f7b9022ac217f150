"""The capture lint: the model's steps hold nothing that a CUDA graph cannot, and what it cannot hold is named."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import revbifpn
from revbifpn import NotCapturableError, RevBlock, ReversibleSequence
from revbifpn.configs import CONFIGS
from revbifpn.engine.capture import capture_lint
from revbifpn.streams import is_capturing
from tests import networks
from tests.marks import covering, mostly_slow
from tests.networks import MODULES

pytestmark = covering

SCALES = pytest.mark.parametrize("scale", mostly_slow(["s0", "s3"]))
IMAGES, LABELS = torch.randn(2, 3, 32, 32), torch.tensor([1, 2])


def network(module, scale, **options):
    """A published scale's depth, ratios and kernels, on few channels."""
    arguments = CONFIGS[f"revbifpn_{scale}"].arguments()
    arguments |= {key: networks.NARROW[key] for key in ("channels", "head_channels", "fc_features", "classes")}
    if module is revbifpn:
        arguments |= {"stochastic_depth": 0.0}  # a random branch of the plain model is recomputed, see below
    return networks.narrow(module, networks.F32, **(arguments | options))


def step(model, optimizer, dtype):
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        loss = F.cross_entropy(model(IMAGES).float(), LABELS)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@MODULES
@SCALES
@pytest.mark.parametrize(
    "dtype, stream", [(None, None), (torch.bfloat16, "fixed16"), (torch.bfloat16, None)], ids=["fp32", "fixed16", "amp"]
)
def test_a_training_step_can_be_captured(module, scale, dtype, stream):
    model = network(module, scale, stream=stream)
    optimizer = torch.optim.SGD(model.parameters(), torch.tensor(0.01), momentum=0.9, fused=True)
    step(model, optimizer, dtype)
    with capture_lint():
        step(model, optimizer, dtype)


@MODULES
@SCALES
def test_inference_can_be_captured(module, scale):
    model = network(module, scale).eval()
    with capture_lint(), torch.no_grad():
        model(IMAGES)


@MODULES
def test_the_first_step_of_an_exact_stream_can_be_captured_and_is_checked_later(module):
    model = network(module, "s0", stream="fixed32")
    with capture_lint():
        F.cross_entropy(model(IMAGES), LABELS).backward()
    assert model.rev_stack.self_check
    F.cross_entropy(model(IMAGES), LABELS).backward()
    assert not model.rev_stack.self_check


# --- the lint finds what is put into a step -----------------------------------------------------------

IN_THE_WAY = {
    "item": (lambda y: y.sum().item(), "Tensor.item reads a value of a tensor on the host"),
    "bool": (lambda y: bool(y.sum() > 0), "Tensor.__bool__ reads a value"),
    "float": (lambda y: float(y.sum()), "Tensor.__float__ reads a value"),
    "tolist": (lambda y: y.tolist(), "Tensor.tolist reads a value"),
    "numpy": (lambda y: y.detach().numpy(), "Tensor.numpy reads a value"),
    "cpu": (lambda y: y.cpu(), "Tensor.cpu reads a value"),
    "equal": (lambda y: torch.equal(y, y), "aten.equal.* reads a value"),
    "a number": (lambda y: torch.add(y, y, alpha=torch.tensor(2.0)), "_local_scalar_dense.* reads a value"),
    "nonzero": (lambda y: y.nonzero(), "aten.nonzero.* makes a tensor whose shape depends on values"),
    "unique": (lambda y: y.unique(), "makes a tensor whose shape depends on values"),
    "mask": (lambda y: y[y > 0], "aten.index.* indexes with a mask"),
    "pinned": (lambda y: torch.empty(1, pin_memory=True), "aten.empty.* allocates pinned memory"),
    "pinned copy": (lambda y: y.pin_memory(), "Tensor.pin_memory allocates pinned memory"),
    "state": (lambda y: torch.get_rng_state(), "torch.get_rng_state reads or sets the state of a random generator"),
    "set state": (lambda y: torch.cuda.set_rng_state(None), "torch.cuda.set_rng_state reads or sets the state"),
    "fork": (lambda y: torch.random.fork_rng().__enter__(), "torch.random.fork_rng reads or sets the state"),
    "seed": (lambda y: torch.manual_seed(0), "torch.manual_seed reads or sets the state"),
    "checkpoint": (lambda y: checkpoint(torch.sin, y, use_reentrant=False), "torch.* reads or sets the state"),
    "synchronize": (lambda y: torch.cuda.synchronize(), "torch.cuda.synchronize waits for the device"),
    "stream": (lambda y: torch.cuda.Stream.synchronize(None), "Stream.synchronize waits for the device"),
    "event": (lambda y: torch.cuda.Event.query(None), "Event.query waits for the device"),
}


class Also(nn.Module):
    """A model in whose way a call is put."""

    def __init__(self, model, call):
        super().__init__()
        self.model, self.call = model, call

    def forward(self, x):
        y = self.model(x)
        self.call(y)
        return y


@pytest.mark.parametrize("name", IN_THE_WAY)
def test_what_no_graph_can_hold_is_named_with_its_line(name):
    call, message = IN_THE_WAY[name]
    model = Also(nn.Linear(3, 3), call)
    with pytest.raises(NotCapturableError, match=rf"{message}.*cannot hold: .*test_capture.py:\d+, in <lambda>"):
        with capture_lint():
            model(torch.randn(4, 3)).sum().backward()


def test_what_only_looks_like_it_is_let_through():
    x, i = torch.randn(4, 3), torch.tensor([2, 0, 2])
    with capture_lint():
        x[i] = x[i] + 1
        x[:, None].repeat_interleave(torch.tensor([1, 2, 0, 1]), 0, output_size=4)
        torch.where(x > 0, x, x.new_zeros(())).masked_fill_(x < 0, 1.0)
        torch.empty(2).bernoulli_(0.5)
        nn.functional.embedding(i, x)


class InBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dx):
        return dx * dx.sum().item()


def test_backward_and_branches_are_watched_too():
    with pytest.raises(NotCapturableError, match="reads a value .*, in backward"), capture_lint():
        InBackward.apply(torch.randn(3, requires_grad=True)).sum().backward()
    branch = Also(nn.Conv2d(2, 2, 1), lambda y: y.nonzero())
    sequence = ReversibleSequence(RevBlock(branch, nn.Conv2d(2, 2, 1)))
    with pytest.raises(NotCapturableError, match="aten.nonzero"), capture_lint():
        sequence(torch.randn(1, 4, 3, 3))


def test_copies_between_host_and_device_are_named():
    """On a device that has no values, as there may be no other here."""
    with pytest.raises(NotCapturableError, match="copies between host and device"), capture_lint():
        torch.randn(3).to("meta")


def test_random_numbers_in_a_branch_that_is_recomputed_are_refused_by_its_name():
    sequence = ReversibleSequence(RevBlock(nn.Dropout(0.5), nn.Conv2d(2, 2, 1)))
    x = torch.randn(1, 4, 3, 3)
    with pytest.raises(NotCapturableError, match="Dropout draws random numbers .* recomputed in backward"):
        with capture_lint():
            sequence(x)
    sequence.reversible = False
    with capture_lint():
        sequence(x).sum().backward()


# --- the lint leaves no trace -------------------------------------------------------------------------


def test_everything_is_as_before_after_the_block():
    names = [(torch, "get_rng_state"), (torch.cuda, "synchronize"), (torch.cuda.Event, "query")]
    before = [getattr(owner, name) for owner, name in names]
    with pytest.raises(NotCapturableError), capture_lint():
        torch.get_rng_state()
    assert [getattr(owner, name) for owner, name in names] == before
    assert not is_capturing(torch.device("cpu"))
    assert torch.ones(1).item() == 1


def test_other_threads_go_on_as_before():
    states = []
    with capture_lint():
        thread = threading.Thread(target=lambda: states.append((torch.get_rng_state(), torch.ones(1).item())))
        thread.start()
        thread.join()
    assert len(states) == 1
