"""How long something takes: the clock, turns, quantiles."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

Action = Callable[[], Any]


def seconds(action: Action, device: torch.device, repeats: int = 1) -> float:
    """Of one of ``repeats`` calls on end: CUDA events around them on a GPU that was idle, the wall clock on a CPU."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(repeats):
            action()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats
    begin = time.perf_counter()
    for _ in range(repeats):
        action()
    return (time.perf_counter() - begin) / repeats


def alternate(actions: Sequence[Action], rounds: int, clock: Callable[[Action], float]) -> list[list[float]]:
    """``times[i][r]`` of action i in round r. Each runs once per round, and each round begins with another."""
    times: list[list[float]] = [[] for _ in actions]
    for r in range(rounds):
        for k in range(len(actions)):
            i = (r + k) % len(actions)
            times[i].append(clock(actions[i]))
    return times


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    found = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64))
    return tuple(found.tolist())


def paired_ratios(times: Sequence[float], base: Sequence[float]) -> tuple[float, float, float]:
    """Quantiles of the ratios within rounds: a ratio of medians would mix different moments."""
    return quantiles([own / other for own, other in zip(times, base, strict=True)])
