"""A reversible pass as one operation of a compiled graph: torch.compile looks into it neither forward nor backward.

    outputs, token = run(inputs, parameters)              the pass as ever, with an autograd graph of its own
    gradients = pull(gradients of outputs, token)         that graph's backward

What a compiler traces it may store, fuse and move, and so it undoes what a reversible pass is for. It sees two ops
instead, whose memory and arithmetic are those of the same pass uncompiled. Between the two the pass is held by the
token's memory, so that it goes where the compiled graph drops the token.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import reduce
from operator import or_
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch._C import DispatchKey, DispatchKeySet
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from revbifpn.engine.anomaly import names_of
from revbifpn.engine.record import within
from revbifpn.engine.traced import ordinary_operations
from revbifpn.streams import autocast_dtype

_NUMBER = torch.int64


class Region(nn.Module):
    """A module whose pass :func:`run_as_region` can run: ``_forward(*inputs)`` gives a tensor, or several."""

    _forward: Any

    def __new__(cls, *args: Any, **kwargs: Any) -> Region:
        module = super().__new__(cls)
        _regions[id(module)] = module
        return module

    def __prepare_scriptable__(self) -> None:
        raise RuntimeError(
            f"torch.jit.script cannot take a {type(self).__name__}: use torch.export.export(model, (x,)), or "
            "torch.jit.trace(model, x), whose result may be part of a scripted module"
        )


_regions: WeakValueDictionary[int, Region] = WeakValueDictionary()


class _Pass(bytearray):
    """The memory of a token, which holds what one call of ``run`` leaves for ``pull``.

    Of the outputs it holds their places in the graph, so that backward may free their memory.
    """

    edges: tuple[GradientEdge | None, ...] = ()  # None: it wants no gradient
    leaves: tuple[Tensor, ...] = ()
    retain: bool = False


_AUTOGRAD = reduce(or_, (DispatchKeySet(getattr(DispatchKey, f"Autograd{n}")) for n in ("Functionality", "Other")))


def _with_autograd() -> AbstractContextManager:
    """Autograd as usual: compiled graphs, backwards among them, run below it."""
    excluded = torch._C._dispatch_tls_local_exclude_set() - _AUTOGRAD
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)


_numbers = itertools.count()
_passes: WeakValueDictionary[int, _Pass] = WeakValueDictionary()


def _evaluate(module: Region, inputs: Sequence[Tensor], tensors: dict[str, Tensor], dtype: torch.dtype | None) -> tuple:
    with torch.autocast(inputs[0].device.type, dtype, enabled=dtype is not None), names_of(module):
        out = within(module, tensors, lambda: module._forward(*inputs))
    return (out,) if isinstance(out, Tensor) else tuple(out)


def _run(
    inputs: list[Tensor], parameters: list[Tensor], needs: list[bool], module: int, dtype: torch.dtype | None
) -> list[Tensor]:
    region = _regions[module]
    tensors = [t.detach().requires_grad_(need) for t, need in zip((*inputs, *parameters), needs, strict=True)]
    inputs, parameters = tensors[: len(inputs)], tensors[len(inputs) :]
    named = dict(zip((name for name, _ in region.named_parameters()), parameters, strict=True))
    with _with_autograd(), torch.enable_grad():
        outputs = _evaluate(region, inputs, named, dtype)
    number = next(_numbers)
    held = _Pass(number.to_bytes(_NUMBER.itemsize, "little"))
    held.edges = tuple(get_gradient_edge(out) if out.requires_grad else None for out in outputs)
    held.leaves = tuple(t for t in tensors if t.requires_grad)
    held.retain = bool(getattr(region, "retain_graph", False))
    _passes[number] = held
    # Copies: a compiler may write over what an op returned, and the graph may have saved it.
    return [torch.frombuffer(held, dtype=_NUMBER), *(out.detach().clone() for out in outputs)]


def _run_fake(
    inputs: list[Tensor], parameters: list[Tensor], needs: list[bool], module: int, dtype: torch.dtype | None
) -> list[Tensor]:
    """Shapes and dtypes are those of the same pass in ordinary operations."""
    region, x = _regions[module], inputs[0]
    named = dict(zip((name for name, _ in region.named_parameters()), parameters, strict=True))
    if isinstance(x, FakeTensor):
        named |= {name: x.fake_mode.from_tensor(b, static_shapes=True) for name, b in region.named_buffers()}
    with torch.no_grad(), ordinary_operations():
        outputs = _evaluate(region, inputs, named, dtype)
    return [torch.empty(1, dtype=_NUMBER, device="cpu"), *(torch.empty_like(out) for out in outputs)]


def _pull(grads: list[Tensor], token: Tensor, like: list[Tensor]) -> list[Tensor]:
    held = _passes.get(int(token))
    if held is None or not held.edges:
        raise RuntimeError(
            "a second backward through one reversible forward pass of a compiled model: run the forward again, or sum "
            "the losses and call backward once, or set retain_graph=True on the model, or use reversible=False"
        )
    edges, leaves, retain = held.edges, held.leaves, held.retain
    if not retain:
        held.edges = held.leaves = ()
    outs, douts = zip(*((edge, dout) for edge, dout in zip(edges, grads, strict=True) if edge), strict=True)
    with _with_autograd():
        return list(torch.autograd.grad(outs, leaves, douts, retain_graph=retain, materialize_grads=True))


def _define(schema: str, run: Any, fake: Any) -> None:
    # Seeded: it draws random numbers, counts batches and so on, and may neither be left out, merged nor run again.
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.nondeterministic_seeded, *_UNCAPTURED))
    name = schema.split("(", 1)[0]
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"revbifpn::{name}", fake, lib=_LIBRARY)


_LIBRARY = torch.library.Library("revbifpn", "DEF")
_UNCAPTURED = (torch.Tag.cudagraph_unsafe,)
_define(
    "run(Tensor[] inputs, Tensor[] parameters, bool[] needs, int module, ScalarType? autocast) -> Tensor[]",
    _run,
    _run_fake,
)
_define(
    "pull(Tensor[] grads, Tensor token, Tensor[] like) -> Tensor[]",
    _pull,
    lambda grads, token, like: [torch.empty_like(t) for t in like],
)


class _Region(torch.autograd.Function):
    """What autograd sees of a region."""

    @staticmethod
    def forward(
        ctx: Any, module: int, dtype: torch.dtype | None, count: int, needs: list[bool], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        inputs, parameters = list(tensors[:count]), list(tensors[count:])
        token, *outputs = torch.ops.revbifpn.run(inputs, parameters, needs, module, dtype)
        ctx.save_for_backward(token, *(t for t, need in zip(tensors, needs, strict=True) if need))
        ctx.needs = needs
        ctx.mark_non_differentiable(token)
        return token, *outputs

    @staticmethod
    def backward(ctx: Any, _: Any, *grads: Tensor) -> tuple:
        token, *like = ctx.saved_tensors
        found = iter(torch.ops.revbifpn.pull(list(grads), token, like))
        return None, None, None, None, *(next(found) if need else None for need in ctx.needs)


def wants_gradients(module: nn.Module, *inputs: Tensor) -> bool:
    """Whether torch.compile traces a call of ``module`` that something wants a gradient of."""
    if not torch.compiler.is_compiling() or torch.compiler.is_exporting() or not torch.is_grad_enabled():
        return False
    return any(x.requires_grad for x in inputs) or any(q.requires_grad for q in module.parameters())


def run_as_region(module: Region, *inputs: Tensor) -> tuple[Tensor, ...]:
    """``module._forward(*inputs)`` as one op of the graph that torch.compile is tracing."""
    parameters = list(module.parameters())
    needs = [t.requires_grad for t in (*inputs, *parameters)]
    dtype = autocast_dtype(inputs[0].device)
    _, *outputs = _Region.apply(id(module), dtype, len(inputs), needs, *inputs, *parameters)
    return tuple(outputs)
