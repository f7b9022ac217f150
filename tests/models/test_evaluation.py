"""Inference of the fast network: one op for all its couplings, where nothing else looks on, and never out of date."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import revbifpn
from revbifpn import fast
from revbifpn.fused import program
from tests.networks import F32, F64, TWO_LEVELS, allocator_peak, difference, image, narrow

HEADS = {
    "logits": {},
    "pyramid": {"classes": None},
    "streams": {"classes": None, "head_channels": None},
    "head on streams": {"head_channels": None},
    "nearest": {"upscale_mode": "nearest"},
    "two levels": TWO_LEVELS,
}


class Ops(TorchDispatchMode):
    """Counts the calls of this package's ops."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "revkernels":
            self.names.append(func.name().split("::")[1])
        return func(*args, **(kwargs or {}))

    @property
    def is_one(self) -> bool:
        return self.names == ["space_to_depth", "mbconv_infer_"]


def settled(module, dtype: torch.dtype = F64, **options) -> nn.Module:
    """A network in eval mode whose norms have statistics of their own."""
    model = narrow(module, dtype, **options).eval()
    generator = torch.Generator().manual_seed(3)
    for name, b in model.named_buffers():
        if name.endswith("running_mean"):
            b.normal_(0, 0.2, generator=generator)
        elif name.endswith("running_var"):
            b.uniform_(0.5, 2, generator=generator)
    return model


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor | None = None) -> list[Tensor]:
    y = model(image(next(model.parameters()).dtype) if x is None else x)
    return [y] if isinstance(y, Tensor) else y


def is_one_op(model: nn.Module, x: Tensor | None = None) -> bool:
    with Ops() as ops:
        outputs(model, x)
    return ops.is_one


@pytest.mark.parametrize("head", HEADS)
def test_the_op_computes_what_the_plain_network_computes(head):
    model, x = settled(fast, **HEADS[head]), image(n=3, height=64, width=96)
    assert difference(outputs(model, x), outputs(settled(revbifpn, **HEADS[head]), x)) < 1e-12
    assert is_one_op(model, x)


def test_in_float32_it_is_as_near_to_float64_as_the_plain_network():
    wanted, x = outputs(settled(revbifpn)), image(F32)
    errors = [difference(outputs(settled(m, F32), x), [y.float() for y in wanted]) for m in (fast, revbifpn)]
    assert errors[0] < 2 * errors[1]


@pytest.mark.parametrize("head", ["logits", "pyramid", "streams"])
def test_samples_are_the_same_in_groups(head):
    model, x = settled(fast, F32, **HEADS[head]), image(F32, n=5)
    found = outputs(model, x)
    with mock.patch.object(program, "GROUP_BYTES", 1 << 18):
        assert all(map(torch.equal, found, outputs(model, x)))


def test_memory_does_not_grow_with_the_batch():
    model = settled(fast, F32)
    with mock.patch.object(program, "GROUP_BYTES", 1 << 20):
        small, large = (allocator_peak(partial(outputs, model, image(F32, n=n))) for n in (16, 64))
    assert large < small + 64 * 4096  # the head's features


def _in_place(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.rev_stack.parameters():
            p.mul_(1.1)


def _behind_the_version(model: nn.Module) -> None:
    for t in (*model.rev_stack.parameters(), *model.rev_stack.buffers()):
        if t.is_floating_point():
            t.data.mul_(1.1)


def _loaded(model: nn.Module) -> None:
    model.load_state_dict({k: v * 1.1 if v.is_floating_point() else v for k, v in model.state_dict().items()})


def _assigned(model: nn.Module) -> None:
    state = {k: v * 1.1 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def _replaced(model: nn.Module) -> None:
    for layer in model.rev_stack.modules():
        norm = getattr(layer, "norm", None)
        if norm is not None:
            layer.norm = nn.BatchNorm2d(norm.num_features, eps=0.1, dtype=F64).eval()


def _new_parameter(model: nn.Module) -> None:
    for layer in model.rev_stack.modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight = nn.Parameter(layer.weight.detach() * 1.1)


def _other_eps(model: nn.Module) -> None:
    for norm in model.norms():
        norm.eps = 0.5


def _trained(model: nn.Module) -> None:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(image()).square().sum().backward()
    optimizer.step()
    model.eval()


CHANGES = [_in_place, _behind_the_version, _loaded, _assigned, _replaced, _new_parameter, _other_eps, _trained]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_what_changes_between_two_calls_is_seen(change: Callable[[nn.Module], None]):
    model, plain = settled(fast), settled(revbifpn, reversible=False)
    before = outputs(model)
    for m in (model, plain):
        change(m)
    found = outputs(model)
    assert difference(found, outputs(plain)) < 1e-9 < difference(found, before)
    assert is_one_op(model)


def test_a_network_may_change_its_dtype_and_back():
    model = settled(fast, F32)
    for dtype in (F64, F32, torch.bfloat16, F32):
        model.to(dtype)
        assert outputs(model)[0].dtype == dtype
        assert is_one_op(model) == (dtype != torch.bfloat16)


def _hook(model: nn.Module):
    return model.rev_stack.blocks[1].register_forward_hook(lambda *_: None)


def _hook_inside(model: nn.Module):
    return next(m for m in model.rev_stack.modules() if isinstance(m, nn.Conv2d)).register_forward_pre_hook(
        lambda *_: None
    )


@pytest.mark.parametrize("register", [_hook, _hook_inside])
@pytest.mark.parametrize("first", [True, False])
def test_hooks_are_called_and_may_be_removed(register, first):
    model = settled(fast)
    wanted = outputs(settled(fast))
    if not first:
        outputs(model)
    handle = register(model)
    assert not is_one_op(model)
    assert difference(outputs(model), wanted) < 1e-12
    handle.remove()
    assert is_one_op(model)


def test_hooks_on_the_network_itself_run_as_well():
    model, seen = settled(fast), []
    model.register_forward_hook(lambda *_: seen.append(1))
    assert is_one_op(model) and seen == [1]


def test_a_norm_in_training_mode_takes_the_batch_and_moves():
    model, plain = settled(fast), settled(revbifpn, reversible=False)
    for m in (model, plain):
        m.rev_stack.blocks[-1].train()
    assert not is_one_op(model)
    outputs(plain)
    statistics = [[b.double() for b in m.buffers()] for m in (model, plain)]
    assert difference(*statistics) < 1e-9


class Twice(nn.Module):
    """A module that no kernel stands for."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.module(x)


def test_a_transform_of_the_users_is_called():
    model, plain = settled(fast), settled(revbifpn, reversible=False)
    outputs(model)
    for m in (model, plain):
        block = m.rev_stack.blocks[-1].g
        name, transform = next(iter(block.named_children()))
        setattr(block, name, Twice(transform))
    assert not is_one_op(model)
    assert difference(outputs(model), outputs(plain)) < 1e-9


SITUATIONS = {
    "gradients": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "anomaly mode": lambda: torch.autograd.set_detect_anomaly(True),
    "exact streams": nullcontext,
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_elsewhere_a_pass_is_as_ever(situation):
    model = settled(fast, F32, **({"stream": "fixed16"} if situation == "exact streams" else {}))
    with torch.no_grad(), SITUATIONS[situation](), Ops() as ops:
        model(image(F32))
    assert "mbconv_infer_" not in ops.names


def test_a_network_can_be_dropped():
    import gc
    import weakref

    model = settled(fast)
    outputs(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
