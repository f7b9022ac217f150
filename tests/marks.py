"""What the default run leaves out: ``pytest -m "slow or not slow"`` runs everything."""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import pytest


def slow(values: Iterable[Any]) -> list:
    """Values of a parameter for the full run only."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def mostly_slow(values: Iterable[Any], kept: int = 1) -> list:
    """The first values of a parameter for every run, the others for the full one."""
    values = list(values)
    return values[:kept] + slow(values[kept:])


def product(*kept: str, **axes: Mapping[str, Any]) -> pytest.MarkDecorator:
    """Every combination of the axes' values, by name; those called ``kept``, as in "fast-fixed16", for every run."""
    cases = []
    for combination in itertools.product(*(axis.items() for axis in axes.values())):
        names, values = zip(*combination, strict=True)
        name = "-".join(names)
        cases.append(pytest.param(*values, id=name, marks=() if name in kept else pytest.mark.slow))
    unknown = set(kept) - {case.id for case in cases}
    assert not unknown, f"kept: no combination is called {sorted(unknown)}"
    return pytest.mark.parametrize(",".join(axes), cases)
