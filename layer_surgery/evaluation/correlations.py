"""Spearman's correlation with right values, and its difference between two models with an interval.

What is resampled are items: a resample is how often each counts. Ranks are those of the whole set, so every sum that
the correlation needs is one product of the counts. Shapes: N items, R resamples.
Method: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13 (percentile intervals).
"""

from dataclasses import dataclass

import numpy as np

from layer_surgery.evaluation.ranks import ranks
from layer_surgery.evaluation.uncertainty import CONFIDENCE, RESAMPLES, Array
from layer_surgery.records import Interval

#: Counts that exist at a time (64 MiB).
_AT_A_TIME = 1 << 22


@dataclass(frozen=True)
class Correlated:
    """One model's values, and what they should be."""

    values: Array  #: [N]
    right: Array  #: [N]


def correlation_change(before: Correlated, after: Correlated, seed: int) -> Interval | None:
    """Return the correlation after - before, of the same items; None where an interval would say nothing."""
    count = len(after.values)
    if count < 3 or not np.array_equal(before.right, after.right):
        return None
    right, old, new = (_scaled_ranks(each) for each in (after.right, before.values, after.values))
    columns = np.stack([np.ones(count), right, old, new, right**2, old**2, new**2, right * old, right * new], axis=1)
    generator = np.random.default_rng(seed)
    step = max(1, _AT_A_TIME // count)
    changes = np.empty(RESAMPLES)
    for start in range(0, RESAMPLES, step):
        stop = min(start + step, RESAMPLES)
        often = generator.multinomial(count, np.full(count, 1 / count), size=stop - start)
        changes[start:stop] = _change(often.astype(np.float64) @ columns)
    value = float(_change(columns.sum(axis=0)))
    if not np.isfinite(value):
        return None
    tail = (1 - CONFIDENCE) / 2
    low, high = np.nanquantile(changes, [tail, 1 - tail])
    return Interval(value=value, low=float(low), high=float(high), confidence=CONFIDENCE, pairs=count)


def _scaled_ranks(values: Array) -> Array:
    """Return ranks between -1/2 and 1/2."""
    found = ranks(values)
    scaled: Array = (found - found.mean()) / len(found)
    return scaled


def _change(sums: Array) -> Array:
    """Return the difference of two correlations from sums [..., 9] over items."""
    n, x, a, b, xx, aa, bb, xa, xb = (sums[..., k] for k in range(9))
    with np.errstate(invalid="ignore", divide="ignore"):
        before = (xa - x * a / n) / np.sqrt((xx - x * x / n) * (aa - a * a / n))
        after = (xb - x * b / n) / np.sqrt((xx - x * x / n) * (bb - b * b / n))
    found: Array = after - before
    return found
