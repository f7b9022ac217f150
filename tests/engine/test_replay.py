"""A branch is replayed whole: what the forward found is in force in the recompute and while its gradient is pulled."""

import contextlib
import copy
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from revbifpn import RevBlock, ReversibleSequence

C, SIZE, BATCH = 8, 6, 4  # channels of a half, side of a map
F64 = torch.float64


class Checkpointed(nn.Module):
    """A module that keeps its input alone; where it is not active, the module itself."""

    active = True

    def __init__(self, module, use_reentrant=False):
        super().__init__()
        self.module, self.use_reentrant = module, use_reentrant

    def forward(self, x):
        if not self.active:
            return self.module(x)
        return checkpoint(self.module, x, use_reentrant=self.use_reentrant)


class InPlace(nn.Module):
    """Changes what it computed, as layers with ``inplace=True`` do."""

    def forward(self, x):
        return torch.relu_(torch.tanh(x) * 2)


class Views(nn.Module):
    def forward(self, x):
        return x.flip(1).transpose(2, 3).reshape(x.shape)


class Counts(nn.Module):
    """A buffer that the output depends on, and that every call changes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=F64))

    def forward(self, x):
        self.calls += 1
        return x * (1 + 0.1 * self.calls)


class Columns(nn.Module):
    """A sequence module over the pixels of a map."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2)
        out = self.module(tokens)
        out = out[0] if isinstance(out, tuple) else out
        return out.transpose(1, 2).reshape(x.shape)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(C, 2, batch_first=True)

    def forward(self, tokens):
        return self.attention(tokens, tokens, tokens, need_weights=False)[0]


def encoder():
    return nn.TransformerEncoderLayer(C, 2, 2 * C, dropout=0.1, batch_first=True)


LAYERS = {
    "conv": lambda: nn.Conv2d(C, C, 3, padding=1),
    "BatchNorm": lambda: nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)),
    "cumulative BatchNorm": lambda: nn.BatchNorm2d(C, momentum=None),
    "GroupNorm": lambda: nn.GroupNorm(2, C),
    "InstanceNorm": lambda: nn.InstanceNorm2d(C, affine=True, track_running_stats=True),
    "dropout": lambda: nn.Dropout(0.3),
    "in place": InPlace,
    "views": Views,
    "counts": Counts,
    "GRU": lambda: Columns(nn.GRU(C, C, batch_first=True)),
    "LSTM with dropout": lambda: Columns(nn.LSTM(C, C, 2, dropout=0.2, batch_first=True)),
    "attention": lambda: Columns(Attention()),
    "encoder": lambda: Columns(encoder()),
    "weight norm": lambda: parametrizations.weight_norm(nn.Conv2d(C, C, 1)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Conv2d(C, C, 1)),
    "nested": lambda: ReversibleSequence(RevBlock(nn.Conv2d(C // 2, C // 2, 1), nn.BatchNorm2d(C // 2))),
    "checkpoint": lambda: Checkpointed(nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), nn.Dropout(0.2))),
    "checkpoint, reentrant": lambda: Checkpointed(
        nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), nn.Tanh()), use_reentrant=True
    ),
    "checkpoint of a parametrised layer": lambda: Checkpointed(parametrizations.weight_norm(nn.Conv2d(C, C, 1))),
}


def step(net, x, *, reversible, training=True, checkpoints=True):
    """``(outputs, gradients, buffers)`` of one step of a copy of ``net``."""
    net = copy.deepcopy(net).train(training)
    net.reversible = reversible
    for module in net.modules():
        if isinstance(module, Checkpointed):
            module.active = checkpoints
        if isinstance(module, ReversibleSequence):
            module.reversible = reversible
    x = x.clone().requires_grad_()
    torch.manual_seed(5)
    out = net(x)
    out.sin().sum().backward()
    gradients = {name: p.grad for name, p in net.named_parameters()}
    return out.detach(), {"x": x.grad, **gradients}, dict(net.named_buffers())


def assert_reversible_as_stored(net, x, *, training=True, tolerance=1e-9):
    stored = step(net, x, reversible=False, training=training, checkpoints=False)
    found = step(net, x, reversible=True, training=training)
    torch.testing.assert_close(found[0], stored[0], rtol=0, atol=tolerance)
    for name, gradient in stored[1].items():
        if gradient is None:
            assert found[1][name] is None, name
            continue
        assert found[1][name] is not None, f"{name} has no gradient"
        assert torch.allclose(found[1][name], gradient, rtol=tolerance, atol=tolerance), name
    for name, buffer in stored[2].items():
        assert torch.allclose(found[2][name], buffer, rtol=tolerance, atol=tolerance), name


def network(make, blocks=2, dtype=F64):
    torch.manual_seed(0)
    return ReversibleSequence(*(RevBlock(make(), make()) for _ in range(blocks))).to(dtype)


