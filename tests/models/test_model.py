"""RevBiFPN as a module: constructor, shapes, inverse, and errors that say what to do."""

import copy
import inspect
import math
import re

import pytest
import torch
from torch import nn

import revbifpn
from revbifpn import check_invertible, fast
from revbifpn.configs import CONFIGS, get_config
from revbifpn.mbconv import MBConv
from tests.marks import covering, mostly_slow
from tests.networks import F32, F64, MODULES, MOSTLY_FAST, NARROW, error, image, narrow

pytestmark = covering

SMALL = NARROW | {"head_channels": [16, 16, 32, 32]}

# The published constructor, in its order.
PUBLISHED = {
    "stem_downsampling": 2,
    "channels": [48, 64, 80, 160],
    "dwk": [3, 5, 5, 3],
    "dwkp": [0, 0, 0, 2],
    "inv_blk_rep": 2,
    "expand_ratios": [1, 1, 2, 2],
    "se_ratios": [0.25, 0.25, 0.125, 0],
    "num_ext_layers": 2,
    "zero_init": False,
    "stochastic_depth": 0.0,
    "upscale_mode": "bilinear",
    "disable_rev": False,
    "disable_recomp": False,
    "head_channels": [48, 64, 128, 320],
    "head_dwk": [3, 3, 3, 3],
    "head_dwkp": [2, 2, 2, 2],
    "head_expand_ratios": [1, 2, 2, 2],
    "head_se_ratios": [0.25, 0.25, 0.125, 0.125],
    "fc_features": 1280,
    "head_dropout": 0.2,
    "classes": 1000,
    "norm": True,
    "norm_fn": nn.BatchNorm2d,
    "norm_kwargs": {"eps": 1e-3, "momentum": 0.1, "affine": True, "track_running_stats": True},
    "act_fn": nn.Hardswish,
    "se_sig_act": nn.Hardsigmoid,
}


def small(module, dtype=F64, **options):
    return narrow(module, dtype, **({"head_channels": SMALL["head_channels"]} | options))


def assert_trains(model, x):
    """Every parameter gets a gradient, and it is that of stored activations."""
    gradients = []
    for reversible in (True, False):
        model.rev_stack.reversible = reversible
        torch.manual_seed(2)
        out = model(x)
        loss = sum(y.square().sum() for y in ([out] if isinstance(out, torch.Tensor) else out))
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    assert any(g.any() for g in gradients[1]) and error(*gradients) <= 1e-9


# Constructor ------------------------------------------------------------------------------------


def test_constructor_takes_the_published_arguments_in_their_order():
    parameters = list(inspect.signature(revbifpn.RevBiFPN.__init__).parameters.values())[1:]
    positional = [p for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in positional] == list(PUBLISHED)
    for parameter in positional:
        default = parameter.default
        if parameter.name == "norm_kwargs":
            assert default is None
            norm = revbifpn.RevBiFPN(**SMALL).head.final_conv.norm
            assert {k: getattr(norm, k) for k in PUBLISHED["norm_kwargs"]} == PUBLISHED["norm_kwargs"]
        else:
            assert (list(default) if isinstance(default, tuple) else default) == PUBLISHED[parameter.name]


@MODULES
def test_positional_arguments_mean_what_keywords_mean(module):
    values = list((PUBLISHED | SMALL).values())
    with torch.device("meta"):
        by_position, by_keyword = module.RevBiFPN(*values), module.RevBiFPN(**(PUBLISHED | SMALL))
    assert str(by_position) == str(by_keyword)


@pytest.mark.slow
@MODULES
@pytest.mark.parametrize("arch", mostly_slow(CONFIGS))
def test_scale_by_name(module, arch):
    config = get_config(arch)
    with torch.device("meta"):
        by_class = module.RevBiFPN_S(arch, False, False, True, classes=7)
        by_factory = getattr(module, arch)(False, progress=False, strict=True, classes=7)
    assert str(by_class) == str(by_factory)
    assert by_class.head.fc.out_features == 7 and by_class.head.fc.in_features == config.fc_features
    assert by_class.head.dropout.p == config.head_dropout
    drops = [m.stochastic_depth for m in by_class.rev_stack.modules() if isinstance(m, MBConv)]
    assert max(drops) == pytest.approx(config.stochastic_depth)


