"""Training and inference as CUDA graphs: a whole step in one launch.

A small batch leaves a GPU waiting for the host, which needs longer to launch a step's kernels than the GPU to run them.
A CUDA graph holds the launches of a step, from the forward to the optimizer, and replays them with one call.

    >>> step = GraphedStep(model, F.cross_entropy, optimizer)
    >>> for images, labels in loader:
    ...     loss = step(images, labels)

A graph replays kernels on the memory that they were captured with. What a Python number was at the capture it stays,
so that everything which may change from step to step is put into memory: inputs are copied in, learning rates and the
momenta of BatchNorm become scalars on the device, random generators are registered. What cannot be there is refused
with a sentence that names it (:func:`revbifpn.engine.capture.capture_lint`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_flatten, tree_map_only

from revbifpn.engine.capture import NotCapturableError, capture_lint
from revbifpn.engine.graphs import Average, Candidate, Cuda, Graph, Graphs, Momenta, Rates
from revbifpn.engine.record import Autocast, Backends
from revbifpn.reversible import Reversible
from revbifpn.streams import captured_counters

__all__ = ["GraphedModule", "GraphedStep", "NotCapturableError", "capture_lint"]

WARM_UP = 3
WARM_UP_DISTRIBUTED = 11  # what PyTorch's DistributedDataParallel needs before a capture


def _side(device: torch.device, stream: torch.cuda.Stream | None) -> Cuda | None:
    """None where there are no graphs: every call runs as it is, which is said once."""
    if device.type == "cuda":
        return Cuda(device, stream)
    warnings.warn(f"no CUDA graphs on {device.type}: every call runs uncaptured, with the same results", stacklevel=4)
    return None


class _Graphed:
    """What a graphed step and a graphed module share: when to capture, and what a graph depends on."""

    def __init__(
        self,
        model: nn.Module,
        *,
        max_shapes: int,
        warm_up: int,
        generators: Sequence[torch.Generator],
        stream: torch.cuda.Stream | None,
    ) -> None:
        if max_shapes < 1:
            raise ValueError(f"max_shapes: expected at least 1, got {max_shapes}")
        if warm_up < 2:
            raise ValueError(f"warm_up: expected at least 2, an ordinary call and a rehearsal, got {warm_up}")
        self._parameters, self._buffers = list(model.parameters()), list(model.buffers())
        devices = {t.device for t in (*self._parameters, *self._buffers)}
        if len(devices) != 1:
            raise ValueError(f"model: expected parameters and buffers on one device, got {sorted(map(str, devices))}")
        self.model = model
        self.device = devices.pop()
        self._modules = list(model.modules())
        self._reversible = [m for m in self._modules if isinstance(m, Reversible)]
        self._generators = tuple(generators)
        self._momenta = Momenta(model)
        self._observed = False  # whether shared norms are known
        self._graphs = Graphs(max_shapes, warm_up)
        self._side = _side(self.device, stream)

    def reset(self) -> None:
        """Forget all graphs, and their memory: the next calls warm up again."""
        self._graphs.clear()

    @property
    def captured(self) -> int:
        """Number of graphs that are kept."""
        return len(self._graphs.graphs)

    def _run(self, inputs: tuple, phase: Hashable, *, on_device: bool) -> Any:
        """One call, uncaptured or being captured; ``on_device``: what may change is read from the device."""
        raise NotImplementedError

    def _refresh(self) -> None:
        """Bring what a graph reads from the device up to date."""
        self._momenta.refresh()

    def _key(self) -> tuple[Hashable, ...]:
        """What a graph depends on besides the inputs: no two calls with the same key launch different kernels."""
        return (
            tuple([m.training for m in self._modules]),
            tuple([p.requires_grad for p in self._parameters]),
            tuple([t.data_ptr() for t in self._parameters]),
            tuple([t.data_ptr() for t in self._buffers]),
            tuple([(m.stream, m.reversible) for m in self._reversible]),
            self._momenta.key(),
            Autocast.current(self.device),
            Backends.current(),
        )

    def _replayed(self, phase: Hashable) -> None:
        """Do what Python does after a call."""

    def _call(self, inputs: tuple, phase: Hashable) -> Any:
        side = self._side
        if side is None:
            return self._plain(inputs, phase)
        leaves, structure = tree_flatten(inputs)
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        described = tuple([(x.shape, x.dtype) if isinstance(x, Tensor) else x for x in leaves])
        key = (structure, described, phase, self._key())
        with side.current():
            graph = self._graphs.find(key)
            if graph is None:
                candidate, calls = self._graphs.candidate(key)
                if calls < self._graphs.warm_up or not candidate.rehearsed:
                    return self._warm_up(side, candidate, calls, inputs, phase)
                graph = self._capture(side, key, inputs, phase)
            for own, given in zip(graph.inputs, tensors, strict=True):
                own.copy_(given, non_blocking=True)
            self._refresh()
            graph.replay()
            for counter in graph.counters:
                counter.report()
            self._replayed(phase)
            return tree_map_only(Tensor, Tensor.clone, graph.outputs)

    def _plain(self, inputs: tuple, phase: Hashable) -> Any:
        find = None if self._observed else self._momenta.observe_calls()
        outputs = _own(self._run(self._moved(inputs), phase, on_device=False))
        if find is not None:
            find()
            self._observed = True
        return outputs

    def _rehearse(self, inputs: tuple, phase: Hashable) -> Any:
        """A call under the lint, as it will be captured."""
        inputs = self._moved(inputs)
        self._refresh()
        with capture_lint():
            outputs = _own(self._run(inputs, phase, on_device=True))
        self._replayed(phase)
        return outputs

    def _warm_up(self, side: Cuda, candidate: Candidate, calls: int, inputs: tuple, phase: Hashable) -> Any:
        candidate.calls.append(self._graphs.count)
        with side.aside():
            if candidate.rehearsed or calls + 1 < self._graphs.warm_up:
                return self._plain(inputs, phase)
            outputs = self._rehearse(inputs, phase)
        candidate.rehearsed = True
        return outputs

    def _capture(self, side: Cuda, key: Hashable, inputs: tuple, phase: Hashable) -> Graph:
        self._graphs.make_room()
        self._refresh()
        own = tree_map_only(Tensor, lambda x: x.to(self.device, copy=True), inputs)
        try:
            with captured_counters() as counters:
                run = partial(self._run, own, phase, on_device=True)
                replay, outputs = side.capture(lambda: _own(run()), self._generators)
        except (NotCapturableError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise NotCapturableError(
                "the call could not be captured into a CUDA graph: it does what no graph can hold, on the line where "
                f"the error above begins ({error})"
            ) from error
        graph = Graph(replay, [x for x in tree_flatten(own)[0] if isinstance(x, Tensor)], outputs, counters)
        self._graphs.add(key, graph)
        return graph

    def _moved(self, inputs: tuple) -> tuple:
        return tree_map_only(Tensor, lambda x: x.to(self.device, non_blocking=True), inputs)


def _own(outputs: Any) -> Any:
    """Results without their autograd graph."""
    return tree_map_only(Tensor, Tensor.detach, outputs)


class GraphedStep(_Graphed):
    """``step(images, *targets) -> loss``: a whole training step, captured per input shape and replayed in one launch.

    It computes ``loss_fn(model(images), *targets)`` and its gradients, and updates the parameters, the scaler and the
    average. No gradients are left.

    The first ``warm_up`` calls with a shape run uncaptured, on a side stream: kernels are compiled, the optimizer makes
    its state, exact streams finish their self-check. The last of them is a rehearsal, which refuses by name what no
    graph can hold. The next call is captured, and from then on replayed. Every call is a training step.

    Learning rates (under any scheduler) and the momenta of BatchNorm may change at any time. What else a graph depends
    on is compared in every call: after a change (``train``, ``freeze_norms``, ``requires_grad``, ``stream``, autocast,
    weight decay, parameters that moved) it warms up and captures anew. Python in the step (hooks, ``loss_fn``, prints)
    runs when it is captured, not when it is replayed. Make another step after modules were added or exchanged.

    Without CUDA the same steps run uncaptured, which is said once.

    Args:
        model: on one device; a :class:`~torch.nn.parallel.DistributedDataParallel` on NCCL, made under ``stream``.
        loss_fn: ``loss_fn(output, *targets)`` gives the loss, or a tuple that starts with it; the rest is handed out.
        optimizer: on CUDA, one that reads its learning rate on the device: ``fused=True`` or ``capturable=True``, both
            for Adam and AdamW.
        scaler: scales the loss; the optimizer is to be fused, as others are skipped by the host.
        ema: an :class:`~torch.optim.swa_utils.AveragedModel` of the model, or a function called after every update
            (``ModelEmaV3.update`` of timm, without a warm-up of the decay, which would be a number) with the model.
        accumulate: calls per update. Gradients are means over them; the last call of each group updates. DDP reduces
            gradients there.
        clip_norm: largest norm of all gradients.
        generators: random generators on the device, other than the default one, that the step draws from.
        max_shapes: number of graphs. Further shapes run uncaptured until a graph was not used while one of them came
            ``warm_up`` times. All graphs share a pool of memory, besides that of uncaptured calls.
        warm_up: by default 3, with DDP 11.
        stream: the side stream; by default a new one.

    Returns:
        The loss, 0-dim, on the device; or what ``loss_fn`` gave. Tensors of the caller's own, without a graph.

    Raises:
        ValueError: an argument does not fit; the message says what is wanted.
        NotCapturableError: the step does what no graph can hold: it reads a value on the host, waits, has shapes that
            depend on values, draws random numbers in a branch that is recomputed. The message names the call and line.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Any],
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler | None = None,
        ema: AveragedModel | Callable[[nn.Module], Any] | None = None,
        *,
        accumulate: int = 1,
        clip_norm: float | None = None,
        generators: Sequence[torch.Generator] = (),
        max_shapes: int = 8,
        warm_up: int | None = None,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        if accumulate < 1:
            raise ValueError(f"accumulate: expected a number of calls, at least 1, got {accumulate}")
        if warm_up is None:
            warm_up = WARM_UP_DISTRIBUTED if isinstance(model, DistributedDataParallel) else WARM_UP
        super().__init__(model, max_shapes=max_shapes, warm_up=warm_up, generators=generators, stream=stream)
        self.loss_fn, self.optimizer, self.ema = loss_fn, optimizer, ema
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self.accumulate, self.clip_norm = accumulate, clip_norm
        if self._side is not None:
            self._expect_capturable()
        if isinstance(model, DistributedDataParallel) and self._side is not None:
            _expect_nccl(model, stream, warm_up)
        self._rates = Rates(optimizer, self.device)
        self._average = Average(ema, model, self.device) if isinstance(ema, AveragedModel) else None
        updated = (p for group in optimizer.param_groups for p in group["params"])
        self._trained = list(dict.fromkeys((*self._parameters, *updated)))
        self._sums: list[Tensor | None] | None = None  # gradients that are accumulated in, the same memory for ever
        self._calls = 0

    def _expect_capturable(self) -> None:
        name, groups = type(self.optimizer).__name__, self.optimizer.param_groups
        if not all(group.get("capturable", True) for group in groups):
            raise ValueError(f"optimizer: {name} counts its steps on the host; make it with capturable=True")
        if not all(group.get("capturable") or group.get("fused", True) for group in groups):
            raise ValueError(
                f"optimizer: {name} reads its learning rate on the host, which a CUDA graph cannot follow; make it "
                "with fused=True"
            )
        if self.scaler is not None and not getattr(self.optimizer, "_step_supports_amp_scaling", False):
            raise ValueError(
                f"scaler: GradScaler reads on the host whether {name} has to skip a step; make the optimizer with "
                "fused=True, which decides on the device (or train in bfloat16, which needs no scaler)"
            )

    def __call__(self, images: Any, *targets: Any) -> Any:
        self._calls += 1
        last = self._calls % self.accumulate == 0
        if self._sums is not None:
            for p, total in zip(self._trained, self._sums, strict=True):
                p.grad = total
        outputs = self._call((images, *targets), last)
        if self.accumulate > 1:
            self._sums = [p.grad for p in self._trained]
        return outputs

    def rehearse(self, images: Any, *targets: Any) -> Any:
        """A step as it would be captured, on any device, which raises :class:`NotCapturableError` if it cannot be.

        It is a training step like any other, except that the optimizer and ``ema`` must have made theirs before.
        """
        self._calls += 1
        return self._rehearse((images, *targets), self._calls % self.accumulate == 0)

    def _key(self) -> tuple[Hashable, ...]:
        fixed = [name for name in self.optimizer.defaults if name != "lr"]
        groups = self.optimizer.param_groups
        return (*super()._key(), tuple([tuple([_hashable(group[name]) for name in fixed]) for group in groups]))

    def _refresh(self) -> None:
        super()._refresh()
        self._rates.refresh()
        if self._average is not None:
            self._average.refresh()

    def _replayed(self, phase: Hashable) -> None:
        if phase and self._average is not None:
            self._average.count_replay()

    def _run(self, inputs: tuple, phase: Hashable, *, on_device: bool) -> Any:
        """``phase``: whether the optimizer steps."""
        images, *targets = inputs
        if self.accumulate == 1:
            self._clear()
        with self._unsynchronized(phase):
            with _without_cache(self.device):
                with self._momenta.applied() if on_device else nullcontext():
                    output = self.model(images)
                result = self.loss_fn(output, *targets)
            loss = result[0] if isinstance(result, tuple) else result
            share = loss if self.accumulate == 1 else loss / self.accumulate
            with _without_autocast(self.device):
                (share if self.scaler is None else self.scaler.scale(share)).backward()
                if phase:
                    self._update(on_device)
        return result

    def _update(self, on_device: bool) -> None:
        if self.clip_norm is not None:
            if self.scaler is not None:
                self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self._trained, self.clip_norm)
        with self._rates.in_place() if on_device else nullcontext():
            if self.scaler is None:
                self.optimizer.step()
            else:
                self.scaler.step(self.optimizer)
                self.scaler.update()
        if self._average is None:
            if self.ema is not None:
                self.ema(self.model)
        elif on_device:
            self._average.update()
        else:
            self._average.average.update_parameters(self.model)
        self._clear()

    def _clear(self) -> None:
        if self.accumulate == 1:
            for p in self._trained:
                p.grad = None
            return
        gradients = [p.grad for p in self._trained if p.grad is not None]
        if gradients:
            torch._foreach_zero_(gradients)

    def _unsynchronized(self, last: Hashable) -> AbstractContextManager:
        return self.model.no_sync() if isinstance(self.model, DistributedDataParallel) and not last else nullcontext()


