"""The one search: against brute force, within every budget, with an honest bound."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product

import numpy as np
import pytest

from layer_surgery.errors import PlanError
from layer_surgery.surgeon.search import Alternative, Curve, Found, Place, UnreachableBudget, search

Item = tuple[str, dict[str, int], float, dict[str, float]]
"""Kind, steps, cost and prices of one thing that can be done at a place."""


def random_places(seed: int, count: int = 4, steps: int = 5, resources: Sequence[str] = ("parameters",)) -> list[Place]:
    """Return places with channels, or two ranks, or nothing, or everything; costs not convex."""
    random = np.random.default_rng(seed)
    places = []
    for number in range(count):
        size = random.uniform(0.5, 5)

        def curve(name: str, size: float = size) -> Curve:
            costs = np.sort(random.uniform(0, size, steps))[::-1]
            prices = {name: np.sort(random.integers(0, 200, steps)).astype(float) for name in resources}
            return Curve(np.arange(steps), costs, prices, name)

        whole = {name: float(random.integers(150, 250)) for name in resources}
        places.append(
            Place(
                f"place {number}",
                (
                    Alternative.single("whole", 0.0, whole),
                    Alternative("channels", (curve(""),)),
                    Alternative("singular", (curve("q"), curve("k"))),
                    Alternative.single("removed", float(random.uniform(size, 2 * size)), dict.fromkeys(resources, 0.0)),
                ),
            )
        )
    return places


def items(place: Place) -> list[Item]:
    found: list[Item] = []
    for alternative in place.alternatives:
        for at in product(*(range(len(curve.steps)) for curve in alternative.curves)):
            chosen = list(zip(alternative.curves, at, strict=True))
            steps = {curve.name: int(curve.steps[k]) for curve, k in chosen}
            names = {name for curve, _k in chosen for name in curve.prices}
            prices = {name: sum(float(curve.prices[name][k]) for curve, k in chosen) for name in names}
            found.append((alternative.kind, steps, sum(float(curve.costs[k]) for curve, k in chosen), prices))
    return found


def within(choice: Sequence[Item], budgets: Mapping[str, float]) -> bool:
    return all(sum(item[3].get(name, 0.0) for item in choice) <= budget for name, budget in budgets.items())


def total(choice: Sequence[Item], rho: np.ndarray | None) -> float:
    costs = np.array([item[2] for item in choice])
    if rho is None:
        return float(costs.sum())
    return 0.5 * float(np.sqrt(2 * costs) @ rho @ np.sqrt(2 * costs))


def every_choice(places: Sequence[Place], budgets: Mapping[str, float]) -> Iterator[tuple[Item, ...]]:
    return (choice for choice in product(*map(items, places)) if within(choice, budgets))


def assert_consistent(found: Found, places: Sequence[Place], budgets: Mapping[str, float]) -> None:
    """Check that what is reported is what the choices are."""
    chosen = []
    for place in places:
        choice = found.choices[place.name]
        item = next(i for i in items(place) if (i[0], i[1]) == (choice.kind, choice.steps))
        assert choice.cost == pytest.approx(item[2]) and choice.prices == pytest.approx(item[3])
        chosen.append(item)
    assert within(chosen, budgets)
    for name, budget in budgets.items():
        assert found.prices[name] == pytest.approx(sum(item[3].get(name, 0.0) for item in chosen))
        assert found.prices[name] <= budget


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("share", [0.02, 0.2, 0.5, 0.8])
def test_one_budget_against_brute_force(seed: int, share: float) -> None:
    places = random_places(seed, count=3, steps=4)
    budgets = {"parameters": 600 * share}
    best = min(total(choice, None) for choice in every_choice(places, budgets))
    found = search(places, budgets)
    assert_consistent(found, places, budgets)
    assert found.cost == pytest.approx(sum(choice.cost for choice in found.choices.values()))
    assert found.bound <= best + 1e-9 <= found.cost + 2e-9
    assert found.cost <= 1.15 * best + 1e-9


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("shares", [(0.3, 0.6, 0.9), (0.5, 0.5, 0.5), (0.9, 0.2, 0.7)])
def test_several_budgets_against_brute_force(seed: int, shares: tuple[float, float, float]) -> None:
    resources = ("parameters", "flops", "bytes")
    places = random_places(seed, count=3, steps=3, resources=resources)
    budgets = {name: 600 * share for name, share in zip(resources, shares, strict=True)}
    best = min(total(choice, None) for choice in every_choice(places, budgets))
    found = search(places, budgets)
    assert_consistent(found, places, budgets)
    assert found.bound <= best + 1e-9 <= found.cost + 2e-9
    assert found.cost <= 1.3 * best + 1e-9


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("negative", [False, True])
def test_couplings_against_brute_force(seed: int, negative: bool) -> None:
    places = random_places(seed, count=4, steps=3)
    random = np.random.default_rng(seed)
    rows = random.standard_normal((4, 6)) if negative else random.uniform(0, 1, (4, 6))
    rows /= np.linalg.norm(rows, axis=1)[:, None]
    rho = 0.5 * rows @ rows.T + 0.5 * np.eye(4)
    budgets = {"parameters": 350.0}
    best = min(total(choice, rho) for choice in every_choice(places, budgets))
    found = search(places, budgets, couplings=rho)
    assert_consistent(found, places, budgets)
    costs = [(choice.kind, choice.steps, choice.cost, choice.prices) for choice in found.choices.values()]
    assert found.cost == pytest.approx(total(costs, rho))
    assert found.bound <= best + 1e-9 <= found.cost + 2e-9
    assert found.cost <= 1.2 * best + 1e-9


def test_couplings_of_nothing_are_none() -> None:
    places = random_places(3)
    plain = search(places, {"parameters": 300.0})
    coupled = search(places, {"parameters": 300.0}, couplings=np.eye(4))
    assert {n: (c.kind, c.steps) for n, c in coupled.choices.items()} == {
        n: (c.kind, c.steps) for n, c in plain.choices.items()
    }
    assert coupled.cost == pytest.approx(plain.cost) and coupled.bound == pytest.approx(plain.bound)


def smooth_places(count: int, width: int, resources: Mapping[str, float]) -> list[Place]:
    """Return places with gains that fall, as those of real channels do."""
    places = []
    for number in range(count):
        gains = (0.01 + number) * np.exp(-np.arange(width) / (50 + 10 * number)) / width
        costs = np.concatenate([[gains.sum()], gains.sum() - gains.cumsum()]).clip(0)
        whole = {name: each * width for name, each in resources.items()}
        places.append(
            Place(
                f"layer {number} mlp",
                (Alternative.single("whole", 0.0, whole), Alternative("channels", (Curve.linear(costs, resources),))),
            )
        )
    return places


@pytest.mark.parametrize("budget", [200_000, 3_333_333, 6_000_000])
def test_many_channels_are_within_a_step_of_the_bound(budget: int) -> None:
    places = smooth_places(12, 704, {"parameters": 768.0})
    found = search(places, {"parameters": budget})
    assert budget - 768 < found.prices["parameters"] <= budget
    assert found.gap <= found.multipliers["parameters"] * 768
    assert found.gap >= 0 and found.multipliers["parameters"] > 0


def test_enough_for_everything_keeps_everything() -> None:
    places = smooth_places(3, 20, {"parameters": 3.0})
    found = search(places, {"parameters": 1000.0}, fixed={"parameters": 500.0})
    assert all(choice.kind == "whole" for choice in found.choices.values())
    assert (found.cost, found.gap, found.multipliers) == (0.0, 0.0, {"parameters": 0.0})
    assert found.prices == {"parameters": 680.0}


def test_a_budget_that_does_not_bind_changes_nothing() -> None:
    places = smooth_places(6, 100, {"parameters": 3.0, "flops": 6.0})
    one = search(places, {"parameters": 900.0})
    both = search(places, {"parameters": 900.0, "flops": 1e9})
    assert {n: c.steps for n, c in both.choices.items()} == {n: c.steps for n, c in one.choices.items()}
    assert both.multipliers["flops"] == 0
    assert one.prices == both.prices  # what is not limited is reported all the same


def test_places_that_are_set_alike() -> None:
    places = random_places(1, count=4, steps=5)
    names = [place.name for place in places]
    budgets = {"parameters": 300.0}
    alike = [names[:3]]
    found = search(places, budgets, alike=alike)
    assert_consistent(found, places, budgets)
    same = [found.choices[name] for name in names[:3]]
    assert len({choice.kind for choice in same}) == 1 and all(choice.steps == same[0].steps for choice in same)

    together = [three for three in zip(*map(items, places[:3]), strict=True) if len({repr(i[:2]) for i in three}) == 1]
    choices = [(*three, last) for three in together for last in items(places[3])]
    for rho in (None, np.full((4, 4), 0.3) + 0.7 * np.eye(4)):
        best = min(total(choice, rho) for choice in choices if within(choice, budgets))
        found = search(places, budgets, alike=alike, couplings=rho)
        assert found.bound <= best + 1e-9 <= found.cost + 2e-9
        assert found.cost <= 1.1 * best + 1e-9
    with pytest.raises(ValueError, match="one set"):
        search(places, budgets, alike=[names[:2], names[1:3]])
    others = [places[0], Place("other", (Alternative.single("merged", 0.0, {"parameters": 1.0}),))]
    with pytest.raises(ValueError, match="nothing can be done"):
        search(others, budgets, alike=[[place.name for place in others]])


def test_steps_that_only_some_have_are_left_out_where_places_are_alike() -> None:
    costs = np.linspace(1, 0, 13)
    twos = Curve.linear(costs, {"parameters": 1.0}, multiple=2)
    threes = Curve.linear(costs, {"parameters": 1.0}, multiple=3)
    places = [Place("a", (Alternative("channels", (twos,)),)), Place("b", (Alternative("channels", (threes,)),))]
    found = search(places, {"parameters": 17.0}, alike=[["a", "b"]])
    assert {name: choice.steps for name, choice in found.choices.items()} == {"a": {"": 6}, "b": {"": 6}}


def test_multiples_and_what_is_there_in_any_case() -> None:
    curve = Curve.linear(
        np.linspace(1, 0, 101), {"parameters": 2.0}, {"parameters": 7.0, "bytes": 4.0}, multiple=16, least=20
    )
    assert curve.steps.tolist() == [32, 48, 64, 80, 96]
    assert curve.prices["parameters"].tolist() == [71, 103, 135, 167, 199]
    assert curve.prices["bytes"].tolist() == [4] * 5
    assert curve.costs.tolist() == pytest.approx([0.68, 0.52, 0.36, 0.2, 0.04])


def test_a_budget_below_the_least_says_what_the_least_is() -> None:
    places = smooth_places(3, 20, {"parameters": 3.0})
    with pytest.raises(
        UnreachableBudget, match=r"at most 400 parameters is asked for, the least possible is 500"
    ) as error:
        search(places, {"parameters": 400.0}, fixed={"parameters": 500.0})
    assert error.value.reachable == {"parameters": 500.0}
    assert isinstance(error.value, PlanError)
    assert search(places, error.value.reachable, fixed={"parameters": 500.0}).prices == {"parameters": 500.0}


def test_budgets_that_exclude_each_other_say_which_do_not() -> None:
    either = (
        Alternative.single("small", 1.0, {"parameters": 1.0, "milliseconds": 9.0}),
        Alternative.single("fast", 1.0, {"parameters": 9.0, "milliseconds": 1.0}),
    )
    places = [Place(name, either) for name in "ab"]
    with pytest.raises(UnreachableBudget, match="together") as error:
        search(places, {"parameters": 5.0, "milliseconds": 5.0})
    reachable = error.value.reachable
    found = search(places, reachable)
    assert all(found.prices[name] <= reachable[name] for name in reachable)
    mixed = search(places, {"parameters": 10.0, "milliseconds": 10.0})
    assert sorted(choice.kind for choice in mixed.choices.values()) == ["fast", "small"]


def test_prices_need_not_follow_a_line() -> None:
    """Measured times fall in steps of the hardware's tiles."""
    steps = np.arange(65)
    curve = Curve(steps, np.exp(-steps / 20.0), {"milliseconds": np.ceil(steps / 16.0), "parameters": steps * 3.0})
    places = [Place(name, (Alternative("channels", (curve,)),)) for name in "abc"]
    found = search(places, {"milliseconds": 7.0, "parameters": 400.0})
    assert sorted(choice.steps[""] for choice in found.choices.values()) == [32, 32, 48]


