"""What the default run leaves out: ``pytest -m "slow or not slow"`` runs everything."""

import itertools
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import pytest

# On a test, or on a file as ``pytestmark``: in the default run as many of its cases as it takes for every value of
# every parameter to come once, in the full run for every pair of values of two parameters to come once. The rest of
# the combinations, which are most of a large matrix, do not run.
covering = pytest.mark.covering


def leave_out(items: Iterable[pytest.Item]) -> list[pytest.Item]:
    """Mark the cases of ``covering`` tests slow whose values all come in an earlier case; what brings no new pair."""
    values_seen: dict[object, set[tuple[str, str]]] = defaultdict(set)
    pairs_seen: dict[object, set[tuple]] = defaultdict(set)
    dropped = []
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}
        if "covering" not in marks or not hasattr(item, "callspec"):
            continue
        values = sorted((name, str(value)) for name, value in item.callspec.params.items())
        pairs = set(itertools.combinations(values, 2))
        came = values_seen[item.function]
        if "slow" not in marks and not came.issuperset(values):
            came.update(values)
        elif pairs and pairs <= pairs_seen[item.function]:
            dropped.append(item)
        elif "slow" not in marks:
            item.add_marker(pytest.mark.slow)
        pairs_seen[item.function] |= pairs
    return dropped


def slow(values: Iterable[Any]) -> list:
    """Values of a parameter for the full run only."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def mostly_slow(values: Iterable[Any], kept: int = 1) -> list:
    """The first values of a parameter for every run, the others for the full one."""
    values = list(values)
    return values[:kept] + slow(values[kept:])


def product(*kept: str, others: Collection[str] | None = None, **axes: Mapping[str, Any]) -> pytest.MarkDecorator:
    """Combinations of the axes' values, by name.

    Args:
        kept: names, as in "fast-fixed16", of those for every run.
        others: those for the full run, where a case takes too long for all of them; None: all.
        axes: the values by name, in the order of the names' parts.
    """
    cases = {}
    for combination in itertools.product(*(axis.items() for axis in axes.values())):
        names, values = zip(*combination, strict=True)
        name = "-".join(names)
        cases[name] = pytest.param(*values, id=name, marks=() if name in kept else pytest.mark.slow)
    unknown = {*kept, *(others or ())} - cases.keys()
    assert not unknown, f"product: no combination is called {sorted(unknown)}"
    chosen = [case for name, case in cases.items() if others is None or name in (*kept, *others)]
    return pytest.mark.parametrize(",".join(axes), chosen)
