"""Stacks of dual-residual blocks: equations, gradients, inversion, and every situation of autograd."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import revbifpn
from revbifpn import StreamFormat, StreamOverflowWarning, check_invertible, monitor_drift
from revbifpn.dual_residual import DualResidualSequence, PrecisionWarning, predicted_error
from tests.dual_residual.networks import (
    BLOCKS,
    F32,
    F64,
    SHAPES,
    Residual,
    attention_blocks,
    loss_of,
    stack,
    step,
    tokens,
)
from tests.marks import covering, mostly_slow
from tests.networks import difference, identical

KINDS = pytest.mark.parametrize("kind", BLOCKS)
EXACT = pytest.mark.parametrize("exact", ["int32", "fixed16"])
SHIFTS = pytest.mark.parametrize("k", [0, 1, 3, 7])
COARSE = {"int32": StreamFormat("int32", (10,)), "fixed16": StreamFormat("fixed16", (5,))}  # wide enough for alpha = 1


def written_out(blocks, x, alpha, beta):
    """The equations as the paper has them, and ``x_n + y_n``."""
    y = torch.zeros_like(x)
    for block in blocks:
        x, y = block(x) + (alpha - 1) * x + y, beta * x
    return x, y


@KINDS
@pytest.mark.parametrize("reversible", [True, False])
@pytest.mark.parametrize("alpha, beta", [(0.0, 1.0), (0.5, 0.5), (1.0, 0.5), (0.75, 0.3)])
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_a_stack_is_its_equations(kind, reversible, alpha, beta, depth):
    net = stack(alpha, beta, depth, F64, BLOCKS[kind], reversible=reversible)
    x = tokens(F64, SHAPES[kind])
    found = step(net, x)
    net.zero_grad()
    x = x.clone().requires_grad_()
    y = sum(written_out(net.blocks, x, alpha, beta))
    loss_of(y).backward()
    assert difference(found, [y.detach(), x.grad, *(p.grad for p in net.parameters())]) < 1e-9
    net.add_y = False
    assert torch.allclose(net(x), written_out(net.blocks, x, alpha, beta)[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "alpha, beta", [(0.0, 1.0), (0.5, 0.5), (1.0, 0.5), (1.0, 1 / 8), (1.0, 1 / 32), (1.0, 1 / 128), (0.9, 0.1)]
)
@pytest.mark.filterwarnings("ignore::revbifpn.dual_residual.PrecisionWarning")
@pytest.mark.parametrize("depth", [12, *mostly_slow([6], 0)])
def test_gradients_are_the_stored_ones_up_to_the_predicted_error(alpha, beta, depth):
    found, wanted = (step(stack(alpha, beta, depth, F64, reversible=r), tokens(F64)) for r in (True, False))
    allowed = 100 * predicted_error(alpha, beta, depth, F64)
    assert difference(found, wanted) < max(allowed, 1e-9)
    assert all(t.isfinite().all() for t in found)


@pytest.mark.parametrize("alpha, beta", [(0.0, 1.0), (0.5, 0.5)])
def test_gradients_are_those_of_float64_at_depth_12(alpha, beta):
    found, wanted = (step(stack(alpha, beta, 12, F64, reversible=r), tokens(F64)) for r in (True, False))
    assert difference(found, wanted) < 1e-9


@KINDS
@EXACT
@SHIFTS
@pytest.mark.parametrize("alpha", [1.0, 0.5, None], ids=["1", "half", "1 - beta"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_exact_streams_give_the_stored_gradients_bit_for_bit(kind, exact, k, alpha, autocast):
    beta = 2.0**-k
    alpha = 1 - beta if alpha is None else alpha
    options = {"blocks": BLOCKS[kind], "exact": COARSE[exact], "depth": 5}

    def run(reversible):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return step(stack(alpha, beta, reversible=reversible, **options), tokens(F32, SHAPES[kind]))

    assert identical(run(True), run(False))


@KINDS
@EXACT
@SHIFTS
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("depth", [6, 24])
@pytest.mark.filterwarnings("ignore::revbifpn.StreamOverflowWarning")
def test_exact_streams_are_inverted_bit_for_bit_at_any_depth(kind, exact, k, alpha, depth):
    net = stack(alpha, 2.0**-k, depth, blocks=BLOCKS[kind], exact=exact).eval()
    x = tokens(F32, SHAPES[kind])
    on_grid = DualResidualSequence(nn.Identity(), alpha=0.0, beta=1.0, exact=exact, add_y=False)(x)  # x_1 = x_0 - x_0
    end = net.forward_streams(x)
    entered = net.inverse(end)
    bits = net.stream.bits(0)
    assert torch.equal(entered, (x * 2.0**bits).round() * 2.0**-bits)
    assert on_grid.shape == x.shape and check_invertible(net, x) == [0.0]
    sizes = [0 if r is None else r.numel() for r in end.remainders]
    assert sizes == [0] + [-(-x.numel() // 8) * k] * (depth - 1)


@pytest.mark.parametrize("depth", [4, 5])
def test_float_streams_are_inverted_up_to_rounding(depth):
    net, x = stack(depth=depth, dtype=F64).eval(), tokens(F64)
    end = net.forward_streams(x)
    assert torch.allclose(end.x, written_out(net.blocks, x, 0.5, 0.5)[0])
    for inverted in (net.inverse(end), net.inverse(end.x, end.previous)):
        assert torch.allclose(inverted, x, rtol=1e-9, atol=1e-9)
    assert check_invertible(net, x)[0] < 1e-9


def test_the_pretrained_network_is_bit_for_bit_that_of_the_blocks():
    net, x = stack(1.0, 0.0), tokens()
    wanted = x
    for block in net.blocks:
        wanted = block(wanted)
    assert torch.equal(net.eval()(x), wanted)
    with pytest.raises(RuntimeError, match="alpha = 1, beta = 0 is the pretrained network.*set other coefficients"):
        net.train()(x)
    with torch.no_grad():
        assert torch.equal(net(x), wanted)
    net.reversible = False
    assert torch.equal(net(x), wanted)


def test_memory_in_depth_grows_by_the_remainders_alone():
    from revbifpn.memory import PeakMemory

    def kept(depth, k, **options):
        net, x = stack(1 - 2.0**-k, 2.0**-k, depth, exact="int32", **options), tokens(shape=(4, 64, 16))
        net.self_check = False
        with PeakMemory() as meter:
            y = net(x)
            live = meter.live_bytes
        assert y.requires_grad
        return live

    size = 4 * 64 * 16
    for k in (0, 1, 3, 7):
        per_block = (kept(12, k) - kept(4, k)) / 8
        assert size * k / 8 <= per_block <= size * k / 8 + 64  # and what a norm or a generator records
    assert kept(4, 7) - kept(4, 7, reversible=False) < 0


@pytest.mark.parametrize("exact", [False, "int32", "fixed16"])
@pytest.mark.parametrize("drop", [0.0, 0.3])
def test_random_layers_draw_the_same_numbers_again(exact, drop):
    found, wanted = (step(stack(drop=drop, exact=exact, reversible=r), tokens()) for r in (True, False))
    assert identical(found, wanted) if exact else difference(found, wanted) < 1e-3


def test_running_statistics_move_once():
    reversible, stored = (stack(blocks=BLOCKS["convolution"], exact=True, reversible=r) for r in (True, False))
    for net in (reversible, stored):
        step(net, tokens(shape=SHAPES["convolution"]))
    assert identical(reversible.buffers(), stored.buffers())


@pytest.mark.parametrize("exact", [False, "int32"])
def test_arguments_besides_the_input_go_to_every_block(exact):
    mask = torch.zeros(5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), float("-inf"))
    found, wanted, other = (
        step(stack(exact=exact, reversible=r), tokens(), *arguments, scale=s)
        for r, arguments, s in ((True, (mask,), 0.5), (False, (mask,), 0.5), (True, (), 1.0))
    )
    assert difference(found, wanted) < 1e-4
    assert difference(found, other) > 1e-2


class Crossed(nn.Module):
    """Reads a second tensor, as a decoder's block does its memory."""

    def __init__(self):
        super().__init__()
        self.own, self.other = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x, memory):
        return x + torch.tanh(self.own(x) + self.other(memory))


