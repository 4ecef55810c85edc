"""What can be done at each place of a model, what it costs in nats and what it takes: the search's input.

Knows numpy only. Costs are predicted rises of the loss in nats per token; prices are whatever is scarce (parameters,
FLOPs per token, bytes, milliseconds), in its own unit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Curve:
    """One thing of which more or less can be kept: channels, heads, or the rank of one matrix."""

    steps: Integers  # [n], how many are kept
    costs: Floats  # [n], nats per token if so many are kept
    prices: Mapping[str, Floats]  # [n] for each resource; one that is missing is not needed
    name: str = ""  #: What is kept, where an alternative has several curves: the name of a matrix.

    def __post_init__(self) -> None:
        shape = (len(self.steps),)
        if shape == (0,) or any(np.shape(values) != shape for values in (self.costs, *self.prices.values())):
            raise ValueError("a curve has a cost and a price in every resource for each of its steps, at least one")
        if not all(np.isfinite(values).all() for values in (self.costs, *self.prices.values())):
            raise ValueError("a curve's costs and prices are finite")

    @classmethod
    def linear(
        cls,
        costs: Sequence[float] | Floats,
        each: Mapping[str, float],
        fixed: Mapping[str, float] | None = None,
        *,
        name: str = "",
        multiple: int = 1,
        least: int = 0,
    ) -> Curve:
        """Return the curve of keeping 0, 1, 2, ... things at a price `each`, beside what is there in any case.

        `costs[k]` are the nats of keeping k. Only multiples of `multiple` that are at least `least` are allowed.
        """
        first = -(-least // multiple) * multiple
        steps = np.arange(first, len(costs), multiple, dtype=np.int64)
        fixed = fixed or {}
        count = steps.astype(np.float64)
        prices = {key: fixed.get(key, 0.0) + each.get(key, 0.0) * count for key in sorted({*each, *fixed})}
        return cls(steps, np.asarray(costs, dtype=np.float64)[steps], prices, name)


@dataclass(frozen=True, eq=False)
class Alternative:
    """One way to treat a place: some curves, each of which is set on its own; costs and prices add."""

    kind: str  #: Whole, channels, singular, heads, removed ...; no two alternatives of a place have the same.
    curves: tuple[Curve, ...]

    @classmethod
    def single(cls, kind: str, cost: float, prices: Mapping[str, float], step: int = 0) -> Alternative:
        """Return an alternative with nothing to set: the place as it is, or gone."""
        columns = {key: np.array([float(value)]) for key, value in prices.items()}
        return cls(kind, (Curve(np.array([step]), np.array([float(cost)]), columns),))


@dataclass(frozen=True, eq=False)
class Place:
    """Where one of several alternatives is chosen: the MLP of a layer, the attention of a layer."""

    name: str
    alternatives: tuple[Alternative, ...]


@dataclass(frozen=True, eq=False)
class Table:
    """A curve as the search works on it: prices in one array, the costs of all places that are set alike."""

    steps: Integers  # [n]
    costs: Floats  # [m, n]
    prices: Floats  # [n, R]
    name: str


@dataclass(frozen=True, eq=False)
class Class:
    """Places [m] that are set alike (mostly one), with the tables of each of their common alternatives."""

    places: tuple[int, ...]
    kinds: tuple[str, ...]
    options: tuple[tuple[Table, ...], ...]

    def costs(self, option: int, at: Sequence[int]) -> Floats:
        """Return the cost of every place [m] at these positions of the tables of an option."""
        result: Floats = np.sum([t.costs[:, k] for t, k in zip(self.options[option], at, strict=True)], axis=0)
        return result

    def prices(self, option: int, at: Sequence[int]) -> Floats:
        """Return the price [R] of all places together."""
        result: Floats = np.sum([t.prices[k] for t, k in zip(self.options[option], at, strict=True)], axis=0)
        return result


def classes_of(places: Sequence[Place], alike: Sequence[Sequence[str]], resources: Sequence[str]) -> list[Class]:
    """Return the places as classes: those of a set of `alike` are one class, the others by themselves."""
    positions = {place.name: number for number, place in enumerate(places)}
    if len(positions) < len(places):
        raise ValueError("two places have the same name")
    named = [name for names in alike for name in names]
    if len(set(named)) < len(named) or not set(named) <= set(positions):
        raise ValueError("places that are set alike must exist, and be in one set only")
    groups = [tuple(positions[name] for name in names) for names in alike if names]
    groups += [(number,) for name, number in positions.items() if name not in named]
    return [_merged(places, group, resources) for group in sorted(groups)]


def _merged(places: Sequence[Place], group: tuple[int, ...], resources: Sequence[str]) -> Class:
    by_kind = [{alternative.kind: alternative for alternative in places[number].alternatives} for number in group]
    if any(len(found) < len(places[number].alternatives) for found, number in zip(by_kind, group, strict=True)):
        raise ValueError(f"two alternatives of {places[group[0]].name} are of the same kind")
    kinds, options = [], []
    for kind in by_kind[0]:
        if not all(kind in found for found in by_kind):
            continue
        alternatives = [found[kind].curves for found in by_kind]
        names = [curve.name for curve in alternatives[0]]
        if any([curve.name for curve in curves] != names for curves in alternatives):
            continue
        tables = [_table(curves, resources) for curves in zip(*alternatives, strict=True)]
        if all(len(table.steps) for table in tables):
            kinds.append(kind)
            options.append(tuple(tables))
    if not options:
        raise ValueError(f"nothing can be done to all of {', '.join(places[number].name for number in group)}")
    return Class(group, tuple(kinds), tuple(options))


def _table(curves: Sequence[Curve], resources: Sequence[str]) -> Table:
    """Return what curves of several places are together, at the steps that all of them have."""
    steps = curves[0].steps
    for curve in curves[1:]:
        steps = np.intersect1d(steps, curve.steps)
    costs, prices = np.empty((len(curves), len(steps))), np.zeros((len(steps), len(resources)))
    for row, curve in enumerate(curves):
        where: Any = slice(None)
        if len(curves) > 1:
            order = np.argsort(curve.steps, kind="stable")
            where = order[np.searchsorted(curve.steps, steps, sorter=order)]
        costs[row] = curve.costs[where]
        for column, resource in enumerate(resources):
            if resource in curve.prices:
                prices[:, column] += curve.prices[resource][where]
    return Table(steps, costs, prices, curves[0].name)
