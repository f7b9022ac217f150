"""What the processes of a group told one another during a call, for its second call not to ask again.

A norm that reduces its statistics over processes (SyncBatchNorm) would reduce them once more when it is recomputed.
Here its second call takes what the first one received: the same bits, and no process waits for another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_NAMESPACES = ("c10d", "_c10d_functional")


def may_communicate(modules: Sequence[nn.Module]) -> bool:
    """Whether there are other processes, and among the modules a norm that may reduce its statistics over them."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    return any(isinstance(m, nn.SyncBatchNorm) or _is_somebodys_norm(type(m)) for m in modules)


def _is_somebodys_norm(cls: type[nn.Module]) -> bool:
    return issubclass(cls, _NormBase) and not cls.__module__.startswith("torch.nn.")


@dataclass(frozen=True)
class Collective:
    """One collective of a call: its tensors once it was done, and its result, with those tensors left out."""

    op: Any
    tensors: tuple[Tensor, ...]
    result: Any


class _Position(int):
    """Stands for a tensor in a result: an argument, or (counted on) a tensor of its own."""


def _tensors(arguments: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]


def _is_collective(op: Any) -> bool:
    return op.namespace in _NAMESPACES and "wait_tensor" not in op.name() and "_wrap_tensor" not in op.name()


class RecordedCollectives(TorchDispatchMode):
    """Keeps what every collective in the block leaves behind."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if _is_collective(func):
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.ScriptObject):  # c10d's Work
                    cast(Any, leaf).wait()
                elif func.namespace == "_c10d_functional":
                    torch.ops._c10d_functional.wait_tensor(leaf)
            tensors = _tensors((args, kwargs))
            positions = {id(t): _Position(i) for i, t in enumerate(tensors)}
            for t in _tensors(result):
                if id(t) not in positions:
                    positions[id(t)] = _Position(len(tensors))
                    tensors.append(t)
            bare = tree_map(lambda leaf: positions.get(id(leaf), leaf), result)
            self.done.append(Collective(func, tuple(t.clone() for t in tensors), bare))
        return result


class ReplayedCollectives(TorchDispatchMode):
    """Gives the collectives in the block, in order, what earlier ones left behind; nothing is sent.

    Raises:
        RuntimeError: another collective is asked for than there was.
    """

    def __init__(self, done: Sequence[Collective]) -> None:
        super().__init__()
        self.rest: Iterator[Collective] = iter(done)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if not _is_collective(func):
            return func(*args, **(kwargs or {}))
        done, given = next(self.rest, None), _tensors((args, kwargs))
        shapes = [t.shape for t in given]
        if done is None or done.op != func or [t.shape for t in done.tensors[: len(given)]] != shapes:
            raise RuntimeError(
                f"{func} is called in backward, where a reversible block is computed again, and was not in forward: "
                "modules that communicate have to do so in the same order both times"
            )
        for t, left in zip(given, done.tensors, strict=False):
            t.copy_(left)
        tensors = [*given, *(left.clone() for left in done.tensors[len(given) :])]
        return tree_map(lambda leaf: tensors[leaf] if isinstance(leaf, _Position) else leaf, done.result)


def replayed(done: Sequence[Collective] | None) -> AbstractContextManager:
    """The scene of a second call; None: the first one was not watched."""
    return nullcontext() if done is None else ReplayedCollectives(done)
