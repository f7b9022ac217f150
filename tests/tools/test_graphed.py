"""Graphed steps: captured once, replayed with the results of ordinary steps, whatever changes meanwhile."""

import copy
import warnings
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from revbifpn import GraphedModule, GraphedStep, NotCapturableError, StreamOverflowWarning, fast, graphed
from revbifpn.streams import rehearsed_capture
from tests import networks
from tests.marks import covering
from tests.networks import F32, F64, MODULES

pytestmark = covering


class Recorded(TorchDispatchMode):
    """What a CUDA graph is, of ops on the CPU: the same calls on the same memory, whatever Python has become since."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        storages = {t.untyped_storage().data_ptr() for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)}
        results = [t for t in tree_flatten(out)[0] if isinstance(t, Tensor)]
        fresh = [i for i, t in enumerate(results) if t.untyped_storage().data_ptr() not in storages]
        self.calls.append((func, args, kwargs, results, fresh))
        return out

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, results, fresh in self.calls:
            again = [t for t in tree_flatten(func(*args, **kwargs))[0] if isinstance(t, Tensor)]
            for i in fresh:
                results[i].copy_(again[i])


class OnCpu:
    """In the place of :class:`revbifpn.engine.graphs.Cuda`."""

    def __init__(self):
        self.captures = self.replays = 0

    def current(self):
        return nullcontext()

    def aside(self):
        return nullcontext()

    def capture(self, run, generators):
        self.captures += 1
        recorded, state = Recorded(), self.state()
        with rehearsed_capture(), recorded:
            outputs = run()
        self.restore(state)  # a capture computes nothing

        def replay():
            self.replays += 1
            recorded.replay()

        return replay, outputs

    def state(self):
        return [(t, t.detach().clone()) for t in self.memory()], torch.get_rng_state()

    def restore(self, state):
        torch.set_rng_state(state[1])
        for t, value in state[0]:
            with torch.no_grad():
                t.copy_(value)


@pytest.fixture
def side(monkeypatch):
    """Steps made in the test capture on the CPU."""
    side = OnCpu()
    monkeypatch.setattr(graphed, "_side", lambda device, stream: side)
    return side


def narrow(module, dtype=F64, **options):
    return networks.narrow(module, dtype, **(networks.TWO_LEVELS | options))


def batch(i, size=2, pixels=32, dtype=F64):
    generator = torch.Generator().manual_seed(i)
    images = torch.randn(size, 3, pixels, pixels, generator=generator, dtype=dtype)
    return images, torch.randint(10, (size,), generator=generator)


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), **({"lr": 0.05, "momentum": 0.9, "fused": True} | options))


def tensors(*owners):
    found = []
    for owner in owners:
        if isinstance(owner, nn.Module):
            found += [*owner.parameters(), *owner.buffers()]
            found += [p.grad for p in owner.parameters() if p.grad is not None]
        elif isinstance(owner, torch.optim.Optimizer):
            found += [v for state in owner.state.values() for v in state.values() if isinstance(v, Tensor)]
    return found


def assert_close(found, wanted, tolerance=1e-6):
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def pair(side, module, make=sgd, options=None, **arguments):
    """A graphed step and an ordinary one, each with its own copy of everything."""
    models = [narrow(module, **(options or {})) for _ in range(2)]
    optimizers = [make(model) for model in models]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step = GraphedStep(models[0], F.cross_entropy, optimizers[0], **arguments)
    side.memory = lambda: tensors(models[0], optimizers[0])

    def ordinary(images, labels):
        loss = F.cross_entropy(models[1](images), labels)
        loss.backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
        return loss.detach()

    return step, ordinary, models, optimizers


# --- a replay is a step ---------------------------------------------------------------------------


@MODULES
def test_replayed_steps_equal_ordinary_ones(side, module):
    step, ordinary, models, optimizers = pair(side, module)
    for i in range(8):
        torch.testing.assert_close(step(*batch(i)), ordinary(*batch(i)), rtol=1e-6, atol=1e-6)
    assert (side.captures, side.replays, step.captured) == (1, 5, 1)
    assert_close(tensors(models[0], optimizers[0]), tensors(models[1], optimizers[1]))
    assert all(p.grad is None for p in models[0].parameters())


def test_what_changes_between_steps_is_followed_without_another_capture(side):
    step, ordinary, models, optimizers = pair(side, fast)
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12) for optimizer in optimizers]
    for i in range(10):
        for model in models:
            for k, norm in enumerate(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
                norm.momentum = 0.9 / (i + 1 + k % 3)
        step(*batch(i))
        ordinary(*batch(i))
        for scheduler in schedulers:
            scheduler.step()
        if i == 7:
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = torch.tensor(0.001)
    assert side.captures == 1
    assert_close(tensors(models[0], optimizers[0]), tensors(models[1], optimizers[1]))
    assert models[0].head.fc.weight.isfinite().all()


def test_learning_rates_and_momenta_stay_what_their_user_made_them(side):
    step, _, (model, _), (optimizer, _) = pair(side, fast)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    buffers = [m.running_mean for m in norms]
    for i in range(5):
        step(*batch(i))
    assert optimizer.param_groups[0]["lr"] == 0.05 and {m.momentum for m in norms} == {0.1}
    assert all(m.running_mean is b for m, b in zip(norms, buffers, strict=True))


class Twice(nn.Module):
    """A norm that is called twice in a forward."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 10)

    def forward(self, x):
        y = self.norm(self.conv(x))
        return self.fc(self.norm(y.relu() + self.conv(x)).mean((2, 3)))


