"""Whether a model finds the same texts alike as another: Spearman's correlation of similarities, over all pairs.

Pairs that share a text are not independent, so what is resampled are texts: a resample is how often each text counts,
w, and pair (i, j) then counts w_i w_j times; a text and its own copy are no pair. Ranks are those of the whole set, so
every sum that the correlation needs is a form `w^T M w`. Shapes: N texts, R resamples.
Method: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13 (percentile intervals).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from layer_surgery.errors import DataError
from layer_surgery.evaluation.ranks import ranks
from layer_surgery.evaluation.uncertainty import CONFIDENCE
from layer_surgery.records.embedding import Estimate
from layer_surgery.records.interval import Interval

Array = NDArray[np.float64]
#: Fewer than elsewhere, for each takes N^2 operations: the ends of the interval are known to about a fiftieth of it.
RESAMPLES = 2_000
#: Texts whose counts are in memory at a time: R x N float64 in pieces of 32 MiB.
_AT_A_TIME = 1 << 22


@dataclass(frozen=True)
class Agreement:
    """Spearman's correlation, and what it is in each resample; those of one seed are the same for all models."""

    value: float
    resampled: Array  #: [R]
    texts: int

    def estimate(self) -> Estimate:
        low, high = _ends(self.resampled)
        return Estimate(value=self.value, low=low, high=high, confidence=CONFIDENCE, resampled=self.texts)


def agreement(ours: Array, theirs: Array, seed: int) -> Agreement:
    """Return how far two models agree on which pairs of texts are more alike.

    Args:
        ours: [N, N] similarities of texts i and j; the diagonal is not looked at. If they are not symmetric (one text
            by either model), both orders count.
        theirs: the same for the other model.
        seed: of the resampling.

    Raises `DataError` if there are fewer than three texts, or all pairs are alike to one model.
    """
    count = len(ours)
    if count < 3:
        raise DataError(f"similarities need three texts or more, and there are {count}; give longer data.")
    different = ~np.eye(count, dtype=bool)
    x, y = _centred_ranks(ours, different), _centred_ranks(theirs, different)
    if not (x.any() and y.any()):
        raise DataError("all pairs of texts are alike to a model; give different texts.")
    forms = [different.astype(np.float64), x, y, x * x, y * y, x * y]
    whole = _pearson([form.sum() for form in forms])
    generator = np.random.default_rng(seed)
    parts = []
    step = max(1, _AT_A_TIME // count)
    for start in range(0, RESAMPLES, step):
        often = generator.multinomial(count, np.full(count, 1 / count), size=min(step, RESAMPLES - start))
        weights = often.astype(np.float64)
        parts.append(_pearson([((weights @ form) * weights).sum(axis=1) for form in forms]))
    return Agreement(float(whole), np.concatenate(parts), count)


def agreement_change(before: Agreement, after: Agreement) -> Interval:
    """Return after - before with a paired interval. Both must be of the same texts and seed."""
    low, high = _ends(after.resampled - before.resampled)
    return Interval(value=after.value - before.value, low=low, high=high, confidence=CONFIDENCE, pairs=after.texts)


def _centred_ranks(similarities: Array, different: NDArray[np.bool_]) -> Array:
    """Return the ranks of the pairs, their mean taken out, over the largest; 0 on the diagonal."""
    found = np.zeros_like(similarities, dtype=np.float64)
    values = ranks(similarities[different])
    found[different] = (values - values.mean()) / len(values)
    return found


def _pearson(sums: list[Array]) -> Array:
    """Return the correlation from the sums of 1, x, y, x^2, y^2 and xy; nan where a resample has no spread."""
    n, x, y, xx, yy, xy = sums
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Array = (xy - x * y / n) / np.sqrt((xx - x * x / n) * (yy - y * y / n))
    return found


def _ends(resampled: Array) -> tuple[float, float]:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.nanquantile(resampled, [tail, 1 - tail])
    return float(low), float(high)
