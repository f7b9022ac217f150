"""A model's own blocks as dual-residual stacks, in place: its parameters keep their names, its code stays as it is.

The model goes on calling its blocks one by one, whatever else it does with them (masks, keyword arguments, tuples). A
converted block hands the pass on with the tensor that it returns: the block that is called with that tensor goes on
with the pass. So nothing outlives a call, and nothing is registered in the model.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from revbifpn.dual_residual.sequence import DualResidualSequence, Pass, check_coefficients, stream_of
from revbifpn.engine.anomaly import names_of
from revbifpn.reversible import Reversible
from revbifpn.streams import StreamFormat

_CARRIED = "_dual_residual_pass"


@dataclass(frozen=True)
class Report:
    """What :func:`convert` did.

    Attributes:
        runs: the names of the blocks of every stack.
        left: names of modules that were looked at and left as they are, and why.
    """

    runs: tuple[tuple[str, ...], ...]
    left: dict[str, str]

    def __str__(self) -> str:
        count = sum(map(len, self.runs))
        lines = [f"{count} blocks in {len(self.runs)} reversible stacks:"]
        lines += [f"  {run[0]} .. {run[-1]}: {len(run)} blocks" for run in self.runs]
        return "\n".join(lines + [f"left as it is: {name}: {why}" for name, why in self.left.items()])


@dataclass(frozen=True)
class _Place:
    """Where a block is in its stack. No module, so that the stack is no part of the model."""

    stack: DualResidualSequence
    index: int


class _Member:
    """What a block's class gets as a base: calls go through the stack. Set by changing the object's class."""

    __dict__: dict[str, Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not args:
            name = _first_argument(cast(Any, type(self)))
            if name not in kwargs:
                raise TypeError(f"{type(self).__name__}: expected an input, got none")
            args = (kwargs.pop(name),)
        return _step(self, *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _new_member, (_base_of(type(self)),), self.__dict__


@cache
def _first_argument(cls: Any) -> str:
    return list(inspect.signature(cls.forward).parameters)[1]


@cache
def _member_class(cls: Any) -> Any:
    return type(cls.__name__, (_Member, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})


def _new_member(cls: Any) -> Any:
    """For pickle and copy."""
    member = _member_class(cls)
    return member.__new__(member)


def _base_of(cls: Any) -> Any:
    """The class that a block had."""
    bases = [base for base in cls.__mro__ if _Member not in base.__mro__ or base is _Member]
    return next(base for base in bases if base is not _Member)


def _plain_call(block: Any, *args: Any, **kwargs: Any) -> Any:
    """A block's call as it was before."""
    return super(_Member, block).__call__(*args, **kwargs)


@dataclass(frozen=True)
class _Carried:
    """What a tensor says of the pass that it comes from."""

    run: Pass
    position: int