def _expect_nccl(model: DistributedDataParallel, stream: torch.cuda.Stream | None, warm_up: int) -> None:
    if stream is None:
        raise ValueError(
            "stream: expected the stream that DistributedDataParallel was made under, which gradients are summed "
            "on: with torch.cuda.stream(stream): model = DistributedDataParallel(model)"
        )
    if warm_up < WARM_UP_DISTRIBUTED:
        raise ValueError(f"warm_up: DistributedDataParallel needs {WARM_UP_DISTRIBUTED} calls, got {warm_up}")
    if model.find_unused_parameters:
        raise ValueError("model: find_unused_parameters=True reads on the host which ones are unused")
    backend = dist.get_backend(model.process_group)
    if backend != "nccl":
        raise ValueError(f"model: a CUDA graph can hold collectives of NCCL, got the {backend} backend")


class GraphedModule(_Graphed):
    """``module(*inputs)`` for inference, captured per input shape and replayed in one launch.

    As :class:`GraphedStep`, without gradients: results are tensors of the caller's own. Parameters and buffers may be
    changed in place meanwhile, as an optimizer and ``load_state_dict`` do.

    Args:
        model, generators, max_shapes, warm_up, stream: see :class:`GraphedStep`.

    Raises:
        NotCapturableError: see :class:`GraphedStep`.

    Example:
        >>> graphed = GraphedModule(model.eval())
        >>> logits = graphed(images)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        generators: Sequence[torch.Generator] = (),
        max_shapes: int = 8,
        warm_up: int = 2,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        super().__init__(model, max_shapes=max_shapes, warm_up=warm_up, generators=generators, stream=stream)

    @torch.no_grad()
    def __call__(self, *inputs: Any) -> Any:
        return self._call(inputs, None)

    @torch.no_grad()
    def rehearse(self, *inputs: Any) -> Any:
        """A call as it would be captured, on any device; see :meth:`GraphedStep.rehearse`."""
        return self._rehearse(inputs, None)

    def _run(self, inputs: tuple, phase: Hashable, *, on_device: bool) -> Any:
        with _without_cache(self.device), self._momenta.applied() if on_device else nullcontext():
            return self.model(*inputs)


def _hashable(value: Any) -> Hashable:
    """A hyperparameter; one on the device is read there."""
    if isinstance(value, Tensor):
        return id(value)
    return tuple(value) if isinstance(value, list) else value


def _without_cache(device: torch.device) -> AbstractContextManager:
    """Autocast as it is, without its cache of weights: a graph would go on reading those of the capture."""
    return Autocast.current(device).restore()


def _without_autocast(device: torch.device) -> AbstractContextManager:
    return torch.autocast(device.type, enabled=False) if Autocast.current(device).enabled else nullcontext()
