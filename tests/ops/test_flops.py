"""``FlopCounterMode`` counts the ops as it counts the layers that they replace."""

import inspect

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import revbifpn
from revbifpn import fast
from revkernels import flops
from revkernels.registry import OPS
from tests.marks import covering

NETWORK = dict(
    channels=(48, 16, 24, 32),
    head_channels=(16, 16, 24, 32),
    fc_features=64,
    num_ext_layers=1,
    inv_blk_rep=1,
    classes=10,
)
VARIANTS = {
    "fast": (fast.RevBiFPN, {}),
    "fast, stored": (fast.RevBiFPN, {"reversible": False}),
    "fast, fixed16": (fast.RevBiFPN, {"stream": "fixed16"}),
    "stored": (revbifpn.RevBiFPN, {"reversible": False}),
}


def count(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def counts_of(source, backward=False, **options):
    model, x = source(**(NETWORK | options)), torch.randn(2, 3, 64, 64)
    if not backward:
        model.eval()
        with torch.no_grad():
            return count(lambda: model(x))
    return count(lambda: model(x).sum().backward())


@pytest.mark.slow
@covering
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_forward_counts_what_the_readable_network_counts(variant):
    source, options = VARIANTS[variant]
    assert counts_of(source, **options) == counts_of(revbifpn.RevBiFPN) > 0


def test_a_reversible_step_counts_its_recompute():
    """Gradients of weights and inputs are two forwards, what is computed again is at least the blocks' forward."""
    forward = counts_of(fast.RevBiFPN)
    stored = counts_of(fast.RevBiFPN, backward=True, reversible=False)
    reversible = counts_of(fast.RevBiFPN, backward=True)
    assert 2.5 * forward < stored <= reversible - 0.5 * forward
    assert reversible < 6 * forward


@pytest.mark.parametrize(
    ("op", "layer", "arguments"),
    [
        ("pointwise", nn.Conv2d(6, 4, 1, bias=False), ()),
        ("depthwise", nn.Conv2d(6, 6, 5, padding=2, stride=2, groups=6, bias=False), (2,)),
    ],
)
def test_a_convolution_and_each_of_its_gradients_count_what_the_layer_counts(op, layer, arguments):
    ops, x = torch.ops.revkernels, torch.randn(2, 6, 9, 8)
    with torch.no_grad():
        y = layer(x)
    wanted = count(lambda: layer(x))
    nothing = (None, None)
    if op == "pointwise":
        calls = {
            "forward": lambda: ops.pointwise_conv_(y, x, layer.weight.detach(), *nothing, None),
            "weight": lambda: ops.pointwise_conv_grad_weight(x, y, *nothing, None),
        }
    else:
        calls = {
            "forward": lambda: ops.depthwise_conv(x, layer.weight.detach(), *nothing, 2),
            "weight": lambda: ops.depthwise_conv_grad_weight(x, y, *nothing, 5, 2),
            "input": lambda: ops.depthwise_conv_grad_input(y, layer.weight.detach(), 9, 8, 2),
        }
    assert {name: count(call) for name, call in calls.items()} == dict.fromkeys(calls, wanted)


def test_every_op_of_products_has_a_formula_of_its_name():
    formulas = {name for name, _ in inspect.getmembers(flops, inspect.isfunction) if name in OPS}
    assert {op for op in OPS if "conv" in op or op.startswith("se_")} == formulas
    assert all(getattr(torch.ops.revkernels, op) in flop_registry for op in formulas)


@pytest.mark.slow
def test_shapes_without_values_are_counted():
    x, weight = torch.randn(2, 6, 9, 8, device="meta"), torch.randn(6, 1, 3, 3, device="meta")
    assert count(lambda: torch.ops.revkernels.depthwise_conv(x, weight, None, None, 1)) == 2 * 9 * x.numel()
    with torch.device("meta"):
        model, image = fast.RevBiFPN(**NETWORK).eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert count(lambda: model(image)) == counts_of(revbifpn.RevBiFPN)
