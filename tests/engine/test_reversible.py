"""The reversible engine on networks of the user's own: couplings, inverses, recorded branches, memory."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from revbifpn import RevBlock, ReversibleSequence, RevSilo, check_invertible, memory
from revbifpn.engine.lowered import Coupler
from revbifpn.fused import FusedCoupler
from revbifpn.mbconv import MBConv
from revbifpn.reversible import Coupling, Part, PerLevel, Reversible, Upsampled, is_recomputing, recomputed
from tests.marks import covering

pytestmark = covering

C = 4  # channels of a half
F64 = torch.float64


def conv(inputs=C, outputs=C, stride=1):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, padding=1), nn.Tanh())


def chain(*transforms):
    """Two RevBlocks of four transforms."""
    f, g, h, k = transforms
    return ReversibleSequence(RevBlock(f, g), RevBlock(h, k))


def four(make):
    return chain(make(), make(), make(), make())


def silo(channels=(8, 6, 10), created=0, mode="bilinear"):
    levels = len(channels)
    down, up = {}, {}
    for i in range(levels - created):
        for j in range(i + 1, levels):
            down[i, j] = nn.Sequential(nn.Conv2d(channels[i], channels[j], 3, 2 ** (j - i), padding=1), nn.Tanh())
    for i in range(levels):
        for j in range(i):
            up[i, j] = Upsampled(conv(channels[i], channels[j]), 2 ** (i - j), mode)
    return RevSilo(down, up, levels, created)


def streams(channels=(8, 6, 10), dtype=F64, size=16):
    return [torch.randn(2, c, size >> i, size >> i, dtype=dtype) for i, c in enumerate(channels)]


def outputs_and_gradients(net, inputs, reversible, *, seed=0):
    """Outputs, gradients of inputs and parameters, for a loss that is not symmetric in anything."""
    net.reversible = reversible
    net.zero_grad(set_to_none=True)
    inputs = [x.clone().requires_grad_() for x in inputs]
    torch.manual_seed(seed)
    outputs = net(*inputs)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    loss = sum((y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum() + y.pow(3).sum() for y in outputs)
    loss.backward()
    return outputs, [x.grad for x in inputs] + [p.grad for p in net.parameters()]


def assert_same(found, wanted, tolerance):
    """Norms of differences are small beside the tensor's own, or beside 1e-3 of the largest where that is larger."""
    floor = max([1e-3 * b.norm().item() for b in wanted if b is not None and b.numel()], default=0.0)
    for a, b in zip(found, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a - b).norm() <= tolerance * max(b.norm().item(), floor)


def assert_reversible_as_stored(net, *inputs, tolerance=1e-10):
    """Reversible and stored runs agree in outputs, gradients and buffers."""
    twin = copy.deepcopy(net)
    found = outputs_and_gradients(net, inputs, True)
    wanted = outputs_and_gradients(twin, inputs, False)
    assert any(g is not None and g.norm() > 1e-3 for g in wanted[1])
    assert_same(found[0], wanted[0], tolerance)
    assert_same(found[1], wanted[1], tolerance)
    for (name, a), b in zip(net.named_buffers(), twin.buffers(), strict=True):
        assert torch.allclose(a, b, rtol=1e-13, atol=0.0), name


# Networks --------------------------------------------------------------------------------------


NETWORKS = {
    "block": (lambda: ReversibleSequence(RevBlock(conv(), conv())), (8,)),
    "odd channels": (lambda: ReversibleSequence(RevBlock(conv(4, 3), conv(3, 4))), (7,)),
    "two blocks": (lambda: four(conv), (8,)),
    "nested sequence": (lambda: ReversibleSequence(four(conv), ReversibleSequence(RevBlock(conv(), conv()))), (8,)),
    "reversible inside a transform": (
        lambda: ReversibleSequence(RevBlock(ReversibleSequence(RevBlock(conv(2, 2), conv(2, 2))), conv())),
        (8,),
    ),
    "per level": (
        lambda: ReversibleSequence(
            PerLevel([RevBlock(conv(), conv()), RevBlock(conv(3, 3), conv(3, 3))]), silo((8, 6))
        ),
        (8, 6),
    ),
    "silo": (silo, (8, 6, 10)),
    "nearest silo": (lambda: silo(mode="nearest"), (8, 6, 10)),
    "silo that grows by one": (lambda: silo(created=1), (8, 6)),
    "silo that grows by two": (lambda: silo(created=2), (8,)),
    "growing, then not": (lambda: ReversibleSequence(silo((8, 6), 1), silo((8, 6, 10), 1), silo()), (8,)),
    "empty": (lambda: ReversibleSequence(), (8,)),
}
networks = pytest.mark.parametrize("name", NETWORKS)
couplers = pytest.mark.parametrize("coupler", [Coupler, FusedCoupler])