def test_norms_that_are_called_twice_move_their_statistics_twice(side, monkeypatch):
    monkeypatch.setitem(globals(), "narrow", lambda module, **_: torch.manual_seed(0) and Twice().double())
    step, ordinary, models, optimizers = pair(side, fast)
    for i in range(12):
        for model in models:
            model.norm.momentum = 0.1 if i < 6 else 0.5
        step(*batch(i))
        ordinary(*batch(i))
    assert side.captures == 2  # such a norm's momentum is a number
    assert_close(tensors(models[0], optimizers[0]), tensors(models[1], optimizers[1]))


def test_a_graph_is_left_where_something_else_changes(side):
    step, ordinary, models, optimizers = pair(side, fast)

    def train(start):
        before = side.replays
        for i in range(start, start + 5):
            torch.testing.assert_close(step(*batch(i)), ordinary(*batch(i)), rtol=1e-6, atol=1e-6)
        return side.captures, side.replays - before

    assert train(0) == (1, 2)
    for model in models:
        model.freeze_norms()
    assert train(5) == (2, 2)
    for optimizer in optimizers:
        optimizer.param_groups[0]["weight_decay"] = 0.1
    assert train(10) == (3, 2)
    for model in models:
        model.head.fc.weight.data = model.head.fc.weight.data.clone()
    assert train(15) == (4, 2)
    for model in models:
        model.disable_rev = True
    assert train(20) == (5, 2)
    assert_close(tensors(models[0], optimizers[0]), tensors(models[1], optimizers[1]))


def test_results_are_the_callers_own(side):
    step, *_ = pair(side, fast)
    losses = [step(*batch(i)) for i in range(6)]
    values = [loss.item() for loss in losses]
    step(*batch(9))
    assert [loss.item() for loss in losses] == values and len(set(values)) == 6
    assert not any(loss.requires_grad for loss in losses)


def test_what_the_loss_gives_besides_is_handed_out(side):
    model = narrow(fast)
    optimizer = sgd(model)
    side.memory = lambda: tensors(model, optimizer)

    def loss_fn(logits, labels):
        return F.cross_entropy(logits, labels), {"logits": logits}

    step = GraphedStep(model, loss_fn, optimizer)
    for i in range(5):
        loss, more = step(*batch(i))
        torch.testing.assert_close(F.cross_entropy(more["logits"], batch(i)[1]), loss)


def test_random_layers_draw_anew_in_every_replay(side):
    step, *_ = pair(side, fast, options={"stochastic_depth": 0.5, "head_dropout": 0.5})
    for group in step.optimizer.param_groups:
        group["lr"] = 0.0
    assert len({step(*batch(0)).item() for _ in range(8)}) == 8 and side.replays == 5


# --- optimizers, scaler, average, accumulation, clipping ----------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda model: torch.optim.AdamW(model.parameters(), 1e-3, fused=True, capturable=True),
        lambda model: torch.optim.Adagrad(model.parameters(), 1e-3, fused=True),
        lambda model: sgd(model, momentum=0.0, weight_decay=1e-2, maximize=True, lr=1e-3),
        lambda model: torch.optim.SGD(
            [{"params": model.rev_stack.parameters()}, {"params": model.head.parameters(), "lr": 0.2}],
            lr=0.01,
            fused=True,
        ),
    ],
    ids=["AdamW", "Adagrad", "SGD", "groups"],
)
def test_optimizers(side, make):
    step, ordinary, models, optimizers = pair(side, fast, make)
    for i in range(6):
        step(*batch(i))
        ordinary(*batch(i))
    assert side.captures == 1
    assert_close(tensors(models[0]), tensors(models[1]))


