"""Launches worked out once: the same call again costs a look-up and Triton's own launcher.

``kernel[grid](...)`` binds, classifies and looks up its arguments again at every call, in Python. What it finds depends
on their dtypes, shapes, strides and alignment alone, so a :class:`Planned` kernel keeps it under a key of these and
then calls the compiled kernel, ``compiled[grid](...)``, itself. Where nothing is compiled (the interpreter, recorded
launches) every launch is an ordinary one.

Where an op's C++ launches its kernel (``csrc/cuda/couple.cpp``), it asks here once for a recipe: what Triton's launcher
would give to the driver. Whatever is not known to be a plain launch has none, and goes through Triton's launcher.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from revkernels.storage import Extents

LIMIT = 4096  # plans of a kernel; one step of a network has a few dozen
ALIGNMENT = 16  # bytes that Triton asks a pointer to be a multiple of
READ = ("3.6", "3.7", "3.8", "3.9")  # versions of Triton whose launcher does what a recipe says
PLAIN_SHARED_MEMORY = 48 << 10  # bytes that every kernel may have
NUMBERS = {"i32": ("<i", "u32"), "i64": ("<q", "u64"), "fp32": ("<f", "f32")}  # in a signature: struct's and PTX's type
_NOTHING = nullcontext()
_handed_out: set[CompiledKernel] = set()  # their functions are in recipes, and are unloaded with their last reference


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


def _parameters(types: Iterable, values: Iterable) -> Iterator[tuple[str, Any]]:
    """A kernel's arguments as its parameters: tuples are flattened, what is compiled in is left out."""
    for kind, value in zip(types, values, strict=True):
        if isinstance(kind, tuple):
            yield from _parameters(kind, value)
        elif kind != "constexpr":
            yield kind, value


class Launch(NamedTuple):
    """A compiled kernel, its programs and its arguments after the tensors; ``run(*tensors, *constants)`` launches."""

    compiled: CompiledKernel
    programs: int
    constants: tuple
    run: Callable[..., None]

    def recipe(self, *sources: int | tuple | None) -> str:
        """What Triton's launcher gives to the driver; empty where that is more, or other, than is known here.

        Integers: function, programs, threads, bytes of shared memory, then two for each of the kernel's parameters: the
        number of the op's tensor that it points to and 0, or -1 and its bits.

        Args:
            sources: for each tensor of the launch, which of the op's it is; None is a null pointer.
        """
        metadata, (warps, blocks_of_cluster, shared) = self.compiled.metadata, self.compiled.packed_metadata
        if (
            not triton.__version__.startswith(tuple(f"{version}." for version in READ))
            or metadata.target.backend != "cuda"
            or metadata.global_scratch_size + metadata.profile_scratch_size > 0
            or metadata.launch_cooperative_grid
            or metadata.launch_pdl
            or getattr(metadata, "instrumentation_mode", "")
            or blocks_of_cluster != 1
            or shared > PLAIN_SHARED_MEMORY
        ):
            return ""
        numbers, types = [self.compiled.function, self.programs, 32 * warps, shared], []
        for kind, value in _parameters(self.compiled.src.signature.values(), (*sources, *self.constants)):
            if kind.startswith("*"):
                types.append("u64")
                numbers += [-1, 0] if value is None else [value, 0]
            elif kind in NUMBERS:
                packed, ptx = NUMBERS[kind]
                types.append(ptx)
                numbers += [-1, int.from_bytes(struct.pack(packed, value).ljust(8, b"\0"), "little", signed=True)]
            else:
                return ""
        numbers += [-1, 0] * 2  # no scratch memory, global or of a profiler
        entry = self.compiled.asm.get("ptx", "").partition(".entry")[2].partition(")")[0]
        if re.findall(r"\.param \.(\w+)", entry) != [*types, "u64", "u64"]:
            return ""
        _handed_out.add(self.compiled)
        return " ".join(map(str, numbers))


def observed() -> bool:
    """Whether somebody watches Triton's launches, which must then be its launcher's own."""
    hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return any(hook is not None and getattr(hook, "calls", True) for hook in hooks)


class Planned:
    """A kernel whose launches are remembered by what they depend on.

    Args:
        kernel: takes tensors (or None, or tuples of both) first, then what a :class:`Plan` holds.
    """

    def __init__(self, kernel: JITFunction):
        self.kernel = kernel
        self.plans: dict[Hashable, Launch] = {}

    def __call__(self, key: Hashable, plan: Callable[[], Plan], *tensors: Tensor | tuple | None) -> Launch | None:
        """Launch on the current device and stream. ``key`` holds the device and determines ``plan()``.

        Returns what it launched, or None where nothing is compiled.
        """
        known = self.plans.get(key)
        if known is None:
            return self._first(key, plan(), tensors)
        stream = torch._C._cuda_getCurrentRawStream(torch._C._cuda_getDevice())
        known.run(*tensors, *known.constants, stream=stream)
        return known

    def _first(self, key: Hashable, plan: Plan, tensors: tuple) -> Launch | None:
        compiled = self.kernel[(plan.programs,)](*tensors, **plan.constants, **plan.options)
        if plan.also:
            self.prepare(plan._replace(constants=plan.constants | plan.also), *tensors)
        if not isinstance(compiled, CompiledKernel):
            return None
        if len(self.plans) >= LIMIT:
            self.plans.clear()
        names = self.kernel.arg_names[len(tensors) :]
        constants = tuple(plan.constants[name] for name in names)
        launch = self.plans[key] = Launch(compiled, plan.programs, constants, compiled[(plan.programs, 1, 1)])
        return launch

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
