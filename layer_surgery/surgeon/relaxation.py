"""The search's Lagrangian: what the best choice would cost if budgets were prices. Knows numpy only.

For multipliers `lambda >= 0` (nats per unit of a resource) every class is chosen by itself, at the least of
`cost + lambda . price`; the sum less `lambda . budget` is below the cost of everything that keeps the budgets (Everett,
Generalized Lagrange multiplier method, 1963). The largest such bound is the optimum of the relaxed problem, in which
mixtures are allowed: with one resource, the lower convex hulls taken in the order of their slopes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from layer_surgery.surgeon.curves import Class, Floats, Integers, Table

#: Rounds of pruning a hull in parallel; what is then left is done point by point.
_ROUNDS = 24
#: Prices that differ from a line by no more than this fraction are on it.
_STRAIGHT = 1e-9
#: Steps of the ellipsoid method at most, and the gap, as a fraction of all costs, at which it stops.
_STEPS, _TOLERANCE = 800, 1e-9

Pick = tuple[int, tuple[int, ...]]
"""Of a class: the option, and for each of its tables the position of the step."""


@dataclass(frozen=True)
class Point:
    """The best choice at some multipliers."""

    multipliers: Floats  # [R]
    cost: float
    prices: Floats  # [R]
    picks: list[Pick]

    def bound(self, available: Floats) -> float:
        """Return the bound on the cost of everything that keeps the budgets `available` [R]."""
        return self.cost + float(self.multipliers @ (self.prices - available))


class Relaxation:
    """The Lagrangian of some classes, with the places' costs weighted."""

    def __init__(self, classes: Sequence[Class], weights: Floats) -> None:
        self._hulls = [
            [[_Hull(table, weights[list(one.places)]) for table in tables] for tables in one.options] for one in classes
        ]

    def at(self, multipliers: Floats) -> Point:
        """Return the best choice at these multipliers [R]."""
        cost, prices, picks = 0.0, np.zeros(len(multipliers)), []
        for options in self._hulls:
            best: tuple[float, float, Floats, Pick] | None = None
            for number, hulls in enumerate(options):
                found = [hull.best(multipliers) for hull in hulls]
                total = sum(c for _k, c, _p in found)
                price = np.sum([p for _k, _c, p in found], axis=0)
                value = total + float(multipliers @ price)
                if best is None or value < best[0]:
                    best = value, total, price, (number, tuple(k for k, _c, _p in found))
            assert best is not None
            cost += best[1]
            prices += best[2]
            picks.append(best[3])
        return Point(multipliers, cost, prices, picks)

    def option_at(self, number: int, option: int, multipliers: Floats) -> tuple[int, ...]:
        """Return the best positions of an option of a class at these multipliers."""
        return tuple(hull.best(multipliers)[0] for hull in self._hulls[number][option])

    def solve(self, available: Floats, seen: Callable[[Point], None]) -> Point:
        """Return the point with (nearly) the largest bound; `seen` is called with every point that is tried.

        The budgets must be reachable one by one.
        """
        free = self.at(np.zeros(len(available)))
        seen(free)
        if (free.prices <= available).all():
            return free
        alone = [self._alone(free, number, available, seen) for number in range(len(available))]
        best = max(alone, key=lambda point: point.bound(available))
        if len(available) == 1 or (best.prices <= available).all():
            return best
        return self._ellipsoid(alone, available, seen)

    def _alone(self, free: Point, number: int, available: Floats, seen: Callable[[Point], None]) -> Point:
        """Return the solution with the budget of one resource only, by the secants of its two neighbours."""
        if free.prices[number] <= available[number]:
            return free
        unit = np.eye(len(available))[number]

        def at(multiplier: float) -> Point:
            point = self.at(multiplier * unit)
            seen(point)
            return point

        above, multiplier = free, max(abs(free.cost), 1.0) * 1e-12 / max(free.prices[number], 1e-300)
        below = at(multiplier)
        while below.prices[number] > available[number]:
            above, multiplier = below, multiplier * 8
            below = at(multiplier)
        while above.prices[number] > below.prices[number]:
            multiplier = (below.cost - above.cost) / (above.prices[number] - below.prices[number])
            if not above.multipliers[number] < multiplier < below.multipliers[number]:
                break
            between = at(multiplier)
            line = below.cost + multiplier * below.prices[number]
            if between.cost + multiplier * between.prices[number] >= line - 1e-15 * abs(line):
                # No choice is below the line through both: the bound is the largest, and the same for both.
                return Point(between.multipliers, below.cost, below.prices, below.picks)
            above, below = (between, below) if between.prices[number] > available[number] else (above, between)
        return below

    def _ellipsoid(self, alone: Sequence[Point], available: Floats, seen: Callable[[Point], None]) -> Point:
        """Return the best point that the ellipsoid method with deep cuts finds (Bland, Goldfarb & Todd, 1981)."""
        n, scale = len(available), 1 / np.maximum(np.abs(available), 1e-300)  # multipliers per budget, not per unit
        size = 2 * sum(float(point.multipliers @ (1 / scale)) for point in alone)
        centre, shape = np.full(n, size / 2), np.eye(n) * n * size**2
        best = max(alone, key=lambda point: point.bound(available))
        for _ in range(_STEPS):
            if (centre < 0).any():
                cut = -np.eye(n)[int(np.argmin(centre))]
                depth = -float(centre.min())
            else:
                point = self.at(centre * scale)
                seen(point)
                if point.bound(available) > best.bound(available):
                    best = point
                cut = (available - point.prices) * scale
                depth = best.bound(available) - point.bound(available)
            width = float(np.sqrt(max(cut @ shape @ cut, 0.0)))
            if width <= _TOLERANCE * max(abs(best.cost), 1e-12):
                break
            depth = min(depth / width, 0.999)
            step = shape @ cut / width
            centre = centre - (1 + n * depth) / (n + 1) * step
            shape = shape - 2 * (1 + n * depth) / ((n + 1) * (1 + depth)) * np.outer(step, step)
            shape *= n**2 * (1 - depth**2) / (n**2 - 1)
        return best


