"""One search over everything that can be cut: of each place the best alternative, under any budgets. Knows numpy only.

A multiple-choice knapsack (Kellerer, Pferschy & Pisinger, Knapsack Problems, 2004, chapter 11): first its Lagrangian
(`relaxation`), which gives the multipliers, a bound and a choice within the budgets; then what the budgets have left is
filled in, and pairs of places exchange what helps. Costs of places may be coupled: with `a_i = sqrt(2 cost_i)`, all
together cost `1/2 sum_ij rho_ij a_i a_j`, where rho says how far their errors meet at the same tokens (`couplings`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from layer_surgery.errors import PlanError
from layer_surgery.surgeon.assignment import Problem
from layer_surgery.surgeon.curves import Alternative, Class, Curve, Floats, Place, classes_of

__all__ = ["Alternative", "Choice", "Curve", "Found", "Place", "UnreachableBudget", "search"]


class UnreachableBudget(PlanError):
    """No choice keeps the budgets; `reachable` are budgets, resource by resource, that one would."""

    def __init__(self, message: str, reachable: Mapping[str, float]) -> None:
        super().__init__(message)
        self.reachable = dict(reachable)


@dataclass(frozen=True)
class Choice:
    """What is done at a place."""

    kind: str
    steps: dict[str, int]  # how many are kept, by the name of the curve
    cost: float  # nats per token, if nothing else were cut
    prices: dict[str, float]


@dataclass(frozen=True)
class Found:
    """The result of a search."""

    choices: dict[str, Choice]  # by the name of the place
    cost: float  #: Nats per token of all choices together, couplings included.
    prices: dict[str, float]  #: What all choices take of each resource, and what is there in any case.
    bound: float  #: No choice within the budgets costs less.
    multipliers: dict[str, float]  #: What one unit more of each resource would save, in nats per token.

    @property
    def gap(self) -> float:
        """Nats per token by which the best choice may be better, at most."""
        return max(self.cost - self.bound, 0.0)


def search(
    places: Sequence[Place],
    budgets: Mapping[str, float],
    *,
    fixed: Mapping[str, float] | None = None,
    couplings: Floats | None = None,
    alike: Sequence[Sequence[str]] = (),
) -> Found:
    """Return the choice of one alternative for each place that costs least within all budgets.

    Args:
        places: where something can be cut, with the alternatives of each. Of equally good ones the earlier is taken.
        budgets: the most that may be taken of each resource, by all places and `fixed` together.
        fixed: what is taken in any case (embeddings, norms).
        couplings: rho [places, places], symmetric with ones on its diagonal; None if costs add.
        alike: sets of places that must take the same alternative and the same steps (a plain checkpoint: the MLPs of
            all layers). Alternatives that some place of a set does not have are left out.

    The budgets are never exceeded. The bound is the optimum of the relaxed problem; with couplings it is that of costs
    that add, times the least that couplings can make of them, and so less tight. Raises `UnreachableBudget` (a
    `PlanError`) with what is reachable, also if several budgets can be kept one by one but no choice was found that
    keeps all.
    """
    resources = sorted({*budgets, *(fixed or {}), *_resources(places)})
    limited = sorted(budgets)
    if not limited:
        raise ValueError("a search needs at least one budget")
    classes = classes_of(places, alike, resources)
    columns = [resources.index(name) for name in limited]
    narrow = _narrowed(classes, columns)
    available = np.array([budgets[name] - (fixed or {}).get(name, 0.0) for name in limited])
    problem = Problem(narrow, available, couplings, len(places))
    _check_each(problem, limited, budgets)
    picks, plain = problem.solve()
    if picks is None:
        raise _unreachable(problem, limited, budgets)
    costs, prices = np.zeros(len(places)), np.zeros(len(resources))
    choices: dict[int, Choice] = {}
    for one, (option, at) in zip(classes, picks, strict=True):
        values = one.costs(option, at)
        prices += one.prices(option, at)
        steps = {table.name: int(table.steps[k]) for table, k in zip(one.options[option], at, strict=True)}
        for place, cost in zip(one.places, values.tolist(), strict=True):
            costs[place] = cost
            taken = _taken(places[place], one.kinds[option], steps)
            choices[place] = Choice(one.kinds[option], steps, cost, taken)
    least = _least_factor(couplings, costs)
    return Found(
        choices={places[number].name: choices[number] for number in range(len(places))},
        cost=problem.total(costs),
        prices={name: float(prices[k]) + (fixed or {}).get(name, 0.0) for k, name in enumerate(resources)},
        bound=least * plain.bound(available),
        multipliers=dict(zip(limited, plain.multipliers.tolist(), strict=True)),
    )


def _least_factor(couplings: Floats | None, costs: Floats) -> float:
    """Return how little couplings can make of costs that add, as a factor."""
    if couplings is None:
        return 1.0
    off_diagonal = np.asarray(couplings) - np.diag(np.diag(couplings))
    if (off_diagonal >= 0).all():
        return float(np.diag(couplings).min())
    return max(float(np.linalg.eigvalsh(couplings)[0]), 0.0)


def _resources(places: Sequence[Place]) -> set[str]:
    curves = [curve for place in places for alternative in place.alternatives for curve in alternative.curves]
    return {name for curve in curves for name in curve.prices}


def _narrowed(classes: Sequence[Class], columns: Sequence[int]) -> list[Class]:
    """Return classes with the prices in some of the resources only."""
    return [
        replace(
            one,
            options=tuple(
                tuple(replace(table, prices=np.ascontiguousarray(table.prices[:, columns])) for table in tables)
                for tables in one.options
            ),
        )
        for one in classes
    ]


def _taken(place: Place, kind: str, steps: Mapping[str, int]) -> dict[str, float]:
    """Return what one place takes of each resource."""
    taken: dict[str, float] = {}
    alternative = next(a for a in place.alternatives if a.kind == kind)
    for curve in alternative.curves:
        at = int(np.flatnonzero(curve.steps == steps[curve.name])[0])
        for resource, prices in curve.prices.items():
            taken[resource] = taken.get(resource, 0.0) + float(prices[at])
    return taken


def _check_each(problem: Problem, limited: Sequence[str], budgets: Mapping[str, float]) -> None:
    """Raise `UnreachableBudget` for budgets that cannot be kept even by themselves."""
    least = np.zeros(len(limited))
    for one in problem.classes:
        least += np.min([sum(table.prices.min(axis=0) for table in tables) for tables in one.options], axis=0)
    beyond = {
        name: budgets[name] - float(problem.available[k]) + float(least[k])
        for k, name in enumerate(limited)
        if least[k] > problem.available[k]
    }
    if beyond:
        raise UnreachableBudget(
            "the budget cannot be reached: "
            + "; ".join(
                f"at most {budgets[n]:,g} {n} is asked for, the least possible is {v:,g}" for n, v in beyond.items()
            )
            + ".",
            beyond,
        )


def _unreachable(problem: Problem, limited: Sequence[str], budgets: Mapping[str, float]) -> UnreachableBudget:
    _picks, prices = problem.smallest()
    reachable = {
        name: budgets[name] + max(float(prices[k] - problem.available[k]), 0.0) for k, name in enumerate(limited)
    }
    return UnreachableBudget(
        "the budgets cannot be reached together; the nearest found is "
        + ", ".join(f"{value:,g} {name}" for name, value in reachable.items())
        + ".",
        reachable,
    )