@pytest.mark.parametrize("accumulate", [2, 3])
def test_gradients_are_means_over_the_calls_of_an_update(side, accumulate):
    step, _, models, optimizers = pair(side, fast, accumulate=accumulate)
    for i in range(6 * accumulate):
        step(*batch(i))
        (F.cross_entropy(models[1](batch(i)[0]), batch(i)[1]) / accumulate).backward()
        if (i + 1) % accumulate == 0:
            optimizers[1].step()
            optimizers[1].zero_grad()
        step.optimizer.zero_grad()  # of no effect: the step zeroes what it has summed
    assert side.captures == 2 and side.replays > accumulate
    assert_close(tensors(models[0], optimizers[0]), tensors(models[1], optimizers[1]))


def test_gradients_are_clipped(side):
    step, _, models, optimizers = pair(side, fast, clip_norm=0.1)
    for i in range(5):
        step(*batch(i))
        F.cross_entropy(models[1](batch(i)[0]), batch(i)[1]).backward()
        nn.utils.clip_grad_norm_(models[1].parameters(), 0.1)
        optimizers[1].step()
        optimizers[1].zero_grad()
    assert_close(tensors(models[0]), tensors(models[1]))


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_a_scaler_skips_and_shrinks_on_the_device(side, clip_norm):
    model = narrow(fast)
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100)
    step = GraphedStep(model, F.cross_entropy, optimizer, scaler, clip_norm=clip_norm)
    side.memory = lambda: [*tensors(model, optimizer), *([] if scaler._scale is None else [scaler._scale])]
    for i in range(5):
        step(*batch(i))
    assert side.replays == 2 and scaler.get_scale() == 1024
    before = copy.deepcopy(list(model.parameters()))
    images, labels = batch(6)
    step(images * float("inf"), labels)
    assert scaler.get_scale() == 512
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    "options",
    [{}, {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}, {"avg_fn": lambda a, p, n: a + (p - a) / (n + 2)}],
    ids=["mean", "moving", "own"],
)
@pytest.mark.parametrize("use_buffers", [False, True])
def test_averages_of_the_weights(side, options, use_buffers):
    model, reference = narrow(fast), narrow(fast)
    average, wanted = (AveragedModel(m, use_buffers=use_buffers, **options) for m in (model, reference))
    optimizer, other = sgd(model), sgd(reference)
    step = GraphedStep(model, F.cross_entropy, optimizer, ema=average)
    side.memory = lambda: [*tensors(model, optimizer, average)]
    for i in range(7):
        step(*batch(i))
        F.cross_entropy(reference(batch(i)[0]), batch(i)[1]).backward()
        other.step()
        other.zero_grad()
        wanted.update_parameters(reference)
    assert side.replays == 4
    assert_close(tensors(average), tensors(wanted))


def test_an_average_may_be_any_function_of_the_model(side):
    model = narrow(fast)
    optimizer, shadow = sgd(model), copy.deepcopy(model)

    @torch.no_grad()
    def update(model):
        torch._foreach_lerp_(list(shadow.parameters()), list(model.parameters()), 1.0)

    step = GraphedStep(model, F.cross_entropy, optimizer, ema=update)
    side.memory = lambda: tensors(model, optimizer, shadow)
    for i in range(6):
        step(*batch(i))
    assert_close(shadow.parameters(), model.parameters())


def test_autocast_is_that_of_the_call(side):
    step, _, models, optimizers = pair(side, fast, options={"stream": "fixed16", "dtype": F32})
    for i in range(6):
        with torch.autocast("cpu", torch.bfloat16):
            found = step(*batch(i, dtype=F32))
            loss = F.cross_entropy(models[1](batch(i, dtype=F32)[0]), batch(i, dtype=F32)[1])
        torch.testing.assert_close(found, loss.detach(), rtol=1e-3, atol=1e-3)
        loss.backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
    step(*batch(6, dtype=F32))
    assert (side.captures, side.replays) == (1, 3)  # without autocast it is another step


# --- which shapes are captured ------------------------------------------------------------------------