def network(name, coupler=Coupler, dtype=F64):
    torch.manual_seed(0)
    make, channels = NETWORKS[name]
    net = make().to(dtype)
    net.coupler = coupler()
    return net, streams(channels, dtype)


@networks
@couplers
def test_gradients_are_those_of_stored_activations(name, coupler):
    net, inputs = network(name, coupler)
    assert_reversible_as_stored(net, *inputs)


@networks
@couplers
def test_inverse_of_forward_is_identity(name, coupler):
    net, inputs = network(name, coupler)
    given = [x.clone() for x in inputs]
    outputs = net(*inputs)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    kept = [y.clone() for y in outputs]
    inverted = net.inverse(*outputs)
    inverted = [inverted] if isinstance(inverted, torch.Tensor) else inverted
    assert_same(inverted, given, 1e-12)
    for y, before in zip([*outputs, *inputs], [*kept, *given], strict=True):
        assert torch.equal(y, before), "forward and inverse leave what they are given as it was"
    assert check_invertible(net, *inputs) == pytest.approx([0.0] * len(inputs), abs=1e-12)


@networks
def test_inverse_in_float32_is_as_good_as_the_dtype(name):
    net, inputs = network(name, dtype=torch.float32)
    assert max(check_invertible(net, *inputs)) < 1e-5


@networks
def test_gradients_agree_with_finite_differences(name):
    net, inputs = network(name)
    leaves = [x.requires_grad_() for x in inputs] + list(net.parameters())
    directions = [torch.randn_like(t) for t in leaves]

    def loss():
        outputs = net(*inputs)
        return sum(y.pow(3).mean() for y in ([outputs] if isinstance(outputs, torch.Tensor) else outputs))

    gradients = torch.autograd.grad(loss(), leaves)
    slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True)).item()
    with torch.no_grad():
        values = []
        for step in (-1e-6, 2e-6):
            for t, d in zip(leaves, directions, strict=True):
                t.add_(d, alpha=step)
            values.append(loss().item())
    assert (values[1] - values[0]) / 2e-6 == pytest.approx(slope, rel=1e-6)


def test_inputs_are_not_changed_and_outputs_are_not_aliased():
    net, (x,) = network("two blocks")
    x.requires_grad_()
    before, version = x.detach().clone(), x._version
    y = net(x)
    kept = y.detach().clone()
    y.sum().backward()
    assert torch.equal(x, before) and x._version == version
    assert torch.equal(y, kept), "backward inverts copies, not the caller's outputs"


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: torch.cat([x, x], dim=1)[:, 8:],
        lambda x: x[:1].expand_as(x),
        lambda x: x[:0],
    ],
    ids=["channels_last", "transposed", "offset", "expanded", "empty"],
)
@couplers
def test_any_layout_of_the_input(change, coupler):
    net, (x,) = network("growing, then not", coupler)
    net.reversible = True
    x = change(x)
    gradients = []
    for given in (x, x.clone(memory_format=torch.contiguous_format)):
        given = given.detach().requires_grad_()
        gradients.append(torch.autograd.grad(sum(y.square().sum() for y in net(given)), [given, *net.parameters()]))
    assert_same(*gradients, 1e-12)


# Transforms ------------------------------------------------------------------------------------


class MovingScale(nn.Module):
    """Reads a buffer, then updates it, in place or by assigning a new tensor."""

    def __init__(self, in_place):
        super().__init__()
        self.conv, self.in_place = nn.Conv2d(C, C, 3, padding=1), in_place
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x):
        y = torch.tanh(self.conv(x)) * self.scale.clone()
        new = 0.5 * self.scale + 0.5 * y.detach().abs().mean()
        if self.in_place:
            self.scale.copy_(new)
        else:
            self.scale = new
        return y


class RunningNorm(nn.BatchNorm2d):
    """Normalises by its running statistics in training too, then updates them."""

    def forward(self, x):
        y = F.batch_norm(x, self.running_mean.clone(), self.running_var.clone(), self.weight, self.bias, eps=self.eps)
        if self.training:
            with torch.no_grad():
                self.running_mean.lerp_(x.mean((0, 2, 3)), 0.5)
                self.running_var.lerp_(x.var((0, 2, 3)), 0.5)
        return y


