"""Images of any number of channels: the stem repeats what comes, and weights do not depend on it."""

import pytest
import torch

import revbifpn
from revbifpn import estimate_memory, fast, load_checkpoint, save_checkpoint
from revbifpn.memory import measure_step
from tests.marks import slow
from tests.networks import F32, F64, MODULES, MOSTLY_FAST, TWO_LEVELS, assert_same_as_stored, identical, narrow, scalar

PLANES = 4
WIDE = TWO_LEVELS | {"channels": [16 * PLANES, 32], "head_dropout": 0.0}


def network(module, in_chans, dtype=F64, **options):
    return narrow(module, dtype, **(WIDE | {"in_chans": in_chans} | options))


def pixels(channels, dtype=F64, n=2, height=32, width=24):
    return torch.randn(n, channels, height, width, dtype=F64, generator=torch.Generator().manual_seed(1)).to(dtype)


@MODULES
@pytest.mark.parametrize("c", [1, 2, 3, 4])
def test_the_stem_is_its_formula(module, c):
    stem, x, b = network(module, c).stem, pixels(c), 4
    y = stem(x)
    for r in range(b):
        for q in range(b):
            for p in range(PLANES):
                assert torch.equal(y[:, (r * b + q) * PLANES + p], x[:, p % c, r::b, q::b])
    assert torch.equal(stem.inverse(y), x)


@MOSTLY_FAST
@pytest.mark.parametrize("c", [1, 4])
@pytest.mark.parametrize("options", [{}, {"stream": "fixed32"}, {"reversible": False}], ids=str)
def test_inverse_gives_all_channels_back(module, c, options):
    dtype = F32 if "stream" in options else F64
    model = network(module, c, dtype, **options).eval()
    x = pixels(c, dtype)
    with torch.no_grad():
        found = model.inverse(model.forward_streams(x))
    torch.testing.assert_close(found, x, rtol=0, atol=2**-12 if "stream" in options else 1e-9)


@MOSTLY_FAST
@pytest.mark.parametrize("c", [1, 2, 4])
def test_gradients_are_those_of_the_stored_model(module, c):
    def run(model):
        x = pixels(c).requires_grad_()
        return torch.autograd.grad(scalar(model(x)), [x, *model.parameters()])

    assert_same_as_stored(module, run, **WIDE, in_chans=c)


@MODULES
@pytest.mark.parametrize("c", [1, 2, 4])
def test_weights_of_three_channels_compute_the_same_for_grey_images_in_any(module, c, tmp_path):
    """Whatever C is, every plane holds the grey values: nothing is to be adapted, forward or backward."""
    grey, of_three, of_c = pixels(1), network(module, 3), network(module, c, seed=1)
    save_checkpoint(of_three, tmp_path / "three.pth")
    assert load_checkpoint(of_c, tmp_path / "three.pth").complete
    gradients = []
    for model in (of_three, of_c):
        gradients.append(
            torch.autograd.grad(scalar(model(grey.expand(-1, model.in_chans, -1, -1))), model.parameters())
        )
    assert identical(*gradients)
    with torch.no_grad():
        a, b = (m.eval()(grey.expand(-1, m.in_chans, -1, -1)) for m in (of_three, of_c))
    assert torch.equal(a, b)


@MODULES
@pytest.mark.parametrize(
    "in_chans, channels", [(5, "channels[0] >= 80"), (13, "channels[0] >= 208, as revbifpn_s5 has")]
)
def test_too_many_channels_are_refused_with_the_room_that_they_need(module, in_chans, channels):
    with pytest.raises(ValueError, match="in_chans: expected 1 to 4") as caught:
        network(module, in_chans)
    assert channels in str(caught.value)
    room = int(channels.split()[2].rstrip(","))
    assert network(module, in_chans, channels=[room, 32]).in_chans == in_chans


def test_no_channels_are_refused():
    with pytest.raises(ValueError, match="in_chans: expected 1 to 4.*got 0"):
        network(revbifpn, 0)


@MODULES
def test_an_image_of_other_channels_is_refused_with_the_argument_that_takes_it(module):
    with pytest.raises(ValueError, match=r"\[N, 3, H, W\].*got shape \(2, 1, 32, 24\); in_chans=1"):
        network(module, 3)(pixels(1))
    assert network(module, 1)(pixels(1)).isfinite().all()


@pytest.mark.parametrize("c", [4, *slow([1])])
def test_memory_is_estimated_for_the_models_own_channels(c):
    model = network(fast, c, F32)
    estimate = estimate_memory(model, 2, (32, 24))
    assert estimate.images == 2 * c * 32 * 24 * 4
    assert estimate.activations == measure_step(model, (c, 32, 24), batch=2).peak_bytes