def shapes(side, step, sizes):
    """What was done with each call: captured, replayed, or run."""
    done = []
    for i, size in enumerate(sizes):
        before = side.captures, side.replays
        step(*batch(i, size))
        now = side.captures - before[0], side.replays - before[1]
        done.append({(1, 1): "captured", (0, 1): "replayed", (0, 0): "run"}[now])
    return done


def tiny(side, **options):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(7200, 10)).double()
    optimizer = sgd(model, momentum=0.0)
    side.memory = lambda: tensors(model, optimizer)
    return GraphedStep(model, F.cross_entropy, optimizer, **options)


def test_every_shape_gets_a_graph_of_its_own(side):
    assert shapes(side, tiny(side), [2, 2, 2, 2, 2]) == ["run"] * 3 + ["captured", "replayed"]
    step = tiny(side)
    assert shapes(side, step, [2, 3] * 5) == ["run"] * 6 + ["captured"] * 2 + ["replayed"] * 2
    assert step.captured == 2
    step.reset()
    assert step.captured == 0 and shapes(side, step, [2]) == ["run"]


def test_further_shapes_run_uncaptured_while_the_others_are_in_use(side):
    step = tiny(side, max_shapes=2)
    done = shapes(side, step, [2, 3, 4] * 8)
    assert done[12:] == ["replayed", "replayed", "run"] * 4 and step.captured == 2 == side.captures


def test_a_shape_that_came_to_stay_takes_the_place_of_the_least_recently_used_one(side):
    step = tiny(side, max_shapes=2, warm_up=2)
    shapes(side, step, [2, 3] * 4)
    assert shapes(side, step, [3, 4, 3, 4, 3, 4]) == ["replayed", "run", "replayed", "run", "replayed", "captured"]
    assert shapes(side, step, [3, 4, 2]) == ["replayed", "replayed", "run"]
    assert step.captured == 2


def test_shapes_without_end_are_not_all_remembered(side):
    step = tiny(side, max_shapes=1)
    for size in range(2, 40):
        step(*batch(0, size))
    assert len(step._graphs.candidates) <= 8


# --- inference ----------------------------------------------------------------------------------------


@MODULES
def test_inference_is_captured(side, module):
    model = narrow(module).eval()
    side.memory = lambda: tensors(model)
    module = GraphedModule(model)
    for i in range(5):
        with torch.no_grad():
            wanted = model(batch(i)[0])
        found = module(batch(i)[0])
        torch.testing.assert_close(found, wanted)
        assert not found.requires_grad
    assert (side.captures, side.replays) == (1, 3)
    with torch.no_grad():
        model.head.fc.bias.add_(1.0)
        torch.testing.assert_close(module(batch(5)[0]), model(batch(5)[0]))
    assert side.replays == 4


def test_a_pyramid_is_a_list_of_the_callers_own_maps(side):
    model = narrow(fast, classes=None).eval()
    side.memory = lambda: tensors(model)
    module = GraphedModule(model)
    first, second = [[module(batch(i)[0]) for i in range(4)][k] for k in (2, 3)]
    assert isinstance(first, list) and len(first) == 2
    assert not torch.equal(first[0], second[0])


# --- what cannot be captured --------------------------------------------------------------------------


def test_what_is_in_the_way_is_named_before_the_capture(side):
    model = narrow(fast)
    optimizer = sgd(model)
    seen = []

    def loss_fn(logits, labels):
        loss = F.cross_entropy(logits, labels)
        seen.append(loss.item())
        return loss

    step = GraphedStep(model, loss_fn, optimizer)
    step(*batch(0))
    step(*batch(1))
    with pytest.raises(NotCapturableError, match=r"Tensor.item reads a value.*test_graphed.py:\d+, in loss_fn"):
        step(*batch(2))
    assert side.captures == 0


def test_optimizers_that_decide_on_the_host_are_refused(side):
    model = narrow(fast)
    for optimizer, message in (
        (torch.optim.SGD(model.parameters(), 0.1), "SGD reads its learning rate on the host.*fused=True"),
        (torch.optim.AdamW(model.parameters(), 0.1), "AdamW counts its steps on the host.*capturable=True"),
        (torch.optim.RMSprop(model.parameters(), 0.1), "RMSprop counts its steps"),
    ):
        with pytest.raises(ValueError, match=message):
            GraphedStep(model, F.cross_entropy, optimizer)
    optimizer = torch.optim.NAdam(model.parameters(), 0.1, capturable=True)
    with pytest.raises(ValueError, match="scaler.*fused=True"):
        GraphedStep(model, F.cross_entropy, optimizer, torch.amp.GradScaler("cpu"))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_shapes": 0}, "max_shapes: expected at least 1, got 0"),
        ({"warm_up": 1}, "warm_up: expected at least 2"),
        ({"accumulate": 0}, "accumulate: expected a number of calls"),
    ],
)
def test_arguments_are_checked(side, options, message):
    model = narrow(fast)
    with pytest.raises(ValueError, match=message):
        GraphedStep(model, F.cross_entropy, sgd(model), **options)