TRANSFORMS = {
    "identity": nn.Identity,
    "dropout": lambda: nn.Sequential(conv(), nn.Dropout(0.5)),
    "rrelu": lambda: nn.Sequential(conv(), nn.RReLU()),
    "batch norm": lambda: nn.Sequential(nn.Conv2d(C, C, 1, bias=False), nn.BatchNorm2d(C), nn.Tanh()),
    "cumulative batch norm": lambda: nn.Sequential(nn.BatchNorm2d(C, momentum=None), nn.Tanh()),
    "stateless batch norm": lambda: nn.Sequential(nn.BatchNorm2d(C, track_running_stats=False), nn.Tanh()),
    "instance norm": lambda: nn.Sequential(nn.InstanceNorm2d(C, affine=True, track_running_stats=True), nn.Tanh()),
    "group norm": lambda: nn.Sequential(nn.GroupNorm(2, C), nn.Tanh()),
    "running norm": lambda: nn.Sequential(conv(), RunningNorm(C)),
    "buffer updated in place": lambda: MovingScale(True),
    "buffer assigned": lambda: MovingScale(False),
    "spectral norm": lambda: nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Conv2d(C, C, 3, padding=1)), nn.Tanh()
    ),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(C, C, 3, padding=1)),
    "in-place activation after the first layer": lambda: nn.Sequential(nn.Conv2d(C, C, 1), nn.ReLU(inplace=True)),
    "mbconv": lambda: MBConv(C, C, 3, expand_ratio=2, se_ratio=0.5, stochastic_depth=0.3),
}
transforms = pytest.mark.parametrize("transform", TRANSFORMS)


def with_transform(transform, coupler=Coupler):
    torch.manual_seed(0)
    net = four(TRANSFORMS[transform]).double()
    net.coupler = coupler()
    return net, torch.randn(3, 2 * C, 6, 6, dtype=F64)


@transforms
@couplers
def test_transform_in_training(transform, coupler):
    net, x = with_transform(transform, coupler)
    assert_reversible_as_stored(net, x)


@transforms
def test_transform_in_evaluation(transform):
    net, x = with_transform(transform)
    net(x)
    assert_reversible_as_stored(net.eval(), x)


@transforms
@couplers
def test_two_forwards_before_two_backwards_in_either_order(transform, coupler):
    net, x = with_transform(transform, coupler)
    gradients = {}
    for reversible in (True, False):
        for order in ((0, 1), (1, 0)):
            twin = copy.deepcopy(net)
            twin.reversible = reversible
            torch.manual_seed(1)
            losses = [twin(x).pow(3).sum(), twin(2 - x).square().sum()]
            parameters = list(twin.parameters())
            found = [None, None]
            for i in order:
                inputs = parameters or [torch.zeros((), requires_grad=True)]
                if losses[i].requires_grad:
                    found[i] = torch.autograd.grad(losses[i], inputs)
            gradients[reversible, order] = [g for gs in found if gs for g in gs]
    for order in ((0, 1), (1, 0)):
        assert_same(gradients[True, order], gradients[False, (0, 1)], 1e-10)


@transforms
def test_a_step_draws_as_many_random_numbers_as_a_stored_one(transform):
    net, x = with_transform(transform)
    states = []
    for reversible in (True, False):
        outputs_and_gradients(copy.deepcopy(net), [x], reversible, seed=3)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_flags_changed_between_forward_and_backward_do_not_matter():
    net, x = with_transform("dropout")
    net = ReversibleSequence(*net.blocks, RevBlock(TRANSFORMS["batch norm"](), TRANSFORMS["mbconv"]())).double()
    gradients = []
    for reversible in (True, False):
        twin = copy.deepcopy(net)
        twin.reversible = reversible
        torch.manual_seed(1)
        loss = twin(x).pow(3).sum()
        twin.eval()
        loss.backward()
        assert not any(m.training for m in twin.modules())
        gradients.append([p.grad for p in twin.parameters()])
    assert_same(*gradients, 1e-10)


def test_statistics_changed_between_forward_and_backward_are_an_error():
    net, x = with_transform("batch norm")
    net.eval()
    loss = net(x).sum()
    net.train()
    net(x)
    with pytest.raises(RuntimeError, match=r"running_mean|num_batches_tracked"):
        loss.backward()


def test_one_module_in_several_places():
    torch.manual_seed(0)
    shared = MBConv(C, C, 3, stochastic_depth=0.3).double()
    assert_reversible_as_stored(ReversibleSequence(*[RevBlock(shared, shared)] * 2), torch.randn(3, 8, 6, 6, dtype=F64))


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = conv()

    def forward(self, x):
        return self.conv(x.mul_(0.5))


