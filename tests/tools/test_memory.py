import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import revbifpn
from revbifpn import fast
from revbifpn.memory import PeakMemory, SampleMemory, StepMemory, measure_sample, measure_step
from revkernels import dispatch
from tests.marks import covering
from tests.networks import F32, MOSTLY_FAST, REVERSIBLE, allocator_peak, narrow

N = 1000
PLANE = 4 * N  # bytes of N float32


def chain(x):
    return x.exp().exp().sum()


def tiny(module=revbifpn, **options):
    return narrow(module, F32, **options)


class TestMeter:
    def test_peak_of_a_chain_is_what_it_is_by_hand(self):
        x = torch.randn(N, requires_grad=True)
        with PeakMemory() as meter:
            y = chain(x)
            assert meter.live_bytes == meter.peak_bytes == 2 * PLANE + 4  # both exp are saved, and the sum
            y.backward()
        # Gradient of the outer exp, beside both saved results, the sum and its gradient.
        assert meter.peak_bytes == 3 * PLANE + 4 + 4
        assert meter.live_bytes == PLANE + 4  # x.grad, y
        assert meter.reserved_bytes is None

    def test_what_is_freed_no_longer_counts(self):
        x = torch.randn(N)
        with PeakMemory() as meter:
            for _ in range(5):
                y = x + 1
                del y
            assert meter.live_bytes == 0
        assert meter.peak_bytes == PLANE

    def test_views_and_in_place_results_add_nothing(self):
        x = torch.randn(N)
        with PeakMemory() as meter:
            y = x + 1
            kept = [y.view(10, 100).t(), y[::2], y.detach(), y.mul_(2), torch.relu_(y), x.view(-1), x.add_(1)]
            assert meter.live_bytes == PLANE
            del y, kept[:-1]
            assert meter.live_bytes == 0

    def test_a_view_keeps_its_storage_alive(self):
        x = torch.randn(N)
        with PeakMemory() as meter:
            y = (x + 1)[:1]
            assert meter.live_bytes == PLANE
            del y
            assert meter.live_bytes == 0

    def test_resizing_is_followed(self):
        x = torch.randn(N)
        with PeakMemory() as meter:
            y = x + 1
            y.resize_(3 * N)
            assert meter.live_bytes == 3 * PLANE
            y.untyped_storage().resize_(0)  # not an op: seen at the next one
            y.resize_(0)
            assert meter.live_bytes == 0
        assert meter.peak_bytes == 3 * PLANE

    def test_tensors_made_from_python_data_count(self):
        with PeakMemory() as meter:
            x = torch.tensor([1.0, 2.0, 3.0])
            assert meter.live_bytes == x.nbytes

    def test_every_result_of_an_op_counts(self):
        x = torch.randn(N)
        with PeakMemory() as meter:
            values, indices = x.sort()
        assert meter.peak_bytes == values.nbytes + indices.nbytes == 3 * PLANE

    def test_results_of_custom_ops_count(self):
        x = torch.randn(1, 4, 5, 5)
        with PeakMemory() as meter:
            y = torch.ops.revkernels.upsample(x, 2, "bilinear")
        assert meter.peak_bytes == y.nbytes == 4 * x.nbytes

    def test_inference_mode(self):
        x = torch.randn(N)
        with torch.inference_mode(), PeakMemory() as meter:
            y = x.exp()
            y = y.exp()
            assert meter.live_bytes == PLANE
            del y
        assert (meter.peak_bytes, meter.live_bytes) == (2 * PLANE, 0)

    def test_nested_graphs_of_checkpointing_are_seen(self):
        x = torch.randn(N, requires_grad=True)
        with PeakMemory() as meter:
            y = checkpoint(chain, x, use_reentrant=False)
            assert meter.live_bytes == 4
            y.backward()
        assert meter.peak_bytes >= 3 * PLANE

    def test_gradients_can_be_left_out(self):
        x, c = torch.randn(N, requires_grad=True), torch.randn(N)
        with PeakMemory() as meter:
            loss = (x * c).sum()
            loss.backward()
            assert meter.peak_bytes == PLANE + 4 + 4  # x.grad, the sum and its gradient
            assert meter.peak_without([x.grad]) == PLANE + 4  # the product and its sum
        with pytest.raises(RuntimeError, match="inside the `with` block"):
            meter.peak_without([x.grad])

    def test_parts_are_told_apart_at_the_peak_and_add_up_to_it(self):
        with PeakMemory() as meter:
            meter.begin("first")
            x = torch.ones(1000)
            meter.begin("second")
            y = x + 1
            z = y * 2
            del y, z
            assert meter.parts() == {"first": 4000, "second": 8000} and meter.peak_bytes == 12000
            assert meter.parts([x]) == {"first": 0, "second": 8000}

    def test_fake_tensors_give_the_same_bytes(self):
        peaks = []
        for mode in (torch.enable_grad(), FakeTensorMode()):
            with mode, PeakMemory() as meter:
                x = torch.randn(N, requires_grad=True)
                chain(x).backward()
            peaks.append(meter.peak_bytes)
        assert peaks[0] == peaks[1] == 4 * PLANE + 4 + 4

    def test_allocator_agrees(self):
        x = torch.randn(N, requires_grad=True)
        with PeakMemory() as meter:
            chain(x).backward()
        x.grad = None
        assert allocator_peak(lambda: chain(x).backward()) == meter.peak_bytes

    def test_an_exception_leaves_nothing_behind(self):
        x = torch.randn(N)
        with pytest.raises(ZeroDivisionError), PeakMemory() as meter:
            y = x + 1
            raise ZeroDivisionError
        assert gc.isenabled()
        before = meter.peak_bytes, meter.live_bytes
        z = x + 1
        del y, z
        assert before == (meter.peak_bytes, meter.live_bytes) == (PLANE, PLANE)

    @pytest.mark.slow
    def test_is_usable_again_and_starts_from_nothing(self):
        meter, x = PeakMemory(), torch.randn(N)
        for count in (3, 1):
            with meter:
                kept = [x + 1 for _ in range(count)]
            assert meter.peak_bytes == count * PLANE
            del kept

    @pytest.mark.slow
    def test_keeps_nothing_alive(self):
        x = torch.randn(N)
        with PeakMemory() as meter:
            y = x + 1
        ref = weakref.ref(y.untyped_storage())
        del y
        assert ref() is None and meter.peak_bytes == PLANE

    @pytest.mark.slow
    def test_collection_of_cycles_does_not_change_the_figure(self):
        class Cycle:
            def __init__(self, x):
                self.x, self.me = x, self

        x = torch.randn(N)
        with PeakMemory() as meter:
            for _ in range(2000):
                Cycle(x + 1)
        assert meter.peak_bytes == 2000 * PLANE