def _step(block: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """A block's call in a pass of its stack."""
    place: _Place = block.__dict__["_dual_residual"]
    stack, i = place.stack, place.index
    with names_of(stack):
        if stack.is_pretrained:
            stack.check_trainable()
            return _plain_call(block, x, *args, **kwargs)
        if torch.compiler.is_compiling():
            return _uncompiled(block, x, *args, **kwargs)
        if not isinstance(x, Tensor):
            raise TypeError(f"{stack.labels[i]}: expected a tensor first, got {type(x).__name__}")
        run = stack.begin(x, args, kwargs) if i == 0 else _continued(stack, i, x)
        bound = run.step(args, kwargs)
        if run.position < len(stack.labels):
            y = run.show()
            setattr(y, _CARRIED, _Carried(run, run.position))
        else:
            y = run.end()
    return y if bound.kind is None else bound.kind((y, *bound.rest))


def _uncompiled(block: Any, *args: Any, **kwargs: Any) -> Any:
    """A converted block in a model under torch.compile: the pass runs as ever."""
    return torch._dynamo.disable(_step)(block, *args, **kwargs)


def _continued(stack: DualResidualSequence, i: int, x: Tensor) -> Pass:
    carried = getattr(x, _CARRIED, None)
    if carried is None or carried.run.stack is not stack or (carried.position, carried.run.position) != (i, i):
        raise RuntimeError(
            f"{stack.labels[i]} was called with another tensor than what {stack.labels[i - 1]} returned last, so that "
            "they are no reversible stack: the model changes what lies between, calls blocks in another order, or "
            "leaves some out. Convert only blocks that follow on one another, with blocks="
        )
    return carried.run


def runs_of(model: nn.Module) -> list[DualResidualSequence]:
    """The stacks of a converted model, in the order of its modules, and every :class:`DualResidualSequence` in it."""
    found: dict[int, DualResidualSequence] = {}
    for module in model.modules():
        place = module.__dict__.get("_dual_residual")
        stack = place.stack if isinstance(place, _Place) else module
        if isinstance(stack, DualResidualSequence):
            found.setdefault(id(stack), stack)
    return list(found.values())


def set_coefficients(model: nn.Module, alpha: float, beta: float) -> None:
    """alpha and beta of every stack in a model, for passes that begin from now on.

    Raises:
        ValueError: the model has no stack; coefficients without an inverse.
    """
    stacks = runs_of(model)
    if not stacks:
        raise ValueError("model: expected a converted model or one with a DualResidualSequence in it, got neither")
    for stack in stacks:  # all or none
        check_coefficients(float(alpha), float(beta), stack._format)
    for stack in stacks:
        stack.set(alpha, beta)


def convert(
    model: nn.Module,
    blocks: Iterable[str | nn.Module] | None = None,
    *,
    alpha: float | None = None,
    beta: float | None = None,
    exact: bool | str | StreamFormat = False,
    reversible: bool = True,
) -> Report:
    """Make runs of equal-shaped blocks of a model reversible, in place.

    A run is a maximal sequence of at least two children of a container that are of one class and whose parameters have
    the same names and shapes. Containers are a ``Sequential``, a ``ModuleList``, and a module all of whose children are
    numbered (``b1``, ``b2``, ...). Parameters, buffers and their names stay as they are.

    Args:
        model: left as it is but for the class of the converted blocks.
        blocks: names of blocks, or the modules themselves, where the choice above is not wanted; a container stands for
            all its children. Those that follow on one another in a container are a run.
        alpha, beta: coefficients; by default ``(1, 0)``, the pretrained network, which a
            :class:`~revbifpn.dual_residual.Schedule` changes, and with ``exact`` ``(127/128, 1/128)``.
        exact, reversible: see :class:`~revbifpn.dual_residual.DualResidualSequence`.

    Returns:
        A :class:`Report`; print it.

    Raises:
        ValueError: nothing can be converted; a name is unknown; the model is converted already; coefficients have no
            inverse.

    Example:
        >>> print(convert(vit, exact=True))
        >>> loss(vit(images)).backward()
    """
    if runs_of(model):
        raise ValueError("model: it is converted already; call revert(model) first")
    names = {id(module): name for name, module in model.named_modules()}
    left: dict[str, str] = {}
    runs = _found(model, left) if blocks is None else _chosen(model, names, blocks)
    if not runs:
        why = "".join(f"\n  {name}: {reason}" for name, reason in left.items())
        raise ValueError(
            "model: expected a Sequential, ModuleList or module of numbered children with at least two blocks of one "
            "class and equal parameters one after another, found none; name them with blocks=, or use "
            f"DualResidualSequence{why}"
        )
    stream = stream_of(exact)
    stacks = [DualResidualSequence(*run, alpha=alpha, beta=beta, exact=stream, reversible=reversible) for run in runs]
    for stack, run in zip(stacks, runs, strict=True):
        stack.labels = tuple(names[id(block)] for block in run)
        stack.calls = (_plain_call,) * len(run)
        for i, block in enumerate(run):
            block.__dict__["_dual_residual"] = _Place(stack, i)
            block.__class__ = _member_class(cast(Any, type(block)))
    return Report(tuple(stack.labels for stack in stacks), left)


def revert(model: nn.Module) -> None:
    """Undo :func:`convert`: the ordinary network with the parameters as they are now.

    Raises:
        ValueError: it is not converted.
        RuntimeError: a block's class was changed since (``fully_shard``).
    """
    members = [m for m in model.modules() if isinstance(m, _Member)]
    if not members:
        raise ValueError("model: expected a converted model, got one without converted blocks")
    for block in members:
        if type(block).__mro__[1] is not _Member:
            raise RuntimeError(
                f"{type(block).__name__}: its class was changed after convert (fully_shard?), which cannot be undone "
                "here: revert the model before that"
            )
    for block in members:
        del block.__dict__["_dual_residual"]
        block.__class__ = _base_of(type(block))


def _signature(block: nn.Module) -> tuple:
    """What blocks of one run have in common: class, parameters' shapes, strides of what strides."""
    shapes = tuple((name, tuple(p.shape)) for name, p in block.named_parameters())
    strides = tuple((name, str(module.stride)) for name, module in block.named_modules() if hasattr(module, "stride"))
    return type(block), shapes, strides


def _why_not(block: nn.Module) -> str:
    if isinstance(block, Reversible):
        return "it is reversible already"
    if next(block.children(), None) is None:
        return "it is a layer, not a block"
    return ""


def _found(model: nn.Module, left: dict[str, str]) -> list[list[nn.Module]]:
    runs: list[list[nn.Module]] = []
    taken: set[int] = set()
    for name, container in model.named_modules():
        if isinstance(container, Reversible) and id(container) not in taken:
            left[name or type(container).__name__] = "it is reversible already"
            taken |= {id(m) for m in container.modules()}
        if not _is_container(container) or id(container) in taken:
            continue
        groups: list[list[tuple[str, nn.Module]]] = []
        for child_name, child in container.named_children():
            if groups and _signature(groups[-1][-1][1]) == _signature(child):
                groups[-1].append((child_name, child))
            else:
                groups.append([(child_name, child)])
        for group in groups:
            full = [".".join(filter(None, (name, child_name))) for child_name, _ in group]
            reason = _why_not(group[0][1])
            if not reason and len(group) == 1 and len(groups) > 1 and not _has_runs(group[0][1]):
                reason = "its neighbours are of another class or shape"
            if len(group) > 1 and not reason:
                runs.append([child for _, child in group])
                taken |= {id(m) for _, child in group for m in child.modules()}
            elif reason and reason != "it is a layer, not a block":
                left[full[0]] = reason
    return runs


def _has_runs(module: nn.Module) -> bool:
    """Whether there are containers in a module, which are looked into on their own."""
    return any(map(_is_container, module.modules()))


def _is_container(module: nn.Module) -> bool:
    """Whether a module's children are called one after another."""
    if isinstance(module, (nn.Sequential, nn.ModuleList)):
        return True
    parts = [re.fullmatch(r"(.*?)(\d+)", name) for name, _ in module.named_children()]
    if len(parts) < 2 or len({part[1] if part else None for part in parts}) > 1 or parts[0] is None:
        return False
    numbers = [int(part[2]) for part in parts if part]
    return numbers == list(range(numbers[0], numbers[0] + len(numbers)))


def _chosen(model: nn.Module, names: dict[int, str], blocks: Iterable[str | nn.Module]) -> list[list[nn.Module]]:
    modules = dict(model.named_modules())
    chosen: list[nn.Module] = []
    for block in [blocks] if isinstance(blocks, (str, nn.Module)) else blocks:
        found = modules.get(block) if isinstance(block, str) else block
        if found is None or id(found) not in names or found is model:
            name = block if isinstance(block, str) else type(block).__name__
            raise ValueError(f"blocks: expected names or modules of blocks in the model, got {name!r}")
        if _is_container(found):
            chosen += found.children()
        else:
            chosen.append(found)
    for block in chosen:
        if isinstance(block, Reversible):
            raise ValueError(f"blocks: {names[id(block)]} is reversible already")
    if len({id(block) for block in chosen}) < len(chosen):
        raise ValueError("blocks: a block is named twice, or is in a container that is named too")
    runs: list[list[nn.Module]] = []
    for block in chosen:
        if runs and _follows(modules, names, runs[-1][-1], block):
            runs[-1].append(block)
        else:
            runs.append([block])
    return runs


def _follows(modules: dict[str, nn.Module], names: dict[int, str], a: nn.Module, b: nn.Module) -> bool:
    """Whether b comes after a in one container."""
    (container, _, _), (other, _, _) = (names[id(m)].rpartition(".") for m in (a, b))
    children = list(modules[container].children())
    return container == other and children.index(b) == children.index(a) + 1
