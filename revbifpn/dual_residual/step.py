"""The dual-residual step as a coupling on :func:`revkernels.dual_residual_`, and the block that it calls."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

import revkernels
from revbifpn.engine.branch import Contribution, Gradient, Held, ModuleBranch
from revbifpn.engine.coupling import Coupling
from revbifpn.engine.lowered import Coupler, Grid, Lowered
from revbifpn.engine.record import Record
from revbifpn.streams import Encoded, Values, autocast_dtype, has_values, is_capturing, values

TOLERANCE = 1e-3  # of the second call's values, where kernels are not deterministic


class Bound(nn.Module):
    """A block with the further arguments of one call: what a coupling adds, and what else the call returned.

    Args:
        block: ``call(block, x, *args, **kwargs)`` is a tensor of x's shape and dtype, or a tuple or list that begins
            with one.
        label: its name in messages.
        args, kwargs: the further arguments. Tensors among them that want a gradient get one.
        call: how the block is called.
        check: whether the block is called again in the forward, to see whether it computes the same.

    Attributes:
        others: the tensors that want a gradient; the module is called with x and these.
        rest: what the block returned besides its first result; an argument that it passes on is the caller's.
        kind: tuple, list or None: in what.
    """

    def __init__(
        self,
        block: nn.Module,
        label: str,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        call: Callable[..., Any] = nn.Module.__call__,
        *,
        check: bool = False,
    ) -> None:
        super().__init__()
        self.check = check
        self.block, self.label, self._call_block = block, label, call
        self._args, self._kwargs = tuple(args), dict(kwargs or {})
        arguments = [*self._args, *self._kwargs.values()]
        wanting = torch.is_grad_enabled()
        self.others = tuple(t for t in arguments if wanting and isinstance(t, Tensor) and t.requires_grad)
        self._versions = [(t, t._version) for t in arguments if isinstance(t, Tensor) and not t.is_inference()]
        self.rest: list[Any] = []
        self.kind: type | None = None

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        for t, version in self._versions:
            if t._version != version:
                raise RuntimeError(
                    f"{self.label}: an argument of shape {tuple(t.shape)} was changed in place between the forward and "
                    "the backward, which calls the block again with it: pass a copy"
                )
        given = {id(t): other for t, other in zip(self.others, others, strict=True)}
        args = [given.get(id(a), a) for a in self._args]
        result = self._call_block(self.block, x, *args, **{n: given.get(id(a), a) for n, a in self._kwargs.items()})
        if isinstance(result, (tuple, list)) and result:
            self.kind = type(result)
            result, *self.rest = result
            passed_on = {id(other): t for t, other in zip(self.others, others, strict=True)}
            self.rest = [passed_on.get(id(t), t) for t in self.rest]
        self._check(x, result)
        return result

    def _check(self, x: Tensor, result: Any) -> None:
        found = f"{tuple(result.shape)}, {result.dtype}" if isinstance(result, Tensor) else type(result).__name__
        dtypes = {x.dtype, autocast_dtype(x.device) or x.dtype}
        if not isinstance(result, Tensor) or result.shape != x.shape or result.dtype not in dtypes:
            raise ValueError(
                f"{self.label} ({type(self.block).__name__}): expected a result of its input's shape and dtype, "
                f"{tuple(x.shape)}, {x.dtype}, got {found}; leave it out of blocks="
            )
        for t in self.rest:
            own = isinstance(t, Tensor) and not any(t is other for other in self.others)
            if own and t.requires_grad and x.requires_grad and t.is_floating_point():
                raise ValueError(
                    f"{self.label} ({type(self.block).__name__}): returns a second tensor of shape {tuple(t.shape)} "
                    "that wants a gradient, which a reversible block cannot give it; do not ask for it in training, "
                    "or leave the block out of blocks="
                )


def refuse_caches(name: str, arguments: Sequence[Any]) -> None:
    """Refuse to train a block that appends its keys and values to an argument: backward would append them again.

    Raises:
        RuntimeError: a cache of transformers is among the arguments.
    """
    cache = getattr(sys.modules.get("transformers.cache_utils"), "Cache", ())
    for argument in arguments:
        if isinstance(argument, cache):
            raise RuntimeError(
                f"{name}: got a cache ({type(argument).__name__}), to which backward, calling the block again, would "
                "append its keys and values once more; pass use_cache=False in training (model.config.use_cache)"
            )


class BlockBranch(ModuleBranch):
    """A block as a branch."""

    module: Bound

    def __init__(self, module: Bound) -> None:
        super().__init__(module, module.others)

    def record(self, *inputs: Values) -> tuple[Contribution, Record]:
        contribution, record = super().record(*inputs)
        p = contribution.p
        if self.module.check and not self._units and has_values(p) and not is_capturing(p.device) and p.numel():
            again, _ = self.recompute(record, self.parameters(), inputs, [False] * len(inputs))
            if (again.p - p).abs().max() > TOLERANCE * p.abs().max():
                raise RuntimeError(
                    f"{self.module.label} ({type(self.module.block).__name__}) computed other values when called "
                    "a second time, as backward will do: it has state outside of buffers, or a random generator of its "
                    "own. Leave it out of blocks=, or use reversible=False"
                )
        return contribution, record


def _raw(x: Values) -> Tensor:
    """A stream as it is stored."""
    return x.y if isinstance(x, Encoded) else x


@dataclass(frozen=True)
class DualLowered(Lowered):
    """``y <- beta y + B(x) + c x`` in one pass; see :mod:`revbifpn.dual_residual`."""

    def _step(
        self,
        y: Tensor,
        contributions: Sequence[Contribution],
        linear: Sequence[Values],
        grid: Grid | None,
        *,
        inverse: bool,
        remainder: Tensor | None = None,
    ) -> None:
        ((_, coefficient),), (x,) = self.coupling.linear, linear
        if contributions:
            p, source = contributions[0].p, _raw(x)
        else:  # beta x alone
            p, source, coefficient = coefficient * values(x), None, 0.0
        revkernels.dual_residual_(
            y,
            source,
            p,
            coefficient=coefficient,
            beta=self.coupling.scale,
            inverse=inverse,
            fraction_bits=None if grid is None else grid.fraction_bits,
            remainder=remainder,
            overflow=None if grid is None else grid.overflow,
        )

    def advance_(
        self,
        y: Tensor,
        contributions: Sequence[Contribution],
        linear: Sequence[Values],
        grid: Grid | None,
        *,
        undone: bool = True,
    ) -> Tensor | None:
        remainder = None
        if grid is not None and undone:
            size = revkernels.functional.remainder_bytes(y.numel(), self.coupling.scale)
            remainder = torch.empty(size, dtype=torch.uint8, device=y.device) if size else None
        self._step(y, contributions, linear, grid, inverse=False, remainder=remainder)
        return remainder

    def retreat_(
        self,
        y: Tensor,
        contributions: Sequence[Contribution],
        linear: Sequence[Values],
        grid: Grid | None,
        remainder: Tensor | None = None,
    ) -> None:
        self._step(y, contributions, linear, grid, inverse=True, remainder=remainder)

    def gradient(self, total: Gradient) -> Gradient:
        return Held()

    def pull_linear_(self, dy: Tensor, linear: Sequence[Gradient], pulled: Sequence[Gradient]) -> None:
        ((_, coefficient),), (total,) = self.coupling.linear, linear
        g = pulled[0].value if pulled else None
        if g is not None and torch._C._is_alias_of(g, dy):  # type: ignore[attr-defined]
            g = g.clone()  # dy is updated in the same pass
        dx = total.tensor()
        revkernels.dual_residual_adjoint_(dx, dy, g, coefficient=coefficient, beta=self.coupling.scale)


class DualCoupler(Coupler):
    """Couplings of dual-residual networks: one transform of one source, which is the linear source too."""

    divides = True

    def lower(self, coupling: Coupling, inputs: Sequence[Values]) -> Lowered:
        return DualLowered(coupling, tuple(BlockBranch(cast(Bound, t)) for t in coupling.transforms))

    def stored_sum(self, coupling: Coupling, y: Tensor | None, inputs: Sequence[Tensor]) -> Tensor:
        for transform, x in zip(coupling.transforms, inputs, strict=True):
            p = BlockBranch(cast(Bound, transform)).evaluate(x).p
            y = p if y is None else y + p
        assert y is not None, "a step has a linear source"
        return y