@covering
class TestStep:
    @MOSTLY_FAST
    @REVERSIBLE
    def test_fake_and_real_steps_have_the_same_bytes(self, module, reversible):
        model = tiny(module, reversible=reversible, stochastic_depth=0.2)
        real, fake = (measure_step(model, (3, 64, 64), batch=2, fake=fake) for fake in (False, True))
        assert (real.meter, fake.meter) == ("tensors", "fake tensors")
        assert real == StepMemory(**{**vars(fake), "meter": real.meter})

    @MOSTLY_FAST
    @REVERSIBLE
    def test_allocator_sees_a_little_more(self, module, reversible):
        # The rest is scratch memory inside kernels, which no result of an op shows.
        if module is fast and not dispatch.STATUS["cpp"].loaded:
            pytest.skip(f"the plain-PyTorch stand-ins of its kernels make temporaries: {dispatch.STATUS['cpp'].reason}")
        model = tiny(module, reversible=reversible).train()
        x = torch.randn(4, 3, 64, 64)
        metered = measure_step(model, (3, 64, 64), batch=4, parameter_gradients=True).peak_bytes
        allocated = allocator_peak(lambda: F.cross_entropy(model(x), torch.zeros(4, dtype=torch.long)).backward())
        assert 0.99 * metered < allocated < 1.25 * metered

    @pytest.mark.slow
    def test_stored_activations_grow_linearly_and_inverted_ones_do_not_count(self):
        stored, inverted = (measure_sample(tiny(reversible=r), (3, 64, 64), batch=2) for r in (False, True))
        assert stored.large.batch == 2 * stored.small.batch == 4
        assert stored.bytes_per_sample == pytest.approx(stored.small.peak_bytes / 2, rel=0.02)
        assert stored.bytes_per_sample > 3 * inverted.bytes_per_sample

    def test_gradients_count_only_on_request(self):
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        step = {count: measure_step(model, (1, 8, 8), parameter_gradients=count) for count in (True, False)}
        assert step[False].gradient_bytes == step[False].parameter_bytes == 4 * (64 * 10 + 10)
        assert step[True].peak_bytes > step[False].gradient_bytes > step[False].peak_bytes
        assert step[False].input_bytes == 4 * 64

    def test_leaves_no_gradients(self):
        model = tiny()
        measure_step(model, (3, 32, 32), batch=2)
        assert all(p.grad is None for p in model.parameters())

    @pytest.mark.slow
    def test_fake_step_leaves_the_model_alone(self):
        model = tiny().eval()
        before = {name: t.clone() for name, t in model.state_dict().items()}
        measure_step(model, (3, 64, 64), batch=2, fake=True)
        assert not model.training
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())

    def test_pyramids_train_too(self):
        step = measure_step(tiny(classes=None), (3, 64, 64), batch=2)
        assert step.peak_bytes > step.kept_bytes > 0

    def test_autocast_halves_stored_activations(self):
        model = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(8)), nn.Flatten(), nn.Linear(3 * 64, 10))
        full, half = (measure_step(model, (3, 8, 8), batch=64, dtype=d) for d in (torch.float32, torch.bfloat16))
        assert 0.45 < half.kept_bytes / full.kept_bytes < 0.65

    @pytest.mark.parametrize(
        ("options", "error", "match"),
        [
            ({"batch": 0}, ValueError, "batch: got 0"),
            ({"dtype": torch.int8}, ValueError, "dtype: got torch.int8"),
            ({"device": "cuda", "fake": True}, ValueError, "fake"),
        ],
    )
    def test_wrong_arguments_are_named(self, options, error, match):
        with pytest.raises(error, match=match):
            measure_step(tiny(), (3, 32, 32), **options)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="the error is about its absence")
    def test_cuda_asked_for_without_cuda(self):
        with pytest.raises(RuntimeError, match="is_available"):
            measure_step(tiny(), (3, 32, 32), device="cuda")

    def test_bytes_per_sample_is_the_slope_between_the_batches(self):
        small, large = (
            StepMemory(b, peak, kept, 0, 0, 0, 0, None, "tensors") for b, peak, kept in ((2, 50, 11), (4, 90, 21))
        )
        memory = SampleMemory(small, large)
        assert (memory.bytes_per_sample, memory.kept_bytes_per_sample, memory.fixed_bytes) == (20, 5, 10)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestCuda:
    def test_peak_is_that_of_the_allocator(self):
        x = torch.randn(2**20, device="cuda", requires_grad=True)
        with PeakMemory("cuda") as meter:
            y = chain(x)
            assert meter.live_bytes == pytest.approx(2 * x.nbytes, abs=1024)
            y.backward()
        assert meter.peak_bytes == pytest.approx(3 * x.nbytes, abs=2048)
        assert meter.reserved_bytes >= meter.peak_bytes + x.nbytes
        with pytest.raises(RuntimeError, match="allocator"):
            meter.peak_without([x.grad])

    def test_step_agrees_with_fake_tensors(self):
        model = tiny(reversible=False)
        fake = measure_sample(model, (3, 128, 128), batch=8, fake=True).bytes_per_sample
        real = measure_sample(model, (3, 128, 128), batch=8, device="cuda").bytes_per_sample
        assert real == pytest.approx(fake, rel=0.1)


@pytest.mark.slow
def test_memory_does_not_grow_with_depth():
    """Ten more silos, and the blocks before them: less than 1 % of activations per sample."""
    shallow, deep = (
        measure_sample(fast.revbifpn_s0(num_ext_layers=2 + more), batch=8, fake=True).bytes_per_sample
        for more in (0, 10)
    )
    assert deep < 1.01 * shallow
