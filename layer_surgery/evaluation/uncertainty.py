"""Standard errors of means over windows, and paired bootstrap intervals of the difference between two models.

Pairing takes out what the data have in common: windows differ far more from each other than models on one window do.
Method: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13 (percentile intervals).
"""

import math
import sys
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from layer_surgery.records import Interval, PerplexityChange
from layer_surgery.walk.walk import Losses

RESAMPLES = 10_000
CONFIDENCE = 0.95
#: Drawn indices that exist at a time (32 MiB).
_DRAWN_AT_A_TIME = 1 << 22

Array = NDArray[np.float64]


def mean_per_token(sums: Tensor, counts: Tensor) -> tuple[float, float | None]:
    """Return total / tokens and its standard error over windows; None where at most one window has tokens.

    Args:
        sums: [N] float64, the sum over each window.
        counts: [N], the tokens of each window; windows without any do not count.

    The mean is a ratio of sums. Its variance over windows is that of the ratio estimator (Cochran, Sampling
    Techniques, 1977, section 2.11).
    """
    counts = counts.double()
    windows, total = int((counts > 0).sum()), float(counts.sum())
    mean = float(sums.sum()) / total
    if windows < 2:
        return mean, None
    residuals = sums - mean * counts
    return mean, math.sqrt(windows / (windows - 1) * float(torch.sum(residuals**2)) / total**2)


def perplexity_change(before: Losses, after: Losses, seed: int) -> PerplexityChange | None:
    """Compare the losses of the same windows; None where fewer than two windows have tokens to predict."""
    counts = before.tokens.double().numpy()
    difference = (after.sums - before.sums).numpy()
    if int((counts > 0).sum()) < 2:
        return None
    interval = paired_difference(difference, counts, seed)
    # exp is monotonic, so it takes percentiles to percentiles
    ratio = replace(interval, value=_exp(interval.value), low=_exp(interval.low), high=_exp(interval.high))
    return PerplexityChange(ratio=ratio, loss_difference=interval)


def paired_difference(differences: Array, counts: Array | None, seed: int) -> Interval:
    """Return sum(differences) / sum(counts) with a confidence interval over resampled pairs.

    Args:
        differences: [N] after - before, summed over each window (or of each item).
        counts: [N] tokens of each window, so that windows of different lengths weigh by their tokens; None: 1 each.
            Windows without any are left out.
        seed: of the resampling.
    """
    counts = np.ones_like(differences) if counts is None else counts
    differences, counts = differences[counts > 0], counts[counts > 0]
    generator = np.random.default_rng(seed)
    means = np.empty(RESAMPLES)
    step = max(1, _DRAWN_AT_A_TIME // len(differences))
    for start in range(0, RESAMPLES, step):
        stop = min(start + step, RESAMPLES)
        drawn = generator.integers(0, len(differences), (stop - start, len(differences)))
        means[start:stop] = differences[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(
        value=float(differences.sum() / counts.sum()),
        low=float(low),
        high=float(high),
        confidence=CONFIDENCE,
        pairs=len(differences),
    )


def _exp(nats: float) -> float:
    """Return exp, at most the largest number that can be written down."""
    return math.exp(min(nats, math.log(sys.float_info.max)))
