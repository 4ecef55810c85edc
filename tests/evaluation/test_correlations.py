"""Differences of rank correlations: the value by scipy, intervals that cover, and items that say nothing."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from layer_surgery.evaluation.correlations import Correlated, correlation_change


def models(seed: int, count: int = 80, gap: float = 0.6) -> tuple[Correlated, Correlated]:
    """Return a model and a noisier one whose noise is partly the same; some right values are equal."""
    generator = np.random.default_rng(seed)
    right = generator.integers(0, 20, count).astype(float)
    shared = right + 4 * generator.standard_normal(count)
    return Correlated(shared, right), Correlated(shared + gap * 6 * generator.standard_normal(count), right)


def test_the_value_is_the_difference_of_scipys_correlations() -> None:
    before, after = models(0)
    expected = [stats.spearmanr(each.values, each.right).statistic for each in (before, after)]
    change = correlation_change(before, after, seed=0)
    assert change is not None
    assert change.value == pytest.approx(expected[1] - expected[0], abs=1e-12) and abs(change.value) > 0.002
    assert (change.pairs, change.confidence) == (80, 0.95)


def test_the_interval_is_nearly_that_of_a_bootstrap_that_ranks_anew() -> None:
    before, after = models(1, count=300)
    found = stats.bootstrap(
        (before.values, after.values, after.right),
        lambda a, b, right: stats.spearmanr(b, right).statistic - stats.spearmanr(a, right).statistic,
        paired=True,
        vectorized=False,
        n_resamples=1_000,
        method="percentile",
        rng=np.random.default_rng(2),
    ).confidence_interval
    change = correlation_change(before, after, seed=3)
    assert change is not None
    width = found.high - found.low
    assert change.low == pytest.approx(found.low, abs=0.15 * width)
    assert change.high == pytest.approx(found.high, abs=0.15 * width)


def test_equal_models_do_not_differ_and_other_items_are_not_compared() -> None:
    before, after = models(2)
    same = correlation_change(before, before, seed=0)
    assert same is not None and (same.value, same.low, same.high) == (0, 0, 0)
    assert correlation_change(before, Correlated(after.values, after.right[::-1].copy()), seed=0) is None
    two = [Correlated(each.values[:2], each.right[:2]) for each in (before, after)]
    assert correlation_change(*two, seed=0) is None
    flat = Correlated(np.ones(80), before.right)
    assert correlation_change(before, flat, seed=0) is None