@pytest.mark.parametrize("exact", [False, "int32"])
@pytest.mark.parametrize("frozen", [False, True])
def test_tensors_among_the_arguments_get_their_gradient(exact, frozen):
    def run(reversible):
        torch.manual_seed(0)
        net = DualResidualSequence(
            *(Crossed() for _ in range(3)), alpha=0.5, beta=0.5, exact=exact, reversible=reversible
        )
        net.requires_grad_(not frozen)
        memory = tokens(seed=5).requires_grad_()
        loss_of(net(tokens(), memory * 2)).backward()
        return [memory.grad, *(p.grad for p in net.parameters() if not frozen)]

    found, wanted = run(True), run(False)
    assert identical(found, wanted) if exact else difference(found, wanted) < 1e-4
    assert found[0].abs().sum() > 0


def test_an_argument_changed_in_place_before_the_backward_is_refused():
    net, memory = DualResidualSequence(Crossed(), Crossed(), alpha=0.5, beta=0.5), tokens(seed=5)
    y = net(tokens().requires_grad_(), memory)
    memory.add_(1)
    with pytest.raises(
        RuntimeError, match="an argument of shape .* was changed in place between the forward and the backward"
    ):
        y.sum().backward()


@pytest.mark.parametrize("exact", [False, "int32", "fixed16"])
def test_two_forwards_before_two_backwards_with_other_coefficients_in_between(exact):
    def alone(alpha, beta, seed):
        return step(stack(alpha, beta, exact=exact), tokens(seed=seed))[2:]

    net, xs = stack(0.5, 0.5, exact=exact), [tokens(seed=s).requires_grad_() for s in (1, 2)]
    first = net(xs[0])
    net.set(0.75, 0.25)
    second = net(xs[1])
    net.set(0.0, 1.0)
    for y, wanted in ((first, alone(0.5, 0.5, 1)), (second, alone(0.75, 0.25, 2))):
        net.zero_grad()
        loss_of(y).backward()
        assert difference([p.grad for p in net.parameters()], wanted) < 1e-5