def image(dtype=F64):
    torch.manual_seed(1)
    return torch.randn(BATCH, 2 * C, SIZE, SIZE, dtype=dtype)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layer", LAYERS)
def test_gradients_are_those_of_the_stored_run(layer, training):
    net = network(lambda: nn.Sequential(nn.Conv2d(C, C, 1), LAYERS[layer]()))
    assert_reversible_as_stored(net, image(), training=training)


@pytest.mark.parametrize("seed", [*range(4), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(4, 60))])
def test_gradients_of_random_transforms_are_those_of_the_stored_run(seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(count):
        return int(torch.randint(count, (), generator=generator))

    def make(depth=0):
        layers = [list(LAYERS.values())[draw(len(LAYERS))]() for _ in range(1 + draw(3))]
        module = nn.Sequential(nn.Conv2d(C, C, 1), *layers)
        if depth == 0 and draw(3) == 0:
            module = Checkpointed(nn.Sequential(make(1), nn.Tanh()), use_reentrant=draw(2) == 0)
        return module

    net = network(make, blocks=1 + draw(2))
    assert_reversible_as_stored(net, image(), training=draw(2) == 0)


@pytest.mark.parametrize("layer", [layer for layer in LAYERS if layer != "nested"])  # whose own streams are floats
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_exact_streams_take_layers_whose_kernels_differ_without_gradients(layer, training):
    net = network(LAYERS[layer], dtype=torch.float32)
    net.stream = "fixed32"
    reversible = step(net, image(torch.float32), reversible=True, training=training)
    stored = step(net, image(torch.float32), reversible=False, training=training)
    for name, gradient in stored[1].items():
        assert (gradient is None) == (reversible[1][name] is None), name
        assert gradient is None or torch.equal(reversible[1][name], gradient), name


@pytest.mark.parametrize("inside", ["forward", "step"])
def test_cached_parametrisations_have_their_gradients(inside):
    net = network(LAYERS["weight norm"])
    expected = step(net, image(), reversible=True)[1]
    net.zero_grad()
    x = image().requires_grad_()
    with parametrize.cached():
        loss = net(x).sin().sum()
        if inside == "step":
            loss.backward()
    if inside == "forward":
        loss.backward()
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.grad, expected[name])


def test_lazy_layers_are_refused_until_they_are_initialised():
    net = ReversibleSequence(RevBlock(nn.LazyConv2d(C, 1), nn.LazyConv2d(C, 1)))
    with pytest.raises(RuntimeError, match="not initialised yet"):
        net(image(torch.float32))
    for module in (net.blocks[0].f.xform_0_1, net.blocks[0].g.xform_0_1):
        module(torch.randn(1, C, 1, 1))  # as the message says
    net(image(torch.float32)).sum().backward()


class DrawsElsewhere(nn.Module):
    """A random layer, while another thread draws from the same generator."""

    def __init__(self):
        super().__init__()
        self.calls, self.layer = 0, nn.Dropout(0.5)

    def forward(self, x):
        self.calls += 1
        x = self.layer(x)
        if self.calls == 1:
            thread = threading.Thread(target=torch.rand, args=(1,))
            thread.start()
            thread.join()
        return self.layer(x)


def test_another_threads_draws_from_the_same_generator_are_noticed():
    net = ReversibleSequence(RevBlock(DrawsElsewhere(), nn.Conv2d(C, C, 1)))
    loss = net(image(torch.float32).requires_grad_()).sum()
    with pytest.raises(RuntimeError, match="did not draw the same random numbers"):
        loss.backward()


@contextlib.contextmanager
def setting(owner, name, value):
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


class Notes(nn.Module):
    """Writes down a setting at every call."""

    def __init__(self, read):
        super().__init__()
        self.read, self.seen = read, []

    def forward(self, x):
        self.seen.append(self.read())
        return x * 2


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (torch.backends.cuda.matmul, "fp32_precision", "tf32"),
        (torch.backends.cudnn.conv, "fp32_precision", "ieee"),
        (torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
        (torch.backends.cudnn, "benchmark", True),
    ],
)
def test_settings_of_backends_are_those_of_the_forward(owner, name, value):
    notes = Notes(lambda: getattr(owner, name))
    net = ReversibleSequence(RevBlock(notes, nn.Conv2d(C, C, 1)))
    before = getattr(owner, name)
    loss = net(image(torch.float32).requires_grad_()).sum()
    with setting(owner, name, value):
        loss.backward()
        assert getattr(owner, name) == value, "left as the caller has it"
    assert notes.seen == [before, before]


def test_deterministic_algorithms_are_those_of_the_forward():
    notes = Notes(torch.are_deterministic_algorithms_enabled)
    net = ReversibleSequence(RevBlock(notes, nn.Conv2d(C, C, 1)))
    loss = net(image(torch.float32).requires_grad_()).sum()
    torch.use_deterministic_algorithms(True)
    try:
        loss.backward()
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert notes.seen == [False, False]
