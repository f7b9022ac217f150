"""Launches worked out once: the same call again costs a look-up and Triton's own launcher.

``kernel[grid](...)`` binds, classifies and looks up its arguments again at every call, in Python. What it finds depends
on their dtypes, shapes, strides and alignment alone, so a :class:`Planned` kernel keeps it under a key of these and
then calls the compiled kernel, ``compiled[grid](...)``, itself. Where nothing is compiled (the interpreter, recorded
launches) every launch is an ordinary one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from revkernels.storage import Extents

LIMIT = 4096  # plans of a kernel; one step of a network has a few dozen
ALIGNMENT = 16  # bytes that Triton asks a pointer to be a multiple of
_NOTHING = nullcontext()


class Plan(NamedTuple):
    """How a kernel is launched: programs, every argument after the tensors by name, warps.

    ``also``: other values of some of them, which another size may need; compiled at once.
    """

    programs: int
    constants: dict[str, Any]
    num_warps: int = 4
    also: dict[str, Any] | None = None

    @property
    def options(self) -> dict[str, Any]:
        return {"num_warps": self.num_warps, "enable_fp_fusion": False}


class Planned:
    """A kernel whose launches are remembered by what they depend on.

    Args:
        kernel: takes tensors (or None, or tuples of both) first, then what a :class:`Plan` holds.
    """

    def __init__(self, kernel: JITFunction):
        self.kernel = kernel
        self.plans: dict[Hashable, tuple[Callable[..., None], tuple]] = {}

    def __call__(self, key: Hashable, plan: Callable[[], Plan], *tensors: Tensor | tuple | None) -> None:
        """Launch on the current device and stream. ``key`` holds the device and determines ``plan()``."""
        known = self.plans.get(key)
        if known is None:
            self._first(key, plan(), tensors)
        else:
            launch, constants = known
            launch(*tensors, *constants, stream=torch._C._cuda_getCurrentRawStream(torch._C._cuda_getDevice()))

    def _first(self, key: Hashable, plan: Plan, tensors: tuple) -> None:
        compiled = self.kernel[(plan.programs,)](*tensors, **plan.constants, **plan.options)
        if plan.also:
            self.prepare(plan._replace(constants=plan.constants | plan.also), *tensors)
        if isinstance(compiled, CompiledKernel):
            if len(self.plans) >= LIMIT:
                self.plans.clear()
            names = self.kernel.arg_names[len(tensors) :]
            self.plans[key] = compiled[(plan.programs, 1, 1)], tuple(plan.constants[name] for name in names)

    def prepare(self, plan: Plan, *tensors: Tensor | tuple | None) -> None:
        """Compile without a launch."""
        if isinstance(self.kernel, JITFunction):  # else it is interpreted
            self.kernel.warmup(*tensors, grid=(1,), **plan.constants, **plan.options)


class Guard:
    """An op's checks of its tensors' memory, in full once per key and quickly from then on.

    Args:
        check: the full one; raises.
        written: how many of the tensors, the first ones, the op writes.
    """

    def __init__(self, check: Callable[..., None], written: int) -> None:
        self.check, self.written = check, written
        self.extents: dict[Hashable, Extents] = {}

    def __call__(self, key: Hashable, tensors: Sequence[Tensor | None], *arguments: object) -> None:
        """``key`` determines shapes and strides; ``arguments`` are what the full check takes."""
        known = self.extents.get(key)
        if known is None:
            if len(self.extents) >= LIMIT:
                self.extents.clear()
            known = self.extents[key] = Extents(tensors, self.written)
        elif known.are_apart(tensors):
            return
        self.check(*arguments)


def seen(x: Tensor | None) -> Hashable:
    """What a launch depends on of a tensor."""
    return None if x is None else (x.shape, x.stride(), x.dtype, x.data_ptr() % ALIGNMENT == 0)


def on_device_of(x: Tensor) -> AbstractContextManager:
    """Makes x's device current, where it is not."""
    index = x.get_device()
    return _NOTHING if index < 0 or index == torch._C._cuda_getDevice() else torch.cuda.device(index)
