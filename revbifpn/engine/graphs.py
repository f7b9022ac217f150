"""Which calls get a CUDA graph, where it is captured, and what it reads from the device that Python has as a number."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel

from revbifpn.streams import OverflowCounter


class Cuda:
    """Where a device's graphs are warmed up and captured: one side stream, one pool of memory for all of them."""

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if stream is None else stream
        self.pool = torch.cuda.graph_pool_handle()

    def current(self) -> AbstractContextManager:
        """Make the device the current one."""
        return torch.cuda.device(self.device)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Run the block on the side stream, in order with the device's current one."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            current.wait_stream(self.stream)

    def capture(self, run: Callable[[], Any], generators: Sequence[torch.Generator]) -> tuple[Callable[[], None], Any]:
        """The replay of what ``run`` launches, and its results, which a replay writes anew."""
        graph = torch.cuda.CUDAGraph()
        for generator in generators:
            graph.register_generator_state(generator)
        failure = None
        try:
            # A failure leaves PyTorch's context on the side stream. thread_local: other threads, a loader's or NCCL's,
            # may meanwhile do what a capture forbids.
            with (
                torch.cuda.stream(torch.cuda.current_stream(self.device)),
                torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"),
            ):
                try:
                    outputs = run()
                except Exception as error:
                    failure = error
                    raise
        except Exception as error:
            raise failure or error from None  # what spoiled the capture, not that it was found spoiled at the end
        return graph.replay, outputs


@dataclass(eq=False)
class Graph:
    """A captured call."""

    replay: Callable[[], None]
    inputs: list[Tensor]  # read by the replay
    outputs: Any  # written by it
    counters: list[OverflowCounter]  # likewise
    used: int = 0  # the call that used it last


@dataclass(eq=False)
class Candidate:
    """What may be captured: the numbers of its latest calls, and whether one of them was a rehearsal."""

    calls: deque[int]
    rehearsed: bool = False


class Graphs:
    """The graphs of one function, by what a graph depends on: as many as ``size``.

    A key runs uncaptured ``warm_up`` times, the last of them as a rehearsal; then it is captured. Where there is no
    room it takes the place of the graph that was used least recently, once it came ``warm_up`` times since that was
    used. So graphs in use never throw each other out: further shapes run uncaptured.
    """

    def __init__(self, size: int, warm_up: int) -> None:
        self.size, self.warm_up = size, warm_up
        self.graphs: OrderedDict[Hashable, Graph] = OrderedDict()  # the least recently used one first
        self.candidates: OrderedDict[Hashable, Candidate] = OrderedDict()
        self.count = 0  # calls

    def find(self, key: Hashable) -> Graph | None:
        """The key's graph; counts the call."""
        self.count += 1
        graph = self.graphs.get(key)
        if graph is not None:
            graph.used = self.count
            self.graphs.move_to_end(key)
        return graph

    def candidate(self, key: Hashable) -> tuple[Candidate, int]:
        """A key without a graph, and how many of its earlier calls count."""
        candidate = self.candidates.pop(key, None) or Candidate(deque(maxlen=self.warm_up))
        self.candidates[key] = candidate
        if len(self.candidates) > 8 * self.size:
            self.candidates.popitem(last=False)
        since = 0
        if len(self.graphs) == self.size:
            since = next(iter(self.graphs.values())).used
        return candidate, sum(call > since for call in candidate.calls)

    def make_room(self) -> None:
        """Drop the least recently used graphs, so that one more fits."""
        while len(self.graphs) >= self.size:
            self.graphs.popitem(last=False)

    def add(self, key: Hashable, graph: Graph) -> None:
        """Keep the graph of a candidate."""
        graph.used = self.count
        self.graphs[key] = graph
        del self.candidates[key]

    def clear(self) -> None:
        self.graphs.clear()
        self.candidates.clear()


