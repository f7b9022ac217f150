"""Networks of 16 bits: parameters, statistics and images."""

import pytest
import torch
from torch import nn

import revbifpn
from revbifpn import RevBlock, ReversibleSequence, fast
from revbifpn.fused import why_not_fused
from revbifpn.mbconv import MBConv
from tests.marks import mostly_slow, product
from tests.networks import BOTH, F32, F64, MOSTLY_FAST, error, gradients, identical, image, narrow

HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
STREAMS = {"default": None, "fixed16": "fixed16", "float32": "float32"}
# Of gradients, against float64 on the same rounded weights: as plain PyTorch's stored ones have, see the test.
MOST = {torch.bfloat16: 0.12, torch.float16: 0.03}


def network(module, dtype, **options):
    return narrow(module, F64, **options).to(dtype)


def truth(model, x):
    """Gradients of the same weights in float64, stored."""
    wide = narrow(revbifpn, reversible=False)
    wide.load_state_dict(model.state_dict())
    return gradients(wide, x.double())


@product(
    *("plain-bfloat16-default", "fast-float16-default", "fast-bfloat16-fixed16", "fast-bfloat16-float32"),
    module=BOTH,
    dtype=HALVES,
    stream=STREAMS,
)
def test_gradients_are_those_of_16_bits(module, dtype, stream):
    x, model = image(dtype), network(module, dtype, stream=stream)
    wanted, found = truth(model, x), gradients(model, x)
    assert {g.dtype for g in found} == {dtype}
    assert error(found, wanted) < MOST[dtype]
    stored = network(revbifpn, dtype, stream="float32", reversible=False)
    assert error(found, wanted) < 2 * error(gradients(stored, x), wanted)  # how 16 bits round depends on the machine


@MOSTLY_FAST
@pytest.mark.parametrize("stream", mostly_slow([None, "fixed16"]))
@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
def test_reversible_gradients_are_the_stored_ones_bit_for_bit(module, dtype, stream):
    reversible, stored = (network(module, dtype, stream=stream, reversible=r) for r in (True, False))
    x = image(dtype)
    assert identical(gradients(reversible, x), gradients(stored, x))
    assert identical(reversible.buffers(), stored.buffers())


@MOSTLY_FAST
def test_inference_gives_results_of_16_bits(module):
    for options in ({}, {"classes": None}, {"head_channels": None, "classes": None}):
        model = network(module, torch.bfloat16, **options).eval()
        wide = narrow(revbifpn, **options).eval()
        wide.load_state_dict(model.state_dict())
        with torch.no_grad():
            found, wanted = model(image(torch.bfloat16)), wide(image(torch.bfloat16).double())
        if isinstance(found, torch.Tensor):
            found, wanted = [found], [wanted]
        assert {y.dtype for y in found} == {torch.bfloat16}
        assert error(found, wanted) < 0.02
    inverted = model.inverse(model.forward_streams(image(torch.bfloat16)))
    assert inverted.dtype == torch.bfloat16 and error([inverted], [image(torch.bfloat16)]) < 0.05


def test_branches_run_fused_and_say_what_stream_they_go_with():
    model = network(fast, torch.bfloat16)
    mbconvs = [m for m in model.modules() if isinstance(m, MBConv)]
    assert not any(why_not_fused(m, torch.empty(1, 1, 1, 1)) for m in mbconvs)
    assert "go with a stream of torch.float32, and this one is torch.bfloat16" in why_not_fused(
        mbconvs[0], torch.empty(1, 1, 1, 1, dtype=torch.bfloat16)
    )


@MOSTLY_FAST
def test_convolutions_of_16_bits_beside_norms_of_32(module):
    """As optimizers with master weights make it."""
    model = narrow(module, F32)
    for m in model.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            m.bfloat16()
    x = image(torch.bfloat16)
    found = gradients(model, x)
    assert [g.dtype for g in found] == [p.dtype for p in model.parameters()]
    wide = narrow(revbifpn, reversible=False)
    wide.load_state_dict(model.state_dict())
    assert error(found, gradients(wide, x.double())) < MOST[torch.bfloat16]


def test_any_transform_reads_values_of_its_parameters_dtype():
    seen = []

    class Watched(nn.Conv2d):
        def forward(self, x):
            seen.append(x.dtype)
            return super().forward(x)

    net = ReversibleSequence(RevBlock(Watched(4, 4, 1), Watched(4, 4, 1))).bfloat16()
    y = net(torch.randn(2, 8, 4, 4, dtype=torch.bfloat16, requires_grad=True))
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and set(seen) == {torch.bfloat16} and len(seen) == 4
