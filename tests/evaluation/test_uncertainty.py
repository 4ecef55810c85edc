"""Paired intervals: coverage, windows of different lengths, agreement with scipy, determinism."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from layer_surgery.evaluation.uncertainty import paired_difference, perplexity_change
from layer_surgery.walk.walk import Losses


def test_the_interval_is_that_of_a_bootstrap_by_scipy() -> None:
    generator = np.random.default_rng(0)
    counts = generator.integers(5, 60, 80).astype(float)
    differences = counts * generator.gamma(2.0, 0.1, 80)
    expected = stats.bootstrap(
        (differences, counts),
        lambda d, n, axis: d.sum(axis=axis) / n.sum(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=20_000,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    interval = paired_difference(differences, counts, seed=3)
    width = expected.high - expected.low
    assert interval.low == pytest.approx(expected.low, abs=0.04 * width)
    assert interval.high == pytest.approx(expected.high, abs=0.04 * width)
    assert interval.value == pytest.approx(differences.sum() / counts.sum(), rel=1e-12)
    assert (interval.confidence, interval.pairs) == (0.95, 80)


def test_windows_weigh_by_their_tokens() -> None:
    differences, counts = np.array([10.0, 0.0, 0.0]), np.array([10.0, 30.0, 60.0])
    assert paired_difference(differences, counts, seed=0).value == pytest.approx(0.1)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(5)
    covered = 0
    for seed in range(60):
        counts = generator.integers(20, 60, 50).astype(float)
        differences = counts * (0.02 + 0.1 * generator.standard_normal(50))
        interval = paired_difference(differences, counts, seed)
        covered += interval.low <= 0.02 <= interval.high
    assert 51 <= covered <= 60


def losses(level: float, *, seed: int = 0, n: int = 60) -> Losses:
    """Windows that differ far more from each other than the two models do on one window."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(5, 60, (n,), generator=generator)
    windows = 3 + torch.randn(n, generator=generator, dtype=torch.float64)
    noise = 0.02 * torch.randn(n, generator=torch.Generator().manual_seed(round(level * 1000)), dtype=torch.float64)
    return Losses((windows + level + noise) * counts, counts)


def test_pairing_finds_a_difference_that_is_far_below_the_spread_of_windows() -> None:
    before, after = losses(0.0), losses(0.05)
    change = perplexity_change(before, after, seed=0)
    assert change is not None
    assert 0.03 < change.loss_difference.low < 0.05 < change.loss_difference.high < 0.07
    assert change.ratio.value == pytest.approx(math.exp(after.mean - before.mean), rel=1e-12)
    assert change.ratio.low == pytest.approx(math.exp(change.loss_difference.low), rel=1e-12)
    spread = float((before.sums / before.tokens).std()) / math.sqrt(60)
    assert spread > 0.1  # unpaired, the standard error would be twice the difference


def test_a_model_and_itself_do_not_differ() -> None:
    change = perplexity_change(losses(0.0), losses(0.0), seed=0)
    assert change is not None
    assert (change.loss_difference.value, change.loss_difference.low, change.loss_difference.high) == (0, 0, 0)
    assert (change.ratio.value, change.ratio.low, change.ratio.high) == (1, 1, 1)


def test_the_seed_decides() -> None:
    first, again, other = (perplexity_change(losses(0.0), losses(0.05), seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_windows_without_tokens_do_not_count() -> None:
    before, after = losses(0.0), losses(0.05)
    nothing = torch.zeros(40, dtype=torch.int64)
    padded = [Losses(torch.cat([x.sums, nothing.double()]), torch.cat([x.tokens, nothing])) for x in (before, after)]
    assert perplexity_change(padded[0], padded[1], 0) == perplexity_change(before, after, 0)


@pytest.mark.parametrize("n", [1, 2])
def test_one_window_has_no_interval(n: int) -> None:
    assert (perplexity_change(losses(0.0, n=n), losses(0.05, n=n), 0) is None) == (n == 1)


def test_many_windows_are_resampled_in_pieces_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = perplexity_change(losses(0.0), losses(0.05), 0)
    monkeypatch.setattr("layer_surgery.evaluation.uncertainty._DRAWN_AT_A_TIME", 60 * 7)
    assert perplexity_change(losses(0.0), losses(0.05), 0) == whole
