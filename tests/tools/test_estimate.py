import pytest
import torch
from torch import nn

import revbifpn
from revbifpn import estimate, fast, fused
from revbifpn.estimate import MemoryEstimate, StepEstimator, estimate_memory, largest_batch
from revbifpn.memory import measure_step
from tests.marks import covering
from tests.networks import F32, MOSTLY_FAST, REVERSIBLE, TWO_LEVELS, narrow


def tiny(module=fast, **options):
    return narrow(module, F32, **(TWO_LEVELS | options))


def measured(model, batch, resolution, **options):
    height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
    return measure_step(model, (3, height, width), batch=batch, **options)


@pytest.fixture
def small_chunks():
    """Chunks so small that the limit is 8: larger batches are estimated from smaller ones."""
    with fused.chunks_of(1 << 13):
        yield


@covering
@MOSTLY_FAST
@REVERSIBLE
def test_small_batches_are_what_a_real_step_takes(module, reversible):
    model = tiny(module, reversible=reversible)
    found = estimate_memory(model, 3, 64, optimizer_states=2)
    step = measured(model, 3, 64)
    weights = sum(p.nbytes for p in model.parameters())
    assert found == MemoryEstimate(
        activations=step.peak_bytes,
        images=3 * 3 * 64 * 64 * 4,
        parameters=weights + sum(b.nbytes for b in model.buffers()),
        gradients=step.gradient_bytes,
        optimizer=2 * weights,
    )
    assert found.total == step.peak_bytes + step.gradient_bytes + found.images + found.parameters + 2 * weights
    assert weights <= found.gradients < 1.1 * weights


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "resolution", "batch"),
    [
        pytest.param({}, 32, 12, id="fast"),
        pytest.param({"reversible": False}, 32, 12, id="stored", marks=pytest.mark.slow),
        pytest.param({"classes": None}, (32, 48), 12, id="pyramid", marks=pytest.mark.slow),
        pytest.param({"classes": None, "head_channels": None}, (32, 64), 12, id="streams", marks=pytest.mark.slow),
        pytest.param({"channels": [64, 48], "num_ext_layers": 1}, 32, 12, id="wide", marks=pytest.mark.slow),
    ],
)
def test_large_batches_are_within_a_tenth_of_a_metered_step(small_chunks, options, resolution, batch):
    model = tiny(**options)
    estimator = StepEstimator(model, resolution)
    found = estimator.estimate(batch)
    assert max(estimator._steps) == 8, "a batch beyond the limit is not to be simulated"
    assert found.activations == pytest.approx(measured(model, batch, resolution, fake=True).peak_bytes, rel=0.1)
    assert found.images == batch * 3 * 4 * torch.Size(estimator.shape[1:]).numel()


@pytest.mark.slow
def test_autocast_is_simulated():
    model = tiny(revbifpn, reversible=False)
    full, half = (estimate_memory(model, 4, 64, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert half.activations == measured(model, 4, 64, dtype=torch.bfloat16, fake=True).peak_bytes < full.activations
    assert half.parameters == full.parameters


@pytest.mark.slow
def test_chunks_are_those_of_the_device_to_train_on():
    model = tiny()
    before = fused.chunk_bytes(torch.device("cpu"))
    cpu, cuda = (estimate_memory(model, 64, 128, device=device).activations for device in ("cpu", "cuda"))
    assert cuda > 1.1 * cpu, "a GPU's larger chunks hold more samples"
    assert fused.chunk_bytes(torch.device("cpu")) == before
    assert cpu == estimate_memory(model, 64, 128).activations


def test_frozen_parameters_have_neither_gradient_nor_state():
    model = tiny()
    model.freeze_norms()
    found = estimate_memory(model, 2, 32, optimizer_states=1)
    wanted = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert found.optimizer == wanted < sum(p.nbytes for p in model.parameters())
    assert wanted <= found.gradients < 1.1 * wanted


@pytest.mark.slow
def test_model_may_be_on_meta_and_is_left_alone():
    with torch.device("meta"):
        abstract = tiny(reversible=False).eval()
    found = estimate_memory(abstract, 2, 64, device="cpu")
    assert not abstract.training and all(t.is_meta for t in abstract.state_dict().values())

    model = tiny(reversible=False).eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    assert estimate_memory(model, 2, 64) == found
    assert not model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.slow
def test_largest_batch_fits_and_one_more_does_not(small_chunks):
    estimator = StepEstimator(tiny(), 32, optimizer_states=1)
    beyond = estimator.estimate(50).total
    for budget in (beyond, beyond - 1, 10 * beyond):
        batch = estimator.largest_batch(budget)
        assert estimator.estimate(batch).total <= budget < estimator.estimate(batch + 1).total
    assert estimator.largest_batch(beyond) == 50
    assert estimator.largest_batch(estimator.estimate(5).total) == 5
    assert estimator.largest_batch(estimator.estimate(1).total - 1) == 0


def test_one_sample_is_no_batch_where_norms_have_one_value_of_it(small_chunks):
    """Maps of one pixel at the lowest resolution."""
    estimator = StepEstimator(tiny(), 8)
    for batch in (2, 3, 5):
        assert estimator.largest_batch(estimator.estimate(batch).total) == batch
    assert estimator.largest_batch(estimator.estimate(2).total - 1) == 0


@pytest.mark.slow
def test_largest_batch_of_a_model_is_that_of_its_estimator(small_chunks):
    model = tiny(reversible=False)
    expected = StepEstimator(model, (32, 64), torch.bfloat16, optimizer_states=2).largest_batch(2**28)
    assert largest_batch(model, (32, 64), torch.bfloat16, 2**28, optimizer_states=2) == expected > 50


def test_any_module_can_be_estimated():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.LazyLinear(10))
    model(torch.zeros(1, 3, 16, 16))
    assert estimate_memory(model, 6, 16).activations == measured(model, 6, 16).peak_bytes


def test_is_exported():
    assert revbifpn.estimate_memory is estimate.estimate_memory and "estimate_memory" in revbifpn.__all__


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"batch": 0}, "batch: got 0"),
        ({"resolution": 0}, "resolution: got 0"),
        ({"resolution": (64, 64, 64)}, r"resolution: got \(64, 64, 64\)"),
        ({"resolution": 100}, "multiples of 8"),
        ({"dtype": torch.int8}, "dtype: got torch.int8"),
        ({"optimizer_states": -1}, "optimizer_states: got -1"),
    ],
)
def test_wrong_arguments_are_named(arguments, match):
    with pytest.raises(ValueError, match=match):
        estimate_memory(tiny(), **{"batch": 1, "resolution": 64, **arguments})
