"""The fast model is the plain one, whatever the channels, kernels, levels and the batch."""

import copy
import random

import pytest
import torch

import revbifpn
from revbifpn import fast
from revbifpn.fused import chunks_of


def draw(seed):
    """``(constructor arguments, batch, pixels, bytes of a chunk)``."""
    rng = random.Random(seed)
    levels = rng.choice([2, 3, 4])
    pick = lambda *choices: [rng.choice(choices) for _ in range(levels)]  # noqa: E731
    arguments = {
        "channels": [rng.choice([48, 64]), *(rng.choice([8, 14, 16, 24]) for _ in range(levels - 1))],
        "head_channels": pick(8, 10, 16, 48, 64),
        "dwk": pick(3, 5),
        "dwkp": pick(0, 2),
        "inv_blk_rep": rng.choice([1, 2]),
        "expand_ratios": pick(1, 1.5, 2),
        "se_ratios": pick(0.0, 0.125, 0.25, 1.0),
        "num_ext_layers": rng.choice([0, 1]),
        "head_dwk": pick(3, 5),
        "head_dwkp": pick(0, 2),
        "head_expand_ratios": pick(1, 2),
        "head_se_ratios": pick(0.0, 0.25),
        "fc_features": rng.choice([0, 24]),
        "head_dropout": 0.0,
        "classes": rng.choice([None, 7]),
        "upscale_mode": rng.choice(["bilinear", "nearest"]),
    }
    pixels = 4 * 2 ** (levels - 1) * rng.choice([2, 3])
    return arguments, rng.choice([2, 3, 7]), pixels, rng.choice([1, 1 << 13, 1 << 15, 1 << 30])


def step(net, x):
    outputs = net(x)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    sum((i + 1) * y.sin().sum() for i, y in enumerate(outputs)).backward()
    return (
        [y.detach() for y in outputs],
        {name: p.grad for name, p in net.named_parameters()},
        dict(net.named_buffers()),
    )


QUICK = (0, 28)  # 28: neck and merge of a level work in chunks of their own sizes


@pytest.mark.parametrize("reversible", [True, False])
@pytest.mark.parametrize(
    "seed", [seed if seed in QUICK else pytest.param(seed, marks=pytest.mark.slow) for seed in range(60)]
)
def test_a_step_of_the_fast_model_is_that_of_the_plain_one(seed, reversible):
    arguments, batch, pixels, chunk = draw(seed)
    torch.manual_seed(seed)
    plain = revbifpn.RevBiFPN(**arguments, reversible=False).double()
    net = fast.RevBiFPN(**arguments, reversible=reversible).double()
    net.load_state_dict(copy.deepcopy(plain.state_dict()))
    x = torch.randn(batch, 3, pixels, pixels, dtype=torch.float64)
    expected = step(plain, x)
    with chunks_of(chunk):
        found = step(net, x)
    for want, got in zip(expected[0], found[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    for part in (1, 2):
        for name, want in expected[part].items():
            got = found[part][name]
            assert (got is None) == (want is None), name
            if want is not None:
                scale = want.double().abs().max().clamp_min(1e-3)
                assert ((got.double() - want.double()).abs().max() / scale) < 1e-7, name
    with torch.no_grad():
        for want, got in zip(*(_listed(m.eval()(x)) for m in (plain, net)), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


def _listed(outputs):
    return [outputs] if isinstance(outputs, torch.Tensor) else outputs