def test_stochastic_depth_grows_with_the_layer_and_spares_new_levels_and_neck():
    model = small(revbifpn, stochastic_depth=0.5, num_ext_layers=1)
    for k, layer in enumerate([1, 2, 3, 4]):
        blocks, silo = model.rev_stack.blocks[2 * k : 2 * k + 2]
        assert {m.stochastic_depth for m in blocks.modules() if isinstance(m, MBConv)} == {0.5 * layer / 4}
        for coupling in silo.couplings():
            drops = {m.stochastic_depth for _, t in coupling.terms for m in t.modules() if isinstance(m, MBConv)}
            assert drops == {0.0 if coupling.creates else 0.5 * layer / 4}
    assert {m.stochastic_depth for m in model.neck.modules() if isinstance(m, MBConv)} == {0.0}
    assert {m.stochastic_depth for m in model.head.modules() if isinstance(m, MBConv)} == {0.0}


def test_stochastic_depth_drops_samples_at_its_rate():
    torch.manual_seed(0)
    layer = MBConv(4, 4, 3, stochastic_depth=0.25)
    kept = layer(torch.randn(4000, 4, 2, 2)).flatten(1).abs().amax(1) > 0
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.03)
    x, evaluated = torch.randn(50, 4, 2, 2), copy.deepcopy(layer).eval()
    layer.eval().training = True  # norms as in evaluation: samples that are kept are scaled by 1 / (1 - p), no more
    dropped, full = layer(x), evaluated(x)
    kept = dropped.flatten(1).abs().amax(1) > 0
    assert torch.allclose(dropped[kept] * 0.75, full[kept], rtol=1e-5)


def test_initialisation():
    torch.manual_seed(0)
    model = revbifpn.revbifpn_s0()
    for name, m in model.named_modules():
        if isinstance(m, nn.Conv2d):
            fan_out = m.weight.shape[0] * m.weight[0, 0].numel()
            if m.weight.numel() > 2000:
                assert m.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.1), name
            assert m.bias is None or not m.bias.any()
        elif isinstance(m, nn.BatchNorm2d):
            assert torch.all(m.weight == 1) and not m.bias.any()
    assert model.head.fc.weight.abs().max() <= 1 / math.sqrt(1280)


@MODULES
def test_zero_init_makes_the_stack_the_identity_on_level_0(module):
    model = small(module, zero_init=True, classes=None, head_channels=None)
    for coupling in model.rev_stack.couplings():
        for _, transform in coupling.terms:
            scale = next(m for m in transform.modules() if isinstance(m, MBConv)).project_conv.norm.weight
            assert torch.all(scale == (1 if coupling.creates else 0))
    streams = model(image())
    assert torch.equal(streams[0], model.stem(image()))
    assert all(level.abs().max() > 0 for level in streams)


def four_groups(channels, **_):
    return nn.GroupNorm(4, channels)


@MOSTLY_FAST
@pytest.mark.parametrize(
    "options",
    [
        {"fc_features": 0},
        {"fc_features": None},
        {"classes": None},
        {"classes": 0},
        {"head_channels": None},
        {"head_channels": None, "classes": None},
        {"head_channels": None, "fc_features": 0},
        {"norm": False},
        {"norm_kwargs": {"eps": 1e-2, "momentum": None}},
        {"norm_fn": four_groups},
        {"act_fn": nn.ReLU, "se_sig_act": nn.Sigmoid},
        {"upscale_mode": "nearest"},
        {"zero_init": True},
        {"head_dropout": 0.5, "stochastic_depth": 0.3},
        {"inv_blk_rep": 0},
        {"channels": [48, 18, 14, 22]},
        {"channels": [48, 17, 15, 13]},
        {"expand_ratios": [2, 1.5, 1, 3], "se_ratios": [0, 1, 0.01, 0.5]},
        {"dwk": [5, 3, 3, 1], "dwkp": [0, 2, 0, 0]},
        {"stem_downsampling": 1, "channels": [16, 16, 16, 16]},
        {"stem_downsampling": 3, "channels": [192, 16, 16, 16]},
        {"stem_downsampling": 0, "channels": [6, 16, 16, 16]},
    ],
    ids=lambda options: re.sub(r" at 0x\w+", "", str(options)),  # the same in every process
)
def test_options_build_and_train(module, options):
    model = small(module, **options)
    out = model(image())
    maps = model.neck_channels
    if options.get("classes", 10):
        assert out.shape == (2, 10)
    else:
        side = 64 >> options.get("stem_downsampling", 2)
        assert [tuple(level.shape) for level in out] == [(2, c, side >> i, side >> i) for i, c in enumerate(maps)]
    assert_trains(model, image())
    assert options.get("norm", True) or not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())