@pytest.mark.parametrize("exact", [False, "int32"])
def test_gradients_accumulate_and_copies_are_independent(exact):
    net = stack(exact=exact)
    copied, unpickled = copy.deepcopy(net), pickle.loads(pickle.dumps(net))
    once = step(net, tokens())[2:]
    loss_of(net(tokens())).backward()
    assert difference([p.grad for p in net.parameters()], [2 * g for g in once]) < 1e-5
    for other in (copied, unpickled):
        assert all(p.grad is None for p in other.parameters())
        assert identical(step(other, tokens())[2:], once)


@pytest.mark.parametrize("exact", [False, "int32"])
def test_a_second_backward_needs_retain_graph(exact):
    net = stack(exact=exact)
    y = net(tokens())
    loss_of(y).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss_of(y).backward()
    net.retain_graph = True
    net.zero_grad()
    y = net(tokens())
    loss_of(y).backward(retain_graph=True)
    once = [p.grad.clone() for p in net.parameters()]
    loss_of(y).backward()
    assert difference([p.grad for p in net.parameters()], [2 * g for g in once]) < 1e-6


def test_a_second_derivative_is_refused():
    x = tokens().requires_grad_()
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(loss_of(stack()(x)), x, create_graph=True)


def test_an_output_changed_in_place_is_noticed():
    y = stack()(tokens().requires_grad_())
    with torch.no_grad():
        y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_streams_go_with_the_graph(passes):
    y = stack(exact=True)(tokens())
    assert len([p for p in passes if p() is not None]) == 1
    del y
    assert [p for p in passes if p() is not None] == []