class _Hull:
    """The steps of a table that can be best at some multipliers, and which is."""

    def __init__(self, table: Table, weights: Floats) -> None:
        costs = weights @ table.costs
        line = _line(table.prices)
        if line is None:  # prices that do not grow along a line: every step may be the best
            self.where: Integers = np.arange(len(costs))
            self._slopes: Floats | None = None
        else:
            self.where = _lower_hull(line, costs)
            along = line[self.where]
            self._slopes = np.diff(costs[self.where]) / np.diff(along)
            span = max(float(along[-1] - along[0]), 1e-300)
            self._direction = (table.prices[self.where[-1]] - table.prices[self.where[0]]) / span
        self.costs, self.prices = costs[self.where], table.prices[self.where]

    def best(self, multipliers: Floats) -> tuple[int, float, Floats]:
        """Return position in the table, cost and prices of the best step."""
        if self._slopes is None:
            k = int((self.costs + self.prices @ multipliers).argmin())
        else:
            k = int(self._slopes.searchsorted(-float(multipliers @ self._direction)))
        return int(self.where[k]), float(self.costs[k]), self.prices[k]


def _line(prices: Floats) -> Floats | None:
    """Return how far along a line each step's prices [n, R] are [n], or None if they are on none."""
    away = prices - prices[0]
    lengths = np.abs(away).max(axis=1)
    if not lengths.any():
        return np.zeros(len(prices))
    direction = away[lengths.argmax()]
    along: Floats = away @ direction / (direction @ direction)
    return along if np.abs(away - along[:, None] * direction).max() <= _STRAIGHT * lengths.max() else None


def _lower_hull(x: Floats, y: Floats) -> Integers:
    """Return the vertices of the lower convex hull of points, from left to right."""
    order: Integers = np.lexsort((y, x))
    order = order[np.concatenate([[True], np.diff(x[order]) > 0])]
    for _ in range(_ROUNDS):
        if len(order) < 3:
            return order
        a, b = x[order], y[order]
        # A point on or above the line between two others is no vertex, whatever else is dropped with it.
        below = (b[1:-1] - b[:-2]) * (a[2:] - a[:-2]) < (b[2:] - b[:-2]) * (a[1:-1] - a[:-2])
        if below.all():
            return order
        order = order[np.concatenate([[True], below, [True]])]
    hull: list[int] = []
    for k in order.tolist():
        while len(hull) > 1:
            i, j = hull[-2], hull[-1]
            if (y[j] - y[i]) * (x[k] - x[i]) < (y[k] - y[i]) * (x[j] - x[i]):
                break
            hull.pop()
        hull.append(k)
    return np.array(hull, dtype=np.int64)