@MODULES
@pytest.mark.parametrize("levels", [1, 2, 3, 5])
def test_number_of_levels_is_the_length_of_the_lists(module, levels):
    lists = {"channels": [48, 16, 24, 16, 32], "dwk": [3] * 5, "dwkp": [0] * 5, "expand_ratios": [1, 2, 1, 2, 1]}
    lists |= {"se_ratios": [0.25] * 5, "head_channels": [16] * 5, "head_dwk": [3] * 5, "head_dwkp": [2] * 5}
    lists |= {"head_expand_ratios": [1] * 5, "head_se_ratios": [0.0] * 5}
    options = {name: values[:levels] for name, values in lists.items()}
    side = 2 ** (levels + 1)
    model = small(module, classes=None, **options)
    pyramid = model(image(height=2 * side, width=3 * side))
    assert [tuple(p.shape[1:]) for p in pyramid] == [(16, 2 << i, 3 << i) for i in reversed(range(levels))]
    assert_trains(small(module, **options), image(n=4, height=2 * side, width=2 * side))


def test_given_lists_are_not_changed():
    given = {name: list(v) if isinstance(v, list) else v for name, v in (PUBLISHED | SMALL).items()}
    small(revbifpn, **given)
    assert given == {name: v for name, v in (PUBLISHED | SMALL).items()}


# Shapes -----------------------------------------------------------------------------------------


@MODULES
@pytest.mark.parametrize("n, height, width", [(1, 64, 64), (2, 32, 96), (3, 96, 64)])
def test_sizes_that_are_multiples_of_32(module, n, height, width):
    model = small(module).eval()
    assert model(image(F64, n, height, width)).shape == (n, 10)
    model.head = None
    shapes = [tuple(p.shape) for p in model(image(F64, n, height, width))]
    assert shapes == [(n, c, height >> (2 + i), width >> (2 + i)) for i, c in enumerate([16, 16, 32, 32])]


@MODULES
@pytest.mark.parametrize("classes", [10, None])
def test_unbatched_image(module, classes):
    model = small(module, classes=classes).eval()
    x = image(n=1)
    one, batch = model(x[0]), model(x)
    for a, b in zip([one] if classes else one, [batch] if classes else batch, strict=True):
        assert torch.equal(a, b[0])


@MODULES
def test_samples_do_not_depend_on_each_other_in_evaluation(module):
    model = small(module).eval()
    x = image(n=3)
    assert torch.allclose(model(x), torch.cat([model(x[i : i + 1]) for i in range(3)]), rtol=1e-10, atol=1e-12)


def test_both_classes_compute_the_same():
    for training in (True, False):
        plain, fused = small(revbifpn).train(training), small(fast).train(training)
        assert plain.state_dict().keys() == fused.state_dict().keys()
        assert torch.allclose(plain(image()), fused(image()), rtol=1e-10, atol=1e-12)


@MODULES
def test_neck_and_head_can_be_separated(module):
    model = small(module).eval()
    streams = model.forward_streams(image())
    pyramid = model.neck(streams)
    assert torch.allclose(model.head(pyramid), model(image()), rtol=1e-10, atol=1e-12)


# Inverse ----------------------------------------------------------------------------------------


@MODULES
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype, tolerance", [(F64, 1e-12), (F32, 1e-3)])
def test_inverse_of_the_backbone_is_the_image(module, training, dtype, tolerance):
    model = small(module, dtype, num_ext_layers=2).train(training)
    x = image(dtype=dtype)
    streams = model.forward_streams(x)
    kept = [y.detach().clone() for y in streams]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    inverted = model.inverse(streams)
    assert (inverted - x).norm() <= tolerance * x.norm()
    assert all(torch.equal(y, before) for y, before in zip(streams, kept, strict=True))
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@MODULES
def test_inverse_of_every_block(module):
    model = small(module, num_ext_layers=1, stochastic_depth=0.3)
    streams = [model.stem(image())]
    for block in model.rev_stack.blocks:
        block.coupler = model.rev_stack.coupler
        assert max(check_invertible(block, *streams)) < 1e-12
        block.eval()
        given = [x.clone() for x in streams]
        with torch.no_grad():
            streams = block(*streams)
        streams = [streams] if isinstance(streams, torch.Tensor) else list(streams)
        inverted = block.inverse(*streams)
        inverted = [inverted] if isinstance(inverted, torch.Tensor) else inverted
        assert all((a - b).norm() <= 1e-12 * b.norm() for a, b in zip(inverted, given, strict=True))
    assert len(streams) == 4