def test_anomaly_mode_names_the_block():
    net = stack()
    with torch.no_grad():
        net.blocks[2].mlp[2].bias.fill_(float("nan"))
    with (
        torch.autograd.detect_anomaly(check_nan=False),
        pytest.raises(RuntimeError, match="^2 computed values that are not"),
    ):
        net(tokens())


def test_a_fault_in_a_block_leaves_the_stack_usable():
    net, x = stack(), tokens()
    wanted = step(net, x)
    forward = net.blocks[2].mlp.forward
    net.blocks[2].mlp.forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        net(x)
    net.blocks[2].mlp.forward = forward
    assert difference(step(net, x), wanted) == 0


class Counting(nn.Module):
    """State outside of buffers."""

    def __init__(self):
        super().__init__()
        self.layer, self.calls = nn.Linear(16, 16), 0

    def forward(self, x):
        self.calls += 1
        return x + self.layer(x) * self.calls


def test_a_block_with_state_outside_of_buffers_is_named():
    net = DualResidualSequence(nn.Linear(16, 16), Counting(), nn.Linear(16, 16), alpha=0.5, beta=0.5, exact=True)
    with pytest.raises(RuntimeError, match="^1 computed other values in backward than in forward"):
        loss_of(net(tokens())).backward()
    net = DualResidualSequence(nn.Linear(16, 16), Counting(), nn.Linear(16, 16), alpha=0.5, beta=0.5)
    with pytest.raises(RuntimeError, match=r"^1 \(Counting\) computed other values"):
        loss_of(net(tokens())).backward()


class Widening(nn.Module):
    def __init__(self, result):
        super().__init__()
        self.result = result

    def forward(self, x):
        return self.result(x)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("reversible", [True, False])
@pytest.mark.parametrize(
    "result, found",
    [(lambda x: x[:, :2], r"\(2, 2, 16\), torch.float32"), (lambda x: x.double(), r"\(2, 5, 16\), torch.float64"),
     (lambda x: None, "NoneType")],
    ids=["shape", "dtype", "no tensor"],
)  # fmt: skip
def test_a_block_of_another_shape_or_dtype_is_named(exact, reversible, result, found):
    net = DualResidualSequence(
        nn.Linear(16, 16), Widening(result), alpha=0.5, beta=0.5, exact=exact, reversible=reversible
    )
    with pytest.raises(
        ValueError, match=rf"^1 \(Widening\): expected a result of its input's shape.*got {found}; leave it"
    ):
        net(tokens())


