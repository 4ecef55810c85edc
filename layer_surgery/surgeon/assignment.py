"""A choice for every class within the budgets: begun by the relaxation, filled in, and improved. Knows numpy only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from layer_surgery.surgeon.curves import Class, Floats
from layer_surgery.surgeon.relaxation import Pick, Point, Relaxation

#: Rounds in which coupled costs are made linear anew.
_ROUNDS = 8
#: Multiples of the best multipliers that beginnings are taken from, and at which other options are tried.
_MULTIPLES = (1.0, 1.03, 1.1, 1.3, 2.0)
_OTHERS = (0.3, 0.7, 1.0, 1.4, 3.0)
#: Exchanges between places look at about this many steps of curves (each try counts as some in any case), and make a
#: place smaller at so many even distances.
_EXCHANGES, _TRY, _SPREAD = 10_000_000, 2_000, 9
#: Nothing is exchanged where the gap is below this fraction of the cost already.
_GOOD = 1e-3
#: A gain below this fraction of all costs is rounding.
_ROUNDING = 1e-12


class Problem:
    """Classes with prices in the limited resources only, and what of those is available."""

    def __init__(self, classes: Sequence[Class], available: Floats, couplings: Floats | None, places: int) -> None:
        self.classes, self.available = classes, available
        self.couplings = None if couplings is None else np.asarray(couplings, dtype=np.float64)
        if self.couplings is not None and self.couplings.shape != (places, places):
            raise ValueError(f"couplings are [{places}, {places}], one row a place")
        self.places = places

    def total(self, costs: Floats) -> float:
        """Return what places [n] cost together."""
        if self.couplings is None:
            return float(costs.sum())
        size = _size(costs)
        return 0.5 * float(size @ self.couplings @ size)

    def solve(self) -> tuple[list[Pick] | None, Point]:
        """Return the best choice found (None if none keeps the budgets), and the solution of the relaxed problem."""
        weights, best = np.ones(self.places), None
        plain: Point | None = None
        for _ in range(1 if self.couplings is None else _ROUNDS):
            relaxation = Relaxation(self.classes, weights)
            points: list[Point] = []
            point = relaxation.solve(self.available, points.append)
            plain = plain or point
            state = self._filled(relaxation, point, points)
            if state is None or (best is not None and state.total() >= best.total() * (1 - 1e-4)):
                break
            best = state
            weights = self._weights(state.costs)
        assert plain is not None
        if best is not None and (best.total() * (1 - _GOOD) > plain.bound(self.available)):
            best.exchange()
        return (None if best is None else best.picks), plain

    def _filled(self, relaxation: Relaxation, point: Point, points: Sequence[Point]) -> _State | None:
        """Return the best of several beginnings within the budgets, each filled in."""
        within = [p for p in points if (p.prices <= self.available).all()]
        beginnings = sorted(within, key=lambda p: p.cost)[:2]
        pushed = point.multipliers + 1e-3 * point.multipliers.sum() / len(point.multipliers)
        for multiple in _MULTIPLES:
            for multipliers in (multiple * point.multipliers, multiple * pushed):
                tried = relaxation.at(multipliers)
                if (tried.prices <= self.available).all():
                    beginnings.append(tried)
        if not beginnings:
            picks, prices = self.smallest()
            if (prices <= self.available).all():
                beginnings = [Point(point.multipliers, 0.0, prices, picks)]
        best: _State | None = None
        seen: set[tuple[Pick, ...]] = set()
        for beginning in beginnings:
            if tuple(beginning.picks) in seen:
                continue
            seen.add(tuple(beginning.picks))
            state = _State(self, relaxation, point.multipliers, list(beginning.picks))
            state.fill()
            if best is None or state.total() < best.total():
                best = state
        return best

    def smallest(self) -> tuple[list[Pick], Floats]:
        """Return the picks found that need the least multiple of all budgets, and their prices [R]."""
        nothing = Relaxation(self.classes, np.zeros(self.places))
        scale = 1 / np.maximum(np.abs(self.available), 1e-300)
        weights, tried = np.ones(len(scale)), []
        for _ in range(40):
            point = nothing.at(weights / weights.sum() * scale)
            tried.append(point)
            weights = weights * np.exp(np.clip(point.prices * scale - 1, -1, 1))  # more on what is exceeded

        def excess(prices: Floats) -> tuple[float, float]:
            over = (prices - self.available) * scale
            return float(over.max()), float(over.sum())

        best = min(tried, key=lambda point: excess(point.prices))
        picks, prices = list(best.picks), best.prices
        for number, one in [*enumerate(self.classes)] * 2:  # class by class, whatever was best at some weights
            rest = prices - one.prices(*picks[number])
            among = dict.fromkeys(point.picks[number] for point in tried)
            picks[number] = min([picks[number], *among], key=lambda pick: excess(rest + one.prices(*pick)))
            prices = np.sum([c.prices(*p) for c, p in zip(self.classes, picks, strict=True)], axis=0)
        return picks, prices

    def _weights(self, costs: Floats) -> Floats:
        """Return the slopes [n] of the total in each place's cost."""
        if self.couplings is None:
            return np.ones(self.places)
        size = _size(costs)
        size = np.maximum(size, 0.1 * float(np.sqrt((size**2).mean())) + 1e-30)
        weights: Floats = np.maximum(self.couplings @ size / size, 0.05)
        return weights