class Rates:
    """The learning rates of an optimizer's groups as scalars on the device, in their place while a step is captured.

    Between captures a group's ``lr`` is what its user made it, a float or a tensor.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self.optimizer, self.device = optimizer, device
        self.values: list[Tensor] = []
        self.known: list[float | None] = []  # what a value was filled with; None: a tensor

    def refresh(self) -> None:
        """Bring the scalars up to date, without waiting for the device."""
        for i, group in enumerate(self.optimizer.param_groups):
            lr = group["lr"]
            if i == len(self.values):
                self.values.append(torch.empty((), device=self.device))
                self.known.append(None)
            if isinstance(lr, Tensor):
                self.values[i].copy_(lr.detach().reshape(()), non_blocking=True)
                self.known[i] = None
            elif lr != self.known[i]:
                self.values[i].fill_(lr)
                self.known[i] = lr

    @contextmanager
    def in_place(self) -> Iterator[None]:
        groups = self.optimizer.param_groups
        before = [group["lr"] for group in groups]
        try:
            for group, value in zip(groups, self.values, strict=True):
                group["lr"] = value
            yield
        finally:
            for group, lr in zip(groups, before, strict=True):
                group["lr"] = lr


class Momenta:
    """Running statistics of BatchNorm with momenta m on the device: ``r <- r + m (v - r)``.

    A norm takes m as a number. So in a capture every norm is given ``m = 1`` and buffers of zeros, which leaves the
    batch's own statistics v there, and the running ones follow after the forward.

    Attributes:
        shared: norms that are called more than once in a forward: v would be that of the last call alone. They keep
            their number, and a graph holds for that number.
    """

    def __init__(self, model: nn.Module) -> None:
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        self.norms = [m for m in norms if m.running_mean is not None and m.running_var is not None]
        self.shared: set[int] = set()
        self.values = [torch.empty_like(_statistics(m)[0]) for m in self.norms]
        self.known: list[float | None] = [None] * len(self.norms)

    def refresh(self) -> None:
        """Bring the momenta on the device up to date."""
        changed: dict[float, list[Tensor]] = defaultdict(list)
        for i, norm in enumerate(self.norms):
            if norm.momentum != self.known[i] and norm.momentum is not None:
                changed[norm.momentum].append(self.values[i])
                self.known[i] = norm.momentum
        for momentum, values in changed.items():
            torch._foreach_zero_(values)
            torch._foreach_add_(values, momentum)

    def key(self) -> Hashable:
        """What a graph depends on."""
        return tuple([m.momentum if id(m) in self.shared else m.momentum is None for m in self.norms])

    def observe_calls(self) -> Callable[[], None]:
        """Call the result after a forward: it finds the shared norms by their counters."""
        counters = {id(m): m.num_batches_tracked for m in self.norms if m.num_batches_tracked is not None}
        before = [counter.clone() for counter in counters.values()]

        def find() -> None:
            if counters:
                calls = torch.stack(list(counters.values())) - torch.stack(before)
                self.shared |= {norm for norm, n in zip(counters, calls.tolist(), strict=True) if n > 1}

        return find

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Around a forward that is captured."""
        own = [m.training and m.momentum is not None and id(m) not in self.shared for m in self.norms]
        norms, weights = list(compress(self.norms, own)), list(compress(self.values, own))
        running, momenta = list(map(_statistics, norms)), [norm.momentum for norm in norms]
        batch = [(torch.zeros_like(mean), torch.zeros_like(var)) for mean, var in running]
        try:
            _give(norms, batch, [1.0] * len(norms))
            yield
        finally:
            _give(norms, running, momenta)
        with torch.no_grad():
            for targets, latest in zip(zip(*running, strict=True), zip(*batch, strict=True), strict=True):
                torch._foreach_lerp_(targets, latest, weights)


def _statistics(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None and norm.running_var is not None
    return norm.running_mean, norm.running_var


def _give(
    norms: Sequence[_BatchNorm], statistics: Sequence[tuple[Tensor, Tensor]], momenta: Sequence[float | None]
) -> None:
    for norm, (mean, var), momentum in zip(norms, statistics, momenta, strict=True):
        norm.running_mean, norm.running_var, norm.momentum = mean, var, momentum


class Average:
    """``AveragedModel.update_parameters`` as a graph can hold it: it reads ``n_averaged`` on the device."""

    def __init__(self, average: AveragedModel, model: nn.Module, device: torch.device) -> None:
        self.average, self.model = average, model
        self.on_host = average.n_averaged.device.type == "cpu" != device.type
        self.count = torch.zeros((), dtype=torch.long, device=device) if self.on_host else average.n_averaged

    def refresh(self) -> None:
        if self.on_host:
            self.count.fill_(int(self.average.n_averaged))

    @torch.no_grad()
    def update(self) -> None:
        """After the first update, which copies."""
        average, model = self.average, self.model
        pairs: list[tuple[Tensor, Tensor]] = list(zip(average.module.parameters(), model.parameters(), strict=True))
        buffers = list(zip(average.module.buffers(), model.buffers(), strict=True))
        if average.use_buffers:
            pairs += buffers
        else:
            for own, given in buffers:
                own.copy_(given)
        if average.avg_fn is not None:
            for own, given in pairs:
                own.copy_(average.avg_fn(own, given, self.count))
        else:
            groups: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for own, given in pairs:
                groups[own.dtype].append((own, given))
            for group in groups.values():
                owns, givens = map(list, zip(*group, strict=True))
                (average.multi_avg_fn or _mean)(owns, givens, self.count)
        if not self.on_host:
            self.count += 1

    def count_replay(self) -> None:
        if self.on_host:
            self.average.n_averaged += 1


def _mean(averages: list[Tensor], values: list[Tensor], count: Tensor) -> None:
    """``a <- a + (v - a) / (n + 1)``; PyTorch's own reads n on the host."""
    if not averages[0].is_floating_point():
        for average, value in zip(averages, values, strict=True):
            average.copy_(average + (value - average) / (count + 1))
        return
    steps = torch._foreach_sub(values, averages)
    torch._foreach_mul_(steps, 1 / (count + 1))
    torch._foreach_add_(averages, steps)
