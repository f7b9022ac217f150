"""What leaves a reversible pass is its receiver's own: it shares no memory with the streams."""

import pytest
import torch
from torch import nn

from revbifpn import RevBlock, ReversibleSequence
from revbifpn.reversible import Coupling, Part, Reversible, recomputed
from tests.marks import covering, product
from tests.networks import F32, F64, MOSTLY_FAST, image, narrow

pytestmark = covering

STREAMS = pytest.mark.parametrize("stream", ["float32", "fixed32", "fixed16"])


class Half(nn.Module):
    def forward(self, x):
        return x[:, : x.shape[1] // 2]


class Transposed(nn.Module):
    def forward(self, x):
        return x.transpose(2, 3).transpose(2, 3)


class Detour(nn.Module):
    """Shares memory at the end of a way through other tensors."""

    def forward(self, x):
        return (x.flatten(2) if x.is_contiguous() else x).view_as(x)


NECKS = {"its input": nn.Identity, "a slice": Half, "a transposed view": Transposed, "a reshaped view": Detour}
MATRIX = product(
    *(f"{neck}-float32" for neck in NECKS),
    "its input-fixed16",
    neck=NECKS,
    stream={name: name for name in ("float32", "fixed32", "fixed16")},
)


def model(module, neck, stream="float32", dtype=F32):
    net = narrow(module, dtype, classes=None, stream=stream)
    for i in range(4):
        setattr(net.neck, f"recomp_transform_{i}", neck())
    return net.eval()


@MOSTLY_FAST
@MATRIX
def test_outputs_keep_their_values_through_backward(module, neck, stream):
    net = model(module, neck, stream)
    outputs = net(image(F32))
    before = [y.detach().clone() for y in outputs]
    sum(y.square().sum() for y in outputs).backward()
    for y, value in zip(outputs, before, strict=True):
        assert torch.equal(y, value)


@MOSTLY_FAST
@pytest.mark.parametrize("neck", NECKS.values(), ids=NECKS)
def test_gradients_are_those_of_the_stored_run(module, neck):
    found = []
    for reversible in (True, False):
        net = model(module, neck, dtype=F64)
        net.disable_rev = net.disable_recomp = not reversible
        sum(y.square().sum() for y in net(image())).backward()
        found.append([p.grad for p in net.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) > 0
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


@MOSTLY_FAST
@MATRIX
def test_changing_an_output_in_place_changes_nothing_else(module, neck, stream):
    """The outputs are squared before they are changed, so autograd needs them as they were, and says so."""
    net = model(module, neck, stream)
    outputs = net(image(F32))
    loss = sum(y.square().sum() for y in outputs)
    with torch.no_grad():
        outputs[0].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@MOSTLY_FAST
@MATRIX
def test_outputs_that_nothing_needs_any_more_may_be_changed_in_place(module, neck, stream):
    gradients = []
    for change in (False, True):
        net = model(module, neck, stream)
        outputs = net(image(F32))
        loss = sum(y.sum() for y in outputs)
        if change:
            with torch.no_grad():
                for y in outputs:
                    y.fill_(7)
        loss.backward()
        gradients.append([p.grad for p in net.parameters() if p.grad is not None])
    assert all(map(torch.equal, *gradients))


def test_a_view_of_the_input_may_be_recomputed():
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    y = recomputed(nn.Identity(), x)
    y.sum().backward()
    with torch.no_grad():
        y.zero_()
    assert x.any() and torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("dims", [2, 3, 4, 5])
@STREAMS
def test_streams_have_any_number_of_dimensions(dims, stream):
    """``[N, C]``, sequences, maps, volumes: backward is exact where the stream is, under autocast by default."""
    torch.manual_seed(0)
    layer = nn.Linear if dims == 2 else {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[dims]
    arguments = () if dims == 2 else (3,)
    options = {} if dims == 2 else {"padding": 1}
    make = lambda: nn.Sequential(layer(4, 4, *arguments, **options), nn.Tanh())  # noqa: E731
    net = ReversibleSequence(RevBlock(make(), make()), RevBlock(make(), make()), stream=stream)
    x = torch.randn(3, 8, *(5, 4, 6)[: dims - 2])
    found = []
    for reversible in (True, False):
        net.reversible = reversible
        net.zero_grad()
        z = x.clone().requires_grad_()
        y = net(z)
        y.square().sum().backward()
        found.append([y.detach(), z.grad, *(p.grad for p in net.parameters())])
    if stream == "float32":
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    else:
        assert all(map(torch.equal, *found))
    with torch.autocast("cpu", torch.bfloat16):
        net.stream, net.reversible = None, True
        net(x).square().sum().backward()


class Tokens(nn.Module):
    """A block of token sequences ``[N, L, C]``."""

    def __init__(self):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        x = self.norm(x)
        return self.attention(x, x, x, need_weights=False)[0]


@STREAMS
def test_streams_are_token_sequences(stream):
    class Block(Reversible):
        def __init__(self):
            super().__init__()
            self.f, self.g = Tokens(), Tokens()

        def couplings(self):
            yield Coupling(Part(1), ((Part(0), self.f),))
            yield Coupling(Part(0), ((Part(1), self.g),))

    torch.manual_seed(0)
    net = ReversibleSequence(Block(), Block(), stream=stream)
    inputs = [torch.randn(2, 5, 8) for _ in range(2)]
    found = []
    for reversible in (True, False):
        net.reversible = reversible
        net.zero_grad()
        sum(y.square().sum() for y in net(*inputs)).backward()
        found.append([p.grad for p in net.parameters()])
    if stream == "float32":
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    else:
        assert all(map(torch.equal, *found))