class _State:
    """A choice within the budgets, that is made better step by step."""

    def __init__(self, problem: Problem, relaxation: Relaxation, multipliers: Floats, picks: list[Pick]) -> None:
        self.problem, self.relaxation, self.picks = problem, relaxation, picks
        self.costs = np.zeros(problem.places)
        self.left = problem.available.copy()
        for one, (option, at) in zip(problem.classes, picks, strict=True):
            self.costs[list(one.places)] = one.costs(option, at)
            self.left -= one.prices(option, at)
        self._steps = [_TRY + sum(len(t.steps) for tables in one.options for t in tables) for one in problem.classes]
        self._others = [
            [
                [relaxation.option_at(number, option, multiple * multipliers) for multiple in _OTHERS]
                for option in range(len(one.options))
            ]
            for number, one in enumerate(problem.classes)
        ]

    def total(self) -> float:
        """Return what all places cost together."""
        return self.problem.total(self.costs)

    def fill(self) -> None:
        """Spend what is left: the move that saves most, again and again."""
        gains = {number: self._best(number, self.left) for number in range(len(self.picks))}
        fresh = set(gains)
        while True:
            number = max(gains, key=lambda n: (gains[n][0], -n))
            gain, pick = gains[number]
            if gain <= _ROUNDING * self.total():
                return
            # What is left shrinks, so a best move stays the best if it still fits (and, coupled, nearly so).
            if number not in fresh and (self.problem.couplings is not None or not self._fits(number, pick)):
                gains[number] = self._best(number, self.left)
                fresh.add(number)
                continue
            self._set(number, pick)
            gains[number] = self._best(number, self.left)
            fresh = {number}

    def exchange(self) -> None:
        """Make one place smaller so that another can grow, where that saves more than it costs."""
        number_of = len(self.picks)
        tries = _EXCHANGES
        while tries > 0:
            best: tuple[float, int, Pick, int, Pick] | None = None
            for number in range(number_of):
                before = self.picks[number]
                for lost, smaller in self._smaller(number):
                    self._set(number, smaller)
                    for other in range(number_of):
                        if other != number:
                            gain, pick = self._best(other, self.left)
                            tries -= self._steps[other]
                            if best is None or gain - lost > best[0]:
                                best = gain - lost, number, smaller, other, pick
                    self._set(number, before)
                if tries <= 0:
                    break
            if best is None or best[0] <= 1e-9 * self.total():
                return
            self._set(best[1], best[2])
            self._set(best[3], best[4])
            self.fill()

    def _smaller(self, number: int) -> list[tuple[float, Pick]]:
        """Return some picks of a class that take less of something, with what they cost more."""
        option, at = self.picks[number]
        one = self.problem.classes[number]
        now, taken = self._value(number, one.costs(option, at)[:, None])[0], one.prices(option, at)
        picks = {(o, k) for o, found in enumerate(self._others[number]) for k in found}
        for other, tables in enumerate(one.options):
            start = at if other == option else self._others[number][other][0]
            for position, table in enumerate(tables):
                order = np.argsort(table.prices.sum(axis=1), kind="stable")
                spread = set(np.linspace(0, len(order) - 1, _SPREAD).astype(int).tolist())
                if other == option:
                    here = int(np.flatnonzero(order == at[position])[0])
                    spread |= {max(here - back, 0) for back in (1, 2, 3, 5, 8)}
                picks |= {(other, (*start[:position], int(order[k]), *start[position + 1 :])) for k in spread}
        found = []
        for pick in sorted(picks):
            prices = one.prices(*pick)
            if (prices < taken).any() and (prices - taken <= self.left).all():
                found.append((float(self._value(number, one.costs(*pick)[:, None])[0] - now), pick))
        return found

    def _best(self, number: int, left: Floats) -> tuple[float, Pick]:
        """Return the pick of a class that saves most with what is left [R], and what it saves."""
        one = self.problem.classes[number]
        option, at = self.picks[number]
        room = left + one.prices(option, at)
        now = float(self._value(number, one.costs(option, at)[:, None])[0])
        best, best_pick = 0.0, (option, at)
        for other, tables in enumerate(one.options):
            starts = [at] if other == option else self._others[number][other] if len(tables) > 1 else [(0,)]
            for start in dict.fromkeys(starts):
                costs, prices = one.costs(other, start), one.prices(other, start)
                for position, table in enumerate(tables):
                    k = start[position]
                    fits = ((prices - table.prices[k]) + table.prices <= room).all(axis=1)
                    if not fits.any():
                        continue
                    values = self._value(number, (costs - table.costs[:, k])[:, None] + table.costs)
                    chosen = int(np.where(fits, values, np.inf).argmin())
                    pick = other, (*start[:position], chosen, *start[position + 1 :])
                    # The sums are formed anew as the check at the end forms them: rounding must not break a budget.
                    if now - values[chosen] > best and (one.prices(*pick) <= room).all():
                        best, best_pick = now - float(values[chosen]), pick
        return best, best_pick

    def _value(self, number: int, costs: Floats) -> Floats:
        """Return what the total is [n] with costs [m, n] for the places of a class, up to a constant."""
        if self.problem.couplings is None:
            plain: Floats = costs.sum(axis=0)
            return plain
        places = list(self.problem.classes[number].places)
        rho, size, rest = self.problem.couplings, _size(costs), _size(self.costs)
        rest[places] = 0.0
        together: Floats = 0.5 * (size * (rho[np.ix_(places, places)] @ size)).sum(axis=0) + (rho[places] @ rest) @ size
        return together

    def _fits(self, number: int, pick: Pick) -> bool:
        one = self.problem.classes[number]
        return bool((one.prices(*pick) - one.prices(*self.picks[number]) <= self.left).all())

    def _set(self, number: int, pick: Pick) -> None:
        one = self.problem.classes[number]
        self.costs[list(one.places)] = one.costs(*pick)
        self.picks[number] = pick
        # Formed from the beginning, so that rounding does not add up.
        taken = np.sum([c.prices(*p) for c, p in zip(self.problem.classes, self.picks, strict=True)], axis=0)
        self.left = self.problem.available - taken


def _size(costs: Floats) -> Floats:
    result: Floats = np.sqrt(2 * np.maximum(costs, 0.0))
    return result