def test_a_model_on_several_devices_is_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(ValueError, match="on one device, got .*cpu.*meta"):
        GraphedModule(model)


# --- without CUDA -------------------------------------------------------------------------------------


def test_without_cuda_the_same_steps_run_uncaptured_and_say_so():
    models = narrow(fast), narrow(fast)
    optimizers = [torch.optim.SGD(model.parameters(), 0.05) for model in models]  # any optimizer will do
    with pytest.warns(UserWarning, match="no CUDA graphs on cpu"):
        step = GraphedStep(models[0], F.cross_entropy, optimizers[0])
    for i in range(4):
        loss = F.cross_entropy(models[1](batch(i)[0]), batch(i)[1])
        loss.backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
        assert torch.equal(step(*batch(i)), loss.detach())
    assert step.captured == 0
    assert all(torch.equal(a, b) for a, b in zip(tensors(models[0]), tensors(models[1]), strict=True))


@pytest.mark.filterwarnings("ignore:no CUDA graphs")
def test_a_rehearsal_tells_without_a_gpu_whether_a_step_can_be_captured():
    model = narrow(fast)
    step = GraphedStep(model, F.cross_entropy, sgd(model))
    step(*batch(0))
    assert step.rehearse(*batch(1)).isfinite()
    step = GraphedStep(model, F.cross_entropy, torch.optim.SGD(model.parameters(), 0.05))
    step(*batch(0))
    with pytest.raises(NotCapturableError, match="reads a value of a tensor on the host.*, in _update"):
        step.rehearse(*batch(2))


# --- several processes --------------------------------------------------------------------------------


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:no CUDA graphs")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_distributed_model_is_stepped_and_rehearsed(process_group, accumulate, monkeypatch):
    model, reference = DistributedDataParallel(narrow(fast)), narrow(fast)
    optimizer, other = sgd(model), sgd(reference)
    reduced = []
    model.register_comm_hook(None, lambda _, bucket: reduced.append(1) or default_hooks.allreduce_hook(None, bucket))
    step = GraphedStep(model, F.cross_entropy, optimizer, accumulate=accumulate)
    for i in range(4):
        (step.rehearse if i >= 2 else step)(*batch(i))
        (F.cross_entropy(reference(batch(i)[0]), batch(i)[1]) / accumulate).backward()
        if (i + 1) % accumulate == 0:
            other.step()
            other.zero_grad(set_to_none=accumulate == 1)
    assert len(reduced) == 4 // accumulate  # one bucket: gradients travel once per update
    assert_close(tensors(model.module, optimizer), tensors(reference, other))


def test_what_a_distributed_model_needs_for_a_capture_is_said(side, process_group):
    ordinary = DistributedDataParallel(narrow(fast))
    unused = DistributedDataParallel(narrow(fast), find_unused_parameters=True)
    for model, options, message in (
        (ordinary, {}, "stream: expected the stream that DistributedDataParallel was made under"),
        (ordinary, {"stream": "a stream", "warm_up": 3}, "warm_up: DistributedDataParallel needs 11 calls, got 3"),
        (unused, {"stream": "a stream"}, "find_unused_parameters=True"),
        (ordinary, {"stream": "a stream"}, "collectives of NCCL, got the gloo backend"),
    ):
        with pytest.raises(ValueError, match=message):
            GraphedStep(model, F.cross_entropy, sgd(model), **options)


# --- exact streams ------------------------------------------------------------------------------------


def test_values_out_of_range_are_reported_after_a_replay(side):
    model = narrow(fast, stream="fixed16", dtype=F32)
    optimizer = sgd(model, lr=0.0)
    side.memory = lambda: tensors(model, optimizer)
    step = GraphedStep(model, F.cross_entropy, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error", StreamOverflowWarning)
        for i in range(5):
            step(*batch(i, dtype=F32))
        images, labels = batch(5, dtype=F32)
        with pytest.raises(StreamOverflowWarning, match="level 0"):
            step(images * 1e3, labels)
    assert side.replays == 3