@pytest.mark.parametrize("make", [InPlace, lambda: nn.Sequential(nn.ReLU(inplace=True), conv())])
@pytest.mark.parametrize("input_gradient", [True, False])
def test_transform_that_changes_its_input_is_refused(make, input_gradient):
    net = four(make)
    with pytest.raises(RuntimeError, match="changes its input in place"):
        net(torch.randn(2, 8, 4, 4).requires_grad_(input_gradient))


def test_gradient_that_a_transform_would_lose_is_an_error():
    weight = nn.Parameter(torch.randn(C, C, 1, 1))

    class Outside(nn.Module):
        def forward(self, x):
            return F.conv2d(x, weight)

    net = four(Outside)
    loss = net(torch.randn(2, 8, 4, 4, requires_grad=True)).sum()
    with pytest.raises(RuntimeError, match="Outside uses a tensor of shape .* requires a gradient"):
        loss.backward()


def test_result_of_the_wrong_shape_is_an_error_in_the_forward():
    net = four(lambda: nn.Sequential(conv(), nn.AdaptiveAvgPool2d(1)))
    with pytest.raises(ValueError, match=r"\(2, 4, 4, 4\), got \(2, 4, 1, 1\)"):
        net(torch.randn(2, 8, 4, 4))


class HiddenState(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.calls = conv(), 0

    def forward(self, x):
        self.calls += 1
        return self.conv(x) * self.calls


class OwnGenerator(HiddenState):
    generator = torch.Generator().manual_seed(0)

    def forward(self, x):
        return self.conv(x) * torch.rand(x.shape, generator=self.generator, dtype=x.dtype)


@pytest.mark.parametrize("make", [HiddenState, OwnGenerator])
def test_check_finds_hidden_state(make):
    with pytest.raises(AssertionError, match="stream 0 comes back with a relative error"):
        check_invertible(four(make), torch.randn(2, 8, 4, 4))


@transforms
def test_check_passes_good_transforms_and_replays_random_numbers(transform):
    net, x = with_transform(transform)
    assert check_invertible(net, x)[0] < 1e-12


@transforms
def test_inverse_leaves_no_trace(transform):
    net, x = with_transform(transform)
    y = net(x).detach()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    net.inverse(y)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


def test_hooks_can_tell_the_second_call():
    net, x = with_transform("dropout")
    calls = []
    for name, module in net.named_modules():
        module.register_forward_hook(lambda *_, name=name: calls.append((name, is_recomputing())))
    net(x).sum().backward()
    first = [name for name, again in calls if not again]
    second = [name for name, again in calls if again]
    assert sorted(first) == sorted(name for name, m in net.named_modules() if not name.endswith((".f", ".g")))
    assert sorted(second) == sorted(name for name in first if "xform" in name), "blocks run once, transforms twice"
    assert not is_recomputing()


def test_backward_hooks_of_transforms_fire_once_with_the_stored_gradients():
    net, x = with_transform("batch norm")
    seen = {}
    for reversible in (True, False):
        twin = copy.deepcopy(net)
        twin.reversible = reversible
        calls = seen[reversible] = {}
        for name, module in twin.named_modules():
            if isinstance(module, nn.Conv2d):
                module.register_full_backward_hook(
                    lambda _, __, dy, name=name, calls=calls: calls.setdefault(name, []).append(dy[0])
                )
        twin(x).pow(3).sum().backward()
    assert seen[True].keys() == seen[False].keys()
    for name, gradients in seen[False].items():
        assert_same(seen[True][name], gradients, 1e-10)


def test_recomputed_keeps_inputs_only_and_may_run_backward_twice():
    torch.manual_seed(0)
    module = nn.Sequential(MovingScale(True), nn.Dropout(0.5)).double()
    x = torch.randn(2, C, 4, 4, dtype=F64, requires_grad=True)
    twin = copy.deepcopy(module)
    torch.manual_seed(1)
    loss = recomputed(module, x).pow(3).sum()
    torch.manual_seed(1)
    wanted = torch.autograd.grad(twin(x).pow(3).sum(), [x, *twin.parameters()])
    for _ in range(2):
        assert_same(torch.autograd.grad(loss, [x, *module.parameters()], retain_graph=True), wanted, 1e-12)
    assert torch.equal(module[0].scale, twin[0].scale)


# Exceptions ------------------------------------------------------------------------------------


class Bomb(nn.Module):
    """Goes off once, in the forward or in the recompute, after it has drawn random numbers."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), nn.Dropout(0.5))
        self.fuse = None

    def forward(self, x):
        y = self.body(x)
        if self.fuse is not None and self.fuse[0] == is_recomputing():
            (_, error), self.fuse = self.fuse, None
            raise error("boom")
        return y


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("recompute", [False, True], ids=["forward", "recompute"])
def test_step_after_an_exception_is_right(error, recompute):
    torch.manual_seed(0)
    net = four(Bomb)
    x = torch.randn(3, 8, 6, 6)
    net.blocks[0].eval()
    bomb = net.blocks[1].f.xform_0_1
    training = [m.training for m in net.modules()]

    bomb.fuse = (recompute, error)
    random = None
    with pytest.raises(error, match="boom"), torch.autocast("cpu", torch.bfloat16):
        loss = net(x).sum()
        random = torch.get_rng_state()
        loss.backward()

    assert [m.training for m in net.modules()] == training
    assert all(m.track_running_stats for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    assert not is_recomputing() and torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    if recompute:
        assert torch.equal(torch.get_rng_state(), random)
        with pytest.raises(RuntimeError, match="second"):
            loss.backward()
    net.double()
    assert_reversible_as_stored(net, x.double())


# Memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backward", [False, True])
def test_streams_are_freed_without_the_cycle_collector(backward, passes):
    net, (x,) = network("growing, then not")
    loss = sum(y.sum() for y in net(x))
    if backward:
        loss.backward()
        assert passes[0]().grads == []
    assert passes[0]().streams == [], "the outputs alone are kept, and with backward not even those"
    del loss
    assert [owner() for owner in passes] == [None]


def test_streams_are_freed_after_an_exception(passes):
    torch.manual_seed(0)
    net = four(Bomb)
    x = torch.randn(3, 8, 6, 6)
    for recompute in (False, True):
        net.blocks[1].f.xform_0_1.fuse = (recompute, ValueError)
        with contextlib.suppress(ValueError):
            net(x).sum().backward()
    net.zero_grad(set_to_none=True)
    assert [owner() for owner in passes] == [None, None]


def deep(depth, reversible):
    blocks = [RevBlock(MBConv(16, 16, 3, expand_ratio=2), MBConv(16, 16, 3, expand_ratio=2)) for _ in range(depth)]
    return ReversibleSequence(*blocks, reversible=reversible)


@couplers
def test_peak_memory_does_not_grow_with_depth(coupler):
    peaks = {}
    for reversible in (True, False):
        for depth in (2, 12):
            net = deep(depth, reversible)
            net.coupler = coupler()
            x = torch.randn(2, 32, 32, 32)
            net(x).sum().backward()  # allocates the parameters' gradients
            with memory.PeakMemory() as meter:
                net(x).sum().backward()
            peaks[reversible, depth] = meter.peak_bytes
    growth = peaks[True, 12] - peaks[True, 2]
    assert growth < 0.15 * peaks[True, 2], peaks
    assert peaks[False, 12] > 3 * peaks[False, 2], peaks


# Errors ----------------------------------------------------------------------------------------


class SelfCoupling(Reversible):
    def __init__(self, source, target):
        super().__init__()
        self.f, self.source, self.target = conv(8, 8), source, target

    def couplings(self):
        yield Coupling(self.target, ((self.source, self.f),))


@pytest.mark.parametrize(
    "source, target", [(Part(0), Part(0)), (Part(0), Part(0, half=1)), (Part(0, half=0), Part(0, half=0))]
)
def test_coupling_of_a_stream_with_itself_is_refused(source, target):
    with pytest.raises(ValueError, match="overlaps the target"):
        SelfCoupling(source, target)(torch.randn(1, 8, 4, 4))


def test_growing_silo_on_too_many_streams_is_refused():
    with pytest.raises(ValueError, match="stream 2 is created next.* got 3"):
        silo(created=1).double()(*streams())


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: RevSilo({(1, 0): conv()}, {}, 2), r"\(1, 0\) is not a pair .* going down"),
        (lambda: RevSilo({}, {(0, 1): conv()}, 2), r"\(0, 1\) is not a pair .* going up"),
        (lambda: RevSilo({(0, 3): conv()}, {}, 2), r"\(0, 3\) is not a pair"),
        (lambda: RevSilo({(0, 1): conv()}, {}, 2, created=2), "created: expected 0 to 1 of 2 streams, got 2"),
        (lambda: RevSilo({(0, 1): conv()}, {}, 3, created=1), "stream 2 is created but nothing goes into it"),
    ],
)
def test_silo_names_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_sequence_takes_reversible_modules_only():
    with pytest.raises(TypeError, match=r"blocks\[1\]: expected a Reversible, got Conv2d"):
        ReversibleSequence(RevBlock(conv(), conv()), nn.Conv2d(8, 8, 1))
