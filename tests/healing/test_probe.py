"""Which learning rates a probe tries, and which it takes."""

from __future__ import annotations

import math

import pytest

from layer_surgery.healing.probe import LEARNING_RATES, LIKELIEST, MOST_RATES, downhill

NAN = None  # what the training says of a loss that is not finite


@pytest.mark.parametrize(
    ("costs", "tried", "best"),
    [
        pytest.param(
            {3e-4: 0.015, 1e-4: 0.002, 3e-5: -0.001, 1e-5: 0.0}, [3e-4, 1e-4, 3e-5, 1e-5], 3e-5, id="too high"
        ),
        pytest.param(
            {3e-4: 0.015, 1e-4: 0.02, 1e-3: -0.01, 3e-3: 1.0}, [3e-4, 1e-4, 1e-3, 3e-3], 1e-3, id="worse below"
        ),
        pytest.param({3e-4: -0.1, 1e-3: -0.2, 3e-3: 0.0}, [3e-4, 1e-3, 3e-3], 1e-3, id="higher gains more"),
        pytest.param({3e-4: -0.1, 1e-3: 0.3, 1e-4: -0.05}, [3e-4, 1e-3, 1e-4], 3e-4, id="the likeliest is best"),
        pytest.param({3e-4: -0.1, 1e-3: NAN, 1e-4: -0.2, 3e-5: -0.1}, [3e-4, 1e-3, 1e-4, 3e-5], 1e-4, id="diverges"),
        pytest.param({3e-4: NAN, 1e-4: 0.1, 3e-5: 0.2}, [3e-4, 1e-4, 3e-5], 1e-4, id="all do harm"),
        pytest.param(
            {3e-4: 6e-4, 1e-4: 2e-4, 3e-5: 1e-5, 1e-5: -1e-6}, [3e-4, 1e-4, 3e-5, 1e-5], 3e-4, id="none gains or harms"
        ),
        pytest.param({3e-4: 0.02, 1e-4: 9e-4, 3e-5: 1e-4, 1e-5: 0.0}, [3e-4, 1e-4, 3e-5, 1e-5], 1e-4, id="none gains"),
        pytest.param({3e-4: NAN, 1e-4: NAN, 1e-3: NAN}, [3e-4, 1e-4, 1e-3], 1e-4, id="all diverge"),
    ],
)
def test_the_probe_goes_downhill(costs: dict[float, float | None], tried: list[float], best: float) -> None:
    asked: list[float] = []

    def attempt(rate: float) -> float | None:
        asked.append(rate)
        return costs[rate]

    found = downhill(LEARNING_RATES, LIKELIEST, attempt, loss=3.0)
    assert asked == tried and len(tried) <= MOST_RATES
    assert found == best


def test_one_rate_is_tried_once() -> None:
    asked: list[float] = []
    assert downhill((2e-4,), LIKELIEST, lambda rate: asked.append(rate) or math.inf) == 2e-4
    assert asked == [2e-4]