BAD = {
    "blocks: expected at least one": lambda: DualResidualSequence(),
    r"blocks\[1\]: expected a module, got int": lambda: DualResidualSequence(nn.Identity(), 3),
    r"beta: expected 2\^-k .* got 0;": lambda: DualResidualSequence(nn.Identity(), alpha=1, beta=0, exact=True),
    r"beta: expected 2\^-k .* got 0.3;": lambda: DualResidualSequence(nn.Identity(), alpha=1, beta=0.3, exact=True),
    r"beta: expected 2\^-k .* got -0.5;": lambda: DualResidualSequence(nn.Identity(), alpha=1, beta=-0.5, exact=True),
    "beta: expected a number other than 0": lambda: DualResidualSequence(nn.Identity(), alpha=0.5, beta=0),
    "alpha: expected a finite number": lambda: DualResidualSequence(nn.Identity(), alpha=float("nan"), beta=1),
    "exact: expected True": lambda: DualResidualSequence(nn.Identity(), exact="fixed32"),
    "stream: int32 is for dual-residual": lambda: revbifpn.ReversibleSequence(
        revbifpn.RevBlock(nn.Identity(), nn.Identity()), stream="int32"
    )(torch.zeros(1, 2, 1, 1)),
    "streams: expected what forward_streams": lambda: stack(exact=True).inverse(tokens(), tokens()),
    "holds float32 values": lambda: stack(exact=True, dtype=F64)(tokens(F64)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message):
    with pytest.raises((ValueError, TypeError), match=message):
        BAD[message]()


@EXACT
def test_an_overflow_is_reported_and_still_inverts(exact):
    net = stack(1.0, 1.0, 24, exact=exact).eval()
    x = 60 * tokens()
    with pytest.warns(StreamOverflowWarning, match=f"values of a {exact} stream left its range"):
        end = net.forward_streams(x)
    bits = net.stream.bits(0)
    assert exact == "fixed16" or torch.equal(net.inverse(end), (x * 2.0**bits).round() * 2.0**-bits)
    with pytest.warns(StreamOverflowWarning):
        net.train()(x)


@EXACT
@pytest.mark.parametrize("value", [1e6, float("inf"), float("nan")])
def test_the_blocks_where_an_overflow_begins_are_named(exact, value):
    net = DualResidualSequence(*(nn.Linear(16, 16) for _ in range(8)), alpha=0.5, beta=0.5, exact=exact).eval()
    with torch.no_grad():
        net.blocks[3].bias.fill_(value)
        with pytest.warns(StreamOverflowWarning, match=r", in 3(, 4, 5.*| and .*)? \(\|x\| < "):
            net(tokens())
        for block in net.blocks:
            block.bias.fill_(value)
        with pytest.warns(StreamOverflowWarning, match=", in 0, 1, 2 and 5 more"):
            net(tokens())


def test_useless_float_streams_are_warned_of_and_the_exact_ones_named():
    with pytest.warns(PrecisionWarning, match=r"blocks at alpha = 1, beta = 0.0078125 in torch.float32 .*exact=True"):
        stack(1.0, 1 / 128, 12)(tokens())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stack(0.5, 0.5, 6)(tokens())
        stack(1.0, 1 / 128, 12, exact=True)(tokens())
        stack(1.0, 1 / 128, 12, reversible=False)(tokens())
        with torch.no_grad():
            stack(1.0, 1 / 128, 12)(tokens())


def test_the_drift_monitor_sees_exact_streams_without_an_error():
    for exact in (True, False):
        net = stack(exact=exact)
        with monitor_drift(net) as drift:
            loss_of(net(tokens())).backward()
        assert (drift.largest == 0) == exact and len(drift.errors) == 4 and drift.largest < 1e-4


@pytest.mark.parametrize("exact", [False, True, "fixed16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_network_of_16_bits_has_wider_streams(exact, dtype):
    net = stack(exact=exact, dtype=dtype, depth=6)
    stored = copy.deepcopy(net)
    stored.reversible = False
    found, wanted = step(net, tokens(dtype)), step(stored, tokens(dtype))
    assert {t.dtype for t in found} == {dtype}
    assert identical(found, wanted) if exact else difference(found, wanted) < 0.2


@pytest.mark.parametrize("exact", [False, True])
def test_grad_scaler_and_autocast_train_as_stored(exact):
    def train(reversible):
        net = stack(exact=exact, reversible=reversible)
        optimizer, scaler = torch.optim.SGD(net.parameters(), lr=1e-3), torch.amp.GradScaler("cpu")
        for seed in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = net(tokens(seed=seed)).float().square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        return [p.detach() for p in net.parameters()]

    found, wanted = train(True), train(False)
    assert identical(found, wanted) if exact else difference(found, wanted) < 1e-2


def test_an_empty_batch_and_one_element():
    for shape in ((0, 5, 16), (1, 1, 16)):
        for exact in (False, True):
            found = step(stack(exact=exact), tokens(shape=shape))
            assert found[0].shape == shape and all(t.isfinite().all() for t in found)


def test_blocks_may_be_whole_networks_with_batch_norm_in_eval_mode():
    net = stack(blocks=BLOCKS["convolution"], exact=True).eval()
    before = [b.clone() for b in net.buffers()]
    step(net, tokens(shape=SHAPES["convolution"]))
    assert identical(net.buffers(), before)
    assert isinstance(net.blocks[0], Residual) and len(attention_blocks(1)) == 1


pytestmark = covering