@MODULES
def test_backbone_passes_the_check(module):
    model = small(module, F32, num_ext_layers=2, stochastic_depth=0.3)
    assert max(check_invertible(model.rev_stack, model.stem(image(dtype=F32)))) < 1e-3


@MODULES
def test_check_finds_a_transform_with_hidden_state(module):
    class Hidden(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return x * self.calls

    model = small(module)
    model.rev_stack.blocks[2].rev_transform_1.g.xform_0_1 = Hidden()
    with pytest.raises(AssertionError, match="computes another function the second time"):
        check_invertible(model.rev_stack, model.stem(image()))


@MODULES
def test_inverse_needs_all_streams(module):
    model = small(module)
    with pytest.raises(ValueError, match="streams: expected 4 maps .* got 3"):
        model.inverse(model.forward_streams(image())[:3])


# Errors -----------------------------------------------------------------------------------------


@MODULES
@pytest.mark.parametrize(
    "x, error, message",
    [
        (torch.zeros(1, 3, 72, 64), ValueError, "multiples of 32, got 72 x 64"),
        (torch.zeros(1, 3, 64, 100), ValueError, "multiples of 32, got 64 x 100"),
        (torch.zeros(1, 3, 0, 64), ValueError, "positive multiples of 32, got 0 x 64"),
        (torch.zeros(1, 1, 64, 64), ValueError, r"\[N, 3, H, W\].*got shape \(1, 1, 64, 64\)"),
        (torch.zeros(1, 4, 64, 64), ValueError, r"got shape \(1, 4, 64, 64\)"),
        (torch.zeros(64, 64, 3), ValueError, r"got shape \(64, 64, 3\)"),
        (torch.zeros(64, 64), ValueError, r"got shape \(64, 64\)"),
        (torch.zeros(1, 1, 3, 64, 64), ValueError, r"got shape \(1, 1, 3, 64, 64\)"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), ValueError, "floating-point image, got torch.uint8"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.long), ValueError, "floating-point image, got torch.int64"),
        ([[0.0]], TypeError, "x: expected a Tensor, got list"),
        (None, TypeError, "x: expected a Tensor, got NoneType"),
    ],
    ids=str,
)
def test_image_that_does_not_fit_is_refused_with_what_came_and_what_is_wanted(module, x, error, message):
    model = small(module, F32)
    for call in (model, model.forward_streams):
        with pytest.raises(error, match=message):
            call(x)


@MODULES
@pytest.mark.parametrize(
    "options, message",
    [
        ({"dwk": [3, 3, 3]}, "dwk: expected one entry per level, 4 .* got 3"),
        ({"se_ratios": [0.25] * 5}, "se_ratios: expected one entry per level, 4 .* got 5"),
        (
            {"channels": [50, 16, 16, 16]},
            r"channels\[0\]: expected a multiple of 4\^stem_downsampling = 16, at least 48, got 50",
        ),
        ({"channels": [32, 16, 16, 16]}, r"channels\[0\]: .*at least 48, got 32"),
        ({"stem_downsampling": 3}, r"channels\[0\]: expected a multiple of .* = 64, at least 192, got 48"),
        ({"upscale_mode": "bicubic"}, "upscale_mode: expected 'bilinear' or 'nearest', got 'bicubic'"),
        ({"zero_init": True, "norm": False}, "zero_init: expected norm=True"),
        ({"stochastic_depth": 1.5}, r"stochastic_depth: expected a probability in \[0, 1\)"),
        ({"head_dwk": [3, 3]}, "head_.*: expected one entry per level, 4"),
        ({"head_channels": [16, 16, 16]}, "head_.*: expected one entry per level, 4"),
    ],
    ids=str,
)
def test_constructor_names_the_argument_that_does_not_fit(module, options, message):
    with pytest.raises(ValueError, match=message):
        small(module, **options)


def test_unknown_arch_lists_the_known_ones():
    with pytest.raises(ValueError, match="arch: expected one of .*revbifpn_s6.* got 'revbifpn_s7'"):
        revbifpn.RevBiFPN_S("revbifpn_s7")
