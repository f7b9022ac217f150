"""Kinds of use that users of such networks report as broken elsewhere, one small case each."""

import gc
import threading

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from revbifpn import reversible
from tests.networks import F32, MODULES, image, narrow


def step(model, x):
    """Output and gradients of one step, by name."""
    model.zero_grad(set_to_none=True)
    out = model(x)
    out.square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    return {"output": out.detach(), **gradients}


def assert_close(found, wanted, tolerance=1e-7):
    for name, value in wanted.items():
        torch.testing.assert_close(
            found[name], value, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}"
        )


@MODULES
@pytest.mark.parametrize(
    "change",
    [lambda x: torch.full_like(x, 0.5), lambda x: x * torch.tensor([0.0, 1.0], dtype=x.dtype).view(2, 1, 1, 1)],
    ids=["constant", "one black image"],
)
def test_images_without_variance_have_the_stored_gradients(module, change):
    x = change(image())
    found, wanted = step(narrow(module), x), step(narrow(module, reversible=False), x)
    assert all(value.isfinite().all() for value in wanted.values())
    assert_close(found, wanted, 1e-6)


@MODULES
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_a_pixel_that_is_not_finite_shows_in_the_output_of_its_own_sample_only(module, value):
    model, x = narrow(module, F32).eval(), image(F32)
    with torch.no_grad():
        clean = model(x)
        x[1, 0, 3, 4] = value
        out = model(x)
    assert torch.equal(out[0], clean[0]) and not out[1].isfinite().all()


@MODULES
def test_one_image_of_one_pixel_at_the_lowest_level_trains_with_frozen_norms(module):
    x = image(n=1, height=32, width=32)
    found, wanted = (step(narrow(module, reversible=r).freeze_norms(), x) for r in (True, False))
    assert_close(found, wanted, 1e-6)


@MODULES
def test_averaged_weights_run_and_update_their_statistics(module):
    model, x = narrow(module, F32), image(F32)
    for average in (AveragedModel(model), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            step(model, x)
            optimizer.step()
            average.update_parameters(model)
        update_bn([x, x], average)
        average.eval()
        with torch.no_grad():
            assert average(x).isfinite().all()
        for p, q in zip(average.parameters(), model.parameters(), strict=True):
            assert p.data_ptr() != q.data_ptr()


class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.full((3, 64, 64), 0.1 * index)


@MODULES
def test_forked_workers_load_beside_a_model_that_has_run(module):
    model = narrow(module, F32)
    step(model, image(F32))
    loader = torch.utils.data.DataLoader(Images(), batch_size=2, num_workers=2, multiprocessing_context="fork")
    for x in loader:
        assert step(model, x)["output"].isfinite().all()


@MODULES
def test_the_number_of_threads_changes_no_bit_of_a_forward(module):
    outputs, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with torch.no_grad():
                outputs.append(narrow(module, F32).eval()(image(F32)))
    finally:
        torch.set_num_threads(before)
    tolerance = 0 if module.__name__.endswith("fast") else 1e-5
    for out in outputs[1:]:
        torch.testing.assert_close(out, outputs[0], rtol=tolerance, atol=tolerance)


@MODULES
def test_a_thread_that_ends_leaves_its_model_to_another(module):
    model, x, found = narrow(module), image(), []
    for _ in range(2):
        thread = threading.Thread(target=lambda: found.append(step(model, x)))
        thread.start()
        thread.join()
    wanted = narrow(module)
    assert_close(found[0], step(wanted, x))
    assert_close(found[1], step(wanted, x))


@pytest.mark.slow
@MODULES
def test_steps_leave_nothing_to_the_cycle_collector(module):
    model = narrow(module, F32)
    gc.collect()
    gc.disable()
    try:
        alive = []
        for _ in range(6):
            step(model, image(F32, height=32, width=32))
            alive.append(sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()))
        assert len(set(alive[2:])) == 1
    finally:
        gc.enable()


@MODULES
def test_every_gradient_has_a_storage_of_its_own(module):
    model, x = narrow(module), image().requires_grad_()
    model(x).square().mean().backward()
    gradients = [p.grad for p in model.parameters()] + [x.grad]
    assert all(g.untyped_storage().nbytes() == g.nbytes and g.is_contiguous() for g in gradients)
    assert len({g.untyped_storage().data_ptr() for g in gradients}) == len(gradients)


class Image(torch.Tensor):
    """A subclass as data sets have them."""


@MODULES
def test_a_tensor_of_a_subclass_is_an_image(module):
    x = image()
    assert_close(step(narrow(module), x.as_subclass(Image)), step(narrow(module), x))


@MODULES
def test_maps_of_more_than_two_to_the_31_elements_have_shapes(module):
    model = narrow(module, F32).eval().to("meta")
    with torch.no_grad():
        out = model(torch.empty(2**16, 3, 64, 64, device="meta"))  # 48 2^26 elements at level 0
    assert out.shape == (2**16, 10)


def test_complex_streams_have_the_stored_gradients_and_are_inverted():
    torch.manual_seed(0)
    f, g = (nn.Conv2d(4, 4, 1, dtype=torch.complex128) for _ in range(2))
    block = reversible.RevBlock(f, g)
    x = torch.randn(3, 8, 2, 2, dtype=torch.complex128, requires_grad=True)
    x0, x1 = x.chunk(2, 1)
    y1 = x1 + f(x0)
    wanted = torch.cat([x0 + g(y1), y1], 1)
    found = block(x)
    torch.testing.assert_close(found, wanted)
    for inputs in (x, f.weight):
        (want,) = torch.autograd.grad(wanted.abs().square().sum(), inputs, retain_graph=True)
        (got,) = torch.autograd.grad(block(x).abs().square().sum(), inputs)
        torch.testing.assert_close(got, want)
    with torch.no_grad():
        torch.testing.assert_close(block.inverse(block(x)), x.detach())