def test_equally_good_choices_are_told_apart_by_their_order() -> None:
    same = (Alternative.single("whole", 0.0, {"parameters": 2.0}), Alternative.single("gone", 1.0, {"parameters": 0.0}))
    places = [Place(name, same) for name in "abcd"]
    first = search(places, {"parameters": 5.0})
    assert [first.choices[name].kind for name in "abcd"].count("whole") == 2
    for _ in range(3):
        again = search(places, {"parameters": 5.0})
        assert again == first


@pytest.mark.parametrize(
    ("steps", "costs", "prices", "message"),
    [
        ([], [], [], "at least one"),
        ([0, 1], [1.0], [0.0, 1.0], "each of its steps"),
        ([0, 1], [1.0, 0.0], [0.0], "each of its steps"),
        ([0, 1], [np.nan, 0.0], [0.0, 1.0], "finite"),
    ],
)
def test_curves_that_are_none(steps: list[int], costs: list[float], prices: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Curve(np.array(steps), np.array(costs), {"parameters": np.array(prices)})


def test_what_is_asked_for_is_checked() -> None:
    places = smooth_places(2, 4, {"parameters": 3.0})
    with pytest.raises(ValueError, match="at least one budget"):
        search(places, {})
    with pytest.raises(ValueError, match="same name"):
        search([places[0], places[0]], {"parameters": 3.0})
    with pytest.raises(ValueError, match=r"\[2, 2\]"):
        search(places, {"parameters": 3.0}, couplings=np.eye(3))
    twice = Place("twice", (places[0].alternatives[0],) * 2)
    with pytest.raises(ValueError, match="same kind"):
        search([twice], {"parameters": 3.0})
